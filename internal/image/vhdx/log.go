package vhdx

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"sort"

	"holdfast/internal/disk"
)

// The log is a ring of sectors of 4 KiB. An entry is
//
//	header and descriptors │ further sectors of descriptors │ a sector of data for each data descriptor
//
// and may go on at the ring's beginning. The first bytes of a sector tell what
// it is, so an entry never contains the first sector of another: valid entries
// are disjoint, each is summed once, and they form chains, each entry followed
// in the ring by the one of the next sequence number. Finding them takes time
// in proportion to the log, whatever is in it.
const (
	logSector   = 4 * kib
	entryHeader = 64
	descLen     = 32

	// maxChanges bounds the descriptors that are replayed: as many as the
	// largest log has sectors. Each takes about 100 bytes of memory.
	maxChanges = maxLog / logSector
	// replayFrom is where what is changed by the log can lie: the file's mark
	// and its headers are never logged.
	replayFrom = regionOff1
)

// ring reads the log of a file.
type ring struct {
	d    disk.Reader
	off  int64 // of the log in the file
	size int64
	guid guid // of the entries that count
}

// entry is the header of a log entry. Offsets are in the ring.
type entry struct {
	at, n   int64
	seq     uint64
	tail    int64
	count   int64  // descriptors
	flushed uint64 // length of the file that was on the disk for sure
	last    uint64 // length of the file that is needed
	sum     uint32
	ok      bool
}

// change is what one descriptor does to [off, end) of the file.
type change struct {
	off, end int64
	data     int64 // offset in the ring of the sector with the bytes, -1 for zeros
	lead     [8]byte
	trail    [4]byte
}

// read fills p from the ring, around its end if need be.
func (r *ring) read(ctx context.Context, p []byte, at int64) error {
	n := min(int64(len(p)), r.size-at)
	if err := r.d.ReadAt(ctx, p[:n], r.off+at); err != nil {
		return err
	}
	if n < int64(len(p)) {
		return r.d.ReadAt(ctx, p[n:], r.off)
	}
	return nil
}

// candidates lists the sectors that begin like an entry, in order; those that
// cannot be one of ours have count -1.
func (r *ring) candidates(ctx context.Context) ([]entry, error) {
	var list []entry
	buf := make([]byte, min(r.size, mib))
	for e, err := range disk.Align(r.d.Extents(ctx, r.off, r.size), logSector, r.d.Size()) {
		if err != nil {
			return nil, err
		}
		if e.Zero {
			continue
		}
		for off := e.Off; off < min(e.End(), r.off+r.size); off += int64(len(buf)) {
			b := buf[:min(int64(len(buf)), e.End()-off, r.off+r.size-off)]
			if err := r.d.ReadAt(ctx, b, off); err != nil {
				return nil, err
			}
			for i := 0; i+logSector <= len(b); i += logSector {
				if string(b[i:i+4]) == "loge" {
					list = append(list, r.parse(b[i:], off-r.off+int64(i)))
				}
			}
		}
	}
	return list, nil
}

// parse reads an entry's header.
func (r *ring) parse(b []byte, at int64) entry {
	le := binary.LittleEndian
	e := entry{
		at: at, sum: le.Uint32(b[4:]), n: int64(le.Uint32(b[8:])), tail: int64(le.Uint32(b[12:])), seq: le.Uint64(b[16:]),
		count: int64(le.Uint32(b[24:])), flushed: le.Uint64(b[48:]), last: le.Uint64(b[56:]),
	}
	if guid(b[32:48]) != r.guid || e.n < logSector || e.n%logSector != 0 || e.n >= r.size ||
		e.tail%logSector != 0 || e.tail >= r.size || e.seq == 0 || e.descBytes() > e.n {
		e.count = -1
	}
	return e
}

// descBytes is the length of header and descriptors, in whole sectors.
func (e entry) descBytes() int64 {
	return (entryHeader + descLen*e.count + logSector - 1) / logSector * logSector
}

// walk reads an entry whole and reports whether it is valid. visit, unless
// nil, is called for each descriptor, also of an entry that proves invalid.
func (r *ring) walk(ctx context.Context, e entry, visit func(change) error) (bool, error) {
	buf := make([]byte, min(e.n, 256*kib))
	crc := uint32(0)
	left, data := e.count, int64(0) // descriptors to read, data sectors promised
	for done := int64(0); done < e.n; done += int64(len(buf)) {
		buf = buf[:min(int64(len(buf)), e.n-done)]
		if err := r.read(ctx, buf, (e.at+done)%r.size); err != nil {
			return false, err
		}
		for i := 0; i < len(buf); i += logSector {
			s, at := buf[i:i+logSector], done+int64(i)
			if at >= e.descBytes() {
				if !e.isData(s) {
					return false, nil
				}
				continue
			}
			if at == 0 {
				clear(s[4:8]) // the checksum itself
				s = s[entryHeader:]
			}
			for ; left > 0 && len(s) > 0; s, left = s[descLen:], left-1 {
				c, ok := e.descriptor(s, r.size, data)
				if !ok {
					return false, nil
				}
				if c.data >= 0 {
					data++
				}
				if visit != nil {
					if err := visit(c); err != nil {
						return false, err
					}
				}
			}
		}
		crc = crc32.Update(crc, castagnoli, buf)
	}
	return e.n == e.descBytes()+data*logSector && crc == e.sum, nil
}

