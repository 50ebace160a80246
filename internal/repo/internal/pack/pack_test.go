package pack

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"holdfast/internal/repo/internal/codec"
	"holdfast/internal/repo/internal/seal"
)

func build(n int) (p []byte, h seal.Header, key *seal.Key, items []Item, contents [][]byte) {
	rng := rand.New(rand.NewPCG(1, 2))
	h, key = seal.NewHeader(seal.Pack, Chunks, 1, [16]byte{5}), &seal.Key{9}
	for i := range n {
		c := bytes.Repeat([]byte{byte(i), byte(rng.Uint32())}, 1+rng.IntN(3000))
		items = append(items, Item{ID: ID{byte(i), 1}, Plain: len(c), Data: codec.Small.Encode(nil, c)})
		contents = append(contents, c)
	}
	p, _ = Build(nil, h, key, items)
	return p, h, key, items, contents
}

func TestRoundTrip(t *testing.T) {
	for _, n := range []int{0, 1, 100} {
		p, h, key, items, contents := build(n)
		entries, err := Directory(p, h, key)
		if err != nil || len(entries) != n {
			t.Fatalf("%d entries, %v", len(entries), err)
		}
		o := NewOpener(p, h, key)
		for i, e := range entries {
			sealed := bytes.Clone(p[e.Offset : e.Offset+e.Stored])
			got, err := o.Open(nil, sealed, i, items[i].ID, MaxContent)
			if err != nil || !bytes.Equal(got, contents[i]) || int(e.Plain) != len(got) || e.ID != items[i].ID {
				t.Fatalf("item %d: %v", i, err)
			}
			if _, err := o.Open(nil, bytes.Clone(p[e.Offset:e.Offset+e.Stored]), i, items[i].ID, len(got)-1); err == nil {
				t.Fatal("an item longer than allowed is opened")
			}
		}
	}
}

// An item opens only as what it is, in its own place and pack, unchanged.
func TestBound(t *testing.T) {
	p, h, key, items, _ := build(4)
	entries, _ := Directory(p, h, key)
	o := NewOpener(p, h, key)
	e := entries[1]
	sealed := func() []byte { return bytes.Clone(p[e.Offset : e.Offset+e.Stored]) }
	if _, err := o.Open(nil, sealed(), 2, items[1].ID, MaxContent); err == nil {
		t.Error("opens in another place")
	}
	if _, err := o.Open(nil, sealed(), 1, items[2].ID, MaxContent); err == nil {
		t.Error("opens as another chunk")
	}
	other := h
	other.Kind = Nodes
	if _, err := NewOpener(other.Append(nil), other, key).Open(nil, sealed(), 1, items[1].ID, MaxContent); err == nil {
		t.Error("opens as another kind")
	}
	for i := range len(sealed()) * 8 {
		q := sealed()
		q[i/8] ^= 1 << (i % 8)
		if _, err := o.Open(nil, q, 1, items[1].ID, MaxContent); err == nil {
			t.Fatalf("bit %d gets through", i)
		}
	}
}

func FuzzDirectory(f *testing.F) {
	p, h, key, _, _ := build(3)
	f.Add(p)
	f.Add(p[:len(p)-1])
	f.Fuzz(func(t *testing.T, q []byte) {
		entries, err := Directory(q, h, key)
		if err != nil {
			return
		}
		for _, e := range entries {
			_ = q[e.Offset : e.Offset+e.Stored]
		}
	})
}
