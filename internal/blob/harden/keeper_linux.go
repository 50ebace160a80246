package harden

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/blob"
)

const (
	clockName = "clock"
	lockName  = "lock"
	// How long answers stay for their writers, and what writers have left half
	// done.
	answerRest  = 15 * time.Minute
	requestRest = time.Hour
	// How often locks are looked through for those that have ended, and the
	// clock is written down.
	expireEvery = time.Minute
	clockEvery  = 10 * time.Minute
)

// Keeper keeps a hardened directory. Its methods may not run in parallel.
type Keeper struct {
	root  *root
	mark  Mark
	guard *os.File // holds the exclusive lock
	locks *journal
	clock clock
	never []string        // prefixes of names that are never locked
	sound map[string]bool // directories that are
	note  func(format string, args ...any)

	at        time.Time // that locks end by
	clockKept time.Duration
	thrown    int // requests, since clear was here: a writer cannot fill the log

	// For tests: the time, and a cut before a step.
	now  func() (instant, error)
	step func(what string) error
}

// Options of Open.
type Options struct {
	// Never are prefixes of names that are not locked.
	Never []string
	// Note is told of what an administrator should know; nil for nobody.
	Note func(line string)
}

// Open opens a hardened directory as its keeper, and completes what a keeper
// that died was at.
func Open(dir string, o Options) (*Keeper, error) {
	return open(dir, o, now, func(string) error { return nil })
}

func open(dir string, o Options, now func() (instant, error), step func(string) error) (*Keeper, error) {
	k := &Keeper{never: o.Never, sound: map[string]bool{}, now: now, step: step}
	k.note = func(format string, args ...any) {
		if o.Note != nil {
			o.Note(fmt.Sprintf(format, args...))
		}
	}
	if err := k.open(dir); err != nil {
		return nil, fmt.Errorf("keep %s: %w", dir, errors.Join(err, k.Close()))
	}
	return k, nil
}

func (k *Keeper) open(dir string) (err error) {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: run it as root", ErrNotRoot)
	}
	if dir, err = real(dir); err != nil {
		return err
	}
	if k.root, err = openRoot(dir); err != nil {
		return err
	}
	if k.mark, err = readMark(dir); err != nil {
		return err
	}
	if err := k.safe(); err != nil {
		return err
	}
	if k.guard, err = os.OpenFile(k.own(lockName), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	if err := unix.Flock(int(k.guard.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return ErrRuns
	} else if err != nil {
		return err
	}
	if k.locks, err = openJournal(k.own(journalName)); err != nil {
		return err
	}
	if k.clock, err = readClock(k.own(clockName)); err != nil {
		return err
	}
	if k.locks.damaged {
		k.note("warning: %s is damaged in its middle: no lock is ended any more; see the documentation on hardened directories", k.own(journalName))
	}
	if err := k.tick(true); err != nil {
		return err
	}
	return k.complete()
}

// own is the path of a file of root's own.
func (k *Keeper) own(name string) string { return filepath.Join(k.root.path, blob.HardenDir, name) }

// safe sees that what the locks rest on is root's.
func (k *Keeper) safe() error {
	if err := safeAbove(k.root.path, k.mark.UID); err != nil {
		return err
	}
	for name, open := range map[string]bool{".": true, blob.HardenDir: false, blob.HardenRequests: true, blob.HardenAnswers: false, blob.HardenCanaries: true} {
		f, err := k.root.open(name, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		st, err := statFile(f)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		if !sound(&st) || !open && st.Mode&0o022 != 0 {
			return fmt.Errorf("%w: %s can be changed by others than root; prepare it anew with --user", ErrUnsafe, name)
		}
	}
	return nil
}

// Close lets go of the directory. Locks stay.
func (k *Keeper) Close() (err error) {
	if k.locks != nil && k.locks.f != nil {
		err = k.locks.f.Close()
	}
	if k.guard != nil {
		err = errors.Join(err, k.guard.Close())
	}
	if k.root != nil {
		err = errors.Join(err, k.root.close())
	}
	return err
}

// tick takes notice of the time; now and then, or when asked, it is written down.
func (k *Keeper) tick(write bool) error {
	i, err := k.now()
	if err != nil {
		return err
	}
	was := k.clock
	k.at = k.clock.tick(i)
	if (was.Gap == 0) != (k.clock.Gap == 0) {
		write = true
		if k.clock.Gap != 0 {
			k.note("warning: the clock has gone ahead by %s: locks end that much later, until it was lived through", time.Duration(k.clock.Gap).Round(time.Second))
		}
	}
	if !write && i.mono-k.clockKept < clockEvery {
		return nil
	}
	k.clockKept = i.mono
	text, err := json.Marshal(k.clock)
	if err == nil {
		err = writeNew(k.own(clockName), text, 0o600)
	}
	return err
}

func readClock(path string) (c clock, err error) {
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, &c)
	}
	if err != nil {
		return clock{}, fmt.Errorf("%w: %s: %w; prepare the directory anew with --user", ErrDamaged, path, err)
	}
	return c, nil
}

