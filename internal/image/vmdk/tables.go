package vmdk

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	"holdfast/internal/disk"
	"holdfast/internal/image"
)

// tables maps the grains of one extent: a directory names tables, whose
// entries are the grains'. The three sparse formats differ in what the entries
// mean.
type tables struct {
	im    *Image
	file  disk.Reader
	index int // of the extent

	size   int64 // of the extent, bytes
	grain  int64 // bytes
	perGT  int64 // entries of a table
	width  int64 // of an entry, of the directory and of tables, bytes
	dir    int64 // where the directory is, bytes
	copies []int64
	fixed  []span // what no table and no grain may overlap

	// table is where the table of a directory's entry is; ok is false for none.
	table func(e uint64) (off int64, ok bool, err error)
	// entry is a table's: host is where the grain is, if Data.
	entry func(e uint64) (state image.State, host int64, err error)

	compressed bool
	markers    bool // before compressed grains
	inflater   *inflater
}

// span is a range of a file.
type span struct {
	what   string
	off, n int64
}

func (s span) overlaps(off, n int64) bool { return off < s.off+s.n && s.off < off+n }

func (t *tables) capacity() int64  { return t.size }
func (t *tables) grainSize() int64 { return t.grain }

// covers is how much of the disk one table describes, bytes.
func (t *tables) covers() int64 { return t.grain * t.perGT }

// dirLen is how many entries the directory needs.
func (t *tables) dirLen() int64 { return up(t.size, t.covers()) }

func up(n, unit int64) int64 { return (n + unit - 1) / unit }

// inside refuses what the file does not hold.
func inside(what string, off, n, fileSize int64) error {
	if off < 0 || n < 0 || off > fileSize || n > fileSize-off {
		return bad("%s: %d bytes at offset %d lie beyond the file's end at %d: is the file truncated?", what, n, off, fileSize)
	}
	return nil
}

// checkDir sees to it that the directory lies in the file.
func (t *tables) checkDir() error {
	n := t.dirLen() * t.width
	if err := inside("grain directory", t.dir, n, t.file.Size()); err != nil {
		return err
	}
	for _, s := range t.fixed {
		if n > 0 && s.overlaps(t.dir, n) {
			return bad("grain directory: at offset %d it overlaps the %s", t.dir, s.what)
		}
	}
	t.fixed = append(t.fixed, span{"grain directory", t.dir, n})
	return nil
}

// checkPlace refuses n bytes that the file does not hold, or that overlap what
// has a fixed place.
func (t *tables) checkPlace(what string, off, n int64) error {
	if err := inside(what, off, n, t.file.Size()); err != nil {
		return err
	}
	for _, s := range t.fixed {
		if s.overlaps(off, n) {
			return bad("%s: at offset %d it overlaps the %s", what, off, s.what)
		}
	}
	return nil
}

const (
	// dirPiece is how much of a directory is read at once when all of it is.
	dirPiece = 256 << 10
	// maxTables bounds the tables of an extent, of which Open remembers the
	// places: 64 MiB. A seSparse extent of 64 TiB has half as many.
	maxTables = 8 << 20
)

// checkTables reads the directory, holes of the file aside, and refuses tables
// that overlap: what they describe would be on the disk twice, and a small file
// could describe a disk without end. A table that cannot be is an error when it
// is asked for.
func (t *tables) checkTables(ctx context.Context) error {
	var places []int64
	buf := make([]byte, min(dirPiece, t.dirLen()*t.width))
	dir := disk.Align(t.file.Extents(ctx, t.dir, t.dirLen()*t.width), t.width, t.file.Size())
	for x, err := range disk.Clip(dir, t.dir, t.dirLen()*t.width) {
		for off := x.Off; err == nil && !x.Zero && off < x.End(); {
			b := buf[:min(int64(len(buf)), x.End()-off)]
			if err = t.file.ReadAt(ctx, b, off); err != nil {
				break
			}
			off += int64(len(b))
			for ; int64(len(b)) >= t.width; b = b[t.width:] {
				if at, ok, bad := t.place(t.word(b)); ok && bad == nil {
					places = append(places, at)
				}
			}
			if len(places) > maxTables {
				err = unsupported("more than %d grain tables", maxTables)
			}
		}
		if err != nil {
			return fmt.Errorf("grain directory at offset %d: %w", t.dir, err)
		}
	}
	slices.Sort(places)
	for i := 1; i < len(places); i++ {
		if places[i] < places[i-1]+t.perGT*t.width {
			return bad("grain directory at offset %d: the grain tables at %d and %d overlap", t.dir, places[i-1], places[i])
		}
	}
	return nil
}

