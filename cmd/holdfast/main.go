// Holdfast backs up virtual machines while they run, and brings a lost one
// back by running it straight from its backup.
//
// This package turns flags into calls of a node.Node and results into text or
// JSON; it decides nothing. Results go to stdout, all else to stderr. The exit
// status is 0 when all was done, 1 when something failed, 2 when the command
// was called wrongly.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"syscall"

	"holdfast/internal/node"
)

// version is set by the linker.
var version = "unknown"

const (
	done   = 0
	failed = 1
	wrong  = 2 // usage
	// interruptedTwice is the shell's word for death by SIGINT.
	interruptedTwice = 130
)

// errInterrupted is the cause of a context that a signal has ended.
var errInterrupted = errors.New("stopped by a signal")

func main() {
	// A backup's garbage is large buffers that are soon filled anew: collecting
	// it earlier than by default costs little time and halves the peak, to some
	// 215 MB. It is a soft limit; what is needed is had.
	debug.SetMemoryLimit(200 << 20)
	ctx, stop := interruptible()
	defer stop()
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// interruptible gives a context that ends with the first signal to stop; the
// second one ends the process at once.
func interruptible() (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, stopSignals...)
	// Catching SIGPIPE turns a pipe closed by its reader into an error of the
	// write, so that work on a host is not cut off by "| head".
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	var ended atomic.Bool
	go func() { // for as long as the process lives
		for s := range signals {
			if ended.Swap(true) {
				os.Exit(interruptedTwice)
			}
			cancel(fmt.Errorf("%w: %s", errInterrupted, s))
		}
	}()
	return ctx, func() { cancel(nil) }
}

// run is the program, and returns its exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	out := &output{w: stdout}
	a := newApp(out, stderr)
	root := a.root()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if closeErr := a.close(); err == nil {
		err = closeErr
	}
	return end(ctx, err, out, stderr)
}

// end says what went wrong, and gives the exit status.
func end(ctx context.Context, err error, out *output, stderr io.Writer) int {
	if err == nil {
		return done
	}
	if errors.Is(out.err, syscall.EPIPE) {
		return failed // nobody reads any more
	}
	fmt.Fprintln(stderr, "holdfast: "+errorLine(ctx, err))
	if _, ok := errors.AsType[*node.UsageError](err); ok {
		return wrong
	}
	return failed
}

// errorLine is one line that says what went wrong and what to do.
func errorLine(ctx context.Context, err error) string {
	if interrupted(ctx) && (errors.Is(err, context.Canceled) || errors.Is(err, errInterrupted)) {
		return interruption(ctx, err)
	}
	s := oneLine(err.Error())
	if advice := node.Advice(err); advice != "" {
		s += "; " + advice
	}
	return s
}

// interruption is the line of a command that a signal has ended: what it was
// at, which may tell of something that could not be cleaned up, and what
// continues it.
func interruption(ctx context.Context, err error) string {
	cause := context.Cause(ctx).Error()
	if u, ok := errors.AsType[*node.Unfinished](err); ok {
		return fmt.Sprintf("%s; %q continues", cause, u.Next)
	}
	at := oneLine(err.Error())
	for _, known := range []string{cause, context.Canceled.Error()} {
		at = strings.Trim(strings.ReplaceAll(at, known, ""), ":; ")
	}
	if at == "" {
		return cause
	}
	return cause + ": " + at
}

// oneLine joins the lines of joined errors.
func oneLine(s string) string {
	lines := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' })
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	return strings.Join(lines, "; ")
}

// output is stdout, and remembers how writing to it failed: a closed pipe in an
// error may be another one, as of a host that went away.
type output struct {
	w   io.Writer
	err error
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.w.Write(p)
	if err != nil {
		o.err = err
	}
	return n, err
}
