package mover_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/mover"
)

// strict is a writer that checks what a Copy promises of its writes.
type strict struct {
	t     *testing.T
	inner *disk.Mem
	align int64

	mu    sync.Mutex
	spans map[int64]int64 // by start, to their end: no two may overlap
}

func (s *strict) check(off, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if off%s.align != 0 || n%s.align != 0 && off+n != s.inner.Size() || n == 0 {
		s.t.Errorf("write of [%d, +%d) is not aligned to %d", off, n, s.align)
	}
	for lo, hi := range s.spans {
		if off < hi && lo < off+n {
			s.t.Errorf("[%d, +%d) written twice", off, n)
		}
	}
	s.spans[off] = off + n
}

func (s *strict) WriteAt(ctx context.Context, p []byte, off int64) error {
	s.check(off, int64(len(p)))
	return s.inner.WriteAt(ctx, p, off)
}

func (s *strict) ZeroAt(ctx context.Context, off, n int64) error {
	s.check(off, n)
	return s.inner.ZeroAt(ctx, off, n)
}

func (s *strict) Flush(context.Context) error {
	s.t.Error("the mover flushed")
	return nil
}

// image makes a disk with data, zeros that are known and zeros that are not.
func image(t *testing.T, size int64) (*disk.Mem, []byte) {
	m := disk.NewMem(size)
	r := disktest.Rand(t)
	for off := int64(0); off < size; off += 64 << 10 {
		p := make([]byte, min(64<<10, size-off))
		switch r.IntN(3) {
		case 0:
			continue
		case 1:
			disktest.Fill(r, p)
		}
		if err := m.WriteAt(t.Context(), p, off); err != nil {
			t.Fatal(err)
		}
	}
	want := make([]byte, size)
	if err := m.ReadAt(t.Context(), want, 0); err != nil {
		t.Fatal(err)
	}
	return m, want
}

// backwards is a disk.Feeder that begins at the end.
type backwards struct{ *disk.Mem }

func (d backwards) Feed(ctx context.Context, extents disk.Extents, window int64, workers int, put func(context.Context, []byte, int64) error) error {
	all, err := disk.Collect(extents)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for _, e := range slices.Backward(all) {
		for e.Len > 0 {
			n := (e.Len-1)%(64<<10) + 1
			e.Len -= n
			off := e.End()
			g.Go(func() error {
				p := make([]byte, n)
				if err := d.ReadAt(ctx, p, off); err != nil {
					return err
				}
				return put(ctx, p, off)
			})
		}
	}
	return g.Wait()
}

func TestCopy(t *testing.T) {
	const size = 9<<20 + 12345
	mem, want := image(t, size)
	src := backwards{mem}
	for _, o := range []mover.Options{
		{},
		{Zeros: mover.WriteZeros},
		{Align: 64 << 10},
		{Align: 256 << 10, Zeros: mover.WriteZeros},
		{Align: 4096, Block: 64 << 10, Workers: 1},
		{Align: 2 << 20, Workers: 3},
		{Align: 64 << 10, Window: 1 << 20},
		{Align: 64 << 10, Window: 1 << 20, Workers: 1, Zeros: mover.WriteZeros},
	} {
		dst := disk.NewMem(size)
		w := &strict{t: t, inner: dst, align: max(o.Align, 1), spans: map[int64]int64{}}
		if o.Zeros == mover.WriteZeros { // zeros must come over old content
			p := make([]byte, size)
			disktest.Fill(disktest.Rand(t), p)
			if err := dst.WriteAt(t.Context(), p, 0); err != nil {
				t.Fatal(err)
			}
		}
		o.Meter = &mover.Meter{}
		c, err := mover.Copy(t.Context(), w, src, src.Extents(t.Context(), 0, size), o)
		if err != nil {
			t.Fatalf("%+v: %v", o, err)
		}
		disktest.Reader(t, dst, want)
		if c.Written+c.Zeroed+c.Skipped != size || o.Zeros == mover.SkipZeros && c.Zeroed > 0 || o.Zeros == mover.WriteZeros && c.Skipped > 0 {
			t.Errorf("%+v: counts %+v", o, c)
		}
		if p := o.Meter.Progress(); p.Done != c.Read {
			t.Errorf("%+v: counts %+v, progress %+v", o, c, p)
		}
	}
}

