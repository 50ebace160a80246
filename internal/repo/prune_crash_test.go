package repo

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
)

// crashWorld is a repository with something of everything for a prune.
type crashWorld struct {
	store    *blob.Mem
	contents map[PointID][]byte // all points that were ever committed
	dead     []PointID
	pinned   PointID
	stays    PointID
}

func newCrashWorld(t *testing.T) *crashWorld {
	w := &crashWorld{store: new(blob.Mem), contents: map[PointID][]byte{}}
	r := create(t, w.store)
	add := func(vm string, content []byte) PointID {
		p := mustSave(t, r, vm, content)
		w.contents[p.ID] = content
		return p.ID
	}
	big := random(1, 12)
	w.dead = append(w.dead, add("a", big))
	w.stays = add("b", big[:3*ChunkSize])
	w.dead = append(w.dead, add("c", random(2, 4)))
	w.pinned = add("d", random(3, 4))
	if err := r.Pin(ctx, strings.Repeat("ab", 8), w.pinned); err != nil {
		t.Fatal(err)
	}
	forget(t, r, w.pinned)
	return w
}

// proves that after a crash everything committed is there, bit by bit, and
// that a backup, a prune and a check work.
func (w *crashWorld) proves(t *testing.T, what string, store *blob.Mem, committed map[PointID][]byte, must ...PointID) {
	t.Helper()
	r := reopen(t, store)
	all := points(t, r)
	have := map[PointID]bool{}
	for _, p := range all {
		have[p.ID] = true
		want := committed[p.ID]
		if want == nil {
			want = w.contents[p.ID]
		}
		if want == nil {
			want = committed[PointID(p.VM)] // of a commit that failed after its work
		}
		if err := differs(r, &p, want); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	for _, id := range must {
		if !have[id] {
			t.Fatalf("%s: point %s is gone", what, id)
		}
	}
	pinned := r.current().Forgotten[w.pinned]
	if err := differs(r, pinned, w.contents[w.pinned]); err != nil {
		t.Fatalf("%s: pinned: %v", what, err)
	}
	clean(t, r, true)
	content := w.contents[w.dead[0]]
	p, err := save(r, "z", content, nil, nil)
	if err != nil {
		t.Fatalf("%s: next run: %v", what, err)
	}
	for session := range mustLeases(t, r) { // the machine that died is known to be dead
		if err := r.EndLease(ctx, session); err != nil {
			t.Fatal(err)
		}
	}
	report, err := r.Prune(ctx, unwatched)
	if err != nil || report.Waiting > 0 || len(report.Lost) > 0 {
		t.Fatalf("%s: next prune: %v, %+v", what, err, report)
	}
	equal(t, r, p, content)
	equal(t, r, pinned, w.contents[w.pinned])
	clean(t, r, true)
	if n, _ := stored(t, store, "packs/"); n != len(packNames(r)) {
		t.Fatalf("%s: %d packs, %d in the inventory", what, n, len(packNames(r)))
	}
}

func mustLeases(t *testing.T, r *Repo) map[string]Lease {
	t.Helper()
	open, err := r.openLeases(ctx, r.current())
	if err != nil {
		t.Fatal(err)
	}
	return open
}

// writes counts the calls that change something, and cuts the power at one of
// them. A cut at a call that only reads leaves what the cut before the next
// change leaves.
type writes struct {
	*blobtest.Faulty
	changes *blobtest.Faulty // in front of nothing: it only counts and cuts
}

func cutAt(store blob.Store, at int, fault blobtest.Fault) writes {
	return writes{&blobtest.Faulty{Inner: store}, &blobtest.Faulty{Inner: nothing{}, At: at, Fault: fault, Cut: true}}
}

type nothing struct{ blob.Store }

func (nothing) Put(context.Context, string, []byte) error { return nil }
func (nothing) Delete(context.Context, string) error      { return nil }

func (w writes) cut() bool { return w.changes.At > 0 && w.changes.Calls() >= w.changes.At }

func (w writes) Put(ctx context.Context, name string, p []byte) error {
	err := w.changes.Put(ctx, name, p)
	if err == nil || w.changes.Fault == blobtest.After && w.changes.Calls() == w.changes.At {
		err = errors.Join(err, w.Inner.Put(ctx, name, p))
	}
	return err
}

func (w writes) Delete(ctx context.Context, name string) error {
	err := w.changes.Delete(ctx, name)
	if err == nil || w.changes.Fault == blobtest.After && w.changes.Calls() == w.changes.At {
		err = errors.Join(err, w.Inner.Delete(ctx, name))
	}
	return err
}

func (w writes) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	if w.cut() {
		return nil, blobtest.ErrInjected
	}
	return w.Inner.Get(ctx, name, off, n)
}

