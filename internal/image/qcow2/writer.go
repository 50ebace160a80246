package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"

	"holdfast/internal/disk"
	"holdfast/internal/osfile"
)

// Options of a new image.
type Options struct {
	// ClusterSize in bytes, a power of two from 512 to 2 MiB. 0 means 64 KiB,
	// and for full images above 1 TiB as much more as keeps the table in
	// memory below 16 Mi clusters.
	ClusterSize int64
}

// Writer fills a new image: version 3, no parent, 16-bit refcounts. WriteAt
// and ZeroAt may run in parallel, Flush beside them; Close may not.
//
// Clusters are allocated one after another as they are first written, so the
// file holds what was written and little more. The layout is
//
//	header │ first refcount blocks │ refcount table │ L1 table │ data, L2 tables, further refcount blocks
//
// and nothing is ever freed. So every cluster before the end is in use once,
// and refcounts need no memory. The mapping is held in memory, 4 bytes per
// cluster of a table that was touched, and written by Flush. A crash leaves
// what the last Flush made durable; later writes may leave clusters that
// are counted and not used, never the reverse.
type Writer struct {
	f    file
	size int64 // as asked for; the image's is rounded up to sectors
	lay  layout

	flush sync.Mutex // one Flush at a time, I/O included; taken before mu. Guards refs and table.linked
	refs  int64      // next, as the refcounts on disk have it

	mu     sync.Mutex // guards what follows; not held over I/O
	next   int64      // the first free cluster; refcounts below are 1
	tables map[int64]*table
	bad    error // the first failure to write tables: nothing after it counts
}

// file is an *os.File, or in tests one whose power is cut.
type file interface {
	io.WriterAt
	Name() string
	Sync() error
	Truncate(size int64) error
	Close() error
}

// table is an L2 table: the host cluster of each guest cluster, 0 for none.
type table struct {
	host    int64 // its own cluster
	entries []uint32
	dirty   bool // differs from what is on disk
	linked  bool // the L1 table on disk names it
}

// maxEntries bounds the mapping in memory, by choosing larger clusters: at 4
// bytes each it takes 64 MiB at most (128 MiB at 64 TiB, where clusters cannot
// grow any more).
const maxEntries = 16 << 20

// Create makes a new image of a disk of size bytes that reads as zeros. QEMU
// knows only whole sectors: the image's disk is size rounded up to 512 bytes.
// The file is readable by its owner only. It never overwrites: when the path
// exists the error is fs.ErrExist. On any error nothing is left behind. The
// file's name is durable on return; its content when Flush or Close was.
func Create(path string, size int64, o Options) (*Writer, error) {
	if o.ClusterSize == 0 {
		for o.ClusterSize = 64 << 10; size/o.ClusterSize > maxEntries && o.ClusterSize < 1<<maxClusterBits; {
			o.ClusterSize *= 2
		}
	}
	lay, err := newLayout(size, o.ClusterSize)
	if err != nil {
		return nil, fmt.Errorf("create %s: %w", path, err)
	}
	f, err := create(path, lay, "", "")
	if err != nil {
		return nil, err
	}
	return newWriter(f, size, lay), nil
}

func newWriter(f file, size int64, lay layout) *Writer {
	return &Writer{f: f, size: size, lay: lay, next: lay.first, refs: lay.first, tables: map[int64]*table{}}
}

