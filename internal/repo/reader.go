package repo

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/disk"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/tree"
)

const (
	// cachedRead is the longest read that goes through the chunk cache, bytes:
	// a guest's reads do, a copy's would only flush it.
	cachedRead = 4 * ChunkSize
	// maxFetch bounds one request to the store, bytes.
	maxFetch = 4 << 20
)

// DiskReader is a restore point's disk, read-only. It implements disk.Reader
// and is safe in parallel.
type DiskReader struct {
	r    *Repo
	root tree.Root
	size int64
}

// OpenDisk opens a restore point's disk. It reads the map's top node, so that
// a map that is gone is found at once.
func (r *Repo) OpenDisk(ctx context.Context, d Disk) (*DiskReader, error) {
	if d.Size < 0 {
		return nil, fmt.Errorf("disk %s: %w: size %d", d.ID, ErrDamaged, d.Size)
	}
	root, err := tree.ParseRoot(string(d.Root), d.Size)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w: %w", d.ID, ErrDamaged, err)
	}
	if root.ID != (tree.ID{}) {
		if _, err := r.node(ctx, root.ID, root.Levels-1); err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.ID, err)
		}
	}
	return &DiskReader{r, root, d.Size}, nil
}

// Size is the disk's length in bytes.
func (d *DiskReader) Size() int64 { return d.size }

// Close has nothing to release.
func (d *DiskReader) Close() error { return nil }

// chunkRange gives the chunks that [off, off+n) touches.
func chunkRange(off, n int64) (first, count int64) {
	first = off / ChunkSize
	return first, (off+n+ChunkSize-1)/ChunkSize - first
}

// ReadAt fills p with the bytes at off.
func (d *DiskReader) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := disk.CheckRange(d.size, off, int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		n := min(len(p), maxFetch)
		if err := d.read(ctx, p[:n], off); err != nil {
			return fmt.Errorf("read [%d, +%d): %w", off, n, err)
		}
		p, off = p[n:], off+int64(n)
	}
	return ctx.Err()
}

func (d *DiskReader) read(ctx context.Context, p []byte, off int64) error {
	first, count := chunkRange(off, int64(len(p)))
	ids := make([]pack.ID, count)
	if err := tree.Lookup(ctx, d.r.node, d.root, first, ids); err != nil {
		return err
	}
	if len(p) <= cachedRead {
		return d.readCached(ctx, p, off, first, ids)
	}
	return d.readMany(ctx, p, off, first, ids)
}

// part gives the piece of p, which lies at off, that chunk i fills, and where
// in the chunk that piece starts.
func part(p []byte, off, i int64) (piece []byte, from int) {
	start := i*ChunkSize - off // in p; negative when the chunk starts before it
	from = int(max(0, -start))
	return p[max(0, start):min(int64(len(p)), start+ChunkSize)], from
}

// readCached reads chunk by chunk through the cache, side by side those that
// are not in it: of a store far away each costs the same time.
func (d *DiskReader) readCached(ctx context.Context, p []byte, off, first int64, ids []pack.ID) error {
	if len(ids) == 1 && ids[0] != (pack.ID{}) {
		piece, from := part(p, off, first)
		return d.readChunk(ctx, piece, from, ids[0])
	}
	g, gctx := errgroup.WithContext(ctx)
	for k, id := range ids {
		piece, from := part(p, off, first+int64(k))
		switch {
		case id == (pack.ID{}):
			clear(piece)
		case !d.r.chunks.peek(id, piece, from):
			g.Go(func() error { return d.readChunk(gctx, piece, from, id) })
		}
	}
	return g.Wait()
}

// readChunk reads a piece of a chunk through the cache.
func (d *DiskReader) readChunk(ctx context.Context, piece []byte, from int, id pack.ID) error {
	return d.r.chunks.read(ctx, id, piece, from, func(buf []byte) error {
		content, err := d.chunk(ctx, buf[:0], id)
		if err == nil && &content[0] != &buf[0] {
			copy(buf, content)
		}
		return err
	})
}

// ReadCached fills p with the bytes at off if they, and the map's nodes for them,
// are in memory.
func (d *DiskReader) ReadCached(p []byte, off int64) bool {
	if disk.CheckRange(d.size, off, int64(len(p))) != nil || len(p) > ChunkSize {
		return false
	}
	first, count := chunkRange(off, int64(len(p)))
	var ids [2]pack.ID
	if tree.Lookup(context.Background(), d.r.cachedNode, d.root, first, ids[:count]) != nil {
		return false
	}
	for k, id := range ids[:count] {
		piece, from := part(p, off, first+int64(k))
		if id == (pack.ID{}) {
			clear(piece)
		} else if !d.r.chunks.peek(id, piece, from) {
			return false
		}
	}
	return true
}

