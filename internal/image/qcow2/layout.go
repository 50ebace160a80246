package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"
)

// layout is where the tables of a new image lie; all counts and places are
// clusters. Refcount block k counts the clusters from k*perBlock on. The
// blocks that count the tables lie behind the header, each further one is the
// first of the clusters that it counts: so the place of every block is
// known beforehand, and the refcount table is written whole at creation.
type layout struct {
	size     int64 // of the disk, bytes, whole sectors
	bits     uint  // of the cluster size
	entries  int64 // per L2 table
	perBlock int64 // clusters counted by a refcount block

	blocks  int64 // refcount blocks behind the header
	refs    int64 // place of the refcount table
	refsLen int64
	l1      int64 // place of the L1 table
	l1Count int64 // entries
	first   int64 // place of the first cluster behind the tables

	compression uint8
}

func newLayout(size, cluster int64) (layout, error) { return newLayoutWith(size, cluster, 0) }

// newPackedLayout is for an image of compressed clusters, which may leave some
// of the file unused: less than a cluster in each region, and at each refcount
// block.
func newPackedLayout(size, cluster int64, kind uint8) (layout, error) {
	guest := up(max(size, 0), max(cluster, 1))
	l, err := newLayoutWith(size, cluster, guest/(packRegion/2)+guest/64+2*packRegion)
	l.compression = kind
	return l, err
}

// newLayoutWith has refcounts for some clusters more than the disk needs.
func newLayoutWith(size, cluster, more int64) (layout, error) {
	if cluster < 1<<minClusterBits || cluster > 1<<maxClusterBits || cluster&(cluster-1) != 0 {
		return layout{}, fmt.Errorf("a cluster size of %d bytes is not a power of two from 512 to 2 MiB", cluster)
	}
	if size < 0 || size > maxSize {
		return layout{}, fmt.Errorf("a disk of %d bytes does not fit into a qcow2 image", size)
	}
	l := layout{size: (size + 511) &^ 511, bits: uint(bits.TrailingZeros64(uint64(cluster))), entries: cluster / 8, perBlock: cluster / 2}
	guest := up(l.size, cluster)
	l.l1Count = up(guest, l.entries)
	l1Len := up(l.l1Count*8, cluster)
	// The most clusters that the file can have, refcounts and all; a little
	// more does no harm, and ends the search for a table that counts itself.
	most := 1 + l1Len + guest + l.l1Count + more
	most += most/l.perBlock + 1
	for l.refsLen = 1; ; {
		need := up(up(most+l.refsLen+l.refsLen*cluster/8, l.perBlock)*8, cluster)
		if need <= l.refsLen {
			break
		}
		l.refsLen = need
	}
	if l.l1Count*8 > maxL1 || l.refsLen*cluster > maxRefs || most > 1<<32-1 {
		return layout{}, fmt.Errorf("a disk of %d bytes is too large for clusters of %d bytes", size, cluster)
	}
	for l.blocks = 1; ; l.blocks++ {
		l.refs = 1 + l.blocks
		l.l1 = l.refs + l.refsLen
		l.first = l.l1 + l1Len
		if l.first <= l.blocks*l.perBlock {
			return l, nil
		}
	}
}

func up(n, unit int64) int64 { return (n + unit - 1) / unit }

// block is the place of refcount block k.
func (l layout) block(k int64) int64 {
	if k < l.blocks {
		return 1 + k
	}
	return k * l.perBlock
}

// isRefs reports whether a cluster behind the tables is a refcount block.
func (l layout) isRefs(c int64) bool { return c%l.perBlock == 0 && c >= l.blocks*l.perBlock }

// nextRefs is the first cluster from c on that is a refcount block behind the
// tables.
func (l layout) nextRefs(c int64) int64 { return max(up(c, l.perBlock), l.blocks) * l.perBlock }

// capacity is how many clusters the refcount table can count.
func (l layout) capacity() int64 { return l.refsLen << l.bits / 8 * l.perBlock }

// header is the first cluster.
func (l layout) header(backing, format string) []byte {
	length := v3Length
	if l.compression != compressZlib {
		length += 8
	}
	b := make([]byte, length, 1<<l.bits)
	copy(b, magic)
	be := binary.BigEndian
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], uint32(l.bits))
	be.PutUint64(b[24:], uint64(l.size))
	be.PutUint32(b[36:], uint32(l.l1Count))
	be.PutUint64(b[40:], uint64(l.l1)<<l.bits)
	be.PutUint64(b[48:], uint64(l.refs)<<l.bits)
	be.PutUint32(b[56:], uint32(l.refsLen))
	be.PutUint32(b[96:], 4) // refcounts of 1<<4 bits
	be.PutUint32(b[100:], uint32(length))
	if l.compression != compressZlib {
		be.PutUint64(b[72:], bitCompression)
		b[104] = l.compression
	}
	if backing != "" {
		b = be.AppendUint32(b, extBackingFormat)
		b = be.AppendUint32(b, uint32(len(format)))
		b = append(b, format...)
		b = append(b, make([]byte, -len(b)&7)...)
	}
	b = append(b, make([]byte, 8)...) // the end of the extensions
	if backing != "" {
		be.PutUint64(b[8:], uint64(len(b)))
		be.PutUint32(b[16:], uint32(len(backing)))
		b = append(b, backing...)
	}
	return b
}

// writeEmpty makes a new file an image that holds nothing, and durable.
func (l layout) writeEmpty(f file, backing, format string) error {
	// The L1 table is a hole: no entries.
	err := f.Truncate(l.first << l.bits)
	if err == nil {
		_, err = f.WriteAt(l.header(backing, format), 0)
	}
	if err == nil {
		err = l.writeRefs(f, 0, l.first, ones)
	}
	if err == nil {
		err = f.Sync()
	}
	return err
}

// ones are the refcounts of clusters that are all in use once.
func ones(b []byte, _ int64) {
	for ; len(b) > 0; b = b[2:] {
		binary.BigEndian.PutUint16(b, 1)
	}
}

// writeRefs counts the clusters from old to end, those before old being
// counted already: it writes the blocks that change, then, for new ones, their
// entries in the table. counts gives the refcounts from a cluster on, 16 bits
// each.
func (l layout) writeRefs(f file, old, end int64, counts func(b []byte, first int64)) error {
	buf := make([]byte, 1<<l.bits)
	var entry [8]byte
	for k := old / l.perBlock; k*l.perBlock < end; k++ {
		clear(buf)
		counts(buf[:min(l.perBlock, end-k*l.perBlock)*2], k*l.perBlock)
		at := l.block(k) << l.bits
		if _, err := f.WriteAt(buf, at); err != nil {
			return err
		}
		binary.BigEndian.PutUint64(entry[:], uint64(at))
		if _, err := f.WriteAt(entry[:], l.refs<<l.bits+k*8); err != nil {
			return err
		}
	}
	return nil
}
