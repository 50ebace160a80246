package qcow2

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

// need skips the test, loudly, where a tool is not installed.
func need(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: %s is not installed", tool)
		}
	}
}

// run runs a command and returns its output.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	// QEMU takes the name of a data file to be relative to where it runs.
	if last := args[len(args)-1]; filepath.IsAbs(last) {
		cmd.Dir = filepath.Dir(last)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// in resolves names within a directory.
func in(dir string) image.Resolver {
	return func(_ context.Context, from, name string) (image.File, error) {
		p, err := image.Join(from, name)
		if err != nil {
			return image.File{}, err
		}
		d, err := disk.OpenFile(filepath.Join(dir, p), disk.FileOptions{ReadOnly: true})
		if err != nil {
			return image.File{}, err
		}
		return image.File{Name: p, Disk: d}, nil
	}
}

var formats = image.Formats{Format()}

// openChain opens dir/name as a qcow2 image.
func openChain(t testing.TB, dir, name string) *image.Chain {
	t.Helper()
	f, err := in(dir)(t.Context(), "x", name)
	if err != nil {
		t.Fatal(err)
	}
	c, err := formats.Open(t.Context(), f, Name, in(dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// compare checks that the disk holds the model's bytes: all of it in pieces of
// several sizes, then the suite.
func compare(t *testing.T, d disk.Reader, model []byte, rnd *rand.Rand) {
	t.Helper()
	for off := int64(0); off < min(d.Size(), int64(len(model))); {
		p := make([]byte, min(1+rnd.Int64N(3<<20), d.Size()-off, int64(len(model))-off))
		if err := d.ReadAt(t.Context(), p, off); err != nil {
			t.Fatalf("read %d at %d: %v", len(p), off, err)
		}
		if !bytes.Equal(p, model[off:off+int64(len(p))]) {
			t.Fatalf("read %d at %d differs", len(p), off)
		}
		off += int64(len(p))
	}
	disktest.Reader(t, d, model)
}

// rawOf is the whole disk as qemu-img reads it.
func rawOf(t testing.TB, path, format string) []byte {
	t.Helper()
	out := filepath.Join(filepath.Dir(path), "model")
	defer os.Remove(out)
	run(t, "qemu-img", "convert", "-t", "unsafe", "-f", format, "-O", "raw", path, out)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// scribble makes n random writes, zeroes and discards through qemu-io.
func scribble(t testing.TB, path string, size int64, n int, rnd *rand.Rand, extra ...string) {
	t.Helper()
	args := append([]string{"-f", "qcow2", "-d", "unmap", "-t", "unsafe"}, extra...)
	for range n {
		off := rnd.Int64N(size/512) * 512
		length := min(512*(1+rnd.Int64N(600)), size-off)
		if rnd.IntN(8) == 0 {
			off, length = off&^0xffff, min(1<<20, size-off&^0xffff)
		}
		cmd := fmt.Sprintf("write -P %d %d %d", 1+rnd.IntN(255), off, length)
		switch rnd.IntN(6) {
		case 0:
			cmd = fmt.Sprintf("write -z %d %d", off, length)
		case 1:
			cmd = fmt.Sprintf("write -z -u %d %d", off, length)
		case 2:
			cmd = fmt.Sprintf("discard %d %d", off, length)
		}
		args = append(args, "-c", cmd)
	}
	run(t, "qemu-io", append(args, path)...)
}

// noise fills a raw file with runs of random and repeated bytes and holes.
func noise(t testing.TB, path string, size int64, rnd *rand.Rand) []byte {
	t.Helper()
	b := make([]byte, size)
	for off := int64(0); off < size; {
		n := min(512*(1+rnd.Int64N(1000)), size-off)
		switch p := b[off : off+n]; rnd.IntN(3) {
		case 0:
			for i := range p {
				p[i] = byte(rnd.Uint32())
			}
		case 1:
			copy(p, bytes.Repeat([]byte{byte(rnd.Uint32()), 7, 9}, len(p)/3))
		}
		off += n
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestReadsWhatQEMUWrites(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	const size = 6<<20 + 5*512
	var cases []string
	for bits := 9; bits <= 21; bits++ {
		if testing.Short() && bits%3 != 0 {
			continue
		}
		cases = append(cases, fmt.Sprintf("compat=1.1,cluster_size=%d", 1<<bits))
	}
	cases = append(cases,
		"compat=0.10", "compat=0.10,cluster_size=4096",
		"compat=1.1,lazy_refcounts=on", "compat=1.1,refcount_bits=1", "compat=1.1,refcount_bits=64",
		"compat=1.1,extended_l2=on", "compat=1.1,extended_l2=on,cluster_size=16384", "compat=1.1,extended_l2=on,cluster_size=2097152",
		"compat=1.1,preallocation=metadata", "compat=1.1,preallocation=falloc",
		"compat=1.1,data_file=data.raw", "compat=1.1,data_file=data.raw,data_file_raw=on", "compat=1.1,extended_l2=on,data_file=data.raw")
	for _, o := range cases {
		t.Run(o, func(t *testing.T) {
			rnd, dir := disktest.Rand(t), t.TempDir()
			path := filepath.Join(dir, "a.qcow2")
			cmd := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-o", o, path, fmt.Sprint(size))
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v %s", err, out)
			}
			compare(t, openChain(t, dir, "a.qcow2"), make([]byte, size), rnd)
			scribble(t, path, size, 40, rnd)
			compare(t, openChain(t, dir, "a.qcow2"), rawOf(t, path, "qcow2"), rnd)
		})
	}
}

func TestReadsCompressedClusters(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	for _, o := range []string{
		"compression_type=zlib", "compression_type=zstd", "compression_type=zlib,cluster_size=512", "compression_type=zstd,cluster_size=2097152",
		"compression_type=zlib,cluster_size=2097152", "compression_type=zstd,extended_l2=on", "compat=0.10,compression_type=zlib"} {
		t.Run(o, func(t *testing.T) {
			rnd, dir := disktest.Rand(t), t.TempDir()
			size := int64(4<<20 + 3*512)
			if strings.HasSuffix(o, "=512") {
				size = 1<<20 + 512 // each cluster is a write of its own
			}
			model := noise(t, filepath.Join(dir, "raw"), size, rnd)
			path := filepath.Join(dir, "a.qcow2")
			run(t, "qemu-img", "convert", "-c", "-t", "unsafe", "-f", "raw", "-O", "qcow2", "-o", o, filepath.Join(dir, "raw"), path)
			compare(t, openChain(t, dir, "a.qcow2"), model, rnd)
			scribble(t, path, size, 20, rnd) // compressed and plain clusters side by side
			compare(t, openChain(t, dir, "a.qcow2"), rawOf(t, path, "qcow2"), rnd)
		})
	}
}

func TestReadsBackingChains(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rnd := disktest.Rand(t)
	rounds := 8
	if testing.Short() {
		rounds = 2
	}
	for i := range rounds {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			dir := t.TempDir()
			size := 2<<20 + 512*rnd.Int64N(4000)
			format := "raw"
			noise(t, filepath.Join(dir, "l0"), size, rnd)
			for level := 1; level <= 3; level++ {
				// Children are shorter and longer than their parents.
				size = 2<<20 + 512*rnd.Int64N(8000)
				o := fmt.Sprintf("cluster_size=%d", 4096<<rnd.IntN(8))
				if rnd.IntN(3) == 0 {
					o = "extended_l2=on,cluster_size=65536"
				}
				name := fmt.Sprintf("l%d", level)
				run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", o, "-b", fmt.Sprintf("l%d", level-1), "-F", format,
					filepath.Join(dir, name), fmt.Sprint(size))
				scribble(t, filepath.Join(dir, name), size, 15, rnd)
				format = "qcow2"
				c := openChain(t, dir, name)
				compare(t, c, rawOf(t, filepath.Join(dir, name), "qcow2"), rnd)
				if len(c.Files()) != level+1 {
					t.Fatalf("files %v", c.Files())
				}
			}
		})
	}
}

func TestListsInternalSnapshots(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rnd, dir := disktest.Rand(t), t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	const size = 8 << 20
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", path, fmt.Sprint(size))
	for _, name := range []string{"first", "second one"} {
		scribble(t, path, size, 10, rnd)
		run(t, "qemu-img", "snapshot", "-c", name, path)
	}
	scribble(t, path, size, 10, rnd)
	compare(t, openChain(t, dir, "a.qcow2"), rawOf(t, path, "qcow2"), rnd)

	f, err := in(dir)(t.Context(), "x", "a.qcow2")
	if err != nil {
		t.Fatal(err)
	}
	im, err := Open(t.Context(), f, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	list, err := im.Snapshots(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 2 || list[0].Name != "first" || list[1].Name != "second one" || list[1].ID != "2" || list[0].Size != size || list[0].VMState != 0 ||
		list[0].Time.Year() < 2020 {
		t.Fatalf("snapshots: %+v", list)
	}
}

// TestReadsDirtyImage: a guest that lost power leaves the dirty bit and stale
// refcounts; refusing it would lose the backup of just the VM that crashed.
func TestReadsDirtyImage(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rnd, dir := disktest.Rand(t), t.TempDir()
	path := filepath.Join(dir, "a.qcow2")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", path, "8M")
	cmd := exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 300k", "-c", "flush", "-c", "sigraise 9", path)
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Fatalf("qemu-io was to be killed: %s", out)
	}
	if err := exec.Command("qemu-img", "check", "-q", "-f", "qcow2", path).Run(); err == nil {
		t.Fatal("the image is not dirty after all")
	}
	c := openChain(t, dir, "a.qcow2")
	model := make([]byte, 8<<20)
	copy(model[64<<10:], bytes.Repeat([]byte{7}, 300<<10))
	compare(t, c, model, rnd)
}

// TestRealImages reads images of other origins, from the folder that
// HOLDFAST_IMAGES names or the one beside the project. The table in its
// README.md tells name and content of each.
func TestRealImages(t *testing.T) {
	dir := os.Getenv("HOLDFAST_IMAGES")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "..", "shared", "images")
	}
	if testing.Short() {
		t.Skip("SKIPPED: -short reads no real images")
	}
	need(t, "gzip")
	readme, err := os.ReadFile(filepath.Join(dir, "README.md"))
	if err != nil {
		t.Skipf("SKIPPED: no real images: set HOLDFAST_IMAGES to their folder: %v", err)
	}
	tmp, want := t.TempDir(), map[string]string{}
	for line := range strings.Lines(string(readme)) {
		col := strings.Split(line, "|")
		if len(col) < 7 || strings.TrimSpace(col[2]) != "qcow2" {
			continue
		}
		file := strings.Trim(col[1], " `")
		name := strings.TrimSuffix(file, ".gz")
		want[name] = strings.Trim(col[6], " `")
		out, err := exec.Command("gzip", "-dc", filepath.Join(dir, file)).Output()
		if err == nil {
			err = os.WriteFile(filepath.Join(tmp, name), out, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(want) == 0 {
		t.Fatal("README.md names no qcow2 image")
	}
	for name, sum := range want {
		t.Run(name, func(t *testing.T) {
			c := openChain(t, tmp, name)
			h, p := sha256.New(), make([]byte, 1<<20)
			for off := int64(0); off < c.Size(); off += int64(len(p)) {
				p = p[:min(int64(len(p)), c.Size()-off)]
				if err := c.ReadAt(t.Context(), p, off); err != nil {
					t.Fatal(err)
				}
				h.Write(p)
			}
			if got := hex.EncodeToString(h.Sum(nil)); got != sum {
				t.Errorf("content %s, want %s", got, sum)
			}
			if v := ours(t, tmp, name); v.damaged || v.leaks {
				t.Errorf("check: %s", v.text)
			}
		})
	}
}
