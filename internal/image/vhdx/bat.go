package vhdx

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"

	"holdfast/internal/disk"
	"holdfast/internal/image"
)

// States of a payload block, in the low bits of its BAT entry.
const (
	blockNotPresent  = 0 // the parent's, or zeros
	blockUndefined   = 1 // zeros; its offset means nothing
	blockZero        = 2 // zeros
	blockUnmapped    = 3 // zeros; its offset means nothing
	blockOldUnmapped = 5 // written for 3 before the format was final
	blockPresent     = 6 // in the file
	blockPartial     = 7 // in part in the file, as the chunk's bitmap tells, in part the parent's

	stateMask    = 0x7
	reservedMask = 0xffff8 // bits 3 to 19
	offsetMask   = ^uint64(mib - 1)

	bitmapLen  = mib // bytes of a sector bitmap
	bitmapBits = bitmapLen * 8

	// batPiece is how much of the BAT is read at once by a scan.
	batPiece = 256 * kib
)

// geometry is how a disk is cut into blocks, and where the BAT has them. The
// payload entries of a chunk are followed by the entry of its sector bitmap.
type geometry struct {
	size   int64 // of the disk, bytes
	block  int64 // bytes
	sector int64 // bytes
	ratio  int64 // payload blocks in a chunk
	blocks int64 // payload blocks of the disk
	diff   bool  // with a parent
}

func newGeometry(m *metadata) geometry {
	g := geometry{size: m.size, block: m.block, sector: m.logical, diff: m.hasParent}
	g.ratio = bitmapBits * g.sector / g.block // 16 at least
	g.blocks = (g.size + g.block - 1) / g.block
	return g
}

// chunks is how many chunks the disk has, the last one perhaps in part.
func (g *geometry) chunks() int64 { return (g.blocks + g.ratio - 1) / g.ratio }

// entries is how many entries the BAT has.
func (g *geometry) entries() int64 {
	if g.diff {
		return g.chunks() * (g.ratio + 1)
	}
	return g.blocks + (g.blocks-1)/g.ratio
}

// index is the BAT entry of a payload block.
func (g *geometry) index(block int64) int64 { return block + block/g.ratio }

// bitmapIndex is the BAT entry of a chunk's sector bitmap.
func (g *geometry) bitmapIndex(chunk int64) int64 { return chunk*(g.ratio+1) + g.ratio }

// split tells whose entry it is: a chunk's bitmap, or a block of it.
func (g *geometry) split(index int64) (chunk, block int64, bitmap bool) {
	chunk, in := index/(g.ratio+1), index%(g.ratio+1)
	return chunk, chunk*g.ratio + in, in == g.ratio
}

// inside is how many of a block's bytes are the disk's.
func (g *geometry) inside(block int64) int64 { return min(g.block, g.size-block*g.block) }

// payload reads the entry of a block: its state, with what reads alike made
// one, and where it is if it is in the file.
func (g *geometry) payload(e uint64, block, fileSize int64) (state int, off int64, err error) {
	switch s := e & stateMask; s {
	case blockNotPresent:
		return blockNotPresent, 0, nil
	case blockUndefined, blockZero, blockUnmapped, blockOldUnmapped:
		return blockZero, 0, nil
	case blockPresent:
	case blockPartial:
		if !g.diff {
			return 0, 0, bad("block %d is partly the parent's (%#x), and there is no parent", block, e)
		}
	default:
		return 0, 0, bad("block %d has the state %d (%#x)", block, s, e)
	}
	// The last block may end with the disk.
	off, err = place(e, g.inside(block), fileSize)
	if err != nil {
		return 0, 0, fmt.Errorf("block %d: %w", block, err)
	}
	return int(e & stateMask), off, nil
}

// bitmap reads the entry of a chunk's sector bitmap.
func (g *geometry) bitmap(e uint64, chunk, fileSize int64) (present bool, off int64, err error) {
	switch s := e & stateMask; s {
	case blockNotPresent:
		return false, 0, nil
	case blockPresent, blockPartial:
	default:
		return false, 0, bad("the sector bitmap of chunk %d has the state %d (%#x)", chunk, s, e)
	}
	off, err = place(e, bitmapLen, fileSize)
	if err != nil {
		return false, 0, fmt.Errorf("the sector bitmap of chunk %d: %w", chunk, err)
	}
	return true, off, nil
}

// place is the offset that an entry names, where n bytes must be.
func place(e uint64, n, fileSize int64) (int64, error) {
	off := e & offsetMask
	switch {
	case off < headerArea:
		return 0, bad("its offset is %d", off)
	case off >= uint64(fileSize) || n > fileSize-int64(off):
		return 0, bad("%d bytes at offset %d lie beyond the file's end at %d: is the file truncated?", n, off, fileSize)
	case off > maxFile:
		return 0, unsupported("its offset %d is more than %d", off, int64(maxFile))
	}
	return int64(off), nil
}

