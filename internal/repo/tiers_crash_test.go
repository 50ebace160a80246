package repo

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
)

// everyTierCall runs a scenario once for each change that it makes to either
// store, with the power cut at it.
func everyTierCall(t *testing.T, w *farWorld, whole []PointID, scenario func(r *Repo, far blob.Store)) {
	run := func(own, far *blob.Mem, at int, fault blobtest.Fault) int {
		o := cutAt(own, at, fault)
		f := writes{&blobtest.Faulty{Inner: far}, o.changes}
		if r := tiered(t, o, places{"there": f}); r != nil {
			scenario(r, f)
		}
		return o.changes.Calls()
	}
	n := run(w.own.Clone(), w.far.Clone(), 0, blobtest.Before)
	for at := 1; at <= n; at++ {
		for _, fault := range []blobtest.Fault{blobtest.Before, blobtest.After} {
			own, far := w.own.Clone(), w.far.Clone()
			run(own, far, at, fault)
			w.proves(t, fmt.Sprintf("cut at change %d/%d", at, fault), own, far, whole)
		}
	}
	t.Logf("%d changes, two ways each", n)
}

// proves that everything is there, with both stores and, as far as it was whole
// in the tier, with that alone; and that work goes on.
func (w *farWorld) proves(t *testing.T, what string, own, far *blob.Mem, whole []PointID) {
	t.Helper()
	at := places{"there": far}
	if len(whole) > 0 {
		alone := mustTiered(t, far, nil)
		for _, id := range whole {
			if p, ok := alone.current().points[id]; ok {
				if err := differs(alone, &p, w.contents[id]); err != nil {
					t.Fatalf("%s: in the tier alone: %v", what, err)
				}
			} else if _, ok := alone.current().forgotten[id]; !ok {
				t.Fatalf("%s: in the tier alone: point %s is gone", what, id)
			}
		}
	} else if _, err := far.Get(ctx, configName, 0, 1); err == nil {
		mustTiered(t, far, nil)
	}
	check := func(r *Repo) {
		t.Helper()
		for _, p := range points(t, r) {
			if err := differs(r, &p, w.contents[p.ID]); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		}
		clean(t, r, true)
	}
	r := mustTiered(t, own, at)
	check(r)
	for session := range mustLeases(t, r) { // the machine that died is known to be dead
		if err := r.EndLease(ctx, session); err != nil {
			t.Fatal(err)
		}
	}
	if r.current().tier("far") == nil {
		addTier(t, r, Tier{Name: "far", Location: "there"}, far)
	}
	move(t, r, all())
	if report := prune(t, r, unwatched); report.Waiting > 0 || len(report.Lost) > 0 {
		t.Fatalf("%s: prune: %+v", what, report)
	}
	check(r)
	alone := mustTiered(t, far, nil)
	if a, b := len(points(t, alone)), len(points(t, r)); a != b {
		t.Fatalf("%s: %d points in the tier, %d in all", what, a, b)
	}
	check(alone)
}

func TestTierMovePowerLoss(t *testing.T) {
	long(t)
	w := newFarWorld(t)
	move(t, w.r, all())
	whole := []PointID{w.points[0].ID, w.points[1].ID}
	w.add(t, "c", random(3, 4))
	w.add(t, "d", random(4, 4))
	everyTierCall(t, w, whole, func(r *Repo, _ blob.Store) { r.Move(ctx, "far", all()) })
}

func TestTierAddPowerLoss(t *testing.T) {
	long(t)
	w := &farWorld{own: new(blob.Mem), far: new(blob.Mem), contents: map[PointID][]byte{}}
	w.r = create(t, w.own)
	w.add(t, "a", random(1, 4))
	everyTierCall(t, w, nil, func(r *Repo, far blob.Store) {
		if r.AddTier(ctx, Tier{Name: "far", Location: "there"}, far) == nil {
			r.Move(ctx, "far", all())
		}
	})
}

// Prune with rewriting, after which a move brings the rest.
func TestTierPrunePowerLoss(t *testing.T) {
	long(t)
	w := newFarWorld(t)
	move(t, w.r, all())
	whole := []PointID{w.points[0].ID, w.points[1].ID}
	everyTierCall(t, w, whole, func(r *Repo, _ blob.Store) {
		if r.Forget(ctx, whole[:1], time.Now()) == nil {
			r.Prune(ctx, unwatched)
		}
	})
}

