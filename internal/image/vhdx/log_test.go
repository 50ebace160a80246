package vhdx

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

// dirty is a disk of 8 blocks of 1 MiB. Block 1 is in its BAT, and what the
// log says of others is not.
type dirty struct {
	T    *testing.T
	b    *build
	guid guid
	page []byte // of the BAT, as it is to be
}

func newDirty(t *testing.T) *dirty {
	rnd := disktest.Rand(t)
	b := newBuild(t, rnd, buildOptions{size: 8 << 20, block: 1 << 20, sector: 512})
	b.block(1, blockPresent, false)
	d := &dirty{T: t, b: b, page: b.get(b.bat, logSector)}
	disktest.Fill(rnd, d.guid[:])
	b.both(48, d.guid[:])
	return d
}

// change has a block appear in the BAT by the log alone, and returns the page.
func (d *dirty) change(block int64) logChange {
	old := d.b.get(d.b.bat, logSector)
	d.b.put(d.b.bat, d.page)
	d.b.block(block, blockPresent, false)
	d.page = d.b.get(d.b.bat, logSector)
	d.b.put(d.b.bat, old)
	return logChange{off: d.b.bat, page: d.page}
}

// entry is one of the log, with the file's length.
func (d *dirty) entry(seq uint64, tail int64, c ...logChange) logEntry {
	return logEntry{seq: seq, tail: tail, guid: d.guid, flushed: d.b.next, last: d.b.next, changes: c}
}

// check opens the file and compares it with the model.
func (d *dirty) check() {
	d.T.Helper()
	f := d.b.file()
	before := bytesOf(d.T, f, f.Size())
	im := openMem(d.T, f)
	if !im.Info().DirtyLog {
		d.T.Error("the log was not replayed")
	}
	compare(d.T, chainOf(d.T, f), bytesOf(d.T, d.b.model, d.b.g.size), d.b.rnd)
	if !bytes.Equal(before, bytesOf(d.T, f, f.Size())) {
		d.T.Error("the file was written to")
	}
	r := im.d.(*replayed)
	want := make([]byte, r.Size())
	if err := r.ReadAt(d.T.Context(), want, 0); err != nil {
		d.T.Fatal(err)
	}
	disktest.Reader(d.T, r, want)
}

// refused opens the file and wants an error.
func (d *dirty) refused(want string) {
	d.T.Helper()
	_, err := Open(d.T.Context(), image.File{Name: "x", Disk: d.b.file()}, nil)
	if !errors.Is(err, image.ErrFormat) || !strings.Contains(err.Error(), want) {
		d.T.Errorf("%v, want %q", err, want)
	}
}

// TestDirtyLogChangesBAT is bug classes 1, 2, 3 and 21: without the log the
// disk is an older one.
func TestDirtyLogChangesBAT(t *testing.T) {
	d := newDirty(t)
	d.b.putLog(0, d.entry(80117443871106387, 0, d.change(0)).bytes())
	d.check()
}

func TestDirtyLogAroundTheEnd(t *testing.T) {
	for _, from := range []int64{mib - logSector, mib - 2*logSector} {
		d := newDirty(t)
		at := d.b.putLog(from, d.entry(7, from).bytes())
		at = d.b.putLog(at, d.entry(8, from, d.change(2), logChange{off: d.b.metadata + 512<<10, zeros: 64 << 10}).bytes())
		d.b.putLog(at, d.entry(9, from, d.change(0)).bytes())
		d.check()
	}
}

// TestDirtyLogTornHead: power was lost while the newest entry was written, at
// any sector of it; it never happened.
func TestDirtyLogTornHead(t *testing.T) {
	for cut := range int64(3) {
		d := newDirty(t)
		at := d.b.putLog(0, d.entry(5, 0, d.change(3)).bytes())
		good, model := d.b.next, d.b.model.Clone()
		e := d.entry(6, at, d.change(4), logChange{off: d.b.metadata + 512<<10, page: d.b.random(logSector)})
		e.flushed, e.last = good, d.b.next
		d.b.putLog(at, e.bytes()[:cut*logSector])
		d.b.model = model
		d.check()
	}
}

// TestDirtyLogStaleEntries: what an older log left, with greater numbers too,
// does not count; nor do valid entries before the tail.
func TestDirtyLogStaleEntries(t *testing.T) {
	d := newDirty(t)
	stale := d.entry(1000, 512<<10, logChange{off: d.b.bat, page: make([]byte, logSector)})
	stale.guid[0]++
	d.b.putLog(512<<10, stale.bytes())
	at := d.b.putLog(0, d.entry(20, 0, logChange{off: d.b.metadata, page: make([]byte, logSector)}).bytes())
	tail := at
	at = d.b.putLog(at, d.entry(21, tail, d.change(5)).bytes())
	d.b.putLog(at, d.entry(22, tail, d.change(6)).bytes())
	d.check()
}

func TestDirtyLogZeros(t *testing.T) {
	d := newDirty(t)
	c := d.change(7)
	off := d.b.alloc(mib) // behind the last block, of no use
	d.b.put(off, d.b.random(mib))
	d.b.putLog(0, d.entry(3, 0, logChange{off: d.b.bat, page: d.b.random(logSector)}, logChange{off: off, page: d.b.random(logSector)},
		logChange{off: off + logSector, zeros: 0}, logChange{off: d.b.bat, zeros: 512 << 10}, c, logChange{off: off, zeros: mib}, logChange{off: off + 8192, page: d.b.random(logSector)}).bytes())
	d.check()
	p := make([]byte, 3*logSector)
	if err := openMem(t, d.b.file()).d.ReadAt(t.Context(), p, off); err != nil || !disk.IsZero(p[:2*logSector]) || p[2*logSector] == 0 {
		t.Errorf("zeros between: %v %x", err, p[:16])
	}
}

