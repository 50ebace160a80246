package folder

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unicode/utf16"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/hypervisor"
	"holdfast/internal/image"
	"holdfast/internal/image/vhdx"
)

// vhdxFile writes a disk as a VHDX file and returns the file's bytes.
func vhdxFile(t *testing.T, path string, d disk.Reader, id byte) []byte {
	t.Helper()
	o := vhdx.ViewOptions{DiskID: [16]byte{1}, DataID: [16]byte{id}}
	v, err := vhdx.NewView(t.Context(), d, o)
	ok(t, err)
	b := make([]byte, v.Size())
	ok(t, v.ReadAt(t.Context(), b, 0))
	ok(t, v.Close())
	ok(t, os.MkdirAll(filepath.Dir(path), 0o755))
	ok(t, os.WriteFile(path, b, 0o600))
	return b
}

// differing makes a VHDX file a checkpoint above the file with the data id
// parent, as Hyper-V writes it: [MS-VHDX] 2.6.2.
func differing(t *testing.T, path string, b []byte, parent byte, relative, absolute string) {
	t.Helper()
	var region int // the metadata region's offset, from the region table
	for e := 192<<10 + 16; ; e += 32 {
		if b[e] == 0x06 && b[e+1] == 0xa2 { // 8B7CA206-...
			region = int(binary.LittleEndian.Uint64(b[e+16:]))
			break
		}
	}
	count := int(binary.LittleEndian.Uint16(b[region+10:]))
	end := 0
	for i := range count {
		e := region + 32 + 32*i
		off, n := int(binary.LittleEndian.Uint32(b[e+16:])), int(binary.LittleEndian.Uint32(b[e+20:]))
		end = max(end, off+n)
		if b[e] == 0x37 { // file parameters, CAA16737-...
			b[region+off+4] |= 2 // it has a parent
		}
	}
	end = (end + 7) &^ 7
	var strs []byte
	utf := func(s string) (off, n int) {
		off = len(strs)
		for _, u := range utf16.Encode([]rune(s)) {
			strs = binary.LittleEndian.AppendUint16(strs, u)
		}
		return off, len(strs) - off
	}
	pairs := [][2]string{{"parent_linkage", "{0" + string("0123456789"[parent]) + "000000-0000-0000-0000-000000000000}"},
		{"absolute_win32_path", absolute}, {"relative_path", relative}, {"parent_linkage2", "{00000000-0000-0000-0000-000000000000}"}}
	kind, err := hex.DecodeString("b7ef4ab09ed1814ab78925b8e9445913")
	ok(t, err)
	item := append(kind, 0, 0, byte(len(pairs)), 0)
	var entries []byte
	base := len(item) + 12*len(pairs)
	for _, p := range pairs {
		ko, kn := utf(p[0])
		vo, vn := utf(p[1])
		entries = binary.LittleEndian.AppendUint32(entries, uint32(base+ko))
		entries = binary.LittleEndian.AppendUint32(entries, uint32(base+vo))
		entries = binary.LittleEndian.AppendUint16(entries, uint16(kn))
		entries = binary.LittleEndian.AppendUint16(entries, uint16(vn))
	}
	item = append(append(item, entries...), strs...)
	copy(b[region+end:], item)
	e := region + 32 + 32*count
	id, err := hex.DecodeString("2d5fd3a80bb34d45abf7d3d84834ab0c")
	ok(t, err)
	copy(b[e:], id)
	binary.LittleEndian.PutUint32(b[e+16:], uint32(end))
	binary.LittleEndian.PutUint32(b[e+20:], uint32(len(item)))
	b[e+24] = 4 // required
	binary.LittleEndian.PutUint16(b[region+10:], uint16(count+1))
	ok(t, os.MkdirAll(filepath.Dir(path), 0o755))
	ok(t, os.WriteFile(path, b, 0o600))
}

// part is a disk of which only the blocks that hold [off, end) are known to be
// more than zeros.
type part struct {
	*disk.Mem
	off, end int64
}

func (p part) Extents(_ context.Context, off, n int64) disk.Extents {
	return disk.Clip(disk.List(disk.Extent{Off: p.off, Len: p.end - p.off}), off, n)
}

