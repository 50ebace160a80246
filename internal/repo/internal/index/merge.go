package index

import (
	"bytes"
	"encoding/binary"
	"errors"
)

// releasePages is after how many pages a cursor gives back what it has read.
const releasePages = 1 << 8

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

// mergeInto writes the items of both in order; shift is what the numbers of b's
// packs are raised by.
func mergeInto(w *segmentWriter, a, b *cursor, shift uint32) error {
	for a.ok || b.ok {
		if a.ok && (!b.ok || compareIDs(&a.it, &b.it) <= 0) {
			w.add(a.it)
			a.next()
			continue
		}
		b.it.pack += shift
		w.add(b.it)
		b.next()
	}
	return errors.Join(a.err, b.err)
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
