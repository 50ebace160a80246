package vhdx

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf16"

	"holdfast/internal/disk"
	"holdfast/internal/image/internal/synth"
)

// Variant is which blocks of the disk a View's file holds.
type Variant int

const (
	// Dynamic holds the blocks that are not known to be zeros: for exports.
	Dynamic Variant = iota
	// Full is dynamic to its readers and holds all blocks: for a file that is
	// served, whose disk's zeros need not be known and which costs no memory.
	Full
	// Fixed holds all blocks and says so: a reader may write to them in place
	// and never needs to move one.
	Fixed
)

// ViewOptions of NewView. The zero value makes a new dynamic image.
type ViewOptions struct {
	Variant Variant
	// BlockSize in bytes, a power of two from 1 to 256 MiB. 0 chooses: 2 MiB,
	// and above 4 TiB as much more as keeps the table within 2 Mi blocks.
	//
	// Windows takes 32 MiB for dynamic disks and 2 MiB for fixed ones and
	// checkpoints. A guest's file system scatters its tables all over the disk,
	// and each touched block is in the file as a whole: zeros that cost nothing
	// only where the file may be sparse, which Hyper-V refuses on NTFS. With
	// 2 MiB such a file is little more than its data.
	BlockSize int64
	// LogicalSector is that of the disk in bytes, 512 or 4096; 0 means 512. It
	// must be that of the disk which the guest knew. The physical sector is
	// 4096 bytes, as Windows has it.
	LogicalSector int64
	// DiskID is the disk's SCSI identity, which the guest sees, and DataID what
	// children of the file would name: never the same for other content. Both
	// are in the order of their text. A zero one is made at random; with both
	// set, the same disk gives the same file byte for byte.
	DiskID, DataID [16]byte
}

const (
	// maxViewBlocks is how many blocks a View has unless told otherwise.
	maxViewBlocks = 2 << 20

	viewLog      = 1 * mib // places in the file
	viewMetadata = 2 * mib
	viewBAT      = 3 * mib

	creator = "Holdfast"
)

// NewView returns the VHDX file of disk d: computed as it is read, of known
// length, without a parent and with an empty log. The file's disk is d rounded
// up to whole sectors, the rest of the last one reads as zeros; it is 1 byte to
// 64 TiB long. Dynamic reads d's extents now and takes 12 bits of memory for
// each block; the others read nothing. The view owns d; on an error the caller
// still does.
func NewView(ctx context.Context, d disk.Reader, o ViewOptions) (disk.Reader, error) {
	if o.LogicalSector == 0 {
		o.LogicalSector = 512
	}
	if o.LogicalSector != 512 && o.LogicalSector != 4096 {
		return nil, fmt.Errorf("a VHDX image cannot have sectors of %d bytes", o.LogicalSector)
	}
	if d.Size() <= 0 || d.Size() > maxSize {
		return nil, fmt.Errorf("a disk of %d bytes does not fit into a VHDX image", d.Size())
	}
	size := (d.Size() + o.LogicalSector - 1) / o.LogicalSector * o.LogicalSector
	if o.BlockSize == 0 {
		for o.BlockSize = 2 * mib; size/o.BlockSize > maxViewBlocks; {
			o.BlockSize *= 2
		}
	}
	if o.BlockSize < minBlock || o.BlockSize > maxBlock || o.BlockSize&(o.BlockSize-1) != 0 {
		return nil, fmt.Errorf("a block size of %d bytes is not a power of two from 1 to 256 MiB", o.BlockSize)
	}
	if o.Variant < Dynamic || o.Variant > Fixed {
		return nil, errors.New("unknown variant of VHDX image")
	}
	for _, id := range []*[16]byte{&o.DiskID, &o.DataID} {
		if *id == ([16]byte{}) {
			rand.Read(id[:])
			*id = asUUID(*id)
		}
	}
	blocks := synth.All(size, o.BlockSize)
	if o.Variant == Dynamic {
		var err error
		if blocks, err = synth.Allocated(ctx, d, o.BlockSize); err != nil {
			return nil, fmt.Errorf("read the disk's extents: %w", err)
		}
	}
	v := view{o: o, blocks: blocks, g: newGeometry(&metadata{size: size, block: o.BlockSize, logical: o.LogicalSector})}
	return synth.New(d, v.layout()), nil
}

// view computes the tables of a file.
type view struct {
	o      ViewOptions
	g      geometry
	blocks *synth.Blocks
}

// batLen is the length of the BAT's region.
func (v *view) batLen() int64 { return (v.g.entries()*8 + mib - 1) / mib * mib }

