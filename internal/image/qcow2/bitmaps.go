package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"

	"holdfast/internal/disk"
)

// Limits of bitmaps, as QEMU has them.
const (
	maxBitmaps        = 65535
	maxBitmapDir      = 64 << 20 // bytes
	maxBitmapName     = 1023     // bytes
	maxBitmapExtra    = 1 << 20  // bytes; none is known
	minGranularity    = 9        // bits
	maxGranularity    = 31
	bitmapEntryLen    = 24
	bitmapTypeDirty   = 1 // the only type there is
	bitmapInUse       = 1 << 0
	bitmapAuto        = 1 << 1
	bitmapExtraOK     = 1 << 2 // who does not know the extra data may use the bitmap
	bitmapOnes        = 1 << 0 // of an entry of the table, without an offset
	bitmapDataReading = 64 << 10
)

// ErrBitmap is wrapped when a bitmap does not tell all that was written to the
// disk: somebody who does not know bitmaps wrote to the image, or who was
// keeping it did not get to store it. Everything may have changed then.
var ErrBitmap = errors.New("the bitmap does not tell all changes")

// Bitmap is a persistent dirty bitmap: what was written since some time.
type Bitmap struct {
	Name        string
	Granularity int64 // bytes of the disk that a bit stands for
	InUse       bool  // it was not stored after its last use: Dirty refuses it
	Auto        bool  // it is to be kept while the disk is in use
	Size        int64 // bits

	kind      uint8
	flags     uint32
	extra     int64 // bytes
	table     int64 // offset
	tableSize int64 // entries
}

// Bitmaps lists the image's persistent bitmaps; none for a snapshot. It fails
// with ErrBitmap when the list is not to be trusted.
func (im *Image) Bitmaps(ctx context.Context) ([]Bitmap, error) {
	if im.h.bitmaps == nil {
		return nil, nil
	}
	if im.h.autoclear&bitBitmaps == 0 {
		return nil, fmt.Errorf("%w: the image was written by something that does not know bitmaps", ErrBitmap)
	}
	n, dir, err := im.bitmapDir()
	if err != nil {
		return nil, err
	}
	var list []Bitmap
	at := dir.off
	for i := range n {
		b, n, err := im.bitmap(ctx, at, dir.end())
		if err != nil {
			return nil, fmt.Errorf("bitmap directory, entry %d at offset %d: %w", i, at, err)
		}
		list = append(list, b)
		at += n
	}
	if at != dir.end() {
		return nil, bad("bitmap directory at offset %d: its %d entries take %d bytes, not %d", dir.off, n, at-dir.off, dir.n)
	}
	return list, nil
}

// bitmapDir reads the header extension: how many bitmaps, and where their
// directory is.
func (im *Image) bitmapDir() (n int64, dir extent, err error) {
	b, be := im.h.bitmaps, binary.BigEndian
	if len(b) != 24 {
		return 0, dir, bad("bitmaps extension: it has %d bytes, not 24", len(b))
	}
	n = int64(be.Uint32(b))
	size, off := be.Uint64(b[8:]), be.Uint64(b[16:])
	switch {
	case n == 0 || n > maxBitmaps:
		return 0, dir, bad("bitmaps extension: %d bitmaps", n)
	case be.Uint32(b[4:]) != 0:
		return 0, dir, bad("bitmaps extension: reserved bits are set")
	case size < bitmapEntryLen*uint64(n) || size > maxBitmapDir:
		return 0, dir, bad("bitmaps extension: a directory of %d bytes for %d bitmaps", size, n)
	case off%uint64(im.cluster) != 0 || off > uint64(im.file.Size()):
		return 0, dir, bad("bitmaps extension: the directory is at offset %d", off)
	}
	dir = extent{int64(off), int64(size)}
	if err := im.checkPlace(dir.off, dir.n, im.file.Size()); err != nil {
		return 0, dir, fmt.Errorf("bitmap directory: %w", err)
	}
	return n, dir, nil
}