// TestHyperVExport: disk and checkpoint in directories of their own, names as
// Windows writes them.
func TestHyperVExport(t *testing.T) {
	const size, block = 16 << 20, 2 << 20
	rnd := disktest.Rand(t)
	base, top := disk.NewMem(size), disk.NewMem(size)
	model := make([]byte, size)
	disktest.Fill(rnd, model)
	ok(t, base.WriteAt(t.Context(), model, 0))
	disktest.Fill(rnd, model[block:3*block])
	ok(t, top.WriteAt(t.Context(), model[block:3*block], block))

	dir := t.TempDir()
	parent := filepath.Join(dir, "mail/Virtual Hard Disks/Mail.vhdx")
	whole := vhdxFile(t, parent, base, 1)
	checkpoint := filepath.Join(dir, "mail/Snapshots/Mail_0F5C1C0E-7C8E-4B8C-9F1E-0D5E3B3C9A11.avhdx")
	differing(t, checkpoint, vhdxFile(t, checkpoint, part{top, block, 3 * block}, 2), 1, `.\mail.vhdx`, `C:\VMs\mail.vhdx`)
	raw(t, filepath.Join(dir, "mail/Virtual Machines/0F5C1C0E.vmcx"), 4096)
	raw(t, filepath.Join(dir, "mail/Virtual Hard Disks/Mail.vhdx.rct"), 4096)

	s := open(t, dir)
	if got := listing(t, s); got != "mail: Mail.vhdx" {
		t.Fatal(got)
	}
	p, err := snap(t, s, "mail", hypervisor.SnapshotOptions{})
	ok(t, err)
	reads(t, p, "Mail.vhdx", model)
	if c := p.VM().Config; len(c) != 1 || c[0].Name != "0F5C1C0E.vmcx" {
		t.Errorf("configuration %v", c)
	}
	commit(t, p)

	// Another disk of the right name, and none.
	vhdxFile(t, parent, base, 3)
	if _, err := snap(t, s, "mail", hypervisor.SnapshotOptions{}); !errors.Is(err, image.ErrParent) || !strings.Contains(err.Error(), "Mail.vhdx has the id 03000000-") {
		t.Errorf("another parent: %v", err)
	}
	ok(t, os.Rename(parent, filepath.Join(dir, "Mail.vhdx")))
	if _, err := snap(t, s, "mail", hypervisor.SnapshotOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no parent: %v", err)
	}

	// A copy of the disk at rest is a disk of its own, not one more.
	ok(t, os.WriteFile(filepath.Join(dir, "mail/Virtual Hard Disks/Mail.vhdx"), whole, 0o600))
	ok(t, os.WriteFile(filepath.Join(dir, "mail/copy.vhdx"), whole, 0o600))
	if got := listing(t, s); got != "Mail: Mail.vhdx; mail: Mail.vhdx, copy.vhdx" {
		t.Error(got)
	}
}

