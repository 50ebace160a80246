package repo

import (
	"container/list"
	"context"
	"sync"
)

// lru keeps the max values used last, and lets concurrent callers of one key
// share one load. The zero value with max set is ready. Safe in parallel.
type lru[K comparable, V any] struct {
	max int

	mu      sync.Mutex          // guards all below
	entries map[K]*list.Element // of *lruEntry
	recent  list.List           // front: used last
}

type lruEntry[K comparable, V any] struct {
	key   K
	ready chan struct{} // closed when val and err are set
	val   V
	err   error
}

// get gives the key's value, calling load if it is not there. A failed load is
// not kept. Values are shared: nobody changes them.
func (c *lru[K, V]) get(ctx context.Context, key K, load func() (V, error)) (V, error) {
	for {
		e, mine := c.entry(key)
		if mine {
			e.val, e.err = load()
			if e.err != nil {
				c.drop(e)
			}
			close(e.ready)
			return e.val, e.err
		}
		select {
		case <-e.ready:
		case <-ctx.Done():
			var zero V
			return zero, ctx.Err()
		}
		if e.err == nil {
			return e.val, nil
		}
		// The one who loaded may have been cancelled: that is not our failure.
		if ctx.Err() != nil {
			return e.val, ctx.Err()
		}
	}
}

// peek gives the key's value if it is there.
func (c *lru[K, V]) peek(key K) (val V, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	el, ok := c.entries[key]
	if !ok {
		return val, false
	}
	e := el.Value.(*lruEntry[K, V])
	select {
	case <-e.ready:
		c.recent.MoveToFront(el)
		return e.val, e.err == nil
	default:
		return val, false
	}
}

// entry gives the key's entry; mine says that the caller must load it.
func (c *lru[K, V]) entry(key K) (e *lruEntry[K, V], mine bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if el, ok := c.entries[key]; ok {
		c.recent.MoveToFront(el)
		return el.Value.(*lruEntry[K, V]), false
	}
	if c.entries == nil {
		c.entries = make(map[K]*list.Element)
	}
	e = &lruEntry[K, V]{key: key, ready: make(chan struct{})}
	c.entries[key] = c.recent.PushFront(e)
	for c.recent.Len() > c.max {
		old := c.recent.Back()
		c.recent.Remove(old)
		delete(c.entries, old.Value.(*lruEntry[K, V]).key)
	}
	return e, true
}

func (c *lru[K, V]) drop(e *lruEntry[K, V]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if el, ok := c.entries[e.key]; ok && el.Value == e {
		c.recent.Remove(el)
		delete(c.entries, e.key)
	}
}
