package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// renameLinked renames by a second link, which fails where the name is taken.
// Where there are no links it looks first.
func renameLinked(from, to string) error {
	err := os.Link(from, to)
	switch {
	case err == nil:
		return os.Remove(from)
	case errors.Is(err, fs.ErrExist):
		return err
	}
	if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("rename to %s: %w", to, fs.ErrExist), err)
	}
	return os.Rename(from, to)
}
