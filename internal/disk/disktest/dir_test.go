package disktest

import (
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"
)

// content of a file after a crash; "-" when its name is gone.
func content(t *testing.T, d *Dir, name string) string {
	t.Helper()
	f, err := d.Open(name)
	if err != nil {
		return "-"
	}
	n, _ := f.Size()
	p := make([]byte, n)
	if n > 0 {
		if _, err := f.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
	}
	return string(p)
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestDirStates collects what can be found after a crash, and compares with
// what the model promises.
func TestDirStates(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	d := NewDir()
	f := must(d.Create("a"))
	must(f.WriteAt([]byte("one"), 0))
	states := func() map[string]bool {
		seen := map[string]bool{}
		for _, c := range d.Crashes(d.Len(), r, 200) {
			seen[content(t, c, "a")] = true
		}
		return seen
	}
	expect := func(want ...string) {
		t.Helper()
		seen := states()
		for _, w := range want {
			if !seen[w] {
				t.Errorf("%q never found, only %v", w, seen)
			}
			delete(seen, w)
		}
		for s := range seen {
			t.Errorf("%q found", s)
		}
	}
	expect("-", "", "one", "\x00\x00\x00")
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	expect("-", "one")
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	expect("one")
	must(f.WriteAt([]byte("two"), 0))
	must(f.WriteAt([]byte("six"), 0))
	expect("one", "two", "six")
	g := must(d.Create("b"))
	must(g.WriteAt([]byte("new"), 0))
	if err := errors.Join(f.Sync(), g.Sync(), d.Rename("b", "a")); err != nil {
		t.Fatal(err)
	}
	expect("six", "new")
	if err := d.Sync(); err != nil {
		t.Fatal(err)
	}
	expect("new")
	if got := content(t, d.Killed(2, false), "a"); got != "one" {
		t.Errorf("killed at 2: %q", got)
	}
	if got := content(t, d.Killed(4, true), "a"); got != "tne" {
		t.Errorf("killed within step 4: %q", got)
	}
}

func TestDirTearsSectors(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	d := NewDir()
	f := must(d.Create("a"))
	if err := errors.Join(f.Truncate(4*sector), f.Sync(), d.Sync()); err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 4*sector)
	Fill(r, p)
	must(f.WriteAt(p, 0))
	seen := map[[4]bool]bool{}
	for _, c := range d.Crashes(d.Len(), r, 500) {
		got := content(t, c, "a")
		var is [4]bool
		for i := range is {
			is[i] = got[i*sector] != 0
			if s := got[i*sector : (i+1)*sector]; is[i] && s != string(p[i*sector:(i+1)*sector]) {
				t.Fatal("a sector was torn")
			}
		}
		seen[is] = true
	}
	if len(seen) != 16 {
		t.Errorf("%d of 16 states seen", len(seen))
	}
}

func TestDirFullAndFailing(t *testing.T) {
	d := NewDir()
	f := must(d.Create("a"))
	d.Limit(2 * page)
	if n, err := f.WriteAt(make([]byte, 3*page), 100*page); n != 2*page || !errors.Is(err, syscall.ENOSPC) {
		t.Error(n, err)
	}
	if err := f.Punch(100*page, page); err != nil || d.Used() != page {
		t.Error(err, d.Used())
	}
	d.Fail(2, ErrInjected)
	must(f.WriteAt([]byte("good"), 0))
	if n, err := f.WriteAt([]byte("fail"), 0); n != 2 || !errors.Is(err, ErrInjected) {
		t.Error(n, err)
	}
	if got := content(t, d.Killed(d.Len(), false), "a")[:4]; got != "faod" {
		t.Error(got)
	}
	d.Fail(1, ErrInjected)
	if err := f.Sync(); !errors.Is(err, ErrInjected) {
		t.Error(err)
	}
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
}
