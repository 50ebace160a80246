package harden

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/blob"
)

// world is a directory in which some locks have ended and others are asked for.
// Clocks are the test's.
type world struct {
	machine
	dir   string
	k     *Keeper
	start time.Time
}

func newWorld(t *testing.T, in string) *world {
	w := &world{dir: hardened(t, in)}
	i, err := now()
	must(t, err)
	w.i, w.start = i, i.wall
	return w
}

func (w *world) open(t *testing.T, step func(string) error) error {
	if step == nil {
		step = func(string) error { return nil }
	}
	k, err := open(w.dir, Options{Note: func(s string) { t.Log(s) }}, func() (instant, error) { return w.i, nil }, step)
	w.k = k
	return err
}

func (w *world) wish(name string, hours int) blob.LockWish {
	return blob.LockWish{Name: name, Until: w.start.Add(time.Duration(hours) * time.Hour).Unix()}
}

// Locks end when their time was lived through, and not when the clock says so.
func TestExpiry(t *testing.T) {
	w := newWorld(t, ground(t))
	store(t, w.dir, "packs/00/short")
	store(t, w.dir, "packs/00/long")
	must(t, w.open(t, nil))
	defer w.k.Close()
	ask(t, w.dir, id(1), w.wish("packs/00/short", 1), w.wish("packs/00/long", 100))
	expect := func(what string, short, long bool) {
		t.Helper()
		once(t, w.k)
		if s, l := locked(t, w.dir, "packs/00/short"), locked(t, w.dir, "packs/00/long"); s != short || l != long {
			t.Errorf("%s: locked are short %v, long %v", what, s, l)
		}
	}
	expect("asked", true, true)
	w.run(59 * time.Minute)
	expect("before", true, true)
	w.run(2 * time.Minute)
	expect("after", false, true)
	if err := os.Remove(filepath.Join(w.dir, "packs/00/short")); err != nil {
		t.Error(err)
	}
	w.step(365 * 24 * time.Hour)
	expect("a year ahead", false, true)
	must(t, w.k.Close())
	must(t, w.open(t, nil))
	expect("a year ahead, another keeper", false, true)
	w.step(-2 * 365 * 24 * time.Hour)
	expect("a year back", false, true)
	w.step(365 * 24 * time.Hour)
	w.run(97 * time.Hour)
	expect("before", false, true)
	w.restart(10 * time.Minute)
	must(t, w.k.Close())
	must(t, w.open(t, nil))
	if ended, err := w.k.Release(true); err != nil || len(ended) != 0 {
		t.Errorf("%v, %v", ended, err)
	}
	w.run(3 * time.Hour)
	must(t, w.k.tick(false))
	if ended, err := w.k.Release(true); err != nil || len(ended) != 1 || !locked(t, w.dir, "packs/00/long") {
		t.Errorf("a dry run: %v, %v", ended, err)
	}
	expect("after", false, false)
	if len(w.k.locks.until) != 0 {
		t.Errorf("left: %v", w.k.locks.until)
	}
}

var errCut = errors.New("the power is gone")

// A keeper dies before each of its steps, and what it had not synced is lost.
// What was answered is in force, before and after the next keeper; what was not
// is answered by that one, or, when the writer has died too, leaves no trace.
func TestCrash(t *testing.T) {
	in := ground(t)
	t.Run("the writer waits", func(t *testing.T) { crashes(t, in, false) })
	t.Run("the writer is gone", func(t *testing.T) { crashes(t, in, true) })
}

