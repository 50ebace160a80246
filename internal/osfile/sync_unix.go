//go:build unix

package osfile

import (
	"errors"
	"os"
)

// SyncDir makes names created, renamed or removed in the directory durable.
// It does nothing on Windows, where NTFS journals them by itself and a
// directory cannot be opened for it.
func SyncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
