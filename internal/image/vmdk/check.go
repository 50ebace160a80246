package vmdk

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"holdfast/internal/image"
)

const (
	// maxReports bounds what Check says: a file can have billions of bad
	// entries.
	maxReports = 1000
	// windowLen is for how many sectors of a file it is known at once whether
	// they are in use: 64 GiB of the file, 16 MiB of memory. A larger file's
	// tables are read several times.
	windowLen = 128 << 20
)

// Check reads directories and tables, and the markers of compressed grains. It
// finds entries that are not good, what overlaps, and redundant tables that
// differ. Grains that no table names are no fault: the formats have no list of
// free ones, so a grain that became zeros is left behind.
func (im *Image) Check(ctx context.Context, report func(problem string)) error {
	n := 0
	say := func(problem string) {
		switch n++; {
		case n < maxReports:
			report(problem)
		case n == maxReports:
			report(fmt.Sprintf("more than %d things are wrong", maxReports-1))
		}
	}
	if im.info.DataID == "" {
		say("descriptor: no CID: a child cannot know whether this is its parent")
	}
	if p := im.info.Parent; p != nil && len(p.Names) == 0 {
		say("descriptor: a parentCID without a parentFileNameHint: the parent is not named")
	}
	im.checkFlat(say)
	for _, e := range im.extents {
		if e.m == nil {
			continue
		}
		say := func(problem string) {
			if len(im.extents) > 1 {
				problem = fmt.Sprintf("extent of descriptor line %d: %s", e.line, problem)
			}
			say(problem)
		}
		if err := e.m.check(ctx, say); err != nil {
			return fmt.Errorf("extent of descriptor line %d: %w", e.line, err)
		}
	}
	return ctx.Err()
}

// checkFlat finds ranges of files that appear on the disk twice.
func (im *Image) checkFlat(report func(string)) {
	var list []extent
	for _, e := range im.extents {
		if e.file != nil {
			list = append(list, e)
		}
	}
	slices.SortFunc(list, func(a, b extent) int {
		return cmp.Or(cmp.Compare(a.fileNo, b.fileNo), cmp.Compare(a.at, b.at))
	})
	for i := 1; i < len(list); i++ {
		a, b := list[i-1], list[i]
		if a.fileNo == b.fileNo && (a.m != nil || b.m != nil || a.at+a.len > b.at) {
			report(fmt.Sprintf("descriptor lines %d and %d: the extents overlap in their file", min(a.line, b.line), max(a.line, b.line)))
		}
	}
}

// usage knows which sectors of a part of a file are in use.
type usage struct {
	base, len int64 // sectors
	words     []uint64
}

// mark marks the sectors of [off, off+n) and reports whether none was marked
// before.
func (u *usage) mark(off, n int64) bool {
	first := max(off/sector-u.base, 0)
	last := min((off+n-1)/sector-u.base, u.len-1)
	free := true
	for i := first; i <= last; {
		k := min(64-i%64, last+1-i)
		m := (^uint64(0) >> (64 - k)) << (i % 64)
		free = free && u.words[i/64]&m == 0
		u.words[i/64] |= m
		i += k
	}
	return free
}

// check looks at the directory, its copy, and all that they name.
func (t *tables) check(ctx context.Context, report func(string)) error {
	total := up(t.file.Size(), sector)
	for base := int64(0); base < total; base += windowLen {
		u := &usage{base: base, len: min(windowLen, total-base)}
		u.words = make([]uint64, up(u.len, 64))
		for _, s := range t.fixed {
			u.mark(s.off, s.n)
		}
		c := checker{t: t, u: u, report: report}
		if base > 0 { // said before
			c.quiet = true
		}
		if err := c.dirs(ctx); err != nil {
			return err
		}
	}
	return nil
}

// checker looks at everything once and marks what lies in the window.
type checker struct {
	t      *tables
	u      *usage
	report func(string)
	quiet  bool
}

func (c *checker) say(format string, args ...any) {
	if !c.quiet {
		c.report(fmt.Sprintf(format, args...))
	}
}

// take marks what was found in use.
func (c *checker) take(what string, off, n int64) bool {
	free := c.u.mark(off, n)
	if !free {
		// Said in whichever window it is found.
		c.report(fmt.Sprintf("%s: at offset %d it overlaps something else", what, off))
	}
	return free
}

// dirs reads the directory and its copies beside one another.
func (c *checker) dirs(ctx context.Context) error {
	t := c.t
	all := append([]int64{t.dir}, t.copies...)
	end := t.dirLen() * t.width
	for at := int64(0); at < end; at += sliceLen {
		pieces := make([][]byte, len(all))
		for i, dir := range all {
			pieces[i] = make([]byte, min(sliceLen, end-at))
			if err := t.file.ReadAt(ctx, pieces[i], dir+at); err != nil {
				return err
			}
		}
		for k := int64(0); k < int64(len(pieces[0])); k += t.width {
			index := (at + k) / t.width
			places := make([]int64, len(all))
			for i := range all {
				places[i] = c.place(all[i], index, t.word(pieces[i][k:]))
			}
			if err := c.tables(ctx, index, places); err != nil {
				return err
			}
		}
	}
	return nil
}

