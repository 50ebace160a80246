package vmdk

import (
	"bytes"
	"compress/bzip2"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

var subformats = []string{"monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"}

func TestReadsWhatQEMUWrites(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	for _, sub := range subformats {
		for _, o := range []string{"", ",zeroed_grain=on"} {
			if o != "" && (strings.HasSuffix(sub, "Flat") || sub == "streamOptimized") {
				continue
			}
			t.Run(sub+o, func(t *testing.T) {
				rnd, dir := disktest.Rand(t), t.TempDir()
				const size = 6<<20 + 5*512
				model := random(rnd, size)
				raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "a b.vmdk")
				write(t, raw, model)
				run(t, "qemu-img", "convert", "-t", "unsafe", "-f", "raw", "-O", "vmdk", "-o", "subformat="+sub+o, raw, path)
				c := openChain(t, dir, "a b.vmdk")
				compare(t, c, model, rnd)
				sound(t, c)
				if i := c.Layers()[0].Info(); i.Variant != sub || i.Format != Name || len(i.DataID) != 8 || i.Parent != nil || len(i.Warnings) > 0 {
					t.Errorf("info %+v", i)
				}
				if sub != "streamOptimized" {
					scribble(t, path, size, 30, rnd)
					c = openChain(t, dir, "a b.vmdk")
					compare(t, c, rawOf(t, path), rnd)
					sound(t, c)
				}
			})
		}
	}
}

// TestReadsBackingFiles: chains that QEMU makes, of different sizes too.
func TestReadsBackingFiles(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	for _, sub := range []string{"monolithicSparse", "twoGbMaxExtentSparse"} {
		t.Run(sub, func(t *testing.T) {
			rnd, dir := disktest.Rand(t), t.TempDir()
			size := int64(3<<20 + 7*512)
			path := filepath.Join(dir, "a.vmdk")
			run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat="+sub, path, fmt.Sprint(size))
			scribble(t, path, size, 20, rnd)
			for _, next := range []string{"b", "c"} {
				back := filepath.Base(path)
				path = filepath.Join(dir, next+".vmdk")
				run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-o", "zeroed_grain=on,subformat="+sub, "-F", "vmdk", "-b", back, path)
				scribble(t, path, size, 10, rnd)
			}
			c := openChain(t, dir, "c.vmdk")
			compare(t, c, rawOf(t, path), rnd)
			sound(t, c)
			child, parent := c.Layers()[0].Info(), c.Layers()[1].Info()
			if !slices.Equal(child.Parent.Names, []string{"b.vmdk"}) || !slices.Equal(child.Parent.IDs, []string{parent.DataID}) || child.Parent.Format != Name {
				t.Errorf("parent %+v of %s", child.Parent, parent.DataID)
			}
			// A parent that was written since is not the one.
			scribble(t, filepath.Join(dir, "b.vmdk"), size, 1, rnd)
			f, err := in(dir)(t.Context(), "x", "c.vmdk")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := formats.Open(t.Context(), f, Name, in(dir)); !errors.Is(err, image.ErrParent) {
				t.Errorf("changed parent: %v", err)
			}
		})
	}
}

// TestReadsLargeDisks: places beyond 4 GiB in the file and beyond 2 TiB on the
// disk, in many extents.
func TestReadsLargeDisks(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	for sub, size := range map[string]string{"monolithicSparse": "64G", "monolithicFlat": "5T", "twoGbMaxExtentFlat": "9G", "twoGbMaxExtentSparse": "9G"} {
		if testing.Short() && strings.HasSuffix(sub, "Sparse") {
			continue
		}
		t.Run(sub, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "a.vmdk")
			run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat="+sub, path, size)
			c := openChain(t, dir, "a.vmdk")
			n := c.Size()
			offs := []int64{0, 1<<31 - 512, 1<<32 - 1024, n/2 + 512, n - 4096}
			args := []string{"-f", "vmdk", "-t", "unsafe"}
			for i, off := range offs {
				args = append(args, "-c", fmt.Sprintf("write -P %d %d 4096", i+1, off))
			}
			run(t, "qemu-io", append(args, path)...)
			c = openChain(t, dir, "a.vmdk")
			for i, off := range offs {
				p := make([]byte, 4096)
				if err := c.ReadAt(t.Context(), p, off); err != nil {
					t.Fatal(err)
				}
				if want := bytes.Repeat([]byte{byte(i + 1)}, 4096); !bytes.Equal(p, want) {
					t.Errorf("at %d: %x", off, p[:16])
				}
			}
			sound(t, c)
		})
	}
}

