package repo

import (
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
)

// lossy stores one bit of the first pack otherwise than it was told to.
type lossy struct {
	*blob.Mem
	done atomic.Bool
}

func (l *lossy) Put(ctx context.Context, name string, data []byte) error {
	if strings.HasPrefix(name, "packs/") && !l.done.Swap(true) {
		data = append([]byte(nil), data...)
		data[len(data)/3] ^= 4
	}
	return l.Mem.Put(ctx, name, data)
}

// A run that reads back finds what a store has not kept, before it counts.
func TestReadBack(t *testing.T) {
	mem := new(blob.Mem)
	create(t, mem)
	content := image(rng(t), 20*ChunkSize)
	for _, back := range []ReadBack{ReadNothing, ReadAll} {
		store := &lossy{Mem: mem.Clone()}
		r := reopen(t, store)
		run, err := r.Begin(ctx, RandomID())
		if err != nil {
			t.Fatal(err)
		}
		run.ReadBack(back)
		p, err := saveIn(run, "web", content, nil, nil)
		if err := run.Close(); err != nil {
			t.Fatal(err)
		}
		if back == ReadNothing {
			if err != nil || differs(r, p, content) == nil {
				t.Fatal("the damage does not show", err)
			}
			continue
		}
		if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "does not give back") {
			t.Fatalf("committed all the same: %v", err)
		}
		clean(t, reopen(t, store.Mem), true)
		if p, err = save(r, "web", content, nil, nil); err != nil {
			t.Fatal(err)
		}
		equal(t, reopen(t, store.Mem), p, content)
		clean(t, reopen(t, store.Mem), true)
	}
}

// A sample finds a pack that is cut short, or not there, and takes a good one.
func TestReadBackSample(t *testing.T) {
	mem := new(blob.Mem)
	r := create(t, mem)
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	run.ReadBack(ReadSample)
	content := image(rng(t), 40*ChunkSize)
	p, err := saveIn(run, "web", content, nil, nil)
	if err := errors.Join(err, run.Close()); err != nil {
		t.Fatal(err)
	}
	equal(t, r, p, content)
	for d := range r.current().Indexes {
		packs, err := r.readIndex(ctx, d)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range packs {
			if err := r.provePart(ctx, k); err != nil {
				t.Error(err)
			}
			mem.Damage(packName(k.Name), func(b []byte) []byte { return b[:len(b)-1] })
			if err := r.provePart(ctx, k); !errors.Is(err, ErrDamaged) {
				t.Errorf("cut short: %v", err)
			}
			mem.Damage(packName(k.Name), func(b []byte) []byte { return make([]byte, k.Size) })
			if err := r.provePart(ctx, k); !errors.Is(err, ErrDamaged) {
				t.Errorf("emptied: %v", err)
			}
		}
	}
}

// A point keeps its id in a copy; it is there once, and may come back.
func TestCommitCopy(t *testing.T) {
	mem := new(blob.Mem)
	r := create(t, mem)
	again := func(r *Repo, p Point) error {
		run, err := r.Begin(ctx, RandomID())
		if err != nil {
			t.Fatal(err)
		}
		return errors.Join(run.CommitCopy(ctx, &p), run.Close())
	}
	content := image(rng(t), 5*ChunkSize)
	p, err := save(r, "web", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	other, err := save(r, "db", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := again(r, *p); !errors.Is(err, ErrPointExists) {
		t.Errorf("there already: %v", err)
	}
	if err := again(r, Point{ID: "../x"}); err == nil {
		t.Error("took an id that is none")
	}
	if err := r.append(ctx, chain.Forget, chain.Clear{}, chain.Sealed{Points: []PointID{p.ID}}, func(*chain.State) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if gone, err := r.Forgotten(ctx); err != nil || len(gone) != 1 || !gone[p.ID] {
		t.Errorf("forgotten: %v, %v", gone, err)
	}
	if err := again(r, *p); err != nil {
		t.Fatal(err)
	}
	for _, r := range []*Repo{r, reopen(t, mem)} {
		points, err := r.Points(ctx)
		if err != nil || len(points) != 2 || points[0].ID != other.ID || points[1].ID != p.ID {
			t.Errorf("points: %v, %v", points, err)
		}
		if gone, err := r.Forgotten(ctx); err != nil || len(gone) != 0 {
			t.Errorf("forgotten: %v, %v", gone, err)
		}
		equal(t, r, p, content)
	}
}