// TestVMwareFolder: a flat disk with two snapshots, as QEMU makes them.
func TestVMwareFolder(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	dir := filepath.Join(t.TempDir(), "app")
	ok(t, os.Mkdir(dir, 0o755))
	model := make([]byte, 8<<20)
	poke := func(file string, pattern byte, off, n int) {
		run(t, "qemu-io", "-f", "vmdk", "-c", "write -P "+string("0123456789"[pattern])+" "+strconv.Itoa(off)+" "+strconv.Itoa(n), filepath.Join(dir, file))
		for i := range n {
			model[off+i] = pattern
		}
	}
	run(t, "qemu-img", "create", "-f", "vmdk", "-o", "subformat=monolithicFlat", filepath.Join(dir, "app.vmdk"), "8M")
	poke("app.vmdk", 1, 0, 3<<20)
	for i, name := range []string{"app-000001.vmdk", "app-000002.vmdk"} {
		from := []string{"app.vmdk", "app-000001.vmdk"}[i]
		run(t, "qemu-img", "create", "-f", "vmdk", "-b", from, "-F", "vmdk", filepath.Join(dir, name))
		poke(name, byte(2+i), (i+1)<<20, 1<<20)
	}
	raw(t, filepath.Join(dir, "app.vmx"), 300)
	raw(t, filepath.Join(dir, "app-ctk.vmdk"), 300)
	s := open(t, filepath.Dir(dir))
	if got := listing(t, s); got != "app: app.vmdk" {
		t.Fatal(got)
	}
	p, err := snap(t, s, "app", hypervisor.SnapshotOptions{})
	ok(t, err)
	reads(t, p, "app.vmdk", model)
	commit(t, p)
	if err := os.Remove(filepath.Join(dir, "app-flat.vmdk")); err != nil {
		t.Fatal(err)
	}
	if _, err := snap(t, s, "app", hypervisor.SnapshotOptions{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without its extent: %v", err)
	}
}

// TestNamesake: a file that has the right name in another directory is not
// taken where no id tells that it is the right one.
func TestNamesake(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "db/base/root.qcow2")
	full(t, base, make([]byte, 1<<20))
	overlay(t, filepath.Join(dir, "db/top.qcow2"), 1<<20, "base/root.qcow2", "qcow2")
	flat := filepath.Join(dir, "app/app-flat.vmdk")
	raw(t, flat, 1<<20)
	ok(t, os.WriteFile(filepath.Join(dir, "app/app.vmdk"), []byte("# Disk DescriptorFile\nversion=1\nCID=0000000a\nparentCID=ffffffff\n"+
		"createType=\"monolithicFlat\"\nRW 2048 FLAT \"app-flat.vmdk\" 0\n"), 0o600))
	s := open(t, dir)
	for _, name := range []string{"db", "app"} {
		p, err := snap(t, s, name, hypervisor.SnapshotOptions{})
		ok(t, err)
		commit(t, p)
	}
	for _, path := range []string{base, flat} {
		old := filepath.Join(filepath.Dir(path), "old")
		if path == base {
			old = filepath.Join(dir, "db/old")
		}
		ok(t, os.Mkdir(old, 0o755))
		ok(t, os.Rename(path, filepath.Join(old, filepath.Base(path))))
	}
	if got := listing(t, s); got != "app: app.vmdk; db: root.qcow2, top.qcow2" {
		t.Error(got)
	}
	for _, name := range []string{"db", "app"} {
		if _, err := snap(t, s, name, hypervisor.SnapshotOptions{}); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestOnlyParentsAreHidden: of the files that may be a checkpoint's parent the
// others are disks of their own.
func TestOnlyParentsAreHidden(t *testing.T) {
	dir := t.TempDir()
	d := disk.NewMem(4 << 20)
	vhdxFile(t, filepath.Join(dir, "mail/Disks/mail.vhdx"), d, 1)
	vhdxFile(t, filepath.Join(dir, "mail/Snapshots/mail.vhdx"), d, 3)
	checkpoint := filepath.Join(dir, "mail/Snapshots/mail_0F5C1C0E-7C8E-4B8C-9F1E-0D5E3B3C9A11.avhdx")
	differing(t, checkpoint, vhdxFile(t, checkpoint, d, 2), 1, `..\Disks\mail.vhdx`, `C:\VMs\mail.vhdx`)
	if got := listing(t, open(t, dir)); got != "mail: mail.vhdx, mail_0F5C1C0E-7C8E-4B8C-9F1E-0D5E3B3C9A11.avhdx" {
		t.Error(got)
	}
}

// TestGuestHidesNothing: what a guest writes into a disk that a descriptor
// names is no image that needs others.
func TestGuestHidesNothing(t *testing.T) {
	dir := t.TempDir()
	full(t, filepath.Join(dir, "db/root.qcow2"), make([]byte, 1<<20))
	ok(t, os.Mkdir(filepath.Join(dir, "app"), 0o755))
	overlay(t, filepath.Join(dir, "app/data.vmdk"), 1<<20, "../db/root.qcow2", "qcow2")
	ok(t, os.Truncate(filepath.Join(dir, "app/data.vmdk"), 1<<20))
	ok(t, os.WriteFile(filepath.Join(dir, "app/app.vmdk"), []byte("# Disk DescriptorFile\nversion=1\nCID=0000000a\nparentCID=ffffffff\n"+
		"createType=\"monolithicFlat\"\nRW 2048 FLAT \"data.vmdk\" 0\n"), 0o600))
	if got := listing(t, open(t, dir)); got != "app: app.vmdk; db: root.qcow2" {
		t.Error(got)
	}
}