// CreateOverlay makes a new image that holds nothing: it reads as its backing
// file, which is named as given (a path, or what else QEMU opens, such as
// "nbd+unix:///vda?socket=/run/s" or "json:...") and not looked at. format is
// that of the backing file, "raw" for an NBD export. The file is durable on
// return. Otherwise as Create.
func CreateOverlay(path string, size int64, backing, format string, o Options) error {
	if o.ClusterSize == 0 {
		o.ClusterSize = 64 << 10
	}
	lay, err := newLayout(size, o.ClusterSize)
	switch {
	case err != nil:
	case backing == "" || len(backing) > maxName:
		err = fmt.Errorf("the backing file's name has %d bytes, not 1 to %d", len(backing), maxName)
	case format == "" || len(format) > maxName:
		err = errors.New("an overlay says its backing file's format")
	case v3Length+int64(len(backing)+len(format))+64 > o.ClusterSize:
		err = fmt.Errorf("the backing file's name does not fit into a cluster of %d bytes", o.ClusterSize)
	}
	if err != nil {
		return fmt.Errorf("create %s: %w", path, err)
	}
	f, err := create(path, lay, backing, format)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return errors.Join(fmt.Errorf("create %s: %w", path, err), os.Remove(path))
	}
	return nil
}

// create writes the file of an empty image and makes it durable.
func create(path string, lay layout, backing, format string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create image: %w", err)
	}
	err = lay.writeEmpty(f, backing, format)
	if err == nil {
		err = osfile.SyncDir(filepath.Dir(path))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create %s: %w", path, err), f.Close(), os.Remove(path))
	}
	return f, nil
}

// WriteAt writes p. Bytes of a cluster that were never written read as zeros.
func (w *Writer) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := w.check(ctx, off, int64(len(p))); err != nil {
		return err
	}
	if len(p) == 0 {
		return nil
	}
	hosts, err := w.allocate(off>>w.lay.bits, (off+int64(len(p))-1)>>w.lay.bits)
	if err != nil {
		return err
	}
	return w.each(hosts, off, int64(len(p)), func(host, at, n int64) error {
		_, err := w.f.WriteAt(p[at-off:at-off+n], host)
		return err
	})
}

// ZeroAt makes a range read as zeros. What was never written takes no storage;
// over what was, zeros are written: nothing is ever freed.
func (w *Writer) ZeroAt(ctx context.Context, off, n int64) error {
	if err := w.check(ctx, off, n); err != nil {
		return err
	}
	covers := w.lay.entries << w.lay.bits
	for n > 0 {
		part := min(n, covers-off%covers) // of one L2 table
		hosts, err := w.lookup(off>>w.lay.bits, (off+part-1)>>w.lay.bits)
		if err == nil && hosts != nil {
			err = w.each(hosts, off, part, func(host, at, n int64) error { return w.zero(ctx, host, n) })
		}
		if err != nil {
			return err
		}
		off, n = off+part, n-part
	}
	return nil
}

// zero clears n bytes of the file.
func (w *Writer) zero(ctx context.Context, host, n int64) error {
	zeros := make([]byte, min(n, 1<<20))
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		q := zeros[:min(n, int64(len(zeros)))]
		if _, err := w.f.WriteAt(q, host); err != nil {
			return err
		}
		host, n = host+int64(len(q)), n-int64(len(q))
	}
	return nil
}

// each calls do for the pieces of [off, off+n) that lie together in the file,
// skipping what has no cluster. hosts are the clusters from the one of off on.
func (w *Writer) each(hosts []uint32, off, n int64, do func(host, at, n int64) error) error {
	size := int64(1) << w.lay.bits
	for i := 0; i < len(hosts); {
		j := i + 1
		for j < len(hosts) && hosts[i] != 0 && int64(hosts[j]) == int64(hosts[i])+int64(j-i) {
			j++
		}
		base := off - off%size
		lo := max(off, base+int64(i)*size)
		hi := min(off+n, base+int64(j)*size)
		if hosts[i] != 0 {
			host := int64(hosts[i])*size + lo - (base + int64(i)*size)
			if err := do(host, lo, hi-lo); err != nil {
				return err
			}
		}
		i = j
	}
	return nil
}

func (w *Writer) check(ctx context.Context, off, n int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return disk.CheckRange(w.size, off, n)
}

