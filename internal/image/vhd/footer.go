package vhd

import (
	"context"
	"encoding/binary"
	"fmt"

	"holdfast/internal/disk"
	"holdfast/internal/image"
)

const (
	cookie       = "conectix"
	headerCookie = "cxsparse"

	sector    = 512
	footerLen = 512
	headerLen = 1024
	version   = 0x00010000 // of footer and dynamic header

	kindFixed        = 2
	kindDynamic      = 3
	kindDifferencing = 4
)

func bad(format string, a ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{image.ErrFormat}, a...)...)
}

func unsupported(format string, a ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{image.ErrUnsupported}, a...)...)
}

// footer is the structure of 512 bytes that makes a file a VHD.
type footer struct {
	version    uint32
	dataOffset uint64 // of the dynamic header
	timestamp  uint32 // seconds since 2000, UTC
	size       uint64 // bytes of the disk: the current size, not the original one
	geometry   geometry
	kind       uint32
	id         [16]byte
	saved      byte // not 0: the machine was suspended, its memory is elsewhere
}

// checksum is the ones' complement of the sum of all bytes but those of the
// checksum itself, which is at that offset.
func checksum(b []byte, at int) uint32 {
	var sum uint32
	for i, c := range b {
		if i < at || i >= at+4 {
			sum += uint32(c)
		}
	}
	return ^sum
}

// parseFooter reads 512 bytes, or the 511 that very old files have. ok is
// false when it is not a footer or its checksum is wrong.
func parseFooter(b []byte) (f footer, ok bool) {
	be := binary.BigEndian
	if string(b[:8]) != cookie || be.Uint32(b[64:]) != checksum(b, 64) {
		return footer{}, false
	}
	f = footer{
		version: be.Uint32(b[12:]), dataOffset: be.Uint64(b[16:]), timestamp: be.Uint32(b[24:]), size: be.Uint64(b[48:]),
		geometry: geometry{be.Uint16(b[56:]), b[58], b[59]}, kind: be.Uint32(b[60:]), saved: b[84],
	}
	copy(f.id[:], b[68:])
	return f, true
}

// check refuses what this package does not read.
func (f footer) check() error {
	switch {
	case f.version != version:
		return unsupported("footer: version %#x", f.version)
	case f.kind != kindFixed && f.kind != kindDynamic && f.kind != kindDifferencing:
		return unsupported("footer: disk type %d", f.kind)
	case f.saved != 0:
		return unsupported("footer: it belongs to a machine in saved state, without which the disk is not whole")
	case f.size == 0 || f.size > maxSize:
		return bad("footer: the current size is %d bytes", f.size)
	}
	return nil
}

// endFooter reads the footer at the file's end. It returns the offset where
// it begins; ok is false when there is none.
func endFooter(ctx context.Context, d disk.Reader) (f footer, at int64, ok bool, err error) {
	n := min(d.Size(), footerLen)
	if n < footerLen-1 {
		return footer{}, 0, false, nil
	}
	b := make([]byte, n)
	if err := d.ReadAt(ctx, b, d.Size()-n); err != nil {
		return footer{}, 0, false, fmt.Errorf("read the footer at offset %d: %w", d.Size()-n, err)
	}
	if f, ok = parseFooter(b); !ok && n == footerLen {
		b = b[1:]
		f, ok = parseFooter(b)
	}
	return f, d.Size() - int64(len(b)), ok, nil
}

// copyFooter reads the copy that dynamic and differencing files have at their
// beginning.
func copyFooter(ctx context.Context, d disk.Reader) (f footer, ok bool, err error) {
	if d.Size() < footerLen {
		return footer{}, false, nil
	}
	b := make([]byte, footerLen)
	if err := d.ReadAt(ctx, b, 0); err != nil {
		return footer{}, false, fmt.Errorf("read the footer's copy at offset 0: %w", err)
	}
	f, ok = parseFooter(b)
	return f, ok && f.kind != kindFixed, nil
}

// geometry is what old firmware sees of the disk. It cannot say most sizes.
type geometry struct {
	cylinders uint16
	heads     uint8
	sectors   uint8 // per track
}

