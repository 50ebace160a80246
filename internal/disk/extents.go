package disk

import (
	"errors"
	"fmt"
)

// ErrOrder is yielded when extents come out of order, overlap or are empty.
var ErrOrder = errors.New("extents out of order")

// List yields the given extents. They are not checked.
func List(list ...Extent) Extents {
	return func(yield func(Extent, error) bool) {
		for _, e := range list {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// Fail yields nothing but the error.
func Fail(err error) Extents {
	return func(yield func(Extent, error) bool) { yield(Extent{}, err) }
}

// Collect gathers extents up to their end or first error. What came before an
// error is returned with it.
func Collect(ex Extents) ([]Extent, error) {
	var list []Extent
	for e, err := range ex {
		if err != nil {
			return list, err
		}
		list = append(list, e)
	}
	return list, nil
}

// DataBytes sums the lengths of the extents that are not known to be zero.
func DataBytes(ex Extents) (int64, error) {
	var sum int64
	for e, err := range ex {
		if err != nil {
			return sum, err
		}
		if !e.Zero {
			sum += e.Len
		}
	}
	return sum, nil
}

// Merge joins extents that touch and are of one kind. It yields ErrOrder when
// an extent is empty, or begins before the one before it ended.
func Merge(ex Extents) Extents {
	return func(yield func(Extent, error) bool) {
		var cur Extent
		var end int64
		for e, err := range ex {
			if err == nil {
				err = checkOrder(e, end)
			}
			if err != nil {
				if cur.Len == 0 || yield(cur, nil) {
					yield(Extent{}, err)
				}
				return
			}
			end = e.End()
			if cur.Len > 0 && cur.End() == e.Off && cur.Zero == e.Zero {
				cur.Len += e.Len
				continue
			}
			if cur.Len > 0 && !yield(cur, nil) {
				return
			}
			cur = e
		}
		if cur.Len > 0 {
			yield(cur, nil)
		}
	}
}

// Clip yields what of the extents lies inside [off, off+n).
func Clip(ex Extents, off, n int64) Extents {
	return func(yield func(Extent, error) bool) {
		for e, err := range ex {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if e.Off >= off+n {
				return
			}
			lo, hi := max(e.Off, off), min(e.End(), off+n)
			if lo < hi && !yield(Extent{Off: lo, Len: hi - lo, Zero: e.Zero}, nil) {
				return
			}
		}
	}
}

// Align rounds extents outward to whole pieces of a disk of the given size:
// pieces are align bytes long, the last one ends with the disk. A piece that
// is touched at all is yielded; as Zero only when Zero extents cover all of
// it. Neighbours of one kind are merged. It yields ErrOrder as Merge does, and
// ErrRange for an extent that does not lie inside the disk. align is at
// least 1.
func Align(ex Extents, align, size int64) Extents {
	return Merge(func(yield func(Extent, error) bool) {
		a := aligner{align: align, size: size}
		var end int64
		for e, err := range ex {
			if err == nil {
				err = checkOrder(e, end)
			}
			if err == nil {
				err = CheckRange(size, e.Off, e.Len)
			}
			if err != nil {
				if a.flush(yield) {
					yield(Extent{}, err)
				}
				return
			}
			end = e.End()
			if !a.add(e, yield) {
				return
			}
		}
		a.flush(yield)
	})
}

// aligner gathers what is known about the one piece that is covered in part.
type aligner struct {
	align, size int64
	part        Extent // the piece, with Zero as far as seen; Len 0: none
	covered     int64  // bytes of it
}

// add takes an extent apart into a head and a tail that cover pieces in part,
// and whole pieces between.
func (a *aligner) add(e Extent, yield func(Extent, error) bool) bool {
	for e.Len > 0 {
		lo := e.Off - e.Off%a.align
		n := min(a.align, a.size-lo) // the piece's length
		if e.Off == lo && e.Len >= n {
			// Whole pieces: as many as there are, up to the disk's end.
			if e.End() < a.size {
				n = e.Len - e.Len%a.align
			} else {
				n = e.Len
			}
			if !a.flush(yield) || !yield(Extent{Off: e.Off, Len: n, Zero: e.Zero}, nil) {
				return false
			}
		} else {
			n = min(e.Len, lo+n-e.Off)
			if a.part.Len > 0 && a.part.Off == lo {
				a.part.Zero = a.part.Zero && e.Zero
				a.covered += n
			} else {
				if !a.flush(yield) {
					return false
				}
				a.part = Extent{Off: lo, Len: min(a.align, a.size-lo), Zero: e.Zero}
				a.covered = n
			}
		}
		e.Off += n
		e.Len -= n
	}
	return true
}

func (a *aligner) flush(yield func(Extent, error) bool) bool {
	p := a.part
	if p.Len == 0 {
		return true
	}
	p.Zero = p.Zero && a.covered == p.Len
	a.part, a.covered = Extent{}, 0
	return yield(p, nil)
}

func checkOrder(e Extent, end int64) error {
	if e.Len <= 0 || e.Off < end || e.Off > e.Off+e.Len {
		return fmt.Errorf("%w: %d bytes at %d after %d", ErrOrder, e.Len, e.Off, end)
	}
	return nil
}
