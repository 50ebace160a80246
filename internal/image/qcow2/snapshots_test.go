package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

// layerDisk is a single layer as a disk, for tests that read one.
type layerDisk struct{ image.Layer }

func (d layerDisk) Size() int64 { return d.Info().Size }

func (d layerDisk) Extents(ctx context.Context, off, n int64) disk.Extents {
	return func(yield func(disk.Extent, error) bool) {
		for r, err := range d.Runs(ctx, off, n) {
			if !yield(disk.Extent{Off: r.Off, Len: r.Len, Zero: r.State != image.Data}, err) {
				return
			}
		}
	}
}

func openSnapshot(t testing.TB, im *Image, which string) *Image {
	t.Helper()
	s, err := im.OpenSnapshot(t.Context(), which)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestReadsSnapshots(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	const size = 4<<20 + 512
	for i, o := range []string{"compat=1.1", "compat=0.10", "extended_l2=on", "compression_type=zstd", "cluster_size=512", "cluster_size=2097152"} {
		if testing.Short() && i > 2 {
			continue
		}
		t.Run(o, func(t *testing.T) {
			rnd, dir := disktest.Rand(t), t.TempDir()
			path := filepath.Join(dir, "a.qcow2")
			if strings.HasPrefix(o, "compression") {
				noise(t, filepath.Join(dir, "raw"), size, rnd)
				run(t, "qemu-img", "convert", "-c", "-t", "unsafe", "-f", "raw", "-O", "qcow2", "-o", o, filepath.Join(dir, "raw"), path)
			} else {
				run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", o, path, fmt.Sprint(size))
			}
			names := []string{"first", "second one", "ünï/\"code\""}
			for _, name := range names {
				scribble(t, path, size, 10, rnd)
				run(t, "qemu-img", "snapshot", "-c", name, path)
			}
			scribble(t, path, size, 10, rnd)
			im := openImage(t, dir, "a.qcow2")
			if w := strings.Join(im.Info().Warnings, "\n"); !strings.Contains(w, "second one") || strings.Contains(w, "corrupt") {
				t.Errorf("warnings: %s", w)
			}
			for i, name := range names {
				out := filepath.Join(dir, "model")
				run(t, "qemu-img", "convert", "-t", "unsafe", "-l", "snapshot.id="+fmt.Sprint(i+1), "-f", "qcow2", "-O", "raw", path, out)
				model, err := os.ReadFile(out)
				if err != nil {
					t.Fatal(err)
				}
				which := name
				if i == 0 {
					which = "1"
				}
				compare(t, layerDisk{openSnapshot(t, im, which)}, model, rnd)
			}
			compare(t, layerDisk{im}, rawOf(t, path, "qcow2"), rnd)
			if _, err := im.OpenSnapshot(t.Context(), "third"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("no such snapshot: %v", err)
			}
		})
	}
}

// TestSnapshotOfAnotherSize: the disk grew since.
func TestSnapshotOfAnotherSize(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rnd, dir := disktest.Rand(t), t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "4M")
	scribble(t, path, 4<<20, 20, rnd)
	model := rawOf(t, path, "qcow2")
	run(t, "qemu-img", "snapshot", "-c", "small", path)
	run(t, "qemu-img", "resize", "-q", "-f", "qcow2", path, "16M")
	scribble(t, path, 16<<20, 20, rnd)
	compare(t, layerDisk{openSnapshot(t, openImage(t, dir, "a.qcow2"), "small")}, model, rnd)
}

// TestSnapshotWithMemory: what QEMU saves of the guest's memory lies behind the
// disk's end, and is none of the disk.
func TestSnapshotWithMemory(t *testing.T) {
	need(t, "qemu-img", "qemu-io", "qemu-system-x86_64")
	rnd, dir := disktest.Rand(t), t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	const size = 4 << 20
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, fmt.Sprint(size))
	scribble(t, path, size, 20, rnd)
	model := rawOf(t, path, "qcow2")
	cmd := exec.Command("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio",
		"-drive", "if=none,format=qcow2,file="+path)
	cmd.Stdin = strings.NewReader("savevm mem\nquit\n")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	scribble(t, path, size, 20, rnd)
	im := openImage(t, dir, "a.qcow2")
	list, err := im.Snapshots(t.Context())
	if err != nil || len(list) != 1 || list[0].VMState == 0 {
		t.Fatalf("%+v %v", list, err)
	}
	compare(t, layerDisk{openSnapshot(t, im, "mem")}, model, rnd)
}

// TestSnapshotSharesTheFile: whoever closes last closes the file.
func TestSnapshotSharesTheFile(t *testing.T) {
	s := newSmall(t)
	s.withSnapshot()
	m := disk.NewMem(int64(len(s.b)))
	if err := m.WriteAt(t.Context(), s.b, 0); err != nil {
		t.Fatal(err)
	}
	closed := 0
	im, err := Open(t.Context(), fileOf(counted{m, &closed}), nil)
	if err != nil {
		t.Fatal(err)
	}
	sn, err := im.OpenSnapshot(t.Context(), "snap")
	if err != nil {
		t.Fatal(err)
	}
	if err := im.Close(); err != nil || closed != 0 {
		t.Fatalf("closed %d times: %v", closed, err)
	}
	p := make([]byte, 100)
	if err := sn.ReadAt(t.Context(), p, 64<<10); err != nil || p[0] != 7 {
		t.Fatalf("%v %v", p, err)
	}
	if err := sn.Close(); err != nil || closed != 1 {
		t.Fatalf("closed %d times: %v", closed, err)
	}
}