func readMark(dir string) (m Mark, err error) {
	text, err := os.ReadFile(filepath.Join(dir, blob.HardenMark))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return m, ErrNotHardened
	case err != nil:
		return m, err
	}
	if err := json.Unmarshal(text, &m); err != nil || m.Version != 1 || m.UID <= 0 || m.Longest <= 0 {
		return m, fmt.Errorf("%w: %s", ErrDamaged, blob.HardenMark)
	}
	return m, nil
}

// Once answers what was asked, ends locks whose time has passed, and clears up.
func (k *Keeper) Once(ctx context.Context) (d Done, err error) {
	if err := k.tick(true); err != nil {
		return d, err
	}
	return k.round(ctx, true)
}

// Run does so until ctx ends, as soon as something is asked. report is told once
// a minute, and at the end, when something was done.
func (k *Keeper) Run(ctx context.Context, report func(Done)) error {
	w, err := watch(k.own(filepath.Base(blob.HardenRequests)))
	if err != nil {
		return err
	}
	defer w.Close()
	var d Done
	tell := func() {
		if d != (Done{}) {
			report(d)
		}
		d = Done{}
	}
	defer tell()
	var looked time.Time
	for ctx.Err() == nil {
		due := time.Since(looked) >= expireEvery
		if due {
			looked = time.Now()
		}
		one, err := k.round(ctx, due)
		d = d.plus(one)
		switch {
		case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
			if due { // to give up would be to lock nothing any more
				k.note("warning: %v; it is tried again", err)
			}
		case err != nil:
			return err
		}
		if due {
			tell()
		}
		if err := w.wait(ctx, time.Second); err != nil {
			return err
		}
	}
	return nil
}

// round answers what is asked, and with due does what is done now and then.
func (k *Keeper) round(ctx context.Context, due bool) (d Done, err error) {
	if err := k.tick(false); err != nil {
		return d, err
	}
	if d, err = k.serve(ctx); err != nil || !due {
		return d, err
	}
	ended, err := k.Release(false)
	d.Released += len(ended)
	return d, errors.Join(err, k.clear())
}

// Release ends the locks whose time has passed, or only tells which those are.
func (k *Keeper) Release(dryRun bool) (ended []string, err error) {
	if k.locks.damaged {
		return nil, nil
	}
	var lines []string
	for name, until := range k.locks.until {
		if until >= k.at.Unix() {
			continue
		}
		if !dryRun {
			if err := k.free(name); err != nil {
				k.note("warning: the lock of %s has ended, but: %v", name, err)
				continue
			}
			lines = append(lines, journalLine('-', 0, name))
		}
		ended = append(ended, name)
	}
	if len(lines) == 0 {
		return ended, nil
	}
	if err := k.step("record the end of locks"); err != nil {
		return nil, err
	}
	if err := k.locks.add(lines...); err != nil {
		return nil, err
	}
	return ended, errors.Join(k.locks.sync(), k.locks.compact())
}

// free removes an object's attribute.
func (k *Keeper) free(name string) error {
	if err := k.step("end the lock of " + name); err != nil {
		return err
	}
	f, err := k.root.open(name, unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	err = setImmutable(f, false)
	return errors.Join(err, f.Close())
}

// clear removes old answers, and what lies in the requests and is none.
func (k *Keeper) clear() error {
	k.thrown = 0
	names, err := k.list(blob.HardenAnswers, 100_000)
	if err != nil {
		return err
	}
	rest := answerRest
	if len(names) > 1000 {
		rest /= 5
	}
	for _, name := range names {
		if age, err := k.age(blob.HardenAnswers + "/" + name); err == nil && age < rest {
			continue
		}
		if err := os.Remove(k.own(filepath.Join(filepath.Base(blob.HardenAnswers), name))); err != nil {
			return err
		}
	}
	if names, err = k.list(blob.HardenRequests, 10_000); err != nil {
		return err
	}
	for _, name := range names {
		if age, err := k.age(blob.HardenRequests + "/" + name); err == nil && age > requestRest {
			k.removeRequest(name)
		}
	}
	return nil
}

// age is how long ago something was changed.
func (k *Keeper) age(name string) (time.Duration, error) {
	f, err := k.root.open(name, unix.O_PATH)
	if err != nil {
		return 0, err
	}
	st, err := statFile(f)
	return time.Since(time.Unix(st.Mtim.Unix())), errors.Join(err, f.Close())
}

// removeRequest removes a file from the requests; what is no file may stay.
func (k *Keeper) removeRequest(name string) {
	dir, err := k.root.open(blob.HardenRequests, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return
	}
	defer dir.Close()
	if errors.Is(unix.Unlinkat(int(dir.Fd()), name, 0), unix.EISDIR) {
		_ = unix.Unlinkat(int(dir.Fd()), name, unix.AT_REMOVEDIR)
	}
}

// list gives at most so many names in a directory.
func (k *Keeper) list(dir string, most int) ([]string, error) {
	f, err := k.root.open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	names, err := f.Readdirnames(most)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, errors.Join(err, f.Close())
}

// lockable reports whether an object of that name is locked at all.
func (k *Keeper) lockable(name string) bool {
	if rest, ok := strings.CutPrefix(name, blob.HardenCanaries+"/"); ok {
		return blob.CheckName(rest) == nil && !strings.Contains(rest, "/")
	}
	for _, p := range k.never {
		if strings.HasPrefix(name, p) {
			return false
		}
	}
	return blob.CheckName(name) == nil
}
