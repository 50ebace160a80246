package repo

import (
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
)

// listing is the inventory of a machine that knows nothing yet.
func listing(t *testing.T, store blob.Store) map[[32]byte]index.Pack {
	t.Helper()
	r := reopen(t, store)
	if damage := r.Damage(); len(damage) > 0 {
		t.Fatal(damage)
	}
	all := inventory(t, r)
	for name, k := range all {
		for i, it := range k.Items {
			places, err := r.index.Lookup(it.ID, nil)
			if err != nil || !slices.ContainsFunc(places, func(p index.Place) bool { return p.Pack == name && p.Number == uint32(i) }) {
				t.Fatalf("%x of %s lies at %v, %v", it.ID[:4], packName(name), places, err)
			}
		}
	}
	return all
}

// keylessClean fails when a check without a key finds anything.
func keylessClean(t *testing.T, what string, store blob.Store) {
	t.Helper()
	if report, err := CheckKeyless(ctx, store, "", CheckOptions{}); err != nil || len(report.Problems) > 0 {
		t.Fatalf("%s: without a key: %v, %+v", what, err, report)
	}
}

// Many index objects become one, which lists what they listed; who was there
// before goes on.
func TestMerge(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	contents := map[PointID][]byte{}
	for i := range 12 {
		content := random(uint64(i), 1+i%3)
		contents[mustSave(t, r, "a", content).ID] = content
	}
	before, there := listing(t, store), reopen(t, store)
	if dry := prune(t, r, PruneOptions{DryRun: true, mergeLeast: 12}); dry.Merged != 12 {
		t.Errorf("dry run: %+v", dry)
	}
	if report := prune(t, r, PruneOptions{Watch: -1, mergeLeast: 13}); report.Merged != 0 {
		t.Errorf("too few to be worth it: %+v", report)
	}
	if report := prune(t, r, PruneOptions{Watch: -1, mergeLeast: 12}); report.Merged != 12 || report.Quarantined > 0 {
		t.Errorf("%+v", report)
	}
	if n, _ := stored(t, store, "index/"); n != 1 || len(r.current().indexes) != 1 {
		t.Errorf("%d index objects are stored, %d live", n, len(r.current().indexes))
	}
	if after := listing(t, store); !reflect.DeepEqual(before, after) {
		t.Errorf("the inventory was %d packs and is %d", len(before), len(after))
	}
	held, err := r.held(ctx, r.current())
	for name, k := range held {
		if k.made == 0 {
			t.Errorf("it is not known any more when %s was made", packName(name))
		}
	}
	if err != nil || len(held) != len(before) {
		t.Errorf("%d packs, %v", len(held), err)
	}
	for _, r := range []*Repo{there, reopen(t, store)} {
		for _, p := range points(t, r) {
			equal(t, r, &p, contents[p.ID])
		}
		clean(t, r, true)
		for _, content := range maps.Clone(contents) {
			p := mustSave(t, r, "a", content)
			if contents[p.ID] = content; p.NewBytes > 0 {
				t.Fatalf("%d bytes were not found", p.NewBytes)
			}
		}
	}
	keylessClean(t, "merged", store)
	if report := prune(t, r, PruneOptions{Watch: -1, mergeLeast: 2}); report.Merged != 0 {
		t.Errorf("again: %+v", report)
	}
}

// What a run under way has announced is not merged: prune knows by its index
// objects that its packs are needed.
func TestMergeBesideRun(t *testing.T) {
	store := new(blob.Mem)
	r, pruner := create(t, store), reopen(t, store)
	for i := range 4 {
		mustSave(t, r, "a", random(uint64(i), 2))
	}
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	content := random(9, 3)
	d, err := run.Disk(ctx, nil, int64(len(content)))
	if err == nil {
		err = d.WriteAt(ctx, content, 0)
	}
	if err = errors.Join(err, run.Flush(ctx), run.announce(ctx)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if report := prune(t, pruner, unwatched); report.Quarantined > 0 {
			t.Errorf("%+v", report)
		}
	}
	if n := len(pruner.current().indexes); n != 2 {
		t.Errorf("%d index objects", n)
	}
	p, err := saveIn(run, "b", content, nil, nil)
	if err = errors.Join(err, run.Close()); err != nil {
		t.Fatal(err)
	}
	prune(t, pruner, unwatched)
	equal(t, reopen(t, store), p, content)
	clean(t, reopen(t, store), true)
}