func crashes(t *testing.T, in string, gone bool) {
	names := []string{"packs/00/x", "packs/00/y", "packs/00/z"}
	for cut := 1; ; cut++ {
		w := newWorld(t, in)
		for _, name := range append(names, "packs/00/ended") {
			store(t, w.dir, name)
		}
		must(t, w.open(t, nil))
		ask(t, w.dir, id(1), w.wish(names[0], 2), w.wish("packs/00/ended", 1))
		once(t, w.k)
		must(t, w.k.Close())
		w.run(90 * time.Minute)
		ask(t, w.dir, id(2), w.wish(names[0], 5), w.wish(names[1], 6)) // one is extended
		ask(t, w.dir, id(3), w.wish(names[2], 7))
		calls, was := 0, ""
		journal := filepath.Join(w.dir, blob.HardenDir, journalName)
		length := func() int64 {
			fi, err := os.Stat(journal)
			must(t, err)
			return fi.Size()
		}
		synced := length()
		err := w.open(t, func(what string) error {
			if calls++; calls >= cut {
				if was == "" {
					was = what
				}
				return errCut
			}
			if strings.HasPrefix(what, "set the attribute") { // what follows a sync
				synced = length()
			}
			return nil
		})
		if err == nil {
			_, err = w.k.Once(context.Background())
		}
		if err == nil {
			if cut < 15 {
				t.Errorf("only %d steps", cut)
			}
			must(t, w.k.Close())
			return
		}
		if !errors.Is(err, errCut) {
			t.Fatalf("cut %d before %q: %v", cut, was, err)
		}
		if w.k != nil {
			must(t, w.k.Close())
		}
		if was != "record the end of locks" { // Release has no promise to break
			must(t, os.Truncate(journal, synced))
		}
		promised := map[string]int64{}
		for n := 1; n <= 3; n++ {
			for _, f := range answered(t, w.dir, id(n)) {
				promised[f.Name] = max(promised[f.Name], f.Until)
			}
		}
		delete(promised, "packs/00/ended")
		holds := func(when string) {
			j, _, err := readJournal(journal)
			must(t, err)
			for name, until := range promised {
				if !locked(t, w.dir, name) || j.until[name] < until {
					t.Errorf("cut %d before %q, %s: %s was promised until %d, is locked: %v, recorded until %d", cut, was, when, name, until, locked(t, w.dir, name), j.until[name])
				}
			}
		}
		holds("at once")
		if gone {
			for n := 2; n <= 3; n++ {
				_ = os.Remove(filepath.Join(w.dir, blob.HardenRequests, id(n)))
			}
		}
		must(t, w.open(t, nil))
		holds("opened")
		once(t, w.k)
		for n := 2; n <= 3; n++ {
			for _, f := range answered(t, w.dir, id(n)) {
				promised[f.Name] = max(promised[f.Name], f.Until)
			}
		}
		if len(w.k.locks.open) > 0 {
			t.Errorf("cut %d before %q: still open are %v", cut, was, w.k.locks.open)
		}
		if !gone && len(promised) != len(names) {
			t.Errorf("cut %d before %q: promised are %v", cut, was, promised)
		}
		holds("at the end")
		if locked(t, w.dir, "packs/00/ended") {
			t.Errorf("cut %d before %q: a lock that has ended holds", cut, was)
		}
		must(t, w.k.Close())
		s, err := ReadStatus(context.Background(), w.dir)
		if err != nil || s.Locks < len(promised) || !gone && s.Locks != 3 || len(s.Missing)+len(s.Bare)+len(s.Stray)+len(s.Due) > 0 || s.Damaged {
			t.Errorf("cut %d before %q: %+v, %v", cut, was, s, err)
		}
		raze(w.dir)
	}
}

// A keeper is killed at random moments; the next one goes on.
func TestKill(t *testing.T) {
	in := ground(t)
	dir := hardened(t, in)
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	asked, until := map[string]string{}, time.Now().Add(time.Hour).Unix()
	rounds := 5
	if testing.Short() {
		rounds = 3
	}
	for round := range rounds {
		cmd := child(t, "keeper", 0, 0, dir)
		must(t, cmd.Start())
		end := time.Now().Add(time.Duration(100+rnd.IntN(150)) * time.Millisecond)
		for n := 0; time.Now().Before(end); n++ {
			name := fmt.Sprintf("packs/00/%d-%d", round, n)
			store(t, dir, name)
			r := fmt.Sprintf("%032x", rnd.Uint64())
			ask(t, dir, r, blob.LockWish{Name: name, Until: until})
			asked[r] = name
			time.Sleep(time.Duration(rnd.IntN(4)) * time.Millisecond)
		}
		must(t, cmd.Process.Kill())
		_ = cmd.Wait()
		for r, name := range asked {
			if f := answered(t, dir, r); f != nil && (f[0].Until != until || !locked(t, dir, name)) {
				t.Errorf("round %d: %s is answered with %+v, is locked: %v", round, name, f[0], locked(t, dir, name))
			}
		}
	}
	k := keeper(t, dir)
	once(t, k)
	must(t, k.Close())
	for r, name := range asked {
		if f := answered(t, dir, r); f == nil || f[0].Until != until || !locked(t, dir, name) {
			t.Errorf("%s is answered with %+v, is locked: %v", name, f, locked(t, dir, name))
		}
	}
	s, err := ReadStatus(context.Background(), dir)
	if err != nil || s.Locks != len(asked) || len(s.Missing)+len(s.Bare)+len(s.Stray)+len(s.Due) > 0 || s.Damaged {
		t.Errorf("%d asked: %+v, %v", len(asked), s, err)
	}
}

func childKeeper(t *testing.T, dirs []string) {
	k := keeper(t, dirs[0])
	_ = k.Run(context.Background(), func(Done) {})
}

