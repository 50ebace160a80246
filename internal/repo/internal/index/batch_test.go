package index

import (
	"bytes"
	"cmp"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"testing"

	"holdfast/internal/repo/internal/pack"
)

// A batch, sorted in memory or in files, gives the index that one object after
// the other gives, and looking many ids up at once what each alone does.
func TestBatch(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for _, limit := range []int{3 * itemLen, blockBytes} {
		rng := rand.New(rand.NewPCG(seed, uint64(limit)))
		one, err := Open(t.TempDir(), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer one.Close()
		dir := t.TempDir()
		many, err := Open(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer many.Close()
		known := []pack.ID{{}, pack.ID(bytes.Repeat([]byte{255}, 32))}
		for range 3 {
			b := many.NewBatch()
			b.block = limit
			for range 8 {
				src, packs, ids := object(rng, known)
				for range 200 { // one id on several pages
					packs[0].Items = append(packs[0].Items, Item{known[0], 99})
				}
				if err := one.Add(src, packs); err != nil {
					t.Fatal(err)
				}
				if err := b.Add(src, packs); err != nil {
					t.Fatal(err)
				}
				known = append(known, ids...)
			}
			if err := b.Finish(); err != nil {
				t.Fatal(err)
			}
		}
		for range 50 { // ids that are nowhere
			var id pack.ID
			fill(rng, id[:])
			known = append(known, id)
		}
		if left, _ := filepath.Glob(filepath.Join(dir, "new-*")); len(left) > 0 || one.Items() != many.Items() {
			t.Errorf("limit %d: files are left: %q; %d items, want %d", limit, left, many.Items(), one.Items())
		}
		slices.SortFunc(known, func(a, b pack.ID) int { return bytes.Compare(a[:], b[:]) })
		for _, ids := range [][]pack.ID{known, slices.Compact(slices.Clone(known)), known[len(known)-3:]} {
			i := 0
			err = many.LookupAll(slices.Values(ids), func(places []Place) error {
				for _, x := range []*Index{one, many} {
					if i%7 > 0 && len(ids) > 3 {
						continue
					}
					want, err := x.Lookup(ids[i], nil)
					if err != nil || !slices.Equal(inOrder(places), inOrder(want)) {
						t.Fatalf("limit %d: %x: %v, want %v, %v", limit, ids[i][:4], places, want, err)
					}
				}
				i++
				return nil
			})
			if err != nil || i != len(ids) {
				t.Errorf("limit %d: %d of %d ids, %v", limit, i, len(ids), err)
			}
		}
		if got, err := many.Lookup(known[0], nil); err != nil || len(got) == 0 {
			t.Errorf("after a release: %v, %v", got, err)
		}
	}
}

func inOrder(p []Place) []Place {
	return slices.SortedFunc(slices.Values(p), func(a, b Place) int {
		return cmp.Or(bytes.Compare(a.Pack[:], b.Pack[:]), cmp.Compare(a.Number, b.Number))
	})
}
