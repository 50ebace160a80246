// Package vmdk reads VMware's disk images as layers of an image.Chain, and
// makes new ones: a hosted sparse file as a view, the descriptor of a flat
// file, and a compressed stream. It never changes an existing image.
//
// A disk is a text, the descriptor, and the extents that it lists, one behind
// the other on the disk, each in a file of its own or in none:
//
//	descriptor ─▶ FLAT, VMFS, VMFSTHIN   the file's bytes
//	           ─▶ SPARSE                 "KDMV": grains, perhaps compressed     ┐
//	           ─▶ VMFSSPARSE             "COWD": grains, of ESX's old snapshots ├ directory ─▶ table ─▶ grain
//	           ─▶ SESPARSE               grains, of ESXi's snapshots            ┘
//	           ─▶ ZERO                   zeros
//
// A sparse file that has its descriptor inside reads itself, under whatever
// name it lies there now; a descriptor in a file of its own opens what it
// names, through the Resolver alone. What the bytes of a FLAT extent look like
// is nobody's business: they are a guest's. A piece of a disk (a file without
// a descriptor) is not opened as a disk. Parents are known by their content id.
//
// Tables are read in slices and kept in a cache of a few MiB per image,
// whatever the number and size of its extents. A compressed stream whose
// directory is missing is walked from marker to marker once, and then found
// through at most 256 Ki places along it.
//
// Source of all format facts: VMware's "Virtual Disk Format 5.0" technical
// note; for ESX's two snapshot formats, which it leaves out, what is publicly
// known of them, compared with QEMU's reading. Refused by name: encrypted
// disks, device maps, seSparse files whose journal must be replayed, unknown
// versions and flags.
//
// Every place is checked against the file's length and that of the header and
// directory; errors wrap image.ErrFormat and name structure and offset. What
// lies beyond the file's end is an error, never zeros: a file is truncated
// sooner than it is written short.
package vmdk

import (
	"context"
	"errors"
	"fmt"
	"sort"

	"holdfast/internal/disk"
	"holdfast/internal/image"
	"holdfast/internal/image/internal/cache"
)

// Name of the format.
const Name = "vmdk"

const (
	sector = 512

	// sliceLen is how much of a table is read and kept at once, in bytes: with
	// grains of 64 KiB it describes 256 MiB of disk.
	sliceLen = 16 << 10
	// tableCache and grainCache bound what one image keeps, in bytes.
	tableCache = 4 << 20
	grainCache = 8 << 20
)

// The kinds of extents that are read.
const (
	kindFlat       = "FLAT"
	kindSparse     = "SPARSE"
	kindZero       = "ZERO"
	kindVMFS       = "VMFS"
	kindVMFSThin   = "VMFSTHIN"
	kindVMFSSparse = "VMFSSPARSE"
	kindSESparse   = "SESPARSE"
)

// Format is how image.Formats reads VMDK.
func Format() image.Format {
	return image.Format{
		Name:  Name,
		Match: match,
		Open: func(ctx context.Context, f image.File, resolve image.Resolver) (image.Layer, error) {
			return Open(ctx, f, resolve)
		},
	}
}

// match knows sparse files by their magic, and a descriptor by its first line
// and by being no longer than one can be. A seSparse file is always an extent.
func match(ctx context.Context, f disk.Reader) (bool, error) {
	b := make([]byte, min(f.Size(), int64(len(signature))))
	if err := f.ReadAt(ctx, b, 0); err != nil {
		return false, err
	}
	if len(b) < 4 {
		return false, nil
	}
	m := string(b[:4])
	return m == hostedMagic || m == cowdMagic || isDescriptor(b) && f.Size() <= maxText, nil
}

// Image is one VMDK disk, without its parents: an image.Layer.
type Image struct {
	info    image.Info
	extents []extent
	files   []disk.Reader // all that are open, to close them

	tables *cache.Cache // slices of directories and tables, by cacheKey of sliceLen
	grains *cache.Cache // decompressed grains, by cacheKey of their number
}

// extent is a range of the disk and where its bytes are.
type extent struct {
	off, len int64 // on the disk, bytes
	line     int   // of the descriptor
	file     disk.Reader
	fileNo   int    // in Image.files
	at       int64  // where it begins in the file, if flat
	m        mapper // nil: flat, or zeros when there is no file either
}

