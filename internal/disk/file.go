package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"holdfast/internal/osfile"
)

// File is a disk in a file, byte for byte (a "raw" image), or a block device.
// All methods but Close may run in parallel. Holes of the file are its zero
// extents where the system tells them (Linux); elsewhere all is data.
type File struct {
	f        *os.File
	w        *osfile.Writer
	size     int64
	readOnly bool

	mu  sync.Mutex // guards bad
	bad error      // the first failed Flush
}

// FileOptions of OpenFile.
type FileOptions struct {
	// ReadOnly opens the file for reading; writes are answered with
	// ErrReadOnly.
	ReadOnly bool
}

// OpenFile opens an existing file or block device. Its length now is the
// disk's size.
func OpenFile(path string, o FileOptions) (*File, error) {
	flag := os.O_RDWR
	if o.ReadOnly {
		flag = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flag, 0)
	if err != nil {
		return nil, fmt.Errorf("open disk file: %w", err)
	}
	// Seeking, unlike Stat, also knows the length of a block device.
	size, err := f.Seek(0, io.SeekEnd)
	if err == nil {
		var info os.FileInfo
		if info, err = f.Stat(); err == nil && info.IsDir() {
			err = errors.New("is a directory")
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open disk file %s: %w", path, err), f.Close())
	}
	return newFile(f, size, o.ReadOnly), nil
}

// CreateFile makes a new file of size bytes that read as zeros and occupy no
// storage yet, readable by its owner only. The file's existence is durable on
// return. It never overwrites: when the path exists the error is
// fs.ErrExist. On any other error nothing is left behind.
func CreateFile(path string, size int64) (*File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create disk file: %w", err)
	}
	err = MarkSparse(f)
	if err == nil {
		err = f.Truncate(size)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = osfile.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create disk file %s: %w", path, err), f.Close(), os.Remove(path))
	}
	return newFile(f, size, false), nil
}

func newFile(f *os.File, size int64, readOnly bool) *File {
	return &File{f: f, w: osfile.NewWriter(f), size: size, readOnly: readOnly}
}

func (d *File) Size() int64 { return d.size }

// Close does not flush.
func (d *File) Close() error { return errors.Join(d.w.Close(), d.f.Close()) }

func (d *File) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := checkIO(ctx, d.size, off, int64(len(p))); err != nil {
		return err
	}
	if _, err := d.f.ReadAt(p, off); err != nil && len(p) > 0 {
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: file is shorter than when it was opened", io.ErrUnexpectedEOF)
		}
		return fmt.Errorf("read %s at %d: %w", d.f.Name(), off, err)
	}
	return nil
}

func (d *File) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := d.checkWrite(ctx, off, int64(len(p))); err != nil {
		return err
	}
	_, err := d.w.WriteAt(p, off) // the error names operation and path
	return err
}

// ZeroAt gives storage back where the file's system can punch holes, and
// writes zeros where it cannot.
func (d *File) ZeroAt(ctx context.Context, off, n int64) error {
	if err := d.checkWrite(ctx, off, n); err != nil || n == 0 {
		return err
	}
	err := Punch(d.f, off, n)
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	zeros := make([]byte, min(n, 1<<20))
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := zeros[:min(n, int64(len(zeros)))]
		if _, err := d.w.WriteAt(p, off); err != nil {
			return err
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

// Flush syncs the file. After a failed Flush the kernel may have dropped what
// it could not write and forgotten about it; so every later Flush fails too.
func (d *File) Flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if d.readOnly {
		return nil
	}
	if err := d.failed(nil); err != nil {
		return fmt.Errorf("flush after a failed flush: %w", err)
	}
	if err := d.f.Sync(); err != nil {
		return d.failed(err)
	}
	return nil
}

// failed notes the first error, if err is one, and returns it.
func (d *File) failed(err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.bad == nil {
		d.bad = err
	}
	return d.bad
}

func (d *File) checkWrite(ctx context.Context, off, n int64) error {
	if d.readOnly {
		return ErrReadOnly
	}
	return checkIO(ctx, d.size, off, n)
}

// Extents tells holes from data as the filesystem does: of the moment, at its
// own granularity.
func (d *File) Extents(ctx context.Context, off, n int64) Extents {
	if err := checkIO(ctx, d.size, off, n); err != nil {
		return Fail(err)
	}
	return Merge(func(yield func(Extent, error) bool) {
		for at, end := off, off+n; at < end; {
			if err := ctx.Err(); err != nil {
				yield(Extent{}, err)
				return
			}
			e, err := nextExtent(d.f, at, d.size)
			if err != nil {
				yield(Extent{}, fmt.Errorf("map %s at %d: %w", d.f.Name(), at, err))
				return
			}
			e.Len = min(e.Len, end-at)
			if !yield(e, nil) {
				return
			}
			at = e.End()
		}
	})
}
