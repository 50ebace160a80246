package repo

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
)

// hooked runs a function before some calls.
type hooked struct {
	blob.Store
	get func(name string)
	put func(name string)
}

func (h *hooked) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	if h.get != nil {
		h.get(name)
	}
	return h.Store.Get(ctx, name, off, n)
}

func (h *hooked) Put(ctx context.Context, name string, p []byte) error {
	if h.put != nil {
		h.put(name)
	}
	return h.Store.Put(ctx, name, p)
}

// A slow reader finds its chunk however often prunes have moved it since it
// looked where it is.
func TestMovedAgainAndAgain(t *testing.T) {
	store := new(blob.Mem)
	slow := &hooked{Store: store}
	r, pruner, reader := create(t, store), reopen(t, store), reopen(t, slow)
	content := random(1, 40)
	var points []*Point
	for _, n := range []int{40, 18, 8, 3} {
		points = append(points, mustSave(t, r, "a", content[:n*ChunkSize]))
	}
	last := points[3]
	if _, err := reader.Points(ctx); err != nil {
		t.Fatal(err)
	}
	moves := 0
	slow.get = func(name string) {
		if _, err := store.Get(ctx, name, 0, 1); err == nil && strings.HasPrefix(name, "packs/") && moves < 3 {
			moves++
			forget(t, pruner, points[moves-1].ID)
			if report := prune(t, pruner, unwatched); report.Removed == 0 || report.Rewritten == 0 {
				t.Errorf("prune %d moved nothing: %+v", moves, report)
			}
		}
	}
	if err := differs(reader, last, content[:3*ChunkSize]); err != nil {
		t.Error(err)
	}
	if moves != 3 {
		t.Errorf("%d moves", moves)
	}
}

// What was lost together with the index object that listed it is not taken for
// present by a process that remembers the index object: the next run of the
// same process stores it again, one under way does not build on it.
func TestLostWithItsIndex(t *testing.T) {
	store := new(blob.Mem)
	first, second := random(1, 10), random(2, 10)
	create(t, store)
	r := reopen(t, store)
	p, q := mustSave(t, r, "a", first), mustSave(t, r, "b", second)
	before, _ := blob.Names(ctx, store, "packs/")
	third := random(3, 10)
	victim := mustSave(t, r, "c", third)
	after, _ := blob.Names(ctx, store, "packs/")
	running, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	w, err := running.Disk(ctx, nil, int64(len(third)))
	if err != nil || w.WriteAt(ctx, third, 0) != nil {
		t.Fatal(err)
	}
	for _, name := range after {
		if !slices.Contains(before, name) {
			store.Delete(ctx, name)
		}
	}
	names, _ := blob.Names(ctx, store, "index/")
	for _, name := range names {
		store.Damage(name, func(p []byte) []byte { return p[:len(p)/2] })
	}
	report, err := r.Check(ctx, CheckOptions{})
	if err != nil || len(lostPoints(report)) == 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	root, err := w.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	made := &Point{VM: "c", Disks: []Disk{{ID: "vda", Size: int64(len(third)), Root: root}}}
	if err := running.Commit(ctx, made); !errors.Is(err, ErrPruned) {
		t.Errorf("a run that built on what is lost commits: %v", err)
	}
	running.Close()
	d, err := reopen(t, store).OpenDisk(ctx, victim.Disks[0])
	if err != nil {
		t.Fatal(err) // the map was not in what was lost
	}
	var missing int64
	for e, err := range d.Missing(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		missing += e.Len
	}
	if missing != int64(len(third)) {
		t.Errorf("an increment would store %d bytes anew, %d are lost", missing, len(third))
	}
	again := mustSave(t, r, "c", third)
	for _, r := range []*Repo{r, reopen(t, store)} {
		equal(t, r, p, first)
		equal(t, r, q, second)
		equal(t, r, again, third)
		equal(t, r, victim, third)
		clean(t, r, true)
	}
}

// A commit that comes between a prune's marking and its quarantine, and rests on
// what was dead when it was marked, makes the prune mark again: at no moment is
// a point on a pack in quarantine.
func TestQuarantineRightBehind(t *testing.T) {
	long(t)
	made := new(blob.Mem)
	r := create(t, made)
	content := random(1, 5)
	mustSave(t, r, "z", random(2, 5))
	forget(t, r, mustSave(t, r, "a", content).ID)
	for calls := 1; ; calls++ { // that the prune makes after that before the power goes
		store := made.Clone()
		r := reopen(t, store)
		var p *Point
		slow := &hooked{Store: store}
		cut := &blobtest.Faulty{Inner: slow, Cut: true}
		slow.put = func(name string) {
			if strings.HasPrefix(name, "chain/") && p == nil {
				p = mustSave(t, r, "b", content)
				cut.At = cut.Calls() + calls
			}
		}
		_, err := reopen(t, cut).Prune(ctx, unwatched)
		if p == nil {
			t.Fatal("nothing was put in quarantine")
		}
		r = reopen(t, store)
		equal(t, r, p, content)
		clean(t, r, true)
		if err == nil {
			break
		}
	}
}
