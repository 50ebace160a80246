package node

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image/vhdx"
	"holdfast/internal/mover"
	"holdfast/internal/repo"
)

// place writes a disk of 4 MiB with random bytes in its first MiB as a file of
// a folder of its own: raw, or VHDX when sector is not 0.
func place(t *testing.T, name string, sector int64) (path string) {
	t.Helper()
	var d disk.Reader = disk.NewMem(4 << 20)
	b := make([]byte, 1<<20)
	disktest.Fill(disktest.Rand(t), b)
	if err := d.(*disk.Mem).WriteAt(t.Context(), b, 0); err != nil {
		t.Fatal(err)
	}
	if sector > 0 {
		var err error
		if d, err = vhdx.NewView(t.Context(), d, vhdx.ViewOptions{LogicalSector: sector}); err != nil {
			t.Fatal(err)
		}
	}
	b = make([]byte, d.Size())
	if err := d.ReadAt(t.Context(), b, 0); err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A disk of 4096-byte sectors is not to be found by its guest when it has
// others.
func TestConvertKeepsSectors(t *testing.T) {
	src := place(t, "a.vhdx", 4096)
	var notes []string
	n := New(Options{Report: Report{Note: func(s string) { notes = append(notes, s) }}})
	for _, format := range []string{"vhdx", "vhdx-fixed", "qcow2"} {
		to := filepath.Join(t.TempDir(), "b")
		if _, err := n.ImageConvert(t.Context(), ImageRequest{Path: src}, to, format); err != nil {
			t.Fatal(err)
		}
		i, err := n.ImageInfo(t.Context(), ImageRequest{Path: to})
		if err != nil {
			t.Fatal(err)
		}
		if want := map[bool]int64{true: 4096}[format != "qcow2"]; i.LogicalSector != want {
			t.Errorf("%s: sectors of %d bytes", format, i.LogicalSector)
		}
	}
	if len(notes) != 1 || !strings.Contains(notes[0], "4096") {
		t.Errorf("notes: %q", notes)
	}
}

// So it is when it comes back from a restore point.
func TestRestoreKeepsSectors(t *testing.T) {
	src, dir := place(t, "a.vhdx", 4096), t.TempDir()
	n := New(Options{
		Repo: filepath.Join(dir, "repo"), State: filepath.Join(dir, "state"),
		Passphrase: func(context.Context, bool) ([]byte, error) { return []byte("a passphrase"), nil },
	})
	defer n.Close()
	if _, err := n.Init(t.Context(), repo.Immutability{}); err != nil {
		t.Fatal(err)
	}
	results, err := n.Backup(t.Context(), BackupRequest{Host: filepath.Dir(src)})
	if err != nil || len(results) != 1 || results[0].Err != nil {
		t.Fatal(results, err)
	}
	p, err := n.Point(t.Context(), "a@latest")
	if err != nil {
		t.Fatal(err)
	}
	files, err := n.RestoreFiles(t.Context(), p, FilesRequest{Dir: filepath.Join(dir, "to")})
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	i, err := n.ImageInfo(t.Context(), ImageRequest{Path: files[0].File})
	if err != nil || i.LogicalSector != 4096 {
		t.Errorf("%+v, %v", i, err)
	}
}

func TestConvertTargets(t *testing.T) {
	src, dir := place(t, "a.raw", 0), t.TempDir()
	n := New(Options{})
	for _, to := range []string{dir + "/", dir, dir + "/.", dir + "/..", "", dir + "/missing/b"} {
		if r, err := n.ImageConvert(t.Context(), ImageRequest{Path: src}, to, "raw"); err == nil {
			t.Errorf("%q: wrote %v", to, r)
		}
	}
	// What cannot be said of a disk is known before it is written.
	_, err := n.ImageConvert(t.Context(), ImageRequest{Path: src}, dir+`/a"b.vmdk`, "vmdk-flat")
	if err == nil {
		t.Error("wrote a VMDK of an impossible name")
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) > 0 {
		t.Errorf("left %v, %v", list, err)
	}
}

// What is written while it is read is nobody's disk.
func TestConvertChangedSource(t *testing.T) {
	src, to := place(t, "a.raw", 0), filepath.Join(t.TempDir(), "b")
	touch := func() {
		if err := os.Chtimes(src, time.Time{}, time.Now().Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	end := func() {}
	n := New(Options{Report: Report{Task: func(string, *mover.Meter) func() { touch(); return end }}})
	_, err := n.ImageConvert(t.Context(), ImageRequest{Path: src}, to, "raw")
	if err == nil || !strings.Contains(err.Error(), src+" was changed") {
		t.Errorf("convert: %v", err)
	}
	if _, err := os.Stat(to); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it left a file: %v", err)
	}
	if _, err := n.ImageCompare(t.Context(), ImageRequest{Path: src}, ImageRequest{Path: src}); err == nil {
		t.Error("compare: no error")
	}
}

// A link that the operator names is followed; one that an image names is not.
func TestImageThroughLink(t *testing.T) {
	src, link := place(t, "a.vhdx", 512), filepath.Join(t.TempDir(), "l.vhdx")
	if err := os.Symlink(src, link); err != nil {
		t.Skip(err)
	}
	i, err := New(Options{}).ImageInfo(t.Context(), ImageRequest{Path: link})
	if err != nil || i.Format != "vhdx" {
		t.Errorf("%v, %v", i, err)
	}
}

// The stored size of a snapshot is that of its extents too.
func TestStoredSize(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, size int64) {
		t.Helper()
		path := filepath.Join(dir, name)
		err := os.WriteFile(path, []byte(text), 0o600)
		if err == nil && size > 0 {
			err = os.Truncate(path, size)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	text := func(cid, parent, extent, hint string) string {
		return "# Disk DescriptorFile\nversion=1\nCID=" + cid + "\nparentCID=" + parent + "\ncreateType=\"monolithicFlat\"\n" + hint +
			"RW 2048 FLAT \"" + extent + "\" 0\n"
	}
	base := text("0000000a", "ffffffff", "a-flat.vmdk", "")
	top := text("0000000b", "0000000a", "b-flat.vmdk", "parentFileNameHint=\"a.vmdk\"\n")
	write("a.vmdk", base, 0)
	write("a-flat.vmdk", "", 1<<20)
	write("b.vmdk", top, 0)
	write("b-flat.vmdk", "", 1<<20)
	n := New(Options{})
	for _, missing := range []bool{false, true} {
		i, err := n.ImageInfo(t.Context(), ImageRequest{Path: filepath.Join(dir, "b.vmdk")})
		if err != nil || i.StoredSize != 1<<20+int64(len(top)) || len(i.Chain) == 1 == missing {
			t.Errorf("%+v, %v", i, err)
		}
		if !missing && i.Chain[0].StoredSize != 1<<20+int64(len(base)) {
			t.Errorf("%+v", i.Chain)
		}
		write("a.vmdk", text("0000000c", "ffffffff", "a-flat.vmdk", ""), 0)
	}
}
