// Package qcow2 reads QEMU's qcow2 images, versions 2 and 3, as layers of an
// image.Chain, and makes new ones: a full image in one pass (Writer, and
// Packer for a compressed one), or an empty overlay above whatever QEMU can
// read. It never changes an existing image: live overlays are QEMU's own
// affair.
//
// A read goes through two levels of tables to a cluster of the file:
//
//	offset ─▶ L1 entry ─▶ L2 entry ─▶ nothing (the parent's), zeros, a cluster, or compressed bytes
//
// With extended L2 entries each cluster's 32 subclusters have states of their
// own. Tables are read in slices and kept in a cache of a few MiB per image, so
// that an image of any size opens at once and costs little memory.
//
// Source of all format facts: QEMU's docs/interop/qcow2 ("Qcow2 Image File
// Format"). Read: zlib and zstd compression, extended L2 entries, external
// data files, backing files, dirty images (their refcounts are stale, and no
// reader needs them), internal snapshots (each is a layer of its own), and
// persistent bitmaps. Refused by name: encryption, unknown incompatible
// features.
//
// QEMU marks an image corrupt when it meets tables that contradict each other,
// and from then on refuses to write to it. Such an image is refused here too by
// what everybody calls: a backup of it would look like any other, and in time
// push out the last good one. But it may be all that somebody has, and often
// only a few of its clusters are wrong. So Damaged and OpenDamaged read it, for
// a caller who was told and still wants what is there; no check of an offset is
// weaker then, so what cannot be right is an error and never made up.
//
// Every offset is checked against the file's length, the cluster size and the
// places of the header and the tables; errors wrap image.ErrFormat and name
// structure and offset. A cluster that begins inside the file may end beyond
// it and reads as zeros there, as QEMU writes such files; one that begins
// beyond it means a truncated file.
package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"

	"holdfast/internal/disk"
	"holdfast/internal/image"
	"holdfast/internal/image/internal/cache"
)

// Name of the format.
const Name = "qcow2"

const (
	// sliceLen is how much of a table is read and kept at once, in bytes: with
	// clusters of 64 KiB it describes 128 MiB of disk.
	sliceLen = 16 << 10
	// tableCache and clusterCache bound what one image keeps, in bytes.
	tableCache   = 4 << 20
	clusterCache = 8 << 20

	flagZero       = 1 << 0
	flagCompressed = 1 << 62
	flagCopied     = 1 << 63
	offsetMask     = 0x00fffffffffffe00 // bits 9 to 55
)

// Format is how image.Formats reads qcow2.
func Format() image.Format {
	return image.Format{
		Name:  Name,
		Match: match,
		Open: func(ctx context.Context, f image.File, resolve image.Resolver) (image.Layer, error) {
			return Open(ctx, f, resolve)
		},
	}
}

// Damaged is Format, but reads images that are marked corrupt too.
func Damaged() image.Format {
	return image.Format{
		Name:  Name,
		Match: match,
		Open: func(ctx context.Context, f image.File, resolve image.Resolver) (image.Layer, error) {
			return OpenDamaged(ctx, f, resolve)
		},
	}
}

// match wants a version too, though not only those that are readable here: an
// image of a later version, or of the format that preceded this one, had better
// be refused by its name than be read as a raw disk.
func match(ctx context.Context, f disk.Reader) (bool, error) {
	b := make([]byte, 8)
	if f.Size() < int64(len(b)) {
		return false, nil
	}
	if err := f.ReadAt(ctx, b, 0); err != nil {
		return false, err
	}
	version := binary.BigEndian.Uint32(b[4:])
	return string(b[:4]) == magic && version >= 1 && version < 16, nil
}

// ErrCorrupt is wrapped when QEMU has marked the image corrupt. It is an
// image.ErrFormat.
var ErrCorrupt = fmt.Errorf("%w: the image is marked corrupt", image.ErrFormat)

// Image is one qcow2 file, or an internal snapshot in one: an image.Layer.
type Image struct {
	*files
	h    *header
	info image.Info
	of   *Image // the image that it is a snapshot in, or nil
}

// files are what an image shares with its snapshots. The caches are by places
// in the file, so they are good for all of them.
type files struct {
	file     disk.Reader
	data     disk.Reader // where clusters lie: file, or the external data file
	external bool
	users    atomic.Int64 // the last one to close closes the files

	cluster  int64        // bytes
	tables   *cache.Cache // slices of L1 and L2 tables, by file offset
	clusters *cache.Cache // decompressed clusters, by their L2 entry without flags
	inflater *inflater
}

