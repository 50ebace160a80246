package vhdx

import (
	"context"
	"slices"
	"sort"

	"holdfast/internal/disk"
)

// replayed is a file with its log replayed: a disk.Reader. The bytes of
// changes stay in the log and are read from there.
type replayed struct {
	file    disk.Reader
	ring    *ring
	size    int64    // with what the log lets the file grow
	changes []change // disjoint, in ascending order
	entries int      // of the log that were replayed
}

// settle makes changes, the oldest first, disjoint and puts them into the
// order of the file: the newest one counts.
func settle(changes []change) []change {
	var edges []int64
	for _, c := range changes {
		edges = append(edges, c.off, c.end)
	}
	slices.Sort(edges)
	edges = slices.Compact(edges)
	// Piece i is from edge i to the next. The newest change paints first, and
	// next leads from a painted piece towards one that is not.
	paint, next := make([]int, len(edges)), make([]int, len(edges))
	for i := range next {
		next[i] = i
		paint[i] = -1
	}
	free := func(i int) int {
		for next[i] != i {
			next[i] = next[next[i]]
			i = next[i]
		}
		return i
	}
	for k := len(changes) - 1; k >= 0; k-- {
		first, _ := slices.BinarySearch(edges, changes[k].off)
		for i := free(first); edges[i] < changes[k].end; i = free(i) {
			paint[i] = k
			next[i] = i + 1
		}
	}
	var list []change
	for i, k := range paint {
		if k >= 0 {
			c := changes[k]
			c.off, c.end = edges[i], edges[i+1]
			list = append(list, c)
		}
	}
	return list
}

// piece is a stretch of the file that is changed as a whole, or not at all.
type piece struct {
	off, n int64
	change *change // nil for the file's own bytes
}

// pieces calls do for the stretches of [off, off+n) while it returns true.
func (r *replayed) pieces(off, n int64, do func(piece) bool) {
	i := sort.Search(len(r.changes), func(i int) bool { return r.changes[i].end > off })
	for end := off + n; off < end; {
		p := piece{off: off, n: end - off}
		if i < len(r.changes) {
			if c := &r.changes[i]; c.off <= off {
				p.change = c
				p.n = min(p.n, c.end-off)
				i++
			} else {
				p.n = min(p.n, c.off-off)
			}
		}
		if !do(p) {
			return
		}
		off += p.n
	}
}

func (r *replayed) Size() int64  { return r.size }
func (r *replayed) Close() error { return r.file.Close() }

func (r *replayed) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := disk.CheckRange(r.size, off, int64(len(p))); err != nil {
		return err
	}
	err := ctx.Err()
	r.pieces(off, int64(len(p)), func(x piece) bool {
		q := p[x.off-off : x.off-off+x.n]
		switch {
		case x.change == nil:
			n := max(0, min(x.n, r.file.Size()-x.off))
			clear(q[n:])
			if n > 0 {
				err = r.file.ReadAt(ctx, q[:n], x.off)
			}
		case x.change.data < 0:
			clear(q)
		default:
			err = r.sector(ctx, q, x.change, x.off-x.change.off)
		}
		return err == nil
	})
	return err
}

// sector fills p from offset in on of the sector that a change writes.
func (r *replayed) sector(ctx context.Context, p []byte, c *change, in int64) error {
	var s [logSector]byte
	if err := r.ring.read(ctx, s[:], c.data); err != nil {
		return err
	}
	copy(s[:], c.lead[:])
	copy(s[logSector-4:], c.trail[:])
	copy(p, s[in:])
	return nil
}

func (r *replayed) Extents(ctx context.Context, off, n int64) disk.Extents {
	if err := disk.CheckRange(r.size, off, n); err != nil {
		return disk.Fail(err)
	}
	return disk.Merge(func(yield func(disk.Extent, error) bool) {
		r.pieces(off, n, func(x piece) bool {
			if x.change != nil {
				return yield(disk.Extent{Off: x.off, Len: x.n, Zero: x.change.data < 0}, nil)
			}
			inside := max(0, min(x.n, r.file.Size()-x.off))
			if inside > 0 {
				for e, err := range r.file.Extents(ctx, x.off, inside) {
					if !yield(e, err) || err != nil {
						return false
					}
				}
			}
			return inside == x.n || yield(disk.Extent{Off: x.off + inside, Len: x.n - inside, Zero: true}, nil)
		})
	})
}