// allocate returns the host clusters of the guest clusters first to last,
// giving one to those that have none.
func (w *Writer) allocate(first, last int64) ([]uint32, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.bad != nil {
		return nil, w.bad
	}
	hosts := make([]uint32, 0, last-first+1)
	for g := first; g <= last; g++ {
		t := w.tables[g/w.lay.entries]
		if t == nil {
			t = &table{host: w.take(), entries: make([]uint32, w.lay.entries)}
			w.tables[g/w.lay.entries] = t
		}
		e := &t.entries[g%w.lay.entries]
		if *e == 0 {
			*e = uint32(w.take())
			t.dirty = true
		}
		hosts = append(hosts, *e)
	}
	return hosts, nil
}

// take returns the next free cluster. The caller holds mu.
func (w *Writer) take() int64 {
	if w.lay.isRefs(w.next) {
		w.next++
	}
	w.next++
	return w.next - 1
}

// lookup returns the host clusters of guest clusters that have one L2 table,
// 0 for those without; nil when none has one.
func (w *Writer) lookup(first, last int64) ([]uint32, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t := w.tables[first/w.lay.entries]
	if t == nil || w.bad != nil {
		return nil, w.bad
	}
	i := first % w.lay.entries
	return append([]uint32(nil), t.entries[i:i+last-first+1]...), nil
}

// Flush makes the image on disk a whole one, with all writes that returned
// before. After a failure it fails for good.
func (w *Writer) Flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	w.flush.Lock()
	defer w.flush.Unlock()
	w.mu.Lock()
	err := w.bad
	w.mu.Unlock()
	if err != nil {
		return err
	}
	if err := w.writeTables(); err != nil {
		err = fmt.Errorf("write tables of %s: %w", w.f.Name(), err)
		w.mu.Lock()
		w.bad = err
		w.mu.Unlock()
		return err
	}
	return nil
}

// writeTables writes what the tables in memory have and those on disk lack:
// first what is counted, then what maps, then what names the maps.
func (w *Writer) writeTables() error {
	w.mu.Lock()
	next := w.next
	var work []int64 // L1 indexes
	for i, t := range w.tables {
		if t.dirty {
			work = append(work, i)
		}
	}
	w.mu.Unlock()

	if next > w.refs {
		if err := w.lay.writeRefs(w.f, w.refs, next, ones); err != nil {
			return err
		}
		w.refs = next
	}
	if err := w.f.Sync(); err != nil || len(work) == 0 {
		return err
	}
	buf := make([]byte, 1<<w.lay.bits)
	for _, i := range work {
		if _, err := w.f.WriteAt(buf, w.encode(i, next, buf)); err != nil {
			return err
		}
	}
	if err := w.f.Sync(); err != nil {
		return err
	}
	named := false
	for _, i := range work {
		w.mu.Lock()
		t := w.tables[i]
		w.mu.Unlock()
		if t.linked {
			continue
		}
		e := binary.BigEndian.AppendUint64(nil, uint64(t.host)<<w.lay.bits|flagCopied)
		if _, err := w.f.WriteAt(e, w.lay.l1<<w.lay.bits+i*8); err != nil {
			return err
		}
		t.linked, named = true, true
	}
	if !named {
		return nil
	}
	return w.f.Sync()
}

// encode writes an L2 table as the image has it, but for clusters from next
// on, which are not counted yet and so not named. It returns the table's
// offset.
func (w *Writer) encode(index, next int64, buf []byte) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	t := w.tables[index]
	t.dirty = false
	for i, c := range t.entries {
		var e uint64
		switch {
		case c == 0:
		case int64(c) >= next:
			t.dirty = true
		default:
			e = uint64(c)<<w.lay.bits | flagCopied
		}
		binary.BigEndian.PutUint64(buf[i*8:], e)
	}
	return t.host << w.lay.bits
}

// Close flushes, gives the file whole clusters, and closes it. An error means
// that the image is not whole.
func (w *Writer) Close() error {
	// A file that ends within its last cluster is readable, but some readers
	// call it truncated.
	err := w.f.Truncate(w.next << w.lay.bits)
	if err == nil {
		err = w.Flush(context.Background())
	}
	return errors.Join(err, w.f.Close())
}
