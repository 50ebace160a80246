package repo

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
)

// What a process may do that was stopped and goes on much later: the moments
// are gone through one by one, and the rule that makes each harmless is said.

// stalls is a repository and two processes: the first will be stopped.
type stalls struct {
	t     *testing.T
	store *blob.Mem
	power *blobtest.Power // of the first
	slow  *Repo
	other *Repo
	stays *Point
	dead  *Point
}

var stallContents = [][]byte{random(1, 6), random(2, 6), random(3, 6)}

func newStalls(t *testing.T) *stalls {
	w := &stalls{t: t, store: new(blob.Mem)}
	w.other = create(t, w.store)
	w.power = &blobtest.Power{Inner: w.store, Seed: 5, Delay: time.Second, Late: time.Hour}
	w.slow = reopen(t, w.power)
	w.stays = mustSave(t, w.other, "a", stallContents[0])
	w.dead = mustSave(t, w.other, "b", stallContents[1])
	return w
}

// ends proves that nothing was lost, and that a last prune leaves nothing over.
func (w *stalls) ends(points ...*Point) {
	w.t.Helper()
	w.power.Wait()
	time.Sleep(time.Hour)
	for range 2 {
		if report := prune(w.t, w.other, PruneOptions{}); report.Waiting > 0 || len(report.Lost) > 0 {
			w.t.Errorf("%+v", report)
		}
	}
	r := reopen(w.t, w.store)
	equal(w.t, r, w.stays, stallContents[0])
	for _, p := range points {
		equal(w.t, r, p, stallContents[2])
	}
	clean(w.t, r, true)
	if n, _ := stored(w.t, w.store, "packs/"); n != len(packNames(r)) {
		w.t.Errorf("%d packs, %d in the inventory", n, len(packNames(r)))
	}
	for _, prefix := range []string{"leases/", "pins/"} {
		if n, _ := stored(w.t, w.store, prefix); n > 0 {
			w.t.Errorf("%d objects are left under %s", n, prefix)
		}
	}
}

// A writer that is stopped before its commit, for an hour in which a prune
// takes it for dead, cannot commit, nor announce anything. What it wrote is
// nobody's then.
func TestStalledWriter(t *testing.T) {
	blobtest.Bubble(t, func(t *testing.T) {
		w := newStalls(t)
		run, err := w.slow.Begin(ctx, RandomID())
		if err != nil {
			t.Fatal(err)
		}
		d, err := run.Disk(ctx, nil, int64(len(stallContents[1])))
		if err != nil || d.WriteAt(ctx, stallContents[1][:4*ChunkSize], 0) != nil { // present: it rests on what will be pruned
			t.Fatal(err)
		}
		if err := d.WriteAt(ctx, stallContents[2][4*ChunkSize:], 4*ChunkSize); err != nil { // and on what is new
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute) // it is alive, and shows it
		forget(t, w.other, w.dead.ID)
		if report := prune(t, w.other, PruneOptions{Watch: 5 * time.Minute}); len(report.Revoked) > 0 || report.Removed > 0 || report.Waiting == 0 {
			t.Fatalf("beside a living writer: %+v", report)
		}
		w.power.Stall(time.Hour)
		if report := prune(t, w.other, PruneOptions{}); len(report.Revoked) != 1 || report.Removed == 0 {
			t.Fatalf("beside a stopped writer: %+v", report)
		}
		root, err := d.Finish(ctx)
		if err == nil {
			err = run.Commit(ctx, &Point{VM: "b", Disks: []Disk{{ID: "vda", Size: int64(len(stallContents[1])), Root: root}}})
		}
		if !errors.Is(err, ErrRevoked) {
			t.Errorf("commit: %v", err)
		}
		if err := run.Close(); !errors.Is(err, ErrRevoked) {
			t.Errorf("close: %v", err)
		}
		if points(t, w.other)[0].ID != w.stays.ID || len(points(t, w.other)) != 1 {
			t.Error("it has committed")
		}
		w.ends()
	})
}

