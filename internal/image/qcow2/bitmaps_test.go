package qcow2

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

// openImage opens dir/name, without parents.
func openImage(t testing.TB, dir, name string) *Image {
	t.Helper()
	f, err := in(dir)(t.Context(), "x", name)
	if err != nil {
		t.Fatal(err)
	}
	im, err := OpenDamaged(t.Context(), f, in(dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := im.Close(); err != nil {
			t.Error(err)
		}
	})
	return im
}

// openDamaged opens an image in memory.
func openDamaged(t testing.TB, b []byte) (*Image, error) {
	t.Helper()
	return OpenDamaged(t.Context(), fileOf(memOf(t, b)), noData)
}

// nbdDirty is a bitmap as qemu-nbd tells it.
func nbdDirty(t *testing.T, path, name string) []disk.Extent {
	t.Helper()
	out := run(t, "nbdinfo", "--json", "--map=qemu:dirty-bitmap:"+name, "--", "[", "qemu-nbd", "-r", "-f", "qcow2", "-B", name, path, "]")
	var list []struct {
		Offset, Length int64
		Type           int
	}
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var dirty []disk.Extent
	for _, e := range list {
		if e.Type == 1 {
			dirty = append(dirty, disk.Extent{Off: e.Offset, Len: e.Length})
		}
	}
	dirty, err := disk.Collect(disk.Merge(disk.List(dirty...)))
	if err != nil {
		t.Fatal(err)
	}
	return dirty
}

