package repo

import (
	"container/list"
	"context"
	"sync"

	"holdfast/internal/repo/internal/pack"
)

// chunkCache holds the max chunks used last. Chunks are copied out and never
// handed out, so that the memory of one serves another and reading makes no
// garbage. The zero value with max set is ready. Safe in parallel.
type chunkCache struct {
	max int

	mu     sync.Mutex                // guards all below, and the content of chunks that have come
	chunks map[pack.ID]*list.Element // of *cachedChunk
	recent list.List                 // front: used last
}

type cachedChunk struct {
	id   pack.ID       // zero when there is nothing in it
	data []byte        // ChunkSize bytes
	come chan struct{} // closed when data is being read no more; nil then
}

// read copies a chunk's bytes at from to p. If the chunk is not there, load
// reads it into buf; concurrent callers share one load. A failed one leaves
// nothing.
func (c *chunkCache) read(ctx context.Context, id pack.ID, p []byte, from int, load func(buf []byte) error) error {
	for {
		c.mu.Lock()
		el := c.chunks[id]
		if el == nil {
			e := c.begin(id)
			c.mu.Unlock()
			err := load(e.data)
			if err == nil {
				copy(p, e.data[from:])
			}
			c.end(e, err == nil)
			return err
		}
		e := el.Value.(*cachedChunk)
		come := e.come
		if come == nil {
			c.recent.MoveToFront(el)
			copy(p, e.data[from:])
			c.mu.Unlock()
			return nil
		}
		c.mu.Unlock()
		select {
		case <-come: // if it was in vain, since its reader was cancelled, we try
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// peek is read of a chunk that is there, and says whether it is.
func (c *chunkCache) peek(id pack.ID, p []byte, from int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	el := c.chunks[id]
	if el == nil || el.Value.(*cachedChunk).come != nil {
		return false
	}
	c.recent.MoveToFront(el)
	copy(p, el.Value.(*cachedChunk).data[from:])
	return true
}

// begin makes room for a chunk that is not there; nobody else touches it before
// end. The caller holds mu.
func (c *chunkCache) begin(id pack.ID) *cachedChunk {
	if c.chunks == nil {
		c.chunks = make(map[pack.ID]*list.Element)
	}
	el := c.recent.Back()
	for el != nil && el.Value.(*cachedChunk).come != nil {
		el = el.Prev()
	}
	if el == nil || c.recent.Len() < c.max {
		el = c.recent.PushFront(&cachedChunk{data: make([]byte, ChunkSize)})
	} else {
		c.recent.MoveToFront(el)
	}
	e := el.Value.(*cachedChunk)
	delete(c.chunks, e.id)
	e.id, e.come = id, make(chan struct{})
	c.chunks[id] = el
	return e
}

// end says that a chunk is read, or, not there, that it could not be.
func (c *chunkCache) end(e *cachedChunk, there bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(e.come)
	e.come = nil
	el := c.chunks[e.id]
	if !there {
		delete(c.chunks, e.id)
		e.id = pack.ID{}
		c.recent.MoveToBack(el)
	}
	for last := c.recent.Back(); c.recent.Len() > c.max && last.Value.(*cachedChunk).come == nil; last = c.recent.Back() {
		delete(c.chunks, last.Value.(*cachedChunk).id)
		c.recent.Remove(last)
	}
}