// realImages is the folder of images from the field.
func realImages(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("HOLDFAST_IMAGES")
	if dir == "" {
		dir = filepath.Join("..", "..", "..", "..", "shared", "images")
	}
	if _, err := os.Stat(dir); err != nil {
		t.Skip("SKIPPED: no real images: set HOLDFAST_IMAGES to their folder")
	}
	return dir
}

func TestRealImages(t *testing.T) {
	dir := realImages(t)
	f, err := os.Open(filepath.Join(dir, "iotest-version3-v2.vmdk.bz2"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := io.ReadAll(bzip2.NewReader(f))
	if err != nil {
		t.Fatal(err)
	}
	all := files{"renamed.vmdk": b, "broken.vmdk": b[:len(b)-1024], "padded.vmdk": append(bytes.Clone(b), make([]byte, 5000)...)}
	for _, name := range []string{"renamed.vmdk", "padded.vmdk"} {
		c, err := all.open(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if i := c.Layers()[0].Info(); i.DataID != "a454774a" || i.Variant != "streamOptimized" || i.Size != 16<<30 {
			t.Errorf("info %+v", i)
		}
		sound(t, c)
		// The whole disk takes ten seconds to hash. So that is done when asked
		// for; its data, with their offsets, always.
		if sum := sumOf(t, c, false); sum != "d130a5e6b69a6700cfff40e5a105685143882a8276118cfc1b26d8206206dd2f" {
			t.Errorf("%s: data %s", name, sum)
		}
		if os.Getenv("HOLDFAST_IMAGES") != "" && name == "renamed.vmdk" {
			if sum := sumOf(t, c, true); sum != "0859bb3397bc1d30fa979c80a289ce98bfd6c1141a64594d6f3cc8cd68218faf" {
				t.Errorf("%s: content %s", name, sum)
			}
		}
	}
	if _, err := all.open(t.Context(), "broken.vmdk"); !errors.Is(err, image.ErrFormat) || !strings.Contains(err.Error(), "truncated") {
		t.Errorf("without its end: %v", err)
	}
	bad, err := os.ReadFile(filepath.Join(dir, "gvp-invalid.vmdk"))
	if err != nil {
		t.Fatal(err)
	}
	all["bad"] = bad // its overhead is more than the file, and there is no descriptor
	if _, err := all.open(t.Context(), "bad"); !errors.Is(err, image.ErrFormat) || !strings.Contains(err.Error(), "truncated") {
		t.Errorf("gvp-invalid: %v", err)
	}
}

// sumOf is the SHA-256 of a disk: of all, or of its extents of data, each after
// its offset and length.
func sumOf(t *testing.T, c *image.Chain, whole bool) string {
	t.Helper()
	h, buf, zeros := sha256.New(), make([]byte, 1<<20), make([]byte, 1<<20)
	for e, err := range c.Extents(t.Context(), 0, c.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Zero && !whole {
			continue
		}
		if !whole {
			fmt.Fprintln(h, e.Off, e.Len)
		}
		for e.Len > 0 {
			n := min(e.Len, int64(len(buf)))
			p := zeros[:n]
			if !e.Zero {
				p = buf[:n]
				if err := c.ReadAt(t.Context(), p, e.Off); err != nil {
					t.Fatal(err)
				}
			}
			h.Write(p)
			e.Off, e.Len = e.Off+n, e.Len-n
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

// TestRenamedFileReadsItself: the name in its own descriptor leads nowhere, or
// to another disk.
func TestRenamedFileReadsItself(t *testing.T) {
	need(t, "qemu-img")
	rnd, dir := disktest.Rand(t), t.TempDir()
	models := map[string][]byte{}
	for _, name := range []string{"a", "b"} {
		models[name] = random(rnd, 1<<20)
		write(t, filepath.Join(dir, "raw"), models[name])
		run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", filepath.Join(dir, "raw"), filepath.Join(dir, name+".vmdk"))
	}
	if err := errors.Join(os.Rename(filepath.Join(dir, "a.vmdk"), filepath.Join(dir, "c.vmdk")), os.Rename(filepath.Join(dir, "b.vmdk"), filepath.Join(dir, "a.vmdk"))); err != nil {
		t.Fatal(err)
	}
	compare(t, openChain(t, dir, "c.vmdk"), models["a"], rnd)
	compare(t, openChain(t, dir, "a.vmdk"), models["b"], rnd)
}
