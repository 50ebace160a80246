package overlay

import (
	"bytes"
	"errors"
	"io/fs"
	"math"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// logged makes an overlay with some history and returns its directory, its
// content, and the log's length at the last flush but one.
func logged(t *testing.T, base disk.Reader) (d *disktest.Dir, want []byte, sure int64) {
	t.Helper()
	d = disktest.NewDir()
	if err := create(crashDir{d: d}, thisBoot, testID, base.Size()); err != nil {
		t.Fatal(err)
	}
	o := mustOpen(t, d, base)
	disktest.History(t, o, disktest.Rand(t), 20)
	if err := o.Flush(t.Context()); err != nil {
		t.Fatal(err)
	}
	sure = o.log.tail
	want = disktest.History(t, o, disktest.Rand(t), 5)
	// There must be data, and a record at least must follow to vouch for the
	// flush before.
	disktest.Fill(disktest.Rand(t), want)
	err := o.WriteAt(t.Context(), want, 0)
	clear(want[:blockSize])
	err = errors.Join(err, o.ZeroAt(t.Context(), 0, blockSize), o.Flush(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	return d, want, sure
}

// damage changes one byte of a file, and returns how to undo it.
func damage(t *testing.T, d *disktest.Dir, name string, off int64) (undo func()) {
	t.Helper()
	f, err := d.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	was := b
	b[0] ^= 0x10
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	return func() {
		if _, err := f.WriteAt(was[:], off); err != nil {
			t.Fatal(err)
		}
	}
}

func sizeOf(t *testing.T, d *disktest.Dir, name string) int64 {
	t.Helper()
	f, err := d.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	n, _ := f.Size()
	return n
}

// TestDamage changes every byte of the log in turn. Up to the last flush but one
// this is always noticed; in the very last, it is or it looks torn.
func TestDamage(t *testing.T) {
	if testing.Short() {
		t.Skip(oneGoroutine)
	}
	base := baseDisk(t, 300<<10)
	d, _, sure := logged(t, base)
	accept := func(header) error { return nil }
	for off := range sizeOf(t, d, logName) {
		undo := damage(t, d, logName, off)
		for _, now := range []boot{thisBoot, nextBoot} {
			_, _, err := load(crashDir{d: d}, now, accept)
			if off < sure && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) {
				t.Fatalf("log byte %d of %d, boot %d: %v", off, sure, now[0], err)
			}
		}
		undo()
	}
	for off := range int64(headerLen) {
		undo := damage(t, d, dataName, off)
		if _, err := open(crashDir{d: d}, thisBoot, testID, keep(base)); !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) {
			t.Fatalf("data byte %d: %v", off, err)
		}
		undo()
	}
}

// TestTruncated cuts both files.
func TestTruncated(t *testing.T) {
	base := baseDisk(t, 300<<10)
	d, want, sure := logged(t, base)
	cut := func(name string, n int64) (disk.Reader, error) {
		c := d.Killed(d.Len(), false)
		f, err := c.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(n); err != nil {
			t.Fatal(err)
		}
		return open(crashDir{d: c}, nextBoot, testID, keep(base))
	}
	// What was synced before the log got its name: its header and a commit.
	for n := int64(0); n < headerLen+commitLen; n += 47 {
		if _, err := cut(logName, n); !errors.Is(err, ErrDamaged) {
			t.Fatalf("log of %d bytes: %v", n, err)
		}
	}
	// Whole records gone from the end cannot be told from a loss of power
	// before them, but nothing worse than that comes of it.
	if _, err := cut(logName, sure); err != nil {
		t.Errorf("log cut after a flush: %v", err)
	}
	for _, n := range []int64{0, 100, headerLen, 2 * clusterSize} {
		if _, err := cut(dataName, n); !errors.Is(err, ErrDamaged) {
			t.Errorf("data of %d bytes: %v", n, err)
		}
	}
	if r, err := cut(dataName, sizeOf(t, d, dataName)); err != nil || !bytes.Equal(contentOf(t, r), want) {
		t.Errorf("uncut: %v", err)
	}
}

// TestLeftovers has what a Create and an Open that died leave.
func TestLeftovers(t *testing.T) {
	base := baseDisk(t, 300<<10)
	d, want, _ := logged(t, base)
	f, err := crashDir{d: d}.create(newLogName)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("half a log"), 0); err != nil {
		t.Fatal(err)
	}
	disktest.Reader(t, mustOpen(t, d, base), want)
	if err := d.Remove(logName); err != nil {
		t.Fatal(err)
	}
	if err := create(crashDir{d: d}, thisBoot, testID, base.Size()); !errors.Is(err, fs.ErrExist) {
		t.Errorf("created over data whose log is gone: %v", err)
	}
}

// sealed writes a log with the records given, valid but for what they say.
func sealed(size int64, recs ...record) *disktest.Dir {
	d := disktest.NewDir()
	h := header{id: [16]byte{1}, size: size, boot: thisBoot, identity: testID}
	must := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	_, err := writeLog(crashDir{d: d}, &h, newBlockMap(size), nopLocker{})
	must(err)
	must(installLog(crashDir{d: d}))
	l, err := continueLog(crashDir{d: d}, h, 1)
	must(err)
	must(l.append(recs...))
	f, err := d.Create(dataName)
	must(err)
	_, err = f.WriteAt(encodeDataHeader(h.id), 0)
	must(err)
	must(f.Truncate(4 * clusterSize)) // three slots
	return d
}

