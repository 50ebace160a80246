//go:build unix

package nbd

import (
	"os/exec"
	"syscall"
	"testing"
)

// freeze stops a process where it stands.
func freeze(t *testing.T, cmd *exec.Cmd) {
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
}