// bitmap reads the entry at an offset, and its length. The directory ends at
// end.
func (im *Image) bitmap(ctx context.Context, at, end int64) (Bitmap, int64, error) {
	if end-at < bitmapEntryLen {
		return Bitmap{}, 0, bad("the directory ends at offset %d", end)
	}
	head := make([]byte, bitmapEntryLen)
	if err := im.readTable(ctx, head, at); err != nil {
		return Bitmap{}, 0, err
	}
	be := binary.BigEndian
	nameLen := int64(be.Uint16(head[18:]))
	b := Bitmap{
		table: int64(be.Uint64(head)), tableSize: int64(be.Uint32(head[8:])), flags: be.Uint32(head[12:]),
		kind: head[16], extra: int64(be.Uint32(head[20:])),
	}
	n := (bitmapEntryLen + b.extra + nameLen + 7) &^ 7
	granularity := head[17]
	switch {
	case b.extra > maxBitmapExtra || n > end-at:
		return b, 0, bad("%d bytes of name and extra data do not fit into the directory", nameLen+b.extra)
	case nameLen == 0 || nameLen > maxBitmapName:
		return b, 0, bad("a name of %d bytes", nameLen)
	case b.flags&^(bitmapInUse|bitmapAuto|bitmapExtraOK) != 0:
		return b, 0, bad("flags are %#x", b.flags)
	case granularity < minGranularity || granularity > maxGranularity:
		return b, 0, bad("granularity_bits is %d", granularity)
	case b.table <= 0 || b.table%im.cluster != 0:
		return b, 0, bad("its table is at offset %#x", uint64(b.table))
	}
	if err := im.checkPlace(b.table, b.tableSize*8, im.file.Size()); err != nil {
		return b, 0, fmt.Errorf("bitmap table: %w", err)
	}
	name := make([]byte, nameLen)
	if err := im.readTable(ctx, name, at+bitmapEntryLen+b.extra); err != nil {
		return b, 0, err
	}
	b.Name, b.Granularity = string(name), 1<<granularity
	b.InUse, b.Auto = b.flags&bitmapInUse != 0, b.flags&bitmapAuto != 0
	b.Size = up(im.h.size, b.Granularity)
	return b, n, nil
}

// Dirty yields the ranges of the disk that are marked in a bitmap, merged, in
// ascending order; none is Zero. It fails with fs.ErrNotExist when there is no
// such bitmap, and with ErrBitmap when it is not to be trusted. An error on the
// way means the same: everything may have changed.
func (im *Image) Dirty(ctx context.Context, name string) (disk.Extents, error) {
	list, err := im.Bitmaps(ctx)
	if err != nil {
		return nil, err
	}
	for _, b := range list {
		if b.Name == name {
			if err := im.usable(b); err != nil {
				return nil, fmt.Errorf("bitmap %q: %w", name, err)
			}
			return disk.Merge(func(yield func(disk.Extent, error) bool) {
				if err := im.dirty(ctx, b, yield); err != nil {
					yield(disk.Extent{}, fmt.Errorf("bitmap %q: %w", name, err))
				}
			}), nil
		}
	}
	return nil, fmt.Errorf("bitmap %q: %w", name, fs.ErrNotExist)
}

// usable refuses bitmaps that do not tell everything.
func (im *Image) usable(b Bitmap) error {
	switch covers := b.tableSize * im.cluster * 8; { // bits; tableSize has 32, the cluster 21
	case b.InUse:
		return fmt.Errorf("%w: it was in use when the image was last written, and not stored", ErrBitmap)
	case b.kind != bitmapTypeDirty:
		return fmt.Errorf("%w: it is of type %d", ErrBitmap, b.kind)
	case b.extra > 0 && b.flags&bitmapExtraOK == 0:
		return fmt.Errorf("%w: it has extra data that is unknown here", ErrBitmap)
	case covers < b.Size:
		return bad("its table has %d entries, too few for %d bits", b.tableSize, b.Size)
	}
	return nil
}

