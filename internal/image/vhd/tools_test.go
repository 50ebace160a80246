package vhd

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
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
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, errs.String())
	}
	return out.String()
}

// mount opens an image with libvhdi. It may call FUSE only as root.
func mount(t testing.TB, path string) *os.File {
	t.Helper()
	need(t, "vhdimount", "umount")
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		t.Skipf("SKIPPED: vhdimount cannot work: %v", err)
	} else {
		f.Close()
	}
	dir := t.TempDir()
	run(t, "vhdimount", path, dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	// The last one is the image, those before it are its parents.
	list, err := filepath.Glob(filepath.Join(dir, "vhdi*"))
	if err != nil || len(list) == 0 {
		t.Fatalf("vhdimount gives nothing: %v", err)
	}
	f, err := os.Open(filepath.Join(dir, fmt.Sprintf("vhdi%d", len(list))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// readAll is all of an open file of that size.
func readAll(t testing.TB, f *os.File, size int) []byte {
	t.Helper()
	b := make([]byte, size+1)
	n, err := io.ReadFull(f, b)
	if n != size || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("%s has %d bytes, not %d: %v", f.Name(), n, size, err)
	}
	return b[:size]
}

// differ tells where two contents begin to differ.
func differ(t testing.TB, who string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	i := 0
	for i < min(len(got), len(want)) && got[i] == want[i] {
		i++
	}
	t.Errorf("%s reads something else: %d bytes, want %d, from %d on", who, len(got), len(want), i)
}

// virtualSize is what qemu-img takes for the disk's size.
func virtualSize(t testing.TB, path string) int64 {
	t.Helper()
	var info struct {
		Size int64 `json:"virtual-size"`
	}
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "info", "--output=json", "-f", "vpc", path)), &info); err != nil {
		t.Fatal(err)
	}
	return info.Size
}

// views are random disks, saved as images of each kind.
func views(t *testing.T, do func(t *testing.T, path string, want []byte)) {
	rnd := disktest.Rand(t)
	for _, kind := range []Kind{Dynamic, Allocated, Fixed} {
		for _, size := range []int64{1 + rnd.Int64N(20<<20), 3 << 20, 2<<20 + 512, 600} {
			t.Run(fmt.Sprintf("%d of %d", kind, size), func(t *testing.T) {
				d := sparse(t, rnd, size)
				v, err := NewView(t.Context(), d, ViewOptions{Kind: kind})
				if err != nil {
					t.Fatal(err)
				}
				path := filepath.Join(t.TempDir(), "a.vhd")
				save(t, v, path)
				do(t, path, bytesOf(t, d))
			})
		}
	}
}

func TestViewsByQemu(t *testing.T) {
	need(t, "qemu-img")
	views(t, func(t *testing.T, path string, want []byte) {
		if got := virtualSize(t, path); got != int64(len(want)) {
			t.Errorf("qemu-img takes the disk to have %d bytes, not %d", got, len(want))
		}
		raw := filepath.Join(filepath.Dir(path), "raw")
		if err := os.WriteFile(raw, want, 0o600); err != nil {
			t.Fatal(err)
		}
		run(t, "qemu-img", "compare", "-f", "vpc", "-F", "raw", path, raw)
	})
}

func TestViewsBy7Zip(t *testing.T) {
	need(t, "7z")
	views(t, func(t *testing.T, path string, want []byte) {
		differ(t, "7-Zip", []byte(run(t, "7z", "x", "-so", "-tVHD", path)), want)
	})
}

func TestViewsByLibvhdi(t *testing.T) {
	views(t, func(t *testing.T, path string, want []byte) {
		differ(t, "libvhdi", readAll(t, mount(t, path), len(want)), want)
	})
}

// TestChainsBy7Zip and TestChainsByLibvhdi: others read differencing images as
// we do.
func TestChainsBy7Zip(t *testing.T) {
	need(t, "7z")
	chains(t, plan{usual: true}, func(t *testing.T, path string, want []byte) {
		differ(t, "7-Zip", []byte(run(t, "7z", "x", "-so", "-tVHD", path)), want)
	})
}