// TestCopyPart copies some extents and leaves the rest alone.
func TestCopyPart(t *testing.T) {
	const size = 1<<20 + 5
	src, want := image(t, size)
	dst := disk.NewMem(size)
	p := make([]byte, size)
	disktest.Fill(disktest.Rand(t), p)
	if err := dst.WriteAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	ex := disk.List(disk.Extent{Off: 100, Len: 50}, disk.Extent{Off: 8192, Len: 4096}, disk.Extent{Off: size - 1, Len: 1})
	c, err := mover.Copy(t.Context(), dst, src, ex, mover.Options{Align: 4096, Zeros: mover.WriteZeros})
	if err != nil || c.Read != 4096+4096+5 {
		t.Fatal(c, err)
	}
	copy(p[:4096], want)
	copy(p[8192:12288], want[8192:])
	copy(p[1<<20:], want[1<<20:])
	disktest.Reader(t, dst, p)
}

func TestCopyHugeZeros(t *testing.T) {
	src, dst := disk.NewMem(64<<40), disk.NewMem(64<<40)
	if err := src.WriteAt(t.Context(), []byte("end"), 64<<40-3); err != nil {
		t.Fatal(err)
	}
	c, err := mover.Copy(t.Context(), dst, src, src.Extents(t.Context(), 0, src.Size()), mover.Options{Zeros: mover.WriteZeros})
	if want := (mover.Counts{Read: 64 << 10, Written: 64 << 10, Zeroed: 64<<40 - 64<<10}); err != nil || c != want {
		t.Errorf("%+v, %v, want %+v", c, err, want)
	}
}

// TestCopyFails injects an error into every call, on either side.
func TestCopyFails(t *testing.T) {
	const size = 2 << 20
	src, _ := image(t, size)
	copyOnce := func(from, to int64) (*disktest.Faulty, *disktest.Faulty, error) {
		r, w := disktest.NewFaulty(disk.ReadOnly(src), from), disktest.NewFaulty(disk.NewMem(size), to)
		_, err := mover.Copy(t.Context(), w, r, r.Extents(t.Context(), 0, size), mover.Options{Block: 64 << 10, Zeros: mover.WriteZeros})
		return r, w, err
	}
	r, w, err := copyOnce(0, 0)
	if err != nil || r.Calls() < 10 || w.Calls() < 10 {
		t.Fatal(r.Calls(), w.Calls(), err)
	}
	for n := range r.Calls() {
		if _, _, err := copyOnce(n+1, 0); !errors.Is(err, disktest.ErrInjected) {
			t.Errorf("reader's call %d: %v", n+1, err)
		}
	}
	for n := range w.Calls() {
		if _, _, err := copyOnce(0, n+1); !errors.Is(err, disktest.ErrInjected) {
			t.Errorf("writer's call %d: %v", n+1, err)
		}
	}
}

func TestCopyRefuses(t *testing.T) {
	m := disk.NewMem(1 << 20)
	for _, c := range []struct {
		ex   disk.Extents
		o    mover.Options
		want error
	}{
		{disk.List(disk.Extent{Off: 0, Len: 1<<20 + 1}), mover.Options{}, disk.ErrRange},
		{disk.List(disk.Extent{Off: 5, Len: 5}, disk.Extent{Off: 0, Len: 5}), mover.Options{}, disk.ErrOrder},
		{m.Extents(t.Context(), 0, 1<<20), mover.Options{Align: 3000, Block: 1 << 20}, mover.ErrAlign},
		{m.Extents(t.Context(), 0, 1<<20), mover.Options{Align: -1}, mover.ErrAlign},
		{disk.Fail(disktest.ErrInjected), mover.Options{}, disktest.ErrInjected},
	} {
		if _, err := mover.Copy(t.Context(), disk.NewMem(1<<20), m, c.ex, c.o); !errors.Is(err, c.want) {
			t.Errorf("%+v: %v, want %v", c.o, err, c.want)
		}
	}
}

