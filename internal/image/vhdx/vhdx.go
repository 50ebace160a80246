// Package vhdx reads Hyper-V's VHDX images, fixed, dynamic and differencing
// (.avhdx too), as layers of an image.Chain, and computes new ones: a View is
// the file that a disk would be as a VHDX, to be copied (an export) or served.
// It never changes an existing image.
//
// Opening goes from the outside in, and nothing is believed before what comes
// first has been checked:
//
//	mark ─▶ headers ─▶ log, replayed ─▶ region tables ─▶ metadata ─▶ BAT, all of it ─▶ reads
//
// A file that was in use when it was copied holds changes that only its log
// tells, often to the very tables; a reader that skips them sees an older disk
// and does not know. So the log is replayed on every open, in memory: a
// replayed is the file with the log's sectors on top, which stay in the
// log and are read from there. What remains of entries that were torn, or are
// of an older log, does not count.
//
// A read finds the BAT entry of its block, and for blocks that are partly the
// parent's the chunk's sector bitmap. Both are read in slices through a cache
// of a few MiB per image. At Open the whole BAT is read once: states, offsets
// within the file, and that no two blocks share a place. Holes of the file are
// skipped there, so that a sparse disk of 64 TiB opens at once.
//
// Source of all format facts: [MS-VHDX], and for what it leaves open the files
// that Windows writes. Metadata, BAT and bitmaps bear no checksums; all is
// checked by structure, and errors wrap image.ErrFormat and name structure and
// offset. What is odd but cannot make a read wrong is told as a warning: one bad
// copy of a header or region table, reserved bits, the state 5 of files made
// before the format was final, a file that ends with the disk within the last
// block. Refused by name: unknown required regions and items, files marked
// incomplete, VHD Sets.
package vhdx

import (
	"context"
	"fmt"
	"path"
	"strings"

	"holdfast/internal/disk"
	"holdfast/internal/image"
	"holdfast/internal/image/internal/cache"
)

// Name of the format.
const Name = "vhdx"

const (
	// sliceLen is how much of a table is read and kept at once, in bytes: of
	// the BAT, 4 GiB of disk with blocks of 2 MiB.
	sliceLen = 16 * kib
	// tableCache bounds what one image keeps, in bytes.
	tableCache = 4 << 20
)

// Format is how image.Formats reads VHDX.
func Format() image.Format {
	return image.Format{
		Name:  Name,
		Match: match,
		Open: func(ctx context.Context, f image.File, resolve image.Resolver) (image.Layer, error) {
			return Open(ctx, f, resolve)
		},
	}
}

func match(ctx context.Context, f disk.Reader) (bool, error) {
	if f.Size() < int64(len(magic)) {
		return false, nil
	}
	b := make([]byte, len(magic))
	if err := f.ReadAt(ctx, b, 0); err != nil {
		return false, err
	}
	return string(b) == magic, nil
}

// Image is one VHDX file: an image.Layer.
type Image struct {
	d      disk.Reader // the file, its log replayed
	info   image.Info
	g      geometry
	bat    int64 // offset of the BAT
	fixed  bool
	merge  bool // the parent locator has two ids
	spans  []span
	batLen int64        // bytes of the BAT's region
	tables *cache.Cache // slices of the BAT and of sector bitmaps, by file offset
}

