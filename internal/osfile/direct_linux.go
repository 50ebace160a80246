package osfile

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// errDirect is how a write past the page cache is refused (open(2), O_DIRECT).
const errDirect = unix.EINVAL

// openDirect opens a file again, through /proc since it may have no name. It
// returns nil where that fails, be it for want of O_DIRECT.
func openDirect(f *os.File) *os.File {
	path := "/proc/self/fd/" + strconv.Itoa(int(f.Fd()))
	d, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil {
		return nil
	}
	return d
}
