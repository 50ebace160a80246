package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"

	"holdfast/internal/disk"
)

// handle carries out one request that check has passed, and answers it. b is
// the payload of a write, or, if not nil, the room for a short read.
func (c *conn) handle(r request, b *buffer) {
	switch r.cmd {
	case cmdRead:
		c.read(r, b)
		return
	case cmdBlockStatus:
		c.status(r)
		return
	}
	err := c.change(r, b)
	if b == nil {
		b = c.s.bufs.get(0)
	}
	c.done(r, err, b)
}

// change carries out a request that has no payload in its answer.
func (c *conn) change(r request, b *buffer) error {
	dev, off, n := c.exp.dev, int64(r.off), int64(r.n)
	var err error
	switch r.cmd {
	case cmdFlush:
		return c.exp.flush(c.ctx)
	case cmdCache:
		return c.cache(off, min(n, maxCache))
	case cmdWrite:
		err = dev.WriteAt(c.ctx, b.payload(int(n)), off)
	case cmdTrim:
		err = dev.ZeroAt(c.ctx, off, n)
	case cmdWriteZeroes:
		err = c.writeZeroes(r.flags, off, n)
	}
	if err == nil && r.flags&cmdFlagFUA != 0 {
		err = c.exp.flush(c.ctx)
	}
	if err == nil && r.cmd == cmdWrite {
		c.s.stats.writeBytes.Add(n)
	}
	return err
}

