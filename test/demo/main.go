// Demo tells the story that Holdfast is made for, on a real guest and with
// real times: a running guest is backed up, destroyed, runs again from its
// backup within seconds, and moves back to local disks while it works.
//
// Run it with "make demo". It needs root, cleans up after itself, also when it
// is interrupted, and can be run again.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"holdfast/test/cli"
	"holdfast/test/lab"
)

const (
	host   = "qemu:///system"
	vm     = "demo"
	writes = "/var/lib/guestwriter" // where the guest's writer writes
)

func main() {
	bin := flag.String("holdfast", "bin/holdfast", "the program")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	d := &demo{began: time.Now()}
	err := d.prepare(ctx, *bin)
	if err == nil {
		err = d.story(ctx)
	}
	interrupted := ctx.Err() != nil
	if interrupted {
		fmt.Println("\nInterrupted: cleaning up.")
	}
	// A second Ctrl-C must not leave things behind either.
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	stop()
	if cleanErr := d.clean(); cleanErr != nil {
		err = errors.Join(err, fmt.Errorf("clean up: %w", cleanErr))
	}
	switch {
	case interrupted:
		os.Exit(130)
	case err != nil:
		fmt.Fprintln(os.Stderr, "\ndemo:", err)
		os.Exit(1)
	}
	d.summary()
}

// demo is one run of the story.
type demo struct {
	began time.Time
	tool  *cli.Tool
	dir   string // repository and state
	guest *lab.Guest
	store string // the production storage to recover to
	acked uint64 // records that the second backup must hold
	facts []string
}

// say prints a line of the story with the time since its beginning.
func (d *demo) say(format string, args ...any) {
	fmt.Printf("%7.1f s  %s\n", time.Since(d.began).Seconds(), fmt.Sprintf(format, args...))
}

func (d *demo) chapter(title string) { fmt.Printf("\n%s\n", title) }

// fact keeps a line for the summary.
func (d *demo) fact(format string, args ...any) {
	d.facts = append(d.facts, fmt.Sprintf(format, args...))
}

func (d *demo) prepare(ctx context.Context, bin string) error {
	bin, err := filepath.Abs(bin)
	if err != nil {
		return err
	}
	// What a demo left that was killed outright.
	gone, err := lab.Sweep(ctx)
	if err != nil {
		return err
	}
	for _, s := range gone {
		d.say("removed what an earlier run left: %s", s)
	}
	if _, err := lab.Virsh(ctx, "domstate", vm); err == nil {
		return fmt.Errorf("this machine has a guest named %q already; the demo needs that name", vm)
	}
	if d.dir, err = lab.NewStorage(); err != nil {
		return err
	}
	if d.store, err = lab.NewStorage(); err != nil {
		return err
	}
	d.tool = &cli.Tool{
		Bin: bin, Repo: filepath.Join(d.dir, "repository"), State: filepath.Join(d.dir, "state"),
		Passphrase: "correct horse battery staple",
	}
	fmt.Printf(`A lost VM runs again from its backup, and moves to production while it runs.

A few minutes on an emulated processor. Commands of Holdfast are shown as you
would type them; Ctrl-C stops the story and cleans up.
    HOLDFAST_REPO=%s
    HOLDFAST_STATE=%s
    HOLDFAST_PASSPHRASE=...
`, d.tool.Repo, d.tool.State)
	return nil
}

// holdfast runs a command as an operator would, showing it and what it says.
func (d *demo) holdfast(ctx context.Context, args ...string) (time.Duration, error) {
	d.say("$ holdfast %s", strings.Join(args, " "))
	r := d.tool.Show(ctx, &indent{}, args...)
	if ctx.Err() != nil {
		return r.Took, ctx.Err()
	}
	return r.Took, r.Err()
}

// indent prints what it gets, each line a little to the right.
type indent struct {
	mu   sync.Mutex // guards line and the printing
	line []byte     // not complete yet
}

func (w *indent) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.line = append(w.line, p...)
	for {
		line, rest, ok := bytes.Cut(w.line, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		fmt.Printf("             %s\n", line)
		w.line = rest
	}
}

func (d *demo) story(ctx context.Context) error {
	steps := []func(context.Context) error{d.working, d.backups, d.lost, d.recovered, d.home}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) working(ctx context.Context) error {
	d.chapter("1. A guest at work")
	d.say("starting a small Debian guest named %q under libvirt", vm)
	from := time.Now()
	var err error
	if d.guest, err = lab.New(ctx, lab.Options{Name: vm}); err != nil {
		return err
	}
	if err := d.guest.Boot(ctx); err != nil {
		return err
	}
	d.say("it answers, %.1f s after it was switched on", time.Since(from).Seconds())
	d.fact("Booting the guest from its own disk took %.1f s until its agent answered.", time.Since(from).Seconds())
	if err := d.guest.StartWriter(ctx, writes); err != nil {
		return err
	}
	n, err := d.guest.WaitWriter(ctx, 500)
	if err != nil {
		return err
	}
	d.say("a program in it writes checksummed records and flushes them, without a pause: %d so far", n)
	return nil
}

// after is how many records must be flushed between one step and the next.
const after = 1000

