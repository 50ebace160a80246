// Package index finds chunks: id → pack, item number, offset, length. It keeps
// what the repository's index objects say in sorted segment files that are
// memory-mapped, so that memory does not grow with the repository.
//
// Segments are a cache on this machine: any of them may be deleted at any
// time, and damage in one is found by the checksum of the page touched. A
// segment names the index objects that it was made from; small ones are
// merged into larger ones, so that there are few.
//
// Segment file: 4096-byte pages.
//
//	page 0    magic "HFSG0001", item count (8), pack count (4), source count (4), CRC-32C of these (4)
//	pages     items, sorted by id: count (2), zero (2), up to 85 × item (48); CRC-32C of the page in its last 4 bytes
//	then      pack names, 32 bytes each; source names, 32 bytes each; CRC-32C of both (4)
//
// item: id (32), pack ordinal (4), number in the pack (4), offset (4), sealed length (4).
package index

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
)

const (
	pageLen      = 4096
	itemLen      = 48
	itemsPerPage = 85
	segMagic     = "HFSG0001"
)

// ErrCache is returned for a damaged segment: delete the cache and begin anew.
var ErrCache = errors.New("index cache is damaged")

// Place is where an item lies.
type Place struct {
	Pack   [32]byte // SHA-256, the pack's name
	Number uint32   // within the pack
	Offset uint32   // bytes
	Stored uint32   // sealed length, bytes
}

// item is an item and its place, the pack given by ordinal.
type item struct {
	id                  pack.ID
	pack                uint32
	number, off, stored uint32
}

func (it *item) append(p []byte) []byte {
	p = append(p, it.id[:]...)
	p = binary.LittleEndian.AppendUint32(p, it.pack)
	p = binary.LittleEndian.AppendUint32(p, it.number)
	p = binary.LittleEndian.AppendUint32(p, it.off)
	return binary.LittleEndian.AppendUint32(p, it.stored)
}

func parseItem(p []byte) item {
	le := binary.LittleEndian
	return item{pack.ID(p[:32]), le.Uint32(p[32:]), le.Uint32(p[36:]), le.Uint32(p[40:]), le.Uint32(p[44:])}
}

// segment is an open, immutable segment file. Safe in parallel.
type segment struct {
	path    string
	data    []byte // the whole file, memory-mapped
	items   int64
	pages   int64
	packs   []byte // 32 bytes each
	sources [][32]byte
	has     map[[32]byte]bool // sources
	unmap   func() error
}

func openSegment(path string) (*segment, error) {
	data, unmap, err := mapFile(path)
	if err != nil {
		return nil, err
	}
	s := &segment{path: path, data: data, unmap: unmap}
	if err := s.parse(); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), unmap())
	}
	return s, nil
}

func (s *segment) parse() error {
	d, le := s.data, binary.LittleEndian
	if len(d) < pageLen || string(d[:8]) != segMagic || seal.Checksum(d[:24]) != le.Uint32(d[24:]) {
		return ErrCache
	}
	n, packs, sources := le.Uint64(d[8:]), uint64(le.Uint32(d[16:])), uint64(le.Uint32(d[20:]))
	if n > uint64(len(d)) {
		return ErrCache
	}
	s.items = int64(n)
	s.pages = (s.items + itemsPerPage - 1) / itemsPerPage
	names := uint64(s.pages+1) * pageLen
	if names+(packs+sources)*32+4 != uint64(len(d)) {
		return ErrCache
	}
	tail := d[names : len(d)-4]
	if seal.Checksum(tail) != le.Uint32(d[len(d)-4:]) {
		return ErrCache
	}
	s.packs = tail[:packs*32]
	s.has = map[[32]byte]bool{}
	for src := tail[packs*32:]; len(src) > 0; src = src[32:] {
		s.sources = append(s.sources, [32]byte(src))
		s.has[[32]byte(src)] = true
	}
	return nil
}

// page gives the items of page i as bytes, after checking it.
func (s *segment) page(i int64) ([]byte, error) {
	p := s.data[(i+1)*pageLen : (i+2)*pageLen]
	n := int(binary.LittleEndian.Uint16(p))
	if n == 0 || n > itemsPerPage || seal.Checksum(p[:pageLen-4]) != binary.LittleEndian.Uint32(p[pageLen-4:]) {
		return nil, fmt.Errorf("%s: page %d: %w", s.path, i, ErrCache)
	}
	return p[4 : 4+n*itemLen], nil
}

// firstID reads the first id of a page without checking the page.
func (s *segment) firstID(i int64) []byte {
	return s.data[(i+1)*pageLen+4 : (i+1)*pageLen+36]
}

// first gives the page on which id begins, if it is there.
func (s *segment) first(id pack.ID) int64 {
	// The last page whose first id is not above id. Ids are uniform, so that
	// guessing by their values ends after few steps, all in one place of the
	// file. Halving ends it for others.
	lo, hi := int64(0), s.pages
	want, from, to := float(id[:]), 0.0, float64(1<<64)
	for n := 0; lo < hi; n++ {
		mid := (lo + hi) / 2
		if n < 16 && to > from {
			mid = min(max(lo+int64(float64(hi-lo)*((want-from)/(to-from))), lo), hi-1)
		}
		if first := s.firstID(mid); bytes.Compare(first, id[:]) > 0 {
			hi, to = mid, float(first)
		} else {
			lo, from = mid+1, float(first)
		}
	}
	// Equal ids may begin on an earlier page and go on over several.
	i := max(lo-1, 0)
	for i > 0 && bytes.Equal(s.firstID(i), id[:]) {
		i--
	}
	return i
}