// writeZeroes takes ZeroAt for fast, as it stores nothing. What must not
// become a hole is written out, which is not fast (proto,
// NBD_CMD_WRITE_ZEROES).
func (c *conn) writeZeroes(flags uint16, off, n int64) error {
	if flags&cmdFlagNoHole == 0 {
		return c.exp.dev.ZeroAt(c.ctx, off, n)
	}
	if flags&cmdFlagFastZero != 0 {
		return errNotFast
	}
	for n > 0 {
		p := zeros[:min(n, piece)]
		if err := c.exp.dev.WriteAt(c.ctx, p, off); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

// cache reads a range so that whatever caches lie below the disk hold it.
func (c *conn) cache(off, n int64) error {
	if n == 0 {
		return nil
	}
	b, err := c.take(int(min(n, piece)))
	if err != nil {
		return err
	}
	defer c.giveBack(b)
	for e, err := range covering(c.exp.dev, c.ctx, off, n) {
		if err != nil {
			return err
		}
		for at := e.Off; !e.Zero && at < e.End(); at += piece {
			if err := c.exp.dev.ReadAt(c.ctx, b.payload(int(min(piece, e.End()-at))), at); err != nil {
				return err
			}
		}
	}
	return nil
}

// read answers NBD_CMD_READ, in b if there is one.
func (c *conn) read(r request, b *buffer) {
	if r.n > wholeRead && c.structured && r.flags&cmdFlagDF == 0 {
		c.readExtents(r)
		return
	}
	n := int(r.n)
	if b == nil {
		var err error
		if b, err = c.take(n); err != nil {
			c.done(r, err, c.s.bufs.get(0))
			return
		}
	}
	if err := c.exp.dev.ReadAt(c.ctx, b.payload(n), int64(r.off)); err != nil {
		c.done(r, err, b)
		return
	}
	c.putRead(r, b)
	c.out.send(b)
}

// readCached answers a short read that needs no waiting. It is done where
// requests are read, since to hand it over takes longer than the read. When it
// says no, b, if there is one, is for handle.
func (c *conn) readCached(r request) (b *buffer, ok bool) {
	d, is := c.exp.dev.(disk.Cached)
	if !is || r.cmd != cmdRead || r.n == 0 || r.n > wholeRead {
		return nil, false
	}
	if b = c.tryTake(int(r.n)); b == nil || !d.ReadCached(b.payload(int(r.n)), int64(r.off)) {
		return b, false
	}
	c.putRead(r, b)
	c.out.add(b)
	return nil, true
}

// putRead makes of b, whose payload was read, the reply to r.
func (c *conn) putRead(r request, b *buffer) {
	n := int(r.n)
	p := b.payload(n)
	c.s.stats.readBytes.Add(int64(n))
	switch {
	case !c.structured:
		putSimple(b.header(simpleLen, n), 0, r.cookie)
	case n == 0:
		putChunk(b.header(chunkLen, 0), replyFlagDone, replyNone, r.cookie, 0)
	case disk.IsZero(p):
		putHole(b, r.cookie, r.off, n, replyFlagDone)
	default:
		putData(b, r.cookie, r.off, n, replyFlagDone)
	}
	b.slot = c.slots
}

// readExtents answers a long read in chunks, holes without reading them.
func (c *conn) readExtents(r request) {
	end := int64(r.off) + int64(r.n)
	for e, err := range covering(c.exp.dev, c.ctx, int64(r.off), int64(r.n)) {
		if err != nil {
			c.done(r, err, c.s.bufs.get(0))
			return
		}
		if e.Zero {
			b := c.s.bufs.get(0)
			putHole(b, r.cookie, uint64(e.Off), int(e.Len), c.last(b, e.End() == end))
			c.out.send(b)
			continue
		}
		for at := e.Off; at < e.End(); at += piece {
			n := int(min(piece, e.End()-at))
			b, err := c.take(n)
			if err != nil {
				c.done(r, err, c.s.bufs.get(0))
				return
			}
			if err := c.exp.dev.ReadAt(c.ctx, b.payload(n), at); err != nil {
				c.done(r, err, b)
				return
			}
			flags := c.last(b, at+int64(n) == end)
			if disk.IsZero(b.payload(n)) {
				putHole(b, r.cookie, uint64(at), n, flags)
			} else {
				putData(b, r.cookie, uint64(at), n, flags)
			}
			c.out.send(b)
		}
	}
	c.s.stats.readBytes.Add(int64(r.n))
}

// last returns the flags of the chunk in b, which ends the request or does not.
func (c *conn) last(b *buffer, is bool) uint16 {
	if !is {
		return 0
	}
	b.slot = c.slots
	return replyFlagDone
}

// putData makes of b the chunk that carries its n bytes of payload.
func putData(b *buffer, cookie, off uint64, n int, flags uint16) {
	h := b.header(chunkLen+8, n)
	putChunk(h, flags, replyData, cookie, 8+n)
	be.PutUint64(h[chunkLen:], off)
}

// putHole makes of b the chunk that says that n bytes are zeros.
func putHole(b *buffer, cookie, off uint64, n int, flags uint16) {
	h := b.header(chunkLen+12, 0)
	putChunk(h, flags, replyHole, cookie, 12)
	be.PutUint64(h[chunkLen:], off)
	be.PutUint32(h[chunkLen+8:], uint32(n))
}

// status answers NBD_CMD_BLOCK_STATUS: base:allocation from the disk's extents.
func (c *conn) status(r request) {
	limit := maxDescriptors
	if r.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	type run struct{ n, state uint32 }
	var runs []run
	for e, err := range covering(c.exp.dev, c.ctx, int64(r.off), int64(r.n)) {
		if err != nil {
			c.done(r, err, c.s.bufs.get(0))
			return
		}
		state := uint32(0)
		if e.Zero {
			state = StateHole | StateZero
		}
		if k := len(runs); k > 0 && runs[k-1].state == state {
			runs[k-1].n += uint32(e.Len)
			continue
		}
		if len(runs) == limit {
			break
		}
		runs = append(runs, run{uint32(e.Len), state})
	}
	n := 4 + 8*len(runs)
	b, err := c.take(n)
	if err != nil {
		c.done(r, err, c.s.bufs.get(0))
		return
	}
	putChunk(b.header(chunkLen, n), replyFlagDone, replyBlockStatus, r.cookie, n)
	p := b.payload(n)
	be.PutUint32(p, allocationID)
	for i, e := range runs {
		be.PutUint32(p[4+8*i:], e.n)
		be.PutUint32(p[8+8*i:], e.state)
	}
	b.slot = c.slots
	c.out.send(b)
}

// covering is the disk's extents of the range, held to their promise: a gap
// would be taken by the client for something that it is not.
func covering(d disk.Reader, ctx context.Context, off, n int64) iter.Seq2[disk.Extent, error] {
	return func(yield func(disk.Extent, error) bool) {
		at, end := off, off+n
		for e, err := range d.Extents(ctx, off, n) {
			if err == nil && (e.Off != at || e.Len <= 0 || e.Len > end-at) {
				err = fmt.Errorf("disk names extent [%d, +%d) where [%d, +%d) is to be covered", e.Off, e.Len, at, end-at)
			}
			if !yield(e, err) || err != nil {
				return
			}
			at += e.Len
		}
		if at < end {
			yield(disk.Extent{}, fmt.Errorf("disk names no extents from %d: %w", at, io.ErrUnexpectedEOF))
		}
	}
}

// errNotFast is the answer to a fast zero that would not be.
var errNotFast = errors.New("zeros would have to be written")