// eachEntry calls visit for the BAT entries from first up to end that are not
// zero, in order. What are holes of the file is not read.
func (im *Image) eachEntry(ctx context.Context, first, end int64, visit func(index int64, e uint64) error) error {
	lo, hi := im.bat+first*8, im.bat+end*8
	buf := make([]byte, min(batPiece, hi-lo))
	ex := disk.Align(im.d.Extents(ctx, lo, hi-lo), 8, im.d.Size())
	for x, err := range disk.Clip(ex, lo, hi-lo) {
		for off := x.Off; err == nil && !x.Zero && off < x.End(); {
			b := buf[:min(int64(len(buf)), x.End()-off)]
			if err = im.d.ReadAt(ctx, b, off); err != nil {
				break
			}
			if disk.IsZero(b) {
				off += int64(len(b))
				continue
			}
			for ; len(b) > 0 && err == nil; b, off = b[8:], off+8 {
				if e := binary.LittleEndian.Uint64(b); e != 0 {
					err = visit((off-im.bat)/8, e)
				}
			}
		}
		if err != nil {
			return fmt.Errorf("BAT at offset %d: %w", im.bat, err)
		}
	}
	return nil
}

// usage tells which MiB of a file are in use: a bit each.
type usage struct {
	bits  []uint64
	named []span
}

func newUsage(fileSize int64, named []span) *usage {
	u := &usage{bits: make([]uint64, (min(fileSize, maxFile+maxBlock)/mib+64)/64), named: named}
	u.claim(0, headerArea)
	for _, s := range named {
		u.claim(s.off, s.n)
	}
	return u
}

// claim marks [off, off+n), which lies inside the file, as used and reports
// whether it was free.
func (u *usage) claim(off, n int64) bool {
	free := true
	for i, end := off/mib, min((off+n+mib-1)/mib, int64(len(u.bits))*64); i < end; {
		k := min(64-i%64, end-i)
		mask := (^uint64(0) >> (64 - k)) << (i % 64)
		w := &u.bits[i/64]
		free = free && *w&mask == 0
		*w |= mask
		i += k
	}
	return free
}

// used is how many MiB are.
func (u *usage) used() int64 {
	n := 0
	for _, w := range u.bits {
		n += bits.OnesCount64(w)
	}
	return int64(n)
}

// what says what else is at [off, off+n).
func (u *usage) what(off, n int64) string {
	for _, s := range u.named {
		if off < s.end() && s.off < off+n {
			return fmt.Sprintf("%s at %d", s.what, s.off)
		}
	}
	return "another block"
}

// oddity is something in the BAT that reading puts up with.
type oddity int

const (
	oddReserved oddity = iota // reserved bits are set
	oddOld                    // state 5
	oddTail                   // the file ends within the last block
	oddZero                   // an offset for zeros, which Windows refuses
	oddBeyond                 // an entry of a block beyond the disk's end
	oddities
)

var oddText = [oddities]string{
	oddReserved: "has reserved bits set",
	oddOld:      "has the state 5, which is taken for unmapped as before the format was final",
	oddTail:     "is of the last block, and the file ends within it",
	oddZero:     "gives an offset for a block of zeros, which Windows refuses to read",
	oddBeyond:   "is in use, though its block lies beyond the disk's end",
}

// scan checks the whole BAT: every entry, and that no two blocks or tables
// share a place. What is odd but readable is told to odd.
func (im *Image) scan(ctx context.Context, u *usage, odd func(kind oddity, index int64, e uint64)) error {
	g, size := &im.g, im.d.Size()
	partial := int64(-1) // the chunk with a partial block whose bitmap has not been seen
	missing := func() error {
		return bad("BAT at offset %d: chunk %d has blocks that are partly the parent's, and no sector bitmap", im.bat, partial)
	}
	err := im.eachEntry(ctx, 0, g.entries(), func(index int64, e uint64) error {
		chunk, block, bitmap := g.split(index)
		if partial >= 0 && index > g.bitmapIndex(partial) {
			return missing()
		}
		if e&reservedMask != 0 {
			odd(oddReserved, index, e)
		}
		var off, n int64
		switch {
		case bitmap:
			present, at, err := g.bitmap(e, chunk, size)
			if err != nil || !present {
				return atEntry(index, err)
			}
			off, n = at, bitmapLen
			if partial == chunk {
				partial = -1
			}
		case block >= g.blocks:
			odd(oddBeyond, index, e)
			return nil
		default:
			state, at, err := g.payload(e, block, size)
			if err != nil {
				return atEntry(index, err)
			}
			switch state {
			case blockPartial:
				partial = chunk
			case blockNotPresent, blockZero:
				im.oddZeros(index, e, odd)
				return nil
			}
			off, n = at, g.block
			if n > size-off {
				n = g.inside(block)
				odd(oddTail, index, e)
			}
		}
		if !u.claim(off, n) {
			return atEntry(index, bad("its %d bytes at offset %d overlap %s", n, off, u.what(off, n)))
		}
		return nil
	})
	if err == nil && partial >= 0 {
		err = missing()
	}
	return err
}

func (im *Image) oddZeros(index int64, e uint64, odd func(oddity, int64, uint64)) {
	switch {
	case e&stateMask == blockOldUnmapped:
		odd(oddOld, index, e)
	case e&stateMask == blockZero && e&offsetMask != 0:
		odd(oddZero, index, e)
	}
}