func TestChainsByLibvhdi(t *testing.T) {
	need(t, "vhdimount")
	// libvhdi takes sectors wrongly where a byte of a bitmap has ones and zeros.
	chains(t, plan{usual: true, groups: true}, func(t *testing.T, path string, want []byte) {
		differ(t, "libvhdi", readAll(t, mount(t, path), len(want)), want)
	})
}

func chains(t *testing.T, like plan, do func(t *testing.T, path string, want []byte)) {
	rnd := disktest.Rand(t)
	for range 3 {
		dir := t.TempDir()
		want := makeChain(t, rnd, dir, 2, like)
		differ(t, "this package", bytesOf(t, openChain(t, dir, "2.vhd")), want)
		do(t, filepath.Join(dir, "2.vhd"), want)
	}
}

func TestReadsWhatQemuMakes(t *testing.T) {
	need(t, "qemu-img")
	rnd, dir := disktest.Rand(t), t.TempDir()
	for _, o := range []string{"dynamic,force_size=on", "dynamic,force_size=off", "fixed,force_size=on", "fixed,force_size=off"} {
		t.Run(o, func(t *testing.T) {
			want := bytesOf(t, sparse(t, rnd, 1+rnd.Int64N(30<<20)))
			raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "a.vhd")
			if err := os.WriteFile(raw, want, 0o600); err != nil {
				t.Fatal(err)
			}
			run(t, "qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", "subformat="+o, raw, path)
			c := openChain(t, dir, "a.vhd")
			if c.Size() != virtualSize(t, path) {
				t.Fatalf("size %d, QEMU's %d", c.Size(), virtualSize(t, path))
			}
			want = append(want, make([]byte, c.Size()-int64(len(want)))...)
			disktest.Reader(t, c, want)
			if list := problems(t, c.Layers()[0]); len(list) != 0 {
				t.Errorf("problems %q", list)
			}
		})
	}
}

// TestBeyond1TiB: sector numbers above 2³¹, in a sparse file with a block at
// its far end.
func TestBeyond1TiB(t *testing.T) {
	need(t, "qemu-io", "qemu-img")
	if testing.Short() {
		t.Skip("SKIPPED: short")
	}
	d := disk.NewMem(MaxSize)
	data := bytes.Repeat([]byte{7}, 4<<20)
	offs := []int64{0, 1 << 40, 1<<40 + 100<<30, MaxSize - int64(len(data))}
	for _, off := range offs {
		if err := d.WriteAt(t.Context(), data, off); err != nil {
			t.Fatal(err)
		}
	}
	v, err := NewView(t.Context(), d, ViewOptions{Kind: Allocated})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "a.vhd")
	f, err := disk.CreateFile(path, v.Size())
	if err != nil {
		t.Skipf("SKIPPED: no file of %d bytes here: %v", v.Size(), err)
	}
	// All of it would be 4 GiB of bitmaps: the tables and those blocks do.
	im, err := Open(t.Context(), image.File{Disk: v}, nil)
	if err != nil {
		t.Fatal(err)
	}
	copyRange := func(off, n int64) {
		t.Helper()
		p := make([]byte, n)
		if err := errors.Join(v.ReadAt(t.Context(), p, off), f.WriteAt(t.Context(), p, off)); err != nil {
			t.Fatal(err)
		}
	}
	copyRange(0, 8<<20)
	copyRange(v.Size()-512, 512)
	for _, off := range offs {
		for in := int64(0); in < int64(len(data)); in += viewBlock {
			m, err := im.lookup(t.Context(), off+in, viewBlock)
			if err != nil {
				t.Fatal(err)
			}
			copyRange(m.host-viewLead, viewLead+viewBlock)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if got := virtualSize(t, path); got != MaxSize {
		t.Errorf("QEMU takes the size to be %d", got)
	}
	for _, off := range offs {
		out := run(t, "qemu-io", "-r", "-f", "vpc", "-c", fmt.Sprintf("read -P 7 %d %d", off, len(data)), path)
		if !strings.Contains(out, fmt.Sprintf("read %d/%d", len(data), len(data))) || strings.Contains(out, "failed") {
			t.Errorf("QEMU at %d: %s", off, out)
		}
	}
	c := openChain(t, filepath.Dir(path), "a.vhd")
	m := mount(t, path)
	for _, off := range offs {
		got := make([]byte, len(data))
		if err := c.ReadAt(t.Context(), got, off); err != nil || !bytes.Equal(got, data) {
			t.Errorf("we at %d: %v", off, err)
		}
		if _, err := m.ReadAt(got, off); err != nil || !bytes.Equal(got, data) {
			t.Errorf("libvhdi at %d: %v", off, err)
		}
	}
}

// images is the folder of real images.
func images(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("HOLDFAST_IMAGES")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "..", "shared", "images")
	}
	if _, err := os.Stat(filepath.Join(dir, "README.md")); err != nil {
		t.Skipf("SKIPPED: no real images: set HOLDFAST_IMAGES to their folder: %v", err)
	}
	return dir
}