func TestTierBackPowerLoss(t *testing.T) {
	long(t)
	w := newFarWorld(t)
	move(t, w.r, all())
	everyTierCall(t, w, nil, func(r *Repo, _ blob.Store) {
		if _, err := r.Move(ctx, "far", MoveOptions{Back: true, Watch: -1}); err == nil {
			r.RemoveTier(ctx, "far", RemoveTierOptions{Watch: -1})
		}
	})
}

// A call that fails, and works when it is made again, does harm to nothing.
func TestTierOneFault(t *testing.T) {
	long(t)
	w := newFarWorld(t)
	move(t, w.r, all())
	whole := []PointID{w.points[0].ID, w.points[1].ID}
	w.add(t, "c", random(3, 4))
	step := 11
	if os.Getenv("HOLDFAST_SOAK") != "" {
		step = 1
	}
	start := 1 + rng(t).IntN(step)
	for _, inOwn := range []bool{true, false} {
		for at := start; ; at += step {
			own, far := w.own.Clone(), w.far.Clone()
			faulty := &blobtest.Faulty{Inner: far, At: at, Fault: blobtest.Fault(at % 2)}
			var o, f blob.Store = own, faulty
			if inOwn {
				faulty.Inner = own
				o, f = faulty, far
			}
			if r := tiered(t, o, places{"there": f}); r != nil {
				r.Move(ctx, "far", all())
				if r.Forget(ctx, whole[:1], time.Now()) == nil {
					r.Prune(ctx, unwatched)
				}
			}
			w.proves(t, fmt.Sprintf("fault at call %d of %v", at, inOwn), own, far, whole)
			if faulty.Calls() < at {
				break
			}
		}
	}
}

// The tier takes the place of the own store, cut off anywhere.
func TestTierTakeOverPowerLoss(t *testing.T) {
	long(t)
	w := newFarWorld(t)
	move(t, w.r, all())
	for at := 1; at < 20; at++ {
		for _, fault := range []blobtest.Fault{blobtest.Before, blobtest.After} {
			far := w.far.Clone()
			s := cutAt(far, at, fault)
			if r := tiered(t, s, nil); r != nil && r.TakeOver(ctx, false) == nil {
				save(r, "x", random(50, 2), nil, nil)
			}
			r := mustTiered(t, far, nil)
			if r.Mirror() != "" {
				if err := r.TakeOver(ctx, false); err != nil {
					t.Fatal(err)
				}
			}
			mustSave(t, r, "y", random(51, 2))
			for _, p := range w.points {
				equal(t, r, p, w.contents[p.ID])
			}
			clean(t, r, true)
		}
	}
}

// briefly opens a repository until done is called; nil when that fails.
func briefly(t *testing.T, own blob.Store, p places) (r *Repo, done func()) {
	t.Helper()
	cache, err := os.MkdirTemp("/dev/shm", "holdfast-test-")
	if err != nil {
		cache = t.TempDir()
	}
	r, err = Open(ctx, own, secret, Options{Cache: cache, OpenTier: p.open})
	if err != nil {
		os.RemoveAll(cache)
		return nil, func() {}
	}
	return r, func() {
		if err := errors.Join(r.Close(), os.RemoveAll(cache)); err != nil {
			t.Error(err)
		}
	}
}

