//go:build unix

package qcow2

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/mover"
)

// cost is what something took: wall time, and that of all processors.
type cost struct{ wall, cpu time.Duration }

func (c cost) String() string {
	return fmt.Sprintf("%.2f s (%.2f s of CPU)", c.wall.Seconds(), c.cpu.Seconds())
}

func (c *cost) least(o cost) {
	if c.wall == 0 || o.wall < c.wall {
		c.wall = o.wall
	}
	if c.cpu == 0 || o.cpu < c.cpu {
		c.cpu = o.cpu
	}
}

func cpu() time.Duration {
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		return 0
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

func costOf(b *testing.B, name string, args ...string) cost {
	start := time.Now()
	cmd := exec.Command(name, args...)
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("%s: %v %s", name, err, out)
	}
	return cost{time.Since(start), cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()}
}

// mixed is a raw disk of programs, libraries and text, with some holes.
func mixed(b *testing.B, dir string) string {
	b.Helper()
	path := filepath.Join(dir, "mixed.raw")
	// Half a GiB of it, that the disk is not of another size on each machine.
	run(b, "sh", "-c", "tar -C / -cf - usr/lib usr/share 2>/dev/null | head -c 536870912 > "+path)
	if err := os.Truncate(path, 640<<20); err != nil {
		b.Fatal(err)
	}
	return path
}

// toRaw is how an image is converted to raw here.
func toRaw(b *testing.B, dir, from, to string) cost {
	b.Helper()
	c0, start := cpu(), time.Now()
	c := openChain(b, dir, from)
	out, err := disk.CreateFile(filepath.Join(dir, to), c.Size())
	if err == nil {
		_, err = mover.Copy(b.Context(), out, c, c.Extents(b.Context(), 0, c.Size()), mover.Options{})
	}
	if err == nil {
		err = out.Close()
	}
	if err != nil {
		b.Fatal(err)
	}
	return cost{time.Since(start), cpu() - c0}
}

// BenchmarkReadCompressed compares with what qemu-img takes for the same.
// Neither waits for the result to be on disk.
func BenchmarkReadCompressed(b *testing.B) {
	need(b, "qemu-img", "tar")
	dir := b.TempDir()
	raw := mixed(b, dir)
	for _, kind := range []string{"zstd", "zlib"} {
		b.Run(kind, func(b *testing.B) {
			path, out := filepath.Join(dir, kind+".qcow2"), filepath.Join(dir, "out.raw")
			run(b, "qemu-img", "convert", "-c", "-W", "-t", "unsafe", "-f", "raw", "-O", "qcow2", "-o", "compression_type="+kind, raw, path)
			var ours, theirs cost
			for b.Loop() {
				theirs.least(costOf(b, "qemu-img", "convert", "-t", "unsafe", "-f", "qcow2", "-O", "raw", path, out))
				os.Remove(out)
				ours.least(toRaw(b, dir, kind+".qcow2", "out.raw"))
				os.Remove(out)
			}
			b.Logf("least of %d: ours %v, qemu-img %v", b.N, ours, theirs)
			b.ReportMetric(ours.wall.Seconds()/theirs.wall.Seconds(), "wall/qemu")
			b.ReportMetric(ours.cpu.Seconds()/theirs.cpu.Seconds(), "cpu/qemu")
		})
	}
}

// BenchmarkWriteCompressed compares an export with that of qemu-img.
func BenchmarkWriteCompressed(b *testing.B) {
	need(b, "qemu-img", "tar")
	dir := b.TempDir()
	raw := mixed(b, dir)
	for kind, name := range map[Compression]string{Zstd: "zstd", Zlib: "zlib"} {
		b.Run(name, func(b *testing.B) {
			path, other := filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
			var ours, theirs cost
			for b.Loop() {
				os.Remove(path)
				os.Remove(other)
				theirs.least(costOf(b, "qemu-img", "convert", "-c", "-W", "-t", "unsafe", "-f", "raw", "-O", "qcow2", "-o", "compression_type="+name, raw, other))
				ours.least(pack(b, raw, path, kind))
			}
			b.Logf("least of %d: ours %v, qemu-img %v", b.N, ours, theirs)
			b.ReportMetric(ours.wall.Seconds()/theirs.wall.Seconds(), "wall/qemu")
			b.ReportMetric(ours.cpu.Seconds()/theirs.cpu.Seconds(), "cpu/qemu")
			b.ReportMetric(length(b, path)/length(b, other), "size/qemu")
		})
	}
}

func pack(b *testing.B, from, to string, kind Compression) cost {
	b.Helper()
	c0, start := cpu(), time.Now()
	src, err := disk.OpenFile(from, disk.FileOptions{ReadOnly: true})
	if err != nil {
		b.Fatal(err)
	}
	defer src.Close()
	w, err := CreateCompressed(to, src.Size(), PackOptions{Compression: kind})
	if err != nil {
		b.Fatal(err)
	}
	if _, err := mover.Copy(b.Context(), w, src, src.Extents(b.Context(), 0, src.Size()), mover.Options{Align: w.ClusterSize()}); err != nil {
		b.Fatal(err)
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	return cost{time.Since(start), cpu() - c0}
}

func length(b *testing.B, path string) float64 {
	b.Helper()
	info, err := os.Stat(path)
	if err != nil {
		b.Fatal(err)
	}
	return float64(info.Size())
}