// mapper finds the bytes of a sparse extent. Offsets are the extent's.
type mapper interface {
	// lookup tells where the bytes at off are, for up to n bytes.
	lookup(ctx context.Context, off, n int64) (mapping, error)
	// grainBytes returns the compressed grain of that number, whole.
	grainBytes(ctx context.Context, number int64) ([]byte, error)
	check(ctx context.Context, report func(string)) error
	// capacity is the file's own idea of its extent's length, bytes.
	capacity() int64
	grainSize() int64
}

// mapping is where the bytes at some offset are.
type mapping struct {
	n          int64 // bytes for which this holds
	state      image.State
	host       int64 // offset in the file of the first byte, of Data
	compressed bool  // host is the compressed grain's place
}

// cacheKey is one key for all extents of an image: both maxExtents and maxDisk
// leave room for the other.
func cacheKey(extent int, n int64) int64 { return int64(extent)<<48 | n }

// Open reads the descriptor, in f or in a file inside it, and opens the
// extents that it names through resolve. The Image owns f's Disk and those of
// the extents; on an error the caller still owns f's.
func Open(ctx context.Context, f image.File, resolve image.Resolver) (*Image, error) {
	if f.Disk.Size() > maxDisk {
		return nil, bad("the file has %d bytes, more than any VMDK file", f.Disk.Size())
	}
	head := make([]byte, min(f.Disk.Size(), sector))
	if err := f.Disk.ReadAt(ctx, head, 0); err != nil {
		return nil, fmt.Errorf("read header: %w", err)
	}
	im := &Image{}
	im.tables = cache.New(tableCache, im.loadSlice)
	im.grains = cache.New(grainCache, im.loadGrain)
	var err error
	switch {
	case isDescriptor(head):
		err = im.openText(ctx, f, resolve)
	case len(head) >= 4 && string(head[:4]) == hostedMagic:
		err = im.openEmbedded(ctx, f, head)
	case len(head) >= 4 && string(head[:4]) == cowdMagic:
		err = unsupported("the file is a piece of a disk (COWD) and does not say of which: open the descriptor that names it")
	case isSESparse(head):
		err = unsupported("the file is a piece of a disk (seSparse) and does not say of which: open the descriptor that names it")
	default:
		err = bad("not a VMDK image: it begins with %x", head[:min(4, len(head))])
	}
	if err != nil {
		return nil, errors.Join(err, im.Close())
	}
	im.files = append(im.files, f.Disk)
	return im, nil
}

// openEmbedded opens a sparse file that has its descriptor inside. The name
// that the descriptor gives it is of no account.
func (im *Image) openEmbedded(ctx context.Context, f image.File, head []byte) error {
	h, err := parseHosted(head, f.Disk.Size())
	if err != nil {
		return err
	}
	if h.descLen == 0 {
		return unsupported("the file is a piece of a disk (it has no descriptor inside): open the descriptor that names it")
	}
	d, err := readText(ctx, f.Disk, h.descOff, h.descLen)
	if err != nil {
		return err
	}
	if len(d.extents) != 1 || d.extents[0].kind != kindSparse {
		return unsupported("descriptor: %d extents, the first of kind %s, in a sparse file that can hold but one", len(d.extents), d.extents[0].kind)
	}
	m, warnings, err := im.newHosted(ctx, f.Disk, h, 0)
	if err == nil {
		err = checkTables(ctx, m)
	}
	if err != nil {
		return err
	}
	if n := d.extents[0].sectors * sector; n != m.capacity() {
		d.warn("the descriptor says %d bytes, the header %d, which counts", n, m.capacity())
	}
	im.extents = []extent{{len: m.capacity(), line: d.extents[0].no, file: f.Disk, m: m}}
	im.describe(d, append(d.warnings, warnings...))
	return nil
}

// openText opens the extents of a descriptor.
func (im *Image) openText(ctx context.Context, f image.File, resolve image.Resolver) error {
	d, err := readText(ctx, f.Disk, 0, f.Disk.Size())
	if err != nil {
		return err
	}
	o := opener{im: im, self: f.Name, resolve: resolve, byName: map[string]*opened{}}
	off := int64(0)
	for i, l := range d.extents {
		if err := ctx.Err(); err != nil {
			return err
		}
		e, warnings, err := o.open(ctx, i, l)
		if err != nil {
			return fmt.Errorf("extent %.200q (descriptor line %d): %w", l.name, l.no, err)
		}
		e.off, e.len, e.line = off, l.sectors*sector, l.no
		off += e.len
		im.extents = append(im.extents, e)
		for _, w := range warnings {
			d.warn("extent %.200q: %s", l.name, w)
		}
	}
	im.describe(d, d.warnings)
	return nil
}

