package tree

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"
)

// seed is HOLDFAST_SEED or the time; a failing test prints it.
func seed(t *testing.T) uint64 {
	s := uint64(time.Now().UnixNano())
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		s, _ = strconv.ParseUint(v, 10, 64)
	}
	t.Logf("HOLDFAST_SEED=%d", s)
	return s
}

// nodes keeps nodes by the hash of their bytes.
type nodes struct {
	mu sync.Mutex
	m  map[ID][]byte
}

func (s *nodes) store(_ context.Context, n *Node) (ID, error) {
	p := n.Marshal()
	id := ID(sha256.Sum256(p))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.m[id] = p
	return id, nil
}

func (s *nodes) fetch(_ context.Context, id ID, level int) (*Node, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Unmarshal(s.m[id], level)
}

func chunk(n uint64) (id ID) {
	binary.LittleEndian.PutUint64(id[:], n)
	return id
}

// A random history of sets, zeros, finishes and resizes against a map.
func TestModel(t *testing.T) {
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(seed(t), 1))
	sizes := []int64{1, ChunkSize, 255*ChunkSize + 7, 256 * ChunkSize, 257 * ChunkSize, 70000 * ChunkSize, 1 << 40, 64 << 40}
	for round := range 60 {
		s := &nodes{m: map[ID][]byte{}}
		size := sizes[rng.IntN(len(sizes))]
		chunks := (size + ChunkSize - 1) / ChunkSize
		model := map[int64]ID{}
		var root Root
		old := int64(0)
		for gen := range 4 {
			w, err := NewWriter(ctx, s.fetch, s.store, root, old, size)
			if err != nil {
				t.Fatal(err)
			}
			for range rng.IntN(120) {
				first := rng.Int64N(chunks)
				if rng.IntN(3) == 0 && len(model) > 0 {
					for first = range model { // near what is there
						break
					}
				}
				n := min(1+rng.Int64N(600), chunks-first)
				if rng.IntN(4) == 0 {
					n = min(1+rng.Int64N(chunks), chunks-first)
					if rng.IntN(2) == 0 {
						first = first >> 8 << 8
						n = min(n|0xffff, chunks-first)
					}
					if err := w.Zero(ctx, first, n); err != nil {
						t.Fatal(err)
					}
					for k := range model {
						if k >= first && k < first+n {
							delete(model, k)
						}
					}
					continue
				}
				ids := make([]ID, n)
				for i := range ids {
					delete(model, first+int64(i))
					if rng.IntN(5) > 0 {
						ids[i] = chunk(rng.Uint64() | 1)
						model[first+int64(i)] = ids[i]
					}
				}
				if err := w.Set(ctx, first, ids); err != nil {
					t.Fatal(err)
				}
			}
			if root, err = w.Finish(ctx); err != nil {
				t.Fatal(err)
			}
			compare(t, s, root, chunks, model, rng)
			if back, err := ParseRoot(root.String(), size); err != nil || back.ID != root.ID {
				t.Fatalf("root %s: %v, %v", root, back, err)
			}
			old = size
			if gen == 2 { // resize
				size = sizes[rng.IntN(len(sizes))]
				chunks = (size + ChunkSize - 1) / ChunkSize
				for k := range model {
					if k >= chunks {
						delete(model, k)
					}
				}
			}
		}
		_ = round
	}
}

func compare(t *testing.T, s *nodes, root Root, chunks int64, model map[int64]ID, rng *rand.Rand) {
	t.Helper()
	ctx := context.Background()
	got := map[int64]bool{}
	err := Present(ctx, s.fetch, root, 0, chunks, func(from, to int64) bool {
		for i := from; i < to; i++ {
			if got[i] {
				t.Fatalf("chunk %d twice", i)
			}
			got[i] = true
		}
		return true
	})
	if err != nil || len(got) != len(model) {
		t.Fatalf("%d chunks present, want %d; %v", len(got), len(model), err)
	}
	for k := range model {
		if !got[k] {
			t.Fatalf("chunk %d is not present", k)
		}
	}
	for range 50 {
		first := rng.Int64N(chunks)
		if len(model) > 0 && rng.IntN(2) == 0 {
			for first = range model {
				break
			}
		}
		ids := make([]ID, min(1+rng.Int64N(700), chunks-first))
		if err := Lookup(ctx, s.fetch, root, first, ids); err != nil {
			t.Fatal(err)
		}
		for i, id := range ids {
			if id != model[first+int64(i)] {
				t.Fatalf("chunk %d is %x, want %x", first+int64(i), id[:8], model[first+int64(i)])
			}
		}
	}
	// The map's form is unique: written in another order it is the same.
	w, err := NewWriter(ctx, s.fetch, s.store, Root{}, 0, int64(chunks)*ChunkSize)
	if err != nil {
		t.Fatal(err)
	}
	for k, id := range model {
		if err := w.Set(ctx, k, []ID{id}); err != nil {
			t.Fatal(err)
		}
	}
	again, err := w.Finish(ctx)
	if err != nil || again.ID != root.ID {
		t.Fatalf("root %s, written anew %s; %v", root, again, err)
	}
}

// One changed chunk of a large disk costs one node per level.
func TestTouched(t *testing.T) {
	ctx := context.Background()
	s := &nodes{m: map[ID][]byte{}}
	w, _ := NewWriter(ctx, s.fetch, s.store, Root{}, 0, 64<<40)
	for i := range int64(3000) {
		w.Set(ctx, i*100, []ID{chunk(uint64(i) + 1)})
	}
	root, err := w.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	before := len(s.m)
	w, _ = NewWriter(ctx, s.fetch, s.store, root, 64<<40, 64<<40)
	w.Set(ctx, 777, []ID{chunk(99999)})
	if _, err := w.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	if n := len(s.m) - before; n != 4 {
		t.Errorf("%d nodes were rewritten, want 4", n)
	}
}

func FuzzUnmarshal(f *testing.F) {
	n := &Node{Level: 1}
	n.Children[3] = chunk(7)
	f.Add(n.Marshal(), 1)
	f.Fuzz(func(t *testing.T, p []byte, level int) {
		n, err := Unmarshal(p, level)
		if err == nil && string(n.Marshal()) != string(p) {
			t.Errorf("%x is read but not its own form", p)
		}
	})
}
