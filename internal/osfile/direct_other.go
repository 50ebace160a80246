//go:build !linux

package osfile

import (
	"errors"
	"os"
)

var errDirect = errors.ErrUnsupported

func openDirect(*os.File) *os.File { return nil }
