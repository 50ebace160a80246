package vmdk

import (
	"context"
	"encoding/binary"
	"fmt"

	"holdfast/internal/disk"
	"holdfast/internal/image"
)

const (
	hostedMagic = "KDMV"

	flagNewlines   = 1 << 0 // the newline test is there
	flagRedundant  = 1 << 1 // a second directory with its tables is
	flagZeroGrain  = 1 << 2 // entry 1 is a grain of zeros
	flagCompressed = 1 << 16
	flagMarkers    = 1 << 17

	atEnd = ^uint64(0) // gdOffset: the directory is behind the grains

	newlines = "\n \r\n" // a transfer as text changes them

	maxGrain = 4096    // sectors: a grain that is compressed is held whole
	maxPerGT = 1 << 16 // entries of a grain table
)

// hosted is the header of a hosted sparse file, or the footer, in bytes.
type hosted struct {
	version, flags   uint32
	capacity, grain  int64
	descOff, descLen int64 // 0 for none
	perGT            int64
	gd, rgd          uint64 // sectors, as they stand there
	overhead         int64
	unclean          bool
}

// parseHosted reads and checks a header. b begins with the magic, or the file
// is shorter.
func parseHosted(b []byte, fileSize int64) (*hosted, error) {
	if len(b) < sector {
		return nil, bad("header: the file has %d bytes, too few for one", len(b))
	}
	if string(b[:4]) != hostedMagic {
		return nil, bad("header: not that of a sparse file: it begins with %x", b[:4])
	}
	le := binary.LittleEndian
	h := &hosted{version: le.Uint32(b[4:]), flags: le.Uint32(b[8:]), unclean: b[72] != 0}
	if h.version < 1 || h.version > 3 {
		return nil, unsupported("header: version %d", h.version)
	}
	if h.flags&flagNewlines != 0 && string(b[73:77]) != newlines {
		return nil, bad("header: its newline test holds %x: the file was damaged by a transfer as text", b[73:77])
	}
	const known = flagNewlines | flagRedundant | flagZeroGrain | flagCompressed | flagMarkers
	if h.flags&^known != 0 {
		return nil, unsupported("header: unknown flags %#x", h.flags&^known)
	}
	if h.flags&flagMarkers != 0 && h.flags&flagCompressed == 0 {
		return nil, unsupported("header: markers before grains that are not compressed")
	}
	if method := le.Uint16(b[77:]); h.flags&flagCompressed != 0 && method != 1 {
		return nil, unsupported("header: compression method %d", method)
	}
	perGT := le.Uint32(b[44:])
	if perGT == 0 || perGT > maxPerGT {
		return nil, bad("header: a grain table has %d entries", perGT)
	}
	h.perGT, h.rgd, h.gd = int64(perGT), le.Uint64(b[48:]), le.Uint64(b[56:])
	if err := h.parseSizes(b, fileSize); err != nil {
		return nil, err
	}
	return h, nil
}

// parseSizes reads the fields that count sectors.
func (h *hosted) parseSizes(b []byte, fileSize int64) error {
	le := binary.LittleEndian
	capacity, grain := le.Uint64(b[12:]), le.Uint64(b[20:])
	if capacity == 0 || capacity > maxDisk/sector {
		return bad("header: the capacity is %d sectors", capacity)
	}
	if err := checkGrain(grain); err != nil {
		return err
	}
	h.capacity, h.grain = int64(capacity)*sector, int64(grain)*sector
	overhead := le.Uint64(b[64:])
	if overhead > uint64(fileSize/sector) {
		return bad("header: the overhead of %d sectors is more than the file has: is the file truncated?", overhead)
	}
	h.overhead = int64(overhead) * sector
	off, n := le.Uint64(b[28:]), le.Uint64(b[36:])
	if off == 0 || n == 0 {
		return nil
	}
	if off > uint64(fileSize/sector) || n > uint64(fileSize/sector)-off {
		return bad("header: the descriptor, %d sectors from %d on, lies beyond the file's end at byte %d", n, off, fileSize)
	}
	h.descOff, h.descLen = int64(off)*sector, int64(n)*sector
	return nil
}

func checkGrain(sectors uint64) error {
	if sectors == 0 || sectors > maxGrain || sectors&(sectors-1) != 0 {
		return bad("header: a grain has %d sectors", sectors)
	}
	return nil
}