type nopLocker struct{}

func (nopLocker) Lock()   {}
func (nopLocker) Unlock() {}

// TestBadRecords has records with good checksums that say what cannot be.
func TestBadRecords(t *testing.T) {
	const size = 5*clusterSize + 10
	one := func(x mapEntry) record { return encodeMap([]mapEntry{x})[0] }
	for name, c := range map[string]struct {
		recs []record
		want error
	}{
		"good":               {[]record{one(mapEntry{5, 2, 1, 2})}, nil},
		"cluster":            {[]record{one(mapEntry{6, 0, 1, 0})}, ErrDamaged},
		"far cluster":        {[]record{one(mapEntry{math.MaxUint32, 0, 1, 0})}, ErrDamaged},
		"data without slot":  {[]record{one(mapEntry{1, noSlot, 1, 0})}, ErrDamaged},
		"both":               {[]record{one(mapEntry{1, 1, 3, 2})}, ErrDamaged},
		"slot":               {[]record{one(mapEntry{1, 3, 1, 0})}, ErrDamaged},
		"far slot":           {[]record{one(mapEntry{1, noSlot - 1, 1, 0})}, ErrDamaged},
		"shared slot":        {[]record{one(mapEntry{1, 1, 1, 0}), one(mapEntry{2, 1, 2, 0})}, ErrDamaged},
		"second slot":        {[]record{one(mapEntry{1, 1, 1, 0}), one(mapEntry{1, 2, 1, 0})}, ErrDamaged},
		"zeros":              {[]record{encodeZero(0, 6)}, nil},
		"no zeros":           {[]record{encodeZero(6, 0)}, nil},
		"zeros behind":       {[]record{encodeZero(7, 0)}, ErrDamaged},
		"zeros too far":      {[]record{encodeZero(3, 4)}, ErrDamaged},
		"zeros overflow":     {[]record{encodeZero(5, math.MaxUint32)}, ErrDamaged},
		"commit":             {[]record{encodeCommit(headerLen + commitLen)}, nil},
		"commit ahead":       {[]record{encodeCommit(1 << 40)}, ErrDamaged},
		"commit back":        {[]record{encodeCommit(5)}, ErrDamaged},
		"commit negative":    {[]record{encodeCommit(-1)}, ErrDamaged},
		"short commit":       {[]record{{kind: kindCommit, content: make([]byte, 4)}}, ErrDamaged},
		"map length":         {[]record{{kind: kindMap, content: make([]byte, 16)}}, ErrDamaged},
		"zero length":        {[]record{{kind: kindZero, content: make([]byte, 12)}}, ErrDamaged},
		"unknown kind":       {[]record{{kind: 99}}, ErrVersion},
		"lost, then unknown": {[]record{{kind: kindLost}, {kind: 99}}, nil},
	} {
		_, err := open(crashDir{d: sealed(size, c.recs...)}, thisBoot, testID, disk.NewMem(size))
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

// FuzzLog opens logs whose header begins as given, with any bytes after it: no
// panic, nothing large allocated, and what opens reads as a disk.
func FuzzLog(f *testing.F) {
	const size = 3*clusterSize + 10
	logOf := func(d *disktest.Dir) []byte {
		l, _ := d.Open(logName)
		n, _ := l.Size()
		b := make([]byte, n)
		_, _ = l.ReadAt(b, 0)
		return b
	}
	add := func(recs ...record) {
		b := logOf(sealed(size, recs...))
		f.Add(b[:84+len(testID)], b[headerLen:])
	}
	add()
	add(encodeMap([]mapEntry{{0, 0, 1, 2}, {3, 1, 1, 0}})...)
	add(encodeZero(1, 2), encodeCommit(headerLen+commitLen), record{kind: kindLost})
	f.Fuzz(func(t *testing.T, head, rest []byte) {
		d := sealed(size)
		b := logOf(d)[:headerLen]
		copy(b, head)
		b = append(seal(b), rest...)
		l, err := d.Create(logName)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
		tryOpen(t, d, size)
	})
}

// FuzzRecords opens logs of records with good checksums and any content: each
// is a byte for its kind, one for its length in words, and that.
func FuzzRecords(f *testing.F) {
	const size = 3*clusterSize + 10
	f.Add([]byte{kindMap, 3, 1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 2, 0, kindCommit, 2, 40, 16, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{kindZero, 2, 1, 0, 0, 0, 2, 0, 0, 0, kindLost, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var recs []record
		for len(b) >= 2 {
			n := min(int(b[1])*4, len(b)-2) &^ 3
			recs = append(recs, record{kind: b[0], content: b[2 : 2+n]})
			b = b[2+n:]
		}
		tryOpen(t, sealed(size, recs...), size)
	})
}

func tryOpen(t *testing.T, d *disktest.Dir, size int64) {
	for _, now := range []boot{thisBoot, nextBoot} {
		o, err := open(crashDir{d: d}, now, testID, disk.NewMem(size))
		if err != nil {
			continue
		}
		p := contentOf(t, o)
		for e, err := range o.Extents(t.Context(), 0, size) {
			if err != nil || e.Zero && !disk.IsZero(p[e.Off:e.End()]) {
				t.Error(e, err)
			}
		}
		if err := o.WriteAt(t.Context(), []byte("x"), 5); err != nil {
			t.Error(err)
		}
		if err := errors.Join(o.Flush(t.Context()), o.Close()); err != nil {
			t.Error(err)
		}
	}
}