// A torn end of the journal is cut off; damage before it ends no lock any more.
func TestJournal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	must(t, createJournal(path))
	j, err := openJournal(path)
	must(t, err)
	must(t, j.add(journalLine('+', 10, "a/b"), journalLine('+', 20, "c"), journalLine('=', 0, ".")))
	must(t, j.add(journalLine('+', 30, "c"), journalLine('+', 5, "a/b"), journalLine('+', 7, "d")))
	must(t, j.f.Close())
	good, err := os.ReadFile(path)
	must(t, err)
	for n := len(journalHeader); n <= len(good); n++ {
		must(t, os.WriteFile(path, good[:n], 0o600))
		j, err := openJournal(path)
		if err != nil || j.damaged {
			t.Fatalf("cut at %d: %v", n, err)
		}
		must(t, j.add(journalLine('+', 40, "e")))
		must(t, j.f.Close())
		if j, _, err = readJournal(path); err != nil || j.damaged || j.until["e"] != 40 {
			t.Fatalf("cut at %d and continued: %+v, %v", n, j, err)
		}
	}
	must(t, os.WriteFile(path, good, 0o600))
	j, err = openJournal(path)
	must(t, err)
	if j.until["c"] != 30 || j.until["a/b"] != 10 || j.open["c"] || !j.open["d"] {
		t.Errorf("%+v", j)
	}
	want := fmt.Sprint(j.until, j.open)
	must(t, j.rewrite())
	must(t, j.f.Close())
	if j, err = openJournal(path); err != nil || fmt.Sprint(j.until, j.open) != want {
		t.Errorf("rewritten: %+v, %v", j, err)
	}
	for range 5000 {
		must(t, j.add(journalLine('+', 50, "a/b"), journalLine('=', 0, ".")))
		must(t, j.compact())
	}
	if j.lines > 1100 || j.until["a/b"] != 50 || j.until["c"] != 30 {
		t.Errorf("%d lines, %v", j.lines, j.until)
	}
	must(t, j.f.Close())
	for n := len(journalHeader); n < len(good)-30; n++ {
		bad := append([]byte(nil), good...)
		bad[n] ^= 1
		must(t, os.WriteFile(path, bad, 0o600))
		if j, err := openJournal(path); err != nil || !j.damaged {
			t.Fatalf("byte %d: damaged %v, %v", n, j != nil && j.damaged, err)
		}
	}
}

// A full disk tears no line into the journal's middle.
func TestJournalFull(t *testing.T) {
	in := ground(t)
	full := filepath.Join(in, "full")
	must(t, os.Mkdir(full, 0o755))
	if err := unix.Mount("tmpfs", full, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("SKIPPED, AND NOT TESTED: %v", err)
	}
	defer unix.Unmount(full, unix.MNT_DETACH)
	path, ballast := filepath.Join(full, "journal"), filepath.Join(full, "ballast")
	must(t, os.WriteFile(ballast, make([]byte, 16<<10), 0o600))
	must(t, createJournal(path))
	j, err := openJournal(path)
	must(t, err)
	defer func() { must(t, j.f.Close()) }()
	n := 0
	for ; err == nil; n++ {
		err = j.add(journalLine('+', 10, fmt.Sprintf("packs/%070d", n)))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	must(t, os.Remove(ballast))
	must(t, j.add(journalLine('+', 10, "packs/last")))
	if j, _, err := readJournal(path); err != nil || j.damaged || len(j.until) != n {
		t.Errorf("%d names, damaged %v, %v", len(j.until), j.damaged, err)
	}
}

func TestRefusals(t *testing.T) {
	in := ground(t)
	ctx := context.Background()
	dir := hardened(t, in)
	asWriter(t, "refused", dir)

	k := keeper(t, dir)
	if _, err := Open(dir, Options{}); !errors.Is(err, ErrRuns) {
		t.Errorf("a second keeper: %v", err)
	}
	if _, err := Prepare(setup(dir), false); !errors.Is(err, ErrRuns) {
		t.Errorf("prepare beside a keeper: %v", err)
	}
	must(t, k.Close())
	if did, err := Prepare(setup(dir), false); err != nil || len(did) != 0 {
		t.Errorf("prepare a second time: %v, %v", did, err)
	}

	bare, err := os.MkdirTemp(in, "bare-")
	must(t, err)
	if _, err := Prepare(setup(bare), false); !errors.Is(err, ErrNotStore) {
		t.Errorf("no store: %v", err)
	}
	store(t, bare, "config")
	if _, err := Open(bare, Options{}); !errors.Is(err, ErrNotHardened) {
		t.Errorf("not hardened: %v", err)
	}
	did, err := Prepare(setup(bare), true)
	if entries, _ := os.ReadDir(bare); err != nil || len(did) == 0 || len(entries) != 1 {
		t.Errorf("a dry run: %v, %v; %v", did, err, entries)
	}
	for _, user := range []string{"root", "0:0", "54321:0", "no-such-user", "", "a:b"} {
		s := setup(bare)
		s.User = user
		if _, err := Prepare(s, true); err == nil {
			t.Errorf("writer %q is taken", user)
		}
	}
	must(t, os.Mkdir(filepath.Join(bare, ".harden"), 0o755))
	must(t, os.Chown(filepath.Join(bare, ".harden"), writerUID, writerGID))
	if _, err := Prepare(setup(bare), false); !errors.Is(err, ErrUnsafe) {
		t.Errorf("a .harden of the writer's: %v", err)
	}
	for _, change := range []func(string) error{func(d string) error { return os.Chown(d, writerUID, 0) }, func(d string) error { return os.Chmod(d, 0o777) }} {
		above, err := os.MkdirTemp(in, "above-")
		must(t, err)
		must(t, os.Mkdir(filepath.Join(above, "store"), 0o755))
		store(t, above, "store/config")
		must(t, change(above))
		if _, err := Prepare(setup(filepath.Join(above, "store")), false); !errors.Is(err, ErrUnsafe) {
			t.Errorf("a directory that can be moved away: %v", err)
		}
	}

	memory, err := os.MkdirTemp("/dev/shm", "holdfast-harden-")
	if err == nil {
		defer os.RemoveAll(memory)
		store(t, memory, "config")
		if _, err := Prepare(setup(memory), false); !errors.Is(err, ErrFilesystem) {
			t.Errorf("tmpfs: %v", err)
		}
	}

	// Root without the one right, as in many containers.
	errs := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		const immutable = 9    // CAP_LINUX_IMMUTABLE
		h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var d [2]unix.CapUserData
		err := unix.Capget(&h, &d[0])
		d[0].Effective &^= 1 << immutable
		if err = errors.Join(err, unix.Capset(&h, &d[0])); err == nil {
			must(t, os.RemoveAll(filepath.Join(bare, ".harden")))
			_, err = Prepare(setup(bare), false)
		}
		errs <- err
	}()
	if err := <-errs; !errors.Is(err, ErrNotRoot) || !strings.Contains(err.Error(), "CAP_LINUX_IMMUTABLE") {
		t.Errorf("without CAP_LINUX_IMMUTABLE: %v", err)
	}
	if _, err := os.Stat(filepath.Join(bare, blob.HardenMark)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("hardened all the same: %v", err)
	}
	if _, err := ReadStatus(ctx, bare); !errors.Is(err, ErrNotHardened) {
		t.Errorf("status: %v", err)
	}
}

