package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"

	"holdfast/internal/disk"
)

const (
	// packRegion is how many clusters are set aside at once for compressed
	// ones to lie in one behind the other. What is left over at a region's end
	// is lost, so it is large beside the one cluster that did not fit there.
	packRegion = 32
	// packStep is how much of a disk is compressed before it is written, bytes.
	packStep = 1 << 20
	// flushStep is how many bytes of tables a flush holds at once.
	flushStep = 8 << 20
	// maxPackEntries is maxEntries for entries of 8 bytes.
	maxPackEntries = maxEntries / 2

	// pending is the entry of a cluster that is being written.
	pending = math.MaxUint64
)

// errTwice is of a write to what was written before.
var errTwice = errors.New("a compressed image is written once, from nothing: its clusters have no room to change")

// PackOptions of a compressed image.
type PackOptions struct {
	// ClusterSize in bytes, a power of two from 512 to 2 MiB. 0 means 64 KiB,
	// and for disks above 512 GiB as much more as keeps the table in memory
	// below 8 Mi clusters.
	ClusterSize int64
	// Compression is zstd unless it is Zlib, which QEMU before 5.1 needs.
	Compression Compression
}

// Packer fills a new compressed image in one pass: version 3, no parent, 16-bit
// refcounts. It is a disk.Writer for a copy of a whole disk: mover.Copy with
// ClusterSize as the alignment. WriteAt and ZeroAt may run in parallel, Flush
// beside them; Close may not.
//
// WriteAt takes whole clusters, each once. A part of one is refused: a cluster
// is compressed as a whole, so the rest of it would have to be kept until it
// comes, or be read back and written again, and nothing here is ever freed.
// Clusters are compressed in the goroutine of whoever writes them; only the
// choice of their place is made one at a time. Those that do not get smaller
// are stored as they are, on a cluster of their own; compressed ones lie one
// behind the other in regions of many clusters, which so are in use several
// times or, at a region's end, not at all. The layout is otherwise that of a
// Writer.
//
// In memory it has 8 bytes for each cluster of a table that was touched, and 2
// for each of the file. A crash leaves what the last Flush made durable, and
// perhaps more; every cluster then in use is counted, and some may be counted
// that are not used.
type Packer struct {
	f    file
	size int64 // as asked for; the image's is rounded up to sectors
	lay  layout
	z    *deflater

	flush   sync.Mutex // one Flush at a time, I/O included; taken before mu. Guards counted and packTable.linked
	counted int64      // the refcounts of the clusters before this one are right on disk

	mu     sync.Mutex // guards what follows; not held over I/O
	next   int64      // the first cluster that was never set aside
	pack   extent     // what is left of the region for compressed clusters
	counts []uint16   // refcounts of the clusters from lay.first on
	tables map[int64]*packTable
	bad    error // the first failure to write: nothing after it counts
}

// packTable is an L2 table.
type packTable struct {
	host    int64 // its own cluster
	entries []uint64
	dirty   bool // differs from what is on disk
	linked  bool // the L1 table on disk names it
}

// CreateCompressed makes a new image of a disk of size bytes that reads as
// zeros, to be filled in one pass. Otherwise as Create.
func CreateCompressed(path string, size int64, o PackOptions) (*Packer, error) {
	if o.ClusterSize == 0 {
		for o.ClusterSize = 64 << 10; size/o.ClusterSize > maxPackEntries && o.ClusterSize < 1<<maxClusterBits; {
			o.ClusterSize *= 2
		}
	}
	lay, err := newPackedLayout(size, o.ClusterSize, o.Compression.kind())
	if err != nil {
		return nil, fmt.Errorf("create %s: %w", path, err)
	}
	f, err := create(path, lay, "", "")
	if err != nil {
		return nil, err
	}
	return newPacker(f, size, lay), nil
}

func newPacker(f file, size int64, lay layout) *Packer {
	return &Packer{f: f, size: size, lay: lay, z: newDeflater(lay.compression, 1<<lay.bits),
		next: lay.first, counted: lay.first, tables: map[int64]*packTable{}}
}

// ClusterSize is the unit in which WriteAt takes the disk, in bytes.
func (w *Packer) ClusterSize() int64 { return 1 << w.lay.bits }

// WriteAt compresses and writes whole clusters; only the disk's end may cut the
// last one short.
func (w *Packer) WriteAt(ctx context.Context, p []byte, off int64) error {
	n := int64(len(p))
	if err := w.check(ctx, off, n); err != nil {
		return err
	}
	if cluster := w.ClusterSize(); off%cluster != 0 || n%cluster != 0 && off+n != w.size {
		return fmt.Errorf("write %d bytes at %d: a compressed image takes whole clusters of %d bytes", n, off, cluster)
	}
	step := max(packStep, w.ClusterSize())
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		part := min(n, step)
		if err := w.write(ctx, p[:part], off); err != nil {
			return err
		}
		p, off, n = p[part:], off+part, n-part
	}
	return nil
}