// The commit of a stopped writer may be on its way already. Commit and
// revocation want the same name: when the commit arrives first it stands, and
// the prune sees it; when the revocation does, the commit finds its name taken.
func TestStalledCommit(t *testing.T) {
	blobtest.Bubble(t, func(t *testing.T) {
		stood := 0
		for seed := range uint64(12) {
			w := newStalls(t)
			w.power.Seed = seed
			slow := reopen(t, w.power)
			run, err := slow.Begin(ctx, RandomID())
			if err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			var p *Point
			wg.Go(func() {
				time.Sleep(time.Minute)
				p, err = saveIn(run, "c", stallContents[2], nil, nil)
				run.Close()
			})
			time.Sleep(time.Minute + time.Duration(seed)*500*time.Millisecond)
			w.power.Stall(time.Hour)
			forget(t, w.other, w.dead.ID)
			prune(t, w.other, PruneOptions{})
			wg.Wait()
			w.power.Wait()
			left := points(t, w.other)
			if len(left) == 2 {
				stood++
				w.ends(&left[1])
			} else {
				w.ends()
			}
			if err == nil && (len(left) != 2 || left[1].ID != p.ID) {
				t.Errorf("seed %d: acknowledged and not there", seed)
			}
		}
		t.Logf("%d of 12 commits stood", stood)
	})
}

// A pin that is written late, when its point was forgotten and pruned since it
// was chosen, does not count: after it is written the point is looked for. While
// it is there a prune refuses rather than guess.
func TestStalledPin(t *testing.T) {
	blobtest.Bubble(t, func(t *testing.T) {
		w := newStalls(t)
		var wg sync.WaitGroup
		var err error
		slow := reopen(t, &hooked{Store: w.power, put: func(name string) {
			if strings.HasPrefix(name, "pins/") { // the point was there when it looked
				w.power.Stall(time.Hour)
			}
		}})
		wg.Go(func() { err = slow.Pin(ctx, "aa", w.dead.ID) })
		time.Sleep(time.Minute)
		forget(t, w.other, w.dead.ID)
		if report := prune(t, w.other, PruneOptions{}); report.Removed == 0 {
			t.Fatalf("%+v", report)
		}
		wg.Wait()
		if !errors.Is(err, ErrNotExist) {
			t.Errorf("pin: %v", err)
		}
		w.ends()
	})
}

// A pin that its process did not live to look after, of a point that was pruned
// before, makes a prune stop and say whose it is.
func TestPinOfNobody(t *testing.T) {
	blobtest.Bubble(t, func(t *testing.T) {
		w := newStalls(t)
		forget(t, w.other, w.dead.ID)
		prune(t, w.other, unwatched)
		slow := reopen(t, &blobtest.Faulty{Inner: w.store}) // knows that the point was forgotten
		if err := slow.Pin(ctx, "aa", w.dead.ID); !errors.Is(err, ErrNotExist) {
			t.Errorf("pin: %v", err)
		}
		if n, _ := stored(t, w.store, "pins/"); n > 0 {
			t.Error("a pin of what is known to be gone was left")
		}
		if err := w.other.leases.Pin(ctx, "aa", w.dead.ID, ""); err != nil {
			t.Fatal(err)
		}
		if _, err := w.other.Prune(ctx, unwatched); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "holdfast unpin aa --force") {
			t.Errorf("prune: %v", err)
		}
		if err := w.other.Unpin(ctx, "aa"); err != nil {
			t.Fatal(err)
		}
		prune(t, w.other, unwatched)
	})
}

// A prune that is stopped at any moment, itself taken for dead and cleaned up
// after by another, does no harm when it goes on: its entries fit only directly
// behind what it has looked at, and what it still deletes was out of the
// inventory for good.
func TestStalledPrune(t *testing.T) {
	long(t)
	blobtest.Bubble(t, func(t *testing.T) {
		revoked := 0
		for after := 100 * time.Millisecond; after < 40*time.Second; after += 1700 * time.Millisecond {
			w := newStalls(t)
			content := append(append([]byte(nil), stallContents[0][:2*ChunkSize]...), stallContents[2]...)
			third := mustSave(t, w.other, "c", content)
			forget(t, w.other, w.dead.ID, w.stays.ID) // something to remove, something to rewrite
			var wg sync.WaitGroup
			wg.Go(func() {
				if _, err := w.slow.Prune(ctx, unwatched); errors.Is(err, ErrRevoked) {
					revoked++
				} else if err != nil {
					t.Errorf("stopped after %s: %v", after, err)
				}
			})
			time.Sleep(after)
			w.power.Stall(2 * time.Hour)
			prune(t, w.other, PruneOptions{})
			again := mustSave(t, w.other, "b", stallContents[1])
			prune(t, w.other, PruneOptions{})
			wg.Wait()
			w.power.Wait()
			w.stays = mustSave(t, w.other, "a", stallContents[0])
			equal(t, reopen(t, w.store), again, stallContents[1])
			w.ends()
			equal(t, reopen(t, w.store), third, content)
			equal(t, reopen(t, w.store), again, stallContents[1])
		}
		if revoked == 0 {
			t.Error("none was taken for dead")
		}
	})
}

