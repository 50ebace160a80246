package disk

import (
	"fmt"
	"io"
	"os"
)

// NewFile makes a disk of an open file, which it owns from then on: for files
// that are not opened by path, such as those under an os.Root or without a
// name. The file's length now is the disk's size. On an error the caller still
// owns the file.
func NewFile(f *os.File, o FileOptions) (*File, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("open disk file %s: %w", f.Name(), err)
	}
	return newFile(f, size, o.ReadOnly), nil
}
