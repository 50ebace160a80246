package mover

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"runtime"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/disk"
)

const (
	compareBlock  = 1 << 20
	compareWindow = 32 // blocks
)

// Compare returns the offset of the first byte in which two disks differ, -1
// if there is none. Behind the end of the shorter one the other must be zeros.
// Ranges that both know to be zeros are not read. The Meter counts the bytes
// compared; it may be nil.
func Compare(ctx context.Context, a, b disk.Reader, m *Meter) (int64, error) {
	if a.Size() < b.Size() {
		a, b = b, a
	}
	next, stop := iter.Pull2(toCompare(ctx, a, b))
	defer stop()
	var total int64
	for e, err := range toCompare(ctx, a, b) {
		if err != nil {
			return 0, err
		}
		total += e.Len
	}
	m.AddTotal(total)
	for {
		// Blocks of one window are compared side by side; so the first that
		// differs is known when all of them are done.
		var first [compareWindow]int64
		n := 0
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(2 * runtime.GOMAXPROCS(0))
		for ; n < len(first); n++ {
			e, err, ok := next()
			if err != nil {
				return 0, errors.Join(err, g.Wait())
			}
			if !ok {
				break
			}
			place := &first[n]
			g.Go(func() (err error) {
				*place, err = differ(gctx, a, b, e)
				m.Add(e.Len)
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return 0, err
		}
		for _, off := range first[:n] {
			if off >= 0 {
				return off, nil
			}
		}
		if n < len(first) {
			return -1, nil
		}
	}
}

// toCompare yields blocks of a, the longer one, that not both disks know to be
// zeros.
func toCompare(ctx context.Context, a, b disk.Reader) disk.Extents {
	return func(yield func(disk.Extent, error) bool) {
		cut := func(ex disk.Extents) bool {
			for e, err := range ex {
				if err != nil {
					yield(disk.Extent{}, err)
					return false
				}
				for off := e.Off; !e.Zero && off < e.End(); off += compareBlock {
					if !yield(disk.Extent{Off: off, Len: min(compareBlock, e.End()-off)}, nil) {
						return false
					}
				}
			}
			return true
		}
		for e, err := range a.Extents(ctx, 0, a.Size()) {
			switch {
			case err != nil:
				yield(disk.Extent{}, err)
				return
			case !e.Zero:
				if !cut(disk.List(e)) {
					return
				}
			case e.Off < b.Size():
				if !cut(b.Extents(ctx, e.Off, min(e.Len, b.Size()-e.Off))) {
					return
				}
			}
		}
	}
}

// differ compares one block.
func differ(ctx context.Context, a, b disk.Reader, e disk.Extent) (int64, error) {
	p, q := make([]byte, e.Len), make([]byte, e.Len)
	if err := a.ReadAt(ctx, p, e.Off); err != nil {
		return 0, fmt.Errorf("read at %d: %w", e.Off, err)
	}
	if n := max(0, min(e.Len, b.Size()-e.Off)); n > 0 {
		if err := b.ReadAt(ctx, q[:n], e.Off); err != nil {
			return 0, fmt.Errorf("read at %d: %w", e.Off, err)
		}
	}
	if bytes.Equal(p, q) {
		return -1, nil
	}
	for i := range p {
		if p[i] != q[i] {
			return e.Off + int64(i), nil
		}
	}
	return -1, nil
}
