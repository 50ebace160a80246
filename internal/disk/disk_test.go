package disk_test

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

func TestMem(t *testing.T) {
	disktest.Device(t, func(*testing.T) disk.Device { return disk.NewMem(1<<20 + 777) })
}

func TestFile(t *testing.T) {
	disktest.Device(t, func(t *testing.T) disk.Device {
		f, err := disk.CreateFile(filepath.Join(t.TempDir(), "disk.raw"), 1<<20+777)
		if err != nil {
			t.Fatal(err)
		}
		return f
	})
}

func TestReadOnly(t *testing.T) {
	m := disk.NewMem(300 << 10)
	want := disktest.History(t, m, disktest.Rand(t), 50)
	d := disk.ReadOnly(m)
	disktest.Reader(t, d, want)
	ctx := t.Context()
	if err := d.WriteAt(ctx, []byte{1}, 0); !errors.Is(err, disk.ErrReadOnly) {
		t.Error(err)
	}
	if err := d.ZeroAt(ctx, 0, 1); !errors.Is(err, disk.ErrReadOnly) {
		t.Error(err)
	}
	disktest.Reader(t, d, want)
}

func TestMemIsSparse(t *testing.T) {
	ctx := t.Context()
	m := disk.NewMem(64 << 40)
	for _, off := range []int64{0, 1 << 40, 64<<40 - 5} {
		if err := m.WriteAt(ctx, []byte("hello"), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.ZeroAt(ctx, 1, 63<<40); err != nil {
		t.Fatal(err)
	}
	got, err := disk.Collect(m.Extents(ctx, 0, m.Size()))
	want := []disk.Extent{
		{Off: 0, Len: 64 << 10},
		{Off: 64 << 10, Len: 64<<40 - 128<<10, Zero: true},
		{Off: 64<<40 - 64<<10, Len: 64 << 10},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}

func TestMemClone(t *testing.T) {
	ctx := t.Context()
	m := disk.NewMem(300 << 10)
	want := disktest.History(t, m, disktest.Rand(t), 50)
	c := m.Clone()
	if err := m.ZeroAt(ctx, 0, m.Size()); err != nil {
		t.Fatal(err)
	}
	disktest.Reader(t, c, want)
}

func TestFileReopened(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.raw")
	f, err := disk.CreateFile(path, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	want := disktest.History(t, f, disktest.Rand(t), 100)
	if err := errors.Join(f.Flush(t.Context()), f.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := disk.CreateFile(path, 5); !errors.Is(err, fs.ErrExist) {
		t.Errorf("created over an existing file: %v", err)
	}
	r, err := disk.OpenFile(path, disk.FileOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	disktest.Reader(t, r, want)
	if err := r.WriteAt(t.Context(), []byte{1}, 0); !errors.Is(err, disk.ErrReadOnly) {
		t.Error(err)
	}
	if err := r.ZeroAt(t.Context(), 0, 1); !errors.Is(err, disk.ErrReadOnly) {
		t.Error(err)
	}
	// Somebody shortens it meanwhile: an error, not zeros.
	if err := os.Truncate(path, 1000); err != nil {
		t.Fatal(err)
	}
	if err := r.ReadAt(t.Context(), make([]byte, 4096), 0); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

func TestFileRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := disk.OpenFile(dir, disk.FileOptions{ReadOnly: true}); err == nil {
		t.Error("opened a directory")
	}
	if _, err := disk.OpenFile(filepath.Join(dir, "none"), disk.FileOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if _, err := disk.CreateFile(filepath.Join(dir, "negative"), -1); err == nil {
		t.Error("made a file of negative size")
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestFileHoles(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("holes are told on Linux only")
	}
	ctx := t.Context()
	f, err := disk.CreateFile(filepath.Join(t.TempDir(), "disk.raw"), 1<<40)
	if err != nil {
		t.Skipf("filesystem takes no sparse file of 1 TiB: %v", err)
	}
	defer f.Close()
	p := make([]byte, 1<<20)
	disktest.Fill(rand.New(rand.NewPCG(1, 1)), p)
	if err := f.WriteAt(ctx, p, 1<<39); err != nil {
		t.Fatal(err)
	}
	if err := f.ZeroAt(ctx, 1<<39+256<<10, 512<<10); err != nil {
		t.Fatal(err)
	}
	got, err := disk.Collect(f.Extents(ctx, 1000, 1<<40-1000))
	want := []disk.Extent{
		{Off: 1000, Len: 1<<39 - 1000, Zero: true},
		{Off: 1 << 39, Len: 256 << 10},
		{Off: 1<<39 + 256<<10, Len: 512 << 10, Zero: true},
		{Off: 1<<39 + 768<<10, Len: 256 << 10},
		{Off: 1<<39 + 1<<20, Len: 1<<39 - 1<<20, Zero: true},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}

func TestFaulty(t *testing.T) {
	ctx := context.Background()
	f := disktest.NewFaulty(disk.NewMem(4096), 2)
	err1, err2, err3 := f.Flush(ctx), f.WriteAt(ctx, []byte{1}, 0), f.WriteAt(ctx, []byte{1}, 0)
	if err1 != nil || !errors.Is(err2, disktest.ErrInjected) || err3 != nil || f.Calls() != 3 {
		t.Error(err1, err2, err3, f.Calls())
	}
}

func TestIsZero(t *testing.T) {
	p := make([]byte, 4097)
	if !disk.IsZero(nil) || !disk.IsZero(p) || !disk.IsZero(p[:1]) {
		t.Error("zeros not seen as zeros")
	}
	for i := range p {
		p[i] = 1
		if disk.IsZero(p) {
			t.Fatalf("missed the byte at %d", i)
		}
		p[i] = 0
	}
}
