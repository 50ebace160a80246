package overlay

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

const testID Identity = "point 0123/vda"

// crashDir makes a dir of a directory that can lose power.
type crashDir struct {
	d      *disktest.Dir
	synced func() // called after each sync of a file; may be nil
}

type crashFile struct {
	*disktest.DirFile
	synced func()
}

func (f crashFile) Sync() error {
	err := f.DirFile.Sync()
	if f.synced != nil {
		f.synced()
	}
	return err
}

func (d crashDir) open(name string) (file, error) {
	f, err := d.d.Open(name)
	if err != nil {
		return nil, err
	}
	return crashFile{f, d.synced}, nil
}

func (d crashDir) create(name string) (file, error) {
	f, err := d.d.Create(name)
	if err != nil {
		return nil, err
	}
	return crashFile{f, d.synced}, nil
}

func (d crashDir) rename(from, to string) error { return d.d.Rename(from, to) }
func (d crashDir) remove(name string) error     { return d.d.Remove(name) }
func (d crashDir) sync() error                  { return d.d.Sync() }

// baseDisk has data, zeros and holes.
func baseDisk(t testing.TB, size int64) *disk.Mem {
	t.Helper()
	m := disk.NewMem(size)
	r := rand.New(rand.NewPCG(5, 5))
	for off := int64(0); off < size; off += 100_000 {
		p := make([]byte, min(60_000, size-off))
		disktest.Fill(r, p)
		if err := m.WriteAt(t.Context(), p, off); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

func newOverlay(t testing.TB, base disk.Reader) (*Overlay, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "overlay")
	if err := Create(dir, testID, base.Size()); err != nil {
		t.Fatal(err)
	}
	return reopen(t, dir, base), dir
}

func reopen(t testing.TB, dir string, base disk.Reader) *Overlay {
	t.Helper()
	o, err := Open(dir, testID, base)
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func contentOf(t testing.TB, r disk.Reader) []byte {
	t.Helper()
	p := make([]byte, r.Size())
	if err := r.ReadAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestConformance(t *testing.T) {
	for _, size := range []int64{1<<20 + 777, 512 << 10, 300<<10 + 4096} {
		disktest.Device(t, func(t *testing.T) disk.Device {
			o, _ := newOverlay(t, disktest.HalfCached(baseDisk(t, size)))
			return o
		})
	}
}

// TestHistory goes on after reopening, with and without a flush, and never
// touches the base.
func TestHistory(t *testing.T) {
	r := disktest.Rand(t)
	base := baseDisk(t, 700<<10+100)
	before := contentOf(t, base)
	o, dir := newOverlay(t, base)
	flushOnly := bootID() == boot{}
	for range 12 {
		want := disktest.History(t, o, r, 60)
		if flushOnly || r.IntN(2) == 0 {
			if err := o.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
		o = reopen(t, dir, base)
		disktest.Reader(t, o, want)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	disktest.Reader(t, base, before)
}

func TestRefusals(t *testing.T) {
	base := disk.NewMem(1 << 20)
	o, dir := newOverlay(t, base)
	if _, err := Open(dir, testID, base); !errors.Is(err, ErrLocked) {
		t.Errorf("second opening: %v", err)
	}
	if err := Create(dir, testID, 1<<20); !errors.Is(err, ErrLocked) {
		t.Errorf("creating over an open one: %v", err)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Create(dir, testID, 1<<20); !errors.Is(err, fs.ErrExist) {
		t.Errorf("creating over one: %v", err)
	}
	if _, err := Open(dir, testID+"x", base); !errors.Is(err, ErrOtherBase) {
		t.Errorf("another base: %v", err)
	}
	if _, err := Open(dir, testID, disk.NewMem(1<<20+1)); !errors.Is(err, ErrOtherBase) {
		t.Errorf("base of another size: %v", err)
	}
	empty := t.TempDir()
	if _, err := Open(empty, testID, base); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing there: %v", err)
	}
	if left, _ := os.ReadDir(empty); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	other, dir2 := newOverlay(t, base)
	if err := errors.Join(other.Close(), os.Rename(filepath.Join(dir2, dataName), filepath.Join(dir, dataName))); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, testID, base); !errors.Is(err, ErrDamaged) {
		t.Errorf("another overlay's data: %v", err)
	}
	if _, err := Open(dir2, testID, base); !errors.Is(err, ErrDamaged) {
		t.Errorf("no data: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, logName)); err != nil {
		t.Fatal(err)
	}
	if err := Create(dir, testID, 1<<20); err != nil { // data without content is no overlay
		t.Error(err)
	}
	if err := Create(t.TempDir(), Identity(make([]byte, 1025)), 5); err == nil {
		t.Error("took an endless identity")
	}
	if err := Create(t.TempDir(), testID, maxSize+1); err == nil {
		t.Error("took an endless disk")
	}
}

func TestVersion(t *testing.T) {
	base := disk.NewMem(1 << 20)
	for _, name := range []string{logName, dataName} {
		o, dir := newOverlay(t, base)
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, name)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b[8]++
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(dir, testID, base); !errors.Is(err, ErrVersion) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestExtents(t *testing.T) {
	ctx := t.Context()
	base := disk.NewMem(1 << 20)
	if err := base.WriteAt(ctx, make([]byte, 128<<10), 0); err != nil { // data, though zeros
		t.Fatal(err)
	}
	o, _ := newOverlay(t, base)
	defer o.Close()
	err := errors.Join(
		o.ZeroAt(ctx, 0, 64<<10),
		o.WriteAt(ctx, []byte("x"), 512<<10+5000),
		o.WriteAt(ctx, make([]byte, 8192), 16<<10),
	)
	if err != nil {
		t.Fatal(err)
	}
	got, err := disk.Collect(o.Extents(ctx, 100, 1<<20-100))
	want := []disk.Extent{
		{Off: 100, Len: 16<<10 - 100, Zero: true},
		{Off: 16 << 10, Len: 8 << 10},
		{Off: 24 << 10, Len: 40 << 10, Zero: true},
		{Off: 64 << 10, Len: 64 << 10}, // the base's
		{Off: 128 << 10, Len: 388 << 10, Zero: true},
		{Off: 516 << 10, Len: 4 << 10},
		{Off: 520 << 10, Len: 504 << 10, Zero: true},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v\nwant %v", got, err, want)
	}
	if o.Used() != 12<<10 {
		t.Errorf("used %d", o.Used())
	}
}

func TestChanged(t *testing.T) {
	ctx := t.Context()
	base := disk.NewMem(10 << 20)
	o, dir := newOverlay(t, base)
	changed := func(since Mark, want ...disk.Extent) {
		t.Helper()
		got, err := disk.Collect(o.Changed(since))
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("got %v, %v, want %v", got, err, want)
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	changed(0)
	m0 := o.Mark()
	do(o.WriteAt(ctx, make([]byte, 5000), 4096))
	do(o.ZeroAt(ctx, 1<<20, 1<<20))
	a, z := disk.Extent{Off: 4096, Len: 8192}, disk.Extent{Off: 1 << 20, Len: 1 << 20, Zero: true}
	changed(0, a, z)
	changed(m0, a, z)
	m1 := o.Mark()
	changed(m1)
	do(o.WriteAt(ctx, []byte("in place"), 5000))
	changed(m1, a) // by clusters
	do(o.ZeroAt(ctx, 1<<20, 4096))
	changed(m1, a) // was zero before
	m2 := o.Mark()
	changed(m2)
	do(o.Flush(ctx))
	do(o.Close())
	o = reopen(t, dir, base)
	defer o.Close()
	changed(m2, a, z) // of an earlier opening: everything
	changed(0, a, z)
	m3 := o.Mark()
	changed(m3)
	do(o.WriteAt(ctx, []byte("x"), 5<<20))
	changed(m3, disk.Extent{Off: 5 << 20, Len: 4096})
	do(o.WriteAt(ctx, make([]byte, 64<<10), 6<<20))
	m4 := o.Mark()
	do(o.WriteAt(ctx, make([]byte, 128<<10), 6<<20)) // half in place, half fresh
	changed(m4, disk.Extent{Off: 6 << 20, Len: 128 << 10})
}

// TestSharedBlock has many write sectors of one block that the overlay does not
// hold yet.
func TestSharedBlock(t *testing.T) {
	base := baseDisk(t, 1<<20)
	o, _ := newOverlay(t, base)
	defer o.Close()
	want := contentOf(t, base)
	for block := range int64(64) {
		var wg sync.WaitGroup
		for i := range int64(8) {
			off := block*4096 + i*512
			disktest.Fill(rand.New(rand.NewPCG(1, uint64(off))), want[off:off+512])
			wg.Go(func() {
				if err := o.WriteAt(t.Context(), want[off:off+512], off); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	disktest.Reader(t, o, want)
}

// TestChangedCopies keeps a copy up to date by marks while writes go on, as a
// migration does.
func TestChangedCopies(t *testing.T) {
	ctx := t.Context()
	base := baseDisk(t, 1<<20)
	o, _ := newOverlay(t, base)
	defer o.Close()
	mirror := disk.NewMem(o.Size())
	stop := make(chan struct{})
	var wg sync.WaitGroup
	seed := disktest.Seed(t)
	for w := range 3 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(w)))
			for {
				select {
				case <-stop:
					return
				default:
				}
				p := make([]byte, 1+r.IntN(9000))
				disktest.Fill(r, p)
				off := r.Int64N(o.Size() - int64(len(p)))
				var err error
				if r.IntN(4) == 0 {
					err = o.ZeroAt(ctx, off, int64(len(p)))
				} else {
					err = o.WriteAt(ctx, p, off)
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	pass := func(ex disk.Extents) {
		for e, err := range ex {
			if err != nil {
				t.Error(err)
				return
			}
			p := make([]byte, e.Len)
			if err := errors.Join(o.ReadAt(ctx, p, e.Off), mirror.WriteAt(ctx, p, e.Off)); err != nil {
				t.Error(err)
				return
			}
		}
	}
	last := o.Mark()
	pass(o.Extents(ctx, 0, o.Size()))
	for range 20 {
		next := o.Mark()
		pass(o.Changed(last))
		last = next
	}
	close(stop)
	wg.Wait()
	pass(o.Changed(last))
	disktest.Reader(t, mirror, contentOf(t, o))
}

// TestHuge shows what a disk of 64 TiB costs.
func TestHuge(t *testing.T) {
	ctx := t.Context()
	base := disk.NewMem(64 << 40)
	o, dir := newOverlay(t, base)
	if err := o.WriteAt(ctx, []byte("start"), 0); err != nil {
		t.Fatal(err)
	}
	if err := o.ZeroAt(ctx, 0, o.Size()); err != nil { // as mkfs does
		t.Fatal(err)
	}
	for _, off := range []int64{1 << 30, 40 << 40, 64<<40 - 5} {
		if err := o.WriteAt(ctx, []byte("hello"), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(o.Flush(ctx), o.Close()); err != nil {
		t.Fatal(err)
	}
	o = reopen(t, dir, base)
	defer o.Close()
	got, err := disk.Collect(o.Extents(ctx, 0, o.Size()))
	want := []disk.Extent{
		{Off: 0, Len: 1 << 30, Zero: true},
		{Off: 1 << 30, Len: 4096},
		{Off: 1<<30 + 4096, Len: 40<<40 - 1<<30 - 4096, Zero: true},
		{Off: 40 << 40, Len: 4096},
		{Off: 40<<40 + 4096, Len: 24<<40 - 8192, Zero: true},
		{Off: 64<<40 - 4096, Len: 4096},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v\nwant %v", got, err, want)
	}
	info, err := os.Stat(filepath.Join(dir, logName))
	if err != nil || info.Size() > 200<<10 {
		t.Errorf("log of %v bytes, %v", info.Size(), err)
	}
}

// TestZeroAll zeroes a whole disk of an odd size and goes on.
func TestZeroAll(t *testing.T) {
	ctx := t.Context()
	base := baseDisk(t, 700<<10+100)
	o, dir := newOverlay(t, base)
	want := make([]byte, o.Size())
	want[5] = 1
	if err := errors.Join(o.ZeroAt(ctx, 0, o.Size()), o.WriteAt(ctx, want[:6], 0)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		disktest.Reader(t, o, want)
		if err := errors.Join(o.Flush(ctx), o.Close()); err != nil {
			t.Fatal(err)
		}
		o = reopen(t, dir, base)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestRewrite has the log rewritten many times while writes and flushes go on
// beside it.
func TestRewrite(t *testing.T) {
	defer func(n int64) { rewriteSlack = n }(rewriteSlack)
	rewriteSlack = 300
	ctx := t.Context()
	base := baseDisk(t, 2<<20)
	o, dir := newOverlay(t, base)
	want := contentOf(t, o)
	seed := disktest.Seed(t)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(w)))
			for range 300 {
				// Each worker has its part of the disk.
				off := int64(w)<<19 + r.Int64N(500<<10)
				p := make([]byte, 1+r.IntN(10_000))
				var err error
				switch r.IntN(4) {
				case 0:
					err = o.ZeroAt(ctx, off, int64(len(p)))
				case 1:
					err = o.Flush(ctx)
					copy(p, want[off:])
				default:
					disktest.Fill(r, p)
					err = o.WriteAt(ctx, p, off)
				}
				if err != nil {
					t.Error(err)
					return
				}
				copy(want[off:], p)
			}
		})
	}
	wg.Wait()
	disktest.Reader(t, o, want)
	if err := errors.Join(o.Flush(ctx), o.Close()); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(dir, logName))
	if err != nil || info.Size() > 20_000 {
		t.Errorf("log of %d bytes, %v", info.Size(), err)
	}
	o = reopen(t, dir, base)
	defer o.Close()
	disktest.Reader(t, o, want)
}

// BenchmarkWrite writes 4 KiB blocks: fresh ones, then the same in place.
func BenchmarkWrite(b *testing.B) {
	for _, name := range []string{"fresh", "in place"} {
		b.Run(name, func(b *testing.B) {
			o, _ := newOverlay(b, disk.NewMem(64<<30))
			defer o.Close()
			p := make([]byte, 4096)
			r := rand.New(rand.NewPCG(1, 1))
			b.SetBytes(4096)
			for i := 0; b.Loop(); i++ {
				off := r.Int64N(4<<30) &^ 4095
				if name == "in place" {
					off = int64(i%1024) * 4096
				}
				if err := o.WriteAt(b.Context(), p, off); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
