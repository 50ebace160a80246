package overlay

import (
	"io"
	"os"
	"path/filepath"

	"holdfast/internal/disk"
	"holdfast/internal/osfile"
)

// dir is what an overlay needs of its directory. There are two: osDir, and in
// tests one that can lose power.
type dir interface {
	// open opens a file for reading and writing.
	open(name string) (file, error)
	// create makes an empty file, emptying one that is there.
	create(name string) (file, error)
	rename(from, to string) error
	remove(name string) error
	// sync makes the names durable.
	sync() error
}

type file interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Size() (int64, error)
	Truncate(size int64) error
	Sync() error
	// Punch zeroes a range and gives it back, or is errors.ErrUnsupported.
	Punch(off, n int64) error
}

// osDir is a directory by its path.
type osDir string

func (d osDir) path(name string) string { return filepath.Join(string(d), name) }

func (d osDir) open(name string) (file, error) {
	f, err := os.OpenFile(d.path(name), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (d osDir) create(name string) (file, error) {
	f, err := os.OpenFile(d.path(name), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := disk.MarkSparse(f); err != nil {
		_ = f.Close() // nothing was written
		return nil, err
	}
	return osFile{f}, nil
}

func (d osDir) rename(from, to string) error { return os.Rename(d.path(from), d.path(to)) }
func (d osDir) remove(name string) error     { return os.Remove(d.path(name)) }
func (d osDir) sync() error                  { return osfile.SyncDir(string(d)) }

type osFile struct{ f *os.File }

func (f osFile) ReadAt(p []byte, off int64) (int, error)  { return f.f.ReadAt(p, off) }
func (f osFile) WriteAt(p []byte, off int64) (int, error) { return f.f.WriteAt(p, off) }
func (f osFile) Close() error                             { return f.f.Close() }
func (f osFile) Truncate(size int64) error                { return f.f.Truncate(size) }
func (f osFile) Sync() error                              { return f.f.Sync() }
func (f osFile) Punch(off, n int64) error                 { return disk.Punch(f.f, off, n) }

func (f osFile) Size() (int64, error) {
	info, err := f.f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}