// describe makes the Info.
func (im *Image) describe(d *descriptor, warnings []string) {
	last := im.extents[len(im.extents)-1]
	im.info = image.Info{
		Format: Name, Variant: d.createType, Size: last.off + last.len, LogicalSector: sector,
		DiskID: d.uuid, DataID: d.cid, Parent: d.parent(), Warnings: warnings,
	}
	for _, e := range im.extents {
		if e.m != nil {
			im.info.Block = e.m.grainSize()
			break
		}
	}
}

// opener opens the files of a descriptor's extents, each once.
type opener struct {
	im      *Image
	self    string // the descriptor's file
	resolve image.Resolver
	byName  map[string]*opened // by "d" and the descriptor's name, by "f" and the Resolver's
}

type opened struct {
	disk   disk.Reader
	no     int  // in Image.files
	sparse bool // a sparse extent already
}

func (o *opener) open(ctx context.Context, index int, l line) (extent, []string, error) {
	if l.kind == kindZero {
		return extent{}, nil, nil
	}
	f, err := o.file(ctx, l.name)
	if err != nil {
		return extent{}, nil, err
	}
	d := f.disk
	if l.kind == kindFlat || l.kind == kindVMFS || l.kind == kindVMFSThin {
		if have := d.Size() / sector; l.offset > have || l.sectors > have-l.offset {
			return extent{}, nil, bad("its %d sectors from %d on lie beyond the file's end at byte %d: is the file truncated?", l.sectors, l.offset, d.Size())
		}
		return extent{file: d, fileNo: f.no, at: l.offset * sector}, nil, nil
	}
	if f.sparse {
		return extent{}, nil, bad("the file is an extent already")
	}
	f.sparse = true
	m, warnings, err := o.im.openSparse(ctx, d, l.kind, index)
	if err != nil {
		return extent{}, nil, err
	}
	switch n := l.sectors * sector; {
	case n > m.capacity():
		return extent{}, nil, bad("the descriptor says %d bytes, the file has %d", n, m.capacity())
	case n < m.capacity():
		warnings = append(warnings, fmt.Sprintf("the descriptor says %d bytes, which counts, the file %d", n, m.capacity()))
	}
	return extent{file: d, fileNo: f.no, m: m}, warnings, nil
}

// file opens a file by the name that the descriptor has for it.
func (o *opener) file(ctx context.Context, name string) (*opened, error) {
	if f := o.byName["d"+name]; f != nil {
		return f, nil
	}
	if o.resolve == nil {
		return nil, fmt.Errorf("%w: no other file can be opened here", image.ErrOutside)
	}
	f, err := o.resolve(ctx, o.self, name)
	if err == nil {
		err = image.InPlace(o.self, name, f)
	}
	if err != nil {
		return nil, err
	}
	known := o.byName["f"+f.Name]
	switch {
	case f.Name == o.self:
		return nil, errors.Join(bad("the descriptor names itself as an extent"), f.Disk.Close())
	case f.Disk.Size() > maxDisk:
		return nil, errors.Join(bad("the file has %d bytes, more than any VMDK file", f.Disk.Size()), f.Disk.Close())
	case known != nil: // by another name
		if err := f.Disk.Close(); err != nil {
			return nil, err
		}
	default:
		known = &opened{disk: f.Disk, no: len(o.im.files)}
		o.im.files = append(o.im.files, f.Disk)
	}
	o.byName["d"+name], o.byName["f"+f.Name] = known, known
	return known, nil
}

// openSparse reads the header of a sparse extent's file.
func (im *Image) openSparse(ctx context.Context, f disk.Reader, kind string, index int) (mapper, []string, error) {
	head := make([]byte, min(f.Size(), cowdHeader))
	if err := f.ReadAt(ctx, head, 0); err != nil {
		return nil, nil, fmt.Errorf("read header: %w", err)
	}
	var m mapper
	var warnings []string
	var err error
	switch kind {
	case kindVMFSSparse:
		m, warnings, err = im.newCOWD(f, head, index)
	case kindSESparse:
		m, warnings, err = im.newSESparse(ctx, f, head, index)
	default:
		var h *hosted
		if h, err = parseHosted(head, f.Size()); err == nil {
			m, warnings, err = im.newHosted(ctx, f, h, index)
		}
	}
	if err == nil {
		err = checkTables(ctx, m)
	}
	return m, warnings, err
}

