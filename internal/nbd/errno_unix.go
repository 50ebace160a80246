//go:build unix

package nbd

import (
	"errors"
	"syscall"
)

// noSpace reports whether err says that storage is full; a quota or a limit on
// a file's size counts (proto, "Error values").
func noSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG)
}