type counted struct {
	*disk.Mem
	closed *int
}

func (c counted) Close() error { *c.closed++; return c.Mem.Close() }

// withSnapshot gives an image a snapshot of its state (of which the refcounts
// know nothing), and returns where its entry is. The L1 table is in the next
// cluster.
func (s *small) withSnapshot() (entry int64) {
	cluster := int64(1) << binary.BigEndian.Uint32(s.b[20:])
	at := up(int64(len(s.b)), cluster) * cluster
	s.b = append(s.b, make([]byte, at+2*cluster-int64(len(s.b)))...)
	l1 := at + cluster
	copy(s.b[l1:], s.b[s.l1:s.l1+8])
	s.put32(60, 1)
	s.put64(64, uint64(at))
	s.put64(at, uint64(l1))
	s.put32(at+8, 1)
	binary.BigEndian.PutUint16(s.b[at+12:], 1)
	binary.BigEndian.PutUint16(s.b[at+14:], 4)
	s.put32(at+36, 16)
	copy(s.b[at+48:], s.b[24:32]) // the size
	copy(s.b[at+56:], "1snap")
	return at
}

func TestHostileSnapshots(t *testing.T) {
	var at int64
	for name, c := range map[string]struct {
		do   func(s *small)
		want string // part of the error
	}{
		"good":                    {func(s *small) {}, ""},
		"L1 table beyond the end": {func(s *small) { s.put64(at, 1<<40) }, "beyond the file's end"},
		"L1 table at 2^63":        {func(s *small) { s.put64(at, 1<<63) }, "L1 table"},
		"L1 table unaligned":      {func(s *small) { s.put64(at, uint64(s.l1+8)) }, "not that of a cluster"},
		"L1 table is the header":  {func(s *small) { s.put64(at, 0) }, "overlaps the header"},
		"L1 table is the disk's":  {func(s *small) { s.put64(at, uint64(s.l1)) }, "overlaps the L1 table"},
		"L1 table of 2^32":        {func(s *small) { s.put32(at+8, 1<<32-1) }, "entries"},
		"L1 table too short":      {func(s *small) { s.put32(at+8, 0) }, "the disk needs"},
		"disk of 2^63":            {func(s *small) { s.put64(at+48, 1<<63) }, "a disk of"},
		"disk larger than L1":     {func(s *small) { s.put64(at+48, 1<<40) }, "the disk needs"},
		"extra data too long":     {func(s *small) { s.put32(at+36, 1<<31) }, "extra data"},
		"name beyond the end":     {func(s *small) { s.b = s.b[:at+58] }, "beyond the file's end"},
		"L2 is the snapshot's L1": {func(s *small) { s.put64(at+64<<10, uint64(at+64<<10)) }, "overlaps the snapshot's L1 table"},
		"L2 beyond the end":       {func(s *small) { s.put64(at+64<<10, 1<<40) }, "beyond the file's end"},
		"data is the disk's L1":   {func(s *small) { s.put64(s.l2, uint64(s.l1)) }, "overlaps the L1 table"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSmall(t)
			at = s.withSnapshot()
			c.do(s)
			im, err := openDamaged(t, s.b)
			if err != nil {
				t.Fatal(err)
			}
			sn, err := im.OpenSnapshot(t.Context(), "snap")
			p := make([]byte, 1<<20)
			if err == nil {
				err = sn.ReadAt(t.Context(), p, 0)
			}
			if c.want == "" {
				if err != nil || p[64<<10] != 7 {
					t.Fatal(err)
				}
			} else if err == nil || !strings.Contains(err.Error(), c.want) || !errors.Is(err, image.ErrFormat) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// TestSnapshotsOfOneName: which of them is meant is not guessed.
func TestSnapshotsOfOneName(t *testing.T) {
	list := []Snapshot{{ID: "1", Name: "a"}, {ID: "2", Name: "a"}, {ID: "3", Name: "1"}}
	for which, want := range map[string]string{"1": "1", "2": "2", "3": "3", "a": "", "4": ""} {
		s, err := pick(list, which)
		if s.ID != want || (err == nil) != (want != "") {
			t.Errorf("%s: %+v %v", which, s, err)
		}
	}
}

func FuzzSnapshots(f *testing.F) {
	s := newImage(f, 32<<10, 2048, 512) // small, for speed
	at := s.withSnapshot()
	entry, l1 := bytes.Clone(s.b[at:at+64]), bytes.Clone(s.b[at+512:at+512+8])
	f.Add(uint32(1), entry, l1)
	f.Add(uint32(2), append(bytes.Clone(entry), entry...), append(bytes.Clone(l1), l1...))
	f.Add(uint32(1<<31), entry, []byte{})
	f.Fuzz(func(t *testing.T, n uint32, entry, l1 []byte) {
		if len(entry) > 512 || len(l1) > 512 {
			return
		}
		c := small{b: bytes.Clone(s.b)}
		c.put32(60, n)
		copy(c.b[at:], entry)
		copy(c.b[at+512:], l1)
		im, err := openDamaged(t, c.b)
		if err != nil {
			return
		}
		list, _ := im.Snapshots(t.Context())
		for _, x := range list {
			sn, err := im.OpenSnapshot(t.Context(), x.ID)
			if err != nil {
				continue
			}
			p := make([]byte, min(sn.Info().Size, 64<<10))
			_ = sn.ReadAt(t.Context(), p, 0)
			_ = sn.ReadAt(t.Context(), p, sn.Info().Size-int64(len(p)))
		}
	})
}