// dirty yields the ranges that are marked. A nil error may also mean that the
// caller stopped.
func (im *Image) dirty(ctx context.Context, b Bitmap, yield func(disk.Extent, error) bool) error {
	s := &bitScan{size: im.h.size, granularity: b.Granularity, yield: yield}
	perEntry := im.cluster * 8 // bits
	buf := make([]byte, min(im.cluster, bitmapDataReading))
	for first := int64(0); first < b.Size && !s.done; first += perEntry {
		if err := ctx.Err(); err != nil {
			return err
		}
		i := first / perEntry
		host, ones, err := im.bitmapEntry(ctx, b, i)
		if err != nil {
			return fmt.Errorf("table at offset %d, entry %d: %w", b.table, i, err)
		}
		n := min(perEntry, b.Size-first)
		if host == 0 {
			if ones {
				s.mark(first, n)
			}
			continue
		}
		for bit := int64(0); bit < n && !s.done; bit += int64(len(buf)) * 8 {
			p := buf[:min(int64(len(buf)), up(n-bit, 8))]
			if err := im.readTable(ctx, p, host+bit/8); err != nil {
				return fmt.Errorf("table at offset %d, entry %d: %w", b.table, i, err)
			}
			s.scan(p, first+bit, min(n-bit, int64(len(p))*8))
		}
	}
	return nil
}

// bitmapEntry reads an entry of a bitmap's table: where the bits are, or that
// all of them are ones or zeros.
func (im *Image) bitmapEntry(ctx context.Context, b Bitmap, i int64) (host int64, ones bool, err error) {
	p, err := im.slice(ctx, b.table+i*8, b.table+b.tableSize*8)
	if err != nil {
		return 0, false, err
	}
	return im.parseBitmapEntry(p)
}

func (im *Image) parseBitmapEntry(p []byte) (host int64, ones bool, err error) {
	e := binary.BigEndian.Uint64(p)
	host = int64(e & offsetMask)
	if e&^(offsetMask|bitmapOnes) != 0 || host%im.cluster != 0 || host != 0 && e&bitmapOnes != 0 {
		return 0, false, bad("the entry is %#x", e)
	}
	if host == 0 {
		return 0, e != 0, nil
	}
	return host, false, im.checkPlace(host, im.cluster, im.file.Size())
}

// bitScan yields the ranges of the disk that bits stand for.
type bitScan struct {
	size, granularity int64
	yield             func(disk.Extent, error) bool
	done              bool // the caller wants no more
}

// mark yields what n bits stand for.
func (s *bitScan) mark(first, n int64) {
	off := first * s.granularity
	s.done = s.done || !s.yield(disk.Extent{Off: off, Len: min(n*s.granularity, s.size-off)}, nil)
}

// scan looks at the first n bits of p, the first of which is that number. In
// each byte the least bit comes first.
func (s *bitScan) scan(p []byte, first, n int64) {
	run := int64(0) // ones just before bit
	for bit := int64(0); bit < n && !s.done; {
		var w uint64
		width := min(64, n-bit)
		if q := p[bit/8:]; len(q) >= 8 {
			w = binary.LittleEndian.Uint64(q)
		} else {
			for i, c := range q {
				w |= uint64(c) << (8 * i)
			}
		}
		for at := int64(0); at < width && !s.done; {
			ones := min(int64(bits.TrailingZeros64(^(w >> at))), width-at)
			run, at = run+ones, at+ones
			if at == width {
				break
			}
			if run > 0 {
				s.mark(first+bit+at-run, run)
				run = 0
			}
			at += min(int64(bits.TrailingZeros64(w>>at)), width-at)
		}
		bit += width
	}
	if run > 0 && !s.done {
		s.mark(first+n-run, run)
	}
}
