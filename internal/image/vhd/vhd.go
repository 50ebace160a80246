// Package vhd reads Microsoft's VHD images, version 1, as layers of an
// image.Chain, and makes new ones as views of a disk. It never changes an
// image.
//
//	fixed         data │ footer
//	dynamic       footer's copy │ dynamic header │ block allocation table (BAT) │ blocks │ footer
//	differencing  the same; a sector that a block does not hold is the parent's
//
// A block is a bitmap, one bit for each of its sectors, and then the sectors.
//
// Source of all format facts: Microsoft's "Virtual Hard Disk Image Format
// Specification", version 1.0, and files that Windows wrote where it is
// silent.
//
// What was decided:
//
//   - The footer at the file's end says what the file is: the guest of a fixed
//     image writes the file's beginning. Only when the caller says that the
//     file is a VHD and its end is damaged does the copy at the beginning
//     count, with a warning; a fixed image has none. To be taken for a
//     dynamic or differencing image unasked a file needs the mark at both ends,
//     so that the guest of an image in another format, whose last cluster may
//     be the guest's, cannot make it one that names a parent.
//   - The disk has the footer's current size, never that of its geometry,
//     which cannot say most sizes and which some writers only saturate. A
//     geometry that fits neither the size nor the rule is a warning.
//   - In a dynamic image all of an allocated block is the disk's, whatever its
//     bitmap says: Windows and QEMU set all bits, others none. In a
//     differencing one the bitmap says, most significant bit first, which
//     sectors are here; the rest, and every block that is not allocated, is the
//     parent's.
//   - A parent is known by its unique id, which the child holds. A child
//     without one is refused: nothing would tell the right parent. The time
//     of the parent's last change, which the child holds too, is not looked
//     at: copying and time zones change it.
//   - DiskID is the file's unique id. A differencing image has none: its id is
//     its own, not the chain's.
//
// Open reads the whole BAT once, a piece at a time, and refuses an image with
// a block that does not lie inside the file, or that overlaps another one or
// the tables: such a file is truncated or damaged, and what it would give is
// not what was written. The one exception is the last block, which some
// writers cut where the disk ends. Later reads take slices of the BAT and
// bitmaps through caches of a few MiB.
//
// Views lay blocks so that their data begin at multiples of 4 KiB, as Windows
// does: the bitmap is the last of eight sectors before them.
package vhd

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"

	"holdfast/internal/disk"
	"holdfast/internal/image"
	"holdfast/internal/image/internal/cache"
)

// Name of the format.
const Name = "vhd"

const (
	// sliceLen is how much of the BAT is read and kept at once, in bytes: with
	// blocks of 2 MiB it describes 8 GiB of disk.
	sliceLen = 16 << 10
	// tableCache and bitmapCache bound what one image keeps, in bytes.
	tableCache  = 2 << 20
	bitmapCache = 2 << 20

	minBlock  = 4 << 10   // Windows makes 512 KiB and 2 MiB
	maxBlock  = 256 << 20 // bytes
	maxBlocks = 16 << 20  // that a disk may have: a BAT of 64 MiB
	maxSize   = 1 << 60   // bytes of a disk; a fixed one has no other limit

	none = 0xffffffff // the BAT entry of a block that is not there
)

// Format is how image.Formats reads VHD.
func Format() image.Format {
	return image.Format{
		Name:  Name,
		Match: match,
		Open: func(ctx context.Context, f image.File, resolve image.Resolver) (image.Layer, error) {
			return Open(ctx, f, resolve)
		},
	}
}

func match(ctx context.Context, d disk.Reader) (bool, error) {
	f, _, ok, err := endFooter(ctx, d)
	if err != nil || !ok || f.kind == kindFixed {
		return ok, err
	}
	b := make([]byte, len(cookie))
	if err := d.ReadAt(ctx, b, 0); err != nil {
		return false, err
	}
	return string(b) == cookie, nil
}

// Image is one VHD file: an image.Layer.
type Image struct {
	file     disk.Reader
	f        footer
	h        *header // nil for a fixed image
	size     int64   // of the disk, bytes
	end      int64   // of what may be data or tables: the footer's offset, or the file's length
	names    []string
	warnings []string

	tables  *cache.Cache // slices of the BAT, by their offset in it
	bitmaps *cache.Cache // by their offset in the file
}

