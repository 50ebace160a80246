package vmdk

import (
	"context"
	"encoding/binary"
	"fmt"

	"holdfast/internal/disk"
	"holdfast/internal/image"
)

// ESX's snapshots: extents of descriptors that name a parent.

const (
	cowdMagic  = "COWD"
	cowdHeader = 4 * sector
	cowdPerGT  = 4096

	cowdRoot, cowdCheckable, cowdInconsistent = 1, 2, 4 // flags
	cowdUnclean                               = 1652    // offset of uncleanShutdown, u32
)

// newCOWD makes the mapper of a VMFSSPARSE extent.
func (im *Image) newCOWD(f disk.Reader, b []byte, index int) (mapper, []string, error) {
	if len(b) < cowdHeader {
		return nil, nil, bad("header: the file has %d bytes, too few for one", len(b))
	}
	if string(b[:4]) != cowdMagic {
		return nil, nil, bad("header: not that of a VMFSSPARSE extent: it begins with %x", b[:4])
	}
	le := binary.LittleEndian
	if v := le.Uint32(b[4:]); v != 1 {
		return nil, nil, unsupported("header: version %d", v)
	}
	flags := le.Uint32(b[8:])
	if flags&^(cowdRoot|cowdCheckable|cowdInconsistent) != 0 {
		return nil, nil, unsupported("header: unknown flags %#x", flags)
	}
	if flags&cowdInconsistent != 0 {
		return nil, nil, bad("header: the file is marked inconsistent")
	}
	capacity, grain := le.Uint32(b[12:]), le.Uint32(b[16:])
	if capacity == 0 {
		return nil, nil, bad("header: the capacity is 0 sectors")
	}
	if err := checkGrain(uint64(grain)); err != nil {
		return nil, nil, err
	}
	t := &tables{
		im: im, file: f, index: index, size: int64(capacity) * sector, grain: int64(grain) * sector,
		perGT: cowdPerGT, width: 4, dir: int64(le.Uint32(b[20:])) * sector,
		fixed: []span{{"header", 0, cowdHeader}},
		table: func(e uint64) (int64, bool, error) { return int64(e) * sector, e != 0, nil },
		entry: (&hosted{}).entry,
	}
	if have := int64(le.Uint32(b[24:])); have < t.dirLen() {
		return nil, nil, bad("header: the grain directory has %d entries, the disk needs %d", have, t.dirLen())
	}
	var warnings []string
	if le.Uint32(b[cowdUnclean:]) != 0 {
		warnings = append(warnings, "header: the file was not closed properly: what was written last may be missing")
	}
	return t, warnings, t.checkDir()
}

const (
	seMagic         = 0x00000000cafebabe
	seVersion       = 0x0000000200000001
	seVolatileMagic = 0x00000000cafecafe
	seGrain         = 8 * sector
	seTable         = 64 * sector
)

func isSESparse(b []byte) bool {
	return len(b) >= 8 && binary.LittleEndian.Uint64(b) == seMagic
}

// seHeader is what a reader needs of a seSparse file's constant header, in
// bytes.
type seHeader struct {
	capacity          int64
	volatile          int64
	dir, dirLen       int64
	tables, tablesLen int64
	grains            int64
}

