package folder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
)

// holder keeps a program running until the test ends or stop is called.
func holder(t testing.TB, ready func() bool, name string, args ...string) (stop func()) {
	t.Helper()
	cmd := exec.Command(name, args...)
	in, err := cmd.StdinPipe() // qemu-io waits for commands
	ok(t, err)
	ok(t, cmd.Start())
	var once atomic.Bool
	stop = func() {
		if once.CompareAndSwap(false, true) {
			_ = in.Close()
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(stop)
	for end := time.Now().Add(10 * time.Second); !ready(); {
		if time.Now().After(end) {
			t.Fatalf("%s did not become ready", name)
		}
		time.Sleep(5 * time.Millisecond) // an outside process
	}
	return stop
}

// TestQEMUHoldsImage: locks are seen, also where /proc does not show who.
func TestQEMUHoldsImage(t *testing.T) {
	need(t, "qemu-io", "qemu-nbd")
	dir := t.TempDir()
	b := raw(t, filepath.Join(dir, "web.raw"), 1<<20)
	full(t, filepath.Join(dir, "db/db.qcow2"), b)
	s := open(t, dir)
	locked := func(path string) func() bool {
		return func() bool {
			f, err := os.Open(path)
			ok(t, err)
			defer f.Close()
			is, err := lockedByQEMU(f)
			ok(t, err)
			return is
		}
	}
	sock := filepath.Join(t.TempDir(), "s")
	for _, c := range []struct {
		vm, path string
		cmd      []string
	}{
		{"web", "web.raw", []string{"qemu-io", "-f", "raw"}},
		{"db", "db/db.qcow2", []string{"qemu-nbd", "-f", "qcow2", "-k", sock}},
	} {
		path := filepath.Join(dir, c.path)
		stop := holder(t, locked(path), c.cmd[0], append(c.cmd[1:], path)...)
		if v := byName(t, s, c.vm); v.State != hypervisor.Running {
			t.Errorf("%s is %s", c.vm, v.State)
		}
		p, err := snap(t, s, c.vm, hypervisor.SnapshotOptions{})
		if err == nil || !strings.Contains(err.Error(), "locked by QEMU") || p != nil {
			t.Errorf("%s: %v", c.vm, err)
		}
		p, err = snap(t, s, c.vm, hypervisor.SnapshotOptions{Live: true})
		ok(t, err)
		if p.Consistency() != hypervisor.Crash || !strings.Contains(fmt.Sprint(p.Notes()), "made live") {
			t.Errorf("%s: %s, %q", c.vm, p.Consistency(), p.Notes())
		}
		reads(t, p, hypervisor.DiskID(filepath.Base(path)), b)
		commit(t, p)
		stop()
		p, err = snap(t, s, c.vm, hypervisor.SnapshotOptions{})
		ok(t, err)
		if p.Consistency() != hypervisor.Filesystem || len(p.Notes()) > 0 {
			t.Errorf("%s: %s, %q", c.vm, p.Consistency(), p.Notes())
		}
	}
	// Reading does no harm.
	path := filepath.Join(dir, "web.raw")
	holder(t, func() bool { return inUse(t, path, "qemu-nbd") }, "qemu-nbd", "-r", "-f", "raw", "-k", sock+"2", path)
	p, err := snap(t, s, "web", hypervisor.SnapshotOptions{Consistency: hypervisor.Application})
	ok(t, err)
	commit(t, p)
}

// inUse reports whether a program has a file open, for reading or writing.
func inUse(t testing.TB, path, program string) bool {
	links, err := filepath.Glob("/proc/[0-9]*/fd/*")
	ok(t, err)
	return slices.ContainsFunc(links, func(l string) bool {
		to, err := os.Readlink(l)
		comm, _ := os.ReadFile(filepath.Join(filepath.Dir(filepath.Dir(l)), "comm"))
		return err == nil && to == path && strings.TrimSpace(string(comm)) == program
	})
}

// TestProcessHoldsImage: a program without locks.
func TestProcessHoldsImage(t *testing.T) {
	dir := t.TempDir()
	raw(t, filepath.Join(dir, "set/a.raw"), 4096)
	raw(t, filepath.Join(dir, "set/base.raw"), 1<<20)
	overlay(t, filepath.Join(dir, "set/top.qcow2"), 1<<20, "base.raw", "raw")
	s := open(t, dir)
	for _, name := range []string{"a.raw", "base.raw", "top.qcow2"} {
		path := filepath.Join(dir, "set", name)
		stop := holder(t, func() bool { return inUse(t, path, "sleep") }, "sh", "-c", "exec sleep 1000 >>"+path)
		_, err := snap(t, s, "set", hypervisor.SnapshotOptions{Consistency: hypervisor.Crash})
		if cloned := err == nil; cloned {
			t.Skip("SKIPPED: the temporary directory has reflinks")
		}
		if !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "sleep") || !strings.Contains(err.Error(), "--live") {
			t.Errorf("%s is held, and the error is %v", name, err)
		}
		stop()
		p, err := snap(t, s, "set", hypervisor.SnapshotOptions{})
		ok(t, err)
		commit(t, p)
	}
}

func TestLoopDeviceHoldsImage(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root")
	}
	need(t, "losetup")
	dir := t.TempDir()
	path := filepath.Join(dir, "web.raw")
	raw(t, path, 1<<20)
	out, err := exec.Command("losetup", "--find", "--show", path).Output()
	if err != nil {
		t.Skipf("SKIPPED: no loop device: %v", err)
	}
	dev := strings.TrimSpace(string(out))
	detach := func() { run(t, "losetup", "-d", dev) }
	s := open(t, dir)
	if _, err := snap(t, s, "web", hypervisor.SnapshotOptions{}); err == nil || !strings.Contains(err.Error(), dev) {
		t.Errorf("attached to %s, and the error is %v", dev, err)
	}
	detach()
	_, err = snap(t, s, "web", hypervisor.SnapshotOptions{})
	ok(t, err)
}

