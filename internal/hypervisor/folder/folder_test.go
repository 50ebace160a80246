package folder

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/hypervisor"
	"holdfast/internal/hypervisor/hypertest"
	"holdfast/internal/image"
	"holdfast/internal/image/qcow2"
)

var owner = hypervisor.Owner{Repository: "aaaaaaaaaaaaaaaa", History: "bbbbbbbbbbbbbbbb", Session: "cccc"}

// need skips the test, loudly, where a tool is not installed.
func need(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED: %s is not installed", tool)
		}
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// raw writes a file of random bytes and returns them.
func raw(t testing.TB, path string, size int) []byte {
	t.Helper()
	ok(t, os.MkdirAll(filepath.Dir(path), 0o755))
	b := make([]byte, size)
	disktest.Fill(disktest.Rand(t), b)
	ok(t, os.WriteFile(path, b, 0o600))
	return b
}

// full writes a qcow2 image with the given bytes.
func full(t testing.TB, path string, b []byte) {
	t.Helper()
	ok(t, os.MkdirAll(filepath.Dir(path), 0o755))
	w, err := qcow2.Create(path, int64(len(b)), qcow2.Options{})
	ok(t, err)
	ok(t, w.WriteAt(t.Context(), b, 0))
	ok(t, w.Close())
}

func overlay(t testing.TB, path string, size int64, backing, format string) {
	t.Helper()
	ok(t, qcow2.CreateOverlay(path, size, backing, format, qcow2.Options{}))
}

func open(t testing.TB, dir string) *Source {
	t.Helper()
	s, err := Open(dir)
	ok(t, err)
	t.Cleanup(func() { ok(t, s.Close()) })
	return s
}

// listing is "name: disk, disk; name: ...".
func listing(t testing.TB, s *Source) string {
	t.Helper()
	list, err := s.VMs(t.Context())
	ok(t, err)
	var all []string
	for _, v := range list {
		var disks []string
		for _, d := range v.Disks {
			disks = append(disks, string(d.ID))
		}
		all = append(all, v.Name+": "+strings.Join(disks, ", "))
	}
	return strings.Join(all, "; ")
}

func byName(t testing.TB, s *Source, name string) hypervisor.VM {
	t.Helper()
	list, err := s.VMs(t.Context())
	ok(t, err)
	for _, v := range list {
		if v.Name == name {
			return v
		}
	}
	t.Fatalf("no VM %s", name)
	return hypervisor.VM{}
}

// snap takes a snapshot of the VM of a name.
func snap(t testing.TB, s *Source, name string, o hypervisor.SnapshotOptions) (hypervisor.Snapshot, error) {
	t.Helper()
	out := s.Snapshot(t.Context(), []hypervisor.Request{{VM: byName(t, s, name).ID, Owner: owner}}, o)
	if len(out) != 1 || (out[0].Snapshot == nil) == (out[0].Err == nil) {
		t.Fatalf("outcomes %+v", out)
	}
	if p := out[0].Snapshot; p != nil {
		t.Cleanup(func() { ok(t, p.Close()) })
	}
	return out[0].Snapshot, out[0].Err
}

// reads checks a disk of a snapshot.
func reads(t *testing.T, p hypervisor.Snapshot, id hypervisor.DiskID, want []byte) {
	t.Helper()
	d, err := p.Open(t.Context(), id)
	ok(t, err)
	disktest.Reader(t, d, want)
	ok(t, d.Close())
}

func commit(t testing.TB, p hypervisor.Snapshot) {
	t.Helper()
	if ref, err := p.Commit(t.Context()); ref != "" || err != nil {
		t.Fatalf("commit: %q, %v", ref, err)
	}
}

