package vmdk

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"holdfast/internal/disk"
	"holdfast/internal/image/internal/synth"
)

const (
	// MaxSparse is the largest disk of a view, and MaxFlat that of a flat
	// descriptor or a stream, in bytes. A sparse file counts sectors in 32 bits;
	// VMware's own limit for disks is 62 TiB.
	MaxSparse = (1<<32 - 1) * sector
	MaxFlat   = 64 << 40

	ourGrain    = 64 << 10 // bytes
	ourPerGT    = 512
	ourTable    = ourPerGT * 4
	ourDescOff  = 1 * sector
	ourDescLen  = 20 * sector
	ourOverhead = 64 << 10 // of a stream: what is before its grains

	// hardware is the least virtual hardware that the disk asks for: version 8
	// is known to every VMware product since 2011, and newer disks ask no more.
	hardware = 8
)

// Kind says how a view holds its disk.
type Kind uint8

const (
	// Sparse files hold the grains of 64 KiB that are not known to be zeros.
	Sparse Kind = iota
	// Allocated files are sparse ones that hold all grains.
	Allocated
)

// ViewOptions of a view. Views of one disk with the same options, ID set, are
// the same byte for byte.
type ViewOptions struct {
	Kind Kind
	// ID gives the content id, which is its last four bytes, and the disk's
	// UUID; zero means a new random one.
	ID [16]byte
	// Name of the file, for its descriptor. Readers that matter do not care; ""
	// means "disk.vmdk".
	Name string
}

// NewView is a disk.Reader whose bytes are those of a monolithicSparse file of
// d. VMDK knows only whole sectors: the image's disk is d's size rounded up to
// 512 bytes, and reads as zeros beyond d's end. A disk that is empty or larger
// than MaxSparse is refused, and one whose file would be: with all grains about
// a quarter of a GiB less fits. The view owns d; on an error the caller still does.
func NewView(ctx context.Context, d disk.Reader, o ViewOptions) (disk.Reader, error) {
	v, err := newText(d.Size(), MaxSparse, o.ID, o.Name)
	if err != nil {
		return nil, fmt.Errorf("make a sparse VMDK image: %w", err)
	}
	blocks := synth.All(d.Size(), ourGrain)
	if o.Kind == Sparse {
		if blocks, err = synth.Allocated(ctx, d, ourGrain); err != nil {
			return nil, fmt.Errorf("make a sparse VMDK image: %w", err)
		}
	}
	l, err := sparseLayout(v.embedded("monolithicSparse", "RW"), v.sectors, blocks)
	if err != nil {
		return nil, fmt.Errorf("make a sparse VMDK image: %w", err)
	}
	return synth.New(d, l), nil
}

// sparseLayout is
//
//	header │ descriptor │ directory's copy │ its tables │ directory │ tables │ grains
func sparseLayout(text []byte, sectors int64, blocks *synth.Blocks) (synth.Layout, error) {
	count := up(blocks.Len(), ourPerGT)
	dirLen, tablesLen := up(count*4, sector)*sector, count*ourTable
	second := int64(ourDescOff + ourDescLen)
	dir := second + dirLen + tablesLen
	first := up(dir+dirLen+tablesLen, ourGrain) * ourGrain
	l := synth.Layout{Size: first + blocks.Count()*ourGrain, Blocks: blocks, First: first}
	if l.Size/sector > 1<<32-1 {
		return l, fmt.Errorf("its file would have %d bytes, more than the format's %d (2 TiB); a flat or a stream-optimised one has no such limit", l.Size, int64(MaxSparse))
	}
	head := make([]byte, sector, sector+ourDescLen)
	putHosted(head, hosted{
		version: 1, flags: flagNewlines | flagRedundant, capacity: sectors * sector,
		rgd: uint64(second / sector), gd: uint64(dir / sector), overhead: first,
	})
	l.Parts = []synth.Part{synth.Bytes(0, append(head, text...))}
	for _, at := range []int64{second, dir} {
		l.Parts = append(l.Parts,
			synth.Part{Off: at, Len: dirLen, Fill: func(p []byte, off int64) {
				fillWords(p, off, func(i int64) uint32 {
					if i >= count {
						return 0
					}
					return uint32((at + dirLen + i*ourTable) / sector)
				})
			}},
			synth.Part{Off: at + dirLen, Len: tablesLen, Fill: func(p []byte, off int64) {
				fillWords(p, off, func(i int64) uint32 {
					if i < blocks.Len() {
						if n, ok := blocks.Place(i); ok {
							return uint32((first + n*ourGrain) / sector)
						}
					}
					return 0
				})
			}})
	}
	return l, nil
}

// fillWords writes a table of 32-bit words from its byte off on.
func fillWords(p []byte, off int64, word func(i int64) uint32) {
	for len(p) > 0 {
		var b [4]byte
		binary.LittleEndian.PutUint32(b[:], word(off/4))
		n := copy(p, b[off%4:])
		p, off = p[n:], off+int64(n)
	}
}