// newSESparse makes the mapper of a SESPARSE extent. Its journal is not read:
// a file that needs it is refused.
func (im *Image) newSESparse(ctx context.Context, f disk.Reader, b []byte, index int) (mapper, []string, error) {
	h, err := parseSESparse(b, f.Size())
	if err != nil {
		return nil, nil, err
	}
	v := make([]byte, sector)
	if err := inside("volatile header", h.volatile, sector, f.Size()); err != nil {
		return nil, nil, err
	}
	if err := f.ReadAt(ctx, v, h.volatile); err != nil {
		return nil, nil, fmt.Errorf("read volatile header: %w", err)
	}
	if magic := binary.LittleEndian.Uint64(v); magic != seVolatileMagic {
		return nil, nil, bad("volatile header at offset %d: it begins with %#x", h.volatile, magic)
	}
	if binary.LittleEndian.Uint64(v[24:]) != 0 {
		return nil, nil, unsupported("volatile header: changes are only in the file's journal, which the host must replay first: let it open the disk, or close it properly")
	}
	t := &tables{
		im: im, file: f, index: index, size: h.capacity, grain: seGrain, perGT: seTable / 8, width: 8, dir: h.dir,
		fixed: []span{{"header", 0, sector}, {"volatile header", h.volatile, sector}},
		table: h.table,
	}
	t.entry = func(e uint64) (image.State, int64, error) { return h.entry(e, f.Size()) }
	if h.dirLen/8 < t.dirLen() {
		return nil, nil, bad("header: the grain directory has %d entries, the disk needs %d", h.dirLen/8, t.dirLen())
	}
	return t, nil, t.checkDir()
}

func parseSESparse(b []byte, fileSize int64) (*seHeader, error) {
	if len(b) < sector {
		return nil, bad("header: the file has %d bytes, too few for one", len(b))
	}
	if !isSESparse(b) {
		return nil, bad("header: not that of a SESPARSE extent: it begins with %x", b[:8])
	}
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(b[8*i:]) }
	if v := word(1); v != seVersion {
		return nil, unsupported("header: version %#x", v)
	}
	if g, t := word(3), word(4); g != seGrain/sector || t != seTable/sector {
		return nil, unsupported("header: grains of %d sectors with tables of %d", g, t)
	}
	for i := 5; i < 10; i++ { // flags and reserved fields
		if word(i) != 0 {
			return nil, unsupported("header: unknown flags %#x in field %d", word(i), i)
		}
	}
	capacity := word(2)
	if capacity == 0 || capacity > maxDisk/sector {
		return nil, bad("header: the capacity is %d sectors", capacity)
	}
	h := &seHeader{capacity: int64(capacity) * sector}
	for _, x := range []struct {
		what string
		at   int
		off  *int64
		n    *int64
	}{
		{"volatile header", 10, &h.volatile, nil},
		{"grain directory", 16, &h.dir, &h.dirLen},
		{"grain tables", 18, &h.tables, &h.tablesLen},
		{"grains", 24, &h.grains, nil},
	} {
		off, n := word(x.at), word(x.at+1)
		if sectors := uint64(fileSize / sector); off == 0 || off > sectors || x.n != nil && n > sectors-off {
			return nil, bad("header: the %s, %d sectors from %d on, lies beyond the file's end at byte %d: is the file truncated?", x.what, n, off, fileSize)
		}
		*x.off = int64(off) * sector
		if x.n != nil {
			*x.n = int64(n) * sector
		}
	}
	return h, nil
}

// table reads an entry of the directory: the number of a table.
func (h *seHeader) table(e uint64) (int64, bool, error) {
	if e == 0 {
		return 0, false, nil
	}
	i := int64(uint32(e))
	if e>>32 != 1<<28 || i >= h.tablesLen/seTable {
		return 0, true, bad("the entry is %#x", e)
	}
	return h.tables + i*seTable, true, nil
}

// entry reads an entry of a table: two bits of state and the number of a grain,
// the higher part of which is behind the lower.
func (h *seHeader) entry(e uint64, fileSize int64) (image.State, int64, error) {
	low := e & (1<<60 - 1)
	switch e >> 60 {
	case 0:
		if low == 0 {
			return image.Absent, 0, nil
		}
	case 1, 2: // unmapped by the guest; written as zeros
		return image.Zero, 0, nil
	case 3:
		number := low>>48 | low<<12&(1<<60-1)
		if number > uint64(fileSize/seGrain) {
			return 0, 0, bad("grain: number %d lies beyond the file's end at %d: is the file truncated?", number, fileSize)
		}
		return image.Data, h.grains + int64(number)*seGrain, nil
	}
	return 0, 0, bad("the entry is %#x", e)
}
