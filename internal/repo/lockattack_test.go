package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/repo/internal/keyring"
)

// lockHook calls a function before each lock.
type lockHook struct {
	*blobtest.Locking
	lock func(name string) error
}

func (h *lockHook) Lock(ctx context.Context, name string, l blob.Lock) error {
	if err := h.lock(name); err != nil {
		return err
	}
	return h.Locking.Lock(ctx, name, l)
}

// What another writer adds between locking and commit, and has not come to
// lock, is locked before the commit.
func TestLockBeside(t *testing.T) {
	store, r, clock := immutable(t, thirty)
	other := clock.at(reopen(t, &lockHook{store, func(string) error { return errors.New("denied") }}))
	left, err := other.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	if d, err := left.Disk(ctx, nil, 6*ChunkSize); err != nil || d.WriteAt(ctx, random(2, 6), 0) != nil {
		t.Fatal(err)
	}
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	f, err := run.PutFile(ctx, "domain.xml", []byte("<domain>a</domain>"))
	if err != nil {
		t.Fatal(err)
	}
	p := &Point{VM: "a", Time: clock.now(), Files: []File{f}}
	var told atomic.Int64
	if err := run.Lock(ctx, p, func(_, total int64) { told.Add(1); told.CompareAndSwap(total, -1) }); err != nil {
		t.Fatal(err)
	}
	if told.Load() != -1 {
		t.Errorf("told of %d objects, and not of all", told.Load())
	}
	if err := errors.Join(left.Flush(ctx), left.Close()); err != nil { // announces
		t.Fatal(err)
	}
	if err := run.Commit(ctx, p); err != nil {
		t.Fatal(err)
	}
	if err := run.Close(); err != nil {
		t.Fatal(err)
	}
	if bad := unprotected(store, r, p, r.current().Head+1, clock.now().Add(30*day)); len(bad) > 0 {
		t.Errorf("not locked: %v", bad)
	}
}

