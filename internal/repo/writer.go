package repo

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"holdfast/internal/disk"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/tree"
)

// DiskWriter takes a disk's chunks and makes its new map. WriteAt and ZeroAt
// want off to be a multiple of ChunkSize, and the length too but at the disk's
// end. They may run in parallel; ascending order keeps packs in disk order.
// It implements disk.Writer.
type DiskWriter struct {
	run    *Run
	w      *tree.Writer
	base   *DiskReader // nil without one
	size   int64
	packer *packer
	new    atomic.Int64
	stored atomic.Int64
}

// Counts of a DiskWriter, in bytes.
type Counts struct {
	New    int64 // plain bytes of chunks that were new to the repository
	Stored int64 // bytes that those take in packs
}

// Disk starts a disk's new map. With base the new disk begins as a copy of
// it, cut or extended by zeros to size; with nil as zeros.
func (run *Run) Disk(ctx context.Context, base *DiskReader, size int64) (*DiskWriter, error) {
	k := &packer{run: run, kind: pack.Chunks, target: chunkPackBytes}
	run.mu.Lock()
	run.disks = append(run.disks, k)
	run.mu.Unlock()
	return run.disk(ctx, base, size, k)
}

func (run *Run) disk(ctx context.Context, base *DiskReader, size int64, k *packer) (*DiskWriter, error) {
	var root tree.Root
	var old int64
	if base != nil {
		root, old = base.root, base.size
		run.mu.Lock()
		run.bases = append(run.bases, Root(root.String()))
		run.mu.Unlock()
	}
	w, err := tree.NewWriter(ctx, run.fetchNode, run.storeNode, root, old, size)
	if err != nil {
		return nil, err
	}
	d := &DiskWriter{run: run, w: w, base: base, size: size, packer: k}
	if tail := size % ChunkSize; base != nil && old > size && tail != 0 {
		// What the old disk had behind the new end must not stay in the padding.
		p := make([]byte, tail)
		if err := base.ReadAt(ctx, p, size-tail); err != nil {
			return nil, err
		}
		return d, d.WriteAt(ctx, p, size-tail)
	}
	return d, nil
}

var encodeBuffers = sync.Pool{New: func() any { return new([]byte) }}

// WriteAt stores the chunks of p that the repository does not have.
func (w *DiskWriter) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := checkAligned(w.size, off, int64(len(p))); err != nil {
		return err
	}
	first, count := chunkRange(off, int64(len(p)))
	ids := make([]pack.ID, count)
	buf := encodeBuffers.Get().(*[]byte)
	defer encodeBuffers.Put(buf)
	for k := range ids {
		c := p[k*ChunkSize : min(len(p), (k+1)*ChunkSize)]
		if disk.IsZero(c) {
			continue
		}
		if len(c) < ChunkSize {
			c = append(make([]byte, 0, ChunkSize), c...)[:ChunkSize]
		}
		ids[k] = w.run.r.chunkID(c)
		if err := w.put(ctx, ids[k], first+int64(k), c, buf); err != nil {
			return fmt.Errorf("store the chunk at %d: %w", off+int64(k*ChunkSize), err)
		}
	}
	w.warm(ctx, first, count)
	if err := w.w.Set(ctx, first, ids); err != nil {
		return err
	}
	return w.run.announceSome(ctx)
}

// warm brings the base's nodes there into the cache. The map's writer fetches
// one after another, under its lock; writers in parallel do this side by side.
// What fails here fails again there.
func (w *DiskWriter) warm(ctx context.Context, first, count int64) {
	if w.base != nil && (first+count)*ChunkSize <= w.base.size {
		_ = tree.Lookup(ctx, w.run.fetchNode, w.base.root, first, make([]pack.ID, count))
	}
}

// put packs a chunk unless it is there.
func (w *DiskWriter) put(ctx context.Context, id pack.ID, at int64, c []byte, buf *[]byte) error {
	mine, err := w.run.claim(id, nil)
	if err != nil || !mine {
		return err
	}
	*buf = w.run.r.compressor.Encode((*buf)[:0], c)
	w.new.Add(int64(len(c)))
	w.stored.Add(int64(len(*buf) + pack.Overhead))
	w.run.mu.Lock()
	w.run.newPlain += int64(len(c))
	w.run.mu.Unlock()
	return w.packer.add(ctx, id, at, len(c), *buf)
}

// ZeroAt makes the range zeros, at the cost of the map's touched nodes.
func (w *DiskWriter) ZeroAt(ctx context.Context, off, n int64) error {
	if err := checkAligned(w.size, off, n); err != nil {
		return err
	}
	first, count := chunkRange(off, n)
	return w.w.Zero(ctx, first, count)
}

// Flush does nothing: what a run writes becomes durable as a whole, by
// Run.Flush and Run.Commit.
func (w *DiskWriter) Flush(ctx context.Context) error { return w.run.failed() }

// Counts tells what was written so far.
func (w *DiskWriter) Counts() Counts { return Counts{w.new.Load(), w.stored.Load()} }

// Finish stores the map and gives its root. Nothing may be written after.
func (w *DiskWriter) Finish(ctx context.Context) (Root, error) {
	if err := w.packer.flush(ctx); err != nil {
		return "", err
	}
	root, err := w.w.Finish(ctx)
	if err == nil && w.base != nil {
		w.run.mu.Lock()
		w.run.basis[Root(root.String())] = w.base.root
		w.run.mu.Unlock()
	}
	return Root(root.String()), err
}
