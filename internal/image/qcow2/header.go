package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"strings"

	"holdfast/internal/disk"
	"holdfast/internal/image"
)

const (
	magic = "QFI\xfb"

	minClusterBits = 9
	maxClusterBits = 21

	v2Length = 72  // the header of version 2
	v3Length = 104 // the least header of version 3

	maxL1     = 32 << 20 // bytes of an L1 table; QEMU's limit too
	maxRefs   = 8 << 20  // bytes of a refcount table; QEMU's limit too
	maxName   = 1023     // bytes of a backing file's name
	maxSize   = 1 << 60  // bytes of a virtual disk
	maxExtras = 64       // header extensions

	// Incompatible features.
	bitDirty       = 1 << 0 // refcounts are stale, which a reader does not mind
	bitCorrupt     = 1 << 1
	bitDataFile    = 1 << 2
	bitCompression = 1 << 3
	bitExtendedL2  = 1 << 4

	// Autoclear features: a writer that does not know one clears its bit.
	bitBitmaps = 1 << 0 // the bitmaps are up to date
	bitRawData = 1 << 1

	// Header extensions.
	extEnd           = 0
	extBackingFormat = 0xe2792aca
	extFeatureNames  = 0x6803f857
	extDataFile      = 0x44415441
	extBitmaps       = 0x23852875

	compressZlib = 0
	compressZstd = 1
)

// header is what a reader needs of an image's header.
type header struct {
	version     uint32
	clusterBits uint
	size        int64
	l1Off       int64
	l1Len       int64 // entries
	refsOff     int64
	refsLen     int64 // bytes
	snapshots   uint32
	snapsOff    int64

	incompatible uint64
	autoclear    uint64
	compression  uint8
	refOrder     uint    // refcounts have 1<<refOrder bits
	bitmaps      []byte  // the data of their header extension; nil for none
	places       []place // of tables that nothing else may overlap

	backing       string // "" for none
	backingFormat string
	dataFile      string
}

// place is where a table lies.
type place struct {
	what   string
	off, n int64
}

func (h *header) cluster() int64   { return 1 << h.clusterBits }
func (h *header) extendedL2() bool { return h.incompatible&bitExtendedL2 != 0 }

// bad makes an error of a damaged or hostile structure.
func bad(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{image.ErrFormat}, args...)...)
}

// readHeader reads and checks the header, its extensions and the strings it
// refers to, all of which lie in the first cluster. damaged lets an image pass
// that is marked corrupt.
func readHeader(ctx context.Context, f disk.Reader, damaged bool) (*header, error) {
	buf := make([]byte, min(f.Size(), 112))
	if err := f.ReadAt(ctx, buf, 0); err != nil {
		return nil, fmt.Errorf("read header: %w", err)
	}
	if len(buf) < v2Length {
		return nil, bad("the file has %d bytes, too few for a qcow2 header", f.Size())
	}
	if string(buf[:4]) != magic {
		return nil, bad("not a qcow2 image: it begins with %x", buf[:4])
	}
	h := &header{version: binary.BigEndian.Uint32(buf[4:]), refOrder: 4}
	if h.version != 2 && h.version != 3 {
		return nil, fmt.Errorf("%w: qcow2 version %d", image.ErrUnsupported, h.version)
	}
	bits := binary.BigEndian.Uint32(buf[20:])
	if bits < minClusterBits || bits > maxClusterBits {
		return nil, bad("header: cluster_bits is %d", bits)
	}
	h.clusterBits = uint(bits)
	first := make([]byte, min(f.Size(), h.cluster()))
	if err := f.ReadAt(ctx, first, 0); err != nil {
		return nil, fmt.Errorf("read header: %w", err)
	}
	extensions := int64(v2Length)
	if h.version == 3 {
		var err error
		if extensions, err = h.parseV3(first); err != nil {
			return nil, err
		}
	}
	// What names a feature comes before what judges it.
	features, err := h.parseExtensions(first, extensions)
	if err == nil {
		err = h.checkFeatures(first, features, damaged)
	}
	if err == nil {
		err = h.parseFixed(first, f.Size())
	}
	if err != nil {
		return nil, err
	}
	return h, nil
}

// parseV3 reads the fields that version 3 added and returns the header's
// length.
func (h *header) parseV3(b []byte) (int64, error) {
	if len(b) < v3Length {
		return 0, bad("the file has %d bytes, too few for a header of version 3", len(b))
	}
	n := int64(binary.BigEndian.Uint32(b[100:]))
	if n < v3Length || n%8 != 0 || n > int64(len(b)) {
		return 0, bad("header: header_length is %d", n)
	}
	h.incompatible = binary.BigEndian.Uint64(b[72:])
	h.autoclear = binary.BigEndian.Uint64(b[88:])
	if n > 104 {
		h.compression = b[104]
	}
	order := binary.BigEndian.Uint32(b[96:])
	if order > 6 {
		return 0, bad("header: refcount_order is %d", order)
	}
	h.refOrder = uint(order)
	return n, nil
}

