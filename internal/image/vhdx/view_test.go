package vhdx

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// scatter writes n runs of random bytes to a disk of size bytes and returns it
// with where they are.
func scatter(t testing.TB, rnd *rand.Rand, size int64, n int, longest int64) (*disk.Mem, []disk.Extent) {
	t.Helper()
	d := disk.NewMem(size)
	var list []disk.Extent
	for range n {
		off := rnd.Int64N(size)
		p := make([]byte, min(1+rnd.Int64N(longest), size-off))
		disktest.Fill(rnd, p)
		if err := d.WriteAt(t.Context(), p, off); err != nil {
			t.Fatal(err)
		}
		list = append(list, disk.Extent{Off: off, Len: int64(len(p))})
	}
	return d, list
}

// bytesOf is a whole disk, with zeros up to size.
func bytesOf(t testing.TB, d disk.Reader, size int64) []byte {
	t.Helper()
	b := make([]byte, size)
	if err := d.ReadAt(t.Context(), b[:d.Size()], 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func newView(t testing.TB, d disk.Reader, o ViewOptions) disk.Reader {
	t.Helper()
	v, err := NewView(t.Context(), d, o)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func up(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

// TestViewIsRead: what a view computes, the reader reads, and has nothing to
// say against.
func TestViewIsRead(t *testing.T) {
	rnd := disktest.Rand(t)
	rounds := 16
	if testing.Short() {
		rounds = 4
	}
	for i := range rounds {
		size := 1 + rnd.Int64N(9<<20)
		d, _ := scatter(t, rnd, size, rnd.IntN(5), 300<<10)
		o := ViewOptions{Variant: Variant(rnd.IntN(3)), BlockSize: 1 << 20 << rnd.IntN(3), LogicalSector: []int64{0, 512, 4096}[rnd.IntN(3)]}
		disktest.Fill(rnd, o.DiskID[:])
		disktest.Fill(rnd, o.DataID[:])
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			v := newView(t, d, o)
			im := openMem(t, v)
			info := im.Info()
			sector := max(o.LogicalSector, 512)
			wantVariant := []string{"dynamic", "dynamic", "fixed"}[o.Variant]
			if info.Size != up(size, sector) || info.Block != o.BlockSize || info.LogicalSector != sector || info.PhysicalSector != 4096 ||
				info.Variant != wantVariant || info.DirtyLog || info.Warnings != nil || info.Parent != nil ||
				strings.ReplaceAll(info.DiskID, "-", "") != fmt.Sprintf("%x", o.DiskID) || strings.ReplaceAll(info.DataID, "-", "") != fmt.Sprintf("%x", o.DataID) {
				t.Errorf("%+v of %+v", info, o)
			}
			compare(t, chainOf(t, v), bytesOf(t, d, info.Size), rnd)
			if p := problems(t, im); p != nil {
				t.Errorf("check: %q", p)
			}
			whole := bytesOf(t, v, v.Size())
			disktest.Reader(t, v, whole)
			if again := newView(t, d, o); !bytes.Equal(whole, bytesOf(t, again, v.Size())) {
				t.Error("made again, the file is another one")
			}
		})
	}
}

func TestViewRefuses(t *testing.T) {
	for _, c := range []struct {
		size int64
		o    ViewOptions
	}{
		{0, ViewOptions{}}, {64<<40 + 1, ViewOptions{}}, {1 << 20, ViewOptions{BlockSize: 3 << 20}}, {1 << 20, ViewOptions{BlockSize: 512 << 20}},
		{1 << 20, ViewOptions{BlockSize: 512 << 10}}, {1 << 20, ViewOptions{LogicalSector: 1024}}, {1 << 20, ViewOptions{Variant: 3}}, {1 << 20, ViewOptions{BlockSize: -1 << 20}},
	} {
		if _, err := NewView(t.Context(), disk.NewMem(c.size), c.o); err == nil {
			t.Errorf("%d bytes, %+v: no error", c.size, c.o)
		}
	}
	a, b := openMem(t, newView(t, disk.NewMem(5<<20), ViewOptions{})).Info(), openMem(t, newView(t, disk.NewMem(5<<20), ViewOptions{})).Info()
	if a.DiskID == b.DiskID || a.DataID == b.DataID || a.DiskID == a.DataID {
		t.Errorf("ids are not random: %+v %+v", a, b)
	}
}

// TestViewAgainstTools compares views with what other readers make of them.
func TestViewAgainstTools(t *testing.T) {
	for _, c := range []struct {
		size   int64
		sector int64
		block  int64
		v      Variant
	}{
		{10<<20 + 512, 512, 0, Dynamic},
		{10<<20 + 8*512, 512, 0, Dynamic},
		{11<<20 + 24*512, 512, 1 << 20, Fixed},
		{7<<20 + 8*4096, 4096, 1 << 20, Dynamic},
		{9<<20 + 3*512, 512, 1 << 20, Fixed},
		{33<<20 + 512, 512, 32 << 20, Dynamic},
		{7<<20 + 4096, 4096, 1 << 20, Dynamic},
		{5 << 20, 4096, 0, Full},
		{260<<20 + 512, 512, 256 << 20, Full},
		{4<<30 + 5<<20 + 512, 512, 1 << 20, Dynamic}, // over one chunk
		{9<<30 + 512, 512, 1 << 20, Full},            // over two
		{3<<40 + 512, 512, 0, Dynamic},
		{20<<40 + 4096, 4096, 0, Full},
		{64 << 40, 512, 0, Fixed},
	} {
		t.Run(fmt.Sprintf("%d,%d,%d,%d", c.size, c.sector, c.block, c.v), func(t *testing.T) {
			if testing.Short() && c.size > 1<<30 {
				t.Skip("SKIPPED: large disks take a while")
			}
			rnd, dir := disktest.Rand(t), t.TempDir()
			d, parts := scatter(t, rnd, c.size, 6, 300<<10)
			v := newView(t, d, ViewOptions{Variant: c.v, BlockSize: c.block, LogicalSector: c.sector})
			path, raw := filepath.Join(dir, "a.vhdx"), filepath.Join(dir, "a.raw")
			if v.Size() > 8<<40 { // more than the test's file system may take: the reader alone
				checkParts(t, chainOf(t, v), d, parts)
				return
			}
			save(t, v, path)
			t.Run("qemu", func(t *testing.T) {
				need(t, "qemu-img")
				if c.sector != 512 {
					t.Skip("QEMU reads 512-byte sectors only")
				}
				save(t, d, raw)
				run(t, "qemu-img", "check", "-f", "vhdx", path)
				if c.size > 1<<30 {
					return // it reads all zeros to compare
				}
				run(t, "qemu-img", "compare", "-f", "vhdx", "-F", "raw", path, raw)
			})
			t.Run("7z", func(t *testing.T) {
				if c.size > 1<<30 {
					t.Skip("7-Zip reads the whole disk")
				}
				if c.size%(8*c.sector) != 0 {
					t.Skip("7-Zip refuses bitmaps that end within a byte, those of QEMU too")
				}
				run(t, need(t, "7z", "7zz"), "t", "-tVHDX", path)
				if !bytes.Equal(sevenZip(t, path), bytesOf(t, d, c.size)) {
					t.Error("it reads something else")
				}
			})
			t.Run("libvhdi", func(t *testing.T) {
				f, err := disk.OpenFile(vhdimount(t, path), disk.FileOptions{ReadOnly: true})
				if err != nil {
					t.Fatal(err)
				}
				checkParts(t, f, d, parts)
				if err := f.Close(); err != nil {
					t.Fatal(err)
				}
			})
			checkParts(t, openChain(t, dir, "a.vhdx"), d, parts)
		})
	}
}

// checkParts compares two large disks where one of them has data, around it
// and at a few places more.
func checkParts(t testing.TB, got, want disk.Reader, parts []disk.Extent) {
	t.Helper()
	if got.Size() != want.Size() {
		t.Fatalf("size %d, want %d", got.Size(), want.Size())
	}
	for i := range int64(20) {
		parts = append(parts, disk.Extent{Off: want.Size() / 20 * i, Len: 1})
	}
	for _, x := range append(parts, disk.Extent{Off: want.Size() - 1, Len: 1}) {
		lo, hi := max(0, x.Off-70000), min(want.Size(), x.End()+70000)
		a, b := make([]byte, hi-lo), make([]byte, hi-lo)
		if err := got.ReadAt(t.Context(), a, lo); err != nil {
			t.Fatal(err)
		}
		if err := want.ReadAt(t.Context(), b, lo); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Fatalf("the %d bytes at %d differ", hi-lo, lo)
		}
	}
}

// TestViewOf64TiB: the forms that hold all blocks cost nothing to make.
func TestViewOf64TiB(t *testing.T) {
	for _, v := range []Variant{Full, Fixed} {
		d, parts := scatter(t, disktest.Rand(t), 64<<40, 4, 100<<10)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f := newView(t, d, ViewOptions{Variant: v})
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 1<<20 {
			t.Errorf("making it allocates %d bytes", n)
		}
		checkParts(t, chainOf(t, f), d, parts)
	}
}

// TestOpens64TiBAtOnce: a dynamic disk of the largest size with the smallest
// blocks, whose BAT of 513 MiB is a hole but for a few entries, opens within 100
// ms and 64 MiB. It is also where block numbers are largest.
func TestOpens64TiBAtOnce(t *testing.T) {
	long(t)
	d, parts := scatter(t, disktest.Rand(t), 64<<40, 4, 100<<10)
	path := filepath.Join(t.TempDir(), "a.vhdx")
	v := newView(t, d, ViewOptions{BlockSize: 1 << 20})
	sparse, err := os.Create(path)
	if err == nil {
		err = sparse.Truncate(v.Size())
	}
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	for off := int64(0); off < v.Size(); off += int64(len(buf)) {
		b := buf[:min(int64(len(buf)), v.Size()-off)]
		if err := v.ReadAt(t.Context(), b, off); err != nil {
			t.Fatal(err)
		}
		for ; len(b) > 0; b = b[4096:] {
			if at := off + int64(len(buf)-len(b)); !disk.IsZero(b[:4096]) {
				if _, err := sparse.WriteAt(b[:4096], at); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if err := sparse.Close(); err != nil {
		t.Fatal(err)
	}
	best, memory := time.Hour, uint64(0)
	for range 3 { // the machine is shared
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		start := time.Now()
		c := openChain(t, filepath.Dir(path), "a.vhdx")
		best = min(best, time.Since(start))
		runtime.ReadMemStats(&after)
		memory = after.TotalAlloc - before.TotalAlloc
		checkParts(t, c, d, parts)
	}
	t.Logf("opened in %v, allocating %d bytes", best, memory)
	if best > 100*time.Millisecond || memory > 64<<20 {
		t.Errorf("opening takes %v and %d bytes", best, memory)
	}
}

func BenchmarkOpen64TiB(b *testing.B) {
	d := disk.NewMem(64 << 40)
	for _, v := range []Variant{Dynamic, Full} {
		f := newView(b, d, ViewOptions{Variant: v})
		b.Run([]string{"dynamic", "full"}[v], func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				openMem(b, f)
			}
		})
	}
}
