//go:build linux

package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"holdfast/test/cli"
	"holdfast/test/lab"
)

func parseInt(s string) (int64, error) { return strconv.ParseInt(s, 10, 64) }

// decode reports whether s is a whole JSON value, now in result.
func decode(s string, result any) bool { return json.Unmarshal([]byte(s), result) == nil }

// fails runs a program that must fail, and returns what it said.
func (w *world) fails(name string, args ...string) string {
	w.t.Helper()
	out, err := exec.CommandContext(w.ctx, name, args...).CombinedOutput()
	if err == nil {
		w.t.Errorf("%s %s succeeded: %s", name, strings.Join(args, " "), out)
	}
	return string(out)
}

// images makes a folder host: web.raw, and set/ with a chain of three qcow2 and
// a raw image beside.
func (w *world) images() string {
	w.t.Helper()
	vms := filepath.Join(w.dir, "vms")
	w.ok(os.MkdirAll(filepath.Join(vms, "set"), 0o755))
	w.run("qemu-img", "create", "-q", "-f", "raw", filepath.Join(vms, "web.raw"), "64M")
	w.run("qemu-io", "-f", "raw", "-c", "write -P 1 0 5m", "-c", "write -P 2 40m 1m", filepath.Join(vms, "web.raw"))
	set := filepath.Join(vms, "set")
	base, mid, top := filepath.Join(set, "base.qcow2"), filepath.Join(set, "mid.qcow2"), filepath.Join(set, "system.qcow2")
	w.run("qemu-img", "create", "-q", "-f", "qcow2", base, "96M")
	w.run("qemu-io", "-c", "write -P 3 0 8m", base)
	w.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", mid)
	w.run("qemu-io", "-c", "write -P 4 4m 8m", "-c", "write -z 1m 1m", mid)
	w.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", mid, "-F", "qcow2", top)
	w.run("qemu-io", "-c", "write -P 5 90m 1m", top)
	w.run("qemu-img", "create", "-q", "-f", "raw", filepath.Join(vms, "set", "data.raw"), "16M")
	w.run("qemu-io", "-f", "raw", "-c", "write -P 6 3m 3m", filepath.Join(vms, "set", "data.raw"))
	return vms
}

// TestFolder backs up a directory of images.
func TestFolder(t *testing.T) {
	w := newWorld(t)
	vms := w.images()
	var all []cli.Backup
	w.json(&all, "backup", vms)
	if len(all) != 2 {
		t.Fatalf("backup of a folder: %+v", all)
	}
	dir := filepath.Join(w.dir, "restored")
	w.must("restore", "web@latest", "--to", dir, "--format", "raw")
	w.same(filepath.Join(vms, "web.raw"), filepath.Join(dir, "web.raw"))
	w.must("restore", "set@latest", "--to", filepath.Join(dir, "set"), "--format", "raw")
	w.same(filepath.Join(vms, "set", "system.qcow2"), filepath.Join(dir, "set", "system.raw"))
	w.same(filepath.Join(vms, "set", "data.raw"), filepath.Join(dir, "set", "data.raw"))

	// An image that names a file outside the host's directory is not followed.
	w.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", filepath.Join(w.Repo, "config"), "-F", "raw", filepath.Join(vms, "spy.qcow2"))
	w.refused(w.Run(w.ctx, "backup", vms, "spy"), 1, "outside")
	w.ok(os.Remove(filepath.Join(vms, "spy.qcow2")))

	// Nothing changed, nothing new; then a little.
	again := w.backup(vms, "web")
	if again.NewBytes != 0 {
		t.Errorf("an unchanged image gave %d new bytes", again.NewBytes)
	}
	w.run("qemu-io", "-f", "raw", "-c", "write -P 9 20m 64k", filepath.Join(vms, "web.raw"))
	changed := w.backup(vms, "web")
	if changed.NewBytes != 64<<10 {
		t.Errorf("64 KiB were changed, %d bytes are new", changed.NewBytes)
	}
	w.must("restore", changed.Point, "--to", filepath.Join(dir, "changed"), "--format", "qcow2")
	w.same(filepath.Join(vms, "web.raw"), filepath.Join(dir, "changed", "web.qcow2"))
	if n := len(w.points("web")); n != 3 {
		t.Errorf("web has %d points, not 3", n)
	}
	w.empty()
}

// TestFolderInUse backs up an image that QEMU has open for writing.
func TestFolderInUse(t *testing.T) {
	w := newWorld(t)
	vms := w.images()
	image := filepath.Join(vms, "web.raw")
	sock := filepath.Join(w.dir, "use.sock")
	c := exec.Command("qemu-nbd", "-f", "raw", "-k", sock, "-t", image)
	w.ok(c.Start())
	defer func() {
		_ = c.Process.Kill()
		_ = c.Wait()
	}()
	w.ok(lab.Poll(w.ctx, 10*time.Second, "qemu-nbd serves", func() (bool, error) {
		_, err := os.Stat(sock)
		return err == nil, nil
	}))
	r := w.Run(w.ctx, "backup", vms, "web")
	if r.Code == 0 {
		// A reflink was taken: the filesystem has them.
		w.logf("the filesystem has reflinks: %s", r.Stderr)
		return
	}
	w.refused(r, 1, "web.raw")
	// The other VM's backup is done all the same.
	var all []cli.Backup
	r, err := w.JSON(w.ctx, &all, "backup", vms)
	if err == nil || r.Code != 1 || len(all) != 2 {
		t.Errorf("backup with one image in use: exit status %d, %+v", r.Code, all)
	}
	for _, b := range all {
		if (b.Error != "") != (b.VM == "web") {
			t.Errorf("backup with web in use: %+v", b)
		}
	}
	w.backup(vms, "web", "--live")
	if out := w.must("show", "web@latest").Stdout; !strings.Contains(out, "instant") {
		t.Errorf("a point made live does not say so: %s", out)
	}
}
