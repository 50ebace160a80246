//go:build linux

package e2e

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	"holdfast/test/cli"
)

// objects lists a repository's objects below prefix, by their place.
func (w *world) objects(prefix string) []string {
	w.t.Helper()
	var names []string
	w.ok(filepath.WalkDir(filepath.Join(w.Repo, prefix), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			names = append(names, path)
		}
		return err
	}))
	sort.Strings(names)
	if len(names) == 0 {
		w.t.Fatalf("the repository has no %s", prefix)
	}
	return names
}

// edit changes a file's bytes, whatever its mode.
func (w *world) edit(path string, change func([]byte) []byte) {
	w.t.Helper()
	b, err := os.ReadFile(path)
	w.ok(err)
	w.ok(os.Remove(path))
	w.ok(os.WriteFile(path, change(b), 0o600))
}

// damages is what can befall a repository. Each must be found by check; a
// restore must refuse, or give the right bytes all the same.
var damages = []struct {
	name string
	do   func(w *world)
}{
	{"flipped bit in every pack", func(w *world) {
		for _, p := range w.objects("packs") {
			w.edit(p, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
		}
	}},
	{"every pack truncated", func(w *world) {
		for _, p := range w.objects("packs") {
			w.edit(p, func(b []byte) []byte { return b[:len(b)/2] })
		}
	}},
	{"an empty pack", func(w *world) {
		w.edit(w.objects("packs")[0], func(b []byte) []byte { return nil })
	}},
	{"packs missing", func(w *world) {
		for _, p := range w.objects("packs") {
			w.ok(os.Remove(p))
		}
	}},
	{"packs swapped", func(w *world) {
		p := w.objects("packs")
		a, b := p[0], p[len(p)-1]
		w.ok(os.Rename(a, a+".x"))
		w.ok(os.Rename(b, a))
		w.ok(os.Rename(a+".x", b))
	}},
	{"indexes missing", func(w *world) {
		for _, p := range w.objects("index") {
			w.ok(os.Remove(p))
		}
	}},
	{"flipped bit in every index", func(w *world) {
		for _, p := range w.objects("index") {
			w.edit(p, func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
		}
	}},
	{"truncated index", func(w *world) {
		p := w.objects("index")
		w.edit(p[0], func(b []byte) []byte { return b[:len(b)-1] })
	}},
	{"first commit missing", func(w *world) { w.ok(os.Remove(w.objects("chain")[0])) }},
	{"last commit missing", func(w *world) {
		p := w.objects("chain")
		w.ok(os.Remove(p[len(p)-1]))
	}},
	{"commits swapped", func(w *world) {
		p := w.objects("chain")
		a, b := p[0], p[len(p)-1]
		w.ok(os.Rename(a, a+".x"))
		w.ok(os.Rename(b, a))
		w.ok(os.Rename(a+".x", b))
	}},
	{"flipped bit in a commit", func(w *world) {
		p := w.objects("chain")
		w.edit(p[len(p)-1], func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	}},
	{"truncated commit", func(w *world) {
		p := w.objects("chain")
		w.edit(p[len(p)-1], func(b []byte) []byte { return b[:40] })
	}},
	{"flipped bit in the configuration", func(w *world) {
		w.edit(filepath.Join(w.Repo, "config"), func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
	}},
	{"empty configuration", func(w *world) {
		w.edit(filepath.Join(w.Repo, "config"), func(b []byte) []byte { return nil })
	}},
	{"flipped bit in the key slot", func(w *world) {
		w.edit(w.objects("keys")[0], func(b []byte) []byte { b[len(b)-1] ^= 1; return b })
	}},
	{"key slot missing", func(w *world) { w.ok(os.Remove(w.objects("keys")[0])) }},
	{"key ring missing", func(w *world) { w.ok(os.Remove(w.objects("keyring")[0])) }},
}

// TestDamage damages a repository in every way of the table.
func TestDamage(t *testing.T) {
	w := newWorld(t)
	vms := w.images()
	w.backup(vms, "web")
	w.backup(vms, "set")
	w.must("check", "--read-data")
	w.must("points") // this machine has seen the newest commit
	whole := w.Repo
	for i, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			s := *w
			tool := *w.Tool
			s.t, s.Tool = t, &tool
			s.Repo = filepath.Join(w.dir, fmt.Sprint("repo-", i))
			// The machine has seen the repository, and has nothing else of it.
			s.State = filepath.Join(w.dir, fmt.Sprint("state-", i))
			s.run("cp", "-a", whole, s.Repo)
			s.run("cp", "-a", w.State, s.State)
			d.do(&s)
			defer os.RemoveAll(s.Repo)

			to := filepath.Join(w.dir, fmt.Sprint("to-", i))
			r := s.Run(s.ctx, "restore", "set@latest", "--to", to, "--format", "raw")
			if r.Code == 0 {
				s.same(filepath.Join(vms, "set", "system.qcow2"), filepath.Join(to, "system.raw"))
				s.same(filepath.Join(vms, "set", "data.raw"), filepath.Join(to, "data.raw"))
			} else {
				s.refused(r, 1)
				if names, _ := filepath.Glob(filepath.Join(to, "*")); len(names) > 0 {
					t.Errorf("a refused restore left %v", names)
				}
			}
			s.refused(s.Run(s.ctx, "check", "--read-data"), 1)
			// A backup into it fails, or makes a good point.
			b := s.Run(s.ctx, "backup", vms, "web")
			if b.Code != 0 {
				s.refused(b, 1)
				return
			}
			s.must("restore", "web@latest", "--to", filepath.Join(to, "web"), "--format", "raw")
			s.same(filepath.Join(vms, "web.raw"), filepath.Join(to, "web", "web.raw"))
		})
	}
}

// TestNewerFormat meets a repository of a later version (docs/format.md §1.1).
func TestNewerFormat(t *testing.T) {
	w := newWorld(t)
	w.edit(filepath.Join(w.Repo, "config"), func(b []byte) []byte {
		binary.LittleEndian.PutUint16(b[4:], 2)
		clear(b[12:16])
		binary.LittleEndian.PutUint32(b[12:], crc32.Checksum(b[:64], crc32.MakeTable(crc32.Castagnoli)))
		return b
	})
	w.refused(w.Run(w.ctx, "points"), 1, "newer", "version 2")
}

// TestWrongUse gives wrong commands and names: 2 for wrong usage, 1 for what is
// not there.
func TestWrongUse(t *testing.T) {
	w := newWorld(t)
	vms := w.images()
	point := w.backup(vms, "web").Point
	empty := filepath.Join(w.dir, "empty")
	w.ok(os.Mkdir(empty, 0o755))
	taken := filepath.Join(w.dir, "taken")
	w.ok(os.Mkdir(taken, 0o755))
	w.ok(os.WriteFile(filepath.Join(taken, "web.raw"), []byte("mine"), 0o644))
	for _, c := range []struct {
		args  string
		code  int
		words string
	}{
		{"frobnicate", 2, ""},
		{"backup", 2, ""},
		{"backup --frobnicate " + vms, 2, "frobnicate"},
		{"backup " + vms + " web --consistency quantum", 2, "consistency"},
		{"restore", 2, ""},
		{"restore " + point, 2, "--to"},
		{"restore " + point + " --to " + empty + " --format vdi", 2, "format"},
		{"restore " + point + " --to " + empty + " --disk nosuch", 1, "nosuch"},
		{"recover " + point, 2, "--host"},
		{"recover " + point + " --host " + host + " --storage " + w.store + " --writes nowhere", 2, "writes"},
		{"recover " + point + " --host " + host + " --storage /nonexistent", 1, "/nonexistent"},
		{"publish " + point, 2, "--nbd"},
		{"publish " + point + " --nbd unix:", 2, "nbd"},
		{"migrate nosuch", 1, "nosuch"},
		{"undo nosuch", 1, "nosuch"},
		{"init", 1, "already"},
		{"vms /nonexistent", 1, "/nonexistent"},
		{"vms bogus://host", 2, "bogus"},
		{"backup " + vms + " nosuch", 1, "nosuch"},
		{"backup " + empty, 1, ""},
		{"backup " + host + " lab-nosuch", 1, "lab-nosuch"},
		{"points nosuch", 1, "nosuch"},
		{"show nosuch", 1, "nosuch"},
		{"show nosuch@latest", 1, "nosuch"},
		{"show web@yesterday", 2, "latest"},
		{"show 0123456789abcdef0123456789abcdef", 1, "0123"},
		{"restore " + point + " --to " + taken, 1, "exist"},
		{"--repo " + empty + " points", 1, "init"},
		{"--repo " + empty + "/nosuch points", 1, "init"},
	} {
		t.Run(c.args, func(t *testing.T) {
			s := *w
			s.t = t
			s.refused(s.Run(s.ctx, strings.Fields(c.args)...), c.code, strings.Fields(c.words)...)
		})
	}
	if b, err := os.ReadFile(filepath.Join(taken, "web.raw")); err != nil || string(b) != "mine" {
		t.Errorf("a restore changed a file that was there: %q %v", b, err)
	}
	wrong := *w.Tool
	wrong.Passphrase = "not it"
	w.refused(wrong.Run(w.ctx, "points"), 1, "passphrase")
	none := *w.Tool
	none.Repo = ""
	w.refused(none.Run(w.ctx, "points"), 2, "HOLDFAST_REPO")

	// One name on two hosts.
	other := filepath.Join(w.dir, "other")
	w.run("cp", "-a", vms, other)
	w.ok(os.Remove(filepath.Join(other, "set", "system.qcow2")))
	w.backup(other, "web")
	for _, args := range [][]string{{"show", "web@latest"}, {"restore", "web@latest", "--to", empty}, {"points", "web"}} {
		w.refused(w.Run(w.ctx, args...), 2, vms+"/web", other+"/web")
	}
	w.must("show", vms+"/web@latest")
	var all []cli.Point
	w.json(&all, "points", other+"/web")
	if len(all) != 1 {
		t.Errorf("points of %s/web: %+v", other, all)
	}
	w.empty()
}

// tmpfs mounts a filesystem of that size (mount(8)'s words).
func (w *world) tmpfs(name, size string) string {
	w.t.Helper()
	dir := filepath.Join(w.dir, name)
	w.ok(os.MkdirAll(dir, 0o755))
	w.run("mount", "-t", "tmpfs", "-o", "mode=0777,size="+size, "tmpfs", dir)
	w.t.Cleanup(func() {
		// -l: a killed process may take a moment to let go.
		if out, err := command("umount", "-l", dir); err != nil {
			w.t.Errorf("umount %s: %v: %s", dir, err, out)
		}
	})
	return dir
}

// TestDiskFull fills the repository's filesystem, and an overlay's.
func TestDiskFull(t *testing.T) {
	w := newWorld(t)
	vms := w.images()
	full := w.tmpfs("full", "24m")
	w.Repo = filepath.Join(full, "repo")
	w.must("init")
	good := w.backup(vms, "web")
	noise := filepath.Join(vms, "noise.raw")
	w.run("dd", "if=/dev/urandom", "of="+noise, "bs=1M", "count=40", "status=none")
	w.refused(w.Run(w.ctx, "backup", vms, "noise"), 1, "space")
	dir := filepath.Join(w.dir, "restored")
	w.must("restore", good.Point, "--to", dir, "--format", "raw")
	w.same(filepath.Join(vms, "web.raw"), filepath.Join(dir, "web.raw"))
	w.run("mount", "-o", "remount,size=100m", full)
	b := w.backup(vms, "noise")
	w.must("restore", b.Point, "--to", dir, "--format", "raw")
	w.same(noise, filepath.Join(dir, "noise.raw"))
	w.must("check", "--read-data")

	// The overlay of a publication: the client hears of it, nothing is lost.
	overlay := w.tmpfs("overlay", "16m")
	sock := filepath.Join(w.dir, "nbd.sock")
	var s cli.Session
	w.json(&s, "publish", b.Point, "--nbd", "unix:"+sock, "--overlay", overlay, "--detach")
	if len(s.URIs) != 1 {
		t.Fatalf("published with %+v", s)
	}
	w.run("qemu-io", "-f", "raw", "-c", "write -P 1 0 4m", "-c", "flush", s.URIs[0])
	if out := w.fails("qemu-io", "-f", "raw", "-c", "write -P 2 8m 32m", "-c", "flush", s.URIs[0]); !strings.Contains(out, "space") {
		t.Errorf("a write to a full overlay: %s", out)
	}
	w.run("qemu-io", "-f", "raw", "-c", "read -P 1 0 4m", s.URIs[0])
	w.must("undo", s.Session)
	w.empty()
}
