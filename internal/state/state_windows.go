package state

import (
	"errors"
	"os"

	"golang.org/x/sys/windows"
)

// systemPath: there is no machine-wide directory by default.
func systemPath() string { return "" }

// private: the user's profile is closed to others by its access list.
func private(string) error { return nil }

// tryLock locks a byte far behind the content, since Windows' locks are
// mandatory and the holder's line shall stay readable.
func tryLock(f *os.File) error {
	ol := windows.Overlapped{OffsetHigh: 1}
	err := windows.LockFileEx(windows.Handle(f.Fd()),
		windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY, 0, 1, 0, &ol)
	if errors.Is(err, windows.ERROR_LOCK_VIOLATION) {
		return ErrLocked
	}
	return err
}
