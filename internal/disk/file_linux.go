package disk

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Punch makes [off, off+n) of the file read as zeros and gives its storage
// back. The file's length stays. It returns errors.ErrUnsupported where the
// filesystem cannot. fallocate(2), FALLOC_FL_PUNCH_HOLE.
func Punch(f *os.File, off, n int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		switch {
		case err == nil:
			return nil
		case err == unix.EINTR:
		case err == unix.EOPNOTSUPP || err == unix.ENOSYS || err == unix.ENODEV:
			return fmt.Errorf("punch a hole in %s: %w", f.Name(), errors.ErrUnsupported)
		default:
			return fmt.Errorf("punch a hole of %d bytes at %d in %s: %w", n, off, f.Name(), err)
		}
	}
}

// nextExtent tells what the file has at off, which lies before its end.
// lseek(2), SEEK_DATA and SEEK_HOLE; the file's position is used by nobody.
func nextExtent(f *os.File, off, size int64) (Extent, error) {
	data, err := f.Seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO): // no data from here on
		return Extent{Off: off, Len: size - off, Zero: true}, nil
	case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP): // it cannot tell
		return Extent{Off: off, Len: size - off}, nil
	case err != nil:
		return Extent{}, err
	case data > off:
		return Extent{Off: off, Len: min(data, size) - off, Zero: true}, nil
	}
	hole, err := f.Seek(off, unix.SEEK_HOLE)
	if err != nil {
		return Extent{}, err
	}
	if hole <= off { // was punched between the two calls
		return Extent{Off: off, Len: 1}, nil
	}
	return Extent{Off: off, Len: min(hole, size) - off}, nil
}
