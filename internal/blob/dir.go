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
	fs   files

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
	return &Dir{root: abs, fs: osFiles{}, made: map[string]bool{abs: true}, turn: make(chan struct{}, 1)}, nil
}

// CreateDir makes the directory, which may exist when it is empty, and opens it.
func CreateDir(root string) (*Dir, error) {
	abs, err := filepath.Abs(root)
	if err == nil {
		err = makeAll(osFiles{}, abs)
	}
	if err != nil {
		return nil, err
	}
	return OpenDir(root)
}

// makeAll makes a directory and those above it that are missing, each durable
// in its parent.
func makeAll(f files, dir string) error {
	parent := filepath.Dir(dir)
	err := f.mkdir(dir)
	if errors.Is(err, fs.ErrNotExist) && parent != dir {
		if err := makeAll(f, parent); err != nil {
			return err
		}
		err = f.mkdir(dir)
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return f.syncDir(parent)
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
	if err := d.create(path, data); err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = ErrExist
		}
		return fmt.Errorf("put %s: %w", name, err)
	}
	if err := d.fs.syncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("put %s: %w: %w", name, ErrUnsynced, err)
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
	if err := d.fs.mkdir(dir); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := d.fs.syncDir(parent); err != nil {
		return err
	}
	d.mu.Lock()
	d.made[dir] = true
	d.mu.Unlock()
	return nil
}

func (d *Dir) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	f, err := d.open(ctx, name)
	if err != nil {
		return nil, err
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
	if err := readFrom(f, name, off, p); err != nil {
		return nil, err
	}
	return p, nil
}

// Fill implements Filler.
func (d *Dir) Fill(ctx context.Context, name string, off int64, p []byte) error {
	f, err := d.open(ctx, name)
	if err != nil {
		return err
	}
	defer f.Close()
	if off < 0 {
		return fmt.Errorf("get %s [%d, +%d): %w", name, off, len(p), ErrTruncated)
	}
	return readFrom(f, name, off, p)
}

// OneHead implements OneHead.
func (d *Dir) OneHead() {}

func (d *Dir) open(ctx context.Context, name string) (*os.File, error) {
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
	return f, nil
}

func readFrom(f *os.File, name string, off int64, p []byte) error {
	if _, err := f.ReadAt(p, off); err == io.EOF {
		return fmt.Errorf("get %s [%d, +%d): %w", name, off, len(p), ErrTruncated)
	} else if err != nil {
		return fmt.Errorf("get %s: %w", name, err)
	}
	return nil
}

// List fails when a directory that it has found cannot be read, be it that it is
// gone: what was in it cannot be told. Symbolic links to directories are
// followed, since packs are moved to larger disks that way.
func (d *Dir) List(ctx context.Context, prefix string) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		dir, _, _ := cutLast(prefix)
		entries, err := os.ReadDir(d.path(dir))
		if errors.Is(err, fs.ErrNotExist) {
			// No such directory: nothing was ever put there. But when the root
			// itself is gone, "nothing" would be a lie.
			if _, rootErr := os.Stat(d.root); rootErr == nil {
				return
			}
		}
		if err == nil {
			_, err = d.list(ctx, prefix, dir, entries, yield)
		}
		if err != nil {
			yield(Info{}, fmt.Errorf("list %q: %w", prefix, err))
		}
	}
}

// list yields what is in a directory and below, until more is false.
func (d *Dir) list(ctx context.Context, prefix, dir string, entries []fs.DirEntry, yield func(Info, error) bool) (more bool, err error) {
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return false, err
		}
		name := e.Name()
		if dir != "" {
			name = dir + "/" + name
		}
		if CheckName(name) != nil { // that of a temporary file among others; its length ends loops of links, too
			continue
		}
		fi, err := os.Stat(d.path(name))
		if errors.Is(err, fs.ErrNotExist) && e.Type().IsRegular() {
			continue // deleted meanwhile
		} else if err != nil {
			return false, err
		}
		switch {
		case fi.IsDir():
			inner, err := os.ReadDir(d.path(name))
			if err == nil {
				more, err = d.list(ctx, prefix, name, inner, yield)
			}
			if err != nil || !more {
				return false, err
			}
		case strings.HasPrefix(name, prefix):
			if !yield(Info{name, fi.Size()}, nil) {
				return false, nil
			}
		}
	}
	return true, nil
}

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
	err := d.fs.remove(d.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete %s: %w", name, ErrNotExist)
	} else if err != nil {
		if errors.Is(err, fs.ErrPermission) && d.keepsFrom(name) {
			err = ErrLocked
		}
		return fmt.Errorf("delete %s: %w", name, err)
	}
	return d.fs.syncDir(filepath.Dir(d.path(name)))
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
