package blob

import (
	"context"
	"iter"
	"sync"
	"time"
)

// Rates bound what a store's data may take of the network, in bytes per second.
// 0 is no bound.
type Rates struct {
	Up, Down int64
}

// Limit passes calls to s and spreads them over time, so that on average no
// more than the rates is stored and read. A single object goes at the full
// speed; the next ones wait for it. All that use the returned store share the
// rates. Its other abilities are found by As.
func Limit(s Store, r Rates) Store {
	if r.Up <= 0 && r.Down <= 0 {
		return s
	}
	return &limited{inner: s, up: link{rate: r.Up}, down: link{rate: r.Down}}
}

type limited struct {
	inner    Store
	up, down link
}

func (l *limited) under() Store { return l.inner }

func (l *limited) Put(ctx context.Context, name string, data []byte) error {
	if err := l.up.take(ctx, int64(len(data))); err != nil {
		return err
	}
	return l.inner.Put(ctx, name, data)
}

func (l *limited) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	// How much comes is certain only afterwards; it is the next one that waits.
	if err := l.down.take(ctx, 0); err != nil {
		return nil, err
	}
	p, err := l.inner.Get(ctx, name, off, n)
	l.down.charge(int64(len(p)))
	return p, err
}

func (l *limited) List(ctx context.Context, prefix string) iter.Seq2[Info, error] {
	return l.inner.List(ctx, prefix)
}

func (l *limited) Delete(ctx context.Context, name string) error { return l.inner.Delete(ctx, name) }

// link is one direction: it is free again when all that was taken has passed
// at its rate.
type link struct {
	rate int64 // bytes per second; 0: no bound

	mu   sync.Mutex
	free time.Time // guarded by mu
}

// take waits until the link is free and takes it for n bytes.
func (l *link) take(ctx context.Context, n int64) error {
	if l.rate <= 0 {
		return nil
	}
	wait := time.Until(l.charge(n))
	if wait <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// charge takes the link for n bytes and says when they may begin.
func (l *link) charge(n int64) (begin time.Time) {
	if l.rate <= 0 {
		return begin
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if now := time.Now(); l.free.Before(now) {
		l.free = now
	}
	begin = l.free
	l.free = l.free.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	return begin
}

// As finds an ability of a store, as Locker or Versions, below wrappers such as
// Limit's. Tiers lock where an object lies; their other abilities are those of
// the own store.
func As[T any](s Store) (T, bool) {
	for {
		if t, ok := s.(T); ok {
			return t, true
		}
		if tiers, ok := s.(*Tiers); ok {
			if own, ok := As[Locker](tiers.own); ok {
				if t, ok := any(&tiersLocker{tiers, own}).(T); ok {
					return t, true
				}
			}
		}
		w, ok := s.(interface{ under() Store })
		if !ok {
			var none T
			return none, false
		}
		s = w.under()
	}
}
