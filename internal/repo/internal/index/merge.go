package index

import (
	"bytes"
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"

	"holdfast/internal/repo/internal/seal"
)

const (
	// batchItems is how many items a Batch sorts in memory: 12 MB.
	batchItems = 1 << 18
	// releasePages is after how many pages a cursor gives back what it has read.
	releasePages = 1 << 8
)

// cursor walks a segment's items in order.
type cursor struct {
	s        *segment
	page     int64
	released int64 // up to that page
	rest     []byte
	it       item
	ok       bool
	err      error
}

func newCursor(s *segment) *cursor {
	c := &cursor{s: s}
	c.next()
	return c
}

func (c *cursor) next() {
	if len(c.rest) == 0 {
		if c.page-c.released >= releasePages || c.page == c.s.pages {
			release(c.s.data[(c.released+1)*pageLen : (c.page+1)*pageLen])
			c.released = c.page
		}
		c.ok = false
		if c.page == c.s.pages {
			return
		}
		if c.rest, c.err = c.s.page(c.page); c.err != nil {
			return
		}
		c.page++
	}
	c.it, c.ok = parseItem(c.rest), true
	c.rest = c.rest[itemLen:]
}

// run is a sorted source of a merge; shift is what its packs' numbers are
// raised by.
type run struct {
	*cursor
	shift uint32
}

// runs is a heap of those that have items left.
type runs []run

func (r runs) Len() int           { return len(r) }
func (r runs) Less(i, j int) bool { return compareIDs(&r[i].it, &r[j].it) < 0 }
func (r runs) Swap(i, j int)      { r[i], r[j] = r[j], r[i] }
func (r *runs) Push(any)          {}
func (r *runs) Pop() any          { *r = (*r)[:len(*r)-1]; return nil }

// mergeInto writes the items of all runs in order.
func mergeInto(w *segmentWriter, all []run) error {
	left := runs(slices.DeleteFunc(slices.Clone(all), func(r run) bool { return !r.ok }))
	heap.Init(&left)
	for len(left) > 0 {
		first := &left[0]
		it := first.it
		it.pack += first.shift
		w.add(it)
		if first.next(); first.ok {
			heap.Fix(&left, 0)
		} else {
			heap.Pop(&left)
		}
	}
	var err error
	for _, r := range all {
		err = errors.Join(err, r.err)
	}
	return err
}

func compareIDs(a, b *item) int {
	x, y := binary.BigEndian.Uint64(a.id[:]), binary.BigEndian.Uint64(b.id[:])
	switch {
	case x < y:
		return -1
	case x > y:
		return 1
	}
	return bytes.Compare(a.id[8:], b.id[8:])
}

// Batch takes many index objects into the index at once: each item is sorted
// in memory, written, and merged with all others in one step. Nothing of it is
// found before Finish. It is for one goroutine.
type Batch struct {
	x       *Index
	items   []item
	packs   [][32]byte
	sources [][32]byte
	spilled []string // sorted files
	limit   int      // items in memory
}

// NewBatch begins a batch, to be ended by Finish or Abort.
func (x *Index) NewBatch() *Batch { return &Batch{x: x, limit: batchItems} }

// Add takes the items of an index object in, each object once.
func (b *Batch) Add(source [32]byte, packs []Pack) error {
	if b.x.Has(source) {
		return nil
	}
	for _, k := range packs {
		if len(b.items)+len(k.Items) > b.limit && len(b.items) > 0 {
			if err := b.spill(); err != nil {
				return err
			}
		}
		number := uint32(len(b.packs))
		b.packs = append(b.packs, k.Name)
		off := uint32(seal.HeaderLen)
		for j, it := range k.Items {
			b.items = append(b.items, item{it.ID, number, uint32(j), off, it.Stored})
			off += it.Stored
		}
	}
	b.sources = append(b.sources, source)
	return nil
}

// spill writes the items in memory as a sorted file.
func (b *Batch) spill() error {
	w, err := b.sorted()
	if err != nil {
		return err
	}
	path, err := w.close(nil, nil)
	if err == nil {
		b.spilled = append(b.spilled, path)
	}
	return err
}

// sorted writes the items in memory to a new segment.
func (b *Batch) sorted() (*segmentWriter, error) {
	slices.SortFunc(b.items, func(a, c item) int { return compareIDs(&a, &c) })
	w, err := newSegmentWriter(b.x.dir)
	if err != nil {
		return nil, err
	}
	for _, it := range b.items {
		w.add(it)
	}
	b.items = b.items[:0]
	return w, nil
}

// Finish makes the index find what was added.
func (b *Batch) Finish() error {
	if len(b.sources) == 0 {
		return nil
	}
	b.x.adding.Lock()
	defer b.x.adding.Unlock()
	return b.finish()
}

func (b *Batch) finish() error {
	if len(b.spilled) == 0 {
		w, err := b.sorted()
		if err != nil {
			return err
		}
		return b.x.install(w, b.packs, b.sources, nil)
	}
	if len(b.items) > 0 {
		if err := b.spill(); err != nil {
			return err
		}
	}
	b.items = nil
	w, err := newSegmentWriter(b.x.dir)
	if err != nil {
		return err
	}
	if err := b.merge(w); err != nil {
		return errors.Join(err, w.abort())
	}
	return errors.Join(b.x.install(w, b.packs, b.sources, nil), b.Abort())
}

func (b *Batch) merge(w *segmentWriter) (err error) {
	var all []run
	defer func() {
		for _, r := range all {
			err = errors.Join(err, r.s.unmap())
		}
	}()
	for _, path := range b.spilled {
		s, err := openSegment(path)
		if err != nil {
			return fmt.Errorf("sort the index: %w", err)
		}
		all = append(all, run{newCursor(s), 0})
	}
	return mergeInto(w, all)
}

// Abort removes what the batch has left in files.
func (b *Batch) Abort() error {
	var err error
	for _, path := range b.spilled {
		err = errors.Join(err, os.Remove(path))
	}
	b.spilled, b.items, b.sources = nil, nil, nil
	return err
}