// unpack puts the real images of this format into a folder, and tells the
// SHA-256 of each one's disk.
func unpack(t testing.TB) (dir string, sums map[string]string) {
	t.Helper()
	from := images(t)
	dir, sums = t.TempDir(), map[string]string{}
	readme, err := os.ReadFile(filepath.Join(from, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(readme)) {
		col := strings.Split(line, "|")
		if len(col) < 7 || strings.TrimSpace(col[2]) != Name {
			continue
		}
		file := strings.Trim(col[1], " `")
		b, err := os.ReadFile(filepath.Join(from, file))
		if err != nil {
			t.Fatal(err)
		}
		name, packed := strings.CutSuffix(file, ".gz")
		if packed {
			r, err := gzip.NewReader(bytes.NewReader(b))
			if err == nil {
				b, err = io.ReadAll(r)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
		sums[name] = strings.Trim(col[6], " `")
	}
	if len(sums) == 0 {
		t.Fatal("README.md names no VHD image")
	}
	return dir, sums
}

func TestRealImages(t *testing.T) {
	dir, sums := unpack(t)
	for name, want := range sums {
		c := openChain(t, dir, name)
		b := bytesOf(t, c)
		if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != want {
			t.Errorf("%s: content %x, want %s", name, sum, want)
		}
		disktest.Reader(t, c, b)
		for i, l := range c.Layers() {
			t.Logf("%s: %+v", c.Files()[i], l.Info())
			if list := problems(t, l); len(list) != 0 {
				t.Errorf("%s: problems %q", c.Files()[i], list)
			}
		}
	}
}

// TestRealDifferencingImage must fail alone, and above another disk that has
// its parent's name.
func TestRealDifferencingImage(t *testing.T) {
	const child, parent = "fat-differential.vhd", "fat-parent.vhd"
	dir, sums := unpack(t)
	if sums[child] == "" || sums[parent] == "" {
		t.Skip("SKIPPED: no real differencing image")
	}
	open := func() error {
		f, err := in(dir)(t.Context(), "x", child)
		if err != nil {
			t.Fatal(err)
		}
		c, err := formats.Open(t.Context(), f, Name, in(dir))
		if err == nil {
			c.Close()
		}
		return err
	}
	if err := open(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, parent))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range [][]byte{b[:512], b[len(b)-512:]} {
		f[70]++
		binary.BigEndian.PutUint32(f[64:], checksum(f, 64))
	}
	if err := os.WriteFile(filepath.Join(dir, parent), b, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := open(); !errors.Is(err, image.ErrParent) {
		t.Errorf("above another disk: %v", err)
	}
	if err := os.Remove(filepath.Join(dir, parent)); err != nil {
		t.Fatal(err)
	}
	if err := open(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("alone: %v", err)
	}
}
