package tree

import (
	"context"
	"math/rand/v2"
	"testing"
)

// Random pairs of maps of random sizes, against the ids themselves.
func TestDiff(t *testing.T) {
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(seed(t), 2))
	sizes := []int64{1, 255*ChunkSize + 7, 256 * ChunkSize, 257 * ChunkSize, 66000 * ChunkSize, 70000 * ChunkSize}
	for range 60 {
		s := &nodes{m: map[ID][]byte{}}
		chunks := map[bool]int64{}
		model := map[bool]map[int64]ID{false: {}, true: {}}
		roots := map[bool]Root{}
		var size int64
		for _, second := range []bool{false, true} {
			old := size
			size = sizes[rng.IntN(len(sizes))]
			if second && rng.IntN(2) == 0 {
				size = old
			}
			chunks[second] = (size + ChunkSize - 1) / ChunkSize
			for c, id := range model[false] { // the second map begins as the first
				if second && c < chunks[true] {
					model[true][c] = id
				}
			}
			w, err := NewWriter(ctx, s.fetch, s.store, roots[false], old, size)
			if err != nil {
				t.Fatal(err)
			}
			for range rng.IntN(20) {
				first := rng.Int64N(chunks[second])
				n := min(1+rng.Int64N(400), chunks[second]-first)
				ids := make([]ID, n)
				for i := range ids {
					if ids[i] = chunk(rng.Uint64N(3)); ids[i] == (ID{}) {
						delete(model[second], first+int64(i))
					} else {
						model[second][first+int64(i)] = ids[i]
					}
				}
				if err := w.Set(ctx, first, ids); err != nil {
					t.Fatal(err)
				}
			}
			if roots[second], err = w.Finish(ctx); err != nil {
				t.Fatal(err)
			}
		}
		at := int64(0)
		same := func(to int64) {
			for ; at < to; at++ {
				if model[false][at] != model[true][at] {
					t.Fatalf("the difference at %d was not found", at)
				}
			}
		}
		err := Diff(ctx, s.fetch, roots[false], roots[true], chunks[true], func(from, to int64, zero bool) bool {
			if from < at || to <= from || to > chunks[true] {
				t.Fatalf("[%d, %d) after %d of %d", from, to, at, chunks[true])
			}
			same(from)
			for ; at < to; at++ {
				if (model[true][at] == ID{}) != zero {
					t.Fatalf("at %d: zero is %v", at, zero)
				}
				if !zero && model[false][at] == model[true][at] {
					t.Fatalf("found %d, which is the same", at)
				}
			}
			return true
		})
		if err != nil {
			t.Fatal(err)
		}
		same(chunks[true])
	}
}

// Of two maps of 64 TiB that differ in one chunk only its path is fetched, and
// nothing after found has said no.
func TestDiffFetchesLittle(t *testing.T) {
	ctx := context.Background()
	s := &nodes{m: map[ID][]byte{}}
	const size = 64 << 40
	var root [2]Root
	for i := range root {
		w, err := NewWriter(ctx, s.fetch, s.store, root[0], size*int64(i), size)
		if err != nil {
			t.Fatal(err)
		}
		for c := int64(0); c < size/ChunkSize; c += size / ChunkSize / 50 {
			if i == 0 || c == size/ChunkSize/50*20 {
				if err := w.Set(ctx, c, []ID{chunk(uint64(i + 1))}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if root[i], err = w.Finish(ctx); err != nil {
			t.Fatal(err)
		}
	}
	fetched := make(chan ID, 1000)
	fetch := func(ctx context.Context, id ID, level int) (*Node, error) {
		fetched <- id
		return s.fetch(ctx, id, level)
	}
	found := 0
	err := Diff(ctx, fetch, root[0], root[1], size/ChunkSize, func(from, to int64, zero bool) bool {
		found++
		if to != from+1 || zero {
			t.Error(from, to, zero)
		}
		return false
	})
	if err != nil || found != 1 || len(fetched) != 2*root[0].Levels {
		t.Errorf("%d found, %d nodes fetched of maps of %d levels, %v", found, len(fetched), root[0].Levels, err)
	}
	if err := Diff(ctx, fetch, root[0], root[0], size/ChunkSize, func(int64, int64, bool) bool { t.Error("found"); return true }); err != nil || len(fetched) != 2*root[0].Levels {
		t.Error(err)
	}
}
