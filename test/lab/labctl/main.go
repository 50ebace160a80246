// Labctl sets up the lab and runs lab guests by hand. See package lab.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"holdfast/test/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "labctl:", err)
		os.Exit(1)
	}
}

func logf(format string, args ...any) { fmt.Fprintf(os.Stderr, "lab: "+format+"\n", args...) }

func run(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New("say setup, guest, exec, remove or sweep")
	}
	verb, args := args[0], args[1:]
	switch verb {
	case "setup":
		return setup(ctx, args)
	case "guest":
		return guest(ctx, args)
	case "exec":
		if len(args) < 2 {
			return errors.New("exec NAME COMMAND")
		}
		out, err := lab.Open(args[0]).Exec(ctx, strings.Join(args[1:], " "))
		fmt.Print(out)
		return err
	case "remove":
		for _, name := range args {
			g := lab.Open(name)
			g.Dir, _ = lab.Dir(ctx, name)
			if err := g.Remove(ctx); err != nil {
				return err
			}
		}
		return nil
	case "sweep":
		gone, err := lab.Sweep(ctx)
		for _, s := range gone {
			logf("removed %s", s)
		}
		return err
	}
	return fmt.Errorf("unknown verb %q", verb)
}

func setup(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("setup", flag.ContinueOnError)
	writer := flags.String("writer", "", "a static build of test/lab/guestwriter; made by go when empty")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *writer != "" {
		var err error
		if *writer, err = filepath.Abs(*writer); err != nil {
			return err
		}
	}
	return lab.Setup(ctx, *writer, logf)
}

func guest(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("guest", flag.ContinueOnError)
	format := flags.String("format", "qcow2", "of the system disk: raw or qcow2")
	disks := flags.Int("disks", 0, "how many data disks")
	if err := flags.Parse(args); err != nil {
		return err
	}
	o := lab.Options{Keep: true, Format: *format, Disks: make([]lab.Disk, *disks)}
	g, err := lab.New(ctx, o)
	if err != nil {
		return err
	}
	from := time.Now()
	if err := g.Boot(ctx); err != nil {
		return errors.Join(err, g.Remove(context.WithoutCancel(ctx)))
	}
	logf("its agent answered after %.1f s", time.Since(from).Seconds())
	fmt.Println(g.Name, strings.Join(g.Disks, " "))
	return nil
}
