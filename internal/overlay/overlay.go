// Package overlay redirects the writes to a read-only disk into files of its
// own, so that a machine can run from a restore point without changing it.
//
//	read   base, or the data file, or zeros, as the map says for each block
//	write  data file, map record to the log, answer
//	flush  sync the data file, commit record to the log, sync the log
//	open   replay the log, write it anew
//
// The bytes on disk are specified in docs/overlay-format.md.
//
// # Promises
//
// What was answered before a Flush survives a loss of power once that Flush
// was answered: data is durable before the map entry that points to it.
// What was answered at all survives the death of the process (on Linux, where
// the page cache outlives it and the machine's boot has an id; elsewhere what
// was flushed survives). A client that reconnects after such a death, as QEMU
// does, therefore finds all that it was told is written. Nothing is saved by
// Close.
//
// As on a disk, a write in flight when the power is lost may be there in
// part, in sectors; one in flight when the process dies, too.
//
// A full disk fails the write, with ENOSPC in its error, and loses nothing.
// When there is space again, work goes on. A failed sync is another matter:
// the kernel may have dropped what it could not write. From then on all
// writes and flushes fail until the overlay is opened again; it then has what
// was flushed.
//
// # Shape
//
// The map is by blocks of 4 KiB, since that is what guests write: nothing
// needs to be read from the base to hold a whole block, and a write of part
// of a block reads 4 KiB at most twice. Places in the data file are given by
// clusters of 64 KiB, since that makes the map sixteen times smaller and keeps
// neighbours together: 12 bytes in memory for each cluster written, 192 KiB
// for a GiB written in order. A cluster keeps its slot for good; blocks are
// overwritten there in place. Where the filesystem has holes the parts of
// slots without data take no space.
//
// # What may run beside what
//
// All methods but Close may run in parallel. Writes to a common block wait
// for one another, in order of arrival; reads wait for nobody. Locks are taken in
// this order: range of the disk, turn to flush, turn to append, map. The turns
// are held over I/O since to order it is what they are for; the map's lock is
// not. One process at a time: the directory is locked.
package overlay

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"holdfast/internal/disk"
	"holdfast/internal/osfile"
)

var (
	// ErrOtherBase means that the overlay was made over another disk.
	ErrOtherBase = errors.New("overlay belongs to another disk")
	// ErrLocked means that the overlay is open already, here or in another
	// process.
	ErrLocked = errors.New("overlay is in use")
	// ErrVersion means that a newer Holdfast wrote the overlay.
	ErrVersion = errors.New("overlay needs a newer Holdfast")
	// ErrDamaged means that the files contradict themselves or each other.
	ErrDamaged = errors.New("overlay is damaged")
	// ErrFailed is wrapped by every write and flush after a failed sync.
	ErrFailed = errors.New("overlay must be opened again after a failed sync")
)

// Identity names the base disk for good, such as a restore point's id with a
// disk's. It is at most 1024 bytes long.
type Identity string

// Overlay is a disk whose writes go to a directory. It is a disk.Device.
type Overlay struct {
	size    int64
	opening uint32 // how many times it has been opened
	base    disk.Reader
	dir     dir
	unlock  io.Closer
	data    file
	dirty   atomic.Bool // data was written since its last sync
	ranges  ranges

	flushing sync.Mutex // the turn to flush; guards flushed
	flushed  uint64     // number of the last flush that succeeded

	appending sync.Mutex // the turn to append to the log, and all fields of log
	log       *log

	mu     sync.RWMutex // guards all below
	m      *blockMap    // its blocks' states change in the turn to append only
	mark   uint32       // stamped on what is written now
	begun  uint64       // number of the last flush begun
	failed error
}

// Create makes a new overlay in the directory, which is made when it is not
// there, over a base of size bytes. It is durable on return. It never replaces
// an overlay: that is fs.ErrExist.
func Create(path string, id Identity, size int64) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return fmt.Errorf("create overlay: %w", err)
	}
	lock, err := lockDir(path)
	if err != nil {
		return fmt.Errorf("create overlay in %s: %w", path, err)
	}
	err = errors.Join(create(osDir(path), bootID(), id, size), osfile.SyncDir(filepath.Dir(path)), lock.Close())
	if err != nil {
		return fmt.Errorf("create overlay in %s: %w", path, err)
	}
	return nil
}

