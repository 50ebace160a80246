//go:build linux

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/test/cli"
	"holdfast/test/lab"
)

// TestRestore restores a stopped guest, a qcow2 and a raw disk, in every way.
func TestRestore(t *testing.T) {
	w := newWorld(t)
	g := lab.Start(t, lab.Options{Stopped: true, Disks: []lab.Disk{{Format: "raw", Size: 100 << 20}}})
	w.run("qemu-io", "-f", "raw", "-c", "write -P 7 1m 3m", "-c", "write -P 9 99m 1m", g.Disks[1])
	b := w.backup(host, g.Name)

	for _, format := range []string{"raw", "qcow2"} {
		dir := filepath.Join(w.dir, format)
		w.must("restore", b.Point, "--to", dir, "--format", format)
		for i, disk := range []string{"vda", "vdb"} {
			w.same(g.Disks[i], filepath.Join(dir, disk+"."+format))
		}
		w.sparse(filepath.Join(dir, "vda."+format), 1<<30)
		w.refused(w.Run(w.ctx, "restore", b.Point, "--to", dir, "--format", format), 1, "exist")
		w.same(g.Disks[0], filepath.Join(dir, "vda."+format))
	}
	one := filepath.Join(w.dir, "one")
	w.must("restore", g.Name+"@latest", "--to", one, "--disk", "vdb", "--format", "raw")
	if names, _ := filepath.Glob(filepath.Join(one, "*")); len(names) != 1 {
		t.Errorf("restore of one disk made %v", names)
	}
	w.same(g.Disks[1], filepath.Join(one, "vdb.raw"))

	// As a new VM beside the original.
	w.must("restore", b.Point, "--host", host, "--storage", w.store, "--name", g.Name+"-restored")
	restored := lab.Open(g.Name + "-restored")
	if state, err := restored.State(w.ctx); err != nil || state != "shut off" {
		t.Errorf("the restored VM is %q: %v", state, err)
	}
	disks := w.local(restored.Name)
	if len(disks) != 2 {
		t.Fatalf("the restored VM has disks %v", disks)
	}
	for i := range disks {
		w.same(g.Disks[i], disks[i])
	}
	w.refused(w.Run(w.ctx, "restore", b.Point, "--host", host, "--storage", w.store, "--name", restored.Name), 1, restored.Name)
	w.ok(restored.Boot(w.ctx))
	w.ok(restored.Remove(w.ctx))
	for _, disk := range disks {
		w.ok(os.Remove(disk))
	}
	w.empty()
}

// sparse checks that a file takes less than its size.
func (w *world) sparse(path string, most int64) {
	w.t.Helper()
	out := strings.Fields(w.run("du", "-B1", path))
	if n, err := parseInt(out[0]); err != nil || n > most {
		w.t.Errorf("%s takes %s bytes on its disk: %v", path, out[0], err)
	}
}

// TestPublish serves a point's disks to NBD clients.
func TestPublish(t *testing.T) {
	w := newWorld(t)
	g := lab.Start(t, lab.Options{Stopped: true, Disks: []lab.Disk{{Format: "raw", Size: 32 << 20}}})
	w.run("qemu-io", "-f", "raw", "-c", "write -P 7 1m 3m", g.Disks[1])
	b := w.backup(host, g.Name)

	// In front, read-only, all disks.
	sock := filepath.Join(w.dir, "nbd.sock")
	p, err := w.Start("publish", b.Point, "--nbd", "unix:"+sock, "--json")
	w.ok(err)
	s := w.ready(p)
	if len(s.URIs) != 2 {
		t.Fatalf("ready with %+v", s)
	}
	for i, uri := range s.URIs {
		w.run("nbdinfo", uri)
		copied := filepath.Join(w.dir, "copied.raw")
		w.run("nbdcopy", uri, copied)
		w.run("qemu-img", "compare", "-U", g.Disks[i], copied)
		w.ok(os.Remove(copied))
	}
	w.run("qemu-img", "compare", "-U", g.Disks[1], "nbd+unix:///vdb?socket="+sock)
	w.fails("qemu-io", "-f", "raw", "-c", "write -P 1 0 4k", "nbd+unix:///vdb?socket="+sock)
	w.ok(p.Process.Signal(os.Interrupt))
	if r := p.Wait(); r.Code != 0 && r.Code != 130 {
		t.Errorf("Ctrl-C: exit status %d: %s", r.Code, r.Stderr)
	}
	if _, err := os.Lstat(sock); err == nil {
		t.Error("the socket is left")
	}
	w.empty()

	// Detached, with an overlay that keeps what is written.
	overlay := filepath.Join(w.store, "overlay")
	w.ok(os.Mkdir(overlay, 0o755))
	w.json(&s, "publish", b.Point, "--disk", "vdb", "--nbd", "unix:"+sock, "--overlay", overlay, "--detach")
	if len(s.URIs) != 1 || s.Session == "" {
		t.Fatalf("detached with %+v", s)
	}
	w.run("qemu-io", "-f", "raw", "-c", "write -P 5 2m 64k", "-c", "flush", s.URIs[0])
	if w.kill() == 0 {
		t.Fatal("no process serves the point")
	}
	w.must("resume")
	w.run("qemu-io", "-f", "raw", "-c", "read -P 7 1m 1m", "-c", "read -P 5 2m 64k", "-c", "read -P 7 2162688 64k", s.URIs[0])
	w.must("undo", s.Session)
	w.ok(os.RemoveAll(overlay))
	w.empty()

	// The point is as it was.
	dir := filepath.Join(w.dir, "again")
	w.must("restore", b.Point, "--to", dir, "--disk", "vdb", "--format", "raw")
	w.same(g.Disks[1], filepath.Join(dir, "vdb.raw"))
}

// ready waits for the ready line of a publication in front.
func (w *world) ready(p *cli.Process) cli.Session {
	w.t.Helper()
	var s cli.Session
	w.ok(lab.Poll(w.ctx, 30*time.Second, "publish is ready", func() (bool, error) {
		select {
		case <-p.Done():
			return false, p.Wait().Err()
		default:
		}
		return decode(p.Stdout(), &s), nil
	}))
	return s
}
