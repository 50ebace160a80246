package overlay

import (
	"context"
	"slices"
	"sync"
)

// ranges lets work on ranges of the disk wait for earlier work on ranges that
// overlap. Since it waits only for what came earlier, nobody starves and
// nothing deadlocks. As many are at work as there are requests in flight: a
// list does.
type ranges struct {
	mu   sync.Mutex // guards busy
	busy []*span
}

type span struct {
	off, end int64
	done     chan struct{}
}

// lock returns when no earlier holder overlaps [off, end), or ctx is done. The
// function it returns ends the hold.
func (r *ranges) lock(ctx context.Context, off, end int64) (unlock func(), err error) {
	s := &span{off, end, make(chan struct{})}
	var wait []*span
	r.mu.Lock()
	for _, b := range r.busy {
		if b.off < end && off < b.end {
			wait = append(wait, b)
		}
	}
	r.busy = append(r.busy, s)
	r.mu.Unlock()
	unlock = func() {
		r.mu.Lock()
		r.busy = slices.DeleteFunc(r.busy, func(b *span) bool { return b == s })
		r.mu.Unlock()
		close(s.done)
	}
	for _, b := range wait {
		select {
		case <-b.done:
		case <-ctx.Done():
			unlock()
			return nil, ctx.Err()
		}
	}
	return unlock, nil
}