// checkTables is that of extents that have a directory.
func checkTables(ctx context.Context, m mapper) error {
	if t, ok := m.(*tables); ok {
		return t.checkTables(ctx)
	}
	return nil
}

// Info describes the image. Its Size is whole sectors, not always grains.
func (im *Image) Info() image.Info { return im.info }

// Close closes all files.
func (im *Image) Close() error {
	var errs []error
	for _, f := range im.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// at is the index of the extent that holds off.
func (im *Image) at(off int64) int {
	return sort.Search(len(im.extents), func(i int) bool { return im.extents[i].off > off }) - 1
}

// Runs covers [off, off+n) with what this image has, at the granularity of
// grains; in flat extents, at that of the file's holes.
func (im *Image) Runs(ctx context.Context, off, n int64) image.Runs {
	return func(yield func(image.Run, error) bool) {
		if err := disk.CheckRange(im.info.Size, off, n); err != nil {
			yield(image.Run{}, err)
			return
		}
		for end := off + n; off < end; {
			e := &im.extents[im.at(off)]
			part := min(end, e.off+e.len) - off
			for r, err := range e.runs(ctx, off-e.off, part) {
				if err == nil {
					err = ctx.Err()
				}
				if err != nil {
					yield(image.Run{}, fmt.Errorf("extent of descriptor line %d: %w", e.line, err))
					return
				}
				r.Off += e.off
				if !yield(r, nil) {
					return
				}
			}
			off += part
		}
	}
}

// runs are those of one extent, by its own offsets.
func (e *extent) runs(ctx context.Context, off, n int64) image.Runs {
	return func(yield func(image.Run, error) bool) {
		if e.file == nil {
			yield(image.Run{Off: off, Len: n, State: image.Zero}, nil)
			return
		}
		if e.m == nil {
			for x, err := range e.file.Extents(ctx, e.at+off, n) {
				r := image.Run{Off: x.Off - e.at, Len: x.Len, State: image.Data}
				if x.Zero {
					r.State = image.Zero
				}
				if !yield(r, err) || err != nil {
					return
				}
			}
			return
		}
		for end := off + n; off < end; {
			m, err := e.m.lookup(ctx, off, end-off)
			if !yield(image.Run{Off: off, Len: m.n, State: m.state}, err) || err != nil {
				return
			}
			off += m.n
		}
	}
}

// ReadAt fills p from this image alone.
func (im *Image) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := disk.CheckRange(im.info.Size, off, int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		i := im.at(off)
		e := &im.extents[i]
		q := p[:min(int64(len(p)), e.off+e.len-off)]
		if err := im.read(ctx, i, q, off-e.off); err != nil {
			return fmt.Errorf("read at %d: extent of descriptor line %d: %w", off, e.line, err)
		}
		p, off = p[len(q):], off+int64(len(q))
	}
	return nil
}

// read fills p from one extent, by its own offsets.
func (im *Image) read(ctx context.Context, index int, p []byte, off int64) error {
	e := &im.extents[index]
	if err := ctx.Err(); err != nil {
		return err
	}
	if e.file == nil {
		clear(p)
		return nil
	}
	if e.m == nil {
		return e.file.ReadAt(ctx, p, e.at+off)
	}
	for len(p) > 0 {
		m, err := e.m.lookup(ctx, off, int64(len(p)))
		if err != nil {
			return err
		}
		q := p[:m.n]
		switch {
		case m.state != image.Data:
			clear(q)
		case m.compressed:
			size := e.m.grainSize()
			var g []byte
			if g, err = im.grains.Get(ctx, cacheKey(index, off/size)); err == nil {
				copy(q, g[off%size:])
			}
		default:
			err = e.file.ReadAt(ctx, q, m.host)
		}
		if err != nil {
			return err
		}
		p, off = p[m.n:], off+m.n
	}
	return nil
}

func (im *Image) loadGrain(ctx context.Context, key int64) ([]byte, error) {
	return im.extents[key>>48].m.grainBytes(ctx, key&(1<<48-1))
}
