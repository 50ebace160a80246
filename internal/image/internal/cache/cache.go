// Package cache keeps pieces of image files in memory: slices of tables,
// decompressed clusters.
package cache

import (
	"container/list"
	"context"
	"sync"
)

// Cache keeps pieces of a file that cost something to get, by their offset, in
// at most limit bytes or one piece. Several may ask at once; one of them
// gets a missing piece and the others wait for it. What it gives out is shared
// and must not be changed. A failure is not kept.
type Cache struct {
	limit int64
	load  func(ctx context.Context, key int64) ([]byte, error)

	mu    sync.Mutex // guards what follows; not held while loading
	held  int64
	items map[int64]*item
	order list.List // of *item that are loaded, the last used first
}

type item struct {
	key   int64
	ready chan struct{} // closed when data and err are set
	data  []byte
	err   error
	place *list.Element // nil until loaded
}

// New returns an empty cache. load gets what is missing; it runs in the
// goroutine that asked.
func New(limit int64, load func(context.Context, int64) ([]byte, error)) *Cache {
	return &Cache{limit: limit, load: load, items: map[int64]*item{}}
}

// Get returns the piece of that key.
func (c *Cache) Get(ctx context.Context, key int64) ([]byte, error) {
	for {
		c.mu.Lock()
		it := c.items[key]
		if it == nil {
			it = &item{key: key, ready: make(chan struct{})}
			c.items[key] = it
			c.mu.Unlock()
			return c.fill(ctx, it)
		}
		if it.place != nil {
			c.order.MoveToFront(it.place)
			c.mu.Unlock()
			return it.data, nil
		}
		c.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-it.ready:
			if it.err == nil {
				return it.data, nil
			}
			// The one who loaded it failed, perhaps only because its own
			// context ended: try with ours.
			if err := ctx.Err(); err != nil {
				return nil, err
			}
		}
	}
}

func (c *Cache) fill(ctx context.Context, it *item) ([]byte, error) {
	it.data, it.err = c.load(ctx, it.key)
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(it.ready)
	if it.err != nil {
		delete(c.items, it.key)
		return nil, it.err
	}
	it.place = c.order.PushFront(it)
	c.held += int64(len(it.data))
	for c.held > c.limit && c.order.Len() > 1 {
		old := c.order.Remove(c.order.Back()).(*item)
		delete(c.items, old.key)
		c.held -= int64(len(old.data))
	}
	return it.data, nil
}
