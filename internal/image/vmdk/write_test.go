package vmdk

import (
	"bytes"
	"context"
	"errors"
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
	"holdfast/internal/mover"
)

// made is an image that we wrote, beside the disk's bytes in a raw file.
type made struct {
	dir, name, createType string
	model                 []byte // whole sectors
}

// somewhat is a disk of random content with much that is not there.
func somewhat(t testing.TB, rnd *rand.Rand, size int64) *disk.Mem {
	t.Helper()
	d := disk.NewMem(size)
	for range 12 {
		off := rnd.Int64N(size)
		p := random(rnd, min(1+rnd.Int64N(300<<10), size-off))
		if rnd.IntN(2) == 0 {
			disktest.Fill(rnd, p)
		}
		if err := d.WriteAt(t.Context(), p, off); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// modelOf is a disk's bytes, rounded up to sectors.
func modelOf(t testing.TB, d disk.Reader) []byte {
	t.Helper()
	b := make([]byte, up(d.Size(), sector)*sector)
	if err := d.ReadAt(t.Context(), b[:d.Size()], 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// save copies a view into a sparse file, as an export does.
func save(t testing.TB, v disk.Reader, path string) {
	t.Helper()
	f, err := disk.CreateFile(path, v.Size())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := mover.Copy(t.Context(), f, v, v.Extents(t.Context(), 0, v.Size()), mover.Options{}); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// sizes are those of disks that hit ends of sectors, grains and tables.
func sizes(rnd *rand.Rand) []int64 {
	if testing.Short() {
		return []int64{513, 33<<20 + 1 + rnd.Int64N(4<<20)}
	}
	return []int64{1, 3*ourGrain - 1, 32 << 20, 33<<20 + 512, 1 + rnd.Int64N(6<<20)}
}

// everyWay writes disks of several sizes in all forms that we have.
func everyWay(t *testing.T, check func(t *testing.T, m made)) {
	rnd := disktest.Rand(t)
	for _, size := range sizes(rnd) {
		d := somewhat(t, rnd, size)
		model := modelOf(t, d)
		for _, form := range []string{"sparse", "allocated", "stream", "flat", "vmfs"} {
			t.Run(fmt.Sprintf("%s of %d", form, size), func(t *testing.T) {
				m := made{dir: t.TempDir(), name: "a disk.vmdk", model: model}
				path := filepath.Join(m.dir, m.name)
				write(t, filepath.Join(m.dir, "raw"), model)
				switch form {
				case "sparse", "allocated":
					m.createType = "monolithicSparse"
					v, err := NewView(t.Context(), d, ViewOptions{Kind: map[string]Kind{"sparse": Sparse, "allocated": Allocated}[form], Name: m.name})
					if err != nil {
						t.Fatal(err)
					}
					save(t, v, path)
				case "stream":
					m.createType = "streamOptimized"
					var buf bytes.Buffer
					n, err := WriteStream(t.Context(), &buf, d, StreamOptions{Name: m.name})
					if err != nil || n != int64(buf.Len()) {
						t.Fatalf("%d of %d bytes: %v", n, buf.Len(), err)
					}
					write(t, path, buf.Bytes())
				default:
					m.createType = map[string]string{"flat": "monolithicFlat", "vmfs": "vmfs"}[form]
					s, err := FlatDescriptor(FlatOptions{Name: "a disk-flat.vmdk", Size: size, VMFS: form == "vmfs"})
					if err != nil {
						t.Fatal(err)
					}
					write(t, path, []byte(s))
					write(t, filepath.Join(m.dir, "a disk-flat.vmdk"), model)
				}
				check(t, m)
			})
		}
	}
}

// TestWritten reads all that we write with our own reader, and with those of
// others that are installed.
func TestWritten(t *testing.T) {
	var readers []func(*testing.T, made)
	for _, r := range []struct {
		tool string
		read func(*testing.T, made)
	}{{"qemu-img", byQEMU}, {"7z", by7Zip}, {"vmdkinfo", byLibvmdk}, {"vmdkmount", byLibvmdkMount}} {
		if _, err := exec.LookPath(r.tool); err != nil {
			t.Logf("NOT READ BY %s: it is not installed", r.tool)
			continue
		}
		if _, err := os.Stat("/dev/fuse"); r.tool == "vmdkmount" && (err != nil || os.Getuid() != 0) {
			t.Log("NOT READ BY vmdkmount: it takes root and /dev/fuse")
			continue
		}
		readers = append(readers, r.read)
	}
	everyWay(t, func(t *testing.T, m made) {
		t.Parallel()
		c := openChain(t, m.dir, m.name)
		compare(t, c, m.model, disktest.Rand(t))
		sound(t, c)
		if i := c.Layers()[0].Info(); i.Variant != m.createType || len(i.Warnings) > 0 || len(i.DiskID) != 47 {
			t.Errorf("info %+v", i)
		}
		for _, read := range readers {
			read(t, m)
		}
	})
}

func byQEMU(t *testing.T, m made) {
	path := filepath.Join(m.dir, m.name)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "vmdk", filepath.Join(m.dir, "raw"), path)
	if info := run(t, "qemu-img", "info", "-f", "vmdk", path); !strings.Contains(info, "create type: "+m.createType) || !strings.Contains(info, fmt.Sprintf("(%d bytes)", len(m.model))) {
		t.Errorf("info %s", info)
	}
	if !strings.HasSuffix(m.createType, "Flat") && m.createType != "vmfs" {
		run(t, "qemu-img", "check", "-f", "vmdk", path)
	}
}

func by7Zip(t *testing.T, m made) {
	out, err := exec.Command("7z", "x", "-so", "-tVMDK", filepath.Join(m.dir, m.name)).Output()
	if err != nil {
		t.Error(err)
	} else if !bytes.Equal(out, m.model) {
		t.Errorf("7z: %d bytes that differ, want %d", len(out), len(m.model))
	}
}

func byLibvmdk(t *testing.T, m made) {
	if out := run(t, "vmdkinfo", filepath.Join(m.dir, m.name)); !strings.Contains(out, fmt.Sprintf("(%d bytes)", len(m.model))) {
		t.Errorf("vmdkinfo: %s", out)
	}
}

// byLibvmdkMount reads all through a FUSE mount, but for monolithicFlat, which
// it refuses from others too.
func byLibvmdkMount(t *testing.T, m made) {
	if m.createType == "monolithicFlat" {
		return
	}
	point := t.TempDir()
	run(t, "vmdkmount", filepath.Join(m.dir, m.name), point)
	defer run(t, "umount", "-l", point)
	got, err := os.ReadFile(filepath.Join(point, "vmdk1"))
	if err != nil {
		t.Error(err)
	} else if !bytes.Equal(got, m.model) {
		t.Error("vmdkmount: content differs")
	}
}

// TestViewIsTheSameAgain: and differs when no ID is given.
func TestViewIsTheSameAgain(t *testing.T) {
	rnd := disktest.Rand(t)
	d := somewhat(t, rnd, 5<<20)
	read := func(o ViewOptions) []byte {
		v, err := NewView(t.Context(), d, o)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, v.Size())
		if err := v.ReadAt(t.Context(), b, 0); err != nil {
			t.Fatal(err)
		}
		disktest.Reader(t, v, b)
		return b
	}
	o := ViewOptions{ID: [16]byte{1, 2, 15: 9}}
	if !bytes.Equal(read(o), read(o)) {
		t.Error("views with one ID differ")
	}
	if bytes.Equal(read(ViewOptions{}), read(ViewOptions{})) {
		t.Error("views without an ID are the same")
	}
	for _, last := range []string{"\x00\x00\x00\x00", "\xff\xff\xff\xff", "\xff\xff\xff\xfe"} {
		o := ViewOptions{ID: [16]byte{1}}
		copy(o.ID[12:], last)
		c, err := files{"a": read(o)}.open(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		if id := c.Layers()[0].Info().DataID; id == "00000000" || id >= "fffffffe" {
			t.Errorf("content id %s", id)
		}
	}
}

// known is a disk that is there only in its extents: data is a byte for each
// grain.
type known struct {
	size int64
	data []disk.Extent
}

func (k known) Size() int64  { return k.size }
func (k known) Close() error { return nil }

func (k known) ReadAt(ctx context.Context, p []byte, off int64) error {
	for i := range p {
		p[i] = byte((off+int64(i))/ourGrain) | 1
	}
	return ctx.Err()
}

func (k known) Extents(_ context.Context, off, n int64) disk.Extents {
	return disk.Clip(func(yield func(disk.Extent, error) bool) {
		at := int64(0)
		for _, e := range append(k.data, disk.Extent{Off: k.size}) {
			if e.Off > at && !yield(disk.Extent{Off: at, Len: e.Off - at, Zero: true}, nil) {
				return
			}
			if e.Len > 0 && !yield(e, nil) {
				return
			}
			at = e.End()
		}
	}, off, n)
}

// TestLargestView: a file whose sector numbers need all of their 32 bits.
func TestLargestView(t *testing.T) {
	d := known{size: MaxSparse, data: []disk.Extent{{Off: 0, Len: MaxSparse - 1<<30}}}
	v, err := NewView(t.Context(), d, ViewOptions{})
	if err != nil {
		t.Fatal(err)
	}
	im, err := Open(t.Context(), image.File{Name: "v", Disk: v}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if im.Info().Size != MaxSparse {
		t.Errorf("size %d", im.Info().Size)
	}
	for _, off := range []int64{0, 1 << 31, 1<<32 - 100, 1 << 40, MaxSparse - 1<<30 - 1000, MaxSparse - 1000} {
		p, want := make([]byte, 1000), make([]byte, 1000)
		if err := im.ReadAt(t.Context(), p, off); err != nil {
			t.Fatal(err)
		}
		if off < MaxSparse-1<<30 {
			_ = d.ReadAt(t.Context(), want, off)
		}
		if !bytes.Equal(p, want) {
			t.Errorf("at %d: %x", off, p[:10])
		}
	}
	for _, o := range []struct {
		size int64
		kind Kind
	}{{0, Sparse}, {MaxSparse + 1, Sparse}, {MaxSparse, Allocated}} {
		if _, err := NewView(t.Context(), known{size: o.size}, ViewOptions{Kind: o.kind}); err == nil {
			t.Errorf("a view of %d bytes, kind %d", o.size, o.kind)
		}
	}
}

// TestLargeStream: 64 TiB of which little is there.
func TestLargeStream(t *testing.T) {
	d := known{size: MaxFlat, data: []disk.Extent{{Off: 3 << 20, Len: 2 << 20}, {Off: 5<<40 + 7, Len: 300 << 10}, {Off: MaxFlat - 100, Len: 100}}}
	var buf bytes.Buffer
	if _, err := WriteStream(t.Context(), &buf, d, StreamOptions{}); err != nil {
		t.Fatal(err)
	}
	c, err := files{"a": buf.Bytes()}.open(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	sound(t, c)
	for _, off := range []int64{3 << 20, 5<<20 - 1000, 5<<40 + 7, MaxFlat - 100} {
		p, want := make([]byte, 100), make([]byte, 100)
		if err := c.ReadAt(t.Context(), p, off); err != nil {
			t.Fatal(err)
		}
		if _ = d.ReadAt(t.Context(), want, off); !bytes.Equal(p, want) {
			t.Errorf("at %d: %x", off, p[:10])
		}
	}
	if _, err := WriteStream(t.Context(), &buf, known{size: MaxFlat + 1}, StreamOptions{}); err == nil {
		t.Error("a larger one is written")
	}
}

// TestStreamStops: with the disk's error, the writer's, and the context's.
func TestStreamStops(t *testing.T) {
	rnd := disktest.Rand(t)
	d := disk.NewMem(20 << 20)
	p := make([]byte, d.Size())
	disktest.Fill(rnd, p)
	if err := d.WriteAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	full := &limited{n: 3 << 20}
	if n, err := WriteStream(t.Context(), full, d, StreamOptions{Workers: 3}); !errors.Is(err, errFull) || n > 3<<20 {
		t.Errorf("full: %d, %v", n, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := int64(0)
	_, err := WriteStream(ctx, &limited{n: 1 << 40}, d, StreamOptions{Workers: 2, Progress: func(n int64) {
		if done += n; done > 5<<20 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	done = 0
	if _, err := WriteStream(t.Context(), &limited{n: 1 << 40}, d, StreamOptions{Progress: func(n int64) { done += n }}); err != nil || done != d.Size() {
		t.Errorf("progress %d, %v", done, err)
	}
	broken := brokenDisk{Reader: d, at: 13 << 20}
	if _, err := WriteStream(t.Context(), &limited{n: 1 << 40}, broken, StreamOptions{Workers: 4}); !errors.Is(err, errFull) {
		t.Errorf("broken disk: %v", err)
	}
}

var errFull = errors.New("no more")

type limited struct{ n int }

func (l *limited) Write(p []byte) (int, error) {
	if len(p) > l.n {
		return 0, errFull
	}
	l.n -= len(p)
	return len(p), nil
}

type brokenDisk struct {
	disk.Reader
	at int64
}

func (b brokenDisk) ReadAt(ctx context.Context, p []byte, off int64) error {
	if off <= b.at && b.at < off+int64(len(p)) {
		return errFull
	}
	return b.Reader.ReadAt(ctx, p, off)
}

func TestNamesOfViews(t *testing.T) {
	for _, name := range []string{"a/b", `a\b`, "a\"b", "a\nb", "a\x00", "a\xffb", strings.Repeat("x", 300)} {
		if _, err := FlatDescriptor(FlatOptions{Name: name, Size: 512}); err == nil {
			t.Errorf("name %q", name)
		}
		if _, err := NewView(t.Context(), known{size: 512}, ViewOptions{Name: name}); err == nil {
			t.Errorf("view called %q", name)
		}
	}
	s, err := FlatDescriptor(FlatOptions{Name: "Größe 日本-flat.vmdk", Size: 5<<40 + 1, VMFS: true, ID: [16]byte{15: 7}})
	if err != nil {
		t.Fatal(err)
	}
	d, err := parseDescriptor([]byte(s))
	if err != nil || d.extents[0].name != "Größe 日本-flat.vmdk" || d.size() != 5<<40+512 || d.cid != "00000007" || d.createType != "vmfs" {
		t.Errorf("%+v, %v of\n%s", d, err, s)
	}
	if !strings.Contains(s, `ddb.uuid = "60 00 c2 90 00 00 00 00-00 00 00 00 00 00 00 07"`) || !strings.Contains(s, `RW 10737418241 VMFS "Größe`) {
		t.Errorf("%s", s)
	}
	if _, err := FlatDescriptor(FlatOptions{Size: 512}); err == nil {
		t.Error("a flat file without a name")
	}
}