// parseExtensions reads the header extensions, which end with one of type 0,
// where the backing file's name begins, or with the cluster. It returns the
// names that the image gives to its incompatible features, by bit.
func (h *header) parseExtensions(b []byte, at int64) (map[int]string, error) {
	features := map[int]string{}
	end := int64(len(b))
	if off := binary.BigEndian.Uint64(b[8:]); off != 0 && off < uint64(end) {
		end = int64(off)
	}
	for range maxExtras {
		if at+8 > end {
			return features, nil
		}
		kind := binary.BigEndian.Uint32(b[at:])
		n := int64(binary.BigEndian.Uint32(b[at+4:]))
		if kind == extEnd {
			return features, nil
		}
		if n > end-at-8 {
			return nil, bad("header extension %#x at offset %d: its %d bytes do not fit", kind, at, n)
		}
		data := b[at+8 : at+8+n]
		switch kind {
		case extBackingFormat:
			h.backingFormat = string(data)
		case extDataFile:
			h.dataFile = string(data)
		case extBitmaps:
			h.bitmaps = data
		case extFeatureNames:
			for ; len(data) >= 48; data = data[48:] {
				if data[0] == 0 { // an incompatible one
					features[int(data[1])] = strings.TrimRight(string(data[2:48]), "\x00")
				}
			}
		}
		at += 8 + (n+7)&^7
	}
	return nil, bad("header: more than %d extensions", maxExtras)
}

func (h *header) checkFeatures(b []byte, names map[int]string, damaged bool) error {
	const known = bitDirty | bitCorrupt | bitDataFile | bitCompression | bitExtendedL2
	var unknown []string
	for bit := range 64 {
		if h.incompatible&^known&(1<<bit) != 0 {
			name := fmt.Sprintf("bit %d", bit)
			if names[bit] != "" {
				name += fmt.Sprintf(" (%q)", names[bit])
			}
			unknown = append(unknown, name)
		}
	}
	if len(unknown) > 0 {
		return fmt.Errorf("%w: incompatible features unknown here: %s", image.ErrUnsupported, strings.Join(unknown, ", "))
	}
	if h.incompatible&bitCorrupt != 0 && !damaged {
		return fmt.Errorf("%w: repair a copy of it with qemu-img check -r all", ErrCorrupt)
	}
	switch method := binary.BigEndian.Uint32(b[32:]); method {
	case 0:
	case 1, 2:
		return fmt.Errorf("%w: it is encrypted (%s): its disk can only be read through the hypervisor that has the key",
			image.ErrUnsupported, map[uint32]string{1: "AES", 2: "LUKS"}[method])
	default:
		return bad("header: crypt_method is %d", method)
	}
	if set := h.incompatible&bitCompression != 0; set != (h.compression != compressZlib) {
		return bad("header: compression type %d does not match its feature bit", h.compression)
	}
	if h.compression > compressZstd {
		return fmt.Errorf("%w: compression type %d", image.ErrUnsupported, h.compression)
	}
	if h.extendedL2() && h.clusterBits < 14 {
		return bad("header: extended L2 entries with clusters of %d bytes", h.cluster())
	}
	return nil
}

// parseFixed reads and checks the fields that all versions have.
func (h *header) parseFixed(b []byte, fileSize int64) error {
	size := binary.BigEndian.Uint64(b[24:])
	if size > maxSize {
		return bad("header: virtual size is %d bytes", size)
	}
	h.size = int64(size)
	var err error
	h.l1Len = int64(binary.BigEndian.Uint32(b[36:]))
	if h.l1Len*8 > maxL1 {
		return bad("header: the L1 table has %d entries", h.l1Len)
	}
	if need := h.l1Need(); h.l1Len < need {
		return bad("header: the L1 table has %d entries, the disk needs %d", h.l1Len, need)
	}
	if h.l1Off, err = h.table("L1 table", b[40:], h.l1Len*8, fileSize); err != nil {
		return err
	}
	h.refsLen = int64(binary.BigEndian.Uint32(b[56:])) << h.clusterBits
	if h.refsLen > maxRefs {
		return bad("header: the refcount table has %d bytes", h.refsLen)
	}
	if h.refsOff, err = h.table("refcount table", b[48:], h.refsLen, fileSize); err != nil {
		return err
	}
	h.places = []place{{"the L1 table", h.l1Off, h.l1Len * 8}, {"the refcount table", h.refsOff, h.refsLen}}
	h.snapshots = binary.BigEndian.Uint32(b[60:])
	if h.snapshots > 0 {
		if h.snapsOff, err = h.table("snapshot table", b[64:], int64(h.snapshots)*40, fileSize); err != nil {
			return err
		}
	}
	return h.parseBacking(b)
}

func (h *header) parseBacking(b []byte) error {
	off, n := binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint32(b[16:])
	if off == 0 || n == 0 {
		return nil
	}
	if n > maxName || off > uint64(len(b)) || uint64(n) > uint64(len(b))-off {
		return bad("header: the backing file's name of %d bytes at offset %d does not fit", n, off)
	}
	if h.autoclear&bitRawData != 0 && h.incompatible&bitDataFile != 0 {
		return bad("header: a raw data file and a backing file exclude each other")
	}
	h.backing = string(b[off : off+uint64(n)])
	return nil
}

// table reads and checks the offset of a table of n bytes.
func (h *header) table(what string, b []byte, n, fileSize int64) (int64, error) {
	off := binary.BigEndian.Uint64(b)
	if n == 0 {
		return 0, nil
	}
	if off == 0 || off%uint64(h.cluster()) != 0 {
		return 0, bad("header: the %s is at offset %d, not that of a cluster", what, off)
	}
	if off > uint64(fileSize) || n > fileSize-int64(off) {
		return 0, bad("header: the %s, %d bytes at offset %d, lies beyond the file's end at %d", what, n, off, fileSize)
	}
	return int64(off), nil
}

// l1Need is how many L1 entries the virtual disk takes.
func (h *header) l1Need() int64 { return up(h.size, h.l2Entries()<<h.clusterBits) }

// l2Entries is how many clusters one L2 table describes.
func (h *header) l2Entries() int64 {
	if h.extendedL2() {
		return h.cluster() / 16
	}
	return h.cluster() / 8
}