// Open reads an image's header. An external data file is asked of resolve. The
// Image owns f's Disk; on an error the caller still does. An image that is
// marked corrupt is refused with ErrCorrupt.
func Open(ctx context.Context, f image.File, resolve image.Resolver) (*Image, error) {
	return open(ctx, f, resolve, false)
}

// OpenDamaged is Open, but reads an image that is marked corrupt too: see the
// package comment. Check tells what is wrong with it.
func OpenDamaged(ctx context.Context, f image.File, resolve image.Resolver) (*Image, error) {
	return open(ctx, f, resolve, true)
}

func open(ctx context.Context, f image.File, resolve image.Resolver, damaged bool) (*Image, error) {
	h, err := readHeader(ctx, f.Disk, damaged)
	if err != nil {
		return nil, err
	}
	x := &files{file: f.Disk, data: f.Disk, cluster: h.cluster(), inflater: newInflater(h.compression)}
	x.tables = cache.New(tableCache, x.loadSlice)
	x.clusters = cache.New(clusterCache, x.loadCompressed)
	x.users.Store(1)
	im := &Image{files: x, h: h}
	if err := im.describe(ctx); err != nil {
		return nil, err
	}
	if h.incompatible&bitDataFile != 0 {
		if h.dataFile == "" {
			return nil, bad("header: it keeps its data in another file and does not name it")
		}
		if resolve == nil {
			return nil, fmt.Errorf("%w: its data file, and no other file can be opened here", image.ErrOutside)
		}
		d, err := resolve(ctx, f.Name, h.dataFile)
		if err == nil {
			err = image.InPlace(f.Name, h.dataFile, d)
		}
		if err != nil {
			return nil, fmt.Errorf("open its data file: %w", err)
		}
		x.data, x.external = d.Disk, true
	}
	return im, nil
}

// Info describes the image. Its Size need not be whole clusters or sectors.
func (im *Image) Info() image.Info { return im.info }

// describe sets info.
func (im *Image) describe(ctx context.Context) error {
	h := im.h
	i := image.Info{Format: Name, Variant: fmt.Sprintf("version %d", h.version), Size: h.size, Block: h.cluster()}
	if h.compression == compressZstd {
		i.Variant += ", zstd"
	}
	if h.extendedL2() {
		i.Variant += ", extended L2"
	}
	if h.incompatible&bitDataFile != 0 {
		i.Variant += ", external data file"
	}
	if h.backing != "" {
		i.Parent = &image.Parent{Names: []string{h.backing}, Format: h.backingFormat}
	}
	if h.incompatible&bitCorrupt != 0 {
		i.Warnings = append(i.Warnings, "the image is marked corrupt: some of what it reads as may be wrong")
	}
	if h.incompatible&bitDirty != 0 {
		i.Warnings = append(i.Warnings, "the image was not closed: its refcounts are stale, which does not matter for reading")
	}
	w, err := im.warnSnapshots(ctx)
	if w != "" {
		i.Warnings = append(i.Warnings, w)
	}
	im.info = i
	return err
}

// Close closes the file and the external data file, if the image and all its
// open snapshots are closed now.
func (im *Image) Close() error {
	if im.users.Add(-1) > 0 {
		return nil
	}
	err := im.file.Close()
	if im.external {
		err = errors.Join(err, im.data.Close())
	}
	return err
}

