package repo

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"

	"holdfast/internal/disk/disktest"
	"holdfast/internal/mover"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/tree"
)

// aged is a disk whose chunks are made from their number and version, so that
// none of it need be in memory. About half of a chunk can be compressed.
type aged struct {
	versions []uint64
	disk     Disk
}

func (a *aged) fill(p []byte, chunk int) {
	rng := rand.NewPCG(uint64(chunk), a.versions[chunk])
	for i := range ChunkSize / 2 / 8 {
		binary.LittleEndian.PutUint64(p[8*i:], rng.Uint64())
	}
	clear(p[ChunkSize/2:])
}

// save commits a point with the chunks that changed.
func (a *aged) save(t *testing.T, r *Repo, changed map[int]bool) {
	t.Helper()
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	var base *DiskReader
	if a.disk.Root != "" {
		if base, err = r.OpenDisk(ctx, a.disk); err != nil {
			t.Fatal(err)
		}
	}
	w, err := run.Disk(ctx, base, int64(len(a.versions))*ChunkSize)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, ChunkSize)
	for i := range a.versions {
		if changed == nil || changed[i] {
			a.fill(p, i)
			if err := w.WriteAt(ctx, p, int64(i)*ChunkSize); err != nil {
				t.Fatal(err)
			}
		}
	}
	root, err := w.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	a.disk = Disk{ID: "vda", Size: int64(len(a.versions)) * ChunkSize, Root: root}
	if err := run.Commit(ctx, &Point{VM: "vm", History: "aa", Disks: []Disk{a.disk}}); err != nil {
		t.Fatal(err)
	}
	if err := run.Close(); err != nil {
		t.Fatal(err)
	}
}

// WriteAt compares instead of writing.
func (a *aged) WriteAt(_ context.Context, p []byte, off int64) error {
	want := make([]byte, ChunkSize)
	for ; len(p) > 0; p, off = p[ChunkSize:], off+ChunkSize {
		if a.fill(want, int(off/ChunkSize)); !bytes.Equal(p[:ChunkSize], want) {
			return fmt.Errorf("the chunk at %d is another", off)
		}
	}
	return nil
}

func (a *aged) ZeroAt(context.Context, int64, int64) error { return nil }
func (a *aged) Flush(context.Context) error                { return nil }

// stored is how many bytes the disk's chunks take.
func (a *aged) stored(t *testing.T, r *Repo) (n int64) {
	t.Helper()
	root, err := tree.ParseRoot(string(a.disk.Root), a.disk.Size)
	if err != nil {
		t.Fatal(err)
	}
	ids := make([]pack.ID, len(a.versions))
	if err := tree.Lookup(ctx, r.node, root, 0, ids); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		places, err := r.places(id)
		if err != nil || len(places) == 0 {
			t.Fatal(places, err)
		}
		n += int64(places[0].Stored)
	}
	return n
}

// TestSpinning: a disk that was backed up once, and one that was backed up thirty
// times more with 1 to 3 % changed each time, come back from a spinning disk at
// a good part of its speed, by a machine that has nothing of them in memory.
func TestSpinning(t *testing.T) {
	rng := disktest.Rand(t)
	size, least := 16384, 0.5
	if testing.Short() { // with less in each pack that is sought
		size, least = 4096, 0.4
	}
	dir, err := blob.CreateDir(filepath.Join(t.TempDir(), "repo"))
	if err != nil {
		t.Fatal(err)
	}
	store := &blobtest.Spinning{Inner: dir}
	r := create(t, store)
	a := &aged{versions: make([]uint64, size)}
	a.save(t, r, nil)
	restore := func(what string, least float64) {
		t.Helper()
		r := reopen(t, store)
		stored := a.stored(t, r)
		r = reopen(t, store)
		store.Spent()
		d, err := r.OpenDisk(ctx, a.disk)
		if err != nil {
			t.Fatal(err)
		}
		c, err := mover.Copy(ctx, a, d, d.Extents(ctx, 0, d.Size()), mover.Options{Align: ChunkSize, Window: ReadWindow})
		if err != nil || c.Written != a.disk.Size {
			t.Fatalf("%d bytes, %v", c.Written, err)
		}
		spent := store.Spent()
		share := float64(store.Sequential(stored)) / float64(spent.Time)
		t.Logf("%s: %d MB stored; %d MB in %v with %d seeks: %.0f %%", what, stored/1e6, spent.Bytes/1e6, spent.Time.Round(time.Millisecond), spent.Seeks, 100*share)
		if share < least {
			t.Errorf("%s: at %.0f %% of the disk's speed, want %.0f %%", what, 100*share, 100*least)
		}
	}
	restore("fresh", 0.8)
	logAt := 0
	for gen := range 30 {
		changed := map[int]bool{}
		n := size/100 + rng.IntN(size/50)
		for i := range n {
			switch {
			case i < n/4: // a log
				logAt = (logAt + 1) % (size / 4)
				changed[logAt] = true
			case i < n*5/8: // a database
				changed[size/2+rng.IntN(size/8)] = true
			default:
				changed[rng.IntN(size)] = true
			}
		}
		for i := range changed {
			a.versions[i] = uint64(gen + 1)
		}
		a.save(t, r, changed)
	}
	restore("after thirty generations", least)
}
