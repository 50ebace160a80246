package nbd

import (
	"errors"
	"syscall"

	"golang.org/x/sys/windows"
)

// noSpace reports whether err says that storage is full; a quota counts (proto,
// "Error values").
func noSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, windows.ERROR_DISK_FULL) ||
		errors.Is(err, windows.ERROR_HANDLE_DISK_FULL) || errors.Is(err, windows.ERROR_DISK_QUOTA_EXCEEDED)
}