// lookup tells where the bytes at off are, for up to n bytes: as many as one
// slice of a table tells without a change.
func (t *tables) lookup(ctx context.Context, off, n int64) (mapping, error) {
	if err := ctx.Err(); err != nil {
		return mapping{}, err
	}
	covers := t.covers()
	at, empty, err := t.find(ctx, off/covers, (off+n-1)/covers)
	if err != nil {
		return mapping{}, err
	}
	if at == 0 {
		return mapping{n: min(n, empty*covers-off%covers), state: image.Absent}, nil
	}
	n = min(n, covers-off%covers)
	number := off % covers / t.grain
	b, err := t.slice(ctx, at+number*t.width, at+t.perGT*t.width)
	if err != nil {
		return mapping{}, fmt.Errorf("grain table at offset %d: %w", at, err)
	}
	m, err := t.scan(b, at, off, n)
	if err != nil {
		return mapping{}, fmt.Errorf("grain table at offset %d, entry %d: %w", at, number, err)
	}
	return m, nil
}

// find returns the place of the table that an entry of the directory names, or
// 0 and the number of entries from it on, up to last, that name none: one at
// least.
func (t *tables) find(ctx context.Context, index, last int64) (at, empty int64, err error) {
	b, err := t.slice(ctx, t.dir+index*t.width, t.dir+t.dirLen()*t.width)
	if err != nil {
		return 0, 0, fmt.Errorf("grain directory at offset %d: %w", t.dir, err)
	}
	for ; int64(len(b)) >= t.width && index+empty <= last; b = b[t.width:] {
		at, ok, err := t.place(t.word(b))
		if ok || err != nil {
			if empty > 0 {
				break // what comes before is good
			}
			if err != nil {
				err = fmt.Errorf("grain directory at offset %d, entry %d: %w", t.dir, index, err)
			}
			return at, 0, err
		}
		empty++
	}
	return 0, empty, nil
}

// place is where the table of a directory's entry is.
func (t *tables) place(e uint64) (at int64, ok bool, err error) {
	at, ok, err = t.table(e)
	if ok && err == nil {
		err = t.checkPlace("grain table", at, t.perGT*t.width)
	}
	return at, ok, err
}

func (t *tables) word(b []byte) uint64 {
	if t.width == 4 {
		return uint64(binary.LittleEndian.Uint32(b))
	}
	return binary.LittleEndian.Uint64(b)
}

// slice returns a table's bytes from offset at to the end of the slice that
// holds them, or of the table. Both are in the file.
func (t *tables) slice(ctx context.Context, at, end int64) ([]byte, error) {
	b, err := t.im.tables.Get(ctx, cacheKey(t.index, at/sliceLen))
	if err != nil {
		return nil, err
	}
	b = b[at%sliceLen:]
	return b[:min(int64(len(b)), end-at)], nil
}

func (im *Image) loadSlice(ctx context.Context, key int64) ([]byte, error) {
	f, off := im.extents[key>>48].file, key&(1<<48-1)*sliceLen
	b := make([]byte, min(sliceLen, f.Size()-off))
	return b, f.ReadAt(ctx, b, off)
}

// scan reads entries of the table at place from the one that describes off on,
// as far as they continue the first one's state, for up to n bytes.
func (t *tables) scan(b []byte, place, off, n int64) (mapping, error) {
	var m mapping
	for first := true; m.n < n && int64(len(b)) >= t.width; first = false {
		next, err := t.mapping(t.word(b), place, off+m.n)
		switch {
		case err != nil && first:
			return mapping{}, err
		case first:
			m = next
		case err != nil || !m.continued(next):
			return m, nil // an error comes when it is asked for
		default:
			m.n += next.n
		}
		b = b[t.width:]
	}
	if m.n == 0 {
		return mapping{}, bad("the table ends before the entry")
	}
	m.n = min(m.n, n)
	return m, nil
}

// continued reports whether next, which begins where m ends, is more of it.
func (m mapping) continued(next mapping) bool {
	if m.state != next.state || m.compressed {
		return false
	}
	return m.state != image.Data || m.host+m.n == next.host
}

// mapping reads one entry of the table at place for the disk's bytes from off
// on.
func (t *tables) mapping(e uint64, place, off int64) (mapping, error) {
	in := off % t.grain
	state, host, err := t.entry(e)
	m := mapping{n: t.grain - in, state: state}
	if err != nil || state != image.Data {
		return m, err
	}
	// The last grain need not be whole.
	n := min(t.grain, t.size-(off-in))
	if t.compressed {
		n, in, m.compressed = 1, 0, true
	}
	if err := t.checkPlace("grain", host, n); err != nil {
		return m, err
	}
	if (span{"", place, t.perGT * t.width}).overlaps(host, n) {
		return m, bad("grain: at offset %d it overlaps the grain table", host)
	}
	m.host = host + in
	return m, nil
}

// grainBytes reads a compressed grain.
func (t *tables) grainBytes(ctx context.Context, number int64) ([]byte, error) {
	m, err := t.lookup(ctx, number*t.grain, 1)
	if err != nil {
		return nil, err
	}
	return readGrain(ctx, t.file, m.host, packed{
		number: number, grain: t.grain, need: min(t.grain, t.size-number*t.grain), marker: t.markers, inflater: t.inflater,
	})
}
