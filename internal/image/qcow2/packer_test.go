package qcow2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/mover"
)

// mixture is bytes of all kinds: some that do not compress, some that do a
// little or very well, and zeros.
func mixture(size int64, rnd *rand.Rand) []byte {
	b := make([]byte, size)
	for off := int64(0); off < size; {
		n := min(1+rnd.Int64N(200<<10), size-off)
		switch p := b[off : off+n]; rnd.IntN(5) {
		case 0:
			disktest.Fill(rnd, p)
		case 1:
			for i := range p {
				p[i] = "holdfast"[rnd.IntN(8)]
			}
		case 2:
			copy(p, bytes.Repeat([]byte{byte(rnd.Uint32())}, len(p)))
		case 3:
			disktest.Fill(rnd, p[:len(p)*31/32]) // just about
		}
		off += n
	}
	return b
}

func memOf(t testing.TB, b []byte) *disk.Mem {
	t.Helper()
	m := disk.NewMem(int64(len(b)))
	if err := m.WriteAt(t.Context(), b, 0); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestPackerAgainstModel(t *testing.T) {
	for _, cluster := range []int64{0, 512, 4096, 2 << 20} {
		for _, kind := range []Compression{Zstd, Zlib} {
			t.Run(fmt.Sprintf("%d/%d", cluster, kind), func(t *testing.T) {
				if testing.Short() && (kind == Zlib) != (cluster == 4096) {
					t.Skip("SKIPPED: -short leaves half of it")
				}
				rnd, dir := disktest.Rand(t), t.TempDir()
				path := filepath.Join(dir, "a.qcow2")
				size := 1 + rnd.Int64N(max(512<<10, 3*cluster))
				model := mixture(size, rnd)
				w, err := CreateCompressed(path, size, PackOptions{ClusterSize: cluster, Compression: kind})
				if err != nil {
					t.Fatal(err)
				}
				src := memOf(t, model)
				block := w.ClusterSize() * (1 + rnd.Int64N(1<<20/w.ClusterSize()+1))
				_, err = mover.Copy(t.Context(), w, src, src.Extents(t.Context(), 0, size), mover.Options{Align: w.ClusterSize(), Block: block, Zeros: mover.WriteZeros})
				if err != nil {
					t.Fatal(err)
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
}

// TestPackerInParallel also has flushes beside the writes.
func TestPackerInParallel(t *testing.T) {
	rnd, dir := disktest.Rand(t), t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	const size = 4 << 20
	w, err := CreateCompressed(path, size, PackOptions{ClusterSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	model := mixture(size, rnd)
	order := rnd.Perm(size >> 16)
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := worker; i < len(order); i += 4 {
				off := int64(order[i]) << 16
				if err := w.WriteAt(t.Context(), model[off:off+1<<16], off); err != nil {
					t.Error(err)
				}
				if i%15 == 0 {
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

func TestPackerRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.qcow2")
	const size = 300<<10 + 100
	w, err := CreateCompressed(path, size, PackOptions{})
	if err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte("holdfast"), 64<<10)
	for _, c := range []struct{ off, n int64 }{{1, 64 << 10}, {0, 100}, {64 << 10, 65 << 10}, {256 << 10, 44 << 10}} {
		if err := w.WriteAt(t.Context(), p[:c.n], c.off); err == nil {
			t.Errorf("write %d at %d was taken", c.n, c.off)
		}
	}
	if err := w.WriteAt(t.Context(), p[:64<<10], size); !errors.Is(err, disk.ErrRange) {
		t.Errorf("beyond the end: %v", err)
	}
	if err := w.ZeroAt(t.Context(), 100, size-100); err != nil {
		t.Error(err)
	}
	if err := w.WriteAt(t.Context(), p[:44<<10+100], 256<<10); err != nil {
		t.Error(err)
	}
	if err := w.ZeroAt(t.Context(), size-1, 1); !errors.Is(err, errTwice) {
		t.Errorf("zero what was written: %v", err)
	}
	if err := w.WriteAt(t.Context(), make([]byte, 44<<10+100), 256<<10); !errors.Is(err, errTwice) {
		t.Errorf("write zeros over what was written: %v", err)
	}
	if err := w.WriteAt(t.Context(), p[:44<<10+100], 256<<10); !errors.Is(err, errTwice) {
		t.Errorf("write again: %v", err)
	}
	// The image is not what was asked for: nobody is to think that it is.
	if err := w.Close(); !errors.Is(err, errTwice) {
		t.Errorf("close: %v", err)
	}
}

// TestPackerFillsRefcounts: a cluster of 2 MiB holds more compressed ones than
// 16 bits count.
func TestPackerFillsRefcounts(t *testing.T) {
	lay, err := newPackedLayout(1<<40, 2<<20, compressZstd)
	if err != nil {
		t.Fatal(err)
	}
	w := newPacker(&power{}, 1<<40, lay)
	seen := map[int64]int{}
	last := int64(0)
	for range 200000 {
		off := w.takeBytes(20)
		if off < last {
			t.Fatalf("%d after %d", off, last)
		}
		last = off + 20
		seen[off>>21]++
		if (off+19)>>21 != off>>21 {
			seen[off>>21+1]++
		}
	}
	for c, n := range seen {
		if n > 65535 || int(w.refs(c)) != n {
			t.Errorf("cluster %d is counted %d times, and used %d times", c, w.refs(c), n)
		}
	}
}

// TestPackerLosesPower is TestWriterLosesPower for compressed images.
func TestPackerLosesPower(t *testing.T) {
	rnd := disktest.Rand(t)
	const size, piece = 256 << 10, 8 << 10
	lay, err := newPackedLayout(size, 512, compressZstd)
	if err != nil {
		t.Fatal(err)
	}
	p := &power{}
	if err := lay.writeEmpty(p, "", ""); err != nil {
		t.Fatal(err)
	}
	w := newPacker(p, size, lay)
	model := mixture(size, rnd)
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
		if !seen {
			continue
		}
		b := p.after(n, rnd)
		checkPacked(t, b, lay)
		im, err := openDamaged(t, b)
		if err != nil {
			t.Fatalf("after %d operations: %v", n, err)
		}
		got := make([]byte, size)
		if err := im.ReadAt(t.Context(), got[:flushed], 0); err != nil || !bytes.Equal(got[:flushed], model[:flushed]) {
			t.Fatalf("after %d of %d operations: %d flushed bytes are not there: %v", n, len(p.log), flushed, err)
		}
		// What is named has its bytes, too.
		if err := im.ReadAt(t.Context(), got, 0); err != nil {
			t.Fatalf("after %d of %d operations: %v", n, len(p.log), err)
		}
	}
}

// checkPacked checks that everything in use is counted, as often as it is used.
func checkPacked(t *testing.T, b []byte, lay layout) {
	t.Helper()
	be, cluster := binary.BigEndian, int64(1)<<lay.bits
	entry := func(at int64) uint64 {
		if at+8 > int64(len(b)) {
			return 0
		}
		return be.Uint64(b[at:])
	}
	used := map[int64]int{}
	for i := range lay.l1Count {
		l2 := int64(entry(lay.l1*cluster+i*8) & offsetMask)
		if l2 == 0 {
			continue
		}
		used[l2/cluster]++
		for j := range lay.entries {
			switch e := entry(l2 + j*8); {
			case e&flagCompressed != 0:
				x := compressedExtent(int64(e&(flagCompressed-1)), cluster)
				for c := x.off / cluster; c <= (x.end()-1)/cluster; c++ {
					used[c]++
				}
			case e != 0:
				used[int64(e&offsetMask)/cluster]++
			}
		}
	}
	for c, n := range used {
		block := int64(entry(lay.refs*cluster+c/lay.perBlock*8) & offsetMask)
		if at := block + c%lay.perBlock*2; block == 0 || at+2 > int64(len(b)) || int(be.Uint16(b[at:])) < n {
			t.Fatalf("cluster %d is used %d times and not counted", c, n)
		}
	}
}

// TestPackedSize: the image is about as small as QEMU's.
func TestPackedSize(t *testing.T) {
	need(t, "qemu-img", "tar")
	if testing.Short() {
		t.Skip("SKIPPED: it compresses tens of MB")
	}
	dir := t.TempDir()
	raw := filepath.Join(dir, "raw")
	run(t, "sh", "-c", "tar -C / -cf - usr/lib usr/share 2>/dev/null | head -c 33554432 > "+raw)
	for kind, name := range map[Compression]string{Zstd: "zstd", Zlib: "zlib"} {
		theirs, ours := filepath.Join(dir, name+"-q"), filepath.Join(dir, name)
		run(t, "qemu-img", "convert", "-c", "-t", "unsafe", "-f", "raw", "-O", "qcow2", "-o", "compression_type="+name, raw, theirs)
		src, err := disk.OpenFile(raw, disk.FileOptions{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		defer src.Close()
		w, err := CreateCompressed(ours, src.Size(), PackOptions{Compression: kind})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := mover.Copy(t.Context(), w, src, src.Extents(t.Context(), 0, src.Size()), mover.Options{Align: w.ClusterSize()}); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", raw, ours)
		check(t, ours)
		a, err := os.Stat(ours)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.Stat(theirs)
		if err != nil {
			t.Fatal(err)
		}
		ratio := float64(a.Size()) / float64(b.Size())
		t.Logf("%s: %d bytes, QEMU's %d: %.3f", name, a.Size(), b.Size(), ratio)
		if ratio > 1.1 {
			t.Errorf("%s: %.3f times QEMU's size", name, ratio)
		}
	}
}
