//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// pick returns directories and files below root that hold at most budget bytes
// together: whole ones where they fit, else what is in them.
func pick(root string, budget int64) ([]string, error) {
	var picked []string
	var walk func(dir string) error
	walk = func(dir string) error {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			n, err := usage(path)
			if err != nil {
				return err
			}
			switch {
			case n <= budget:
				picked, budget = append(picked, path), budget-n
			case e.IsDir():
				if err := walk(path); err != nil {
					return err
				}
			}
		}
		return nil
	}
	err := walk(root)
	return picked, err
}

// usage returns how many bytes a tree takes on its disk.
func usage(root string) (int64, error) {
	var n int64
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		n += fi.Sys().(*syscall.Stat_t).Blocks * 512
		return nil
	})
	return n, err
}

// warm reads all files of a tree, or one file, so that they are in the page
// cache as far as they fit.
func warm(root string) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, f)
		return errors.Join(err, f.Close())
	})
}

// level brings memory into the state in which machines are that have run for a
// while: full of files read before. Else jobs are not comparable: on a virtual
// machine the first touch of a free page costs up to ten times what writing to
// one does that held a file a moment ago, as the target of whoever runs after
// a large file was removed. fill is the name of a scratch file.
func level(fill string) error {
	const spare = 512 << 20
	var m unix.Sysinfo_t
	if err := unix.Sysinfo(&m); err != nil {
		return err
	}
	f, err := os.OpenFile(fill, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	size := int64(m.Totalram) * int64(m.Unit)
	if err := f.Truncate(size); err != nil { // holes take pages like anything else
		return err
	}
	for off := int64(0); off < size; off += 64 << 20 {
		if err := unix.Sysinfo(&m); err != nil || int64(m.Freeram)*int64(m.Unit) < spare {
			return err
		}
		if _, err := io.Copy(io.Discard, io.NewSectionReader(f, off, 64<<20)); err != nil {
			return err
		}
	}
	return nil
}

// syncAll makes everything on dir's filesystem durable.
func syncAll(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

func command(ctx context.Context, name string, args ...string) error {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

// fact returns the first line of a command's output, or of a file, that holds
// the text.
func fact(text string, source ...string) string {
	read := func() ([]byte, error) { return os.ReadFile(source[0]) }
	if len(source) > 1 {
		read = func() ([]byte, error) { return exec.Command(source[0], source[1:]...).CombinedOutput() }
	}
	b, err := read()
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, text) {
			return strings.Join(strings.Fields(line), " ")
		}
	}
	return "not told"
}