// ZeroAt does nothing where nothing was written yet; where something was, it is
// refused.
func (w *Packer) ZeroAt(ctx context.Context, off, n int64) error {
	if err := w.check(ctx, off, n); err != nil || n == 0 {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	last := (off + n - 1) >> w.lay.bits
	for g := off >> w.lay.bits; g <= last; {
		t := w.tables[g/w.lay.entries]
		if t == nil {
			g += w.lay.entries - g%w.lay.entries
			continue
		}
		if t.entries[g%w.lay.entries] != 0 {
			return fmt.Errorf("zero %d bytes at %d: %w", n, off, errTwice)
		}
		g++
	}
	return w.bad
}

func (w *Packer) check(ctx context.Context, off, n int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return disk.CheckRange(w.size, off, n)
}

// packed is a cluster on its way into the file.
type packed struct {
	guest      int64 // its number
	data       []byte
	compressed bool
	host       int64 // offset in the file
}

// write compresses and writes up to packStep bytes of clusters.
func (w *Packer) write(ctx context.Context, p []byte, off int64) error {
	cluster := w.ClusterSize()
	buf := w.z.buffer()
	defer w.z.buffers.Put(buf)
	list := make([]packed, 0, up(int64(len(p)), cluster))
	out := (*buf)[:0]
	for at := int64(0); at < int64(len(p)); at += cluster {
		c := p[at:min(int64(len(p)), at+cluster)]
		if disk.IsZero(c) {
			if err := w.ZeroAt(ctx, off+at, int64(len(c))); err != nil {
				return err
			}
			continue
		}
		if int64(len(c)) < cluster {
			c = append(make([]byte, 0, cluster), c...)[:cluster]
		}
		n := len(out)
		var err error
		if out, err = w.z.compress(out, c); err != nil {
			return w.fail(err)
		}
		x := packed{guest: (off + at) >> w.lay.bits, data: out[n:], compressed: true}
		if int64(len(x.data)) > cluster-cluster/32 {
			out, x.data, x.compressed = out[:n], c, false
		}
		list = append(list, x)
	}
	*buf = out
	err := w.allocate(list)
	if err == nil {
		err = w.store(list)
	}
	if err != nil {
		return fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
	}
	w.publish(list)
	return nil
}

// store writes clusters to their places, those that lie together at once.
func (w *Packer) store(list []packed) error {
	for i := 0; i < len(list); {
		data, host := list[i].data, list[i].host
		j := i + 1
		for ; j < len(list) && list[j].host == host+int64(len(data)) && follows(data, list[j].data); j++ {
			data = data[:len(data)+len(list[j].data)]
		}
		if _, err := w.f.WriteAt(data, host); err != nil {
			return w.fail(err)
		}
		i = j
	}
	return nil
}

// follows reports whether b lies directly behind a in memory.
func follows(a, b []byte) bool {
	return cap(a) > len(a) && &a[:len(a)+1][len(a)] == &b[0]
}

// fail notes the first failure and returns it.
func (w *Packer) fail(err error) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.bad == nil {
		w.bad = err
	}
	return w.bad
}

// allocate finds a place for each cluster. They are counted from now on, and
// named once they are written.
func (w *Packer) allocate(list []packed) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.bad != nil {
		return w.bad
	}
	for i := range list {
		x := &list[i]
		t := w.tables[x.guest/w.lay.entries]
		if t == nil {
			t = &packTable{host: w.take(1), entries: make([]uint64, w.lay.entries)}
			w.count(t.host, 1)
			w.tables[x.guest/w.lay.entries] = t
		}
		e := &t.entries[x.guest%w.lay.entries]
		if *e != 0 {
			w.bad = errTwice // what was allocated before this one is lost
			return w.bad
		}
		*e = pending
		if x.compressed {
			x.host = w.takeBytes(int64(len(x.data)))
		} else {
			c := w.take(1)
			w.count(c, 1)
			x.host = c << w.lay.bits
		}
	}
	if w.next > w.lay.capacity() {
		w.bad = fmt.Errorf("the file has more clusters than the %d that its refcount table counts", w.lay.capacity())
	}
	return w.bad
}

// take sets up to n clusters aside, one at least, and returns the first. The
// caller holds mu.
func (w *Packer) take(n int64) int64 {
	if w.lay.isRefs(w.next) {
		w.count(w.next, 1)
		w.next++
	}
	c := w.next
	w.next = min(c+n, w.lay.nextRefs(c))
	return c
}