// lookup appends to places where id lies.
func (s *segment) lookup(id pack.ID, places []Place) ([]Place, error) {
	for i := s.first(id); i < s.pages && bytes.Compare(s.firstID(i), id[:]) <= 0; i++ {
		p, err := s.page(i)
		if err != nil {
			return places, err
		}
		if places, err = s.inPage(i, p, id, places); err != nil {
			return places, err
		}
	}
	return places, nil
}

// inPage appends to places where id lies among the items p of page i.
func (s *segment) inPage(i int64, p []byte, id pack.ID, places []Place) ([]Place, error) {
	a, b := 0, len(p)/itemLen
	for a < b {
		if m := (a + b) / 2; bytes.Compare(p[m*itemLen:m*itemLen+32], id[:]) < 0 {
			a = m + 1
		} else {
			b = m
		}
	}
	for n := len(p) / itemLen; a < n && pack.ID(p[a*itemLen:a*itemLen+32]) == id; a++ {
		it := parseItem(p[a*itemLen:])
		if int(it.pack) >= len(s.packs)/32 {
			return places, fmt.Errorf("%s: page %d: %w", s.path, i, ErrCache)
		}
		places = append(places, Place{s.packName(it.pack), it.number, it.off, it.stored})
	}
	return places, nil
}

func float(id []byte) float64 { return float64(binary.BigEndian.Uint64(id)) }

func (s *segment) packName(i uint32) [32]byte { return [32]byte(s.packs[i*32 : i*32+32]) }

// segmentWriter writes items, which come sorted, to a new segment.
type segmentWriter struct {
	f     *os.File
	w     *bufio.Writer
	page  []byte
	items uint64
	err   error
}

func newSegmentWriter(dir string) (*segmentWriter, error) {
	f, err := os.CreateTemp(dir, "new-*")
	if err != nil {
		return nil, err
	}
	w := &segmentWriter{f: f, w: bufio.NewWriterSize(f, 1<<20), page: make([]byte, 4, pageLen)}
	_, w.err = w.w.Write(make([]byte, pageLen))
	return w, nil
}

func (w *segmentWriter) add(it item) {
	w.page = it.append(w.page)
	w.added()
}

// addBytes is add for an item as it is in a page.
func (w *segmentWriter) addBytes(p []byte) {
	w.page = append(w.page, p...)
	w.added()
}

func (w *segmentWriter) added() {
	w.items++
	if len(w.page) == 4+itemsPerPage*itemLen {
		w.flush()
	}
}

func (w *segmentWriter) flush() {
	n := (len(w.page) - 4) / itemLen
	if n == 0 {
		return
	}
	p := w.page[:pageLen]
	clear(p[len(w.page):])
	binary.LittleEndian.PutUint16(p, uint16(n))
	binary.LittleEndian.PutUint32(p[pageLen-4:], seal.Checksum(p[:pageLen-4]))
	if w.err == nil {
		_, w.err = w.w.Write(p)
	}
	w.page = p[:4]
}

// finish writes names and header, syncs and renames; it returns the path.
func (w *segmentWriter) finish(packs, sources [][32]byte) (path string, err error) {
	if err := w.write(packs, sources); err != nil {
		return "", errors.Join(err, w.abort())
	}
	if err := errors.Join(w.f.Sync(), w.f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(w.f.Name()))
	}
	path = filepath.Join(filepath.Dir(w.f.Name()), fmt.Sprintf("%x.segment", nameOf(sources)))
	return path, os.Rename(w.f.Name(), path)
}

// write writes what is behind and before the items.
func (w *segmentWriter) write(packs, sources [][32]byte) error {
	w.flush()
	if w.err != nil {
		return w.err
	}
	var tail []byte
	for _, names := range [][][32]byte{packs, sources} {
		for _, n := range names {
			tail = append(tail, n[:]...)
		}
	}
	tail = binary.LittleEndian.AppendUint32(tail, seal.Checksum(tail))
	if _, err := w.w.Write(tail); err != nil {
		return err
	}
	if err := w.w.Flush(); err != nil {
		return err
	}
	h := append([]byte(segMagic), binary.LittleEndian.AppendUint64(nil, w.items)...)
	h = binary.LittleEndian.AppendUint32(h, uint32(len(packs)))
	h = binary.LittleEndian.AppendUint32(h, uint32(len(sources)))
	h = binary.LittleEndian.AppendUint32(h, seal.Checksum(h))
	_, err := w.f.WriteAt(h, 0)
	return err
}

// abort removes what was written.
func (w *segmentWriter) abort() error {
	return errors.Join(w.f.Close(), os.Remove(w.f.Name()))
}