// reflinks is a filesystem with reflinks on a loop device.
func reflinks(t *testing.T, mkfs ...string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root")
	}
	need(t, mkfs[0], "mount", "umount")
	dir := t.TempDir()
	img, mnt := filepath.Join(dir, "fs"), filepath.Join(dir, "mnt")
	ok(t, os.WriteFile(img, nil, 0o600))
	ok(t, os.Truncate(img, 400<<20))
	ok(t, os.Mkdir(mnt, 0o755))
	run(t, mkfs[0], append(mkfs[1:], img)...)
	if out, err := exec.Command("mount", "-o", "loop", img, mnt).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED: cannot mount: %v %s", err, out)
	}
	t.Cleanup(func() { run(t, "umount", mnt) })
	return mnt
}

func TestReflinks(t *testing.T) {
	for name, mkfs := range map[string][]string{"xfs": {"mkfs.xfs", "-q", "-m", "reflink=1"}, "btrfs": {"mkfs.btrfs", "-q"}} {
		t.Run(name, func(t *testing.T) {
			dir := reflinks(t, mkfs...)
			t.Run("stopped", func(t *testing.T) { cloneStopped(t, filepath.Join(dir, "1")) })
			t.Run("held", func(t *testing.T) { cloneHeld(t, filepath.Join(dir, "2")) })
			t.Run("conformance", func(t *testing.T) { conforms(t, filepath.Join(dir, "4"), true) })
			t.Run("writing", func(t *testing.T) { cloneWriting(t, filepath.Join(dir, "3")) })
		})
	}
}

