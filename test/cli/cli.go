// Package cli runs the built program as an operator or a script would, for the
// end-to-end tests, the demo and the benchmark: its own repository and state,
// results as JSON, processes that can be killed at any moment.
package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Tool is the program with its surroundings. Its methods may run in parallel.
type Tool struct {
	Bin        string   // the program
	Repo       string   // HOLDFAST_REPO
	State      string   // HOLDFAST_STATE
	Passphrase string   // HOLDFAST_PASSPHRASE
	More       []string // what else is in its environment, as NAME=VALUE
}

// Result is how a run ended.
type Result struct {
	Args           []string
	Stdout, Stderr string
	Code           int           // exit status; -1 when killed by a signal
	Took           time.Duration // wall time
	MaxRSS         int64         // peak resident memory of the process, bytes
}

// Err is nil when the program ended with 0.
func (r Result) Err() error {
	if r.Code == 0 {
		return nil
	}
	return fmt.Errorf("holdfast %s: exit status %d: %s", strings.Join(r.Args, " "), r.Code, strings.TrimSpace(r.Stderr))
}

// Process is a run that has not ended yet.
type Process struct {
	*exec.Cmd
	args     []string
	began    time.Time
	out, err syncBuffer
	done     chan struct{}
	result   Result
}

// syncBuffer may be read while the process writes.
type syncBuffer struct {
	also io.Writer // gets everything too, unless nil

	mu sync.Mutex // guards b
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.also != nil {
		if n, err := s.also.Write(p); err != nil {
			return n, err
		}
	}
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// Start starts the program and returns at once. The caller must Wait.
func (t *Tool) Start(args ...string) (*Process, error) { return t.start(nil, args) }

func (t *Tool) start(also io.Writer, args []string) (*Process, error) {
	p := &Process{Cmd: exec.Command(t.Bin, args...), args: args, began: time.Now(), done: make(chan struct{})}
	p.Env = t.Env()
	p.out.also, p.err.also = also, also
	p.Cmd.Stdout, p.Cmd.Stderr = &p.out, &p.err
	// A detached process holds the pipes open: the run is over when its first
	// process is.
	p.WaitDelay = 500 * time.Millisecond
	if err := p.Cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		// The state tells all; the error only repeats it, or that a child kept
		// the pipes.
		_ = p.Cmd.Wait()
		p.result = Result{Args: args, Stdout: p.out.String(), Stderr: p.err.String(), Code: p.ProcessState.ExitCode(), Took: time.Since(p.began)}
		if ru, ok := p.ProcessState.SysUsage().(*syscall.Rusage); ok {
			p.result.MaxRSS = maxRSS(ru)
		}
	}()
	return p, nil
}

// Env is the environment that the program runs in.
func (t *Tool) Env() []string {
	return slices.Concat(os.Environ(), []string{"HOLDFAST_REPO=" + t.Repo, "HOLDFAST_STATE=" + t.State, "HOLDFAST_PASSPHRASE=" + t.Passphrase}, t.More)
}

// Stderr is what the process has written to stderr so far; Stdout likewise.
func (p *Process) Stderr() string { return p.err.String() }
func (p *Process) Stdout() string { return p.out.String() }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits until the process has ended.
func (p *Process) Wait() Result {
	<-p.done
	return p.result
}

// Kill ends the process as a crash would and waits.
func (p *Process) Kill() Result {
	p.Process.Signal(syscall.SIGKILL)
	return p.Wait()
}

// Run runs the program to its end. When ctx ends first it is interrupted, and
// killed a little later.
func (t *Tool) Run(ctx context.Context, args ...string) Result { return t.Show(ctx, nil, args...) }

// Show is Run, and gives w all that the program says when it says it. Writes to
// w may come in parallel.
func (t *Tool) Show(ctx context.Context, w io.Writer, args ...string) Result {
	p, err := t.start(w, args)
	if err != nil {
		return Result{Args: args, Code: -1, Stderr: err.Error()}
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		p.Process.Signal(os.Interrupt)
		select {
		case <-p.done:
		case <-time.After(20 * time.Second):
			p.Kill()
		}
	}
	return p.Wait()
}

// JSON runs the program with --json and decodes its stdout into result, also
// when the program failed having written some. The error is the program's.
func (t *Tool) JSON(ctx context.Context, result any, args ...string) (Result, error) {
	r := t.Run(ctx, append(args, "--json")...)
	if s := strings.TrimSpace(r.Stdout); s != "" {
		if err := json.Unmarshal([]byte(s), result); err != nil {
			return r, fmt.Errorf("holdfast %s: its --json does not parse: %w: %.300s", strings.Join(args, " "), err, s)
		}
	}
	return r, r.Err()
}

// Backup is one element of backup's --json.
type Backup struct {
	VM          string  `json:"vm"`
	Point       string  `json:"point"`
	ReadBytes   int64   `json:"read_bytes"`
	NewBytes    int64   `json:"new_bytes"`
	StoredBytes int64   `json:"stored_bytes"`
	FullReason  string  `json:"full_reason"`
	Consistency string  `json:"consistency"`
	Seconds     float64 `json:"seconds"`
	Error       string  `json:"error"`
}

// Point is one element of points' --json.
type Point struct {
	ID          string    `json:"id"`
	VM          string    `json:"vm"`
	Time        time.Time `json:"time"`
	Consistency string    `json:"consistency"`
}

// Session is what recover and publish return, and an element of sessions'
// --json.
type Session struct {
	Session string   `json:"session"`
	VM      string   `json:"vm"`
	State   string   `json:"state"`
	URIs    []string `json:"uris"`
}

// Processes finds the running processes of this tool, detached ones too: those
// of its program with its HOLDFAST_STATE.
func (t *Tool) Processes() ([]int, error) {
	exe, err := filepath.EvalSymlinks(t.Bin)
	if err != nil {
		return nil, err
	}
	envs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, env := range envs {
		dir := filepath.Dir(env)
		if got, err := os.Readlink(filepath.Join(dir, "exe")); err != nil || strings.TrimSuffix(got, " (deleted)") != exe {
			continue
		}
		b, err := os.ReadFile(env)
		if err != nil || !bytes.Contains(append([]byte{0}, b...), []byte("\x00HOLDFAST_STATE="+t.State+"\x00")) {
			continue
		}
		var pid int
		if _, err := fmt.Sscan(filepath.Base(dir), &pid); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Find returns the session that runs the VM of that name.
func (t *Tool) Find(ctx context.Context, vm string) (Session, error) {
	var all []Session
	if _, err := t.JSON(ctx, &all, "sessions"); err != nil {
		return Session{}, err
	}
	for _, s := range all {
		if s.VM == vm {
			return s, nil
		}
	}
	return Session{}, fmt.Errorf("no session runs %q: %+v", vm, all)
}
