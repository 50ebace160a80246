package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// check lets qemu-img judge an image, if it is installed.
func check(t testing.TB, path string) {
	t.Helper()
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Log("NOT CHECKED by qemu-img, which is not installed")
		return
	}
	run(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
}

func TestWriterAgainstModel(t *testing.T) {
	rounds := 8
	if testing.Short() {
		rounds = 4
	}
	for i := range rounds {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			rnd, dir := disktest.Rand(t), t.TempDir()
			path := filepath.Join(dir, "a.qcow2")
			size := 1 + rnd.Int64N(3<<20)
			w, err := Create(path, size, Options{ClusterSize: 512 << rnd.IntN(13)})
			if err != nil {
				t.Fatal(err)
			}
			model := make([]byte, size)
			for range 60 {
				off := rnd.Int64N(size)
				p := model[off:min(size, off+1+rnd.Int64N(300<<10))]
				switch rnd.IntN(16) {
				case 0:
					clear(p)
					err = w.ZeroAt(t.Context(), off, int64(len(p)))
				case 1:
					err = w.Flush(t.Context())
				default:
					for i := range p {
						p[i] = byte(rnd.Uint32())
					}
					err = w.WriteAt(t.Context(), p, off)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			check(t, path)
			whole := append(model, make([]byte, -len(model)&511)...) // QEMU's disks are whole sectors
			compare(t, openChain(t, dir, "a.qcow2"), whole, rnd)
			if _, err := exec.LookPath("qemu-img"); err == nil && !bytes.Equal(rawOf(t, path, "qcow2"), whole) {
				t.Error("qemu-img reads something else")
			}
		})
	}
}

