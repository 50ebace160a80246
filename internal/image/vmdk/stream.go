package vmdk

import (
	"context"
	"encoding/binary"
	"fmt"
	"sort"

	"holdfast/internal/disk"
	"holdfast/internal/image"
)

// The kinds of markers that are not before a grain.
const (
	markEnd      = 0
	markTable    = 1
	markDir      = 2
	markFooter   = 3
	markProgress = 4 // says how far a sender is; nothing follows
)

// maxPlaces bounds what is remembered of a stream without a directory: 4 MiB.
const maxPlaces = 256 << 10

// marker is before each grain and each table of a stream, at the beginning of
// a sector.
type marker struct {
	val  uint64 // the grain's sector on the disk, or how many sectors follow
	size uint32 // of the compressed grain, bytes; 0 for all but grains
	kind uint32 // 0 for grains, where its place is that of their bytes
}

func parseMarker(b []byte) marker {
	m := marker{val: binary.LittleEndian.Uint64(b), size: binary.LittleEndian.Uint32(b[8:])}
	if m.size == 0 {
		m.kind = binary.LittleEndian.Uint32(b[12:])
	}
	return m
}

// stream maps the grains of a stream by its markers: it remembers the places
// of some grains, every stride-th, and goes from marker to marker between
// them.
type stream struct {
	file     disk.Reader
	size     int64 // of the extent, bytes
	grain    int64 // bytes
	places   []place
	most     int // of places
	stride   int
	inflater *inflater
}

// place is where a grain is.
type place struct {
	number int64 // of the grain
	at     int64 // in the file
}

func (s *stream) capacity() int64  { return s.size }
func (s *stream) grainSize() int64 { return s.grain }

// next reads the marker at a place and tells where the one behind it is. A
// grain's place on the disk has been checked.
func (s *stream) next(ctx context.Context, at int64) (m marker, behind int64, err error) {
	var b [16]byte
	if at > s.file.Size()-sector {
		return m, 0, bad("the stream ends at offset %d without an end-of-stream marker: is the file truncated?", at)
	}
	if err := s.file.ReadAt(ctx, b[:], at); err != nil {
		return m, 0, fmt.Errorf("read marker: %w", err)
	}
	m = parseMarker(b[:])
	left := uint64(s.file.Size()-at)/sector - 1 // sectors behind this one
	payload := m.val
	switch {
	case m.size > 0:
		if int64(m.size) > mostPacked(s.grain) || m.val >= uint64(s.size/sector) || m.val%uint64(s.grain/sector) != 0 {
			return m, 0, bad("marker at offset %d: a grain of %d bytes for sector %d of the disk", at, m.size, m.val)
		}
		payload = uint64(up(grainHead+int64(m.size), sector)) - 1
	case m.kind == markEnd || m.kind == markProgress:
		payload = 0
	case m.kind > markProgress:
		return m, 0, bad("marker at offset %d: unknown kind %d", at, m.kind)
	}
	if payload > left {
		return m, 0, bad("marker at offset %d: its %d sectors lie beyond the file's end at %d: is the file truncated?", at, payload, s.file.Size())
	}
	return m, at + sector + int64(payload)*sector, nil
}

func newStream(f disk.Reader, h *hosted, most int) *stream {
	return &stream{file: f, size: h.capacity, grain: h.grain, most: most, stride: 1, inflater: &inflater{}}
}

// walk reads all markers, from where the header says on. It returns the footer
// if it meets one; or else the stream can be read, and nothing is missing.
func (s *stream) walk(ctx context.Context, h *hosted) (*hosted, error) {
	count, last := 0, int64(-1)
	var disorder error // of no account to a directory
	for at := max(h.overhead, h.descOff+h.descLen, sector); ; {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		m, behind, err := s.next(ctx, at)
		if err != nil {
			return nil, err
		}
		number := int64(m.val) * sector / h.grain
		switch {
		case m.size > 0 && number <= last && disorder == nil:
			disorder = bad("marker at offset %d: grain %d behind grain %d, in a stream without a directory", at, number, last)
		case m.size > 0 && disorder == nil:
			if count%s.stride == 0 {
				s.remember(place{number, at})
			}
			count, last = count+1, number
		case m.size == 0 && m.kind == markFooter:
			if behind != at+2*sector {
				return nil, bad("marker at offset %d: a footer of %d sectors", at, m.val)
			}
			if end, _, err := s.next(ctx, behind); err != nil || end != (marker{}) {
				return nil, bad("no end-of-stream marker at offset %d, behind the footer: is the file truncated?", behind)
			}
			b := make([]byte, sector)
			if err := s.file.ReadAt(ctx, b, at+sector); err != nil {
				return nil, fmt.Errorf("read footer: %w", err)
			}
			return parseFooter(b, s.file.Size())
		case m.size == 0 && m.kind == markEnd && (behind != s.file.Size() || m.val != 0):
			// Zeros are an end-of-stream marker too: those of a copy that was
			// interrupted, for one.
			return nil, bad("the stream ends at offset %d of a file of %d bytes, and has no footer: is the file truncated?", at, s.file.Size())
		case m.size == 0 && m.kind == markEnd:
			return nil, disorder
		}
		at = behind
	}
}

// remember adds a place; when there are too many, every other one is
// forgotten.
func (s *stream) remember(p place) {
	if len(s.places) == s.most {
		for i := range s.most / 2 {
			s.places[i] = s.places[2*i]
		}
		s.places = s.places[:s.most/2]
		s.stride *= 2
	}
	s.places = append(s.places, p)
}

// lookup tells where the bytes at off are, up to the end of the grain or to
// the next grain.
func (s *stream) lookup(ctx context.Context, off, n int64) (mapping, error) {
	number := off / s.grain
	i := sort.Search(len(s.places), func(i int) bool { return s.places[i].number > number })
	if i == 0 {
		end := s.size
		if len(s.places) > 0 {
			end = s.places[0].number * s.grain
		}
		return mapping{n: min(n, end-off), state: image.Absent}, nil
	}
	for at := s.places[i-1].at; ; {
		if err := ctx.Err(); err != nil {
			return mapping{}, err
		}
		m, behind, err := s.next(ctx, at)
		if err != nil {
			return mapping{}, err
		}
		switch have := int64(m.val) * sector / s.grain; {
		case m.size > 0 && have == number:
			return mapping{n: min(n, (number+1)*s.grain-off), state: image.Data, host: at, compressed: true}, nil
		case m.size > 0 && have > number:
			return mapping{n: min(n, have*s.grain-off), state: image.Absent}, nil
		case m.size == 0 && m.kind == markEnd:
			return mapping{n: min(n, s.size-off), state: image.Absent}, nil
		}
		at = behind
	}
}

// grainBytes reads a compressed grain.
func (s *stream) grainBytes(ctx context.Context, number int64) ([]byte, error) {
	m, err := s.lookup(ctx, number*s.grain, 1)
	if err != nil {
		return nil, err
	}
	return readGrain(ctx, s.file, m.host, packed{
		number: number, grain: s.grain, need: min(s.grain, s.size-number*s.grain), marker: true, inflater: s.inflater,
	})
}