// newHosted makes the mapper of a hosted sparse file. Of a stream that keeps
// its directory behind the grains the footer says where, and if there is none,
// its markers.
func (im *Image) newHosted(ctx context.Context, f disk.Reader, h *hosted, index int) (mapper, []string, error) {
	var warnings []string
	if h.unclean {
		warnings = append(warnings, "header: the file was not closed properly: what was written last may be missing")
	}
	if h.gd == atEnd {
		if h.flags&flagMarkers == 0 {
			return nil, nil, bad("header: the grain directory is at the end of a file without markers")
		}
		footer, err := readFooter(ctx, f, h)
		if err != nil {
			return nil, nil, err
		}
		if footer == nil {
			s := newStream(f, h, maxPlaces)
			if footer, err = s.walk(ctx, h); err != nil {
				return nil, nil, err
			}
			if footer == nil {
				return s, append(warnings, "the stream has no footer: it is read by its markers"), nil
			}
		}
		if footer.capacity != h.capacity || footer.grain != h.grain || footer.perGT != h.perGT || footer.flags != h.flags {
			return nil, nil, bad("footer: it describes another disk than the header")
		}
		h.gd, h.rgd = footer.gd, footer.rgd
	}
	t := &tables{
		im: im, file: f, index: index, size: h.capacity, grain: h.grain, perGT: h.perGT, width: 4,
		compressed: h.flags&flagCompressed != 0, markers: h.flags&flagMarkers != 0,
		inflater: &inflater{},
		table:    func(e uint64) (int64, bool, error) { return int64(e) * sector, e != 0, nil },
		entry:    h.entry,
	}
	t.fixed = []span{{"header", 0, sector}}
	if h.descLen > 0 {
		t.fixed = append(t.fixed, span{"descriptor", h.descOff, h.descLen})
	}
	if err := t.setDirs(h); err != nil {
		return nil, nil, err
	}
	return t, warnings, nil
}

// setDirs finds the directory and its copy.
func (t *tables) setDirs(h *hosted) error {
	sectors := uint64(t.file.Size() / sector)
	if h.gd == 0 || h.gd > sectors {
		return bad("header: the grain directory is at sector %d of a file of %d bytes: is the file truncated?", h.gd, t.file.Size())
	}
	t.dir = int64(h.gd) * sector
	if err := t.checkDir(); err != nil {
		return err
	}
	if h.flags&flagRedundant == 0 || h.rgd == 0 || h.rgd == atEnd {
		return nil
	}
	if h.rgd > sectors {
		return bad("header: the redundant grain directory is at sector %d of a file of %d bytes: is the file truncated?", h.rgd, t.file.Size())
	}
	second := int64(h.rgd) * sector
	if second == t.dir {
		return nil
	}
	n := t.dirLen() * t.width
	if err := t.checkPlace("redundant grain directory", second, n); err != nil {
		return err
	}
	t.copies = []int64{second}
	t.fixed = append(t.fixed, span{"redundant grain directory", second, n})
	return nil
}

// entry reads a grain table's entry.
func (h *hosted) entry(e uint64) (image.State, int64, error) {
	switch {
	case e == 0:
		return image.Absent, 0, nil
	case e == 1 && h.flags&flagZeroGrain != 0:
		return image.Zero, 0, nil
	}
	return image.Data, int64(e) * sector, nil
}

// readFooter reads the footer, which is a header between its marker and the
// last one of the stream. It returns nil where there is none.
func readFooter(ctx context.Context, f disk.Reader, h *hosted) (*hosted, error) {
	size := f.Size()
	if size%sector != 0 || size < h.overhead+3*sector {
		return nil, nil
	}
	b := make([]byte, 3*sector)
	if err := f.ReadAt(ctx, b, size-3*sector); err != nil {
		return nil, fmt.Errorf("read footer: %w", err)
	}
	first, last := parseMarker(b), parseMarker(b[2*sector:])
	if first != (marker{val: 1, kind: markFooter}) || last != (marker{kind: markEnd}) || string(b[sector:sector+4]) != hostedMagic {
		return nil, nil
	}
	return parseFooter(b[sector:2*sector], size)
}

func parseFooter(b []byte, fileSize int64) (*hosted, error) {
	h, err := parseHosted(b, fileSize)
	if err == nil && (h.gd == atEnd || h.gd == 0) {
		err = bad("it does not say where the grain directory is")
	}
	if err != nil {
		return nil, fmt.Errorf("footer: %w", err)
	}
	return h, nil
}