func (d *demo) backups(ctx context.Context) error {
	d.chapter("2. Backed up while it runs")
	if _, err := d.holdfast(ctx, "init"); err != nil {
		return err
	}
	full, err := d.holdfast(ctx, "backup", host, vm)
	if err != nil {
		return err
	}
	if d.acked, err = d.guest.WaitWriter(ctx, after); err != nil {
		return err
	}
	d.say("it went on writing: %d records are flushed, and the next backup must hold them all", d.acked)
	inc, err := d.holdfast(ctx, "backup", host, vm)
	if err != nil {
		return err
	}
	d.fact("The first backup took %.1f s; the second, which reads only what changed, %.1f s.", full.Seconds(), inc.Seconds())
	return nil
}

func (d *demo) lost(ctx context.Context) error {
	d.chapter("3. Lost")
	if err := d.guest.Remove(ctx); err != nil {
		return err
	}
	d.say("the guest and its disk are destroyed: no definition, no file")
	_, err := d.holdfast(ctx, "points")
	return err
}

func (d *demo) recovered(ctx context.Context) error {
	d.chapter("4. Running again, from its backup")
	took, err := d.holdfast(ctx, "recover", vm+"@latest", "--host", host, "--storage", d.store, "--wait")
	if err != nil {
		return err
	}
	d.say("guest answering %.1f s after the command", took.Seconds())
	d.fact("Recovered from the backup, the guest answered %.1f s after the command.", took.Seconds())
	d.guest = lab.Open(vm)
	if err := d.guest.Verify(ctx, d.acked, writes); err != nil {
		return err
	}
	d.say("all %d records are there and their checksums hold", d.acked)
	d.fact("Every record flushed before the second backup was there, checksums right.")
	if err := d.guest.StartWriter(ctx, writes); err != nil {
		return err
	}
	n, err := d.guest.WaitWriter(ctx, after)
	if err != nil {
		return err
	}
	d.say("it writes again: %d records", n)
	return nil
}

func (d *demo) home(ctx context.Context) error {
	d.chapter("5. To production storage, while it runs")
	var sessions []cli.Session
	if _, err := d.tool.JSON(ctx, &sessions, "sessions"); err != nil {
		return err
	}
	if len(sessions) != 1 {
		return fmt.Errorf("there are %d sessions, not 1", len(sessions))
	}
	from, err := d.guest.Acked(ctx)
	if err != nil {
		return err
	}
	took, err := d.holdfast(ctx, "migrate", sessions[0].Session)
	if err != nil {
		return err
	}
	n, err := d.guest.Acked(ctx)
	if err != nil {
		return err
	}
	d.say("meanwhile the guest flushed %d records", n-from)
	d.fact("Its disk moved to local storage in %.1f s while the guest flushed %d records.", took.Seconds(), n-from)
	if err := d.guest.StopWriter(ctx); err != nil {
		return err
	}
	if n, err = d.guest.Acked(ctx); err != nil {
		return err
	}
	if err := d.guest.Verify(ctx, n, writes); err != nil {
		return err
	}
	d.say("all %d records are there and their checksums hold", n)
	if err := d.local(ctx); err != nil {
		return err
	}
	if _, err := d.holdfast(ctx, "sessions"); err != nil {
		return err
	}
	if pids, err := d.tool.Processes(); err != nil || len(pids) > 0 {
		return errors.Join(err, fmt.Errorf("processes %v still serve the backup", pids))
	}
	d.say("nothing serves the backup any more: the guest does not need it")
	return nil
}

// local proves that the guest's disks have no link to the repository.
func (d *demo) local(ctx context.Context) error {
	xml, err := lab.Virsh(ctx, "dumpxml", vm)
	if err != nil {
		return err
	}
	if strings.Contains(xml, "protocol='nbd'") {
		return errors.New("the guest's configuration still names an NBD server")
	}
	list, err := lab.Virsh(ctx, "domblklist", "--details", vm)
	if err != nil {
		return err
	}
	for line := range strings.Lines(list) {
		f := strings.Fields(line)
		if len(f) != 4 || f[1] != "disk" {
			continue
		}
		out, err := exec.CommandContext(ctx, "qemu-img", "info", "-U", f[3]).CombinedOutput()
		if err != nil {
			return fmt.Errorf("qemu-img info %s: %w: %s", f[3], err, out)
		}
		if strings.Contains(string(out), "backing file") {
			return fmt.Errorf("%s still has a backing file", f[3])
		}
		d.say("disk %s is %s, complete in itself", f[2], f[3])
	}
	return nil
}

// clean removes all that the story made, whatever it came to.
func (d *demo) clean() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var errs []error
	if d.tool != nil {
		var sessions []cli.Session
		if _, err := os.Stat(d.tool.State); err == nil {
			// No repository, no sessions.
			if _, err := d.tool.JSON(ctx, &sessions, "sessions"); err == nil {
				for _, s := range sessions {
					errs = append(errs, d.tool.Run(ctx, "undo", s.Session).Err())
				}
			}
		}
		pids, err := d.tool.Processes()
		errs = append(errs, err)
		for _, pid := range pids {
			if p, err := os.FindProcess(pid); err == nil {
				errs = append(errs, p.Kill())
			}
		}
	}
	if d.guest != nil {
		errs = append(errs, d.guest.Remove(ctx))
	}
	for _, dir := range []string{d.dir, d.store} {
		if dir != "" {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

func (d *demo) summary() {
	d.chapter("In short")
	for _, f := range d.facts {
		fmt.Println("  " + f)
	}
	fmt.Println("  The guest, its disks, the repository and the sessions of this story are removed again.")
}