func dirtyOf(t *testing.T, im *Image, name string) []disk.Extent {
	t.Helper()
	ex, err := im.Dirty(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	list, err := disk.Collect(ex)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func TestReadsBitmaps(t *testing.T) {
	need(t, "qemu-img", "qemu-io", "qemu-nbd", "nbdinfo")
	for _, c := range []struct {
		o    string
		size int64
	}{
		{"cluster_size=65536", 64<<20 + 5*512},
		{"cluster_size=512", 6<<20 + 512}, // its bitmaps take many clusters
		{"extended_l2=on", 300 << 20},
		{"cluster_size=2097152", 32 << 20},
	} {
		t.Run(c.o, func(t *testing.T) {
			rnd, dir := disktest.Rand(t), t.TempDir()
			path := filepath.Join(dir, "a.qcow2")
			run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", c.o, path, fmt.Sprint(c.size))
			scribble(t, path, c.size, 5, rnd)
			run(t, "qemu-img", "bitmap", "--add", "-g", "512", path, "fine one")
			run(t, "qemu-img", "bitmap", "--add", path, "usual")
			run(t, "qemu-img", "bitmap", "--add", "-g", "2M", path, "coarse")
			scribble(t, path, c.size, 10, rnd)
			run(t, "qemu-img", "bitmap", "--add", "--disable", "-g", "4k", path, "still")
			run(t, "qemu-img", "bitmap", "--add", "--disable", "-g", "4k", "--merge", "fine one", path, "merged")
			// All of a cluster of the finest bitmap becomes ones.
			run(t, "qemu-io", "-f", "qcow2", "-t", "unsafe", "-c", fmt.Sprintf("write -z 1M %d", min(c.size-1<<20, 290<<20)), path)
			im := openImage(t, dir, "a.qcow2")
			list, err := im.Bitmaps(t.Context())
			if err != nil || len(list) != 5 {
				t.Fatalf("%+v %v", list, err)
			}
			for _, b := range list {
				want := nbdDirty(t, path, b.Name)
				got := dirtyOf(t, im, b.Name)
				// qemu-nbd rounds the last one up to a whole granule, or not.
				if !slices.Equal(got, want) {
					t.Errorf("%s: %d extents, want %d\n%v\n%v", b.Name, len(got), len(want), got, want)
				}
				if (len(got) == 0) != (b.Name == "still") || b.InUse || b.Auto != (b.Name != "still" && b.Name != "merged") {
					t.Errorf("%+v has %d extents", b, len(got))
				}
			}
			if _, err := im.Dirty(t.Context(), "none"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("no such bitmap: %v", err)
			}
		})
	}
}

// TestBitmapsThatAreNotTrusted: a backup of what changed must not be made with
// them.
func TestBitmapsThatAreNotTrusted(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	dir := t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
	run(t, "qemu-img", "bitmap", "--add", path, "b")
	cmd := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 300k", "-c", "flush", "-c", "sigraise 9", path)
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Fatalf("qemu-io was to be killed: %s", out)
	}
	im := openImage(t, dir, "a.qcow2")
	list, err := im.Bitmaps(t.Context())
	if err != nil || len(list) != 1 || !list[0].InUse {
		t.Fatalf("%+v %v", list, err)
	}
	if _, err := im.Dirty(t.Context(), "b"); !errors.Is(err, ErrBitmap) {
		t.Errorf("in use: %v", err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[95] &^= bitBitmaps
	im, err = openDamaged(t, b)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := im.Dirty(t.Context(), "b"); !errors.Is(err, ErrBitmap) {
		t.Errorf("autoclear bit cleared: %v", err)
	}
	if _, err := im.Bitmaps(t.Context()); !errors.Is(err, ErrBitmap) {
		t.Errorf("autoclear bit cleared: %v", err)
	}
}

// withBitmap gives an image, whose clusters are 64 KiB, a bitmap of granules of
// 64 KiB, with its directory, table and bits behind everything else.
func (s *small) withBitmap(bits ...byte) (dir, table, data int64) {
	dir = int64(len(s.b)+65535) &^ 65535
	table, data = dir+64<<10, dir+128<<10
	s.b = append(s.b, make([]byte, data+64<<10-int64(len(s.b)))...)
	s.b[95] |= bitBitmaps
	s.put32(104, extBitmaps)
	s.put32(108, 24)
	s.put32(112, 1)
	s.put32(116, 0)
	s.put64(120, 32)
	s.put64(128, uint64(dir))
	s.put64(dir, uint64(table))
	s.put32(dir+8, 1)
	s.put32(dir+12, bitmapAuto)
	copy(s.b[dir+16:], []byte{bitmapTypeDirty, 16, 0, 3, 0, 0, 0, 0, 'b', 'i', 't'})
	s.put64(table, uint64(data))
	copy(s.b[data:], bits)
	return dir, table, data
}

func TestHostileBitmaps(t *testing.T) {
	var dir, table int64
	for name, c := range map[string]struct {
		do   func(s *small)
		want string // part of the error
		is   error
	}{
		"good":                     {func(s *small) {}, "", nil},
		"extension too short":      {func(s *small) { s.put32(108, 16) }, "16 bytes", image.ErrFormat},
		"no bitmaps":               {func(s *small) { s.put32(112, 0) }, "0 bitmaps", image.ErrFormat},
		"many bitmaps":             {func(s *small) { s.put32(112, 1<<31) }, "bitmaps", image.ErrFormat},
		"reserved":                 {func(s *small) { s.b[119] = 1 }, "reserved", image.ErrFormat},
		"directory too small":      {func(s *small) { s.put64(120, 23) }, "directory of 23", image.ErrFormat},
		"directory of 2^63":        {func(s *small) { s.put64(120, 1<<63) }, "directory of", image.ErrFormat},
		"directory too long":       {func(s *small) { s.put64(120, 40) }, "32 bytes, not 40", image.ErrFormat},
		"directory beyond end":     {func(s *small) { s.put64(120, 1<<20) }, "beyond the file's end", image.ErrFormat},
		"directory unaligned":      {func(s *small) { s.put64(128, uint64(dir+8)) }, "directory is at", image.ErrFormat},
		"directory at 2^63":        {func(s *small) { s.put64(128, 1<<63) }, "directory is at", image.ErrFormat},
		"directory is the L1":      {func(s *small) { s.put64(128, uint64(s.l1)) }, "overlaps the L1", image.ErrFormat},
		"directory is the header":  {func(s *small) { s.put64(128, 0) }, "overlaps the header", image.ErrFormat},
		"more entries than fit":    {func(s *small) { s.put32(112, 2); s.put64(120, 48) }, "the directory ends", image.ErrFormat},
		"table unaligned":          {func(s *small) { s.put64(dir, uint64(table+8)) }, "its table is at", image.ErrFormat},
		"table at 2^63":            {func(s *small) { s.put64(dir, 1<<63) }, "its table is at", image.ErrFormat},
		"table beyond the end":     {func(s *small) { s.put64(dir, 1<<40) }, "beyond the file's end", image.ErrFormat},
		"table of 2^32":            {func(s *small) { s.put32(dir+8, 1<<32-1) }, "beyond the file's end", image.ErrFormat},
		"table too short":          {func(s *small) { s.put32(dir+8, 0) }, "too few", image.ErrFormat},
		"unknown flags":            {func(s *small) { s.put32(dir+12, 8) }, "flags", image.ErrFormat},
		"in use":                   {func(s *small) { s.put32(dir+12, bitmapInUse) }, "in use", ErrBitmap},
		"another type":             {func(s *small) { s.b[dir+16] = 2 }, "type 2", ErrBitmap},
		"granularity 8":            {func(s *small) { s.b[dir+17] = 8 }, "granularity", image.ErrFormat},
		"granularity 63":           {func(s *small) { s.b[dir+17] = 63 }, "granularity", image.ErrFormat},
		"no name":                  {func(s *small) { s.b[dir+19] = 0 }, "name of 0", image.ErrFormat},
		"name too long":            {func(s *small) { s.b[dir+19] = 30 }, "do not fit", image.ErrFormat},
		"extra data too long":      {func(s *small) { s.put32(dir+20, 1<<31) }, "do not fit", image.ErrFormat},
		"extra data":               {func(s *small) { s.extra(dir, 0) }, "extra data", ErrBitmap},
		"extra data, compatible":   {func(s *small) { s.extra(dir, bitmapExtraOK) }, "", nil},
		"entry unaligned":          {func(s *small) { s.put64(table, uint64(dir+512)) }, "entry 0", image.ErrFormat},
		"entry with reserved bits": {func(s *small) { s.put64(table, 1<<60) }, "entry 0", image.ErrFormat},
		"entry with bit and place": {func(s *small) { s.put64(table, uint64(dir+64<<10)|1) }, "entry 0", image.ErrFormat},
		"bits beyond the end":      {func(s *small) { s.put64(table, 1<<40) }, "beyond the file's end", image.ErrFormat},
		"bits are the header":      {func(s *small) { s.put64(table, uint64(s.l1)) }, "overlaps", image.ErrFormat},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSmall(t)
			dir, table, _ = s.withBitmap(5)
			c.do(s)
			im, err := openDamaged(t, s.b)
			if err != nil {
				t.Fatal(err) // the disk is readable, whatever its bitmaps are
			}
			list, err := collectDirty(t, im)
			if c.is == nil {
				want := []disk.Extent{{Off: 0, Len: 64 << 10}, {Off: 128 << 10, Len: 64 << 10}}
				if err != nil || !slices.Equal(list, want) {
					t.Fatalf("%v %v", list, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.want) || !errors.Is(err, c.is) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// extra gives the bitmap eight bytes of extra data.
func (s *small) extra(dir int64, flag uint32) {
	s.put64(120, 40)
	s.put32(dir+12, flag)
	s.put32(dir+20, 8)
	copy(s.b[dir+32:], "bit")
}

func collectDirty(t testing.TB, im *Image) ([]disk.Extent, error) {
	ex, err := im.Dirty(t.Context(), "bit")
	if err != nil {
		return nil, err
	}
	return disk.Collect(ex)
}

// TestBitScan compares with the plainest way to read bits.
func TestBitScan(t *testing.T) {
	rnd := disktest.Rand(t)
	for range 200 {
		p := make([]byte, 1+rnd.IntN(40))
		for i := range p {
			switch rnd.IntN(3) {
			case 0:
				p[i] = 0xff
			case 1:
				p[i] = byte(rnd.Uint32())
			}
		}
		n := int64(len(p)*8) - rnd.Int64N(8)
		var want, got []disk.Extent
		for i := range n {
			if p[i/8]>>(i%8)&1 != 0 {
				want = append(want, disk.Extent{Off: (7 + i) * 512, Len: 512})
			}
		}
		s := bitScan{size: (7+n)*512 - 100, granularity: 512, yield: func(e disk.Extent, _ error) bool { got = append(got, e); return true }}
		s.scan(p, 7, n)
		want, _ = disk.Collect(disk.Clip(disk.Merge(disk.List(want...)), 0, s.size))
		if got, err := disk.Collect(disk.Merge(disk.List(got...))); err != nil || !slices.Equal(got, want) {
			t.Fatalf("%x: %v, want %v (%v)", p, got, want, err)
		}
	}
}

func FuzzBitmaps(f *testing.F) {
	s := newImage(f, 1<<20, 100, 512)
	at := func(off int64) []byte { // 4 clusters: directory, table, bits
		b := make([]byte, 2048)
		binary.BigEndian.PutUint64(b, uint64(off+512))
		binary.BigEndian.PutUint32(b[8:], 3)
		copy(b[16:], []byte{bitmapTypeDirty, 9, 0, 3, 0, 0, 0, 0, 'b', 'i', 't'})
		binary.BigEndian.PutUint64(b[512:], uint64(off+1024))
		b[1024], b[1030] = 5, 0xff
		b[519+8] = 1
		return b
	}
	base := int64(len(s.b))
	f.Add(uint32(1), uint64(32), at(base))
	f.Add(uint32(2), uint64(64), at(base))
	f.Fuzz(func(t *testing.T, n uint32, size uint64, tail []byte) {
		if len(tail) > 64<<10 {
			return
		}
		s := small{b: append(bytes.Clone(s.b), tail...)}
		s.b[95] |= bitBitmaps
		s.put32(104, extBitmaps)
		s.put32(108, 24)
		s.put32(112, n)
		s.put64(120, size)
		s.put64(128, uint64(base))
		im, err := openDamaged(t, s.b)
		if err != nil {
			t.Fatal(err) // bitmaps never keep an image from being read
		}
		list, _ := im.Bitmaps(t.Context())
		for _, b := range list {
			end := int64(0)
			ex, err := im.Dirty(t.Context(), b.Name)
			if err != nil {
				continue
			}
			for e, err := range ex {
				if err != nil {
					break
				}
				if e.Off < end || e.Len <= 0 || e.End() > im.Info().Size {
					t.Fatalf("%+v after %d", e, end)
				}
				end = e.End()
			}
		}
	})
}