// takeBytes finds a place for n compressed bytes, less than a cluster. The
// caller holds mu.
func (w *Packer) takeBytes(n int64) int64 {
	full := w.refs(w.pack.off>>w.lay.bits) == math.MaxUint16 // the cluster cannot be counted once more
	if w.pack.n < n || full {
		end := w.pack.end()
		c := w.take(packRegion)
		if c<<w.lay.bits != end || full {
			w.pack.off = c << w.lay.bits
		}
		w.pack.n = w.next<<w.lay.bits - w.pack.off
	}
	off := w.pack.off
	for c := off >> w.lay.bits; c <= (off+n-1)>>w.lay.bits; c++ {
		w.count(c, w.refs(c)+1)
	}
	w.pack.off, w.pack.n = off+n, w.pack.n-n
	return off
}

// count sets a refcount. The caller holds mu.
func (w *Packer) count(c int64, refs uint16) {
	i := c - w.lay.first
	for int64(len(w.counts)) <= i {
		w.counts = append(w.counts, 0)
	}
	w.counts[i] = refs
}

// refs is the refcount of a cluster behind the tables. The caller holds mu.
func (w *Packer) refs(c int64) uint16 {
	if i := c - w.lay.first; i >= 0 && i < int64(len(w.counts)) {
		return w.counts[i]
	}
	return 0
}

// publish names clusters that are written.
func (w *Packer) publish(list []packed) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, x := range list {
		t := w.tables[x.guest/w.lay.entries]
		e := uint64(x.host) | flagCopied
		if x.compressed {
			sectors := up(x.host%512+int64(len(x.data)), 512) - 1
			e = uint64(x.host) | uint64(sectors)<<offsetBits(w.ClusterSize()) | flagCompressed
		}
		t.entries[x.guest%w.lay.entries] = e
		t.dirty = true
	}
}

// Flush makes the image on disk a whole one, with all writes that returned
// before. After a failure it fails for good.
func (w *Packer) Flush(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	w.flush.Lock()
	defer w.flush.Unlock()
	w.mu.Lock()
	err := w.bad
	var work []int64 // L1 indexes of tables that changed
	for i, t := range w.tables {
		if t.dirty {
			work = append(work, i)
		}
	}
	w.mu.Unlock()
	if err == nil {
		if err = w.writeTables(work); err != nil {
			err = w.fail(fmt.Errorf("write tables of %s: %w", w.f.Name(), err))
		}
	}
	return err
}

// writeTables writes tables, some at a time. Of what an encoded table names,
// the data was written before it was encoded, and the counts are written next;
// both are on disk before the table is, and the table before it is named.
func (w *Packer) writeTables(work []int64) error {
	var fresh []int64
	for len(work) > 0 {
		some := work[:min(len(work), flushStep>>w.lay.bits)]
		work = work[len(some):]
		buf := make([]byte, len(some)<<w.lay.bits)
		hosts, next, pack := w.encode(some, buf)
		if err := w.lay.writeRefs(w.f, w.counted, next, w.encodeCounts); err != nil {
			return err
		}
		// The region for compressed clusters is not done with.
		w.counted = min(next, pack)
		if err := w.f.Sync(); err != nil {
			return err
		}
		for i, host := range hosts {
			if _, err := w.f.WriteAt(buf[i<<w.lay.bits:(i+1)<<w.lay.bits], host<<w.lay.bits); err != nil {
				return err
			}
		}
		fresh = append(fresh, some...)
	}
	if err := w.f.Sync(); err != nil || len(fresh) == 0 {
		return err
	}
	return w.link(fresh)
}

// link names tables that are on disk in the L1 table.
func (w *Packer) link(list []int64) error {
	named := false
	for _, i := range list {
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

// encode writes tables as the image has them into buf. It returns their
// clusters, and how far clusters are set aside, and full, at this instant.
func (w *Packer) encode(list []int64, buf []byte) (hosts []int64, next, pack int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, i := range list {
		t := w.tables[i]
		t.dirty = false
		for _, e := range t.entries {
			if e == pending {
				e = 0
			}
			binary.BigEndian.PutUint64(buf, e)
			buf = buf[8:]
		}
		hosts = append(hosts, t.host)
	}
	pack = w.next
	if w.pack.n > 0 {
		pack = w.pack.off >> w.lay.bits
	}
	return hosts, w.next, pack
}

func (w *Packer) encodeCounts(b []byte, first int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for ; len(b) > 0; b, first = b[2:], first+1 {
		refs := uint16(1) // the tables before, and refcount blocks
		if first >= w.lay.first && !w.lay.isRefs(first) {
			refs = w.refs(first)
		}
		binary.BigEndian.PutUint16(b, refs)
	}
}

// Close flushes, gives the file whole clusters, and closes it. An error means
// that the image is not whole.
func (w *Packer) Close() error {
	if end := w.pack.end(); w.pack.n > 0 && end == w.next<<w.lay.bits {
		// The file ends with the region, which is not full.
		w.next = up(w.pack.off, w.ClusterSize())
		w.pack.n = 0
	}
	err := w.f.Truncate(w.next << w.lay.bits)
	if err == nil {
		err = w.Flush(context.Background())
	}
	return errors.Join(err, w.f.Close())
}
