//go:build unix

package node

import "syscall"

// detached makes a process survive the command that starts it, its terminal,
// and the signals that the terminal sends to its group.
func detached() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }
