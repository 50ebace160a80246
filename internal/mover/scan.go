package mover

import (
	"context"
	"errors"
	"sync/atomic"

	"holdfast/internal/disk"
)

// Scan reads a disk that does not know its zeros, such as a file without
// holes, and returns one that does, in pieces of 64 KiB. It owns d, and on an
// error has closed it. Memory: 1 bit for each piece.
func Scan(ctx context.Context, d disk.Reader, m *Meter) (disk.Reader, error) {
	s := &scanned{d: d, data: make([]atomic.Uint64, (d.Size()+64*grain-1)/(64*grain))}
	if _, err := Copy(ctx, s, d, d.Extents(ctx, 0, d.Size()), Options{Align: grain, Meter: m}); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return s, nil
}

// scanned is a disk with a bit for each piece that is not zeros. While it is
// being scanned it is the writer, too.
type scanned struct {
	d    disk.Reader
	data []atomic.Uint64
}

// WriteAt notes where data is. p is whole pieces, but at the disk's end.
func (s *scanned) WriteAt(_ context.Context, p []byte, off int64) error {
	for i := off / grain; i*grain < off+int64(len(p)); i++ {
		s.data[i/64].Or(1 << (i % 64))
	}
	return nil
}

func (s *scanned) ZeroAt(context.Context, int64, int64) error { return nil }
func (s *scanned) Flush(context.Context) error                { return nil }

func (s *scanned) Size() int64  { return s.d.Size() }
func (s *scanned) Close() error { return s.d.Close() }

func (s *scanned) ReadAt(ctx context.Context, p []byte, off int64) error {
	return s.d.ReadAt(ctx, p, off)
}

func (s *scanned) Extents(_ context.Context, off, n int64) disk.Extents {
	if err := disk.CheckRange(s.Size(), off, n); err != nil {
		return disk.Fail(err)
	}
	return disk.Merge(func(yield func(disk.Extent, error) bool) {
		for end := off + n; off < end; {
			i := off / grain
			part := min((i+1)*grain, end) - off
			if !yield(disk.Extent{Off: off, Len: part, Zero: s.data[i/64].Load()>>(i%64)&1 == 0}, nil) {
				return
			}
			off += part
		}
	})
}
