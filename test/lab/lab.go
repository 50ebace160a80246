// Package lab gives tests, the demo and the benchmark real guests: small
// Debian machines under libvirt and QEMU's emulation, which need no KVM.
//
// # Setting up
//
// Once per machine, as root (make test and make demo do it by themselves):
//
//	go run ./test/lab/labctl setup
//
// installs the Debian packages that are missing, starts libvirt when it is not
// running, and makes the guest's image in /var/cache/holdfast-lab/<digest of
// the recipe>/guest.raw and guest.qcow2. It takes half a minute the first time
// and is a quick look afterwards.
//
// # By hand
//
//	go run ./test/lab/labctl guest [-format raw|qcow2] [-disks N]   starts one, prints its name and disks
//	go run ./test/lab/labctl exec NAME 'COMMAND'                    runs a command in it through its agent
//	go run ./test/lab/labctl remove NAME                            removes it with its disks
//	go run ./test/lab/labctl sweep                                  removes what dead test processes left
//
// The console is the serial port (virsh console NAME); root has no password.
//
// # The guest
//
// It has 2 processors, 512 MiB, a system disk vda of 4 GiB (GPT, a BIOS boot
// partition and ext4 labelled "labroot"), data disks from vdb on when asked for
// (a filesystem labelled "labdata" is mounted at /data on first use), a network
// of QEMU's own (10.0.2.0/24), and the guest agent.
// It boots in about 15 s on two cores.
//
// # The writer
//
// /usr/local/bin/guestwriter in the guest writes checksummed records and
// flushes them; /run/guestwriter/acked holds the number of the last one that
// is flushed. From outside:
//
//	g.StartWriter(ctx, "/var/lib/guestwriter")   a directory for each disk to be written
//	n, err := g.Acked(ctx)                       records 1 to n are flushed on every disk
//	g.StopWriter(ctx)
//	err = g.Verify(ctx, n, "/var/lib/guestwriter")   all of them are there, nothing is torn
//
// or by hand: "systemctl start guestwriter" with GUESTWRITER="DIR..." in
// /run/guestwriter.env, "guestwriter verify -acked N DIR...". A number read
// before a backup must be there after the recovery of that backup; a number
// read before a crash must be there after it. With several directories on
// several disks Verify also proves that the disks were caught at one instant.
// The guestwriter command's comment tells how.
//
// # In tests
//
//	func TestX(t *testing.T) {
//		lab.Beside(t)
//		g := lab.Start(t, lab.Options{})
//		...
//	}
//
// Guests are named lab-<process id>-<number>; a test that has guests made by
// the program under test names them g.Name + "-something", so that Sweep finds
// them.
package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

// Need skips the test unless HOLDFAST_LAB=1, which make test sets. With it, a
// machine that cannot run guests fails the test: a test that somebody asked
// for is not skipped silently.
func Need(t *testing.T) {
	t.Helper()
	if os.Getenv("HOLDFAST_LAB") != "1" {
		t.Skip("SKIPPED: needs real guests, which HOLDFAST_LAB=1 allows; \"make test\" sets up the machine and sets it")
	}
	if err := ready(); err != nil {
		t.Fatalf("HOLDFAST_LAB=1, but this machine cannot run guests: %v", err)
	}
}

// Beside is Need for a test that may run beside others: it lets them go on until
// one of the machine's places is free, of which there are as many as processors.
// All processes share them.
func Beside(t *testing.T) {
	t.Helper()
	Need(t)
	t.Parallel()
	var free func()
	began := time.Now()
	err := Poll(t.Context(), time.Hour, "a place for a test is free", func() (bool, error) {
		for i := range runtime.NumCPU() {
			unlock, err := tryLock(filepath.Join(Cache(), fmt.Sprintf("place-%d", i)))
			if err != nil || unlock != nil {
				free = unlock
				return err == nil, err
			}
		}
		return false, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(free)
	t.Logf("waited %.0f s for a place", time.Since(began).Seconds())
}

// ready is nil when guests can be started, and then has swept once.
var ready = sync.OnceValue(func() error {
	if os.Getuid() != 0 {
		return fmt.Errorf("not root")
	}
	for _, name := range []string{"virsh", "qemu-img", "qemu-system-x86_64"} {
		if _, err := exec.LookPath(name); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := libvirt(ctx, func(string, ...any) {}); err != nil {
		return err
	}
	if _, err := Image("qcow2"); err != nil {
		return err
	}
	_, err := Sweep(ctx)
	return err
})

// Start starts a guest and waits for its agent. The guest, its disks and its
// directory go when the test ends.
func Start(t *testing.T, o Options) *Guest {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), bootLimit+2*time.Minute)
	defer cancel()
	g, err := New(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := g.Remove(ctx); err != nil {
			t.Errorf("remove guest %s: %v", g.Name, err)
		}
	})
	if o.Stopped {
		return g
	}
	if err := g.Boot(ctx); err != nil {
		t.Fatal(err)
	}
	return g
}

