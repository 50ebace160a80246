//go:build unix

package state

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// systemPath is the machine-wide state directory, for root.
func systemPath() string {
	if os.Geteuid() == 0 {
		return "/var/lib/holdfast"
	}
	return ""
}

// private makes sure that the directory is the user's own and closed to others.
func private(path string) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to another user (uid %d)", path, st.Uid)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return os.Chmod(path, 0o700)
	}
	return nil
}

// tryLock takes an flock, which belongs to this opening of the file and ends
// with it. ErrLocked when somebody else holds it.
func tryLock(f *os.File) error {
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case errors.Is(err, syscall.EINTR):
		case errors.Is(err, syscall.EWOULDBLOCK):
			return ErrLocked
		default:
			return err
		}
	}
}
