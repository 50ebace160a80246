package repo

import (
	"context"
	"crypto/sha256"
	"maps"
	"math/rand/v2"
	"sync"
	"testing"

	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/tree"
)

// forest keeps nodes in memory and counts how many are fetched.
type forest struct {
	mu      sync.Mutex // guards what follows
	nodes   map[tree.ID]tree.Node
	fetched int
}

func (f *forest) fetch(_ context.Context, id tree.ID, level int) (*tree.Node, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fetched++
	n, ok := f.nodes[id]
	if !ok || n.Level != level {
		return nil, ErrDamaged
	}
	return &n, nil
}

func (f *forest) store(_ context.Context, n *tree.Node) (tree.ID, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := tree.ID(sha256.Sum256(n.Marshal()))
	f.nodes[id] = *n
	return id, nil
}

// needs gives all items that a walk finds, each as the name of a pack of its own.
func (f *forest) needs(t *testing.T, base, root tree.Root) map[[32]byte]bool {
	t.Helper()
	n := newNeeds(f.fetch, func(id pack.ID) ([32]byte, bool, error) { return id, true, nil })
	if err := n.walk(ctx, base, root); err != nil || n.lost {
		t.Fatal(err, n.lost)
	}
	return n.known
}

// Of two maps the second needs nothing but what the first needs and what a walk
// of the difference finds, whatever their sizes; and little is read for that.
func TestNeedsDifference(t *testing.T) {
	rng := rng(t)
	f := &forest{nodes: map[tree.ID]tree.Node{}}
	sizes := []int64{1, 200, 256, 257, 3000, 65536, 65537, 100_000, 200_000} // chunks: one to three levels
	var root tree.Root
	var old int64
	for round := range 300 {
		size := old
		if round == 0 || rng.IntN(3) == 0 {
			size = sizes[rng.IntN(len(sizes))]
		}
		next := f.change(t, rng, root, old, size)
		all, before, diff := f.needs(t, tree.Root{}, next), f.needs(t, tree.Root{}, root), f.needs(t, root, next)
		for id := range all {
			if !before[id] && !diff[id] {
				t.Fatalf("round %d: from %d chunks to %d: item %x is missed", round, old, size, id[:4])
			}
		}
		for id := range diff {
			if !all[id] {
				t.Fatalf("round %d: item %x is not needed", round, id[:4])
			}
		}
		if maps.Equal(all, before) && len(diff) > 0 && root == next {
			t.Fatalf("round %d: the same map needs %d items more", round, len(diff))
		}
		root, old = next, size
	}
	// One chunk of a large, full map.
	many := make([]pack.ID, 100_000)
	for i := range many {
		many[i] = pack.ID(sha256.Sum256([]byte{byte(i), byte(i >> 8), byte(i >> 16)}))
	}
	full := f.set(t, tree.Root{}, 0, 100_000, 0, many)
	next := f.set(t, full, 100_000, 100_000, 70_000, many[:1])
	f.fetched = 0
	if got := f.needs(t, full, next); len(got) != 4 || f.fetched > 6 { // a chunk and three nodes, old and new
		t.Errorf("%d items, %d nodes fetched", len(got), f.fetched)
	}
}

func (f *forest) change(t *testing.T, rng *rand.Rand, root tree.Root, old, size int64) tree.Root {
	for range rng.IntN(4) {
		at := rng.Int64N(size)
		ids := make([]pack.ID, 1+rng.Int64N(min(5, size-at)))
		for i := range ids {
			if rng.IntN(4) > 0 {
				ids[i] = pack.ID{byte(1 + rng.IntN(200)), byte(rng.IntN(200))}
			}
		}
		root, old = f.set(t, root, old, size, at, ids), size
	}
	if old != size {
		return f.set(t, root, old, size, 0, nil)
	}
	return root
}

func (f *forest) set(t *testing.T, root tree.Root, old, size, at int64, ids []pack.ID) tree.Root {
	t.Helper()
	w, err := tree.NewWriter(ctx, f.fetch, f.store, root, old*ChunkSize, size*ChunkSize)
	if err == nil && len(ids) > 0 {
		err = w.Set(ctx, at, ids)
	}
	if err != nil {
		t.Fatal(err)
	}
	root, err = w.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return root
}