// Open reads an image's footer and header and checks its BAT. An image needs
// no other file but its parent, so resolve may be nil. The Image owns f's
// Disk; on an error the caller still does.
func Open(ctx context.Context, f image.File, _ image.Resolver) (*Image, error) {
	im := &Image{file: f.Disk}
	if err := im.readFooter(ctx); err != nil {
		return nil, err
	}
	if im.f.kind == kindFixed {
		if im.size > im.end {
			return nil, bad("footer: the disk's %d bytes do not fit before it, at offset %d: is the file truncated?", im.size, im.end)
		}
		return im, nil
	}
	h, err := readHeader(ctx, im.file, im.f.dataOffset, im.end)
	if err != nil {
		return nil, err
	}
	im.h = h
	if err := im.checkHeader(); err != nil {
		return nil, err
	}
	if err := im.checkTable(ctx); err != nil {
		return nil, err
	}
	if im.f.kind == kindDifferencing {
		if im.h.parent == [16]byte{} {
			return nil, unsupported("dynamic header: the parent's unique id is zero, so that nothing tells the right one")
		}
		if err := im.readNames(ctx); err != nil {
			return nil, err
		}
	}
	im.tables = cache.New(tableCache, im.loadSlice)
	im.bitmaps = cache.New(bitmapCache, im.loadBitmap)
	return im, nil
}

func (im *Image) warn(format string, a ...any) {
	im.warnings = append(im.warnings, fmt.Sprintf(format, a...))
}

// readFooter finds the footer that counts.
func (im *Image) readFooter(ctx context.Context) error {
	f, at, ok, err := endFooter(ctx, im.file)
	if err != nil {
		return err
	}
	head, headOK, err := copyFooter(ctx, im.file)
	if err != nil {
		return err
	}
	switch {
	case ok:
		im.f, im.end = f, at
		if f.kind != kindFixed && f != head {
			im.warn("the footer's copy at offset 0 is damaged or differs from the footer, which is used")
		}
	case headOK:
		im.f, im.end = head, im.file.Size()
		im.warn("the footer at the file's end is missing or damaged: its copy at offset 0 is used")
	default:
		return bad("footer: the file of %d bytes does not end with one: not a VHD image, or a truncated one", im.file.Size())
	}
	if err := im.f.check(); err != nil {
		return err
	}
	im.size = int64(im.f.size)
	if g := im.f.geometry; g != geometryOf(im.f.size) && g.bytes() != im.f.size {
		im.warn("the footer's geometry of %d cylinders, %d heads and %d sectors says %d bytes; its current size of %d bytes is used",
			g.cylinders, g.heads, g.sectors, g.bytes(), im.f.size)
	}
	if im.size%sector != 0 {
		im.warn("the disk's size of %d bytes is not whole sectors", im.size)
	}
	return nil
}

// checkHeader makes sure that the table has room for the disk, and the file
// for the table.
func (im *Image) checkHeader() error {
	h := im.h
	table := uint64(h.entries) * 4
	end := uint64(im.end)
	switch {
	case bits.OnesCount32(h.block) != 1:
		return bad("dynamic header: blocks of %d bytes, not a power of two", h.block)
	case h.block < minBlock || h.block > maxBlock:
		return unsupported("dynamic header: blocks of %d bytes; those from 4 KiB to 256 MiB are read", h.block)
	case im.f.size > uint64(h.entries)*uint64(h.block):
		return bad("dynamic header: %d blocks of %d bytes do not hold the disk's %d bytes", h.entries, h.block, im.f.size)
	case im.blocks() > maxBlocks:
		return unsupported("dynamic header: the disk has %d blocks of %d bytes", im.blocks(), h.block)
	case h.tableOffset < footerLen || table > end || h.tableOffset > end-table:
		return bad("BAT: %d entries at offset %d do not lie between the footer's copy and the file's end at %d: is the file truncated?", h.entries, h.tableOffset, end)
	case h.tableOffset < im.f.dataOffset+headerLen && im.f.dataOffset < h.tableOffset+table:
		return bad("BAT: at offset %d it overlaps the dynamic header at %d", h.tableOffset, im.f.dataOffset)
	}
	return nil
}

// Info describes the image.
func (im *Image) Info() image.Info {
	i := image.Info{Format: Name, Variant: "fixed", Size: im.size, LogicalSector: sector, Warnings: im.warnings}
	if im.f.id != [16]byte{} {
		i.DataID = uuid(im.f.id)
	}
	switch im.f.kind {
	case kindDynamic:
		i.Variant = "dynamic"
	case kindDifferencing:
		i.Variant = "differencing"
		i.Parent = &image.Parent{Names: im.names, Format: Name, IDs: []string{uuid(im.h.parent)}}
	}
	if i.Parent == nil {
		i.DiskID = i.DataID
	}
	if im.h != nil {
		i.Block = im.block()
	}
	return i
}