func TestLists(t *testing.T) {
	dir := t.TempDir()
	b := raw(t, filepath.Join(dir, "web.raw"), 300<<10)
	full(t, filepath.Join(dir, "web.qcow2"), b)
	raw(t, filepath.Join(dir, "web/disk.img"), 4096)
	raw(t, filepath.Join(dir, "db/root.raw"), 4096)
	full(t, filepath.Join(dir, "db/data.qcow2"), b)
	full(t, filepath.Join(dir, "db/base.qcow2"), b)
	overlay(t, filepath.Join(dir, "db/top.qcow2"), 1<<20, "base.qcow2", "qcow2")
	full(t, filepath.Join(dir, "template.qcow2"), b)
	overlay(t, filepath.Join(dir, "clone.qcow2"), 1<<20, filepath.Join(dir, "template.qcow2"), "qcow2")
	full(t, filepath.Join(dir, "noextension"), b)
	raw(t, filepath.Join(dir, "empty/none.txt"), 10)
	raw(t, filepath.Join(dir, "deep/er/x.raw"), 4096)
	raw(t, filepath.Join(dir, ".hidden.raw"), 4096)
	raw(t, filepath.Join(dir, ".hidden/x.raw"), 4096)
	raw(t, filepath.Join(dir, "README.md"), 10)
	raw(t, filepath.Join(dir, "web.raw~"), 10)
	raw(t, filepath.Join(dir, "copy.raw.part"), 4096)
	raw(t, filepath.Join(dir, "old.vdi"), 4096)
	raw(t, filepath.Join(dir, "bad.vhdx"), 4096)
	raw(t, filepath.Join(dir, "lost-flat.vmdk"), 4096)
	overlay(t, filepath.Join(dir, "circle1.qcow2"), 1<<20, "circle2.qcow2", "qcow2")
	overlay(t, filepath.Join(dir, "circle2.qcow2"), 1<<20, "circle1.qcow2", "qcow2")

	s := open(t, dir)
	want := "bad: bad.vhdx; circle1: circle1.qcow2; circle2: circle2.qcow2; clone: clone.qcow2; db: data.qcow2, root.raw, top.qcow2; " +
		"deep: x.raw; lost-flat: lost-flat.vmdk; noextension: noextension; old: old.vdi; " +
		"web: disk.img; web: web.qcow2; web: web.raw"
	if got := listing(t, s); got != want {
		t.Errorf("listing\n%s, want\n%s", got, want)
	}
	ids := map[hypervisor.VMID]bool{}
	list, err := s.VMs(t.Context())
	ok(t, err)
	for _, v := range list {
		if ids[v.ID] || !filepath.IsAbs(string(v.ID)) || v.Kind != Kind || v.Host != dir || v.State != hypervisor.Stopped || len(v.Config) > 0 {
			t.Errorf("VM %+v", v)
		}
		ids[v.ID] = true
	}
	web := byName(t, s, "db")
	for i, want := range []hypervisor.Disk{{ID: "data.qcow2", Size: 300 << 10, Format: "qcow2"}, {ID: "root.raw", Size: 4096, Format: "raw"}, {ID: "top.qcow2", Size: 1 << 20, Format: "qcow2"}} {
		want.Path = filepath.Join(dir, "db", string(want.ID))
		if web.Disks[i] != want {
			t.Errorf("disk %+v, want %+v", web.Disks[i], want)
		}
	}
	for name, want := range map[string]error{"old": image.ErrUnsupported, "circle1": image.ErrFormat, "bad": image.ErrFormat, "lost-flat": image.ErrFormat} {
		if _, err := snap(t, s, name, hypervisor.SnapshotOptions{}); !errors.Is(err, want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	groups, err := s.Plan(t.Context(), []hypervisor.VMID{"a", "b"})
	if err != nil || fmt.Sprint(groups) != "[[a] [b]]" {
		t.Errorf("plan %v, %v", groups, err)
	}
}

func TestSnapshotOfSet(t *testing.T) {
	dir := t.TempDir()
	base := raw(t, filepath.Join(dir, "db/base.raw"), 700<<10)
	overlay(t, filepath.Join(dir, "db/root.qcow2"), 1<<20, "base.raw", "raw")
	data := raw(t, filepath.Join(dir, "db/data.raw"), 400<<10)
	raw(t, filepath.Join(dir, "db/none.raw"), 0)
	raw(t, filepath.Join(dir, "db/big.iso"), 2<<20)
	ok(t, os.WriteFile(filepath.Join(dir, "db/db.xml"), []byte("<domain/>"), 0o600))
	ok(t, os.WriteFile(filepath.Join(dir, "db/VARS.fd"), []byte{0, 1, 2}, 0o600))

	s := open(t, dir)
	for _, level := range []hypervisor.Consistency{"", hypervisor.Crash, hypervisor.Filesystem, hypervisor.Application} {
		p, err := snap(t, s, "db", hypervisor.SnapshotOptions{Consistency: level})
		ok(t, err)
		if want := cmp.Or(level, hypervisor.Filesystem); p.Consistency() != want {
			t.Errorf("level %q, want %q", p.Consistency(), want)
		}
		reads(t, p, "root.qcow2", append(slices.Clone(base), make([]byte, 1<<20-len(base))...))
		reads(t, p, "data.raw", data)
		var ids []string
		for _, d := range p.VM().Disks {
			ids = append(ids, fmt.Sprint(d.ID, " ", d.Excluded))
		}
		if fmt.Sprint(ids) != "[data.raw  none.raw the file is empty root.qcow2 ]" {
			t.Errorf("disks %q", ids)
		}
		if got := fmt.Sprintf("%s", p.VM().Config); got != "[{VARS.fd \x00\x01\x02} {db.xml <domain/>}]" {
			t.Errorf("config %q", got)
		}
		if got := fmt.Sprint(p.Notes()); !strings.Contains(got, "big.iso") {
			t.Errorf("notes %s", got)
		}
		if _, err := disk.Collect(p.Changed(t.Context(), "data.raw")); !errors.Is(err, hypervisor.ErrNoReference) {
			t.Errorf("changed: %v", err)
		}
		if _, err := p.Open(t.Context(), "vda"); !errors.Is(err, hypervisor.ErrNotExist) {
			t.Errorf("open of another disk: %v", err)
		}
		commit(t, p)
		ok(t, p.Close())
	}
	out := s.Snapshot(t.Context(), []hypervisor.Request{{VM: "/nowhere"}, {VM: byName(t, s, "db").ID}}, hypervisor.SnapshotOptions{})
	if !errors.Is(out[0].Err, hypervisor.ErrNotExist) || out[1].Err != nil {
		t.Errorf("outcomes %+v", out)
	}
	ok(t, out[1].Snapshot.Close())
}

// TestGuestCannotDecideFormat: a guest wrote the header of a qcow2 image into
// its own raw disk, with another VM's image as its backing file.
func TestGuestCannotDecideFormat(t *testing.T) {
	dir := t.TempDir()
	raw(t, filepath.Join(dir, "victim.raw"), 1<<20)
	for _, name := range []string{"evil.raw", "evil.img", "evil.disk", "evil"} {
		overlay(t, filepath.Join(dir, name), 1<<20, "victim.raw", "raw")
	}
	content, err := os.ReadFile(filepath.Join(dir, "evil.raw"))
	ok(t, err)
	// Images that say what they are, and that need nobody, are what they say.
	b := raw(t, filepath.Join(dir, ".b"), 300<<10)
	full(t, filepath.Join(dir, "cloud.img"), b)
	full(t, filepath.Join(dir, "plain"), b)

	s := open(t, dir)
	if got, want := listing(t, s), "cloud: cloud.img; evil: evil; evil: evil.img; evil: evil.raw; evil.disk: evil.disk; plain: plain; victim: victim.raw"; got != want {
		t.Errorf("listing\n%s, want\n%s", got, want)
	}
	list, err := s.VMs(t.Context())
	ok(t, err)
	for _, v := range list {
		out := s.Snapshot(t.Context(), []hypervisor.Request{{VM: v.ID, Owner: owner}}, hypervisor.SnapshotOptions{})[0]
		switch id := v.Disks[0].ID; id {
		case "evil.raw":
			ok(t, out.Err)
			reads(t, out.Snapshot, id, content)
			if !strings.Contains(fmt.Sprint(out.Snapshot.Notes()), "read as raw") {
				t.Errorf("notes %q", out.Snapshot.Notes())
			}
		case "cloud.img", "plain":
			ok(t, out.Err)
			reads(t, out.Snapshot, id, append(slices.Clone(b), make([]byte, -len(b)&511)...))
		case "victim.raw":
			ok(t, out.Err)
		default:
			if !errors.Is(out.Err, image.ErrFormat) || !strings.Contains(out.Err.Error(), "rename") {
				t.Errorf("%s: %v", id, out.Err)
			}
		}
		if out.Err == nil {
			ok(t, out.Snapshot.Close())
		}
	}
}

func TestNothingOutsideIsRead(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "vms")
	raw(t, filepath.Join(top, "secret.raw"), 1<<20)
	raw(t, filepath.Join(top, "outside/x.raw"), 4096)
	raw(t, filepath.Join(dir, "inside.raw"), 4096)
	ok(t, os.Symlink("../secret.raw", filepath.Join(dir, "link.raw")))
	ok(t, os.Symlink(filepath.Join(top, "secret.raw"), filepath.Join(dir, "abslink.raw")))
	ok(t, os.Symlink("nowhere", filepath.Join(dir, "dangling.qcow2")))
	ok(t, os.Symlink("inside.raw", filepath.Join(dir, "again.raw")))
	ok(t, os.Symlink("../outside", filepath.Join(dir, "dirlink")))
	ok(t, os.Symlink("../secret.raw", filepath.Join(dir, ".base")))
	overlay(t, filepath.Join(dir, "up.qcow2"), 1<<20, "../secret.raw", "raw")
	overlay(t, filepath.Join(dir, "abs.qcow2"), 1<<20, filepath.Join(top, "secret.raw"), "raw")
	overlay(t, filepath.Join(dir, "vialink.qcow2"), 1<<20, ".base", "raw")
	overlay(t, filepath.Join(dir, "nbd.qcow2"), 1<<20, "nbd://localhost/x", "raw")
	overlay(t, filepath.Join(dir, "json.qcow2"), 1<<20, `json:{"file.filename":"/etc/shadow"}`, "raw")
	ok(t, os.Mkdir(filepath.Join(dir, "pipe.raw"), 0o755)) // a directory by an image's name

	s := open(t, dir)
	want := "abs: abs.qcow2; abslink: abslink.raw; dangling: dangling.qcow2; inside: inside.raw; json: json.qcow2; link: link.raw; nbd: nbd.qcow2; up: up.qcow2; vialink: vialink.qcow2"
	if got := listing(t, s); got != want {
		t.Errorf("listing\n%s, want\n%s", got, want)
	}
	for _, name := range []string{"abs", "json", "nbd", "up"} {
		if _, err := snap(t, s, name, hypervisor.SnapshotOptions{}); !errors.Is(err, image.ErrOutside) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"link", "abslink", "dangling"} {
		if _, err := snap(t, s, name, hypervisor.SnapshotOptions{}); err == nil || !strings.Contains(err.Error(), "symbolic link") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := snap(t, s, "vialink", hypervisor.SnapshotOptions{}); err == nil {
		t.Error("a link out of the folder was followed to a backing file")
	}
}

// TestFolderByLink: ids are canonical, and absolute names of backing files
// hold by either path.
func TestFolderByLink(t *testing.T) {
	top := t.TempDir()
	b := raw(t, filepath.Join(top, "real/base.raw"), 1<<20)
	ok(t, os.Symlink("real", filepath.Join(top, "link")))
	overlay(t, filepath.Join(top, "real/a.qcow2"), 1<<20, filepath.Join(top, "link/base.raw"), "raw")
	overlay(t, filepath.Join(top, "real/b.qcow2"), 1<<20, filepath.Join(top, "real/base.raw"), "raw")
	s, direct := open(t, filepath.Join(top, "link")), open(t, filepath.Join(top, "real"))
	for _, name := range []string{"a", "b"} {
		if x, y := byName(t, s, name).ID, byName(t, direct, name).ID; x != y {
			t.Errorf("ids %s and %s", x, y)
		}
		p, err := snap(t, s, name, hypervisor.SnapshotOptions{})
		ok(t, err)
		reads(t, p, hypervisor.DiskID(name+".qcow2"), b)
	}
}

// TestChangedWhileRead: each kind of change costs the point, also one that the
// reading did not notice.
func TestChangedWhileRead(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"written": func(path string) error {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			if err == nil {
				_, err = f.WriteAt([]byte("x"), 5000)
			}
			return errors.Join(err, f.Close())
		},
		"written, time set back": func(path string) error {
			info, err := os.Stat(path)
			if err != nil {
				return err
			}
			b, err := os.ReadFile(path)
			if err == nil {
				b[7000]++
				err = os.WriteFile(path, b, 0)
			}
			return errors.Join(err, os.Chtimes(path, info.ModTime(), info.ModTime()))
		},
		"replaced": func(path string) error {
			b, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(path+".new.tmp", b, 0o600)
			}
			return errors.Join(err, os.Rename(path+".new.tmp", path))
		},
		"grown":   func(path string) error { return os.Truncate(path, 2<<20) },
		"removed": os.Remove,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "web/web.raw")
			raw(t, path, 1<<20)
			overlay(t, filepath.Join(dir, "web/top.qcow2"), 1<<20, "web.raw", "raw")
			s := open(t, dir)
			p, err := snap(t, s, "web", hypervisor.SnapshotOptions{})
			ok(t, err)
			if !p.(*snapshot).check {
				t.Skip("SKIPPED: the temporary directory has reflinks")
			}
			ok(t, change(path))
			if _, err := p.Commit(t.Context()); !errors.Is(err, hypervisor.ErrChanged) || !strings.Contains(err.Error(), "--live") {
				t.Errorf("commit: %v", err)
			}
		})
	}
}

