package repo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

// all moves packs of any age.
func all() MoveOptions { return MoveOptions{Before: time.Now().Add(time.Hour), Watch: -1} }

// places opens tiers by their locations.
type places map[string]blob.Store

func (p places) open(_ context.Context, location string) (blob.Store, error) {
	if s := p[location]; s != nil {
		return s, nil
	}
	return nil, fmt.Errorf("nothing answers at %s", location)
}

// tiered opens a repository that finds its tiers; nil when it cannot be opened.
func tiered(t *testing.T, own blob.Store, p places) *Repo {
	t.Helper()
	r, err := Open(ctx, own, secret, Options{Cache: cacheDir(t), OpenTier: p.open})
	if err != nil {
		t.Logf("open: %v", err)
		return nil
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func mustTiered(t *testing.T, own blob.Store, p places) *Repo {
	t.Helper()
	r := tiered(t, own, p)
	if r == nil {
		t.FailNow()
	}
	return r
}

func addTier(t *testing.T, r *Repo, tier Tier, far blob.Store) {
	t.Helper()
	if err := r.AddTier(ctx, tier, far); err != nil {
		t.Fatal(err)
	}
}

func move(t *testing.T, r *Repo, o MoveOptions) *MoveReport {
	t.Helper()
	report, err := r.Move(ctx, "far", o)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// farWorld is a repository with a tier "far", and nothing moved yet.
type farWorld struct {
	own, far *blob.Mem
	at       places
	r        *Repo
	points   []*Point
	contents map[PointID][]byte
}

func newFarWorld(t *testing.T) *farWorld {
	w := &farWorld{own: new(blob.Mem), far: new(blob.Mem), contents: map[PointID][]byte{}}
	w.at = places{"there": w.far}
	create(t, w.own)
	w.r = mustTiered(t, w.own, w.at)
	w.add(t, "a", random(1, 8))
	w.add(t, "b", slices.Concat(random(1, 3), random(2, 3)))
	addTier(t, w.r, Tier{Name: "far", Location: "there", OlderThan: "14d"}, w.far)
	return w
}

func (w *farWorld) add(t *testing.T, vm string, content []byte) *Point {
	t.Helper()
	p := mustSave(t, w.r, vm, content)
	w.points = append(w.points, p)
	w.contents[p.ID] = content
	return p
}

// chunkPacks counts packs in one store that are not map packs.
func chunkPacks(t *testing.T, r *Repo, s blob.Store) (chunks, nodes int) {
	t.Helper()
	held, err := r.held(ctx, r.current())
	if err != nil {
		t.Fatal(err)
	}
	there, err := listSizes(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	for name := range there {
		if held[name].kind == 2 {
			nodes++
		} else {
			chunks++
		}
	}
	return chunks, nodes
}

func TestTierMove(t *testing.T) {
	w := newFarWorld(t)
	before := mustTiered(t, w.own, w.at) // has never heard of the move
	if report := move(t, w.r, MoveOptions{Before: time.Now().Add(-time.Hour)}); report.Freed != 0 || report.Copied != 2 {
		t.Errorf("nothing is so old, and two map packs were to be copied: %+v", report)
	}
	want, _ := chunkPacks(t, w.r, w.own)
	dry := all()
	dry.DryRun = true
	planned := move(t, w.r, dry)
	report := move(t, w.r, all())
	if report.Freed != want || report.Copied != want || planned.Freed != want || planned.Copied != want || planned.FreedBytes != report.FreedBytes {
		t.Errorf("%d packs were to go: %+v, planned %+v", want, report, planned)
	}
	if chunks, nodes := chunkPacks(t, w.r, w.own); chunks != 0 || nodes != 2 {
		t.Errorf("the own store has %d chunk packs and %d map packs", chunks, nodes)
	}
	for _, r := range []*Repo{w.r, before, mustTiered(t, w.own, w.at)} {
		for _, p := range w.points {
			equal(t, r, p, w.contents[p.ID])
		}
		clean(t, r, true)
	}
	// What is new is made in the own store, and rests on what is in the tier.
	w.add(t, "a", slices.Concat(random(1, 8), random(5, 1)))
	if n := w.points[2].NewBytes; n > 3*ChunkSize {
		t.Errorf("%d new bytes: what is in the tier was stored again", n)
	}
	infos, err := w.r.TierInfos(ctx)
	if err != nil || len(infos) != 1 || infos[0].Points != 2 || infos[0].Packs != want+2 || infos[0].Only != want || infos[0].Problem != "" {
		t.Errorf("%+v, %v", infos, err)
	}
	if again := move(t, w.r, MoveOptions{Before: time.Now().Add(-time.Hour)}); again.Copied != 1 {
		t.Errorf("one new map pack was to be copied: %+v", again)
	}
}

// The own store is lost whole: the tier opens on an empty machine, every point
// that was moved is there, and it goes on as the repository.
func TestTierOwnLost(t *testing.T) {
	for _, copied := range []bool{false, true} {
		w := newFarWorld(t)
		o := all()
		o.Copy = copied
		if report := move(t, w.r, o); report.Freed > 0 == copied {
			t.Errorf("%+v", report)
		}
		late := w.add(t, "late", random(9, 4))
		w.own = nil // lost

		r := mustTiered(t, w.far, w.at)
		if r.Mirror() != "far" {
			t.Fatalf("it is the mirror of %q", r.Mirror())
		}
		have := points(t, r)
		if len(have) != 2 {
			t.Fatalf("%d points", len(have))
		}
		for _, p := range have {
			equal(t, r, &p, w.contents[p.ID])
		}
		clean(t, r, true)
		if err := r.Pin(ctx, strings.Repeat("ab", 8), have[0].ID); err != nil {
			t.Errorf("pin: %v", err)
		}
		if _, err := save(r, "x", random(1, 1), nil, nil); !errors.Is(err, ErrMirror) {
			t.Errorf("backup: %v", err)
		}
		if err := r.Forget(ctx, []PointID{have[0].ID}, time.Now()); !errors.Is(err, ErrMirror) {
			t.Errorf("forget: %v", err)
		}
		if _, err := r.Prune(ctx, unwatched); !errors.Is(err, ErrMirror) {
			t.Errorf("prune: %v", err)
		}
		if _, err := r.AddPassphrase(ctx, "", []byte("another")); !errors.Is(err, ErrMirror) {
			t.Errorf("add a passphrase: %v", err)
		}
		if _, err := r.Move(ctx, "far", all()); !errors.Is(err, ErrMirror) {
			t.Errorf("move: %v", err)
		}
		if err := r.TakeOver(ctx, false); err != nil {
			t.Fatal(err)
		}
		for _, r := range []*Repo{r, mustTiered(t, w.far, nil)} {
			p := mustSave(t, r, "late", random(9, 4))
			equal(t, r, p, w.contents[late.ID])
			clean(t, r, true)
		}
		if report := prune(t, r, unwatched); len(report.Lost) > 0 {
			t.Errorf("%+v", report)
		}
		for _, p := range have {
			equal(t, r, &p, w.contents[p.ID])
		}
	}
}

// A machine that has seen more of the chain than the tier has says what it is.
func TestTierBehind(t *testing.T) {
	w := newFarWorld(t)
	move(t, w.r, all())
	cache := cacheDir(t)
	o := Options{Cache: cache, OpenTier: w.at.open}
	w.add(t, "late", random(9, 4))
	r, err := Open(ctx, w.own, secret, o)
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	_, err = Open(ctx, w.far, secret, o)
	if !errors.Is(err, ErrRolledBack) || !strings.Contains(err.Error(), "tier far") || !strings.Contains(err.Error(), r.chain.Memory) {
		t.Fatal(err)
	}
	if err := os.Remove(r.chain.Memory); err != nil {
		t.Fatal(err)
	}
	if r, err = Open(ctx, w.far, secret, o); err != nil {
		t.Fatal(err)
	}
	r.Close()
}

// When the own store turns up again after the tier has taken its place, each
// leaves the other alone.
func TestTierForked(t *testing.T) {
	w := newFarWorld(t)
	move(t, w.r, all())
	old := mustTiered(t, w.own, w.at)
	forget(t, old, w.points[0].ID)
	heir := mustTiered(t, w.far, nil)
	if err := heir.TakeOver(ctx, false); err != nil {
		t.Fatal(err)
	}
	p := mustSave(t, heir, "new", random(30, 3))
	if _, err := old.Prune(ctx, unwatched); !errors.Is(err, ErrRefused) {
		t.Errorf("prune: %v", err)
	}
	if _, err := old.Move(ctx, "far", all()); err == nil {
		t.Error("moved")
	}
	// The same if it was cut off before it took the mark away.
	number, master := old.keys.Newest()
	if err := putSealed(ctx, w.far, tierName, seal.NewHeader(seal.Tier, 0, number, old.id), map[string]string{"name": "far"}, []byte("{}"), master, "tier"); err != nil {
		t.Fatal(err)
	}
	old.tiers.Set(nil)
	old.attach(old.current())
	if _, err := old.Prune(ctx, unwatched); !errors.Is(err, ErrRefused) || !errors.Is(err, ErrForked) {
		t.Errorf("prune: %v", err)
	}
	if report, err := old.Check(ctx, CheckOptions{}); err != nil || len(report.Problems) != 1 || report.Problems[0].Object != "tier far" {
		t.Errorf("check: %+v, %v", report, err)
	}
	if _, err := old.Move(ctx, "far", all()); !errors.Is(err, ErrForked) {
		t.Errorf("move: %v", err)
	}
	if err := old.AddTier(ctx, Tier{Name: "far2", Location: "elsewhere"}, w.far); !errors.Is(err, ErrForked) {
		t.Errorf("add: %v", err)
	}
	r := mustTiered(t, w.far, places{"x": new(blob.Mem)})
	equal(t, r, p, random(30, 3))
	clean(t, r, true)
	x := new(blob.Mem)
	r.openTier = places{"x": x}.open
	if err := r.AddTier(ctx, Tier{Name: "far", Location: "x"}, x); err != nil {
		t.Errorf("a mark that was left over is in the way: %v", err)
	}
	if r := mustTiered(t, w.far, nil); r.Mirror() != "" {
		t.Errorf("it is a mirror again")
	}
}

// The own store under another name is not a tier: nothing may be moved "there".
func TestTierIsItself(t *testing.T) {
	own := new(blob.Mem)
	r := create(t, own)
	mustSave(t, r, "a", random(1, 4))
	if err := r.AddTier(ctx, Tier{Name: "far", Location: "x"}, own); err == nil {
		t.Fatal("added")
	}
	w := newFarWorld(t)
	w.at["there"] = w.own // the location leads to another place now
	w.r.tiers.Set(nil)
	w.r.attach(w.r.current())
	if _, err := w.r.Move(ctx, "far", all()); err == nil {
		t.Fatal("moved")
	}
	other, foreign := create(t, new(blob.Mem)), new(blob.Mem)
	other.openTier = places{"x": foreign}.open
	addTier(t, other, Tier{Name: "far", Location: "x"}, foreign)
	if err := r.AddTier(ctx, Tier{Name: "far", Location: "x"}, foreign); !errors.Is(err, ErrForked) {
		t.Errorf("a tier of another repository: %v", err)
	}
}

// A tier that cannot be reached costs what lies there, and nothing else.
func TestTierUnreachable(t *testing.T) {
	w := newFarWorld(t)
	move(t, w.r, all())
	forget(t, w.r, w.points[1].ID)
	for what, at := range map[string]places{"closed": nil, "not mounted": {"there": new(blob.Mem)}} {
		r := mustTiered(t, w.own, at)
		if err := differs(r, w.points[0], w.contents[w.points[0].ID]); err == nil || errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "tier far") {
			t.Errorf("%s: read: %v", what, err)
		}
		p, err := save(r, "a", w.contents[w.points[0].ID], nil, nil)
		if err != nil || p.NewBytes > ChunkSize {
			t.Errorf("%s: backup: %v, %+v", what, err, p)
		}
		if _, err := r.Prune(ctx, unwatched); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "tier far") {
			t.Errorf("%s: prune: %v", what, err)
		}
		if _, err := r.Check(ctx, CheckOptions{ReadData: true}); err == nil || !strings.Contains(err.Error(), "tier far") {
			t.Errorf("%s: check: %v", what, err)
		}
		if n := len(r.current().Bad); n > 0 {
			t.Errorf("%s: %d items are distrusted", what, n)
		}
		if infos, err := r.TierInfos(ctx); err != nil || len(infos) != 1 || infos[0].Problem == "" {
			t.Errorf("%s: %+v, %v", what, infos, err)
		}
		if _, err := r.RemoveTier(ctx, "far", RemoveTierOptions{}); !errors.Is(err, ErrOnlyThere) {
			t.Errorf("%s: remove: %v", what, err)
		}
	}
	clean(t, mustTiered(t, w.own, w.at), true)

	// When it is lost for good it can be given up, and what was in it is
	// stored again.
	r := mustTiered(t, w.own, nil)
	if _, err := r.RemoveTier(ctx, "far", RemoveTierOptions{Force: true}); err != nil {
		t.Fatal(err)
	}
	if report, err := r.Check(ctx, CheckOptions{}); err != nil || len(report.Problems) == 0 {
		t.Errorf("%+v, %v", report, err)
	}
	mustSave(t, r, "a", w.contents[w.points[0].ID])
	prune(t, r, unwatched)
	clean(t, r, true)
	equal(t, r, w.points[0], w.contents[w.points[0].ID])
}

// A copy in the own store that is damaged is made up for by that in the tier,
// and the other way round.
func TestTierDamagedCopy(t *testing.T) {
	w := newFarWorld(t)
	o := all()
	o.Copy = true
	move(t, w.r, o)
	for _, s := range []*blob.Mem{w.own, w.far} {
		damaged := s.Clone()
		for i, err := range s.List(ctx, packsPrefix) {
			if err != nil {
				t.Fatal(err)
			}
			damaged.Damage(i.Name, func(p []byte) []byte { p[len(p)/2] ^= 1; p[70] ^= 1; return p })
		}
		own, at := w.own, places{"there": damaged}
		if s == w.own {
			own, at = damaged, w.at
		}
		r := mustTiered(t, own, at)
		for _, p := range w.points {
			equal(t, r, p, w.contents[p.ID])
		}
		// Nothing is deleted on the word of a copy that is not right.
		report, err := r.Move(ctx, "far", all())
		if s == w.far && (err != nil || report.Freed > 0 || len(report.Notes) == 0) {
			t.Errorf("%+v, %v", report, err)
		} else if s == w.own && (err != nil || report.Freed == 0) {
			t.Errorf("%+v, %v", report, err)
		}
		for _, p := range w.points {
			equal(t, r, p, w.contents[p.ID])
		}
	}
}

// unreadable fails to read packs.
type unreadable struct{ blob.Store }

func (u unreadable) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	if strings.HasPrefix(name, packsPrefix) {
		return nil, errors.New("bad sector")
	}
	return u.Store.Get(ctx, name, off, n)
}

// What cannot be read in the own store is read in the tier, and a check says so
// all the same.
func TestTierBadSectors(t *testing.T) {
	w := newFarWorld(t)
	o := all()
	o.Copy = true
	move(t, w.r, o)
	r := mustTiered(t, unreadable{w.own}, w.at)
	for _, p := range w.points {
		equal(t, r, p, w.contents[p.ID])
	}
	report, err := r.Check(ctx, CheckOptions{ReadData: true})
	if err != nil || len(report.Problems) == 0 || !strings.Contains(report.Problems[0].What, "bad sector") {
		t.Errorf("%+v, %v", report, err)
	}
	for _, p := range w.points {
		equal(t, r, p, w.contents[p.ID])
	}
}

// Repair takes from the tier what is damaged in the own store.
func TestTierRepair(t *testing.T) {
	w := newFarWorld(t)
	o := all()
	o.Copy = true
	move(t, w.r, o)
	for i, err := range w.own.Clone().List(ctx, packsPrefix) {
		if err != nil {
			t.Fatal(err)
		}
		w.own.Damage(i.Name, func(p []byte) []byte { p[len(p)/2] ^= 1; return p })
	}
	r := mustTiered(t, w.own, w.at)
	report, err := r.Repair(ctx, RepairOptions{Check: CheckOptions{ReadData: true}})
	if err != nil || len(report.Left) > 0 || len(report.Check.Problems) == 0 {
		t.Errorf("%+v, %v", report, err)
	}
	r = mustTiered(t, w.own, nil) // without the tier
	for _, p := range w.points {
		equal(t, r, p, w.contents[p.ID])
	}
}

func TestTierBackAndRemove(t *testing.T) {
	w := newFarWorld(t)
	move(t, w.r, all())
	if removal, err := w.r.RemoveTier(ctx, "far", RemoveTierOptions{DryRun: true}); !errors.Is(err, ErrOnlyThere) || removal.Only == 0 {
		t.Errorf("%+v, %v", removal, err)
	}
	chunks, _ := chunkPacks(t, w.r, w.far)
	back := MoveOptions{Back: true, Watch: -1}
	dry := back
	dry.DryRun = true
	planned := move(t, w.r, dry)
	report := move(t, w.r, back)
	if report.Copied != chunks || planned.Copied != chunks || report.Freed != chunks+2 || planned.Freed != chunks+2 {
		t.Errorf("%+v, planned %+v", report, planned)
	}
	if n, _ := stored(t, w.far, packsPrefix); n != 0 {
		t.Errorf("%d packs are left", n)
	}
	for _, p := range w.points {
		equal(t, w.r, p, w.contents[p.ID])
	}
	if _, err := w.r.RemoveTier(ctx, "far", RemoveTierOptions{Watch: -1}); err != nil {
		t.Fatal(err)
	}
	r := mustTiered(t, w.own, nil)
	clean(t, r, true)
	if _, err := r.Move(ctx, "far", all()); !errors.Is(err, ErrNoTier) {
		t.Error(err)
	}
	// It can come back under the same name, and is filled again.
	w.r = mustTiered(t, w.own, w.at)
	addTier(t, w.r, Tier{Name: "far", Location: "there"}, w.far)
	move(t, w.r, all())
	clean(t, w.r, true)
	alone := mustTiered(t, w.far, nil)
	clean(t, alone, true)
}

// What moves packs one way and what moves them the other way exclude one
// another, and a dead run is found out.
func TestTierTwoDirections(t *testing.T) {
	w := newFarWorld(t)
	mover, err := w.r.begin(ctx, RandomID(), "far")
	if err != nil {
		t.Fatal(err)
	}
	defer mover.Close()
	other := mustTiered(t, w.own, w.at)
	move(t, other, all()) // the same way: fine
	if _, err := other.Move(ctx, "far", MoveOptions{Back: true, Watch: -1}); !errors.Is(err, ErrBusy) || !strings.Contains(err.Error(), mover.lease) {
		t.Fatalf("back: %v", err)
	}
	if chunks, _ := chunkPacks(t, w.r, w.far); chunks == 0 {
		t.Fatal("packs were deleted")
	}
	m := &carrier{r: w.r, o: all(), run: mover, tier: "far"}
	if err := m.still(ctx); err != nil {
		t.Errorf("it was stopped: %v", err)
	}
	// One that did not see it, since its lease came in between, turns the tier
	// and waits all the same; and the one from before finds itself stopped.
	err = other.changeTiers(ctx, func(tiers []Tier) ([]Tier, error) {
		tiers[0].Back = true
		return tiers, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.Move(ctx, "far", MoveOptions{Back: true, Watch: -1}); !errors.Is(err, ErrBusy) {
		t.Fatalf("back: %v", err)
	}
	if chunks, _ := chunkPacks(t, w.r, w.far); chunks == 0 {
		t.Fatal("packs were deleted")
	}
	if err := m.still(ctx); !errors.Is(err, ErrBusy) {
		t.Errorf("still: %v", err)
	}
	if _, err := other.RemoveTier(ctx, "far", RemoveTierOptions{Watch: -1, Force: true}); !errors.Is(err, ErrBusy) {
		t.Errorf("remove: %v", err)
	}
	mover.fail(errClosed) // it beats no more
	report, err := other.Move(ctx, "far", MoveOptions{Back: true, Watch: 100 * time.Millisecond})
	if err != nil || !slices.Equal(report.Revoked, []string{mover.lease}) || report.Freed == 0 {
		t.Errorf("%+v, %v", report, err)
	}
	if err := m.still(ctx); err == nil {
		t.Error("a revoked run goes on")
	}
}

// Prune moves what points need into new packs and deletes the old ones: what was
// whole in the tier stays so.
func TestTierPrune(t *testing.T) {
	w := newFarWorld(t)
	move(t, w.r, all())
	forget(t, w.r, w.points[0].ID) // of whose pack b needs three chunks
	report := prune(t, w.r, unwatched)
	if report.Rewritten == 0 || report.Removed == 0 || len(report.Lost) > 0 {
		t.Fatalf("%+v", report)
	}
	for _, r := range []*Repo{w.r, mustTiered(t, w.own, w.at), mustTiered(t, w.far, nil)} {
		have := points(t, r)
		if len(have) != 1 || have[0].ID != w.points[1].ID {
			t.Fatalf("%+v", have)
		}
		equal(t, r, &have[0], w.contents[have[0].ID])
		clean(t, r, true)
	}
	held, err := w.r.held(ctx, w.r.current())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []blob.Store{w.own, w.far} {
		there, err := listSizes(ctx, s)
		if err != nil {
			t.Fatal(err)
		}
		for name := range there {
			if _, ok := held[name]; !ok {
				t.Errorf("%s stayed", packName(name))
			}
		}
	}
}

// Keys that were changed are changed in the tier as well.
func TestTierKeys(t *testing.T) {
	w := newFarWorld(t)
	move(t, w.r, all())
	slots, err := w.r.Slots(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.r.RotateRoot(ctx, [][]byte{secret}); err != nil {
		t.Fatal(err)
	}
	w.add(t, "a", random(40, 2))
	move(t, w.r, all())
	r := mustTiered(t, w.far, nil)
	for _, p := range w.points {
		equal(t, r, p, w.contents[p.ID])
	}
	if _, err := w.far.Get(ctx, slotName(slots[0].ID), 0, -1); !errors.Is(err, blob.ErrNotExist) {
		t.Errorf("a key slot that was removed is still in the tier: %v", err)
	}
}

// What was read in the own store was not read in the tier.
func TestTierUnread(t *testing.T) {
	w := newFarWorld(t)
	o := all()
	o.Copy = true
	move(t, w.r, o)
	cache := cacheDir(t)
	for _, want := range []struct {
		s        blob.Store
		readData bool
		unread   int
	}{{w.own, true, 0}, {w.far, false, 6}, {w.far, true, 0}, {w.own, false, 0}, {w.far, false, 0}} {
		r, err := Open(ctx, want.s, secret, Options{Cache: cache, OpenTier: w.at.open})
		if err != nil {
			t.Fatal(err)
		}
		check := CheckOptions{ReadData: want.readData}
		report, err := r.Check(ctx, check)
		if err = errors.Join(err, r.Close()); err != nil || report.Unread != want.unread {
			t.Errorf("%+v, %v", report, err)
		}
		report, err = CheckKeyless(ctx, want.s, cache, check)
		if err != nil || report.Unread != want.unread {
			t.Errorf("keyless: %+v, %v", report, err)
		}
	}
}

func TestTierKeyless(t *testing.T) {
	w := newFarWorld(t)
	move(t, w.r, all())
	for what, s := range map[string]blob.Store{"own": w.own, "tier": w.far} {
		report, err := CheckKeyless(ctx, s, "", CheckOptions{ReadData: true})
		if err != nil || len(report.Problems) > 0 || (report.Elsewhere > 0) != (what == "own") {
			t.Errorf("%s: %+v, %v", what, report, err)
		}
	}
}