// cloneStopped: a guest that starts while its images are read does no harm.
func cloneStopped(t *testing.T, dir string) {
	base := raw(t, filepath.Join(dir, "db/base.raw"), 1<<20)
	overlay(t, filepath.Join(dir, "db/root.qcow2"), 1<<20, "base.raw", "raw")
	data := raw(t, filepath.Join(dir, "db/data.raw"), 600<<10)
	s := open(t, dir)
	p, err := snap(t, s, "db", hypervisor.SnapshotOptions{Consistency: hypervisor.Application})
	ok(t, err)
	if p.(*snapshot).check {
		t.Fatal("nothing was cloned")
	}
	for _, name := range []string{"base.raw", "data.raw"} {
		ok(t, os.WriteFile(filepath.Join(dir, "db", name), []byte("something else"), 0o600))
	}
	ok(t, os.Remove(filepath.Join(dir, "db/root.qcow2")))
	reads(t, p, "root.qcow2", base)
	reads(t, p, "data.raw", data)
	commit(t, p)
	if p.Consistency() != hypervisor.Application || len(p.Notes()) > 0 || p.VM().State != hypervisor.Stopped {
		t.Errorf("%s, %q", p.Consistency(), p.Notes())
	}
	list, err := os.ReadDir(filepath.Join(dir, "db"))
	if err != nil || len(list) != 2 {
		t.Errorf("clones have names: %v, %v", list, err)
	}
}

// cloneHeld: images of a running guest that does not write just now.
func cloneHeld(t *testing.T, dir string) {
	need(t, "qemu-nbd")
	a, b := raw(t, filepath.Join(dir, "db/a.raw"), 1<<20), raw(t, filepath.Join(dir, "db/b.raw"), 1<<20)
	for _, name := range []string{"a.raw", "b.raw"} {
		path := filepath.Join(dir, "db", name)
		holder(t, func() bool { return inUse(t, path, "qemu-nbd") }, "qemu-nbd", "-f", "raw", "-k", filepath.Join(t.TempDir(), "s"), path)
	}
	s := open(t, dir)
	if _, err := snap(t, s, "db", hypervisor.SnapshotOptions{}); err == nil || !strings.Contains(err.Error(), "--consistency crash") {
		t.Errorf("a running guest was frozen? %v", err)
	}
	for _, o := range []hypervisor.SnapshotOptions{{Consistency: hypervisor.Crash}, {Live: true}} {
		p, err := snap(t, s, "db", o)
		ok(t, err)
		reads(t, p, "a.raw", a)
		reads(t, p, "b.raw", b)
		commit(t, p)
		if p.Consistency() != hypervisor.Crash || len(p.Notes()) != 1 || strings.Contains(p.Notes()[0], "not of one instant") || p.VM().State != hypervisor.Running {
			t.Errorf("%s, %q", p.Consistency(), p.Notes())
		}
	}
}

// cloneWriting: a guest writes all the time. One image is cloned at an
// instant; of two that are written in turn none is ahead of the other by more
// than one write, or the snapshot is refused.
func cloneWriting(t *testing.T, dir string) {
	raw(t, filepath.Join(dir, "one.raw"), 256<<10)
	raw(t, filepath.Join(dir, "two/a.raw"), 256<<10)
	raw(t, filepath.Join(dir, "two/b.raw"), 256<<10)
	var files []*os.File
	for _, name := range []string{"one.raw", "two/a.raw", "two/b.raw"} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
		ok(t, err)
		defer f.Close()
		files = append(files, f)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var rounds atomic.Int64
	done := make(chan error)
	go func() {
		// Each write is of one byte all over: a clone within it would show two.
		var err error
		for n := byte(1); ctx.Err() == nil && err == nil; n++ {
			for _, f := range files {
				_, e := f.WriteAt(bytes.Repeat([]byte{n}, 256<<10), 0)
				err = errors.Join(err, e)
			}
			rounds.Add(1)
		}
		done <- err
	}()
	for rounds.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	s := open(t, dir)
	read := func(p hypervisor.Snapshot, id hypervisor.DiskID) []byte {
		d, err := p.Open(t.Context(), id)
		ok(t, err)
		b := make([]byte, d.Size())
		ok(t, d.ReadAt(t.Context(), b, 0))
		return b
	}
	for range 20 {
		p, err := snap(t, s, "one", hypervisor.SnapshotOptions{Consistency: hypervisor.Crash})
		ok(t, err)
		if b := read(p, "one.raw"); !bytes.Equal(b, bytes.Repeat(b[:1], len(b))) {
			t.Error("the clone is not of one instant")
		}
		commit(t, p)
	}
	p, err := snap(t, s, "two", hypervisor.SnapshotOptions{Consistency: hypervisor.Crash})
	if err == nil {
		if a, b := read(p, "a.raw")[0], read(p, "b.raw")[0]; a-b > 1 {
			t.Errorf("rounds %d and %d in one snapshot", a, b)
		}
	} else if !strings.Contains(err.Error(), "one instant") {
		t.Error(err)
	}
	p, err = snap(t, s, "two", hypervisor.SnapshotOptions{Live: true})
	ok(t, err)
	if !strings.Contains(fmt.Sprint(p.Notes()), "made live") {
		t.Errorf("notes %q", p.Notes())
	}
	cancel()
	ok(t, <-done)
}

