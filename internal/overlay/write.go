package overlay

import (
	"context"
	"errors"
	"fmt"

	"holdfast/internal/disk"
)

// maxWrite bounds what is written in one piece, in bytes.
const maxWrite = 32 << 20

// WriteAt writes to the overlay. The base is read where p covers a part only
// of a block that the overlay does not hold yet: at most at p's two ends.
func (o *Overlay) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := o.checkWrite(ctx, off, int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		n := min(int64(len(p)), maxWrite-off%maxWrite)
		unlock, err := o.ranges.lock(ctx, blockStart(off), blockEnd(off+n))
		if err == nil {
			err = o.write(ctx, p[:n], off)
			unlock()
		}
		if err != nil {
			return fmt.Errorf("write to overlay at %d: %w", off, err)
		}
		p, off = p[n:], off+n
	}
	return o.trim(ctx)
}

// ZeroAt makes a range zero. Its blocks are given back to the filesystem.
func (o *Overlay) ZeroAt(ctx context.Context, off, n int64) error {
	if err := o.checkWrite(ctx, off, n); err != nil || n == 0 {
		return err
	}
	unlock, err := o.ranges.lock(ctx, blockStart(off), blockEnd(off+n))
	if err == nil {
		err = o.zero(ctx, off, off+n)
		unlock()
	}
	if err != nil {
		return fmt.Errorf("zero overlay at %d: %w", off, err)
	}
	return o.trim(ctx)
}

func (o *Overlay) checkWrite(ctx context.Context, off, n int64) error {
	if err := o.check(ctx, off, n); err != nil {
		return err
	}
	o.mu.RLock()
	defer o.mu.RUnlock()
	return o.failed
}

// trim flushes when nobody did so while the log grew, so that it is written
// anew.
func (o *Overlay) trim(ctx context.Context) error {
	o.appending.Lock()
	grown := o.log.tail > 2*o.log.rewriteAt
	o.appending.Unlock()
	if grown {
		return o.Flush(ctx)
	}
	return nil
}

func blockStart(off int64) int64 { return off - off%blockSize }
func blockEnd(end int64) int64   { return blockStart(end + blockSize - 1) }

// piece is some bytes and where on the disk they belong.
type piece struct {
	p   []byte
	off int64
}

// write writes p, whose blocks the caller has locked.
func (o *Overlay) write(ctx context.Context, p []byte, off int64) error {
	first, last := off/clusterSize, (off+int64(len(p))-1)/clusterSize
	o.mu.Lock()
	was := o.m.reserve(nil, first, last)
	o.mu.Unlock()
	pieces, err := o.complete(ctx, p, off, was)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	for _, x := range pieces {
		if err := o.put(x, first, was); err != nil {
			return err
		}
	}
	o.dirty.Store(true)

	// Blocks that are data now and were not before go into the log.
	var fresh []mapEntry
	for i, e := range was {
		c := first + int64(i)
		lo, hi := max(off-c*clusterSize, 0), min(off+int64(len(p))-c*clusterSize, clusterSize)
		if mask := blocks(lo, hi) &^ e.data; mask != 0 {
			fresh = append(fresh, mapEntry{cluster: uint32(c), slot: e.slot - 1, data: mask})
		}
	}
	if len(fresh) > 0 {
		return o.record(encodeMap(fresh), func(mark uint32) {
			for _, x := range fresh {
				o.m.set(x, mark)
			}
			o.m.touch(first, last, mark)
		})
	}
	o.mu.Lock()
	o.m.touch(first, last, o.mark)
	o.mu.Unlock()
	return nil
}

