// Package disk holds the words in which disk data is spoken of everywhere in
// Holdfast: a Reader of ranges and extents, a Writer of ranges and zeros, and
// a Device that is both. It also has the two plainest disks: File and Mem.
//
// Offsets and lengths are bytes. A disk has one fixed size. Ranges outside
// [0, Size) are errors (ErrRange), never clipped.
//
// A layer above a disk keeps its inner disk in a named field and spells every
// method out. It never embeds it: a method added here later would slip past
// the layer, and a write could reach a backup.
package disk

import (
	"context"
	"errors"
	"fmt"
	"iter"
)

// ErrRange is returned for a range that does not lie inside the disk.
var ErrRange = errors.New("range lies outside the disk")

// ErrReadOnly is returned by a Device that refuses writes.
var ErrReadOnly = errors.New("disk is read-only")

// Extent is a range of a disk. Zero means that the whole range is known to
// read as zeros; Zero false promises nothing about the content.
type Extent struct {
	Off, Len int64 // bytes; Len > 0
	Zero     bool
}

// End is the first byte after the extent.
func (e Extent) End() int64 { return e.Off + e.Len }

// Extents yields extents in ascending order, disjoint. An error is the last
// thing yielded.
type Extents = iter.Seq2[Extent, error]

// Reader is a disk that can be read. Its methods may run in parallel with one
// another; Close may not run in parallel with anything.
type Reader interface {
	// Size is the disk's length in bytes, fixed while it is open.
	Size() int64
	// ReadAt fills p with the bytes at off, or fails. It never reads short.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// Extents covers [off, off+n) without gaps. A disk that knows nothing
	// about its zeros yields one data extent.
	Extents(ctx context.Context, off, n int64) Extents
	Close() error
}

// Feeder is a Reader that reads much at once in an order of its own, as what
// lies scattered on a spinning disk should be read.
type Feeder interface {
	Reader
	// Feed reads the data of extents, and gives it to put in pieces of at most
	// 1 MiB, from up to workers goroutines at once. The disk is cut in windows of
	// so many bytes: no piece comes before all of the windows before its own have
	// been read. A piece is put's until it returns. The first error ends it all;
	// Feed returns when no call of put is under way.
	Feed(ctx context.Context, extents Extents, window int64, workers int, put func(ctx context.Context, p []byte, off int64) error) error
}

// Cached is a Reader that keeps some of what it has read in memory. Wrappers of
// Readers have it too, and ask what they wrap by ReadCached.
type Cached interface {
	// ReadCached is a ReadAt that waits for nothing but memory: it fills p with
	// the bytes at off and says true, or says false, and p holds anything. It
	// says false of what is in error, too.
	ReadCached(p []byte, off int64) bool
}

// ReadCached calls r's, if it is Cached.
func ReadCached(r Reader, p []byte, off int64) bool {
	c, ok := r.(Cached)
	return ok && c.ReadCached(p, off)
}

// Writer is a disk that can be written. WriteAt and ZeroAt of disjoint ranges
// may run in parallel. p belongs to the caller again when WriteAt returns.
type Writer interface {
	WriteAt(ctx context.Context, p []byte, off int64) error
	// ZeroAt makes [off, off+n) read as zeros; trim, unmap and write-zeroes
	// land here. Storage under the range may be given back.
	ZeroAt(ctx context.Context, off, n int64) error
	// Flush makes every write that returned before Flush was called survive a
	// loss of power.
	Flush(ctx context.Context) error
}

// Device is a disk that can be read and written.
type Device interface {
	Reader
	Writer
}

// Exports is what a block protocol serves: disks by name. Open may be called
// many times for one name, also in parallel; each result is closed by its
// caller. A read-only disk answers every write with ErrReadOnly, an empty one
// too, which is how a protocol learns that it is read-only.
type Exports interface {
	Names(ctx context.Context) ([]string, error)
	Open(ctx context.Context, name string) (Device, error)
}

// CheckRange returns ErrRange unless [off, off+n) lies inside [0, size).
// n may be 0.
func CheckRange(size, off, n int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return fmt.Errorf("%w: [%d, %d+%d) of %d bytes", ErrRange, off, off, n, size)
	}
	return nil
}

// IsZero reports whether p holds only zero bytes. It is true for an empty p.
func IsZero(p []byte) bool {
	// Comparing the slice with itself shifted by one is vectorised by the
	// runtime: about 30 GB/s, ten times what hashing could do.
	return len(p) == 0 || p[0] == 0 && string(p[:len(p)-1]) == string(p[1:])
}