func create(d dir, boot boot, id Identity, size int64) error {
	if len(id) > maxIdentity {
		return fmt.Errorf("identity of %d bytes is too long", len(id))
	}
	if size < 0 || size > maxSize {
		return fmt.Errorf("size of %d bytes is out of range", size)
	}
	if err := vacant(d); err != nil {
		return err
	}
	h := header{size: size, boot: boot, identity: id}
	_, _ = rand.Read(h.id[:]) // never fails
	data, err := d.create(dataName)
	if err != nil {
		return err
	}
	_, err = data.WriteAt(encodeDataHeader(h.id), 0)
	if err == nil {
		err = data.Sync()
	}
	if err = errors.Join(err, data.Close()); err != nil {
		return err
	}
	// The log's name makes it an overlay.
	if _, err := writeLog(d, &h, newBlockMap(size), &sync.Mutex{}); err != nil {
		return err
	}
	return installLog(d)
}

// vacant says whether an overlay may be created: there is no log, and no data
// but the header that a Create which died may have left.
func vacant(d dir) error {
	f, err := d.open(logName)
	if err == nil {
		return errors.Join(fmt.Errorf("overlay: %w", fs.ErrExist), f.Close())
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err = d.open(dataName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	size, err := f.Size()
	if err == nil && size > headerLen {
		err = fmt.Errorf("data of an overlay without its log: %w", fs.ErrExist)
	}
	return errors.Join(err, f.Close())
}

// Open opens the overlay in the directory over its base, whose identity and
// size must be those that it was created with. It holds the only lock on it
// until Close. It writes the log anew, so there must be space for that, 12
// bytes for each 64 KiB held. base is closed with the overlay; on an error it stays open.
func Open(path string, id Identity, base disk.Reader) (*Overlay, error) {
	// Where there is no overlay not even a lock is left.
	if _, err := os.Stat(filepath.Join(path, logName)); err != nil {
		return nil, fmt.Errorf("open overlay: %w", err)
	}
	lock, err := lockDir(path)
	if err != nil {
		return nil, fmt.Errorf("open overlay in %s: %w", path, err)
	}
	o, err := open(osDir(path), bootID(), id, base)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open overlay in %s: %w", path, err), lock.Close())
	}
	o.unlock = lock
	return o, nil
}

func open(d dir, now boot, id Identity, base disk.Reader) (*Overlay, error) {
	h, m, err := load(d, now, func(h header) error {
		if h.identity != id {
			return fmt.Errorf("%w: it was made over %q, not %q", ErrOtherBase, h.identity, id)
		}
		if h.size != base.Size() {
			return fmt.Errorf("%w: it was made over one of %d bytes, not %d", ErrOtherBase, h.size, base.Size())
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	data, err := openData(d, h.id, m)
	if err != nil {
		return nil, err
	}
	o := &Overlay{size: h.size, base: base, dir: d, data: data, m: m, mark: 1}
	// All that the new log will say must be durable before it.
	if err = data.Sync(); err == nil {
		h.boot = now
		h.opening++
		o.opening = h.opening
		err = o.startLog(h)
	}
	if err != nil {
		return nil, errors.Join(err, data.Close())
	}
	return o, nil
}

// startLog begins a log with the map as it is.
func (o *Overlay) startLog(h header) error {
	last, err := writeLog(o.dir, &h, o.m, o.mu.RLocker())
	if err == nil {
		err = installLog(o.dir)
	}
	if err == nil {
		o.log, err = continueLog(o.dir, h, last)
	}
	return err
}

// openData opens the data file and checks that it belongs to the log's map.
func openData(d dir, id [16]byte, m *blockMap) (file, error) {
	f, err := d.open(dataName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: its data file is gone", ErrDamaged)
	}
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err == nil {
		err = checkDataHeader(f, id)
	}
	if err == nil {
		err = m.check(size)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Size is the base's size.
func (o *Overlay) Size() int64 { return o.size }

// Close releases the directory and closes the base. It saves nothing: call
// Flush before if what was written is to survive a loss of power.
func (o *Overlay) Close() error {
	err := errors.Join(o.log.f.Close(), o.data.Close())
	if o.unlock != nil {
		err = errors.Join(err, o.unlock.Close())
	}
	return errors.Join(err, o.base.Close())
}

// Used is how many bytes of the disk are held as data here.
func (o *Overlay) Used() int64 {
	o.mu.RLock()
	defer o.mu.RUnlock()
	return o.m.used * blockSize
}

func (o *Overlay) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := o.check(ctx, off, int64(len(p))); err != nil {
		return err
	}
	o.mu.RLock()
	segs := o.m.segments(nil, off, off+int64(len(p)), all, len(p)/blockSize+2)
	o.mu.RUnlock()
	for _, s := range segs {
		q := p[s.off-off : s.end-off]
		switch s.state {
		case absent:
			if err := o.base.ReadAt(ctx, q, s.off); err != nil {
				return fmt.Errorf("read the base at %d: %w", s.off, err)
			}
		case zero:
			clear(q)
		case data:
			if _, err := o.data.ReadAt(q, s.place); err != nil {
				return fmt.Errorf("read overlay data for %d: %w", s.off, err)
			}
		}
	}
	return nil
}

// ReadCached knows the zeros of the overlay, and asks the base where the overlay
// holds nothing. It does not look at the overlay's own data.
func (o *Overlay) ReadCached(p []byte, off int64) bool {
	if disk.CheckRange(o.size, off, int64(len(p))) != nil {
		return false
	}
	o.mu.RLock()
	segs := o.m.segments(nil, off, off+int64(len(p)), all, len(p)/blockSize+2)
	o.mu.RUnlock()
	for _, s := range segs {
		switch q := p[s.off-off : s.end-off]; {
		case s.state == zero:
			clear(q)
		case s.state == data || !disk.ReadCached(o.base, q, s.off):
			return false
		}
	}
	return true
}

// Flush makes all writes that returned before it was called survive a loss of
// power. Calls that wait for one another share the work.
func (o *Overlay) Flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	o.mu.RLock()
	need := o.begun + 1 // a flush that has begun may have missed a write
	o.mu.RUnlock()
	o.flushing.Lock()
	defer o.flushing.Unlock()
	if o.flushed >= need {
		return nil
	}
	o.mu.Lock()
	o.begun++
	n, err := o.begun, o.failed
	o.mu.Unlock()
	if err == nil {
		err = o.commit()
	}
	if err != nil {
		return fmt.Errorf("flush overlay: %w", err)
	}
	o.flushed = n
	return nil
}

// commit is a flush, in the turn to flush.
func (o *Overlay) commit() error {
	o.appending.Lock()
	upto := o.log.tail
	done := o.log.committed
	o.appending.Unlock()
	if o.dirty.Swap(false) {
		if err := o.data.Sync(); err != nil {
			return o.fail(fmt.Errorf("sync data: %w", err))
		}
	}
	if upto == done {
		return nil
	}
	o.appending.Lock()
	err := o.append(encodeCommit(upto))
	end, number := o.log.tail, o.log.number
	o.appending.Unlock()
	if err != nil {
		return err
	}
	if err := o.log.f.Sync(); err != nil {
		return o.fail(fmt.Errorf("sync log: %w", err))
	}
	o.appending.Lock()
	o.log.durable, o.log.durableNo = end, number
	o.log.committed = end
	if upto != end-commitLen {
		o.log.committed = upto // records came between
	}
	grown := end > o.log.rewriteAt
	o.appending.Unlock()
	if grown {
		return o.rewrite()
	}
	return nil
}

// rewrite replaces the log by one that holds the map as it is, in the turn to
// flush. Only an error that leaves the overlay unusable is returned: not to
// shorten the log costs space, and it is tried again.
func (o *Overlay) rewrite() error {
	o.appending.Lock() // so the map stays as it is
	defer o.appending.Unlock()
	if o.dirty.Swap(false) {
		if err := o.data.Sync(); err != nil {
			return errors.Join(o.broken(fmt.Errorf("sync data: %w", err)), o.log.lose())
		}
	}
	h := o.log.h
	last, err := writeLog(o.dir, &h, o.m, o.mu.RLocker())
	if err != nil {
		o.log.rewriteAt = 2 * o.log.tail
		return nil
	}
	// From here on the log's name may be the new one's.
	if err = o.log.f.Close(); err == nil {
		err = installLog(o.dir)
	}
	var l *log
	if err == nil {
		l, err = continueLog(o.dir, h, last)
	}
	if err != nil {
		return o.broken(fmt.Errorf("replace the log: %w", err))
	}
	o.log = l
	return nil
}

// append writes records to the log, in the turn to append.
func (o *Overlay) append(recs ...record) error {
	err := o.log.append(recs...)
	if errors.Is(err, ErrFailed) {
		return o.broken(err)
	}
	return err
}

// fail notes that a sync failed and marks the log, so that the next Open does
// not believe what may be lost. It returns the error.
func (o *Overlay) fail(err error) error {
	o.appending.Lock()
	defer o.appending.Unlock()
	return errors.Join(o.broken(err), o.log.lose())
}

// broken refuses all writes from now on. It returns the error.
func (o *Overlay) broken(err error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.failed == nil {
		o.failed = fmt.Errorf("%w (%w)", ErrFailed, err)
	}
	return o.failed
}

func (o *Overlay) check(ctx context.Context, off, n int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return disk.CheckRange(o.size, off, n)
}
