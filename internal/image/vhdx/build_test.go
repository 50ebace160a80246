package vhdx

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
	"unicode/utf16"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// build writes VHDX files of every kind in memory, with a model of what their
// disks hold. Its layout is not that of views: metadata, BAT, log, and blocks
// in the order of their writing.
type build struct {
	t     testing.TB
	rnd   *rand.Rand
	f     *disk.Mem // the file, longer than it will be
	next  int64     // its end
	g     geometry
	model *disk.Mem
	id    guid // of the data

	metadata, bat, log int64
	coarse             bool // sectors come in groups of 8, as Windows has them
}

// long is for tests that read many images in one goroutine: the race detector
// finds nothing in them, and takes minutes.
func long(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("it is left out of short runs")
	}
}

type buildOptions struct {
	size, block, sector int64
	flags               uint32
	parent              *build
	locator             [][2]string // nil: as Hyper-V has it for parent
	parentName          string
}

func newBuild(t testing.TB, rnd *rand.Rand, o buildOptions) *build {
	t.Helper()
	b := &build{t: t, rnd: rnd, f: disk.NewMem(64 << 30), model: disk.NewMem(o.size)}
	b.g = newGeometry(&metadata{size: o.size, block: o.block, logical: o.sector, hasParent: o.parent != nil})
	disktest.Fill(rnd, b.id[:])
	batLen := up(b.g.entries()*8, mib)
	b.metadata, b.bat, b.log = mib, 2*mib, 2*mib+batLen
	b.next = b.log + mib
	if o.parent != nil {
		o.flags |= paramParent
		b.inherit(o.parent)
		if o.locator == nil {
			o.locator = [][2]string{{keyLinkage, "{" + o.parent.id.String() + "}"}, {keyAbsolute, `C:\VMs\` + o.parentName}, {keyRelative, `.\` + o.parentName},
				{keyVolume, `\\?\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\VMs\` + o.parentName}, {keyLinkage2, "{00000000-0000-0000-0000-000000000000}"}}
		}
	}
	b.put(0, mark())
	for i, off := range []int64{headerOff1, headerOff2} {
		h := make([]byte, headerLen)
		copy(h, "head")
		binary.LittleEndian.PutUint64(h[8:], uint64(7+i))
		copy(h[16:], b.random(16)) // 7-Zip takes files of one id for one
		copy(h[32:], b.id[:])
		binary.LittleEndian.PutUint16(h[66:], 1)
		binary.LittleEndian.PutUint32(h[68:], mib)
		binary.LittleEndian.PutUint64(h[72:], uint64(b.log))
		b.put(off, sign(h))
	}
	r := make([]byte, regionLen)
	copy(r, "regi")
	binary.LittleEndian.PutUint32(r[8:], 2)
	copy(r[16:], regionMetadata[:])
	binary.LittleEndian.PutUint64(r[32:], uint64(b.metadata))
	binary.LittleEndian.PutUint32(r[40:], mib)
	copy(r[48:], regionBAT[:])
	binary.LittleEndian.PutUint64(r[64:], uint64(b.bat))
	binary.LittleEndian.PutUint32(r[72:], uint32(batLen))
	b.put(regionOff1, sign(r))
	b.put(regionOff2, r)
	b.putMetadata(o)
	return b
}

// inherit begins the model with the parent's.
func (b *build) inherit(p *build) {
	for e, err := range p.model.Extents(b.t.Context(), 0, min(p.g.size, b.g.size)) {
		if err == nil && !e.Zero {
			q := make([]byte, e.Len)
			if err = p.model.ReadAt(b.t.Context(), q, e.Off); err == nil {
				err = b.model.WriteAt(b.t.Context(), q, e.Off)
			}
		}
		if err != nil {
			b.t.Fatal(err)
		}
	}
}

func (b *build) putMetadata(o buildOptions) {
	le := binary.LittleEndian
	m, at := make([]byte, mib), metadataTable
	copy(m, "metadata")
	n := 0
	add := func(id guid, value []byte) {
		e := m[32+32*n:]
		copy(e, id[:])
		le.PutUint32(e[16:], uint32(at))
		le.PutUint32(e[20:], uint32(len(value)))
		le.PutUint32(e[24:], items[id].flags)
		at += copy(m[at:], value)
		n++
		le.PutUint16(m[10:], uint16(n))
	}
	add(itemDiskID, []byte("0123456789abcdef"))
	if o.locator != nil {
		add(itemLocator, locatorBytes(o.locator))
	}
	add(itemCHS, make([]byte, 8)) // known, and not needed
	add(itemLogical, le.AppendUint32(nil, uint32(o.sector)))
	add(itemPhysical, le.AppendUint32(nil, 4096))
	add(itemSize, le.AppendUint64(nil, uint64(o.size)))
	add(itemParams, le.AppendUint32(le.AppendUint32(nil, uint32(o.block)), o.flags))
	b.put(b.metadata, m)
}

// locatorBytes is a parent locator with these keys and values.
func locatorBytes(pairs [][2]string) []byte {
	le := binary.LittleEndian
	l := append(slices.Clone(locatorVHDX[:]), 0, 0)
	l = le.AppendUint16(l, uint16(len(pairs)))
	var texts []byte
	base := len(l) + locatorEntry*len(pairs)
	text := func(s string) (off, n int) {
		off = base + len(texts)
		for _, c := range utf16.Encode([]rune(s)) {
			texts = le.AppendUint16(texts, c)
		}
		return off, base + len(texts) - off
	}
	for _, p := range pairs {
		k, kn := text(p[0])
		v, vn := text(p[1])
		l = le.AppendUint32(le.AppendUint32(l, uint32(k)), uint32(v))
		l = le.AppendUint16(le.AppendUint16(l, uint16(kn)), uint16(vn))
	}
	return append(l, texts...)
}

func (b *build) put(off int64, p []byte) {
	b.t.Helper()
	if err := b.f.WriteAt(b.t.Context(), p, off); err != nil {
		b.t.Fatal(err)
	}
}

func (b *build) get(off, n int64) []byte {
	b.t.Helper()
	p := make([]byte, n)
	if err := b.f.ReadAt(b.t.Context(), p, off); err != nil {
		b.t.Fatal(err)
	}
	return p
}

func (b *build) put32(off int64, v uint32) { b.put(off, binary.LittleEndian.AppendUint32(nil, v)) }
func (b *build) put64(off int64, v uint64) { b.put(off, binary.LittleEndian.AppendUint64(nil, v)) }

// seal mends the checksums of headers and region tables.
func (b *build) seal() {
	for _, x := range [][2]int64{{headerOff1, headerLen}, {headerOff2, headerLen}, {regionOff1, regionLen}, {regionOff2, regionLen}} {
		b.put(x[0], sign(b.get(x[0], x[1])))
	}
}

// both writes to both headers and mends their checksums.
func (b *build) both(at int64, p []byte) {
	b.put(headerOff1+at, p)
	b.put(headerOff2+at, p)
	b.seal()
}

func (b *build) setEntry(index int64, e uint64) { b.put64(b.bat+index*8, e) }
func (b *build) setBlock(block int64, e uint64) { b.setEntry(b.g.index(block), e) }
func (b *build) entryOf(block int64) uint64     { return b.entryAt(b.g.index(block)) }
func (b *build) entryAt(index int64) uint64 {
	return binary.LittleEndian.Uint64(b.get(b.bat+index*8, 8))
}
func (b *build) alloc(n int64) (off int64) { off, b.next = b.next, b.next+n; return off }
func (b *build) random(n int64) (p []byte) { p = make([]byte, n); disktest.Fill(b.rnd, p); return p }
func (b *build) zeroModel(block int64)     { b.modelAt(block, 0, make([]byte, b.g.inside(block))) }
func (b *build) modelAt(block, in int64, p []byte) {
	if err := b.model.WriteAt(b.t.Context(), p, block*b.g.block+in); err != nil {
		b.t.Fatal(err)
	}
}

// block gives a block a state, with data where the state has any. anchored
// puts an offset into entries where it means nothing.
func (b *build) block(block int64, state uint64, anchored bool) {
	anchor := uint64(0)
	if anchored {
		anchor = uint64(b.bat)
	}
	g := &b.g
	switch state {
	case blockNotPresent:
		b.setBlock(block, anchor)
	case blockPresent:
		off := b.alloc(g.block)
		p := b.random(min(g.inside(block), 200<<10)) // the rest are zeros
		b.put(off, p)
		b.zeroModel(block)
		b.modelAt(block, 0, p)
		b.setBlock(block, uint64(off)|blockPresent)
	case blockPartial:
		b.partial(block)
	default:
		if state == blockZero {
			anchor = 0
		}
		b.setBlock(block, anchor|state)
		b.zeroModel(block)
	}
}

// partial has random runs of sectors in the file; elsewhere the block is junk
// that must not be read.
func (b *build) partial(block int64) {
	g := &b.g
	index := g.bitmapIndex(block / g.ratio)
	if b.entryAt(index) == 0 {
		at := b.alloc(bitmapLen)
		b.put(at, b.random(bitmapLen)) // what is of blocks that are not partial means nothing
		b.setEntry(index, uint64(at)|blockPresent)
	}
	bitmap := int64(b.entryAt(index) & offsetMask)
	off := b.alloc(g.block)
	data := b.random(g.block)
	b.put(off, data)
	sectors := g.block / g.sector
	bits := make([]byte, sectors/8)
	for s := int64(0); s < sectors; {
		n := 1 + b.rnd.Int64N(1+b.rnd.Int64N(900))
		if b.coarse {
			n = up(n, 8)
		}
		n = min(n, sectors-s)
		if b.rnd.IntN(2) == 0 {
			for i := s; i < s+n; i++ {
				bits[i/8] |= 1 << (i % 8)
			}
			lo, hi := s*g.sector, min((s+n)*g.sector, g.inside(block))
			if lo < hi {
				b.modelAt(block, lo, data[lo:hi])
			}
		}
		s += n
	}
	b.put(bitmap+block%g.ratio*sectors/8, bits)
	b.setBlock(block, uint64(off)|blockPartial)
}

// file is what was built.
func (b *build) file() *disk.Mem { return b.cut(b.next) }

// cut is its first n bytes.
func (b *build) cut(n int64) *disk.Mem {
	b.t.Helper()
	m := disk.NewMem(n)
	for e, err := range b.f.Extents(b.t.Context(), 0, n) {
		if err == nil && !e.Zero {
			err = m.WriteAt(b.t.Context(), b.get(e.Off, e.Len), e.Off)
		}
		if err != nil {
			b.t.Fatal(err)
		}
	}
	return m
}

// logChange is a page of the file, or zeros.
type logChange struct {
	off   int64
	page  []byte // 4 KiB
	zeros int64  // bytes, if page is nil
}

// logEntry is an entry of the log.
type logEntry struct {
	seq           uint64
	tail          int64
	guid          guid
	flushed, last int64
	changes       []logChange
}

func (e logEntry) bytes() []byte {
	le := binary.LittleEndian
	b := make([]byte, up(entryHeader+descLen*int64(len(e.changes)), logSector))
	copy(b, "loge")
	le.PutUint32(b[12:], uint32(e.tail))
	le.PutUint64(b[16:], e.seq)
	le.PutUint32(b[24:], uint32(len(e.changes)))
	copy(b[32:], e.guid[:])
	le.PutUint64(b[48:], uint64(e.flushed))
	le.PutUint64(b[56:], uint64(e.last))
	for i, c := range e.changes {
		d := b[entryHeader+descLen*i:]
		le.PutUint64(d[16:], uint64(c.off))
		le.PutUint64(d[24:], e.seq)
		if c.page == nil {
			copy(d, "zero")
			le.PutUint64(d[8:], uint64(c.zeros))
			continue
		}
		copy(d, "desc")
		copy(d[4:8], c.page[logSector-4:])
		copy(d[8:16], c.page[:8])
		s := slices.Clone(c.page)
		copy(s, "data")
		le.PutUint32(s[4:], uint32(e.seq>>32))
		le.PutUint32(s[logSector-4:], uint32(e.seq))
		b = append(b, s...)
	}
	le.PutUint32(b[8:], uint32(len(b)))
	return sign(b)
}

// putLog writes an entry into the ring at an offset and returns the one after
// it.
func (b *build) putLog(at int64, p []byte) int64 {
	n := min(int64(len(p)), mib-at)
	b.put(b.log+at, p[:n])
	b.put(b.log, p[n:])
	return (at + int64(len(p))) % mib
}
