package vhd

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

// save copies a view to a sparse file, as an export does, and closes it.
func save(t testing.TB, v disk.Reader, path string) {
	t.Helper()
	f, err := disk.CreateFile(path, v.Size())
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 64<<10)
	for e, err := range v.Extents(t.Context(), 0, v.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		for off := e.Off; off < e.End() && !e.Zero; off += int64(len(p)) {
			p := p[:min(int64(len(p)), e.End()-off)]
			if err := v.ReadAt(t.Context(), p, off); err != nil {
				t.Fatal(err)
			}
			if disk.IsZero(p) {
				continue
			}
			if err := f.WriteAt(t.Context(), p, off); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(f.Close(), v.Close()); err != nil {
		t.Fatal(err)
	}
}

// viewBytes is all of a view of a disk with that content.
func viewBytes(t testing.TB, content []byte, o ViewOptions) []byte {
	t.Helper()
	v, err := NewView(t.Context(), memOf(t, content), o)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, v.Size())
	if err := v.ReadAt(t.Context(), b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// sparse is a disk with some data here and there.
func sparse(t testing.TB, rnd *rand.Rand, size int64) *disk.Mem {
	t.Helper()
	m := disk.NewMem(size)
	for range 1 + rnd.IntN(6) {
		off := rnd.Int64N(size)
		p := make([]byte, 1+rnd.Int64N(min(300<<10, size-off)))
		disktest.Fill(rnd, p)
		if err := m.WriteAt(t.Context(), p, off); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// bytesOf is all of a disk, rounded up to sectors.
func bytesOf(t testing.TB, d disk.Reader) []byte {
	t.Helper()
	b := make([]byte, (d.Size()+511)/512*512)
	if err := d.ReadAt(t.Context(), b[:d.Size()], 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestViews: a view is itself a good disk.Reader, and read as an image gives
// the disk.
func TestViews(t *testing.T) {
	rnd := disktest.Rand(t)
	for i := range 9 {
		d := sparse(t, rnd, 1+rnd.Int64N(8<<20))
		if i == 0 {
			d = disk.NewMem(1)
		}
		want := bytesOf(t, d)
		o := ViewOptions{Kind: Kind(i % 3), ID: randomID(rnd), Time: time.Unix(1e9+int64(i), 0)}
		v, err := NewView(t.Context(), d, o)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, v.Size())
		if err := v.ReadAt(t.Context(), b, 0); err != nil {
			t.Fatal(err)
		}
		if o.Kind != Allocated || v.Size() < 3<<20 {
			disktest.Reader(t, v, b)
		}
		again := viewBytes(t, bytesOf(t, d)[:d.Size()], o)
		if o.Kind == Dynamic && len(again) < len(b) || o.Kind != Dynamic && !bytes.Equal(again, b) {
			t.Error("the same options give another view")
		}
		c, err := formats.Open(t.Context(), image.File{Name: "v.vhd", Disk: v}, Name, nil)
		if err != nil {
			t.Fatal(err)
		}
		disktest.Reader(t, c, want)
		info := c.Layers()[0].Info()
		if len(info.Warnings) != 0 || info.DataID != uuid(o.ID) || info.DiskID != uuid(o.ID) || info.Parent != nil {
			t.Errorf("info %+v", info)
		}
		if list := problems(t, c.Layers()[0]); len(list) != 0 {
			t.Errorf("problems %q", list)
		}
		c.Close()
	}
}

// TestViewIsSparse: blocks that are known to be zeros are not in the file, and
// the others begin at multiples of 4 KiB.
func TestViewIsSparse(t *testing.T) {
	d := disk.NewMem(100 << 20)
	if err := d.WriteAt(t.Context(), []byte{1}, 50<<20); err != nil {
		t.Fatal(err)
	}
	v, err := NewView(t.Context(), d, ViewOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if want := int64(4096 + 4096 + 2<<20 + 512); v.Size() != want {
		t.Errorf("the view has %d bytes, not %d", v.Size(), want)
	}
	p := make([]byte, 1)
	if err := v.ReadAt(t.Context(), p, 8192); err != nil || p[0] != 1 {
		t.Error("the block is not where it should be")
	}
}

func TestViewIDs(t *testing.T) {
	seen := map[string]bool{}
	for range 3 {
		im, err := openBytes(t, viewBytes(t, make([]byte, 512), ViewOptions{}))
		if err != nil {
			t.Fatal(err)
		}
		seen[im.Info().DataID] = true
		if time.Since(time.Date(2000, 1, 1, 0, 0, int(im.f.timestamp), 0, time.UTC)).Abs() > time.Hour {
			t.Error("the time is not now")
		}
	}
	if len(seen) != 3 || seen[""] || seen[uuid([16]byte{})] {
		t.Errorf("ids %v", seen)
	}
}

func TestViewSizes(t *testing.T) {
	for _, kind := range []Kind{Dynamic, Allocated, Fixed} {
		for _, size := range []int64{0, MaxSize + 1, 4 << 40, 1<<63 - 1} {
			if _, err := NewView(t.Context(), disk.NewMem(size), ViewOptions{Kind: kind}); err == nil || !strings.Contains(err.Error(), "2040 GiB") {
				t.Errorf("%d bytes: %v", size, err)
			}
		}
	}
}

// TestLargest: the largest disk, with each of its blocks in the file, so that
// sector numbers come close to 2³².
func TestLargest(t *testing.T) {
	rnd := disktest.Rand(t)
	for _, kind := range []Kind{Allocated, Dynamic, Fixed} {
		d := disk.NewMem(MaxSize)
		offs := []int64{0, 2<<20 - 100, 1<<40 - 100, 1<<40 + 5<<20, MaxSize - 300}
		want := map[int64][]byte{}
		for _, off := range offs {
			p := make([]byte, 200+rnd.IntN(100))
			disktest.Fill(rnd, p)
			want[off] = p
			if err := d.WriteAt(t.Context(), p, off); err != nil {
				t.Fatal(err)
			}
		}
		v, err := NewView(t.Context(), d, ViewOptions{Kind: kind})
		if err != nil {
			t.Fatal(err)
		}
		c, err := formats.Open(t.Context(), image.File{Name: "v.vhd", Disk: v}, Name, nil)
		if err != nil {
			t.Fatal(err)
		}
		for off, p := range want {
			got := make([]byte, len(p))
			if err := c.ReadAt(t.Context(), got, off); err != nil || !bytes.Equal(got, p) {
				t.Errorf("kind %d at %d: %v", kind, off, err)
			}
		}
		n, err := disk.DataBytes(c.Extents(t.Context(), 0, c.Size()))
		if err != nil || kind != Allocated && n > int64(len(offs)+1)*2<<20 {
			t.Errorf("%d bytes of data, %v", n, err)
		}
	}
}

func TestGeometry(t *testing.T) {
	for size, want := range map[uint64]geometry{
		4 << 20: {120, 4, 17}, 10 << 20: {301, 4, 17}, // as Windows has them
		512: {0, 4, 17}, 504 << 20: {1024, 16, 63}, 1 << 30: {2080, 16, 63}, 127 << 30: {65278, 16, 255}, MaxSize: {65535, 16, 255}, 1 << 60: {65535, 16, 255},
	} {
		if got := geometryOf(size); got != want {
			t.Errorf("%d: %v, want %v", size, got, want)
		}
	}
}
