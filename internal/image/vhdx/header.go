package vhdx

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"

	"holdfast/internal/disk"
	"holdfast/internal/image"
)

const (
	magic = "vhdxfile"

	mib = 1 << 20
	kib = 1 << 10

	headerLen  = 4 * kib
	headerOff1 = 64 * kib
	headerOff2 = 128 * kib
	regionLen  = 64 * kib // of a region table
	regionOff1 = 192 * kib
	regionOff2 = 256 * kib
	headerArea = 1 * mib // what lies before all that has a place of its own

	maxRegions = 2047
	maxLog     = 1 << 30   // bytes of a log; Windows writes 1 MiB
	maxFile    = 128 << 40 // bytes of a file: twice the largest disk
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)

	regionBAT      = known("2DC27766-F623-4200-9D64-115E9BFD4A08")
	regionMetadata = known("8B7CA206-4790-4B9A-B8FE-575F050F886E")
)

// bad makes an error of a damaged or hostile structure.
func bad(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{image.ErrFormat}, args...)...)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{image.ErrUnsupported}, args...)...)
}

// sum is the checksum of a structure whose own checksum lies in bytes 4 to 8.
func sum(b []byte) uint32 {
	c := crc32.Update(0, castagnoli, b[:4])
	c = crc32.Update(c, castagnoli, []byte{0, 0, 0, 0})
	return crc32.Update(c, castagnoli, b[8:])
}

// signed reports whether b bears the signature and its checksum is right.
func signed(b []byte, signature string) bool {
	return string(b[:4]) == signature && binary.LittleEndian.Uint32(b[4:]) == sum(b)
}

// header is the current one of a file's two.
type header struct {
	seq       uint64
	dataWrite guid
	logGUID   guid // zero when the log is empty
	logOff    int64
	logLen    int64
}

// readHeader reads both headers and returns the current one. What was odd about
// them is told to warn.
func readHeader(ctx context.Context, d disk.Reader, warn func(string, ...any)) (*header, error) {
	var copies [2][]byte
	var valid [2]bool
	for i, off := range []int64{headerOff1, headerOff2} {
		copies[i] = make([]byte, headerLen)
		if err := d.ReadAt(ctx, copies[i], off); err != nil {
			return nil, fmt.Errorf("read header %d: %w", i+1, err)
		}
		valid[i] = signed(copies[i], "head")
	}
	seq := func(i int) uint64 { return binary.LittleEndian.Uint64(copies[i][8:]) }
	cur := 0
	switch {
	case !valid[0] && !valid[1]:
		return nil, bad("neither header, at offsets %d and %d, is valid", headerOff1, headerOff2)
	case !valid[0]:
		cur = 1
		warn("header 1 at offset %d is not valid; header 2 is read", headerOff1)
	case !valid[1]:
		warn("header 2 at offset %d is not valid; header 1 is read", headerOff2)
	case seq(1) > seq(0):
		cur = 1
	case seq(1) == seq(0) && !bytes.Equal(copies[0], copies[1]):
		warn("both headers have the sequence number %d and they differ; header 1 is read", seq(0))
	}
	h, err := parseHeader(copies[cur], d.Size())
	if err != nil {
		return nil, fmt.Errorf("header %d: %w", cur+1, err)
	}
	return h, nil
}

func parseHeader(b []byte, fileSize int64) (*header, error) {
	le := binary.LittleEndian
	h := &header{seq: le.Uint64(b[8:]), dataWrite: guid(b[32:48]), logGUID: guid(b[48:64])}
	if v := le.Uint16(b[66:]); v != 1 {
		return nil, unsupported("VHDX version %d", v)
	}
	n, off := int64(le.Uint32(b[68:])), le.Uint64(b[72:])
	dirty := h.logGUID != guid{}
	if v := le.Uint16(b[64:]); v != 0 && dirty {
		return nil, unsupported("log version %d", v)
	}
	if n == 0 && !dirty {
		return h, nil // no log at all
	}
	switch {
	case n == 0 || n%mib != 0 || off%mib != 0 || off < headerArea:
		return nil, bad("the log has %d bytes at offset %d", n, off)
	case n > maxLog:
		return nil, unsupported("the log has %d bytes, more than %d", n, maxLog)
	case off > uint64(fileSize) || n > fileSize-int64(off):
		return nil, bad("the log, %d bytes at offset %d, lies beyond the file's end at %d", n, off, fileSize)
	}
	h.logOff, h.logLen = int64(off), n
	return h, nil
}

