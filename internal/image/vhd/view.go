package vhd

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/image/internal/synth"
)

const (
	// MaxSize is the largest disk of a view in bytes, 2040 GiB: the limit of
	// Hyper-V and Azure, and about what the BAT's sector numbers reach.
	MaxSize = 2040 << 30

	// QEMU takes the size from the geometry unless the creator is one of a few
	// that it knows. Of them Windows is the one whose files we imitate.
	creator        = "win "
	creatorVersion = 0x000a0000
	creatorHost    = "Wi2k"

	viewBlock = 2 << 20
	viewLead  = 4 << 10 // the bitmap is its last sector
)

// Kind says how a view holds its disk.
type Kind uint8

const (
	// Dynamic files hold the blocks of 2 MiB that are not known to be zeros.
	Dynamic Kind = iota
	// Allocated files are dynamic ones that hold all blocks.
	Allocated
	// Fixed files are the disk's bytes and a footer.
	Fixed
)

// ViewOptions of a view. Views of one disk with the same options, ID and Time
// set, are the same byte for byte.
type ViewOptions struct {
	Kind Kind
	ID   [16]byte  // the unique id; zero means a new random one
	Time time.Time // of creation; zero means now
}

// NewView is a disk.Reader whose bytes are those of a VHD file of d. VHD knows
// only whole sectors: the image's disk is d's size rounded up to 512 bytes,
// and reads as zeros beyond d's end. A disk that is empty or larger than
// MaxSize is refused. The view owns d; on an error the caller still does.
func NewView(ctx context.Context, d disk.Reader, o ViewOptions) (disk.Reader, error) {
	size := d.Size()
	if size <= 0 || size > MaxSize {
		return nil, fmt.Errorf("make a VHD image: a disk of %d bytes does not fit; the format holds 1 byte to %d (2040 GiB)", size, int64(MaxSize))
	}
	size = (size + sector - 1) / sector * sector
	f := footer{dataOffset: footerLen, timestamp: timestamp(o.Time), size: uint64(size), geometry: geometryOf(uint64(size)), kind: kindDynamic, id: o.ID}
	if f.id == [16]byte{} {
		f.id = newID()
	}
	if o.Kind == Fixed {
		f.kind, f.dataOffset = kindFixed, ^uint64(0)
		return synth.New(d, synth.Layout{
			Size:   size + footerLen,
			Parts:  []synth.Part{synth.Bytes(size, f.encode())},
			Blocks: synth.All(d.Size(), sector),
		}), nil
	}
	blocks := synth.All(d.Size(), viewBlock)
	if o.Kind == Dynamic {
		var err error
		if blocks, err = synth.Allocated(ctx, d, viewBlock); err != nil {
			return nil, fmt.Errorf("make a VHD image: %w", err)
		}
	}
	return synth.New(d, dynamicLayout(f, blocks)), nil
}

// dynamicLayout is
//
//	footer's copy │ header │ BAT, padded to 4 KiB │ blocks │ footer
func dynamicLayout(f footer, blocks *synth.Blocks) synth.Layout {
	const table = footerLen + headerLen
	tableLen := (blocks.Len()*4 + sector - 1) / sector * sector
	l := synth.Layout{
		Blocks: blocks, First: (table + tableLen + viewLead - 1) / viewLead * viewLead, Lead: viewLead,
		// The sectors before the bitmap only align what comes after.
		FillLead: func(p []byte, off, _ int64) {
			for i := range p {
				if off+int64(i) >= viewLead-sector {
					p[i] = 0xff
				}
			}
		},
	}
	end := l.First + blocks.Count()*(viewLead+viewBlock)
	h := header{tableOffset: table, entries: uint32(blocks.Len()), block: viewBlock}
	b := f.encode()
	l.Parts = []synth.Part{
		synth.Bytes(0, append(b[:footerLen:footerLen], h.encode()...)),
		{Off: table, Len: tableLen, Fill: func(p []byte, off int64) { fillTable(p, off, blocks, l.First) }},
		synth.Bytes(end, b),
	}
	l.Size = end + footerLen
	return l
}

// fillTable writes the BAT from its byte off on. Entries behind the last
// block are those of blocks that are not there.
func fillTable(p []byte, off int64, blocks *synth.Blocks, first int64) {
	for len(p) > 0 {
		i := off / 4
		entry := uint32(none)
		if i < blocks.Len() {
			if n, ok := blocks.Place(i); ok {
				entry = uint32((first + n*(viewLead+viewBlock) + viewLead - sector) / sector)
			}
		}
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], entry)
		n := copy(p, b[off%4:])
		p, off = p[n:], off+int64(n)
	}
}

// newID is a random UUID, version 4; it is never zero.
func newID() (id [16]byte) {
	rand.Read(id[:]) // never fails
	id[6] = id[6]&0x0f | 0x40
	id[8] = id[8]&0x3f | 0x80
	return id
}

// timestamp is a time as files have it.
func timestamp(t time.Time) uint32 {
	if t.IsZero() {
		t = time.Now()
	}
	epoch := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
	return uint32(min(max(t.Unix()-epoch.Unix(), 0), 1<<32-1))
}
