package blob

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// tmpPrefix marks files that are being written; no object name starts so.
const tmpPrefix = ".tmp-"

// Dir is a Store in a directory: one read-only file per object.
//
// An object is written to a file without a name (or, where the filesystem has
// none such, a temporary one), synced, linked to its name, which fails when
// the name is taken, and its directory is synced. A crash leaves the object
// whole or absent. Objects are locked in a directory that is hardened.
type Dir struct {
	root string

	mu    sync.Mutex
	made  map[string]bool // directories known to exist durably; guarded by mu
	queue []*asked        // for locks; guarded by mu
	turn  chan struct{}   // one at a time asks for locks
}

// OpenDir opens the store in an existing directory.
func OpenDir(root string) (*Dir, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	fi, err := os.Stat(abs)
	if err != nil {
		return nil, err
	}
	if !fi.IsDir() {
		return nil, fmt.Errorf("%s is not a directory", root)
	}
	return &Dir{root: abs, made: map[string]bool{abs: true}, turn: make(chan struct{}, 1)}, nil
}

// CreateDir makes the directory, which may exist when it is empty, and opens it.
func CreateDir(root string) (*Dir, error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	if err := syncDir(filepath.Dir(filepath.Clean(root))); err != nil {
		return nil, err
	}
	return OpenDir(root)
}

func (d *Dir) path(name string) string { return filepath.Join(d.root, filepath.FromSlash(name)) }

func (d *Dir) Put(ctx context.Context, name string, data []byte) error {
	if err := checkPut(ctx, name, data); err != nil {
		return err
	}
	path := d.path(name)
	if err := d.mkdir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("put %s: %w", name, err)
	}
	if err := create(path, data); err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = ErrExist
		}
		return fmt.Errorf("put %s: %w", name, err)
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("put %s: make its name durable: %w", name, err)
	}
	return nil
}

// mkdir makes dir and its parents below the root, each durable in its parent.
func (d *Dir) mkdir(dir string) error {
	d.mu.Lock()
	known := d.made[dir]
	d.mu.Unlock()
	if known {
		return nil
	}
	parent := filepath.Dir(dir)
	if err := d.mkdir(parent); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := syncDir(parent); err != nil {
		return err
	}
	d.mu.Lock()
	d.made[dir] = true
	d.mu.Unlock()
	return nil
}

// createNamed writes through a temporary name: for filesystems without
// nameless files.
func createNamed(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), tmpPrefix+"*")
	if err != nil {
		return err
	}
	moved := false
	defer func() {
		if !moved {
			err = errors.Join(err, os.Remove(f.Name()))
		}
		if err == nil {
			// At last: SMB servers remove no name of a file that is read-only.
			_ = os.Chmod(path, 0o400)
		}
	}()
	if err := fill(f, data); err != nil {
		return err
	}
	err = os.Link(f.Name(), path)
	switch {
	case err == nil, errors.Is(err, fs.ErrExist) && linked(f.Name()):
		return nil
	case noLinks(err):
		err = renameNew(f.Name(), path)
		moved = err == nil
	}
	return err
}

// fill writes data, syncs and closes f.
func fill(f *os.File, data []byte) error {
	_, err := f.Write(data)
	if err == nil {
		// An error of fsync is final for this file: it is never tried again.
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (d *Dir) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := CheckName(name); err != nil {
		return nil, err
	}
	f, err := os.Open(d.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("get %s: %w", name, ErrNotExist)
	} else if err != nil {
		return nil, fmt.Errorf("get %s: %w", name, err)
	}
	defer f.Close()
	if n < 0 {
		fi, err := f.Stat()
		if err != nil {
			return nil, fmt.Errorf("get %s: %w", name, err)
		}
		n = fi.Size() - off
	}
	if off < 0 || n < 0 || n > MaxSize {
		return nil, fmt.Errorf("get %s [%d, +%d): %w", name, off, n, ErrTruncated)
	}
	p := make([]byte, n)
	if _, err := f.ReadAt(p, off); err == io.EOF {
		return nil, fmt.Errorf("get %s [%d, +%d): %w", name, off, n, ErrTruncated)
	} else if err != nil {
		return nil, fmt.Errorf("get %s: %w", name, err)
	}
	return p, nil
}

func (d *Dir) List(ctx context.Context, prefix string) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		dir, _, _ := cutLast(prefix)
		top, none := d.path(dir), false
		err := filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				none = path == top && errors.Is(err, fs.ErrNotExist)
				return err
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			rel, err := filepath.Rel(d.root, path)
			if err != nil {
				return err
			}
			name := filepath.ToSlash(rel)
			if e.IsDir() && path != top && !listable(name) {
				return fs.SkipDir // not of the store, and perhaps gone soon
			}
			if e.IsDir() || strings.HasPrefix(e.Name(), tmpPrefix) || !strings.HasPrefix(name, prefix) || CheckName(name) != nil {
				return nil
			}
			fi, err := e.Info()
			if errors.Is(err, fs.ErrNotExist) {
				return nil // deleted meanwhile
			} else if err != nil {
				return err
			}
			if !yield(Info{name, fi.Size()}, nil) {
				return fs.SkipAll
			}
			return nil
		})
		if none {
			// No such directory: nothing was ever put there. But when the root
			// itself is gone, "nothing" would be a lie.
			if _, rootErr := os.Stat(d.root); rootErr == nil {
				return
			}
		}
		if err != nil {
			yield(Info{}, fmt.Errorf("list %q: %w", prefix, err))
		}
	}
}

// listable reports whether objects may lie in a directory.
func listable(dir string) bool { return CheckName(dir+"/a") == nil }

func cutLast(s string) (dir, base string, found bool) {
	if i := strings.LastIndexByte(s, '/'); i >= 0 {
		return s[:i], s[i+1:], true
	}
	return "", s, false
}

func (d *Dir) Delete(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := CheckName(name); err != nil {
		return err
	}
	err := removeReadOnly(d.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete %s: %w", name, ErrNotExist)
	} else if err != nil {
		if errors.Is(err, fs.ErrPermission) && d.keepsFrom(name) {
			err = ErrLocked
		}
		return fmt.Errorf("delete %s: %w", name, err)
	}
	return syncDir(filepath.Dir(d.path(name)))
}

// removeReadOnly deletes a file, also where that is refused for one that is
// read-only, as SMB servers do.
func removeReadOnly(path string) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrPermission) && os.Chmod(path, 0o600) == nil {
		if err = os.Remove(path); err != nil {
			_ = os.Chmod(path, 0o400) // as it was
		}
	}
	return err
}

// keepsFrom reports whether it is a lock that refuses to delete an object. Over
// a network it cannot be seen, and in a hardened directory it is the reason.
func (d *Dir) keepsFrom(name string) bool {
	set, known := immutable(d.path(name))
	return set || !known && d.hardened() == nil
}
