//go:build unix

package index

import (
	"os"

	"golang.org/x/sys/unix"
)

// mapFile maps a file read-only into memory.
func mapFile(path string) ([]byte, func() error, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if fi.Size() == 0 {
		return nil, func() error { return nil }, nil
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, &os.PathError{Op: "map", Path: path, Err: err}
	}
	return b, func() error { return unix.Munmap(b) }, nil
}

// release gives the memory of a part of a mapped file back; it is read again
// when it is touched. The part begins at a page.
func release(p []byte) {
	if len(p) > 0 {
		unix.Madvise(p, unix.MADV_DONTNEED) // it is only that the process looks smaller
	}
}