// Open reads an image's structure, the whole BAT included. Its parent is not
// asked for. The Image owns f's Disk; on an error the caller still does.
func Open(ctx context.Context, f image.File, _ image.Resolver) (*Image, error) {
	if strings.EqualFold(path.Ext(f.Name), ".vhds") {
		return nil, unsupported("a VHD Set is not a disk: its disk is in the .avhdx files beside it")
	}
	ok, err := match(ctx, f.Disk)
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the file's mark: %w", err)
	case !ok:
		return nil, bad("not a VHDX image: it does not begin with %q", magic)
	case f.Disk.Size() < headerArea:
		return nil, bad("the file has %d bytes, too few for a VHDX image", f.Disk.Size())
	}
	im := &Image{d: f.Disk, info: image.Info{Format: Name}}
	warn := func(format string, args ...any) {
		if len(im.info.Warnings) < maxWarnings {
			im.info.Warnings = append(im.info.Warnings, fmt.Sprintf(format, args...))
		}
	}
	h, err := readHeader(ctx, f.Disk, warn)
	if err != nil {
		return nil, err
	}
	if h.logGUID != (guid{}) {
		r, err := replay(ctx, f.Disk, h)
		if err != nil {
			return nil, err
		}
		if r.size > f.Disk.Size() {
			warn("the log lets the file grow from %d to %d bytes; what is new reads as zeros", f.Disk.Size(), r.size)
		}
		im.d, im.info.DirtyLog = r, true
	}
	r, err := readRegions(ctx, im.d, h, warn)
	if err != nil {
		return nil, err
	}
	m, err := readMetadata(ctx, im.d, r.metadata, warn)
	if err != nil {
		return nil, err
	}
	if err := im.setUp(h, r, m); err != nil {
		return nil, err
	}
	if err := im.checkBAT(ctx, warn); err != nil {
		return nil, err
	}
	return im, nil
}

// maxWarnings bounds Info.Warnings.
const maxWarnings = 100

// setUp takes over what the tables say.
func (im *Image) setUp(h *header, r *regions, m *metadata) error {
	im.g, im.fixed, im.spans = newGeometry(m), m.fixed, r.all
	im.bat, im.batLen = r.bat.off, r.bat.n
	if need := im.g.entries() * 8; im.batLen < need {
		return bad("the BAT at offset %d has %d bytes, the disk needs %d", im.bat, im.batLen, need)
	}
	im.tables = cache.New(tableCache, im.loadSlice)
	i := &im.info
	i.Size, i.Block, i.LogicalSector, i.PhysicalSector = m.size, m.block, m.logical, m.physical
	i.DiskID, i.DataID = m.diskID.text(), h.dataWrite.text()
	switch {
	case m.hasParent:
		i.Variant, i.Parent, im.merge = "differencing", m.parent.parent(), m.parent.second
	case m.fixed:
		i.Variant = "fixed"
	default:
		i.Variant = "dynamic"
	}
	return nil
}

// checkBAT reads the whole BAT.
func (im *Image) checkBAT(ctx context.Context, warn func(string, ...any)) error {
	var count, first [oddities]int64
	err := im.scan(ctx, newUsage(im.d.Size(), im.spans), func(kind oddity, index int64, _ uint64) {
		if count[kind]++; count[kind] == 1 {
			first[kind] = index
		}
	})
	for kind, n := range count {
		switch {
		case oddity(kind) == oddZero || oddity(kind) == oddBeyond: // no reader minds; Check tells
		case n == 1:
			warn("BAT: entry %d %s", first[kind], oddText[kind])
		case n > 1:
			warn("BAT: entry %d %s, and so do %d more", first[kind], oddText[kind], n-1)
		}
	}
	return err
}

// Info describes the image.
func (im *Image) Info() image.Info { return im.info }

// Close closes the file.
func (im *Image) Close() error { return im.d.Close() }

// Runs covers [off, off+n) with what this image has, at the granularity of
// blocks, or of sectors where a block is partly the parent's.
func (im *Image) Runs(ctx context.Context, off, n int64) image.Runs {
	return func(yield func(image.Run, error) bool) {
		err := disk.CheckRange(im.g.size, off, n)
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

// ReadAt fills p from this image alone.
func (im *Image) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := disk.CheckRange(im.g.size, off, int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		m, err := im.lookup(ctx, off, int64(len(p)))
		if err != nil {
			return err
		}
		q := p[:m.n]
		if m.state != image.Data {
			clear(q)
		} else if err := im.d.ReadAt(ctx, q, m.host); err != nil {
			return fmt.Errorf("read at %d: %w", off, err)
		}
		p, off = p[m.n:], off+m.n
	}
	return nil
}