// A prune that replaces an index object while a run locks keeps it from nothing.
func TestLockBesidePrune(t *testing.T) {
	store, r, clock := immutable(t, thirty)
	a := mustSave(t, r, "a", random(1, 3))
	content := random(2, 3)
	mustSave(t, r, "b", content)
	clock.pass(40 * day)
	forget(t, r, a.ID)
	first, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	if report := prune(t, r, unwatched); report.Waiting == 0 {
		t.Fatalf("%+v", report)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	pruned := false
	var once sync.Once
	hook := &lockHook{store, func(name string) error {
		if strings.HasPrefix(name, "index/") {
			once.Do(func() {
				pruned = true
				report, err := clock.at(reopen(t, store)).Prune(ctx, unwatched)
				if err != nil || report.Removed == 0 {
					t.Errorf("%+v, %v", report, err)
				}
			})
		}
		return nil
	}}
	writer := clock.at(reopen(t, hook))
	p := mustSave(t, writer, "c", content)
	if bad := unprotected(store, writer, p, writer.current().Head+1, clock.now().Add(30*day)); len(bad) > 0 || !pruned {
		t.Errorf("not locked: %v", bad)
	}
	clean(t, writer, true)
}

// vandals are what somebody with a writer's rights can do to an object; he may
// have a repository of his own.
func vandals(foreign blob.Store) map[string]func(*blobtest.Locking, string) {
	return map[string]func(*blobtest.Locking, string){
		"hide":      (*blobtest.Locking).Hide,
		"overwrite": func(s *blobtest.Locking, name string) { s.Overwrite(name, []byte("garbage")) },
		"destroy":   (*blobtest.Locking).Destroy,
		"forge": func(s *blobtest.Locking, name string) { // in the right form, and hidden itself
			p, err := s.Get(ctx, name, 0, -1)
			if name == configName {
				p, err = foreign.Get(ctx, name, 0, -1)
			}
			if err == nil {
				if name != configName {
					p[len(p)-1] ^= 1 // of a key's seal: nobody notices without the passphrase
				}
				s.Overwrite(name, p)
				s.Hide(name)
			}
		},
		"all of it": func(s *blobtest.Locking, name string) {
			s.Hide(name)
			s.Overwrite(name, []byte("garbage"))
			s.Destroy(name)
			s.Overwrite(name, nil)
			s.Hide(name)
			s.Hide(name)
		},
	}
}

// After each commit somebody deletes or overwrites everything that he may:
// check brings back every committed point, bit by bit, and backups go on.
func TestLockAttack(t *testing.T) {
	foreign := new(blob.Mem)
	create(t, foreign)
	for what, vandal := range vandals(foreign) {
		t.Run(what, func(t *testing.T) {
			store, r, clock := immutable(t, thirty)
			contents := map[PointID][]byte{}
			content := random(1, 6)
			var base *Point
			for round := range 3 {
				copy(content[2*ChunkSize:], random(uint64(10+round), 1))
				p, err := save(r, "a", content, base, []int{2})
				if err != nil {
					t.Fatal(round, err)
				}
				base, contents[p.ID] = p, slices.Clone(content)
				for _, name := range store.All() {
					vandal(store, name)
				}
				if _, err := Undelete(ctx, store); err != nil {
					t.Fatalf("round %d: %v", round, err)
				}
				r = clock.at(reopen(t, store))
				if n := len(points(t, r)); n != round+1 {
					t.Fatalf("round %d: %d points", round, n)
				}
				for _, p := range points(t, r) {
					equal(t, r, &p, contents[p.ID])
				}
				report, err := r.Check(ctx, CheckOptions{ReadData: true})
				if err != nil {
					t.Fatal(err)
				}
				for _, p := range report.Problems { // brought back by a copy, which is locked again
					if !strings.Contains(p.What, "it is locked now") {
						t.Errorf("round %d: %+v", round, p)
					}
				}
				clean(t, r, true)
				if back, err := Undelete(ctx, store); err != nil || len(back) > 0 {
					t.Errorf("round %d: again: %v, %v", round, back, err)
				}
				clock.pass(5 * day)
			}
		})
	}
}

// A run that extends the lock of a pack does so for the right version: else who
// has written over it would only have to wait.
func TestLockExtendsTheRightVersion(t *testing.T) {
	store, r, clock := immutable(t, thirty)
	content := sparse(1)
	p := mustSave(t, r, "a", content)
	err := r.Packs(ctx, func(k PackInfo) error { // of chunks: nodes are read, and show it
		if k.Kind == "chunks" {
			store.Overwrite("packs/"+k.Pack[:2]+"/"+k.Pack, []byte("garbage"))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	clock.pass(9 * day)
	if _, err := save(r, "a", content, p, nil); err != nil {
		t.Fatal(err)
	}
	clock.pass(30 * day) // the first locks are over
	for _, name := range store.All() {
		store.Destroy(name)
	}
	r = clock.at(reopen(t, store))
	for _, p := range points(t, r) {
		equal(t, r, &p, content)
	}
	if n := len(points(t, r)); n != 2 {
		t.Errorf("%d points", n)
	}
}

// What cannot be deleted yet stays, and goes when its lock has ended.
func TestLockPrune(t *testing.T) {
	for _, other := range []bool{false, true} {
		t.Run(fmt.Sprint("another machine: ", other), func(t *testing.T) {
			store, r, clock := immutable(t, thirty)
			one, two := random(1, 12), random(2, 6)
			a := mustSave(t, r, "a", one)
			b := mustSave(t, r, "b", slices.Concat(two, one[:2*ChunkSize])) // the first pack becomes sparse
			forget(t, r, a.ID)
			pruner := r
			if other {
				pruner = clock.at(reopen(t, store))
			}
			packs, size := stored(t, store, "packs/")
			dry := prune(t, pruner, PruneOptions{DryRun: true})
			report := prune(t, pruner, unwatched)
			for _, p := range []*PruneReport{dry, report} {
				if p.Quarantined != 0 || p.Removed != 0 || p.Locked == 0 || p.LockedBytes == 0 || p.LockedUntil == nil || p.LockedUntil.Before(clock.now().Add(30*day)) {
					t.Errorf("%+v", p)
				}
			}
			if n, _ := stored(t, store, "packs/"); n != packs {
				t.Errorf("%d packs, were %d", n, packs)
			}
			if bad := unprotected(store, r, b, r.current().Head, clock.now().Add(30*day)); len(bad) > 0 {
				t.Errorf("not locked: %v", bad)
			}
			clock.pass(40 * day)
			report = prune(t, pruner, unwatched)
			if report.Removed == 0 || report.Rewritten == 0 || report.Locked != 0 {
				t.Errorf("after the locks: %+v", report)
			}
			if _, now := stored(t, store, "packs/"); now >= size {
				t.Errorf("%d bytes, were %d", now, size)
			}
			equal(t, pruner, b, slices.Concat(two, one[:2*ChunkSize]))
			clean(t, pruner, true)
		})
	}
}

// A pack that was locked when it was in quarantine already is no error.
func TestLockQuarantined(t *testing.T) {
	store, r, clock := immutable(t, thirty)
	a := mustSave(t, r, "a", random(1, 3))
	mustSave(t, r, "b", random(2, 3))
	clock.pass(40 * day)
	forget(t, r, a.ID)
	run, err := r.Begin(ctx, RandomID()) // so that nothing is removed
	if err != nil {
		t.Fatal(err)
	}
	if report := prune(t, r, unwatched); report.Quarantined == 0 || report.Waiting == 0 {
		t.Fatalf("%+v", report)
	}
	if err := run.Close(); err != nil {
		t.Fatal(err)
	}
	for pack := range r.current().Quarantine {
		if err := store.Lock(ctx, packName(pack), blob.Lock{Until: clock.now().Add(day), Mode: blob.Governance}); err != nil {
			t.Fatal(err)
		}
	}
	report := prune(t, r, unwatched)
	if report.Removed != 0 || report.Locked == 0 {
		t.Errorf("%+v", report)
	}
	clock.pass(2 * day)
	if report := prune(t, r, unwatched); report.Removed == 0 || report.Locked != 0 {
		t.Errorf("%+v", report)
	}
	clean(t, r, true)
}

// Keep locks all that the point needs, prune and check do so again.
func TestLockKeep(t *testing.T) {
	store, r, clock := immutable(t, thirty)
	content := sparse(1)
	p := mustSave(t, r, "a", content)
	wants := func(what string, until time.Time) {
		t.Helper()
		if bad := unprotected(store, r, p, 2, until); len(bad) > 0 {
			t.Errorf("%s: not locked: %v", what, bad)
		}
	}
	year := clock.now().Add(365 * day)
	if err := r.Keep(ctx, []PointID{p.ID}, UntilTime(year)); err != nil {
		t.Fatal(err)
	}
	wants("until a date", year)
	if err := r.Keep(ctx, []PointID{p.ID}, Forever); err != nil {
		t.Fatal(err)
	}
	clock.pass(360 * day)
	prune(t, r, unwatched)
	wants("for ever, pruned", clock.now().Add(30*day))
	clock.pass(25 * day)
	clean(t, r, false)
	wants("for ever, checked", clock.now().Add(30*day))
}

// Check tells of locks that are too short, locks again, and tries the store.
func TestLockCheck(t *testing.T) {
	store, r, clock := immutable(t, thirty)
	mustSave(t, r, "a", random(1, 3))
	mustSave(t, r, "b", random(2, 3))
	report, err := r.Check(ctx, CheckOptions{})
	if err != nil || len(report.Problems) > 0 || report.Locks == nil || report.Locks.Objects == 0 || report.Locks.Locked != 0 {
		t.Fatalf("%+v, %+v, %v", report, report.Locks, err)
	}
	bare := new(blob.Mem) // the same without any lock
	for _, name := range store.All() {
		p, err := store.Get(ctx, name, 0, -1)
		if err == nil {
			err = bare.Put(ctx, name, p)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	copied := &blobtest.Locking{Now: clock.now}
	for _, name := range store.All() {
		p, _ := bare.Get(ctx, name, 0, -1)
		if err := copied.Put(ctx, name, p); err != nil {
			t.Fatal(err)
		}
	}
	r = clock.at(reopen(t, copied))
	if report, err = r.Check(ctx, CheckOptions{}); err != nil || len(report.Problems) == 0 || report.Locks.Locked != report.Locks.Objects {
		t.Errorf("%+v, %+v, %v", report, report.Locks, err)
	}
	clean(t, r, false)
	for _, p := range points(t, r) {
		if bad := unprotected(copied, r, &p, r.current().Head, clock.now().Add(30*day)); len(bad) > 0 {
			t.Errorf("not locked: %v", bad)
		}
	}
	for _, s := range []blob.Store{bare, copied} {
		copied.IgnoreLocks = true
		report, err := clock.at(reopen(t, s)).Check(ctx, CheckOptions{})
		if err != nil || len(report.Problems) != 1 || report.Problems[0].Object != "locks" {
			t.Errorf("%T: %+v, %v", s, report, err)
		}
		keyless, err := CheckKeyless(ctx, s, "", CheckOptions{})
		if err != nil || len(keyless.Problems) != 1 || keyless.Problems[0].Object != "locks" {
			t.Errorf("keyless, %T: %+v, %v", s, keyless, err)
		}
	}
}

// Keys that a lock keeps open nothing when they were removed or replaced.
func TestLockedKeys(t *testing.T) {
	store, _, clock := immutable(t, thirty)
	r := clock.at(mustOpen(t, store, secret))
	content := random(1, 3)
	if _, err := r.AddPassphrase(ctx, "the second", second); err != nil {
		t.Fatal(err)
	}
	p := mustSave(t, r, "a", content)
	gone := slotOf(t, r, "the second")
	if err := r.RemoveSlot(ctx, gone.ID, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Get(ctx, keyring.SlotName(gone.ID), 0, -1); err != nil {
		t.Fatalf("the lock did not hold: %v", err)
	}
	if _, err := openAs(t, store, second); !errors.Is(err, ErrPassphrase) {
		t.Errorf("a removed passphrase opens: %v", err)
	}
	if _, err := r.AddPassphrase(ctx, "the second again", second); err != nil {
		t.Fatal(err)
	}
	clock.at(mustOpen(t, store, second))
	mustSave(t, r, "b", content)
	if _, err := r.RotateRoot(ctx, nil); err != nil {
		t.Fatal(err)
	}
	mustSave(t, r, "c", content)
	if _, err := openAs(t, store, second); !errors.Is(err, ErrKeys) && !errors.Is(err, ErrPassphrase) {
		t.Errorf("a replaced passphrase opens: %v", err)
	}
	r = clock.at(mustOpen(t, store, secret))
	equal(t, r, p, content)
	clean(t, r, true)
	if err := r.Tidy(ctx); err != nil {
		t.Error(err)
	}
	clock.pass(40 * day)
	if err := r.Tidy(ctx); err != nil {
		t.Error(err)
	}
	if n, _ := stored(t, store, "keys/"); n != 1 {
		t.Errorf("%d slots after the locks", n)
	}
	equal(t, mustOpen(t, store, secret), p, content)
}

// A copy follows the rule of the repository that it goes to.
func TestLockCopy(t *testing.T) {
	store, r, clock := immutable(t, thirty)
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	f, err := run.PutFile(ctx, "domain.xml", []byte("<domain>a</domain>"))
	if err != nil {
		t.Fatal(err)
	}
	p := &Point{ID: PointID(RandomID()), VM: "a", Time: clock.now().Add(-90 * day), Files: []File{f}}
	if err := errors.Join(run.CommitCopy(ctx, p), run.Close()); err != nil {
		t.Fatal(err)
	}
	if bad := unprotected(store, r, p, r.current().Head+1, clock.now().Add(30*day)); len(bad) > 0 {
		t.Errorf("not locked: %v", bad)
	}
}

// A prune, and a change of keys, that lose power anywhere leave protected what
// is protected.
func TestLockPrunePowerLoss(t *testing.T) {
	world, r, clock := immutable(t, thirty)
	one, two := random(1, 12), random(2, 6)
	old := mustSave(t, r, "a", one)
	mustSave(t, r, "dead", random(3, 3))
	clock.pass(40 * day)
	began := clock.now()
	shared := slices.Concat(two, one[:2*ChunkSize])
	p := mustSave(t, r, "b", shared)
	gone := points(t, r)[1]
	entries := commits(t, r)
	scenario := func(s blob.Store) {
		r, err := Open(ctx, s, secret, Options{Cache: cacheDir(t)})
		if err != nil {
			return
		}
		defer clock.at(r).Close()
		r.slotKDF = cheap
		if r.Forget(ctx, []PointID{old.ID, gone.ID}, clock.now()) == nil && r.Keep(ctx, []PointID{p.ID}, UntilTime(began.Add(90*day))) == nil {
			r.Prune(ctx, unwatched)
			r.Rotate(ctx)
		}
	}
	probe := &cutter{Locking: world.Clone()}
	scenario(probe)
	for at, fault := range cuts(t, probe.calls+1, 5) {
		store := world.Clone()
		scenario(&cutter{Locking: store, at: at, fault: fault})
		r := clock.at(reopen(t, store))
		if bad := unprotected(store, r, p, entries[p.ID], began.Add(30*day)); len(bad) > 0 && r.Keyring().Number == 1 {
			t.Fatalf("cut at %d/%d: not locked: %v", at, fault, bad)
		}
		equal(t, r, p, shared)
		r.Close()
	}
}