// A random history of backups, forgets, moves to and fro, prunes and crashes by
// two writers, against a map. Whatever was whole in the tier is, in the tier
// alone, until it is brought back.
func TestTierHistory(t *testing.T) {
	rng := rng(t)
	rounds := 35
	if testing.Short() {
		rounds = 15
	}
	if os.Getenv("HOLDFAST_SOAK") != "" {
		rounds = 3000
	}
	w := newFarWorld(t)
	repos := []*Repo{w.r, mustTiered(t, w.own, w.at)}
	model := maps.Clone(w.contents)
	whole := map[PointID]bool{}
	pool := random(1, 40)
	image := func() (p []byte) {
		for range 1 + rng.IntN(10) {
			c := rng.IntN(40)
			p = append(p, pool[c*ChunkSize:(c+1)*ChunkSize]...)
		}
		return p
	}
	live := func() []PointID { return slices.Sorted(maps.Keys(model)) }
	for range rounds {
		r := repos[rng.IntN(2)]
		at := 0
		if rng.IntN(4) == 0 {
			at = 1 + rng.IntN(60)
		}
		o := cutAt(w.own, at, blobtest.Fault(rng.IntN(2)))
		f := writes{&blobtest.Faulty{Inner: w.far}, o.changes}
		done := func() {}
		if at > 0 {
			if r, done = briefly(t, o, places{"there": f}); r == nil {
				continue
			}
		}
		back := false
		var err error
		switch k := rng.IntN(10); {
		case k < 4:
			content := image()
			var p *Point
			if p, err = save(r, "vm", content, nil, nil); p != nil {
				model[p.ID] = content
			}
			w.contents[""] = content // of a commit that failed after its work
		case k < 5 && len(model) > 0:
			id := live()[rng.IntN(len(model))]
			if err = r.Forget(ctx, []PointID{id}, time.Now()); err == nil {
				delete(model, id)
			}
		case k < 7:
			o := all()
			if rng.IntN(3) == 0 {
				o.Copy, o.ReadBack = true, ReadSample
			}
			if _, err = r.Move(ctx, "far", o); err == nil {
				for id := range model {
					whole[id] = true
				}
			}
		case k < 8 && rng.IntN(2) == 0:
			back = true
			clear(whole)
			_, err = r.Move(ctx, "far", MoveOptions{Back: true, Watch: -1})
		default:
			_, err = r.Prune(ctx, unwatched)
		}
		done()
		if err != nil && at == 0 {
			t.Fatalf("back %v: %v", back, err)
		}
		r = repos[0]
		have := points(t, r)
		if at > 0 {
			for session := range mustLeases(t, r) {
				if err := r.revoke(ctx, session); err != nil {
					t.Fatal(err)
				}
			}
			now := map[PointID][]byte{}
			for _, p := range have {
				if now[p.ID] = model[p.ID]; now[p.ID] == nil {
					now[p.ID] = w.contents[""]
				}
			}
			for id := range model {
				if _, gone := r.current().forgotten[id]; now[id] == nil && !gone {
					t.Fatalf("point %s is gone", id)
				}
			}
			model = now
		}
		alone, done := briefly(t, w.far, nil)
		if alone == nil {
			t.Fatal("the tier alone does not open")
		}
		points(t, repos[1])
		for _, p := range have {
			if err := differs(repos[1], &p, model[p.ID]); err != nil {
				t.Fatal(err)
			}
			if _, inMirror := alone.current().points[p.ID]; whole[p.ID] {
				if err := differs(alone, &p, model[p.ID]); err != nil || !inMirror {
					t.Fatalf("in the tier alone: %v, %v", err, inMirror)
				}
			}
		}
		done()
	}
	prune(t, w.r, unwatched)
	clean(t, mustTiered(t, w.own, w.at), true)
	t.Logf("%d points, chain of %d", len(model), w.r.current().head)
}

// Writers, prunes, two movers, somebody who empties, readers and checks at once.
func TestTierParallel(t *testing.T) {
	w := newFarWorld(t)
	pool := random(1, 30)
	var mu sync.Mutex
	contents := map[PointID][]byte{}
	var writers, others sync.WaitGroup
	var brought atomic.Int64
	stop := make(chan struct{})
	for i := range 2 {
		r := mustTiered(t, w.own, w.at)
		writers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 5))
			for n := range 10 {
				var content []byte
				for range 1 + rng.IntN(8) {
					c := rng.IntN(30)
					content = append(content, pool[c*ChunkSize:(c+1)*ChunkSize]...)
				}
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
				time.Sleep(30 * time.Millisecond)
				if n%2 == 0 {
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
				if err := f(); err != nil && !errors.Is(err, ErrBusy) {
					t.Error(err)
					return
				}
			}
		})
	}
	for i := range 2 {
		r, rng := mustTiered(t, w.own, w.at), rand.New(rand.NewPCG(uint64(i), 7))
		loop(func() error {
			time.Sleep(time.Duration(rng.IntN(4)) * time.Millisecond)
			if rng.IntN(2) == 0 {
				_, err := r.Move(ctx, "far", all())
				return err
			}
			report, err := r.Move(ctx, "far", MoveOptions{Back: true, Watch: -1})
			if err == nil && report.Copied > 0 {
				brought.Add(1)
			}
			return err
		})
	}
	pruner, reader, checker := mustTiered(t, w.own, w.at), mustTiered(t, w.own, w.at), mustTiered(t, w.own, w.at)
	loop(func() error { _, err := pruner.Prune(ctx, unwatched); return err })
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
	t.Logf("emptied %d times", brought.Load())
	move(t, w.r, all())
	prune(t, w.r, unwatched)
	for _, r := range []*Repo{w.r, mustTiered(t, w.own, w.at), mustTiered(t, w.far, nil)} {
		for _, p := range points(t, r) {
			if content := contents[p.ID]; content != nil {
				equal(t, r, &p, content)
			}
		}
		clean(t, r, true)
	}
}