// span is a range of the file that has a name.
type span struct {
	what   string
	off, n int64
}

func (s span) end() int64 { return s.off + s.n }

// regions are where a file has its tables.
type regions struct {
	bat, metadata span
	all           []span // these, those that nobody here knows, and the log
}

// readRegions reads the region tables of a file whose log has been replayed.
func readRegions(ctx context.Context, d disk.Reader, h *header, warn func(string, ...any)) (*regions, error) {
	var copies [2][]byte
	var valid [2]bool
	for i, off := range []int64{regionOff1, regionOff2} {
		copies[i] = make([]byte, regionLen)
		if err := d.ReadAt(ctx, copies[i], off); err != nil {
			return nil, fmt.Errorf("read region table %d: %w", i+1, err)
		}
		valid[i] = signed(copies[i], "regi")
	}
	cur := 0
	switch {
	case !valid[0] && !valid[1]:
		return nil, bad("neither region table, at offsets %d and %d, is valid", regionOff1, regionOff2)
	case !valid[0]:
		cur = 1
		warn("region table 1 at offset %d is not valid; its copy is read", regionOff1)
	case !valid[1]:
		warn("region table 2 at offset %d is not valid; the first one is read", regionOff2)
	case !bytes.Equal(copies[0], copies[1]):
		warn("the region tables at offsets %d and %d differ; the first one is read", regionOff1, regionOff2)
	}
	r, err := parseRegions(copies[cur], d.Size())
	if err == nil {
		err = r.place(h)
	}
	if err != nil {
		return nil, fmt.Errorf("region table %d: %w", cur+1, err)
	}
	return r, nil
}

func parseRegions(b []byte, fileSize int64) (*regions, error) {
	le := binary.LittleEndian
	count := le.Uint32(b[8:])
	if count > maxRegions {
		return nil, bad("it has %d entries", count)
	}
	r, seen := &regions{}, map[guid]bool{}
	for i := range int(count) {
		e := b[16+32*i:][:32]
		id, off, n := guid(e[:16]), le.Uint64(e[16:]), int64(le.Uint32(e[24:]))
		required := le.Uint32(e[28:])&1 != 0
		switch {
		case seen[id]:
			return nil, bad("entry %d: a second region %s", i, id)
		case off%mib != 0 || off < headerArea || n%mib != 0 || n == 0:
			return nil, bad("entry %d: %d bytes at offset %d", i, n, off)
		case off > uint64(fileSize) || n > fileSize-int64(off):
			return nil, bad("entry %d: %d bytes at offset %d lie beyond the file's end at %d: is the file truncated?", i, n, off, fileSize)
		}
		seen[id] = true
		s := span{fmt.Sprintf("region %s", id), int64(off), n}
		switch id {
		case regionBAT:
			s.what = "the BAT"
			r.bat = s
		case regionMetadata:
			s.what = "the metadata region"
			r.metadata = s
		default:
			if required {
				return nil, unsupported("it has a region %s, which is unknown here and required", id)
			}
		}
		r.all = append(r.all, s)
	}
	if r.bat.n == 0 || r.metadata.n == 0 {
		return nil, bad("it lacks the BAT or the metadata region")
	}
	return r, nil
}

// place adds the log, and refuses regions that overlap.
func (r *regions) place(h *header) error {
	if h.logLen > 0 {
		r.all = append(r.all, span{"the log", h.logOff, h.logLen})
	}
	slices.SortFunc(r.all, func(a, b span) int { return int(a.off/mib - b.off/mib) })
	for i, s := range r.all[1:] {
		if p := r.all[i]; s.off < p.end() {
			return bad("%s at offset %d overlaps %s at %d", s.what, s.off, p.what, p.off)
		}
	}
	return nil
}