// slow is a reader that blocks until its context is done.
type slow struct{ size int64 }

func (s slow) Size() int64  { return s.size }
func (s slow) Close() error { return nil }
func (s slow) Extents(_ context.Context, off, n int64) disk.Extents {
	return disk.List(disk.Extent{Off: off, Len: n})
}
func (s slow) ReadAt(ctx context.Context, _ []byte, _ int64) error {
	<-ctx.Done()
	return ctx.Err()
}

func TestCopyCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		src := slow{1 << 30}
		_, err := mover.Copy(ctx, disk.NewMem(src.size), src, src.Extents(ctx, 0, src.size), mover.Options{})
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	}) // fails if a goroutine is left
}

func TestCopyRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 64 << 20
		src := disk.NewMem(size)
		start := time.Now()
		m := &mover.Meter{}
		m.AddTotal(size)
		c, err := mover.Copy(t.Context(), disk.NewMem(size), src, disk.List(disk.Extent{Len: size}), mover.Options{Rate: 4 << 20, Meter: m})
		if err != nil || c.Read != size {
			t.Fatal(c, err)
		}
		if d := time.Since(start); d < 15500*time.Millisecond || d > 16500*time.Millisecond {
			t.Errorf("64 MiB at 4 MiB/s took %v", d)
		}
		if p := m.Progress(); p.Left != 0 || p.Rate < 3.9*(1<<20) || p.Rate > 4.2*(1<<20) {
			t.Errorf("%+v", p)
		}
	})
}

func TestMeter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &mover.Meter{}
		if p := m.Progress(); p.Left >= 0 || p.Rate != 0 {
			t.Errorf("before anything: %+v", p)
		}
		step := func(n int, bytes int64) mover.Progress {
			var p mover.Progress
			for range n {
				time.Sleep(500 * time.Millisecond)
				m.Add(bytes)
				p = m.Progress()
			}
			return p
		}
		m.AddTotal(1000_000)
		near := func(p mover.Progress, rate float64, left time.Duration) {
			t.Helper()
			if p.Rate < rate*0.95 || p.Rate > rate*1.05 || p.Left < left*9/10 || p.Left > left*11/10 {
				t.Errorf("%+v, want about %v/s and %v", p, rate, left)
			}
		}
		near(step(2, 500), 1000, 999*time.Second)    // right from the start
		near(step(98, 500), 1000, 950*time.Second)   // steady
		near(step(100, 5000), 10000, 45*time.Second) // forgets the slow past
		m.Set(1000_000, 1000_000)
		if p := m.Progress(); p.Left != 0 {
			t.Errorf("at the end: %+v", p)
		}
		var none *mover.Meter
		none.Add(1)
		none.Set(1, 2)
		if p := none.Progress(); p.Done != 0 {
			t.Error(p)
		}
	})
}

func BenchmarkCopy(b *testing.B) {
	const size = 256 << 20
	src, dst := disk.NewMem(size), disk.NewMem(size)
	p := make([]byte, 1<<20)
	disktest.Fill(disktest.Rand(b), p)
	for off := int64(0); off < size; off += 1 << 20 {
		if err := src.WriteAt(b.Context(), p, off); err != nil {
			b.Fatal(err)
		}
	}
	b.SetBytes(size)
	for b.Loop() {
		if _, err := mover.Copy(b.Context(), dst, src, src.Extents(b.Context(), 0, size), mover.Options{}); err != nil {
			b.Fatal(err)
		}
	}
}