// Storage makes a directory that QEMU under libvirt may write, removed when
// the test ends.
func Storage(t *testing.T) string {
	t.Helper()
	dir, err := NewStorage()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// base holds the directories of all guests; each carries its process's id.
func base() string {
	if dir := os.Getenv("HOLDFAST_LAB_DIR"); dir != "" {
		return dir
	}
	return "/var/lib/holdfast-lab"
}

// NewStorage makes a directory that QEMU under libvirt may write.
func NewStorage() (string, error) { return newStorage(os.Getpid()) }

// newStorage names the directory for the process that it belongs to; 0 is
// nobody.
func newStorage(owner int) (string, error) {
	if err := os.MkdirAll(base(), 0o755); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(base(), fmt.Sprintf("lab-%d-", owner))
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	// Debian's libvirt runs QEMU as libvirt-qemu.
	return dir, run(context.Background(), "chown", "libvirt-qemu", dir)
}

// Sweep removes what dead processes of the lab left, and names it: guests (by
// name, or by a disk in one of the lab's directories), processes of the program
// under test whose HOLDFAST_STATE lies in such a directory, the directories.
func Sweep(ctx context.Context) ([]string, error) {
	out, err := Virsh(ctx, "list", "--all", "--name")
	if err != nil {
		return nil, err
	}
	var gone []string
	for name := range strings.FieldsSeq(out) {
		if !orphan(name) {
			// A guest may go meanwhile: then it is not ours to remove.
			if dir, err := Dir(ctx, name); err != nil || !orphan(filepath.Base(dir)) {
				continue
			}
		}
		if err := undefine(ctx, name); err != nil {
			return gone, err
		}
		gone = append(gone, "guest "+name)
	}
	envs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return gone, err
	}
	for _, env := range envs {
		pid, dir := stateOf(env)
		if dir == "" || !orphan(dir) {
			continue
		}
		if p, err := os.FindProcess(pid); err == nil && p.Kill() == nil {
			gone = append(gone, fmt.Sprintf("process %d", pid))
		}
	}
	dirs, err := filepath.Glob(filepath.Join(base(), "lab-*"))
	if err != nil {
		return gone, err
	}
	for _, dir := range dirs {
		if !orphan(filepath.Base(dir)) {
			continue
		}
		if err := os.RemoveAll(dir); err != nil {
			return gone, err
		}
		gone = append(gone, dir)
	}
	return gone, nil
}

// stateOf returns the id of the process that env, its /proc/PID/environ,
// belongs to, and the name of the lab's directory in which its HOLDFAST_STATE
// lies; "" for none.
func stateOf(env string) (pid int, dir string) {
	b, err := os.ReadFile(env)
	if err != nil {
		return 0, ""
	}
	for v := range strings.SplitSeq(string(b), "\x00") {
		if rest, ok := strings.CutPrefix(v, "HOLDFAST_STATE="+base()+"/"); ok {
			dir, _, _ = strings.Cut(rest, "/")
		}
	}
	if _, err := fmt.Sscanf(env, "/proc/%d/", &pid); err != nil {
		return 0, ""
	}
	return pid, dir
}

// orphan reports whether name is one of the lab's and its process is gone.
// What is kept carries id 0.
func orphan(name string) bool {
	var pid int
	if n, _ := fmt.Sscanf(name, "lab-%d-", &pid); n != 1 || pid == 0 {
		return false
	}
	_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	return os.IsNotExist(err)
}