func childRefused(t *testing.T, dirs []string) {
	if _, err := Prepare(setup(dirs[0]), false); !errors.Is(err, ErrNotRoot) {
		t.Errorf("prepare: %v", err)
	}
	if _, err := Open(dirs[0], Options{}); !errors.Is(err, ErrNotRoot) {
		t.Errorf("open: %v", err)
	}
	if _, err := ReadStatus(context.Background(), dirs[0]); !errors.Is(err, ErrNotRoot) {
		t.Errorf("status: %v", err)
	}
}

// What root takes away shows.
func TestStatus(t *testing.T) {
	dir := hardened(t, ground(t))
	for _, name := range []string{"packs/00/x", "packs/00/y", "packs/00/z", "packs/00/s"} {
		store(t, dir, name)
	}
	k := keeper(t, dir)
	defer k.Close()
	hour := time.Now().Add(time.Hour).Unix()
	ask(t, dir, id(1), blob.LockWish{Name: "packs/00/x", Until: hour}, blob.LockWish{Name: "packs/00/y", Until: hour + 60}, blob.LockWish{Name: "packs/00/z", Until: hour})
	once(t, k)
	set := func(name string, on bool) {
		f, err := os.Open(filepath.Join(dir, name))
		must(t, err)
		must(t, errors.Join(setImmutable(f, on), f.Close()))
	}
	set("packs/00/x", false)
	set("packs/00/z", false)
	must(t, os.Remove(filepath.Join(dir, "packs/00/z")))
	set("packs/00/s", true)
	s, err := ReadStatus(context.Background(), dir)
	if err != nil || s.Locks != 3 || s.Earliest.Unix() != hour || s.Latest.Unix() != hour+60 ||
		fmt.Sprint(s.Missing, s.Bare, s.Stray, s.Due) != "[packs/00/z] [packs/00/x] [packs/00/s] []" {
		t.Errorf("%+v, %v", s, err)
	}
	ask(t, dir, id(2), blob.LockWish{Name: "packs/00/x"}, blob.LockWish{Name: "packs/00/y"})
	once(t, k)
	if f := answered(t, dir, id(2)); f[0].Until != 0 || f[1].Until != hour+60 {
		t.Errorf("%+v", f)
	}
	ask(t, dir, id(3), blob.LockWish{Name: "packs/00/x", Until: hour - 60})
	once(t, k)
	if f := answered(t, dir, id(3)); f[0].Until != hour || !locked(t, dir, "packs/00/x") {
		t.Errorf("asked for again: %+v", f)
	}
}
