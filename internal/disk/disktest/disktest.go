// Package disktest tests disks.
//
// Device and Reader are the conformance suites: a disk of ours that does not
// pass one of them does not exist. History runs a random history against a
// model in memory. Faulty injects an error into the n-th call. Dir is a
// directory in memory that can lose power, for code that keeps its state in
// files.
//
// Random tests print their seed. HOLDFAST_SEED in the environment sets it.
package disktest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"

	"holdfast/internal/disk"
)

// Seed returns the seed of a random test and logs it: HOLDFAST_SEED if that
// is set, else a new one.
func Seed(t testing.TB) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("HOLDFAST_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("HOLDFAST_SEED: %v", err)
		}
		seed = n
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	return seed
}

// Rand returns random numbers that follow from Seed.
func Rand(t testing.TB) *rand.Rand {
	t.Helper()
	return rand.New(rand.NewPCG(Seed(t), 0))
}

// Fill fills p with random bytes, none of them zero.
func Fill(r *rand.Rand, p []byte) {
	for len(p) > 0 {
		var b [8]byte
		binary.LittleEndian.PutUint64(b[:], r.Uint64()|0x0101010101010101)
		p = p[copy(p, b[:]):]
	}
}

// Device checks that what open returns is a disk.Device in every respect: each
// call of open gives a fresh one of 256 KiB to 64 MiB with any content, the
// same each time in length. The suite closes them. Reads and writes come at
// any alignment, down to single bytes.
func Device(t *testing.T, open func(t *testing.T) disk.Device) {
	run := func(name string, f func(t *testing.T, d disk.Device)) {
		t.Run(name, func(t *testing.T) {
			d := open(t)
			f(t, d)
			if err := d.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
		})
	}
	run("reads", func(t *testing.T, d disk.Device) { Reader(t, d, snapshot(t, d)) })
	run("ranges", writeRanges)
	run("writes", writes)
	run("cancelled", cancelled)
	run("parallel", parallel)
	run("history", func(t *testing.T, d disk.Device) { History(t, d, Rand(t), 300) })
}