func atEntry(index int64, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("entry %d: %w", index, err)
}

// mapping is where the bytes at some offset of the disk are.
type mapping struct {
	n     int64 // bytes for which this holds
	state image.State
	host  int64 // offset in the file of the first byte, for Data
}

// lookup tells where the bytes at off are, for up to n bytes: as many as one
// slice of a table tells without a change.
func (im *Image) lookup(ctx context.Context, off, n int64) (mapping, error) {
	if err := ctx.Err(); err != nil {
		return mapping{}, err
	}
	g := &im.g
	first := off / g.block
	index := g.index(first)
	b, err := im.slice(ctx, im.bat+index*8, im.bat+min(g.entries(), g.bitmapIndex(first/g.ratio))*8)
	if err != nil {
		return mapping{}, fmt.Errorf("read BAT at offset %d: %w", im.bat, err)
	}
	var m mapping
	for block := first; m.n < n && len(b) >= 8 && block < g.blocks; block, b = block+1, b[8:] {
		at := off + m.n
		next, err := im.entry(ctx, binary.LittleEndian.Uint64(b), at, n-m.n)
		if err != nil && block > first {
			break // what came before is good; the error comes when it is asked for
		}
		if err != nil {
			return mapping{}, fmt.Errorf("BAT at offset %d, entry %d: %w", im.bat, index, err)
		}
		if block == first {
			m = next
		} else if m.state != next.state || m.state == image.Data && m.host+m.n != next.host {
			break
		} else {
			m.n += next.n
		}
		if (off+m.n)%g.block != 0 {
			break // of a partial block
		}
	}
	m.n = min(m.n, n)
	return m, nil
}

// entry reads one entry for the disk's bytes from off on: to the end of the
// block, or of its sectors of one state.
func (im *Image) entry(ctx context.Context, e uint64, off, n int64) (mapping, error) {
	g := &im.g
	block, in := off/g.block, off%g.block
	state, at, err := g.payload(e, block, im.d.Size())
	m := mapping{n: g.inside(block) - in}
	switch {
	case err != nil:
		return m, err
	case state == blockPresent:
		m.state, m.host = image.Data, at+in
	case state == blockPartial:
		m.n = min(m.n, n)
		m.host = at + in
		return m, im.sectors(ctx, &m, off)
	case state == blockNotPresent && g.diff:
		m.state = image.Absent
	default:
		m.state = image.Zero
	}
	return m, nil
}

// sectors sets state and length for the disk's bytes from off on, of a partial
// block, from the chunk's sector bitmap.
func (im *Image) sectors(ctx context.Context, m *mapping, off int64) error {
	g := &im.g
	chunk := off / (g.ratio * g.block)
	index := g.bitmapIndex(chunk)
	b, err := im.slice(ctx, im.bat+index*8, im.bat+(index+1)*8)
	if err != nil {
		return err
	}
	present, at, err := g.bitmap(binary.LittleEndian.Uint64(b), chunk, im.d.Size())
	if err != nil {
		return err
	}
	if !present {
		return bad("the block is partly the parent's, and chunk %d has no sector bitmap", chunk)
	}
	sector := off % (g.ratio * g.block) / g.sector // of the chunk
	if b, err = im.slice(ctx, at+sector/8, at+bitmapLen); err != nil {
		return fmt.Errorf("read sector bitmap at offset %d: %w", at, err)
	}
	want := (off%g.sector + m.n + g.sector - 1) / g.sector
	here, count := bitRun(b, sector%8, want)
	m.n = min(m.n, count*g.sector-off%g.sector)
	if here {
		m.state = image.Data
	} else {
		m.state, m.host = image.Absent, 0
	}
	return nil
}

// bitRun returns the bit at i of b, lowest bits first, and how many that
// follow are like it, itself included: at most limit, and as far as b reaches.
func bitRun(b []byte, i, limit int64) (bit bool, n int64) {
	first := b[i/8] >> (i % 8) & 1
	all := -first // every bit like the first
	limit = min(limit, int64(len(b))*8-i)
	for n < limit {
		at := i + n
		same := int64(bits.TrailingZeros8((b[at/8] ^ all) >> (at % 8)))
		if same < 8-at%8 {
			return first == 1, min(limit, n+same)
		}
		n += 8 - at%8
	}
	return first == 1, limit
}

// slice returns a table's bytes from offset at to the end of the slice that
// holds them, or of the table.
func (im *Image) slice(ctx context.Context, at, end int64) ([]byte, error) {
	base := at - at%sliceLen
	b, err := im.tables.Get(ctx, base)
	if err != nil {
		return nil, err
	}
	b = b[min(at-base, int64(len(b))):]
	b = b[:min(int64(len(b)), end-at)]
	if len(b) == 0 {
		return nil, bad("the table ends at offset %d with the file", at)
	}
	return b, nil
}

func (im *Image) loadSlice(ctx context.Context, base int64) ([]byte, error) {
	b := make([]byte, min(sliceLen, im.d.Size()-base))
	return b, im.d.ReadAt(ctx, b, base)
}
