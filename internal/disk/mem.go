package disk

import (
	"context"
	"slices"
	"sync"
)

// memPiece is the granularity, in bytes, at which Mem holds data: what was
// never written, or was zeroed since, costs nothing.
const memPiece = 64 << 10

// Mem is a disk in memory. All of its methods may run in parallel, Close
// included. It is sparse: a disk of 64 TiB costs what is written to it.
// Nothing of it survives the process.
type Mem struct {
	size int64

	mu     sync.RWMutex // guards pieces and their bytes
	pieces map[int64]*[memPiece]byte
}

// NewMem returns a disk of size bytes that reads as zeros.
func NewMem(size int64) *Mem {
	return &Mem{size: size, pieces: map[int64]*[memPiece]byte{}}
}

// Clone returns an independent disk with the bytes that m has at this instant.
func (m *Mem) Clone() *Mem {
	m.mu.RLock()
	defer m.mu.RUnlock()
	c := NewMem(m.size)
	for i, p := range m.pieces {
		q := *p
		c.pieces[i] = &q
	}
	return c
}

func (m *Mem) Size() int64  { return m.size }
func (m *Mem) Close() error { return nil }

func (m *Mem) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := checkIO(ctx, m.size, off, int64(len(p))); err != nil {
		return err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	for len(p) > 0 {
		n := min(int64(len(p)), memPiece-off%memPiece)
		if c := m.pieces[off/memPiece]; c != nil {
			copy(p[:n], c[off%memPiece:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (m *Mem) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := checkIO(ctx, m.size, off, int64(len(p))); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(p) > 0 {
		n := min(int64(len(p)), memPiece-off%memPiece)
		c := m.pieces[off/memPiece]
		if c == nil {
			c = new([memPiece]byte)
			m.pieces[off/memPiece] = c
		}
		copy(c[off%memPiece:], p[:n])
		p, off = p[n:], off+n
	}
	return nil
}

func (m *Mem) ZeroAt(ctx context.Context, off, n int64) error {
	if err := checkIO(ctx, m.size, off, n); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, i := range m.held(off, n) {
		lo := max(off, i*memPiece) - i*memPiece
		hi := min(off+n, (i+1)*memPiece) - i*memPiece
		c := m.pieces[i]
		clear(c[lo:hi])
		if IsZero(c[:]) {
			delete(m.pieces, i)
		}
	}
	return nil
}

func (m *Mem) Flush(ctx context.Context) error { return ctx.Err() }

// Extents tells zeros at a granularity of 64 KiB.
func (m *Mem) Extents(ctx context.Context, off, n int64) Extents {
	if err := checkIO(ctx, m.size, off, n); err != nil {
		return Fail(err)
	}
	return Merge(func(yield func(Extent, error) bool) {
		m.mu.RLock()
		held := m.held(off, n)
		m.mu.RUnlock()
		at, end := off, off+n
		for _, i := range held {
			lo, hi := max(off, i*memPiece), min(end, (i+1)*memPiece)
			if lo > at && !yield(Extent{Off: at, Len: lo - at, Zero: true}, nil) {
				return
			}
			if !yield(Extent{Off: lo, Len: hi - lo}, nil) {
				return
			}
			at = hi
		}
		if at < end {
			yield(Extent{Off: at, Len: end - at, Zero: true}, nil)
		}
	})
}

// held lists the pieces with data that touch the range, ascending. The caller
// holds mu.
func (m *Mem) held(off, n int64) []int64 {
	if n == 0 {
		return nil
	}
	var list []int64
	lo, hi := off/memPiece, (off+n-1)/memPiece
	if hi-lo < int64(len(m.pieces)) {
		for i := lo; i <= hi; i++ {
			if m.pieces[i] != nil {
				list = append(list, i)
			}
		}
		return list
	}
	for i := range m.pieces {
		if i >= lo && i <= hi {
			list = append(list, i)
		}
	}
	slices.Sort(list)
	return list
}

// checkIO is how every request to a disk begins.
func checkIO(ctx context.Context, size, off, n int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return CheckRange(size, off, n)
}