// Reader checks that r holds want, at every kind of range, and that its
// extents keep their promises. It may be called for a Device too; it does not
// write.
func Reader(t *testing.T, r disk.Reader, want []byte) {
	t.Helper()
	ctx := t.Context()
	size := int64(len(want))
	if r.Size() != size {
		t.Fatalf("size %d, want %d", r.Size(), size)
	}
	rnd := Rand(t)
	ranges := [][2]int64{{0, size}, {0, 0}, {size, 0}, {0, min(1, size)}, {max(size-1, 0), min(1, size)}}
	for range 50 {
		off, n := someRange(rnd, size)
		ranges = append(ranges, [2]int64{off, n})
	}
	var wg sync.WaitGroup
	for _, x := range ranges {
		wg.Go(func() {
			if err := verify(ctx, r, want, x[0], x[1]); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, x := range badRanges(size) {
		if x[1] >= 0 && x[1] < 4096 {
			if err := r.ReadAt(ctx, make([]byte, x[1]), x[0]); !errors.Is(err, disk.ErrRange) {
				t.Errorf("read [%d, +%d) of %d bytes: %v, want ErrRange", x[0], x[1], size, err)
			}
			if disk.ReadCached(r, make([]byte, x[1]), x[0]) {
				t.Errorf("cached read [%d, +%d) of %d bytes", x[0], x[1], size)
			}
		}
		if _, err := disk.Collect(r.Extents(ctx, x[0], x[1])); !errors.Is(err, disk.ErrRange) {
			t.Errorf("extents [%d, +%d) of %d bytes: %v, want ErrRange", x[0], x[1], size, err)
		}
	}
	for range r.Extents(ctx, 0, size) {
		break // a caller may stop early
	}
	dead, cancel := context.WithCancel(ctx)
	cancel()
	if err := r.ReadAt(dead, make([]byte, min(size, 512)), 0); !errors.Is(err, context.Canceled) {
		t.Errorf("read with a cancelled context: %v", err)
	}
}

// HalfCached gives r as a disk.Cached that has every other 4 KiB at hand. Reads
// of r must not wait.
func HalfCached(r disk.Reader) disk.Reader { return halfCached{r} }

type halfCached struct{ r disk.Reader }

func (h halfCached) Size() int64 { return h.r.Size() }
func (h halfCached) ReadAt(ctx context.Context, p []byte, off int64) error {
	return h.r.ReadAt(ctx, p, off)
}
func (h halfCached) ReadCached(p []byte, off int64) bool {
	if off>>12&1 == 0 || (off+int64(len(p))-1)>>12 != off>>12 {
		clear(p)
		return false
	}
	return h.r.ReadAt(context.Background(), p, off) == nil
}
func (h halfCached) Extents(ctx context.Context, off, n int64) disk.Extents {
	return h.r.Extents(ctx, off, n)
}
func (h halfCached) Close() error { return h.r.Close() }

// verify compares a range and its extents with the model.
func verify(ctx context.Context, r disk.Reader, want []byte, off, n int64) error {
	p := bytes.Repeat([]byte{0xa5}, int(n))
	if err := r.ReadAt(ctx, p, off); err != nil {
		return fmt.Errorf("read [%d, +%d): %w", off, n, err)
	}
	if !bytes.Equal(p, want[off:off+n]) {
		i := int64(0)
		for p[i] == want[off+i] {
			i++
		}
		return fmt.Errorf("read [%d, +%d): byte at %d is %#x, want %#x", off, n, off+i, p[i], want[off+i])
	}
	if disk.ReadCached(r, p, off) && !bytes.Equal(p, want[off:off+n]) {
		return fmt.Errorf("cached read [%d, +%d) differs", off, n)
	}
	at := off
	for e, err := range r.Extents(ctx, off, n) {
		if err != nil {
			return fmt.Errorf("extents [%d, +%d): %w", off, n, err)
		}
		if e.Off != at || e.Len <= 0 || e.End() > off+n {
			return fmt.Errorf("extents [%d, +%d): got %+v at %d", off, n, e, at)
		}
		if e.Zero && !disk.IsZero(want[e.Off:e.End()]) {
			return fmt.Errorf("extents [%d, +%d): %+v is not zero", off, n, e)
		}
		at = e.End()
	}
	if at != off+n {
		return fmt.Errorf("extents [%d, +%d) end at %d", off, n, at)
	}
	return nil
}

func snapshot(t *testing.T, r disk.Reader) []byte {
	t.Helper()
	size := r.Size()
	if size < 256<<10 || size > 64<<20 {
		t.Fatalf("the suite wants a disk of 256 KiB to 64 MiB, not %d bytes", size)
	}
	p := make([]byte, size)
	if err := r.ReadAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func badRanges(size int64) [][2]int64 {
	const big = 1<<63 - 1
	return [][2]int64{{-1, 1}, {0, -1}, {size, 1}, {size - 1, 2}, {size + 1, 0}, {0, size + 1}, {big, 1}, {1, big}, {big, big}}
}

// someRange picks a range that likes edges: of sectors, blocks, the disk.
func someRange(r *rand.Rand, size int64) (off, n int64) {
	grain := []int64{1, 512, 4096, 64 << 10, 1 << 20}[r.IntN(5)]
	off = r.Int64N(size+1) / grain * grain
	n = r.Int64N(4*grain) + 1
	if r.IntN(2) == 0 {
		n = (n + grain - 1) / grain * grain
	}
	return off, min(n, size-off)
}

func writeRanges(t *testing.T, d disk.Device) {
	ctx := t.Context()
	want := snapshot(t, d)
	size := d.Size()
	for _, x := range badRanges(size) {
		if x[1] >= 0 && x[1] < 4096 {
			if err := d.WriteAt(ctx, make([]byte, x[1]), x[0]); !errors.Is(err, disk.ErrRange) {
				t.Errorf("write [%d, +%d) of %d bytes: %v, want ErrRange", x[0], x[1], size, err)
			}
		}
		if err := d.ZeroAt(ctx, x[0], x[1]); !errors.Is(err, disk.ErrRange) {
			t.Errorf("zero [%d, +%d) of %d bytes: %v, want ErrRange", x[0], x[1], size, err)
		}
	}
	for _, off := range []int64{0, 1, size} { // empty ranges are in order
		if err := errors.Join(d.WriteAt(ctx, nil, off), d.ZeroAt(ctx, off, 0)); err != nil {
			t.Errorf("nothing at %d: %v", off, err)
		}
	}
	if err := verify(ctx, d, want, 0, size); err != nil {
		t.Error(err)
	}
}

func writes(t *testing.T, d disk.Device) {
	ctx := t.Context()
	want := snapshot(t, d)
	size := d.Size()
	r := rand.New(rand.NewPCG(1, 2))
	for _, x := range [][2]int64{
		{0, 1}, {size - 1, 1}, {4095, 2}, {4096, 4096}, {65535, 2}, {65536, 65536}, {511, 513}, {3, 200000}, {size - 70000, 70000},
	} {
		p := make([]byte, x[1])
		Fill(r, p)
		copy(want[x[0]:], p)
		if err := d.WriteAt(ctx, p, x[0]); err != nil {
			t.Fatalf("write [%d, +%d): %v", x[0], x[1], err)
		}
		clear(p) // the slice is ours again
		if err := verify(ctx, d, want, 0, size); err != nil {
			t.Fatalf("after a write of [%d, +%d): %v", x[0], x[1], err)
		}
		off, n := x[0]+x[1]/3, x[1]/3
		clear(want[off : off+n])
		if err := d.ZeroAt(ctx, off, n); err != nil {
			t.Fatalf("zero [%d, +%d): %v", off, n, err)
		}
		if err := verify(ctx, d, want, 0, size); err != nil {
			t.Fatalf("after zeroing [%d, +%d): %v", off, n, err)
		}
	}
	if err := d.Flush(ctx); err != nil {
		t.Fatalf("flush: %v", err)
	}
	if err := d.ZeroAt(ctx, 0, size); err != nil {
		t.Fatalf("zero all: %v", err)
	}
	if err := verify(ctx, d, make([]byte, size), 0, size); err != nil {
		t.Fatalf("after zeroing all: %v", err)
	}
}

func cancelled(t *testing.T, d disk.Device) {
	want := snapshot(t, d)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	p := bytes.Repeat([]byte{7}, 8192)
	for what, err := range map[string]error{
		"write": d.WriteAt(ctx, p, 100), "zero": d.ZeroAt(ctx, 100, 8192), "flush": d.Flush(ctx),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s with a cancelled context: %v", what, err)
		}
	}
	if err := verify(t.Context(), d, want, 0, d.Size()); err != nil {
		t.Errorf("after cancelled writes: %v", err)
	}
}

// parallel has writers of disjoint ranges that share blocks, readers beside
// them, and flushes.
func parallel(t *testing.T, d disk.Device) {
	ctx := t.Context()
	want := snapshot(t, d)
	const workers = 8
	seed := Seed(t)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(seed, uint64(w)))
			for range 60 {
				// Each worker owns every eighth run of 700 bytes.
				run := r.Int64N(d.Size()/700/workers)*workers + int64(w)
				off := run * 700
				p := make([]byte, 1+r.IntN(700))
				var err error
				switch r.IntN(5) {
				case 0:
					err = d.ZeroAt(ctx, off, int64(len(p)))
				case 1:
					if err = d.ReadAt(ctx, p, off); err == nil && !bytes.Equal(p, want[off:off+int64(len(p))]) {
						err = fmt.Errorf("read at %d: not what was written", off)
					}
				case 2:
					err = d.Flush(ctx)
					copy(p, want[off:])
				default:
					Fill(r, p)
					err = d.WriteAt(ctx, p, off)
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
	if err := verify(ctx, d, want, 0, d.Size()); err != nil {
		t.Error(err)
	}
}

// History runs steps random reads, writes, zeroes and flushes on d beside a
// model, and compares. It returns the model: what the disk holds now. It can be
// called again with the disk reopened; the disk's first content may be any.
func History(t testing.TB, d disk.Device, r *rand.Rand, steps int) []byte {
	t.Helper()
	ctx := t.Context()
	size := d.Size()
	want := make([]byte, size)
	if err := d.ReadAt(ctx, want, 0); err != nil {
		t.Fatalf("read all: %v", err)
	}
	for i := range steps {
		off, n := someRange(r, size)
		var err error
		what := "write"
		switch k := r.IntN(10); {
		case k < 5:
			p := make([]byte, n)
			Fill(r, p)
			copy(want[off:], p)
			err = d.WriteAt(ctx, p, off)
		case k < 7:
			what = "zero"
			clear(want[off : off+n])
			err = d.ZeroAt(ctx, off, n)
		case k < 9:
			what = "read"
			err = verify(ctx, d, want, off, n)
		default:
			what = "flush"
			err = d.Flush(ctx)
		}
		if err != nil {
			t.Fatalf("step %d: %s [%d, +%d): %v", i, what, off, n, err)
		}
	}
	if err := verify(ctx, d, want, 0, size); err != nil {
		t.Fatalf("after %d steps: %v", steps, err)
	}
	return want
}
