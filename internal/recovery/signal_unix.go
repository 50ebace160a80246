//go:build unix

package recovery

import "syscall"

// terminate asks a process to end in order. That it is gone is no error.
func terminate(pid int) { _ = syscall.Kill(pid, syscall.SIGTERM) }

func kill(pid int) { _ = syscall.Kill(pid, syscall.SIGKILL) }