// putHosted writes a header of ours.
func putHosted(b []byte, h hosted) {
	le := binary.LittleEndian
	copy(b, hostedMagic)
	le.PutUint32(b[4:], h.version)
	le.PutUint32(b[8:], h.flags)
	le.PutUint64(b[12:], uint64(h.capacity/sector))
	le.PutUint64(b[20:], ourGrain/sector)
	le.PutUint64(b[28:], ourDescOff/sector)
	le.PutUint64(b[36:], ourDescLen/sector)
	le.PutUint32(b[44:], ourPerGT)
	le.PutUint64(b[48:], h.rgd)
	le.PutUint64(b[56:], h.gd)
	le.PutUint64(b[64:], uint64(h.overhead/sector))
	copy(b[73:], newlines)
	if h.flags&flagCompressed != 0 {
		le.PutUint16(b[77:], 1)
	}
}

// FlatOptions of a descriptor for a flat file.
type FlatOptions struct {
	// Name of the flat file, in the descriptor's folder.
	Name string
	// Size of the disk in bytes.
	Size int64
	// VMFS makes the descriptor that ESXi has on its datastores, NFS ones too;
	// else it is that of the hosted products, monolithicFlat.
	VMFS bool
	// ID is that of ViewOptions.
	ID [16]byte
}

// FlatDescriptor is the text of the descriptor above a flat file, one that
// holds a disk's bytes and nothing else. The flat file is to be whole sectors:
// when Size is not, the file is Size rounded up to 512 bytes. A disk that is
// empty or larger than MaxFlat is refused, and a name that is not one.
func FlatDescriptor(o FlatOptions) (string, error) {
	if o.Name == "" {
		return "", fmt.Errorf("make a VMDK descriptor: no name of the flat file")
	}
	t, err := newText(o.Size, MaxFlat, o.ID, o.Name)
	if err != nil {
		return "", fmt.Errorf("make a VMDK descriptor: %w", err)
	}
	if o.VMFS {
		return t.descriptor("vmfs", fmt.Sprintf("RW %d VMFS \"%s\"", t.sectors, o.Name)), nil
	}
	return t.descriptor("monolithicFlat", fmt.Sprintf("RW %d FLAT \"%s\" 0", t.sectors, o.Name)), nil
}

// text is what descriptors of ours say.
type text struct {
	sectors int64
	name    string
	id      [16]byte
}

func newText(size, limit int64, id [16]byte, name string) (text, error) {
	t := text{sectors: up(size, sector), id: id, name: name}
	if size <= 0 || size > limit {
		return t, fmt.Errorf("a disk of %d bytes does not fit: 1 byte to %d do", size, limit)
	}
	if t.name == "" {
		t.name = "disk.vmdk"
	}
	if strings.ContainsAny(t.name, "\"/\\") || strings.ContainsFunc(t.name, unicode.IsControl) || !utf8.ValidString(t.name) || len(t.name) > 255 {
		return t, fmt.Errorf("the name %.100q cannot be that of a VMDK file", t.name)
	}
	if t.id == [16]byte{} {
		rand.Read(t.id[:])
	}
	// Some values of the content id mean none, or a disk never written to.
	if cid := binary.BigEndian.Uint32(t.id[12:]); cid == 0 || cid >= noParent-1 {
		t.id[12] ^= 0x80
	}
	return t, nil
}

// embedded is the descriptor inside a sparse file, padded.
func (t text) embedded(createType, access string) []byte {
	b := make([]byte, ourDescLen)
	copy(b, t.descriptor(createType, fmt.Sprintf("%s %d SPARSE \"%s\"", access, t.sectors, t.name)))
	return b
}

func (t text) descriptor(createType, extent string) string {
	heads, perTrack := geometry(t.sectors)
	id := hex.EncodeToString(t.id[:])
	return fmt.Sprintf(`# Disk DescriptorFile
version=1
encoding="UTF-8"
CID=%s
parentCID=ffffffff
createType="%s"

# Extent description
%s

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
ddb.geometry.cylinders = "%d"
ddb.geometry.heads = "%d"
ddb.geometry.sectors = "%d"
ddb.longContentID = "%s"
ddb.uuid = "%s"
ddb.virtualHWVersion = "%d"
`, id[24:], createType, extent, max(t.sectors/(heads*perTrack), 1), heads, perTrack, id, t.uuid(), hardware)
}

// uuid is what a guest may see of the disk, in VMware's own range of UUIDs.
func (t text) uuid() string {
	u := t.id
	copy(u[:], []byte{0x60, 0x00, 0xc2, 0x90 | u[3]&0xf})
	return fmt.Sprintf("% x-% x", u[:8], u[8:])
}

// geometry is what VMware tells a BIOS of a SCSI disk.
func geometry(sectors int64) (heads, perTrack int64) {
	switch {
	case sectors < 1<<30/sector:
		return 64, 32
	case sectors < 2<<30/sector:
		return 128, 32
	}
	return 255, 63
}