func (w writes) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	if w.cut() {
		return func(yield func(blob.Info, error) bool) { yield(blob.Info{}, blobtest.ErrInjected) }
	}
	return w.Inner.List(ctx, prefix)
}

// cuts gives each of so many calls to a store, in both ways in which it can fail;
// in short runs one of every few.
func cuts(t *testing.T, calls, short int) iter.Seq2[int, blobtest.Fault] {
	step := 1
	if testing.Short() {
		step = short
	}
	return func(yield func(int, blobtest.Fault) bool) {
		for at := 1; at <= calls; at += step {
			if !yield(at, blobtest.Before) || !yield(at, blobtest.After) {
				return
			}
		}
		t.Logf("%d calls, two ways each", calls)
	}
}

// everyCall runs a scenario once for each change that it makes to the store,
// with the power cut at it, before or after the call did its work.
func everyCall(t *testing.T, w *crashWorld, scenario func(s blob.Store) (committed map[PointID][]byte), must ...PointID) {
	probe := cutAt(w.store.Clone(), 0, blobtest.Before)
	scenario(probe)
	for at, fault := range cuts(t, probe.changes.Calls(), 5) {
		store := w.store.Clone()
		committed := scenario(cutAt(store, at, fault))
		ids := slices.DeleteFunc(append(slices.Collect(maps.Keys(committed)), must...), func(id PointID) bool { return len(id) < 32 })
		w.proves(t, fmt.Sprintf("cut at call %d/%d", at, fault), store, committed, ids...)
	}
}

// A prune on a store that fails one call and works again does harm to nothing.
func TestPruneOneFault(t *testing.T) {
	long(t)
	w := newCrashWorld(t)
	step := 9
	if os.Getenv("HOLDFAST_SOAK") != "" {
		step = 1
	}
	for at := 1 + rng(t).IntN(step); ; at += step {
		for _, fault := range []blobtest.Fault{blobtest.Before, blobtest.After} {
			store := w.store.Clone()
			faulty := &blobtest.Faulty{Inner: store, At: at, Fault: fault}
			if r := open(t, faulty); r != nil && r.Forget(ctx, w.dead, time.Now()) == nil {
				r.Prune(ctx, unwatched)
			}
			w.proves(t, fmt.Sprintf("fault at call %d/%d", at, fault), store, nil, w.stays)
			if faulty.Calls() < at {
				return
			}
		}
	}
}

