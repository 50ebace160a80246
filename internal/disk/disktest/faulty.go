package disktest

import (
	"context"
	"errors"
	"sync/atomic"

	"holdfast/internal/disk"
)

// ErrInjected is what Faulty fails with unless told otherwise.
var ErrInjected = errors.New("injected error")

// Faulty is a disk whose n-th call fails. Calls of ReadAt, Extents, WriteAt,
// ZeroAt and Flush count, from 1. A failing call does nothing else.
type Faulty struct {
	inner disk.Device
	err   error
	n     int64 // the call that fails; 0 none
	stuck bool
	calls atomic.Int64
}

// NewFaulty wraps inner so that its n-th call fails with ErrInjected. With n 0
// none fails; Calls then tells how many there were. Wrap a disk.Reader with
// disk.ReadOnly first.
func NewFaulty(inner disk.Device, n int64) *Faulty {
	return &Faulty{inner: inner, n: n, err: ErrInjected}
}

// Stuck makes every call after the failing one fail too. It returns f.
func (f *Faulty) Stuck() *Faulty { f.stuck = true; return f }

// With sets the error. It returns f.
func (f *Faulty) With(err error) *Faulty { f.err = err; return f }

// Calls says how many calls were made.
func (f *Faulty) Calls() int64 { return f.calls.Load() }

func (f *Faulty) call() error {
	c := f.calls.Add(1)
	if f.n > 0 && (c == f.n || f.stuck && c > f.n) {
		return f.err
	}
	return nil
}

func (f *Faulty) Size() int64  { return f.inner.Size() }
func (f *Faulty) Close() error { return f.inner.Close() }

func (f *Faulty) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := f.call(); err != nil {
		return err
	}
	return f.inner.ReadAt(ctx, p, off)
}

func (f *Faulty) Extents(ctx context.Context, off, n int64) disk.Extents {
	if err := f.call(); err != nil {
		return disk.Fail(err)
	}
	return f.inner.Extents(ctx, off, n)
}

func (f *Faulty) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := f.call(); err != nil {
		return err
	}
	return f.inner.WriteAt(ctx, p, off)
}

func (f *Faulty) ZeroAt(ctx context.Context, off, n int64) error {
	if err := f.call(); err != nil {
		return err
	}
	return f.inner.ZeroAt(ctx, off, n)
}

func (f *Faulty) Flush(ctx context.Context) error {
	if err := f.call(); err != nil {
		return err
	}
	return f.inner.Flush(ctx)
}
