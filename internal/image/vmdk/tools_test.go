package vmdk

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
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

// need skips the test, loudly, where a tool is not installed.
func need(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: %s is not installed", tool)
		}
	}
}

// try runs a command in the folder of its last argument.
func try(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	if last := args[len(args)-1]; filepath.IsAbs(last) {
		cmd.Dir = filepath.Dir(last)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out), err
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := try(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
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

// files resolves names among files in memory.
type files map[string][]byte

func (fs files) resolve(ctx context.Context, from, name string) (image.File, error) {
	p, err := image.Join(from, name)
	if err != nil {
		return image.File{}, err
	}
	return fs.file(ctx, p)
}

func (all files) file(ctx context.Context, name string) (image.File, error) {
	b, ok := all[name]
	if !ok {
		return image.File{}, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
	}
	return image.File{Name: name, Disk: memOf(ctx, b)}, nil
}

// open opens one of them as a chain.
func (all files) open(ctx context.Context, name string) (*image.Chain, error) {
	f, err := all.file(ctx, name)
	if err != nil {
		return nil, err
	}
	return formats.Open(ctx, f, Name, all.resolve)
}

// walk opens one of them and reads it as far as it is bearable, and checks it.
func (all files) walk(ctx context.Context, name string) error {
	f, err := all.file(ctx, name)
	if err != nil {
		return err
	}
	im, err := Open(ctx, f, all.resolve)
	if err != nil {
		return err
	}
	defer im.Close()
	if err := readAll(ctx, im); err != nil {
		return err
	}
	return im.Check(ctx, func(string) {})
}

// readAll reads what data an image has, a few MiB at most.
func readAll(ctx context.Context, im *Image) error {
	p := make([]byte, 256<<10)
	runs := 0
	for r, err := range im.Runs(ctx, 0, im.Info().Size) {
		if err != nil {
			return err
		}
		if runs++; runs > 1000 {
			return nil
		}
		if r.State == image.Data {
			if err := im.ReadAt(ctx, p[:min(r.Len, int64(len(p)))], r.Off); err != nil {
				return err
			}
		}
	}
	return nil
}

func memOf(ctx context.Context, b []byte) *disk.Mem {
	m := disk.NewMem(int64(len(b)))
	if err := m.WriteAt(ctx, b, 0); err != nil {
		panic(err) // a context that has ended
	}
	return m
}

var formats = image.Formats{Format()}

// openChain opens dir/name as a VMDK image.
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

// problems are what Check says of all layers.
func problems(t testing.TB, c *image.Chain) []string {
	t.Helper()
	var list []string
	for _, l := range c.Layers() {
		if err := l.Check(t.Context(), func(p string) { list = append(list, p) }); err != nil {
			t.Fatal(err)
		}
	}
	return list
}

// sound checks that Check finds nothing.
func sound(t testing.TB, c *image.Chain) {
	t.Helper()
	if list := problems(t, c); len(list) > 0 {
		t.Errorf("check: %s", strings.Join(list[:min(10, len(list))], "\n"))
	}
}

// rawOf is the whole disk as qemu-img reads it.
func rawOf(t testing.TB, path string) []byte {
	t.Helper()
	out := filepath.Join(filepath.Dir(path), "model")
	defer os.Remove(out)
	run(t, "qemu-img", "convert", "-t", "unsafe", "-f", "vmdk", "-O", "raw", path, out)
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// scribble makes n random writes and zeroes through qemu-io.
func scribble(t testing.TB, path string, size int64, n int, rnd *rand.Rand) {
	t.Helper()
	args := []string{"-f", "vmdk", "-t", "unsafe"}
	for range n {
		off := rnd.Int64N(size/512) * 512
		length := min(512*(1+rnd.Int64N(600)), size-off)
		cmd := fmt.Sprintf("write -P %d %d %d", 1+rnd.IntN(255), off, length)
		if rnd.IntN(4) == 0 {
			off, length = off&^0xffff, min(1<<18, size-off&^0xffff)
			cmd = fmt.Sprintf("write -z %d %d", off, length)
		}
		args = append(args, "-c", cmd)
	}
	run(t, "qemu-io", append(args, path)...)
}

// random is disk content: runs of random and of repeated bytes, and zeros.
func random(rnd *rand.Rand, size int64) []byte {
	b := make([]byte, size)
	for off := int64(0); off < size; {
		n := min(512*(1+rnd.Int64N(1000)), size-off)
		switch p := b[off : off+n]; rnd.IntN(3) {
		case 0:
			disktest.Fill(rnd, p)
		case 1:
			copy(p, bytes.Repeat([]byte{byte(rnd.Uint32()), 7, 9}, len(p)/3))
		}
		off += 2 * n
	}
	return b
}

// write writes a file of the test.
func write(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// warned reports whether a warning of the image has the text.
func warned(i image.Info, text string) bool {
	return slices.ContainsFunc(i.Warnings, func(w string) bool { return strings.Contains(w, text) })
}
