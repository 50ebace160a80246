package overlay

import (
	"fmt"
	"math/bits"
)

const (
	blockSize   = 4096
	clusterSize = 64 << 10
	leafLen     = 1024 // clusters of a leaf
	leafSize    = leafLen * clusterSize
	maxSize     = 1 << 47 // of a disk, 128 TiB, so that counts of clusters fit 32 bits
	full        = 0xffff  // all blocks of a cluster
)

// state of a block.
type state uint8

const (
	absent state = iota // the base has it
	data                // the data file has it
	zero
)

// entry is what is known of one cluster.
type entry struct {
	slot       uint32 // its place in the data file, plus one; 0 none
	data, zero uint16 // its blocks in these states; disjoint
	stamp      uint32 // the mark at its last write
}

// leaf holds the entries of 1024 clusters. Without entries all are absent, or
// zero.
type leaf struct {
	entries *[leafLen]entry
	zero    bool
	stamp   uint32 // of all entries when zero
}

// blockMap is the map of a disk. It does no locking.
type blockMap struct {
	size   int64
	leaves []leaf
	next   uint32 // the first slot that was never given
	used   int64  // blocks in the data file
}

func newBlockMap(size int64) *blockMap {
	return &blockMap{size: size, leaves: make([]leaf, (size+leafSize-1)/leafSize)}
}

func (m *blockMap) clusters() int64 { return (m.size + clusterSize - 1) / clusterSize }

// get returns a cluster's entry.
func (m *blockMap) get(c int64) entry {
	l := &m.leaves[c/leafLen]
	switch {
	case l.entries != nil:
		return l.entries[c%leafLen]
	case l.zero:
		return entry{zero: full, stamp: l.stamp}
	}
	return entry{}
}

// at returns a cluster's entry to be changed.
func (m *blockMap) at(c int64) *entry {
	l := &m.leaves[c/leafLen]
	if l.entries == nil {
		l.entries = new([leafLen]entry)
		if l.zero {
			// The last leaf may have fewer clusters than it has room for.
			for i := range min(leafLen, m.clusters()-c/leafLen*leafLen) {
				l.entries[i] = entry{zero: full, stamp: l.stamp}
			}
			l.zero = false
		}
	}
	return &l.entries[c%leafLen]
}

// reserve gives the clusters from first to last slots, if they have none, and
// appends their entries to list.
func (m *blockMap) reserve(list []entry, first, last int64) []entry {
	for c := first; c <= last; c++ {
		e := m.at(c)
		if e.slot == 0 {
			m.next++
			e.slot = m.next
		}
		list = append(list, *e)
	}
	return list
}

// set applies what a map record says of one cluster.
func (m *blockMap) set(x mapEntry, stamp uint32) {
	e := m.at(int64(x.cluster))
	if x.slot != noSlot {
		e.slot = x.slot + 1
	}
	m.used += int64(bits.OnesCount16(x.data&^e.data) - bits.OnesCount16(x.zero&e.data))
	e.data = e.data&^x.zero | x.data
	e.zero = e.zero&^x.data | x.zero
	e.stamp = stamp
}

// setZero makes clusters zero.
func (m *blockMap) setZero(first, n int64, stamp uint32) {
	for c := first; c < first+n; {
		l := &m.leaves[c/leafLen]
		whole := c%leafLen == 0 && (first+n-c >= leafLen || first+n == m.clusters())
		if whole && l.entries == nil {
			*l = leaf{zero: true, stamp: stamp}
			c += leafLen
			continue
		}
		m.set(mapEntry{cluster: uint32(c), slot: noSlot, zero: full}, stamp)
		c++
	}
}

// touch stamps clusters that were written in place.
func (m *blockMap) touch(first, last int64, stamp uint32) {
	for c := first; c <= last; c++ {
		m.at(c).stamp = stamp
	}
}

// check tests a map that was read against the length of the data file, and
// sets next.
func (m *blockMap) check(dataLen int64) error {
	slots := max(dataLen/clusterSize, 0) // slot n begins at (n+1)*clusterSize
	seen := make([]uint64, slots/64+1)
	for i := range m.leaves {
		if m.leaves[i].entries == nil {
			continue
		}
		for j := range m.leaves[i].entries {
			e := &m.leaves[i].entries[j]
			if e.data == 0 {
				e.slot = 0 // nothing is there: what is written next may go anywhere
				continue
			}
			last := int64(15 - bits.LeadingZeros16(e.data))
			if e.slot == 0 || place(e.slot)+last*blockSize >= dataLen {
				return fmt.Errorf("%w: data file of %d bytes ends before cluster %d", ErrDamaged, dataLen, i*leafLen+j)
			}
			s := e.slot - 1
			if seen[s/64]>>(s%64)&1 == 1 {
				return fmt.Errorf("%w: two clusters in slot %d", ErrDamaged, s)
			}
			seen[s/64] |= 1 << (s % 64)
			m.next = max(m.next, e.slot)
		}
	}
	return nil
}

// place is where an entry's slot begins in the data file.
func place(slot uint32) int64 { return int64(slot) * clusterSize }

// segment is a range of one state, and of one piece in the data file.
type segment struct {
	off, end int64
	state    state
	place    int64 // in the data file
}

// all as since takes every cluster.
const all int64 = -1

// segments appends to list, up to a length of limit, the segments that cover
// [off, end) from off on. Clusters last written at the mark since or before
// count as absent.
func (m *blockMap) segments(list []segment, off, end, since int64, limit int) []segment {
	add := func(to int64, st state, at int64) bool {
		to = min(to, end)
		if n := len(list); n > 0 && list[n-1].state == st && list[n-1].end == off &&
			(st != data || list[n-1].place+off-list[n-1].off == at) {
			list[n-1].end = to
		} else if n == limit {
			return false
		} else {
			list = append(list, segment{off, to, st, at})
		}
		off = to
		return true
	}
	for off < end {
		l := &m.leaves[off/leafSize]
		if l.entries == nil {
			st := absent
			if l.zero && int64(l.stamp) > since {
				st = zero
			}
			if !add((off/leafSize+1)*leafSize, st, 0) {
				return list
			}
			continue
		}
		e := l.entries[off/clusterSize%leafLen]
		if int64(e.stamp) <= since {
			e = entry{}
		}
		st, to := e.run(off % clusterSize / blockSize)
		if !add(off-off%clusterSize+to*blockSize, st, place(e.slot)+off%clusterSize) {
			return list
		}
	}
	return list
}

// run tells block i's state, and up to which block it holds.
func (e entry) run(i int64) (st state, to int64) {
	switch {
	case e.data>>i&1 == 1:
		return data, i + int64(bits.TrailingZeros16(^(e.data >> i)))
	case e.zero>>i&1 == 1:
		return zero, i + int64(bits.TrailingZeros16(^(e.zero >> i)))
	}
	return absent, min(16, i+int64(bits.TrailingZeros16((e.data|e.zero)>>i)))
}

// blocks is the mask of the cluster's blocks from the one that holds off to the
// one that ends at end, or holds it; both relative to the cluster.
func blocks(off, end int64) uint16 {
	lo, hi := off/blockSize, (end+blockSize-1)/blockSize
	return uint16(1<<hi - 1<<lo)
}