// isData reports whether s is a data sector of the entry.
func (e entry) isData(s []byte) bool {
	le := binary.LittleEndian
	return string(s[:4]) == "data" && le.Uint32(s[4:]) == uint32(e.seq>>32) && le.Uint32(s[logSector-4:]) == uint32(e.seq)
}

// descriptor reads one descriptor; data is how many data descriptors came
// before it.
func (e entry) descriptor(s []byte, ring, data int64) (change, bool) {
	le := binary.LittleEndian
	off := le.Uint64(s[16:])
	c := change{off: int64(off), data: -1}
	n := uint64(logSector)
	switch string(s[:4]) {
	case "desc":
		c.data = (e.at + e.descBytes() + data*logSector) % ring
		c.trail, c.lead = [4]byte(s[4:8]), [8]byte(s[8:16])
	case "zero":
		n = le.Uint64(s[8:])
	default:
		return c, false
	}
	if le.Uint64(s[24:]) != e.seq || off%logSector != 0 || n%logSector != 0 {
		return c, false
	}
	c.end = int64(off + n)
	if off > maxFile || n > maxFile {
		c.end = -1 // to be refused if it counts
	}
	return c, true
}

// active finds the entries to replay, the oldest first.
func (r *ring) active(ctx context.Context) ([]entry, error) {
	list, err := r.candidates(ctx)
	if err != nil {
		return nil, err
	}
	place := map[int64]int{} // of valid entries, by offset
	for i := range list {
		e := &list[i]
		next := list[(i+1)%len(list)].at
		room := (next - e.at + r.size) % r.size // up to the next entry's first sector
		if e.count < 0 || room > 0 && e.n > room {
			continue
		}
		if e.ok, err = r.walk(ctx, *e, nil); err != nil {
			return nil, err
		}
		if e.ok {
			place[e.at] = i
		}
	}
	// follows gives the entry after i in its chain.
	follows := func(i int) (int, bool) {
		j, ok := place[(list[i].at+list[i].n)%r.size]
		return j, ok && list[i].seq+1 == list[j].seq
	}
	first := map[int]bool{} // entries that follow none
	for _, i := range place {
		first[i] = true
	}
	for _, i := range place {
		if j, ok := follows(i); ok {
			delete(first, j)
		}
	}
	var best []entry
	for i := range list {
		if !first[i] {
			continue
		}
		chain := []entry{list[i]}
		for j, ok := follows(i); ok; j, ok = follows(j) {
			chain = append(chain, list[j])
		}
		head := chain[len(chain)-1]
		from := sort.Search(len(chain), func(k int) bool {
			return (chain[k].at-chain[0].at+r.size)%r.size >= (head.tail-chain[0].at+r.size)%r.size
		})
		if from == len(chain) || chain[from].at != head.tail {
			continue // its oldest entry is not there
		}
		if best == nil || head.seq > best[len(best)-1].seq {
			best = chain[from:]
		}
	}
	return best, nil
}

// replay returns the file as it is with what its log says done to it, in
// memory. The result owns d.
func replay(ctx context.Context, d disk.Reader, h *header) (*replayed, error) {
	r := &ring{d: d, off: h.logOff, size: h.logLen, guid: h.logGUID}
	entries, err := r.active(ctx)
	if err != nil {
		return nil, fmt.Errorf("read log: %w", err)
	}
	if len(entries) == 0 {
		return nil, bad("the log at offset %d is said to hold changes, but has no valid entries", h.logOff)
	}
	head := entries[len(entries)-1]
	switch {
	case head.flushed > uint64(d.Size()):
		return nil, bad("the file has %d bytes, but had at least %d when its log was written: it is truncated", d.Size(), head.flushed)
	case head.last > maxFile:
		return nil, bad("log entry %d: the file is to have %d bytes", head.seq, head.last)
	}
	size := max(d.Size(), int64(head.last))
	var changes []change
	for _, e := range entries {
		ok, err := r.walk(ctx, e, func(c change) error {
			switch {
			case c.end < c.off || c.off < replayFrom || c.end > maxFile || c.off < h.logOff+h.logLen && c.end > h.logOff && c.off < c.end:
				return bad("log entry %d: it changes the file from offset %d to %d, which cannot be", e.seq, c.off, c.end)
			case len(changes) == maxChanges:
				return unsupported("the log has more than %d changes", maxChanges)
			}
			size = max(size, c.end)
			if c.off < c.end {
				changes = append(changes, c)
			}
			return nil
		})
		if err == nil && !ok {
			err = bad("log entry %d changed while it was read: is the file in use?", e.seq)
		}
		if err != nil {
			return nil, fmt.Errorf("replay log at offset %d: %w", h.logOff+e.at, err)
		}
	}
	return &replayed{file: d, ring: r, size: size, changes: settle(changes), entries: len(entries)}, nil
}