// chunk reads one whole chunk.
func (d *DiskReader) chunk(ctx context.Context, dst []byte, id pack.ID) ([]byte, error) {
	n := len(dst)
	dst, err := d.r.item(ctx, dst, id, ChunkSize)
	if err == nil && len(dst)-n != ChunkSize {
		err = fmt.Errorf("%w: chunk %x has %d bytes", ErrDamaged, id[:8], len(dst)-n)
	}
	return dst, err
}

// Extents covers [off, off+n): zero where the map has nothing.
func (d *DiskReader) Extents(ctx context.Context, off, n int64) disk.Extents {
	return func(yield func(disk.Extent, error) bool) {
		if err := disk.CheckRange(d.size, off, n); err != nil {
			yield(disk.Extent{}, err)
			return
		}
		first, count := chunkRange(off, n)
		var data disk.Extent // the last one found, not yet yielded since it may grow
		at, end := off, off+n
		flush := func() bool {
			if data.Len == 0 {
				return true
			}
			gap := disk.Extent{Off: at, Len: data.Off - at, Zero: true}
			at = data.End()
			return (gap.Len == 0 || yield(gap, nil)) && yield(data, nil)
		}
		stopped := false
		fetch := d.r.node
		if n >= aheadBytes {
			fetch = d.r.nodeAhead
		}
		err := tree.Present(ctx, fetch, d.root, first, first+count, func(from, to int64) bool {
			a, b := max(off, from*ChunkSize), min(end, to*ChunkSize)
			if data.Len > 0 && data.End() == a {
				data.Len += b - a
				return true
			}
			stopped = !flush()
			data = disk.Extent{Off: a, Len: b - a}
			return !stopped
		})
		switch {
		case stopped:
		case err != nil:
			yield(disk.Extent{}, err)
		case flush() && at < end:
			yield(disk.Extent{Off: at, Len: end - at, Zero: true}, nil)
		}
	}
}

// Matches reports whether p, at off, is what the disk holds, by comparing
// chunk ids: nothing but the map is fetched. off is a multiple of ChunkSize,
// and so is len(p) but at the disk's end.
func (d *DiskReader) Matches(ctx context.Context, p []byte, off int64) (bool, error) {
	return matches(ctx, d.r, d.r.node, d.root, d.size, p, off)
}

func matches(ctx context.Context, r *Repo, fetch tree.Fetch, root tree.Root, size int64, p []byte, off int64) (bool, error) {
	if err := checkAligned(size, off, int64(len(p))); err != nil {
		return false, err
	}
	first, count := chunkRange(off, int64(len(p)))
	ids := make([]pack.ID, count)
	if err := tree.Lookup(ctx, fetch, root, first, ids); err != nil {
		return false, err
	}
	for k, id := range ids {
		if r.contentID(p[k*ChunkSize:min(len(p), (k+1)*ChunkSize)]) != id {
			return false, nil
		}
	}
	return true, nil
}

// Missing yields extents whose chunks have no good copy in the repository any
// more: they must be read and stored again. Without known damage it yields
// nothing at once.
func (d *DiskReader) Missing(ctx context.Context) disk.Extents {
	return func(yield func(disk.Extent, error) bool) {
		if s := d.r.current(); len(s.Bad) == 0 && len(s.Damage()) == 0 && s.Mended == 0 {
			return
		}
		stopped := false
		err := tree.Walk(ctx, d.r.node, d.root, func(tree.ID) bool { return !stopped }, func(n *tree.Node, first int64) error {
			for i, id := range n.Children {
				if id == (pack.ID{}) || stopped {
					continue
				}
				if ok, err := d.r.present(id); err != nil {
					return err
				} else if !ok {
					off := (first + int64(i)) * ChunkSize
					stopped = !yield(disk.Extent{Off: off, Len: min(ChunkSize, d.size-off)}, nil)
				}
			}
			return nil
		})
		if err != nil && !stopped {
			yield(disk.Extent{}, err)
		}
	}
}

// contentID is the id of a chunk, which may be the disk's short last one; the
// zero id for zeros.
func (r *Repo) contentID(p []byte) pack.ID {
	if disk.IsZero(p) {
		return pack.ID{}
	}
	if len(p) < ChunkSize {
		p = append(make([]byte, 0, ChunkSize), p...)[:ChunkSize]
	}
	return r.chunkID(p)
}

// checkAligned wants a range of whole chunks, the disk's last one excepted.
func checkAligned(size, off, n int64) error {
	if err := disk.CheckRange(size, off, n); err != nil {
		return err
	}
	if off%ChunkSize != 0 || n%ChunkSize != 0 && off+n != size {
		return fmt.Errorf("range [%d, +%d) does not fall on chunks", off, n)
	}
	return nil
}