// record appends to the log, and then changes the map.
func (o *Overlay) record(recs []record, change func(mark uint32)) error {
	o.appending.Lock()
	defer o.appending.Unlock()
	if err := o.append(recs...); err != nil {
		return err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	change(o.mark)
	return nil
}

// complete cuts p into pieces such that blocks which are not data yet are
// covered whole: the first and the last get the rest of theirs from the base.
// was has the entries of p's clusters.
func (o *Overlay) complete(ctx context.Context, p []byte, off int64, was []entry) ([]piece, error) {
	first := off / clusterSize
	stateOf := func(at int64) state {
		st, _ := was[at/clusterSize-first].run(at % clusterSize / blockSize)
		return st
	}
	var pieces []piece
	if lo := blockStart(off); lo < off && stateOf(lo) != data {
		b, err := o.block(ctx, lo, stateOf(lo))
		if err != nil {
			return nil, err
		}
		n := copy(b[off-lo:], p)
		pieces = append(pieces, piece{b, lo})
		p, off = p[n:], off+int64(n)
	}
	end := off + int64(len(p))
	if lo := blockStart(end); len(p) > 0 && lo < end && end < o.size && stateOf(lo) != data {
		b, err := o.block(ctx, lo, stateOf(lo))
		if err != nil {
			return nil, err
		}
		copy(b, p[lo-off:])
		pieces = append(pieces, piece{b, lo})
		p = p[:lo-off]
	}
	if len(p) > 0 {
		pieces = append(pieces, piece{p, off})
	}
	return pieces, nil
}

// block returns a whole block that is not data.
func (o *Overlay) block(ctx context.Context, off int64, st state) ([]byte, error) {
	b := make([]byte, min(blockSize, o.size-off))
	if st == zero {
		return b, nil
	}
	if err := o.base.ReadAt(ctx, b, off); err != nil {
		return nil, fmt.Errorf("read the base at %d: %w", off, err)
	}
	return b, nil
}

// put writes a piece to its clusters' slots; neighbours go together.
func (o *Overlay) put(x piece, first int64, was []entry) error {
	for len(x.p) > 0 {
		i := x.off/clusterSize - first
		n := clusterSize - x.off%clusterSize
		for j := i; n < int64(len(x.p)) && was[j+1].slot == was[j].slot+1; j++ {
			n += clusterSize
		}
		n = min(n, int64(len(x.p)))
		if _, err := o.data.WriteAt(x.p[:n], place(was[i].slot)+x.off%clusterSize); err != nil {
			return err
		}
		x.p, x.off = x.p[n:], x.off+n
	}
	return nil
}

// zero makes [off, end) zero, whose blocks the caller has locked.
func (o *Overlay) zero(ctx context.Context, off, end int64) error {
	lo, hi := blockEnd(off), blockStart(end)
	if end == o.size {
		hi = end
	}
	if lo > hi { // inside one block
		return o.zeroPart(ctx, off, end)
	}
	if off < lo {
		if err := o.zeroPart(ctx, off, lo); err != nil {
			return err
		}
	}
	if hi < end {
		if err := o.zeroPart(ctx, hi, end); err != nil {
			return err
		}
	}
	if lo < hi {
		return o.zeroBlocks(ctx, lo, hi)
	}
	return nil
}

// zeroPart zeroes a part of a block.
func (o *Overlay) zeroPart(ctx context.Context, off, end int64) error {
	o.mu.RLock()
	st, _ := o.m.get(off / clusterSize).run(off % clusterSize / blockSize)
	o.mu.RUnlock()
	if st == zero {
		return nil
	}
	return o.write(ctx, make([]byte, end-off), off)
}

// zeroBlocks zeroes whole blocks. Only what was not zero is noted as written.
func (o *Overlay) zeroBlocks(ctx context.Context, off, end int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	punch, done := o.held(off, end)
	if done {
		return nil
	}
	var edges []mapEntry // clusters that are touched in part
	first, next := (off+clusterSize-1)/clusterSize, end/clusterSize
	if end == o.size {
		next = o.m.clusters()
	}
	edge := func(c, lo, hi int64) {
		edges = append(edges, mapEntry{cluster: uint32(c), slot: noSlot, zero: blocks(lo, hi)})
	}
	if first > next { // inside one cluster
		edge(next, off%clusterSize, end%clusterSize)
		next = first
	} else {
		if off%clusterSize > 0 {
			edge(first-1, off%clusterSize, clusterSize)
		}
		if next*clusterSize < end {
			edge(next, 0, end%clusterSize)
		}
	}
	recs := encodeMap(edges)
	if first < next {
		recs = append(recs, encodeZero(first, next-first))
	}
	err := o.record(recs, func(mark uint32) {
		for _, x := range edges {
			o.m.set(x, mark)
		}
		o.m.setZero(first, next-first, mark)
	})
	if err != nil {
		return err
	}
	// Only now: had the record not been written, the data would still count.
	for _, s := range punch {
		if err := o.data.Punch(s.place, s.end-s.off); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
	}
	return nil
}

// held lists the data in a range of blocks, and tells whether there is nothing
// to do since all is zero already.
func (o *Overlay) held(off, end int64) (held []segment, zeroed bool) {
	zeroed = true
	for s := range o.segments(off, end, all) {
		zeroed = zeroed && s.state == zero
		if s.state == data {
			s.end = blockEnd(s.end) // the disk's last block may be short
			held = append(held, s)
		}
	}
	return held, zeroed
}

var _ disk.Device = (*Overlay)(nil)