// uuid is how ids are written: the file's bytes in their order.
func uuid(id [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
}

// Close closes the file.
func (im *Image) Close() error { return im.file.Close() }

// Runs covers [off, off+n) with what this image has. Of a fixed image holes
// in the file are zeros.
func (im *Image) Runs(ctx context.Context, off, n int64) image.Runs {
	if im.f.kind == kindFixed {
		return im.fixedRuns(ctx, off, n)
	}
	return func(yield func(image.Run, error) bool) {
		err := disk.CheckRange(im.size, off, n)
		for end := off + n; err == nil && off < end; {
			var m mapping
			if m, err = im.lookup(ctx, off, end-off); err == nil {
				if !yield(image.Run{Off: off, Len: m.n, State: m.state}, nil) {
					return
				}
				off += m.n
			}
		}
		if err != nil {
			yield(image.Run{}, err)
		}
	}
}

func (im *Image) fixedRuns(ctx context.Context, off, n int64) image.Runs {
	return func(yield func(image.Run, error) bool) {
		if err := disk.CheckRange(im.size, off, n); err != nil {
			yield(image.Run{}, err)
			return
		}
		for e, err := range im.file.Extents(ctx, off, n) {
			r := image.Run{Off: e.Off, Len: e.Len, State: image.Data}
			if e.Zero {
				r.State = image.Zero
			}
			if !yield(r, err) {
				return
			}
		}
	}
}

// ReadAt fills p from this image alone.
func (im *Image) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := disk.CheckRange(im.size, off, int64(len(p))); err != nil {
		return err
	}
	if im.f.kind == kindFixed {
		return im.file.ReadAt(ctx, p, off)
	}
	for len(p) > 0 {
		m, err := im.lookup(ctx, off, int64(len(p)))
		if err != nil {
			return err
		}
		if m.state != image.Data {
			clear(p[:m.n])
		} else if err := im.file.ReadAt(ctx, p[:m.n], m.host); err != nil {
			return fmt.Errorf("read at %d: %w", off, err)
		}
		p, off = p[m.n:], off+m.n
	}
	return nil
}

// block is the length of a block's data, bytes.
func (im *Image) block() int64 { return int64(im.h.block) }

// lead is the length of the bitmap before it: whole sectors.
func (im *Image) lead() int64 { return (im.block()/sector/8 + sector - 1) / sector * sector }

// stride is the length of a block in the file.
func (im *Image) stride() int64 { return im.lead() + im.block() }

// blocks is how many blocks the disk has. The BAT may have more entries.
func (im *Image) blocks() int64 { return (im.size-1)/im.block() + 1 }

// mapping is where the bytes at some offset are.
type mapping struct {
	n     int64 // bytes for which this holds
	state image.State
	host  int64 // offset in the file of the first byte, of Data
}

// lookup tells where the bytes at off are, for up to n bytes: those of one
// block, or of several that are not there. Not for fixed images.
func (im *Image) lookup(ctx context.Context, off, n int64) (mapping, error) {
	if err := ctx.Err(); err != nil {
		return mapping{}, err
	}
	i, in := off/im.block(), off%im.block()
	at := i * 4 % sliceLen
	slice, err := im.tables.Get(ctx, i*4-at)
	if err != nil {
		return mapping{}, fmt.Errorf("BAT at offset %d: %w", im.h.tableOffset, err)
	}
	entry := binary.BigEndian.Uint32(slice[at:])
	if entry == none {
		end := im.block() - in
		for b := slice[at+4:]; len(b) > 0 && end < n && binary.BigEndian.Uint32(b) == none; b = b[4:] {
			end += im.block()
		}
		m := mapping{n: min(n, end), state: image.Zero}
		if im.f.kind == kindDifferencing {
			m.state = image.Absent
		}
		return m, nil
	}
	host, err := im.place(i, entry)
	if err != nil {
		return mapping{}, err
	}
	m := mapping{n: min(n, im.block()-in), state: image.Data, host: host + im.lead() + in}
	if im.f.kind == kindDynamic {
		return m, nil
	}
	bitmap, err := im.bitmaps.Get(ctx, host)
	if err != nil {
		return mapping{}, fmt.Errorf("bitmap of block %d at offset %d: %w", i, host, err)
	}
	here, count := sectors(bitmap, in/sector)
	m.n = min(m.n, (in/sector+count)*sector-in)
	if !here {
		m.state, m.host = image.Absent, 0
	}
	return m, nil
}

// sectors tells whether sector i is in a block with that bitmap, and for how
// many sectors from it on that is so. The first sector is the most
// significant bit of the first byte.
func sectors(bitmap []byte, i int64) (here bool, count int64) {
	total := int64(len(bitmap)) * 8
	here = bitmap[i/8]<<(i%8)&0x80 != 0
	for i+count < total {
		at := i + count
		b := bitmap[at/8]
		if here {
			b = ^b
		}
		// The bits from at on that are as the first, which are zeros now.
		left := 8 - at%8
		n := min(int64(bits.LeadingZeros8(b<<(at%8))), left)
		count += n
		if n < left {
			break
		}
	}
	return here, count
}

func (im *Image) loadSlice(ctx context.Context, at int64) ([]byte, error) {
	b := make([]byte, min(sliceLen, im.blocks()*4-at))
	return b, im.file.ReadAt(ctx, b, int64(im.h.tableOffset)+at)
}

// loadBitmap reads as much of a block's bitmap as means something. Blocks are
// 8 sectors at least, so that is whole bytes.
func (im *Image) loadBitmap(ctx context.Context, at int64) ([]byte, error) {
	b := make([]byte, im.block()/sector/8)
	return b, im.file.ReadAt(ctx, b, at)
}
