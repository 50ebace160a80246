package vhdx

import (
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

// need skips the test, loudly, where none of the tools is installed, and
// returns the first that is.
func need(t testing.TB, tools ...string) string {
	t.Helper()
	for _, tool := range tools {
		if p, err := exec.LookPath(tool); err == nil {
			return p
		}
	}
	t.Skipf("SKIPPED: %s is not installed", strings.Join(tools, " or "))
	return ""
}

// run runs a command and returns its output.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// sevenZip is the content of an image, or of the chain that it is the end of,
// as 7-Zip reads it.
func sevenZip(t testing.TB, path string) []byte {
	t.Helper()
	cmd := exec.Command(need(t, "7z", "7zz"), "x", "-so", "-tVHDX", path)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("7z x %s: %v\n%s", path, err, &stderr)
	}
	return out
}

// vhdimount mounts an image as libvhdi reads it and returns the path of its
// disk. It is unmounted with the test's end.
func vhdimount(t testing.TB, path string) string {
	t.Helper()
	need(t, "vhdimount")
	need(t, "umount")
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skip("SKIPPED: there is no /dev/fuse")
	}
	dir := t.TempDir()
	if out, err := exec.Command("vhdimount", path, dir).CombinedOutput(); err != nil {
		t.Fatalf("vhdimount %s: %v\n%s", path, err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	list, err := filepath.Glob(filepath.Join(dir, "vhdi*"))
	if err != nil || len(list) == 0 {
		t.Fatalf("vhdimount shows nothing: %v", err)
	}
	return list[len(list)-1] // of a chain the image itself is the last one
}

// save writes a disk to a sparse file.
func save(t testing.TB, d disk.Reader, path string) {
	t.Helper()
	f, err := os.Create(path) // disk.CreateFile would sync, which a test need not wait for
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(d.Size()); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 1<<20)
	for e, err := range d.Extents(t.Context(), 0, d.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		for off := e.Off; !e.Zero && off < e.End(); off += int64(len(buf)) {
			p := buf[:min(int64(len(buf)), e.End()-off)]
			if err := d.ReadAt(t.Context(), p, off); err != nil {
				t.Fatal(err)
			}
			if !disk.IsZero(p) {
				if _, err := f.WriteAt(p, off); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
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

// openChain opens dir/name with its parents.
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

// openMem opens an image in memory.
func openMem(t testing.TB, d disk.Reader) *Image {
	t.Helper()
	im, err := Open(t.Context(), image.File{Name: "test.vhdx", Disk: d}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// chainOf opens an image in memory that has no parent, as a disk.
func chainOf(t testing.TB, d disk.Reader) *image.Chain {
	t.Helper()
	c, err := formats.Open(t.Context(), image.File{Name: "test.vhdx", Disk: d}, Name, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// problems is what Check reports.
func problems(t testing.TB, l image.Layer) []string {
	t.Helper()
	var list []string
	if err := l.Check(t.Context(), func(p string) { list = append(list, p) }); err != nil {
		t.Fatal(err)
	}
	return list
}

// compare checks that the disk holds the model's bytes: all of it in pieces of
// several sizes, then the suite.
func compare(t testing.TB, d disk.Reader, model []byte, rnd *rand.Rand) {
	t.Helper()
	buf := make([]byte, 3<<20)
	for off := int64(0); off < min(d.Size(), int64(len(model))); {
		p := buf[:min(1+rnd.Int64N(3<<20), d.Size()-off, int64(len(model))-off)]
		if err := d.ReadAt(t.Context(), p, off); err != nil {
			t.Fatalf("read %d at %d: %v", len(p), off, err)
		}
		if !bytes.Equal(p, model[off:off+int64(len(p))]) {
			i := int64(0)
			for p[i] == model[off+i] {
				i++
			}
			t.Fatalf("read %d at %d differs at %d", len(p), off, off+i)
		}
		off += int64(len(p))
	}
	if t, ok := t.(*testing.T); ok {
		disktest.Reader(t, d, model)
	}
}

// digest is the SHA-256 of a whole disk.
func digest(t testing.TB, d disk.Reader) string {
	t.Helper()
	h, p, zeros := sha256.New(), make([]byte, 1<<20), make([]byte, 1<<20)
	for e, err := range d.Extents(t.Context(), 0, d.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		for off := e.Off; off < e.End(); off += int64(len(p)) {
			n := min(int64(len(p)), e.End()-off)
			if e.Zero {
				h.Write(zeros[:n])
				continue
			}
			if err := d.ReadAt(t.Context(), p[:n], off); err != nil {
				t.Fatal(err)
			}
			h.Write(p[:n])
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

// realImages is the folder with images of other origins.
func realImages(t testing.TB) string {
	t.Helper()
	dir := os.Getenv("HOLDFAST_IMAGES")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "..", "shared", "images")
	}
	if _, err := os.Stat(filepath.Join(dir, "README.md")); err != nil {
		t.Skipf("SKIPPED: there are no real images in %s (HOLDFAST_IMAGES names their folder)", dir)
	}
	return dir
}

// unpack writes a packed real image to dst as a sparse file.
func unpack(t testing.TB, src, dst string) {
	t.Helper()
	f, err := os.Open(src)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var r io.Reader = f
	switch filepath.Ext(src) {
	case ".gz":
		if r, err = gzip.NewReader(f); err != nil {
			t.Fatal(err)
		}
	case ".bz2":
		r = bzip2.NewReader(f)
	}
	w, err := os.Create(dst)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	off, p := int64(0), make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(r, p)
		if !disk.IsZero(p[:n]) {
			if _, err := w.WriteAt(p[:n], off); err != nil {
				t.Fatal(err)
			}
		}
		off += int64(n)
		if err != nil {
			break
		}
	}
	if err := w.Truncate(off); err != nil {
		t.Fatal(err)
	}
}

// TestRealImages reads images of other origins: a table in their folder's
// README.md tells name and content of each.
func TestRealImages(t *testing.T) {
	long(t)
	dir := realImages(t)
	readme, err := os.ReadFile(filepath.Join(dir, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for line := range strings.Lines(string(readme)) {
		col := strings.Split(line, "|")
		if len(col) < 7 || strings.TrimSpace(col[2]) != Name {
			continue
		}
		found++
		file, want := strings.Trim(col[1], " `"), strings.Trim(col[6], " `")
		t.Run(file, func(t *testing.T) {
			tmp := t.TempDir()
			unpack(t, filepath.Join(dir, file), filepath.Join(tmp, "a.vhdx"))
			c := openChain(t, tmp, "a.vhdx")
			if got := digest(t, c); got != want {
				t.Errorf("content %s, want %s", got, want)
			}
			l := c.Layers()[0]
			t.Logf("%+v", l.Info())
			for _, p := range problems(t, l) {
				t.Logf("check: %s", p)
			}
			if l.Info().DirtyLog != strings.Contains(file, "dirtylog") {
				t.Errorf("dirty log: %v", l.Info().DirtyLog)
			}
		})
	}
	if found == 0 {
		t.Fatal("README.md names no VHDX image")
	}
}