// Runs covers [off, off+n) with what this image has, at the granularity of
// clusters or subclusters.
func (im *Image) Runs(ctx context.Context, off, n int64) image.Runs {
	return func(yield func(image.Run, error) bool) {
		err := disk.CheckRange(im.h.size, off, n)
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
	if err := disk.CheckRange(im.h.size, off, int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		m, err := im.lookup(ctx, off, int64(len(p)))
		if err != nil {
			return err
		}
		n := m.n
		switch {
		case m.state != image.Data:
			clear(p[:n])
		case m.compressed:
			n, err = im.readCompressed(ctx, p, off, m)
		default:
			err = im.readHost(ctx, p[:n], m.host)
		}
		if err != nil {
			return fmt.Errorf("read at %d: %w", off, err)
		}
		p, off = p[n:], off+n
	}
	return nil
}

// readHost reads from the file that holds clusters; what lies beyond its end,
// within the last cluster, is zeros.
func (im *Image) readHost(ctx context.Context, p []byte, host int64) error {
	if n := max(0, min(int64(len(p)), im.data.Size()-host)); n < int64(len(p)) {
		clear(p[n:])
		p = p[:n]
	}
	if len(p) == 0 {
		return nil
	}
	return im.data.ReadAt(ctx, p, host)
}

// mapping is where the bytes at some offset are.
type mapping struct {
	n          int64 // bytes for which this holds
	state      image.State
	host       int64 // offset in the data file of the first byte; of a compressed cluster its descriptor
	compressed bool
}

// lookup tells where the bytes at off are, for up to n bytes: as many as one
// slice of a table tells without a change.
func (im *Image) lookup(ctx context.Context, off, n int64) (mapping, error) {
	if err := ctx.Err(); err != nil {
		return mapping{}, err
	}
	covers := im.h.l2Entries() << im.h.clusterBits // bytes of disk per L1 entry
	l2, empty, err := im.l1(ctx, off/covers, (off+n-1)/covers)
	if err != nil {
		return mapping{}, err
	}
	if l2 == 0 {
		return mapping{n: min(n, empty*covers-off%covers), state: image.Absent}, nil
	}
	n = min(n, covers-off%covers)
	index := off % covers >> im.h.clusterBits
	entry := im.h.cluster() / im.h.l2Entries() // bytes of an L2 entry
	at := l2 + index*entry
	slice, err := im.slice(ctx, at, l2+im.h.cluster())
	if err != nil {
		return mapping{}, fmt.Errorf("read L2 table at offset %d: %w", l2, err)
	}
	m, err := im.scan(slice, l2, off, n)
	if err != nil {
		return mapping{}, fmt.Errorf("L2 table at offset %d, entry %d: %w", l2, index, err)
	}
	return m, nil
}

// l1 returns the offset of the L2 table that the L1 entry names, or 0 and the
// number of entries from it on, up to last, that name none: one at least.
func (im *Image) l1(ctx context.Context, index, last int64) (l2, empty int64, err error) {
	end := im.h.l1Off + im.h.l1Len*8
	b, err := im.slice(ctx, im.h.l1Off+index*8, end)
	if err != nil {
		return 0, 0, fmt.Errorf("read L1 table at offset %d: %w", im.h.l1Off, err)
	}
	for ; len(b) >= 8 && index+empty <= last; b = b[8:] {
		e := binary.BigEndian.Uint64(b)
		if e&^flagCopied == 0 {
			empty++
			continue
		}
		if empty > 0 {
			return 0, empty, nil
		}
		l2 = int64(e & offsetMask)
		if e&^(offsetMask|flagCopied) != 0 || l2%im.h.cluster() != 0 {
			return 0, 0, bad("L1 entry %d is %#x", index, e)
		}
		if err := im.checkPlace(l2, im.h.cluster(), im.file.Size()); err != nil {
			return 0, 0, fmt.Errorf("L1 entry %d: L2 table %w", index, err)
		}
		return l2, 0, nil
	}
	return 0, empty, nil
}

// checkPlace refuses n bytes of the image's own file that lie beyond its end,
// or where the header or a table of the first level lies.
func (im *Image) checkPlace(off, n, fileSize int64) error {
	switch {
	case off > fileSize-n:
		return bad("at offset %d lies beyond the file's end at %d: is the file truncated?", off, fileSize)
	case off < im.h.cluster():
		return bad("at offset %d overlaps the header", off)
	}
	for _, p := range im.h.places {
		if off < p.off+p.n && off+n > p.off {
			return bad("at offset %d overlaps %s at %d", off, p.what, p.off)
		}
	}
	return nil
}

// slice returns the table's bytes from offset at to the end of the slice that
// holds them, or of the table.
func (im *Image) slice(ctx context.Context, at, end int64) ([]byte, error) {
	base := at - at%sliceLen
	b, err := im.tables.Get(ctx, base)
	if err != nil {
		return nil, err
	}
	b = b[min(at-base, int64(len(b))):]
	b = b[:min(int64(len(b)), end-at)]
	if len(b) < 8 { // entries do not straddle slices, so the file ends here
		return nil, bad("the table ends at offset %d with the file", at+int64(len(b)))
	}
	return b, nil
}

func (im *files) loadSlice(ctx context.Context, base int64) ([]byte, error) {
	b := make([]byte, min(sliceLen, im.file.Size()-base))
	return b, im.file.ReadAt(ctx, b, base)
}

// scan reads entries of the L2 table at l2 from the one that describes off on,
// as far as they continue the first one's state, for up to n bytes.
func (im *Image) scan(b []byte, l2, off, n int64) (mapping, error) {
	step := im.h.cluster() / im.h.l2Entries()
	var m mapping
	for first := true; m.n < n && int64(len(b)) >= step; first = false {
		at := off + m.n
		next, err := im.entry(b, l2, at)
		if err != nil && !first {
			break // what came before is good; the error comes when it is asked for
		}
		if err != nil {
			return mapping{}, err
		}
		if first {
			m = next
		} else if !m.continued(next) {
			break
		} else {
			m.n += next.n
		}
		if (off+m.n)&(im.h.cluster()-1) == 0 { // else the same entry's further subclusters
			b = b[step:]
		}
	}
	if m.n == 0 {
		return mapping{}, bad("the table ends within the entry")
	}
	m.n = min(m.n, n)
	return m, nil
}

// continued reports whether next, which begins where m ends, is more of it.
func (m mapping) continued(next mapping) bool {
	if m.state != next.state || m.compressed || next.compressed {
		return false
	}
	return m.state != image.Data || m.host+m.n == next.host
}

// entry reads one L2 entry for the disk's bytes from off on: to the end of the
// cluster, or of its subclusters of one state.
func (im *Image) entry(b []byte, l2, off int64) (mapping, error) {
	e := binary.BigEndian.Uint64(b)
	in := off & (im.h.cluster() - 1) // offset in the cluster
	m := mapping{n: im.h.cluster() - in}
	if e&flagCompressed != 0 {
		if im.external {
			return m, bad("a compressed cluster in an external data file")
		}
		m.state, m.compressed, m.host = image.Data, true, int64(e&(flagCompressed-1))
		return m, nil
	}
	host := int64(e & offsetMask)
	reserved := uint64(0x3f000000000001fe)
	if im.h.version == 2 {
		reserved |= flagZero
	}
	if e&reserved != 0 || host%im.h.cluster() != 0 {
		return m, bad("the entry is %#x", e)
	}
	// An offset of 0 is one only in an external data file, and when marked.
	allocated := host != 0 || im.external && e&flagCopied != 0
	switch {
	case im.h.extendedL2():
		if err := im.subclusters(&m, binary.BigEndian.Uint64(b[8:]), in, allocated); err != nil {
			return m, err
		}
	case e&flagZero != 0:
		m.state = image.Zero
	case allocated:
		m.state = image.Data
	}
	if m.state == image.Data {
		m.host = host + in
		return m, im.checkData(host, l2, off-in)
	}
	return m, nil
}

// subclusters sets state and length from the bitmap of an extended entry.
func (im *Image) subclusters(m *mapping, bitmap uint64, in int64, allocated bool) error {
	alloc, zero := uint32(bitmap), uint32(bitmap>>32)
	if alloc&zero != 0 {
		return bad("the subcluster bitmap %#x has subclusters that are both data and zeros", bitmap)
	}
	if alloc != 0 && !allocated {
		return bad("the subcluster bitmap %#x has data in a cluster that has none", bitmap)
	}
	size := im.h.cluster() / 32
	i := in / size
	var same uint32 // the subclusters of the state of the first
	switch {
	case alloc>>i&1 != 0:
		m.state, same = image.Data, alloc
	case zero>>i&1 != 0:
		m.state, same = image.Zero, zero
	default:
		m.state, same = image.Absent, ^(alloc | zero)
	}
	// Shifting brings zeros in from above, so the count stops at the 32nd.
	n := int64(bits.TrailingZeros32(^(same >> i)))
	m.n = (i+n)*size - in
	return nil
}

// checkData refuses a cluster of data where none can be.
func (im *Image) checkData(host, l2, off int64) error {
	if im.external {
		if host != off {
			return bad("the cluster at offset %d of the disk is at %d of the external data file", off, host)
		}
	} else if host == l2 {
		return bad("its cluster at offset %d overlaps the L2 table", host)
	}
	if host >= im.data.Size() {
		return bad("its cluster at offset %d lies beyond the file's end at %d: is the file truncated?", host, im.data.Size())
	}
	if im.external {
		return nil
	}
	return im.checkPlace(host, min(im.h.cluster(), im.file.Size()-host), im.file.Size())
}