// bytes is the size that the geometry says.
func (g geometry) bytes() uint64 {
	return uint64(g.cylinders) * uint64(g.heads) * uint64(g.sectors) * sector
}

// geometryOf is the geometry of a disk, by the appendix "CHS Calculation" of
// the Virtual Hard Disk Image Format Specification.
func geometryOf(size uint64) geometry {
	total := min(size/sector, 65535*16*255)
	if total >= 65535*16*63 {
		return geometry{uint16(total / 255 / 16), 16, 255}
	}
	spt := uint64(17)
	tracks := total / spt
	heads := max((tracks+1023)/1024, 4)
	if tracks >= heads*1024 || heads > 16 {
		spt, heads = 31, 16
		tracks = total / spt
	}
	if tracks >= heads*1024 {
		spt, heads = 63, 16
		tracks = total / spt
	}
	return geometry{uint16(tracks / heads), uint8(heads), uint8(spt)}
}

// encode is the footer as it is in a file.
func (f footer) encode() []byte {
	b := make([]byte, footerLen)
	be := binary.BigEndian
	copy(b, cookie)
	be.PutUint32(b[8:], 2) // the bit that is always set
	be.PutUint32(b[12:], version)
	be.PutUint64(b[16:], f.dataOffset)
	be.PutUint32(b[24:], f.timestamp)
	copy(b[28:], creator)
	be.PutUint32(b[32:], creatorVersion)
	copy(b[36:], creatorHost)
	be.PutUint64(b[40:], f.size) // the original one
	be.PutUint64(b[48:], f.size)
	be.PutUint16(b[56:], f.geometry.cylinders)
	b[58], b[59] = f.geometry.heads, f.geometry.sectors
	be.PutUint32(b[60:], f.kind)
	copy(b[68:], f.id[:])
	be.PutUint32(b[64:], checksum(b, 64))
	return b
}

// header is the dynamic header, of 1024 bytes.
type header struct {
	tableOffset uint64
	entries     uint32 // of the block allocation table
	block       uint32 // bytes
	parent      [16]byte
	parentName  []byte // UTF-16, big-endian
	locators    []byte // 8 of 24 bytes
}

// readHeader reads the header at an offset of a file that ends at end.
func readHeader(ctx context.Context, d disk.Reader, at uint64, end int64) (*header, error) {
	if at < footerLen || at > uint64(max(end-headerLen, 0)) {
		return nil, bad("dynamic header: at offset %d it does not lie between the footer's copy and the file's end at %d: is the file truncated?", at, end)
	}
	b := make([]byte, headerLen)
	if err := d.ReadAt(ctx, b, int64(at)); err != nil {
		return nil, fmt.Errorf("read the dynamic header at offset %d: %w", at, err)
	}
	be := binary.BigEndian
	if string(b[:8]) != headerCookie {
		return nil, bad("dynamic header: at offset %d is something else", at)
	}
	if sum := checksum(b, 36); be.Uint32(b[36:]) != sum {
		return nil, bad("dynamic header at offset %d: its checksum is %#x, not %#x", at, be.Uint32(b[36:]), sum)
	}
	if v := be.Uint32(b[24:]); v != version {
		return nil, unsupported("dynamic header at offset %d: version %#x", at, v)
	}
	h := &header{tableOffset: be.Uint64(b[16:]), entries: be.Uint32(b[28:]), block: be.Uint32(b[32:]), parentName: b[64:576], locators: b[576:768]}
	copy(h.parent[:], b[40:])
	return h, nil
}

// encode is the header as it is in a file that has no parent.
func (h header) encode() []byte {
	b := make([]byte, headerLen)
	be := binary.BigEndian
	copy(b, headerCookie)
	be.PutUint64(b[8:], ^uint64(0))
	be.PutUint64(b[16:], h.tableOffset)
	be.PutUint32(b[24:], version)
	be.PutUint32(b[28:], h.entries)
	be.PutUint32(b[32:], h.block)
	be.PutUint32(b[36:], checksum(b, 36))
	return b
}