// open opens on a store that may fail; nil when it did.
func open(t *testing.T, s blob.Store) *Repo {
	r, err := Open(ctx, s, secret, Options{Cache: cacheDir(t)})
	if err != nil {
		return nil
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func TestPrunePowerLoss(t *testing.T) {
	long(t)
	w := newCrashWorld(t)
	everyCall(t, w, func(s blob.Store) map[PointID][]byte {
		if r := open(t, s); r != nil && r.Forget(ctx, w.dead, time.Now()) == nil {
			r.Prune(ctx, unwatched)
		}
		return nil
	}, w.stays)
}

func TestKeepPowerLoss(t *testing.T) {
	w := newCrashWorld(t)
	everyCall(t, w, func(s blob.Store) map[PointID][]byte {
		if r := open(t, s); r != nil && r.Keep(ctx, w.dead[:1], Forever) == nil {
			r.Forget(ctx, w.dead[1:], time.Now())
		}
		return nil
	}, w.stays, w.dead[0])
}

// forget and prune beside a backup that is under way, in one machine that loses power.
func TestPruneBesideRunPowerLoss(t *testing.T) {
	long(t)
	w := newCrashWorld(t)
	content := slices.Concat(w.contents[w.stays], random(7, 4))
	everyCall(t, w, func(s blob.Store) map[PointID][]byte {
		committed := map[PointID][]byte{"e": content}
		r, pruner := open(t, s), open(t, s)
		if r == nil || pruner == nil {
			return committed
		}
		run, err := r.Begin(ctx, RandomID())
		if err != nil {
			return committed
		}
		defer run.Close()
		d, err := run.Disk(ctx, nil, int64(len(content)))
		if err != nil || d.WriteAt(ctx, content, 0) != nil || run.Flush(ctx) != nil || run.announce(ctx) != nil {
			return committed
		}
		if pruner.Forget(ctx, w.dead, time.Now()) == nil {
			pruner.Prune(ctx, unwatched)
		}
		if p, err := saveIn(run, "e", content, nil, nil); err == nil {
			committed[p.ID] = content
		}
		run.Close()
		pruner.Prune(ctx, unwatched)
		return committed
	}, w.stays)
}

// A random history of two writers, with crashes, against a map.
func TestPruneHistory(t *testing.T) {
	rng := rng(t)
	rounds := 120
	if testing.Short() {
		rounds = 40
	}
	if os.Getenv("HOLDFAST_SOAK") != "" {
		rounds = 5000
	}
	store := new(blob.Mem)
	repos := []*Repo{create(t, store), reopen(t, store)}
	model := map[PointID][]byte{}
	runs := map[*Run][]byte{}
	some := func() PointID {
		ids := slices.Sorted(maps.Keys(model))
		if len(ids) == 0 {
			return ""
		}
		return ids[rng.IntN(len(ids))]
	}
	pool := random(1, 40)
	image := func() []byte {
		var p []byte
		for range 1 + rng.IntN(12) {
			c := rng.IntN(40)
			p = append(p, pool[c*ChunkSize:(c+1)*ChunkSize]...)
		}
		return p
	}
	begin := func(r *Repo) (*Run, []byte) {
		run, err := r.Begin(ctx, RandomID())
		if err != nil {
			t.Fatal(err)
		}
		content := image()
		d, err := run.Disk(ctx, nil, int64(len(content)))
		if err != nil {
			t.Fatal(err)
		}
		if err := d.WriteAt(ctx, content[:len(content)/2/ChunkSize*ChunkSize], 0); err != nil {
			t.Fatal(err)
		}
		return run, content
	}
	end := func(run *Run, content []byte) {
		delete(runs, run)
		p, err := saveIn(run, "vm", content, nil, nil)
		if err == nil {
			model[p.ID] = content
		} else if !errors.Is(err, ErrPruned) {
			t.Fatal(err)
		}
		if err := run.Close(); err != nil {
			t.Fatal(err)
		}
	}
	lost := 0
	for range rounds {
		r := repos[rng.IntN(2)]
		switch k := rng.IntN(10); {
		case k < 2:
			end(begin(r))
		case k < 3 && len(runs) < 3:
			run, content := begin(r)
			runs[run] = content
		case k < 4:
			for run, content := range runs {
				end(run, content)
				break
			}
		case k < 6:
			if id := some(); id != "" {
				if err := r.Forget(ctx, []PointID{id}, time.Now()); err == nil {
					delete(model, id)
				} else if !errors.Is(err, ErrKept) {
					t.Fatal(err)
				}
			}
		case k < 7:
			if id := some(); id != "" {
				if err := r.Keep(ctx, []PointID{id}, []Until{Forever, ""}[rng.IntN(2)]); err != nil {
					t.Fatal(err)
				}
			}
		case k < 9:
			if report, err := r.Prune(ctx, often(1+rng.Uint64N(40))); err != nil || len(report.Lost) > 0 {
				t.Fatalf("prune: %v, %+v", err, report)
			}
		default: // a crash in the middle of a prune or a run
			faulty := &blobtest.Faulty{Inner: store, At: 1 + rng.IntN(120), Fault: blobtest.Fault(rng.IntN(2)), Cut: true}
			if r := open(t, faulty); r != nil {
				if rng.IntN(2) == 0 {
					r.Prune(ctx, often(8))
				} else if run, err := r.Begin(ctx, RandomID()); err == nil {
					content := image()
					if p, err := saveIn(run, "vm", content, nil, nil); err == nil {
						model[p.ID] = content
					}
					run.Close()
				}
			}
			lost++
			for session := range mustLeases(t, repos[0]) {
				mine := false
				for run := range runs {
					mine = mine || run.lease == session
				}
				if !mine {
					if err := repos[0].revoke(ctx, session); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		for _, r := range repos {
			for _, p := range points(t, r) {
				if model[p.ID] == nil { // its commit failed after its work
					d, err := r.OpenDisk(ctx, p.Disks[0])
					if err != nil {
						t.Fatal(err)
					}
					model[p.ID] = make([]byte, d.Size())
					if err := d.ReadAt(ctx, model[p.ID], 0); err != nil {
						t.Fatal(err)
					}
				}
				if rng.IntN(4) == 0 {
					equal(t, r, &p, model[p.ID])
				}
			}
			if n := len(points(t, r)); n != len(model) {
				t.Fatalf("%d points, model has %d", n, len(model))
			}
		}
	}
	for run, content := range runs {
		end(run, content)
	}
	prune(t, repos[1], unwatched)
	r := reopen(t, store)
	for _, p := range points(t, r) {
		equal(t, r, &p, model[p.ID])
	}
	clean(t, r, true)
	if n, _ := stored(t, store, "packs/"); n != len(packNames(r)) {
		t.Errorf("%d packs, %d in the inventory", n, len(packNames(r)))
	}
	t.Logf("%d points, %d crashes, chain of %d", len(model), lost, r.current().Head)
}

// Writers, prunes, a forgetter, a reader and checks, all at once.
func TestPruneParallel(t *testing.T) {
	store := new(blob.Mem)
	first := create(t, store)
	pool := random(1, 40)
	image := func(rng *rand.Rand) (p []byte) {
		for range 1 + rng.IntN(12) {
			c := rng.IntN(40)
			p = append(p, pool[c*ChunkSize:(c+1)*ChunkSize]...)
		}
		return p
	}
	var mu sync.Mutex
	contents := map[PointID][]byte{}
	pins := map[PointID]bool{}
	var writers, others sync.WaitGroup
	stop := make(chan struct{})
	for i := range 3 {
		r := reopen(t, store)
		writers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 5))
			for n := range 10 {
				content := image(rng)
				p, err := save(r, "vm", content, nil, nil)
				if errors.Is(err, ErrPruned) {
					continue
				} else if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				contents[p.ID] = content
				mu.Unlock()
				if n%2 == 0 {
					if err := r.Forget(ctx, []PointID{p.ID}, time.Now()); err != nil {
						t.Error(err)
					}
				} else if n%5 == 0 && r.Pin(ctx, RandomID(), p.ID) == nil {
					mu.Lock()
					pins[p.ID] = true
					mu.Unlock()
					if err := r.Forget(ctx, []PointID{p.ID}, time.Now()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	loop := func(f func() error) {
		others.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := f(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 2 {
		r := reopen(t, store)
		loop(func() error { _, err := r.Prune(ctx, unwatched); return err })
	}
	reader, checker := reopen(t, store), reopen(t, store)
	loop(func() error {
		return readKnown(t, reader, func(id PointID) []byte {
			mu.Lock()
			defer mu.Unlock()
			return contents[id]
		})
	})
	loop(func() error { return checkClean(checker) })
	writers.Wait()
	close(stop)
	others.Wait()
	prune(t, first, unwatched)
	prune(t, first, unwatched)
	for _, r := range []*Repo{first, reader, reopen(t, store)} {
		for _, p := range points(t, r) {
			equal(t, r, &p, contents[p.ID])
		}
		for id := range pins {
			p := r.current().Forgotten[id]
			equal(t, r, p, contents[id])
		}
		clean(t, r, true)
	}
	if n, _ := stored(t, store, "packs/"); n != len(packNames(first)) {
		t.Errorf("%d packs, %d in the inventory", n, len(packNames(first)))
	}
}

// readKnown reads the points whose content is known, beside others that may
// forget them.
func readKnown(t *testing.T, r *Repo, known func(PointID) []byte) error {
	for _, p := range points(t, r) {
		content := known(p.ID)
		if content == nil {
			continue
		}
		if err := differs(r, &p, content); err != nil {
			r.refresh(ctx)
			if _, gone := r.current().Forgotten[p.ID]; !gone {
				return err
			}
		}
	}
	return nil
}

// checkClean fails when a check finds anything.
func checkClean(r *Repo) error {
	report, err := r.Check(ctx, CheckOptions{})
	if err == nil && len(report.Problems) > 0 {
		err = fmt.Errorf("check: %+v", report.Problems)
	}
	return err
}