// TestPipeByAnImagesName: opening one would wait for ever.
func TestPipeByAnImagesName(t *testing.T) {
	dir := t.TempDir()
	ok(t, syscall.Mkfifo(filepath.Join(dir, "web.raw"), 0o600))
	s := open(t, dir)
	if _, err := snap(t, s, "web", hypervisor.SnapshotOptions{}); err == nil || !strings.Contains(err.Error(), "regular") {
		t.Errorf("a pipe: %v", err)
	}
	if _, err := s.open("web.raw"); err == nil {
		t.Error("a pipe was opened")
	}
}

// TestLiveImageThatGrows: reading goes on while a process writes and grows the
// file; what was there at the beginning is read.
func TestLiveImageThatGrows(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "web.raw")
	raw(t, path, 1<<20)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	ok(t, err)
	defer f.Close()
	s := open(t, dir)
	p, err := snap(t, s, "web", hypervisor.SnapshotOptions{Live: true})
	ok(t, err)
	_, err = f.WriteAt([]byte("more"), 1<<20)
	ok(t, err)
	d, err := p.Open(t.Context(), "web.raw")
	ok(t, err)
	ok(t, d.ReadAt(t.Context(), make([]byte, 1<<20), 0))
	if err := d.ReadAt(t.Context(), make([]byte, 1), 1<<20); !errors.Is(err, disk.ErrRange) {
		t.Errorf("the disk grew while it was open: %v", err)
	}
	commit(t, p)
}

// TestLiveQcow2ThatGrows: clusters that come behind the file's end of before
// are no damage.
func TestLiveQcow2ThatGrows(t *testing.T) {
	need(t, "qemu-io")
	dir := t.TempDir()
	path := filepath.Join(dir, "web.qcow2")
	full(t, path, make([]byte, 4<<20))
	overlay(t, filepath.Join(dir, "db.qcow2"), 4<<20, "web.qcow2", "qcow2")
	path = filepath.Join(dir, "db.qcow2")
	holder(t, func() bool { return inUse(t, path, "sleep") }, "sh", "-c", "exec sleep 1000 >>"+path)
	s := open(t, dir)
	p, err := snap(t, s, "db", hypervisor.SnapshotOptions{Live: true})
	ok(t, err)
	if !strings.Contains(fmt.Sprint(p.Notes()), "made live") {
		t.Errorf("notes %q", p.Notes())
	}
	if p.(*snapshot).set.cloned() {
		t.Skip("SKIPPED: the temporary directory has reflinks")
	}
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 1m 2m", path)
	want := make([]byte, 4<<20)
	copy(want[1<<20:], bytes.Repeat([]byte{7}, 2<<20))
	reads(t, p, "db.qcow2", want)
	commit(t, p)
}
