package disk

import "context"

// ReadOnly makes a Device of a Reader: it answers every write with
// ErrReadOnly. Flush succeeds, there being nothing to flush.
func ReadOnly(r Reader) Device { return readOnly{r} }

type readOnly struct{ r Reader }

func (d readOnly) Size() int64 { return d.r.Size() }

func (d readOnly) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.r.ReadAt(ctx, p, off)
}

func (d readOnly) ReadCached(p []byte, off int64) bool { return ReadCached(d.r, p, off) }

func (d readOnly) Extents(ctx context.Context, off, n int64) Extents {
	return d.r.Extents(ctx, off, n)
}

func (d readOnly) WriteAt(context.Context, []byte, int64) error { return ErrReadOnly }
func (d readOnly) ZeroAt(context.Context, int64, int64) error   { return ErrReadOnly }
func (d readOnly) Flush(context.Context) error                  { return nil }
func (d readOnly) Close() error                                 { return d.r.Close() }
