package publish

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"holdfast/internal/disk"
)

// Pauses between attempts to read.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

// patient reads again what could not be read, until it can be, for at most
// limit. What cannot get better fails at once.
type patient struct {
	inner     disk.Reader
	permanent func(error) bool
	report    func(error)
	limit     time.Duration

	waiting atomic.Int64 // requests that try again: only the first and the last are told of
}

func (p *patient) Size() int64  { return p.inner.Size() }
func (p *patient) Close() error { return p.inner.Close() }

func (p *patient) ReadAt(ctx context.Context, b []byte, off int64) error {
	what := func() string { return fmt.Sprintf("read %d bytes at %d", len(b), off) }
	return p.persist(ctx, what, func() error { return p.inner.ReadAt(ctx, b, off) })
}

func (p *patient) ReadCached(b []byte, off int64) bool { return disk.ReadCached(p.inner, b, off) }

// Extents goes on where it was after an error.
func (p *patient) Extents(ctx context.Context, off, n int64) disk.Extents {
	return func(yield func(disk.Extent, error) bool) {
		end := off + n
		stopped := false
		what := func() string { return fmt.Sprintf("list extents at %d", off) }
		err := p.persist(ctx, what, func() error {
			for e, err := range p.inner.Extents(ctx, off, end-off) {
				if err != nil {
					return err
				}
				if !yield(e, nil) {
					stopped = true
					return nil
				}
				off = e.End()
			}
			return nil
		})
		if err != nil && !stopped {
			yield(disk.Extent{}, err)
		}
	}
}

// persist calls f until it succeeds.
func (p *patient) persist(ctx context.Context, doing func() string, f func() error) error {
	err := f()
	if err == nil || p.hopeless(ctx, err) {
		return err
	}
	begun, what := time.Now(), doing()
	if p.waiting.Add(1) == 1 {
		p.tell(fmt.Errorf("%s: the repository does not answer, trying again: %w", what, err))
	}
	defer p.waiting.Add(-1)
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return errors.Join(context.Cause(ctx), err)
		case <-t.C:
		}
		if err = f(); err == nil {
			if p.waiting.Load() == 1 {
				p.tell(fmt.Errorf("%s: the repository answers again after %s", what, time.Since(begun).Round(time.Millisecond)))
			}
			return nil
		}
		if p.hopeless(ctx, err) {
			return err
		}
		if time.Since(begun) >= p.limit {
			return fmt.Errorf("%s: given up after %s: %w", what, p.limit, err)
		}
	}
}

func (p *patient) hopeless(ctx context.Context, err error) bool {
	return ctx.Err() != nil || errors.Is(err, disk.ErrRange) || p.permanent != nil && p.permanent(err)
}

func (p *patient) tell(err error) {
	if p.report != nil {
		p.report(err)
	}
}