// place is where the table of an entry is; 0 for none, -1 for a bad one.
func (c *checker) place(dir, index int64, e uint64) int64 {
	at, ok, err := c.t.place(e)
	if err != nil {
		c.say("grain directory at offset %d, entry %d: %s", dir, index, reason(err))
		return -1
	}
	if !ok {
		return 0
	}
	if !c.take(fmt.Sprintf("grain directory at offset %d, entry %d: grain table", dir, index), at, c.t.perGT*c.t.width) {
		return -1 // not to be read once for each entry that names it
	}
	return at
}

// reason is an error's text without what kind it is of.
func reason(err error) string {
	s := err.Error()
	if prefix := image.ErrFormat.Error() + ": "; errors.Is(err, image.ErrFormat) && len(s) > len(prefix) && s[:len(prefix)] == prefix {
		return s[len(prefix):]
	}
	return s
}

// tables reads a table, and sees whether its copies are the same.
func (c *checker) tables(ctx context.Context, index int64, places []int64) error {
	t := c.t
	n := t.perGT * t.width
	first := places[0]
	for i, at := range places[1:] {
		if (at == 0) != (first == 0) && at >= 0 && first >= 0 {
			c.say("redundant grain directory at offset %d, entry %d: it names a table at %d, the first directory one at %d", t.copies[i], index, at, first)
		}
	}
	if first <= 0 {
		return ctx.Err()
	}
	b := make([]byte, n)
	if err := t.file.ReadAt(ctx, b, first); err != nil {
		return err
	}
	for _, at := range places[1:] {
		if at <= 0 || c.quiet {
			continue
		}
		other := make([]byte, n)
		if err := t.file.ReadAt(ctx, other, at); err != nil {
			return err
		}
		if string(other) != string(b) {
			c.say("redundant grain table at offset %d: it differs from the table at %d", at, first)
		}
	}
	for i := int64(0); i < t.perGT; i++ {
		number := index*t.perGT + i
		if number*t.grain >= t.size {
			break // what a table has behind the disk's end is never read
		}
		what := fmt.Sprintf("grain table at offset %d, entry %d", first, i)
		if err := c.grain(ctx, what, t.word(b[i*t.width:]), first, number); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// grain looks at one entry of the table at place.
func (c *checker) grain(ctx context.Context, what string, e uint64, place, number int64) error {
	t := c.t
	m, err := t.mapping(e, place, number*t.grain)
	if err != nil {
		c.say("%s: %s", what, reason(err))
		return nil
	}
	if m.state != image.Data {
		return nil
	}
	n := min(t.grain, t.file.Size()-m.host)
	if t.compressed {
		if n = sector; t.markers {
			if at := m.host/sector - c.u.base; at < 0 || at >= c.u.len {
				return nil // its marker is read in one window only
			}
			if n, err = c.marker(ctx, what, m.host, number); err != nil || n == 0 {
				return err
			}
		}
	}
	c.take(what+": grain", m.host, n)
	return nil
}

// marker looks at what is before a compressed grain and returns the length of
// both; 0 when that is not good.
func (c *checker) marker(ctx context.Context, what string, at, number int64) (int64, error) {
	t := c.t
	if err := inside("grain", at, grainHead, t.file.Size()); err != nil {
		c.report(fmt.Sprintf("%s: %s", what, reason(err)))
		return 0, nil
	}
	var b [grainHead]byte
	if err := t.file.ReadAt(ctx, b[:], at); err != nil {
		return 0, err
	}
	lba, n := binary.LittleEndian.Uint64(b[:]), int64(binary.LittleEndian.Uint32(b[8:]))
	if lba != uint64(number*t.grain/sector) || n == 0 || n > mostPacked(t.grain) || inside("", at+grainHead, n, t.file.Size()) != nil {
		c.report(fmt.Sprintf("%s: the grain's marker at offset %d tells of %d bytes for sector %d", what, at, n, lba))
		return 0, nil
	}
	return grainHead + n, nil
}

// check goes from marker to marker once more.
func (s *stream) check(ctx context.Context, report func(string)) error {
	if len(s.places) == 0 {
		return nil
	}
	for at := s.places[0].at; ; {
		m, behind, err := s.next(ctx, at)
		if errors.Is(err, image.ErrFormat) {
			report(reason(err))
			return nil
		}
		if err != nil || m.size == 0 && m.kind == markEnd {
			return err
		}
		at = behind
	}
}