// TestDirtyLogEmptyEntry is what Windows writes when it begins a log.
func TestDirtyLogEmptyEntry(t *testing.T) {
	d := newDirty(t)
	d.b.putLog(64<<10, d.entry(80117443871106387, 64<<10).bytes())
	d.check()
}

// TestDirtyLogGrows: the last entry lets the file grow beyond its end.
func TestDirtyLogGrows(t *testing.T) {
	d := newDirty(t)
	end := d.b.next
	e := d.entry(9, 0, logChange{})
	page := bytes.Clone(d.page)
	copy(page[8*6:], []byte{blockPresent, 0, byte(end >> 16), 0, 0, 0, 0, 0})
	e.changes[0] = logChange{off: d.b.bat, page: page}
	e.flushed, e.last = end, end+3*mib
	d.b.putLog(0, e.bytes())
	d.check() // what is new reads as zeros, as the model has it
	if w := openMem(t, d.b.file()).Info().Warnings; len(w) != 1 || !strings.Contains(w[0], "grow") {
		t.Errorf("warnings %q", w)
	}
}

// TestDirtyLogChangesTables: region table and metadata may be what changes.
func TestDirtyLogChangesTables(t *testing.T) {
	d := newDirty(t)
	var c []logChange
	for off := int64(regionOff1); off < regionOff2+regionLen; off += logSector {
		c = append(c, logChange{off: off, page: d.b.get(off, logSector)})
	}
	for _, off := range []int64{0, metadataTable} {
		c = append(c, logChange{off: d.b.metadata + off, page: d.b.get(d.b.metadata+off, logSector)})
	}
	for _, x := range c {
		d.b.put(x.off, d.b.random(logSector))
	}
	d.b.putLog(128<<10, d.entry(9, 128<<10, c...).bytes())
	d.check()
}

func TestDirtyLogRefused(t *testing.T) {
	for name, c := range map[string]struct {
		do   func(d *dirty)
		want string
	}{
		"nothing valid": {func(d *dirty) {}, "no valid entries"},
		"entries of another log": {func(d *dirty) {
			e := d.entry(9, 0)
			e.guid[3]++
			d.b.putLog(0, e.bytes())
		}, "no valid entries"},
		"tail is gone":      {func(d *dirty) { d.b.putLog(0, d.entry(9, 8192).bytes()) }, "no valid entries"},
		"truncated":         {func(d *dirty) { e := d.entry(9, 0); e.flushed += mib; d.b.putLog(0, e.bytes()) }, "truncated"},
		"grows without end": {func(d *dirty) { e := d.entry(9, 0); e.last = 1 << 62; d.b.putLog(0, e.bytes()) }, "is to have"},
		"changes a header": {func(d *dirty) {
			d.b.putLog(0, d.entry(9, 0, logChange{off: headerOff1, zeros: 4096}).bytes())
		}, "cannot be"},
		"changes the log": {func(d *dirty) {
			d.b.putLog(0, d.entry(9, 0, logChange{off: d.b.log + 8192, zeros: 4096}).bytes())
		}, "cannot be"},
		"zeros over everything": {func(d *dirty) {
			d.b.putLog(0, d.entry(9, 0, logChange{off: d.b.bat, zeros: 1<<62 - 4096}).bytes())
		}, "cannot be"},
		"beyond 2^63": {func(d *dirty) {
			d.b.putLog(0, d.entry(9, 0, logChange{off: -8192, zeros: 4096}).bytes())
		}, "cannot be"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDirty(t)
			c.do(d)
			d.refused(c.want)
		})
	}
}

// TestDirtyLogBroken breaks each byte of interest of the only entry: it is
// never replayed in part.
func TestDirtyLogBroken(t *testing.T) {
	d := newDirty(t)
	e := d.entry(9, 0, d.change(0)).bytes()
	for i := 0; i < len(e); i += 29 { // prime to 8, 32 and 4096
		x := bytes.Clone(e)
		x[i] ^= 1 << (i % 8)
		d.b.putLog(0, x)
		if _, err := Open(t.Context(), image.File{Name: "x", Disk: d.b.file()}, nil); !errors.Is(err, image.ErrFormat) {
			t.Fatalf("byte %d: %v", i, err)
		}
	}
}

// TestDirtyParent: a parent's id is that of its header, its content that of
// its log.
func TestDirtyParent(t *testing.T) {
	d := newDirty(t)
	d.b.putLog(0, d.entry(9, 0, d.change(0)).bytes())
	child := newBuild(t, d.b.rnd, buildOptions{size: 9 << 20, block: 2 << 20, sector: 512, parent: d.b, parentName: "p.vhdx"})
	child.block(1, blockPartial, false)
	dir := t.TempDir()
	save(t, d.b.file(), filepath.Join(dir, "p.vhdx"))
	save(t, child.file(), filepath.Join(dir, "c.avhdx"))
	compare(t, openChain(t, dir, "c.avhdx"), bytesOf(t, child.model, 9<<20), d.b.rnd)
}