// first is the offset of the first block.
func (v *view) first() int64 { return viewBAT + v.batLen() }

// layout is the order in which Windows lays files out. The blocks begin where
// the BAT ends; that they are aligned to 1 MiB is enough.
func (v *view) layout() synth.Layout {
	regions := v.regions()
	return synth.Layout{
		Size: v.first() + v.blocks.Count()*v.o.BlockSize,
		Parts: []synth.Part{
			synth.Bytes(0, mark()),
			synth.Bytes(headerOff1, v.header(1)),
			synth.Bytes(headerOff2, v.header(2)),
			synth.Bytes(regionOff1, regions),
			synth.Bytes(regionOff2, regions),
			synth.Bytes(viewMetadata, v.metadata()),
			{Off: viewBAT, Len: v.g.entries() * 8, Fill: v.bat},
		},
		Blocks: v.blocks,
		First:  v.first(),
	}
}

// mark is what a file begins with.
func mark() []byte {
	b := make([]byte, 520)
	copy(b, magic)
	for i, c := range utf16.Encode([]rune(creator)) {
		binary.LittleEndian.PutUint16(b[8+2*i:], c)
	}
	return b
}

// sign puts a checksum in its place.
func sign(b []byte) []byte {
	binary.LittleEndian.PutUint32(b[4:], sum(b))
	return b
}

func (v *view) header(seq uint64) []byte {
	b, le := make([]byte, headerLen), binary.LittleEndian
	copy(b, "head")
	le.PutUint64(b[8:], seq)
	// Which file it is does not matter to anyone but its writers.
	h := sha256.Sum256(append([]byte("file"), v.o.DataID[:]...))
	file, data := swap(asUUID([16]byte(h[:16]))), swap(v.o.DataID)
	copy(b[16:], file[:])
	copy(b[32:], data[:])
	le.PutUint16(b[66:], 1)
	le.PutUint32(b[68:], viewMetadata-viewLog)
	le.PutUint64(b[72:], viewLog)
	return sign(b)
}

func (v *view) regions() []byte {
	b, le := make([]byte, regionLen), binary.LittleEndian
	copy(b, "regi")
	le.PutUint32(b[8:], 2)
	for i, r := range []struct {
		id     guid
		off, n int64
	}{{regionBAT, viewBAT, v.batLen()}, {regionMetadata, viewMetadata, viewBAT - viewMetadata}} {
		e := b[16+32*i:]
		copy(e, r.id[:])
		le.PutUint64(e[16:], uint64(r.off))
		le.PutUint32(e[24:], uint32(r.n))
		le.PutUint32(e[28:], 1)
	}
	return sign(b)
}

// metadata is the table with its items, in the order that Windows has.
func (v *view) metadata() []byte {
	b, le := make([]byte, metadataTable+4*kib), binary.LittleEndian
	copy(b, "metadata")
	at, count := metadataTable, 0
	add := func(id guid, value []byte) {
		e := b[32+32*count:]
		copy(e, id[:])
		le.PutUint32(e[16:], uint32(at))
		le.PutUint32(e[20:], uint32(len(value)))
		le.PutUint32(e[24:], items[id].flags)
		at += copy(b[at:], value)
		count++
	}
	flags := uint32(0)
	if v.o.Variant == Fixed {
		flags = paramFixed
	}
	id := swap(v.o.DiskID)
	add(itemParams, le.AppendUint32(le.AppendUint32(nil, uint32(v.o.BlockSize)), flags))
	add(itemSize, le.AppendUint64(nil, uint64(v.g.size)))
	add(itemLogical, le.AppendUint32(nil, uint32(v.o.LogicalSector)))
	add(itemPhysical, le.AppendUint32(nil, 4096))
	add(itemDiskID, id[:])
	le.PutUint16(b[10:], uint16(count))
	return b
}

// bat computes the BAT's bytes from off on.
func (v *view) bat(p []byte, off int64) {
	var e [8]byte
	for len(p) > 0 {
		binary.LittleEndian.PutUint64(e[:], v.entry(off/8))
		n := copy(p, e[off%8:])
		p, off = p[n:], off+int64(n)
	}
}

func (v *view) entry(index int64) uint64 {
	_, block, bitmap := v.g.split(index)
	if bitmap {
		return 0
	}
	place, ok := v.blocks.Place(block)
	if !ok {
		return blockNotPresent
	}
	return uint64(v.first()+place*v.o.BlockSize) | blockPresent
}

// asUUID makes random bytes a UUID of version 4.
func asUUID(b [16]byte) [16]byte {
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return b
}