// TestWriterInParallel also covers two writers of one cluster, and a Flush
// beside them.
func TestWriterInParallel(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	const size, piece = 16 << 20, 40 << 10 // not whole clusters
	w, err := Create(path, size, Options{})
	if err != nil {
		t.Fatal(err)
	}
	model := make([]byte, size)
	rnd := disktest.Rand(t)
	for i := range model {
		model[i] = byte(rnd.Uint32())
	}
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := worker; i*piece < size; i += 4 {
				if err := w.WriteAt(t.Context(), model[i*piece:min(size, (i+1)*piece)], int64(i*piece)); err != nil {
					t.Error(err)
				}
				if i%50 == 0 {
					if err := w.Flush(t.Context()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	check(t, path)
	compare(t, openChain(t, dir, "a.qcow2"), model, rnd)
}

// TestWriterGrowsRefcounts writes far enough for many refcount blocks, at the
// cluster size where they are smallest.
func TestWriterGrowsRefcounts(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	const size = 3 << 20
	w, err := Create(path, size, Options{ClusterSize: 512})
	if err != nil {
		t.Fatal(err)
	}
	model := bytes.Repeat([]byte("holdfast"), size/8)
	for off := 0; off < size; off += 64 << 10 {
		if err := w.WriteAt(t.Context(), model[off:off+64<<10], int64(off)); err != nil {
			t.Fatal(err)
		}
		if off%(512<<10) == 0 {
			if err := w.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	check(t, path)
	compare(t, openChain(t, dir, "a.qcow2"), model, disktest.Rand(t))
}

func TestCreateNeverOverwrites(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.qcow2")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Create(path, 1<<20, Options{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("Create: %v", err)
	}
	if err := CreateOverlay(path, 1<<20, "b", "raw", Options{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("CreateOverlay: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Errorf("the file holds %q", b)
	}
}

func TestCreateRefusesAndLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	for name, err := range map[string]error{
		"cluster of 3 KiB":   second(Create(path, 1<<20, Options{ClusterSize: 3 << 10})),
		"cluster of 4 MiB":   second(Create(path, 1<<20, Options{ClusterSize: 4 << 20})),
		"negative size":      second(Create(path, -1, Options{})),
		"too large":          second(Create(path, 1<<50, Options{ClusterSize: 512})),
		"no backing format":  CreateOverlay(path, 1<<20, "b", "", Options{}),
		"no backing name":    CreateOverlay(path, 1<<20, "", "raw", Options{}),
		"long backing name":  CreateOverlay(path, 1<<20, string(make([]byte, 1024)), "raw", Options{}),
		"backing in 512":     CreateOverlay(path, 1<<20, string(bytes.Repeat([]byte("x"), 400)), "raw", Options{ClusterSize: 512}),
		"no such directory":  second(Create(filepath.Join(dir, "no", "a"), 1<<20, Options{})),
		"no such directory2": CreateOverlay(filepath.Join(dir, "no", "a"), 1<<20, "b", "raw", Options{}),
	} {
		if err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) > 0 {
		t.Errorf("left behind: %v %v", list, err)
	}
}

func second(_ *Writer, err error) error { return err }

func TestOverlayOf64TiB(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	start := time.Now()
	const uri = "nbd+unix:///vda?socket=/run/holdfast/s.sock"
	if err := CreateOverlay(path, 64<<40, uri, "raw", Options{}); err != nil {
		t.Fatal(err)
	}
	t.Logf("made in %v", time.Since(start))
	start = time.Now()
	f, err := in(dir)(t.Context(), "x", "a.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	im, err := Open(t.Context(), f, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if i := im.Info(); i.Size != 64<<40 || i.Parent.Names[0] != uri || i.Parent.Format != "raw" {
		t.Errorf("size %d, parent %+v", im.Info().Size, im.Info().Parent)
	}
	t.Logf("opened in %v", time.Since(start))
	if _, err := exec.LookPath("qemu-img"); err == nil {
		start = time.Now()
		run(t, "qemu-img", "check", fmt.Sprintf(`json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":%q}}`, path))
		t.Logf("checked by qemu-img in %v", time.Since(start))
	}
}

// TestQEMUWritesToOurOverlay: the overlay is QEMU's from its first open on.
func TestQEMUWritesToOurOverlay(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rnd, dir := disktest.Rand(t), t.TempDir()
	const size = 8 << 20
	for _, cluster := range []int64{0, 4096, 2 << 20} {
		noise(t, filepath.Join(dir, "base.raw"), size, rnd)
		path := filepath.Join(dir, fmt.Sprintf("o%d.qcow2", cluster))
		if err := CreateOverlay(path, size, "base.raw", "raw", Options{ClusterSize: cluster}); err != nil {
			t.Fatal(err)
		}
		scribble(t, path, size, 40, rnd)
		run(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
		compare(t, openChain(t, dir, filepath.Base(path)), rawOf(t, path, "qcow2"), rnd)
	}
}

// TestQEMUGoesOnWithOurImage: an exported image is a production disk next.
func TestQEMUGoesOnWithOurImage(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rnd, dir := disktest.Rand(t), t.TempDir()
	const size = 8 << 20
	for _, cluster := range []int64{512, 64 << 10} {
		path := filepath.Join(dir, fmt.Sprintf("a%d.qcow2", cluster))
		w, err := Create(path, size, Options{ClusterSize: cluster})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.WriteAt(t.Context(), noise(t, filepath.Join(dir, "n"), 3<<20, rnd), 1<<20+100); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		scribble(t, path, size, 40, rnd)
		run(t, "qemu-img", "check", "-q", "-f", "qcow2", path)
		compare(t, openChain(t, dir, filepath.Base(path)), rawOf(t, path, "qcow2"), rnd)
	}
}

// power is a file whose writes since the last Sync may each be lost or not
// when the power goes.
type power struct {
	log []op
}

type op struct {
	off  int64
	data []byte
	size int64 // of a Truncate
	sync bool
}

func (p *power) WriteAt(b []byte, off int64) (int, error) {
	p.log = append(p.log, op{off: off, data: bytes.Clone(b)})
	return len(b), nil
}
func (p *power) Name() string              { return "power" }
func (p *power) Sync() error               { p.log = append(p.log, op{sync: true}); return nil }
func (p *power) Truncate(size int64) error { p.log = append(p.log, op{size: size}); return nil }
func (p *power) Close() error              { return nil }

// after gives the file's bytes when the power goes after n operations.
func (p *power) after(n int, rnd *rand.Rand) []byte {
	synced := 0
	for i, o := range p.log[:n] {
		if o.sync {
			synced = i
		}
	}
	var b []byte
	grow := func(size int64) { b = append(b, make([]byte, max(0, size-int64(len(b))))...) }
	for i, o := range p.log[:n] {
		if i > synced && rnd.IntN(2) == 0 {
			continue
		}
		grow(max(o.size, o.off+int64(len(o.data))))
		copy(b[o.off:], o.data)
	}
	return b
}

// TestWriterLosesPower cuts the power at every step, with any of the writes
// that were not synced lost. What a Flush covered must be there, and no
// cluster may be in use that is not counted: QEMU would give it out again.
func TestWriterLosesPower(t *testing.T) {
	rnd := disktest.Rand(t)
	const size, piece = 512 << 10, 16 << 10
	lay, err := newLayout(size, 512)
	if err != nil {
		t.Fatal(err)
	}
	p := &power{}
	if err := lay.writeEmpty(p, "", ""); err != nil {
		t.Fatal(err)
	}
	w := newWriter(p, size, lay)
	model := bytes.Repeat([]byte("holdfast"), size/8)
	done := map[int]int64{len(p.log): 0} // bytes flushed, by the operations it took
	for off := int64(0); off < size; off += piece {
		if err := w.WriteAt(t.Context(), model[off:off+piece], off); err != nil {
			t.Fatal(err)
		}
		if rnd.IntN(3) == 0 {
			if err := w.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			done[len(p.log)] = off + piece
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	done[len(p.log)] = size

	flushed, seen := int64(0), false
	for n := range len(p.log) + 1 {
		if f, ok := done[n]; ok {
			flushed, seen = f, true
		}
		if !seen { // being created: the file is not given out yet
			continue
		}
		b := p.after(n, rnd)
		checkCounted(t, b, lay)
		m := disk.NewMem(int64(len(b)))
		if err := m.WriteAt(t.Context(), b, 0); err != nil {
			t.Fatal(err)
		}
		im, err := Open(t.Context(), fileOf(m), nil)
		if err != nil {
			t.Fatalf("after %d operations: %v", n, err)
		}
		got := make([]byte, flushed)
		if err := im.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, model[:flushed]) {
			t.Fatalf("after %d of %d operations: %d flushed bytes are not there: %v", n, len(p.log), flushed, err)
		}
	}
}

// checkCounted checks that everything in use is counted.
func checkCounted(t *testing.T, b []byte, lay layout) {
	t.Helper()
	be, cluster := binary.BigEndian, int64(1)<<lay.bits
	entry := func(at int64) int64 {
		if at+8 > int64(len(b)) {
			return 0
		}
		return int64(be.Uint64(b[at:]) & offsetMask)
	}
	used := func(at int64) {
		c := at / cluster
		block := entry(lay.refs*cluster + c/lay.perBlock*8)
		if at := block + c%lay.perBlock*2; block == 0 || be.Uint16(b[at:]) != 1 {
			t.Fatalf("cluster %d is in use and not counted", c)
		}
	}
	for i := range lay.l1Count {
		l2 := entry(lay.l1*cluster + i*8)
		if l2 == 0 {
			continue
		}
		used(l2)
		for j := range lay.entries {
			if host := entry(l2 + j*8); host != 0 {
				used(host)
			}
		}
	}
}
