//go:build !linux

package disk

import (
	"errors"
	"os"
)

// Punch makes [off, off+n) of the file read as zeros and gives its storage
// back. Here it always returns errors.ErrUnsupported.
func Punch(*os.File, int64, int64) error { return errors.ErrUnsupported }

// nextExtent cannot tell holes here: all is data.
func nextExtent(_ *os.File, off, size int64) (Extent, error) {
	return Extent{Off: off, Len: size - off}, nil
}