// A merge cut off at any call leaves an inventory that lists what it listed.
func TestMergePowerLoss(t *testing.T) {
	w := newCrashWorld(t)
	prune(t, reopen(t, w.store), PruneOptions{Watch: -1}) // so that there is nothing else to do
	r := reopen(t, w.store)
	for i := range 3 {
		p := mustSave(t, r, "m", random(uint64(20+i), 2))
		w.contents[p.ID] = random(uint64(20+i), 2)
	}
	want := listing(t, w.store)
	changes := 0
	for at := 0; at <= changes; at++ {
		for _, fault := range []blobtest.Fault{blobtest.Before, blobtest.After} {
			store := w.store.Clone()
			s := cutAt(store, at, fault)
			report, err := new(PruneReport), error(nil)
			if r := open(t, s); r != nil {
				report, err = r.Prune(ctx, unwatched)
			}
			if at == 0 {
				if changes = s.changes.Calls(); err != nil || report.Merged < 3 {
					t.Fatalf("%v, %+v", err, report)
				}
			}
			what := fmt.Sprintf("cut at call %d/%d", at, fault)
			if got := listing(t, store); !reflect.DeepEqual(got, want) {
				t.Fatalf("%s: %d packs are listed, should be %d", what, len(got), len(want))
			}
			keylessClean(t, what, store)
			if !testing.Short() {
				w.proves(t, what, store, nil, w.stays)
			}
		}
	}
	t.Logf("%d changes", changes)
}

// What takes the place of locked index objects is locked as long as these, and
// these stay until then.
func TestMergeLocked(t *testing.T) {
	store, r, clock := immutable(t, thirty)
	var kept *Point
	for i := range 5 {
		kept = mustSave(t, r, "a", random(uint64(i), 2))
	}
	if err := r.Keep(ctx, []PointID{kept.ID}, UntilTime(clock.now().AddDate(1, 0, 0))); err != nil {
		t.Fatal(err)
	}
	old := maps.Clone(r.current().indexes)
	if report := prune(t, r, unwatched); report.Merged != 5 {
		t.Fatalf("%+v", report)
	}
	until, entry := clock.now().AddDate(1, 0, 0), r.current().committed[kept.ID]
	if bad := unprotected(store, r, kept, entry, until); len(bad) > 0 {
		t.Errorf("not locked: %q", bad)
	}
	left := func() (n int) {
		for d := range old {
			if _, err := store.Get(ctx, indexName(d), 0, 1); err == nil {
				n++
			}
		}
		return n
	}
	if n := left(); n != 5 {
		t.Errorf("%d of 5 locked index objects are left", n)
	}
	clean(t, clock.at(reopen(t, store)), false)
	clock.pass(400 * day)
	prune(t, clock.at(reopen(t, store)), unwatched)
	if n := left(); n != 0 {
		t.Errorf("%d are left when their locks are over", n)
	}
	equal(t, reopen(t, store), kept, random(4, 2))
}

// Sizes of index objects after a merge double, whatever they were, and nothing
// large is touched.
func TestMergeChoice(t *testing.T) {
	rng := rng(t)
	for range 200 {
		p := &pruner{m: &marker{packs: map[[32]byte]*packMark{}, state: newState([32]byte{})}, o: PruneOptions{mergeLeast: 2}}
		sizes := map[[32]byte]int{}
		add := func(items int) {
			var d, name [32]byte
			rand.Read(d[:])
			rand.Read(name[:])
			p.m.packs[name] = &packMark{items: items, indexes: [][32]byte{d}}
			p.m.state.indexes[d], sizes[d] = true, items
		}
		for range rng.IntN(40) {
			add(1 << rng.IntN(20))
		}
		for {
			chosen := p.small()
			if len(chosen) == 0 {
				break
			}
			sum, most := 0, 0
			for _, d := range chosen {
				sum, most = sum+sizes[d], max(most, sizes[d])
				delete(p.m.state.indexes, d)
			}
			if sum < 2*most || 2*most >= indexItems {
				t.Fatalf("%d are merged into %d, the largest has %d", len(chosen), sum, most)
			}
			for ; sum > 0; sum -= indexItems {
				add(min(sum, indexItems))
			}
		}
		var left []int
		for d := range p.m.state.indexes {
			if 2*sizes[d] < indexItems {
				left = append(left, sizes[d])
			}
		}
		slices.Sort(left)
		before := 0
		for _, n := range left {
			if n <= before {
				t.Fatalf("left: %v", left)
			}
			before += n
		}
	}
}

// The largest index object that is made is one that is read.
func TestMostPacks(t *testing.T) {
	long(t)
	r := create(t, new(blob.Mem))
	packs := make([]index.Pack, indexPacks+1)
	for i := range packs {
		rand.Read(packs[i].Name[:])
		packs[i].Size, packs[i].Kind, packs[i].Made = 64<<20, pack.Chunks, 1<<34
		packs[i].Items = make([]index.Item, 3)
		for j := range packs[i].Items {
			packs[i].Items[j].Stored = 1000
		}
	}
	n := indexful(packs)
	if n != indexPacks {
		t.Fatalf("%d packs", n)
	}
	d, err := r.putIndex(ctx, packs[:n], slices.Repeat([]seal.Hex{make([]byte, 32)}, mergeMost)...)
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.readIndex(ctx, d)
	if err != nil || len(got) != n || len(got[n-1].Items) != 3 {
		t.Fatalf("%d packs, %v", len(got), err)
	}
}
