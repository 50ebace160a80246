package repo

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/tree"
)

var thirty = Immutability{Days: 30, Mode: "governance"}

// clock is one that a test moves.
type clock struct{ t time.Time }

func (c *clock) now() time.Time       { return c.t }
func (c *clock) pass(d time.Duration) { c.t = c.t.Add(d) }

// at makes a repository's clock this one.
func (c *clock) at(r *Repo) *Repo {
	r.now = c.now
	return r
}

// sparse is content of 270 chunks, a map of two levels, of which few are not zeros.
func sparse(seed uint64) []byte {
	p := make([]byte, 270*ChunkSize)
	copy(p, random(seed, 4))
	copy(p[200*ChunkSize:], random(seed+100, 4))
	copy(p[260*ChunkSize:], random(seed+200, 4))
	return p
}

// immutable makes a repository with a rule, on a store with the same clock.
func immutable(t *testing.T, rule Immutability) (*blobtest.Locking, *Repo, *clock) {
	t.Helper()
	c := &clock{time.Now()}
	store := &blobtest.Locking{Now: c.now}
	r := c.at(create(t, store))
	if err := r.SetImmutable(ctx, rule, nil); err != nil {
		t.Fatal(err)
	}
	return store, r, c
}

// unprotected looks, in a way of its own, for what a point needs and no lock
// keeps until then.
func unprotected(store *blobtest.Locking, r *Repo, p *Point, entry uint64, until time.Time) (bad []string) {
	best := map[string]time.Time{}
	locked := func(name string, right func([]byte) bool) bool {
		if _, ok := best[name]; !ok {
			best[name] = store.BestLock(name, right).Until
		}
		return !best[name].Before(until)
	}
	digest := func(d [32]byte) func([]byte) bool { return func(p []byte) bool { return sha256.Sum256(p) == d } }
	want := func(ok bool, what string) {
		if !ok {
			bad = append(bad, what)
		}
	}
	any := func(p []byte) bool { return true }
	item := func(id pack.ID) {
		all, err := r.places(id)
		ok := err == nil && slices.ContainsFunc(all, func(at index.Place) bool { return locked(packName(at.Pack), digest(at.Pack)) })
		want(ok, fmt.Sprintf("item %x", id[:4]))
	}
	var walk func(id tree.ID, level int)
	walk = func(id tree.ID, level int) {
		if id == (tree.ID{}) {
			return
		}
		item(id)
		n, err := r.node(ctx, id, level)
		if err != nil {
			bad = append(bad, err.Error())
			return
		}
		for _, c := range n.Children {
			if level > 0 {
				walk(c, level-1)
			} else if c != (pack.ID{}) {
				item(c)
			}
		}
	}
	for _, m := range mapsOf(p) {
		root, err := tree.ParseRoot(string(m.root), m.size)
		if err != nil {
			return []string{err.Error()}
		}
		walk(root.ID, root.Levels-1)
	}
	want(locked(configName, any), configName)
	for n := uint64(1); n < entry; n++ {
		want(locked(chain.Name(n), any), chain.Name(n))
	}
	for d := range r.current().Indexes {
		if r.current().Added[d].Entry <= entry {
			want(locked(index.Name(d), digest(d)), index.Name(d))
		}
	}
	for _, prefix := range []string{"keys/", "keyring/"} {
		for i, err := range store.List(ctx, prefix) {
			want(err == nil && locked(i.Name, any), i.Name)
		}
	}
	return bad
}

// commits finds the entries of points.
func commits(t *testing.T, r *Repo) map[PointID]uint64 {
	t.Helper()
	entries := map[PointID]uint64{}
	for n := uint64(1); n <= r.current().Head; n++ {
		o, err := r.Object(ctx, chain.Name(n), false)
		if err != nil {
			t.Fatal(err)
		}
		for id := range r.current().Points {
			if o.Meaning == "commit" && strings.Contains(fmt.Sprintf("%s", o.Sealed), string(id)) {
				entries[id] = n
			}
		}
	}
	return entries
}

// cutter cuts the power at one of the calls that change something, locks too.
type cutter struct {
	*blobtest.Locking
	at    int // 0: never
	fault blobtest.Fault

	mu    sync.Mutex
	calls int // guarded by mu
}

func (c *cutter) off() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.at > 0 && c.calls >= c.at
}

// change counts calls; those before the cut may still be under way at it.
func (c *cutter) change(do func() error) error {
	c.mu.Lock()
	c.calls++
	n := c.calls
	c.mu.Unlock()
	switch {
	case c.at == 0 || n < c.at:
		return do()
	case n > c.at:
		return blobtest.ErrInjected
	}
	if c.fault == blobtest.After {
		do()
	}
	return blobtest.ErrInjected
}

func (c *cutter) Put(ctx context.Context, name string, p []byte) error {
	return c.change(func() error { return c.Locking.Put(ctx, name, p) })
}
func (c *cutter) Delete(ctx context.Context, name string) error {
	return c.change(func() error { return c.Locking.Delete(ctx, name) })
}
func (c *cutter) Lock(ctx context.Context, name string, l blob.Lock) error {
	return c.change(func() error { return c.Locking.Lock(ctx, name, l) })
}
func (c *cutter) Restore(ctx context.Context, h blob.Hidden) error {
	return c.change(func() error { return c.Locking.Restore(ctx, h) })
}
func (c *cutter) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	if c.off() {
		return nil, blobtest.ErrInjected
	}
	return c.Locking.Get(ctx, name, off, n)
}
func (c *cutter) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	if c.off() {
		return func(yield func(blob.Info, error) bool) { yield(blob.Info{}, blobtest.ErrInjected) }
	}
	return c.Locking.List(ctx, prefix)
}