// A prune and a writer on one machine that stands still, both, while the prune
// watches: the prune begins to watch anew, and takes nobody for dead for what
// it could not have done.
func TestStalledWatch(t *testing.T) {
	blobtest.Bubble(t, func(t *testing.T) {
		w := newStalls(t)
		power := &blobtest.Power{Inner: w.store, Delay: time.Second}
		run, err := reopen(t, power).Begin(ctx, RandomID())
		if err != nil {
			t.Fatal(err)
		}
		forget(t, w.other, w.dead.ID)
		var wg sync.WaitGroup
		wg.Go(func() {
			if report := prune(t, w.slow, PruneOptions{}); len(report.Revoked) > 0 || report.Waiting == 0 {
				t.Errorf("%+v", report)
			}
		})
		time.Sleep(45 * time.Second) // it watches now, and nobody has beaten yet
		w.power.Stall(3 * time.Hour)
		power.Stall(3*time.Hour + 20*time.Second)
		wg.Wait()
		p, err := saveIn(run, "c", stallContents[2], nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := run.Close(); err != nil {
			t.Fatal(err)
		}
		w.ends(p)
	})
}

// lateEntries takes entries of the chain an hour after it has said that they
// failed: a request that the store got from a process that died then.
type lateEntries struct {
	blob.Store
	on   bool
	puts sync.WaitGroup
	won  int
}

func (s *lateEntries) Put(ctx context.Context, name string, p []byte) error {
	if !s.on || !strings.HasPrefix(name, "chain/") {
		return s.Store.Put(ctx, name, p)
	}
	p = append([]byte(nil), p...)
	s.puts.Go(func() {
		time.Sleep(time.Hour)
		if s.Store.Put(context.WithoutCancel(ctx), name, p) == nil {
			s.won++
		}
	})
	return blobtest.ErrInjected
}

// A process dies with its commit on its way, and its lease is ended, without a
// revocation, by one that knows that it is dead. A commit fits only directly
// behind what its run had seen: when a prune has put anything in quarantine
// since, it comes too late; when none has, all that the point needs is there.
func TestLateCommitOfTheDead(t *testing.T) {
	blobtest.Bubble(t, func(t *testing.T) {
		for _, pruned := range []bool{true, false} {
			w := newStalls(t)
			late := &lateEntries{Store: w.store}
			slow := reopen(t, late)
			session := RandomID()
			run, err := slow.Begin(ctx, session)
			if err != nil {
				t.Fatal(err)
			}
			late.on = true
			if _, err := saveIn(run, "c", stallContents[2], nil, nil); err == nil {
				t.Fatal("it has committed")
			}
			run.fail(errClosed)
			run.beats.Wait()
			if err := w.other.EndLease(ctx, session); err != nil {
				t.Fatal(err)
			}
			if pruned {
				if report := prune(t, w.other, PruneOptions{}); report.Leftover == 0 || report.Removed == 0 {
					t.Errorf("%+v", report)
				}
			}
			late.puts.Wait()
			left := points(t, w.other)
			if want := map[bool]int{true: 2, false: 3}[pruned]; len(left) != want || late.won != want-2 {
				t.Errorf("pruned %v: %d points", pruned, len(left))
			}
			equal(t, reopen(t, w.store), w.dead, stallContents[1])
			if pruned {
				w.ends()
			} else {
				w.ends(&left[2])
			}
		}
	})
}

// A run that died with nothing but packs that nothing lists is found dead, too,
// and what it left goes in the same prune.
func TestDeadRunWithStraysOnly(t *testing.T) {
	blobtest.Bubble(t, func(t *testing.T) {
		w := newStalls(t)
		run, err := w.other.Begin(ctx, RandomID())
		if err != nil {
			t.Fatal(err)
		}
		d, err := run.Disk(ctx, nil, 6*ChunkSize)
		if err != nil || d.WriteAt(ctx, stallContents[2], 0) != nil || d.packer.flush(ctx) != nil {
			t.Fatal(err)
		}
		run.storing.Wait()
		run.fail(errClosed)
		run.beats.Wait()
		if report := prune(t, w.slow, PruneOptions{}); len(report.Revoked) != 1 || report.Leftover != 1 || report.Removed != 1 {
			t.Errorf("%+v", report)
		}
		w.ends()
	})
}
