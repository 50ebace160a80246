//go:build unix

package libvirt

import (
	"context"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"

	"holdfast/test/lab"
)

func killHard(pid string) error {
	n, err := strconv.Atoi(pid)
	if err != nil {
		return err
	}
	return syscall.Kill(n, syscall.SIGKILL)
}

func qemuImg(t *testing.T, args ...string) { t.Helper(); tool(t, "qemu-img", args...) }
func qemuIO(t *testing.T, args ...string)  { t.Helper(); tool(t, "qemu-io", args...) }

func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

func poll(t *testing.T, what string, f func() bool) {
	t.Helper()
	if err := lab.Poll(context.Background(), time.Minute, what, func() (bool, error) { return f(), nil }); err != nil {
		t.Fatal(err)
	}
}