// Whenever the power goes, all that committed points need is locked for as
// long as the rule says, what they reuse too.
func TestLockPowerLoss(t *testing.T) {
	world, r, clock := immutable(t, thirty)
	content := sparse(1)
	a := mustSave(t, r, "a", content)
	began := clock.now()
	// What a run that died has left is used by others, and not locked.
	left := random(2, 6)
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	if d, err := run.Disk(ctx, nil, int64(len(left))); err != nil || d.WriteAt(ctx, left, 0) != nil || run.Flush(ctx) != nil || run.Close() != nil {
		t.Fatal(err)
	}
	clock.pass(8 * day) // to where a lock has to be extended
	changed := slices.Clone(content)
	copy(changed[260*ChunkSize:], left[:3*ChunkSize])
	copy(changed[200*ChunkSize:], random(3, 1))
	scenario := func(s blob.Store) {
		r, err := Open(ctx, s, secret, Options{Cache: cacheDir(t)})
		if err != nil {
			return
		}
		defer clock.at(r).Close()
		for i := range 2 { // the second one walks the difference only
			p := changed
			if i == 1 {
				p = slices.Clone(changed)
				copy(p, random(4, 1))
			}
			base := a
			if all, err := r.Points(ctx); err == nil {
				base = &all[len(all)-1]
			}
			save(r, fmt.Sprint("b", i), p, base, []int{0, 200, 260, 261, 262})
		}
	}
	probe := &cutter{Locking: world.Clone()}
	scenario(probe)
	for at, fault := range cuts(t, probe.calls+1, 7) {
		store := world.Clone()
		scenario(&cutter{Locking: store, at: at, fault: fault})
		r := clock.at(reopen(t, store))
		entries := commits(t, r)
		for _, p := range points(t, r) {
			until := began.Add(30 * day)
			if p.ID != a.ID {
				until = clock.now().Add(30 * day)
			}
			if bad := unprotected(store, r, &p, entries[p.ID], until); len(bad) > 0 {
				t.Fatalf("cut at %d/%d: point %s: not locked: %v", at, fault, p.VM, bad)
			}
		}
		// The next run locks the entry of a point whose writer died.
		if at%5 == 0 || at == probe.calls+1 {
			p := mustSave(t, r, "next", left)
			head := r.current().Head
			if bad := unprotected(store, r, p, head+1, clock.now().Add(30*day)); len(bad) > 0 {
				t.Fatalf("cut at %d/%d: next run: not locked: %v", at, fault, bad)
			}
			clean(t, r, false)
		}
		r.Close()
	}
}

// A store that does not keep locks gets no rule, and with one no points.
func TestLockRefused(t *testing.T) {
	for _, store := range []blob.Store{new(blob.Mem), &blobtest.Locking{IgnoreLocks: true}, &blobtest.Locking{ForgetLocks: true}} {
		r := create(t, store)
		head := r.current().Head
		if err := r.SetImmutable(ctx, thirty, nil); !errors.Is(err, blob.ErrNoLock) || r.current().Head != head {
			t.Errorf("%T: %v", store, err)
		}
	}
	store, r, _ := immutable(t, thirty)
	store.ForgetLocks = true
	if _, err := save(r, "a", random(1, 3), nil, nil); !errors.Is(err, blob.ErrNoLock) || len(points(t, r)) != 0 {
		t.Errorf("commit: %v", err)
	}
	store.ForgetLocks = false
	mustSave(t, r, "a", random(1, 3))
	if err := r.SetImmutable(ctx, Immutability{Days: 30, Mode: "compliance"}, nil); !errors.Is(err, ErrLockMode) {
		t.Errorf("compliance: %v", err)
	}
	if err := r.SetImmutable(ctx, Immutability{}, nil); err != nil {
		t.Fatal(err)
	}
	store.ForgetLocks = true
	mustSave(t, r, "b", random(2, 3)) // no rule any more
	report, err := r.Check(ctx, CheckOptions{})
	if err != nil || len(report.Problems) > 0 || report.Locks != nil {
		t.Errorf("check: %+v, %v", report, err)
	}
}

// Within a step an unchanged backup asks for hardly any lock; in the next step
// each object is locked once.
func TestLockRequests(t *testing.T) {
	store, r, clock := immutable(t, thirty)
	content := sparse(1)
	base := mustSave(t, r, "a", content)
	count := func(what string, changed ...int) int {
		before := store.Count("Lock")
		p, err := save(r, "a", content, base, changed)
		if err != nil {
			t.Fatal(err)
		}
		base = p
		n := store.Count("Lock") - before
		t.Logf("%s: %d locks; %d in all", what, n, len(store.All()))
		return n
	}
	// Its own entry; the lists of packs and map nodes of its file are known.
	if n := count("unchanged"); n > 1 {
		t.Errorf("unchanged: %d locks", n)
	}
	copy(content[260*ChunkSize:], random(2, 1))
	if n := count("one chunk", 260); n > 4 { // pack, nodes, index, entry
		t.Errorf("one chunk: %d locks", n)
	}
	clock.pass(7 * day)
	objects := 0
	for _, name := range store.All() {
		if !strings.HasPrefix(name, "leases/") {
			objects++
		}
	}
	if n := count("next step"); n < objects || n > objects+2 {
		t.Errorf("next step: %d locks of %d objects", n, objects)
	}
	if n := count("unchanged then"); n > 1 {
		t.Errorf("unchanged: %d locks", n)
	}
	again, err := Open(ctx, store, secret, Options{Cache: strings.TrimSuffix(r.cache, "/"+r.ID())})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	r = clock.at(again)
	if n := count("another process"); n > 1 {
		t.Errorf("another process: %d locks", n)
	}
}
