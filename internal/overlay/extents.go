package overlay

import (
	"context"
	"iter"

	"holdfast/internal/disk"
)

// Mark is a point in the order of an overlay's writes, for Changed.
type Mark uint64

// Mark returns the present point. A write that returned before is before it;
// one that starts afterwards is after it; one in flight may be either, but what
// a reader that starts now does not see of it is after.
func (o *Overlay) Mark() Mark {
	o.mu.Lock()
	defer o.mu.Unlock()
	m := o.mark
	o.mark++
	return Mark(o.opening)<<32 | Mark(m)
}

// Changed lists what was written or zeroed after the mark, at a granularity
// of clusters (64 KiB), and never more than was written ever. Marks do not
// outlast the opening they were made in: with one from an earlier one, or with
// 0, all is listed that the overlay holds.
func (o *Overlay) Changed(since Mark) disk.Extents {
	from := all
	if uint32(since>>32) == o.opening && since != 0 {
		from = int64(uint32(since))
	}
	return disk.Merge(func(yield func(disk.Extent, error) bool) {
		for s := range o.segments(0, o.size, from) {
			if s.state != absent && !yield(disk.Extent{Off: s.off, Len: s.end - s.off, Zero: s.state == zero}, nil) {
				return
			}
		}
	})
}

// Extents knows the zeros of the overlay, and asks the base where the overlay
// holds nothing.
func (o *Overlay) Extents(ctx context.Context, off, n int64) disk.Extents {
	if err := o.check(ctx, off, n); err != nil {
		return disk.Fail(err)
	}
	return disk.Merge(func(yield func(disk.Extent, error) bool) {
		for s := range o.segments(off, off+n, all) {
			if s.state != absent {
				if !yield(disk.Extent{Off: s.off, Len: s.end - s.off, Zero: s.state == zero}, nil) {
					return
				}
				continue
			}
			for e, err := range o.base.Extents(ctx, s.off, s.end-s.off) {
				if !yield(e, err) || err != nil {
					return
				}
			}
		}
	})
}

// segments yields the segments of [off, end), each as of some moment between
// the call and its turn; long ones may come in parts. See blockMap.segments
// for since.
func (o *Overlay) segments(off, end, since int64) iter.Seq[segment] {
	return func(yield func(segment) bool) {
		const some = 512 // taken at once, so that the lock is held briefly
		var list []segment
		for off < end {
			o.mu.RLock()
			list = o.m.segments(list[:0], off, end, since, some)
			o.mu.RUnlock()
			for _, s := range list {
				if !yield(s) {
					return
				}
			}
			off = list[len(list)-1].end
		}
	}
}