func TestClean(t *testing.T) {
	dir := t.TempDir()
	raw(t, filepath.Join(dir, "web.raw"), 4096)
	raw(t, filepath.Join(dir, "db/db.raw"), 4096)
	name := func(o hypervisor.Owner) string { return tempName(o, 77) }
	dead, alive, foreign := owner, owner, owner
	alive.Session, foreign.Repository = "dddd", "eeeeeeee"
	for _, sub := range []string{"", "db"} {
		for _, o := range []hypervisor.Owner{dead, alive, foreign} {
			raw(t, filepath.Join(dir, sub, name(o)), 10)
		}
	}
	s := open(t, dir)
	for _, vm := range []string{"web", "db"} {
		removed, err := s.Clean(t.Context(), byName(t, s, vm).ID, owner.Repository, func(session string) bool { return session == owner.Session }, nil)
		if err != nil || len(removed) != 1 || !strings.Contains(removed[0], name(dead)) {
			t.Errorf("%s: removed %q, %v", vm, removed, err)
		}
	}
	left, err := filepath.Glob(filepath.Join(dir, ".h*"))
	sub, err2 := filepath.Glob(filepath.Join(dir, "db/.h*"))
	if len(left) != 2 || len(sub) != 2 || err != nil || err2 != nil {
		t.Errorf("left %q %q, %v %v", left, sub, err, err2)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	raw(t, filepath.Join(dir, "file"), 10)
	for _, name := range []string{"nowhere", "file"} {
		if _, err := Open(filepath.Join(dir, name)); err == nil {
			t.Errorf("%s was opened", name)
		}
	}
	s := open(t, dir)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.VMs(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("listing after a cancel: %v", err)
	}
	if !bytes.Equal([]byte(listing(t, s)), nil) {
		t.Errorf("a folder without images: %s", listing(t, s))
	}
}

// conforms runs the suite on a VM of two images in a directory that may have
// reflinks.
func conforms(t *testing.T, dir string, reflinks bool) {
	for _, d := range []string{"a.raw", "b.raw"} {
		ok(t, os.MkdirAll(filepath.Join(dir, "vm"), 0o755))
		ok(t, os.WriteFile(filepath.Join(dir, "vm", d), make([]byte, 4<<20), 0o600))
	}
	ok(t, os.WriteFile(filepath.Join(dir, "vm/vm.xml"), []byte("<domain/>"), 0o600))
	connect := func(t *testing.T) hypervisor.Source {
		s, err := Open(dir)
		ok(t, err)
		t.Cleanup(func() { ok(t, s.Close()) })
		return s
	}
	s := connect(t)
	hypertest.Source(t, hypertest.Fixture{
		Source: s, VM: byName(t, s.(*Source), "vm").ID, Data: []hypervisor.DiskID{"a.raw", "b.raw"},
		Shared:  reflinks,
		Abandon: func(*testing.T) hypervisor.Source { return connect(t) },
		Write: func(t *testing.T, d hypervisor.DiskID, p []byte, off int64) {
			f, err := os.OpenFile(filepath.Join(dir, "vm", string(d)), os.O_WRONLY, 0)
			ok(t, err)
			_, err = f.WriteAt(p, off)
			ok(t, errors.Join(err, f.Close()))
		},
		Things: func(t *testing.T) []string {
			var all []string
			ok(t, filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
				all = append(all, path)
				return err
			}))
			return all
		},
	})
}

func TestConformance(t *testing.T) { conforms(t, t.TempDir(), false) }
