package blob

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"holdfast/internal/osfile"
)

// files is what a Dir changes in a filesystem. There are two: osFiles, and in
// tests one that can lose power.
type files interface {
	// nameless opens a new file in dir that has no name, or fails with
	// errNameless where there is no such thing.
	nameless(dir string) (newFile, error)
	// named opens a new file in dir that has a temporary name until it is closed.
	named(dir string) (newFile, error)
	mkdir(dir string) error
	remove(path string) error
	// syncDir makes the names in a directory durable.
	syncDir(dir string) error
}

// newFile is a file that is being written.
type newFile interface {
	io.Writer
	Sync() error
	// link gives the file a name; fs.ErrExist when it is taken.
	link(path string) error
	// Close closes the file, whose content goes with it when it has no name.
	Close() error
}

// errNameless: this filesystem, or this system, has no files without a name.
var errNameless = errors.New("no nameless files here")

// osFiles are the real ones.
type osFiles struct{}

func (osFiles) mkdir(dir string) error   { return os.Mkdir(dir, 0o700) }
func (osFiles) remove(path string) error { return removeReadOnly(path) }
func (osFiles) syncDir(dir string) error { return osfile.SyncDir(dir) }

func (osFiles) named(dir string) (newFile, error) {
	f, err := os.CreateTemp(dir, tmpPrefix+"*")
	if err != nil {
		return nil, err
	}
	return &namedFile{f: f}, nil
}

type namedFile struct {
	f             *os.File
	path          string // its lasting name, once it has one
	closed, moved bool
}

func (n *namedFile) Write(p []byte) (int, error) { return write(n.f, p) }
func (n *namedFile) Sync() error                 { return n.f.Sync() }

// link closes the file first: a filesystem over a network may have something
// to say then, and Windows links no open file of its own.
func (n *namedFile) link(path string) error {
	n.closed = true
	if err := n.f.Close(); err != nil {
		return err
	}
	err := os.Link(n.f.Name(), path)
	switch {
	case errors.Is(err, fs.ErrExist) && linked(n.f.Name()):
		err = nil
	case noLinks(err):
		err = renameNew(n.f.Name(), path)
		n.moved = err == nil
	}
	if err == nil {
		n.path = path
	}
	return err
}

func (n *namedFile) Close() (err error) {
	if !n.closed {
		err = n.f.Close()
	}
	if !n.moved {
		err = errors.Join(err, os.Remove(n.f.Name()))
	}
	if err == nil && n.path != "" {
		// At last: SMB servers remove no name of a file that is read-only.
		_ = os.Chmod(n.path, 0o400)
	}
	return err
}

// write writes the whole content of a file.
func write(f *os.File, p []byte) (int, error) {
	w := osfile.NewWriter(f)
	n, err := w.WriteAt(p, 0)
	return n, errors.Join(err, w.Close())
}

// create makes path with data, durable but for its directory entry; it fails
// with fs.ErrExist when path exists.
func (d *Dir) create(path string, data []byte) error {
	f, err := d.fs.nameless(filepath.Dir(path))
	if err == nil {
		err = fill(f, path, data)
	}
	if !errors.Is(err, errNameless) {
		return err
	}
	if f, err = d.fs.named(filepath.Dir(path)); err != nil {
		return err
	}
	return fill(f, path, data)
}

// fill writes data, syncs, names and closes f.
func fill(f newFile, path string, data []byte) error {
	_, err := f.Write(data)
	if err == nil {
		// An error of fsync is final for this file: it is never tried again.
		err = f.Sync()
	}
	if err == nil {
		err = f.link(path)
	}
	return errors.Join(err, f.Close())
}
