//go:build !linux

package folder

import (
	"context"
	"errors"
	"fmt"
	"os"
)

const noWait = 0

// stampOf reads a file's stamp: size and time of the last write.
func stampOf(f *os.File) (stamp, error) {
	info, err := f.Stat()
	if err != nil {
		return stamp{}, err
	}
	return stamp{size: info.Size(), written: info.ModTime()}, nil
}

// reflink has no clones to give.
func reflink(_ *os.Root, _, _ string, f *os.File) (*os.File, error) {
	return nil, fmt.Errorf("clone %s: %w", f.Name(), errors.ErrUnsupported)
}

// writers knows of none: stamps alone tell a writer.
func writers(context.Context, []*os.File) (map[int]string, error) { return nil, nil }
