package node

import (
	"syscall"

	"golang.org/x/sys/windows"
)

// detached makes a process survive the command that starts it and its console.
func detached() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{CreationFlags: windows.CREATE_NEW_PROCESS_GROUP | windows.DETACHED_PROCESS}
}
