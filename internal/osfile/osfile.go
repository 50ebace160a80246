// Package osfile is what Go's os package lacks of files: names that are durable,
// and writing past the page cache.
//
// What a backup writes is not read again soon. Through the page cache it would
// push out what the host's guests read, and cost a copy and a page of memory
// for every 4 KiB: on a virtual machine a core wrote 0.4 to 1.5 GB/s that way,
// and 5 to 10 GB/s past it (4 GiB in writes of 1 MiB, ext4, both synced).
//
// All functions are safe in parallel.
package osfile

import (
	"errors"
	"io"
	"os"
	"sync"
	"unsafe"
)

const (
	// block is what positions, lengths and addresses of writes past the page
	// cache are multiples of, bytes: no common disk has larger sectors.
	block = 4096
	// large is the least length worth a write of its own to the disk, bytes.
	large = 256 << 10
)

// Writer writes to a file, large pieces past the page cache. Where the system
// or the filesystem has no such thing, it writes as os.File does.
type Writer struct {
	f      *os.File
	open   sync.Once
	direct file // the same file again, opened by open; nil without

	// cached lets one write at a time into the page cache: the kernel takes the
	// file's lock for each of them anyway, and spins on it while others hold it.
	// Four writers spent three times the processor's time of one.
	cached sync.Mutex
}

// file is an os.File; tests have one that refuses.
type file interface {
	io.WriterAt
	io.Closer
}

// NewWriter makes a Writer of a file that is open for writing. The file stays
// the caller's.
func NewWriter(f *os.File) *Writer { return &Writer{f: f} }

// Close closes the Writer, but not the file. It does not sync.
func (w *Writer) Close() error {
	if w.direct == nil {
		return nil
	}
	return w.direct.Close()
}

// WriteAt is that of the file. Pieces that do not overlap may be written in
// parallel; a sync of the file makes them durable.
func (w *Writer) WriteAt(p []byte, off int64) (n int, err error) {
	if off%block == 0 && len(p) >= large && uintptr(unsafe.Pointer(unsafe.SliceData(p)))%block == 0 {
		w.open.Do(func() {
			if d := openDirect(w.f); d != nil {
				w.direct = d
			}
		})
		if w.direct != nil {
			n, err = w.direct.WriteAt(p[:len(p)-len(p)%block], off)
			// A filesystem may open the file so, and then refuse to write.
			if n == len(p) || err != nil && !errors.Is(err, errDirect) {
				return n, err
			}
		}
	}
	w.cached.Lock()
	defer w.cached.Unlock()
	rest, err := w.f.WriteAt(p[n:], off+int64(n))
	return n + rest, err
}
