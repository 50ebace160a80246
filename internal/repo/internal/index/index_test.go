package index

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"holdfast/internal/repo/internal/pack"
)

func object(rng *rand.Rand, known []pack.ID) (src [32]byte, packs []Pack, ids []pack.ID) {
	fill(rng, src[:])
	for range 1 + rng.IntN(3) {
		k := Pack{Size: 1 << 30, Kind: 1}
		fill(rng, k.Name[:])
		for range 1 + rng.IntN(400) {
			var id pack.ID
			fill(rng, id[:])
			if len(known) > 0 && rng.IntN(10) == 0 {
				id = known[rng.IntN(len(known))]
			}
			k.Items = append(k.Items, Item{id, 20 + rng.Uint32N(1000)})
			ids = append(ids, id)
		}
		packs = append(packs, k)
	}
	return src, packs, ids
}

func fill(rng *rand.Rand, p []byte) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], rng.Uint64())
	}
}

// Many index objects, with ids that lie in several, against a map; also after
// a reopen, and after some objects are no longer live.
func TestModel(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	dir := t.TempDir()
	all := func([32]byte) bool { return true }
	x, err := Open(dir, all)
	if err != nil {
		t.Fatal(err)
	}
	model := map[pack.ID]map[Place]bool{}
	var known []pack.ID
	var sources [][32]byte
	bySource := map[[32]byte][]Pack{}
	put := func(packs []Pack) {
		for _, k := range packs {
			off := uint32(64)
			for j, it := range k.Items {
				if model[it.ID] == nil {
					model[it.ID] = map[Place]bool{}
				}
				model[it.ID][Place{k.Name, uint32(j), off, it.Stored}] = true
				off += it.Stored
			}
		}
	}
	verify := func(x *Index) {
		t.Helper()
		for id, want := range model {
			got, err := x.Lookup(id, nil)
			if err != nil || len(got) != len(want) {
				t.Fatalf("%d places, want %d; %v", len(got), len(want), err)
			}
			for _, p := range got {
				if !want[p] {
					t.Fatalf("place %+v is wrong", p)
				}
			}
		}
		for range 200 {
			var id pack.ID
			fill(rng, id[:])
			if got, err := x.Lookup(id, nil); err != nil || len(got) > 0 {
				t.Fatalf("an unknown id lies at %v; %v", got, err)
			}
		}
	}
	for range 60 {
		src, packs, ids := object(rng, known)
		back := make([]Pack, len(packs))
		for i, k := range packs {
			back[i] = Pack{Name: k.Name, Size: k.Size, Kind: k.Kind}
		}
		if err := unmarshal(marshal(packs), back); err != nil {
			t.Fatal(err)
		}
		if err := x.Add(src, back); err != nil {
			t.Fatal(err)
		}
		put(packs)
		known, sources, bySource[src] = append(known, ids...), append(sources, src), packs
	}
	verify(x)
	if len(x.segments) > 12 {
		t.Errorf("%d segments for %d items", len(x.segments), x.Items())
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}
	if x, err = Open(dir, all); err != nil {
		t.Fatal(err)
	}
	verify(x)
	for _, s := range sources {
		if !x.Has(s) {
			t.Fatal("a source was forgotten")
		}
	}
	x.Close()

	dead := sources[7]
	if x, err = Open(dir, func(s [32]byte) bool { return s != dead }); err != nil {
		t.Fatal(err)
	}
	clear(model)
	for _, s := range sources {
		if s == dead {
			continue
		}
		put(bySource[s])
		if !x.Has(s) {
			if err := x.Add(s, bySource[s]); err != nil {
				t.Fatal(err)
			}
		}
	}
	verify(x)
	x.Close()
}

// Damage in the cache is found: at Open or when a lookup touches it.
func TestDamage(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	dir := t.TempDir()
	all := func([32]byte) bool { return true }
	x, _ := Open(dir, all)
	src, packs, ids := object(rng, nil)
	if err := x.Add(src, packs); err != nil {
		t.Fatal(err)
	}
	x.Close()
	names, _ := filepath.Glob(filepath.Join(dir, "*.segment"))
	good, err := os.ReadFile(names[0])
	if err != nil {
		t.Fatal(err)
	}
	for range 300 {
		bad := bytes.Clone(good)
		at := rng.IntN(len(bad))
		bad[at] ^= 1 << rng.IntN(8)
		if err := os.WriteFile(names[0], bad, 0o600); err != nil {
			t.Fatal(err)
		}
		x, err := Open(dir, all)
		if err != nil {
			t.Fatal(err)
		}
		if !x.Has(src) { // found at Open, and deleted
			x.Close()
			continue
		}
		for _, id := range ids {
			p, err := x.Lookup(id, nil)
			if err == nil && len(p) == 0 || err != nil && !errors.Is(err, ErrCache) {
				// A miss costs a chunk stored twice, never data; but a page's
				// checksum covers its ids, so it must not happen unnoticed
				// other than by a damaged first id, which only leads astray.
				if at/pageLen == 0 || at%pageLen < 4 || at%pageLen >= 36 {
					t.Fatalf("byte %d: lookup gives %v, %v", at, p, err)
				}
			}
		}
		x.Close()
	}
}

func FuzzUnmarshal(f *testing.F) {
	rng := rand.New(rand.NewPCG(1, 2))
	_, packs, _ := object(rng, nil)
	f.Add(marshal(packs), len(packs))
	f.Fuzz(func(t *testing.T, p []byte, n int) {
		packs := make([]Pack, max(0, min(n, 100)))
		for i := range packs {
			packs[i].Size = 1 << 24
		}
		if unmarshal(p, packs) == nil && !bytes.Equal(marshal(packs), p) {
			t.Error("read, but not its own form")
		}
	})
}
