package qcow2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"holdfast/internal/image"
)

const (
	// checkWindow is how many clusters of the file are counted at once, at 3
	// bytes each: 96 MiB, of which only what is used is touched. Files of 2 TiB
	// in clusters of 64 KiB take one pass over the tables.
	// It is a multiple of what any refcount block counts.
	checkWindow = 32 << 20
	// checkPasses bounds the passes: 128 TiB in clusters of 64 KiB.
	checkPasses = 64
	// maxTables is how many L2 tables are remembered, at some 64 bytes each: 512
	// TiB of disk in clusters of 64 KiB.
	maxTables = 1 << 20
	// checkRead is how much of a table is read at once, bytes.
	checkRead = 64 << 10
	// maxReports of one kind are told one by one.
	maxReports = 100
)

// What uses a cluster.
const (
	useNone = iota
	useHeader
	useL1
	useL2
	useRefTable
	useRefBlock
	useSnapshots
	useBitmaps
	useData
	useCompressed

	useMask     = 0x0f
	useCopied   = 0x40 // an entry says that it is the only one to name the cluster
	useUncopied = 0x80 // an entry says that there may be others
)

var useNames = [...]string{"nothing", "the header", "an L1 table", "an L2 table", "the refcount table", "a refcount block",
	"the snapshot table", "a bitmap", "data", "compressed data"}

// Check reads all tables: of the disk, its snapshots and its bitmaps. It counts
// what uses each cluster of the file and compares that with the refcounts. A
// report that begins with "leak:" is of space that is counted and not used,
// which alone does no harm; every other one means that data may be lost, now or
// with the next write. What a damaged table may have named is among the leaks.
// Refcounts that the image itself says are stale are not compared. Of many
// like reports the first 100 are given, then their number.
//
// Memory is bounded by passes over the tables, each counting a part of the
// file. A snapshot checks the image that it is in.
func (im *Image) Check(ctx context.Context, report func(problem string)) error {
	if err := newChecker(im, report, checkWindow).run(ctx); err != nil {
		return fmt.Errorf("check: %w", err)
	}
	return nil
}

func newChecker(im *Image, report func(string), window int64) *checker {
	return &checker{im: im.whole(), out: report, window: window, told: map[string]int{}, tables: map[int64]l2Use{}}
}

// whole is the image that im is, or is a snapshot of.
func (im *Image) whole() *Image {
	if im.of != nil {
		return im.of
	}
	return im
}

type checker struct {
	im   *Image
	out  func(string)
	told map[string]int // reports, by kind

	l1s    []l1Table
	tables map[int64]l2Use
	order  []int64 // of tables: their offsets as they were met
	l1Read int64   // bytes

	window int64 // clusters counted in a pass
	pass   int
	base   int64    // first cluster of the window
	refs   []uint16 // uses found, up to 65535, of each cluster in it
	uses   []uint8  // what uses it
}

// l1Table is the disk's L1 table, or a snapshot's.
type l1Table struct {
	what       string
	off, count int64
	active     bool
}

// l2Use is how L1 tables name an L2 table.
type l2Use struct {
	refs  int64 // how often
	index int64 // of the first L1 entry that does
	uses  uint8 // useCopied and useUncopied, by the disk's own L1 table
	// active: the disk's own L1 table names it. What the entries of the others
	// say of being the only one is out of date.
	active bool
}

// problem reports one; those of a kind are counted.
func (c *checker) problem(kind, format string, args ...any) {
	if c.told[kind]++; c.told[kind] <= maxReports {
		c.out(fmt.Sprintf(format, args...))
	}
}

// bad reports an error that tells of damage, and returns any other.
func (c *checker) bad(kind string, err error) error {
	if err == nil || !errors.Is(err, image.ErrFormat) {
		return err
	}
	if c.pass == 0 {
		c.problem(kind, "%v", err)
	}
	return nil
}

func (c *checker) run(ctx context.Context) error {
	im := c.im
	if im.h.incompatible&bitCorrupt != 0 {
		c.problem("mark", "the image is marked corrupt")
	}
	clusters := up(im.file.Size(), im.cluster)
	if clusters > c.window*checkPasses {
		return fmt.Errorf("%w: a file of %d clusters is too large to be checked here", image.ErrUnsupported, clusters)
	}
	n := min(clusters, c.window)
	c.refs, c.uses = make([]uint16, n), make([]uint8, n)
	if err := c.findTables(ctx); err != nil {
		return err
	}
	for ; c.base < clusters; c.base += c.window {
		clear(c.refs)
		clear(c.uses)
		if err := c.count(ctx); err != nil {
			return err
		}
		if err := c.compare(ctx, min(clusters-c.base, c.window)); err != nil {
			return err
		}
		c.pass++
	}
	for _, kind := range slices.Sorted(maps.Keys(c.told)) {
		if n := c.told[kind]; n > maxReports {
			c.out(fmt.Sprintf("%s: %d more like these", kind, n-maxReports))
		}
	}
	return nil
}

// findTables reads all L1 tables.
func (c *checker) findTables(ctx context.Context) error {
	im := c.im
	c.l1s = []l1Table{{"L1", im.h.l1Off, im.h.l1Len, true}}
	list, err := im.Snapshots(ctx)
	if err := c.bad("snapshots", err); err != nil {
		return err
	}
	for _, s := range list {
		err := im.checkL1(s)
		if err == nil {
			h := *im.h
			h.size = s.Size
			if need := h.l1Need(); need > s.l1Len {
				err = bad("the L1 table has %d entries, the disk needs %d", s.l1Len, need)
			}
		}
		if err != nil {
			c.problem("snapshots", "snapshot %.100q: %v", s.Name, err)
			continue
		}
		c.l1s = append(c.l1s, l1Table{fmt.Sprintf("snapshot %.100q: L1", s.Name), s.l1Off, s.l1Len, false})
	}
	for i, t := range c.l1s {
		if c.l1Read += t.count * 8; c.l1Read > im.file.Size() {
			c.problem("snapshots", "the L1 tables of %d snapshots take more bytes than the file has: they overlap", len(list))
			c.l1s = c.l1s[:i]
			break
		}
		if err := c.readL1(ctx, t); err != nil {
			return err
		}
	}
	return nil
}

// readL1 notes the L2 tables that an L1 table names.
func (c *checker) readL1(ctx context.Context, t l1Table) error {
	im := c.im
	return c.each(ctx, t.off, t.count*8, 8, func(b []byte, i int64) error {
		e := binary.BigEndian.Uint64(b)
		l2 := int64(e & offsetMask)
		if e == 0 {
			return nil
		}
		// A reader takes the flag without an offset for nothing, too.
		if e&^(offsetMask|flagCopied) != 0 || l2%im.cluster != 0 || l2 == 0 {
			c.problem("L1", "%s entry %d is %#x", t.what, i, e)
			return nil
		}
		if err := im.checkPlace(l2, im.cluster, im.file.Size()); err != nil {
			c.problem("L1", "%s entry %d: L2 table %v", t.what, i, err)
			return nil
		}
		u, known := c.tables[l2]
		if !known {
			u.index = i
			if len(c.order) == maxTables {
				return fmt.Errorf("%w: more than %d L2 tables are too many to be checked here", image.ErrUnsupported, maxTables)
			}
			c.order = append(c.order, l2)
		}
		u.refs++
		if t.active {
			u.active = true
			u.uses |= copied(e)
		}
		c.tables[l2] = u
		return nil
	})
}

// each calls do for the entries of a table.
func (c *checker) each(ctx context.Context, off, n, step int64, do func(b []byte, i int64) error) error {
	buf := make([]byte, min(n, checkRead))
	for at := int64(0); at < n; at += int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(int64(len(buf)), n-at)]
		// A table in the file's last cluster may end with the file.
		if have := max(0, min(int64(len(p)), c.im.file.Size()-off-at)); have < int64(len(p)) {
			clear(p[have:])
			if err := c.read(ctx, p[:have], off+at); err != nil {
				return err
			}
		} else if err := c.read(ctx, p, off+at); err != nil {
			return err
		}
		for i := int64(0); i+step <= int64(len(p)); i += step {
			if err := do(p[i:], (at+i)/step); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checker) read(ctx context.Context, p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	return c.im.file.ReadAt(ctx, p, off)
}

// count counts all uses of the clusters in the window.
func (c *checker) count(ctx context.Context) error {
	im := c.im
	c.add(useHeader, 0, im.cluster, 1)
	for _, t := range c.l1s {
		c.add(useL1, t.off, t.count*8, 1)
	}
	c.add(useRefTable, im.h.refsOff, im.h.refsLen, 1)
	if im.h.snapshots > 0 {
		_, n, err := im.list(ctx, int64(im.h.snapshots))
		if err != nil && !errors.Is(err, image.ErrFormat) {
			return err
		}
		c.add(useSnapshots, im.h.snapsOff, n, 1)
	}
	if err := c.countBlocks(ctx); err != nil {
		return err
	}
	if err := c.countBitmaps(ctx); err != nil {
		return err
	}
	for _, l2 := range c.order {
		u := c.tables[l2]
		c.add(useL2|u.uses, l2, im.cluster, u.refs)
	}
	// Data comes last: what overlaps a table is its fault.
	for _, l2 := range c.order {
		if err := c.readL2(ctx, l2, c.tables[l2]); err != nil {
			return err
		}
	}
	return nil
}

// copied is what an entry says of the cluster that it names.
func copied(e uint64) uint8 {
	if e&flagCopied != 0 {
		return useCopied
	}
	return useUncopied
}

// add counts a use of the clusters that hold n bytes, so many times.
func (c *checker) add(use uint8, off, n, times int64) {
	if n <= 0 {
		return
	}
	first := max(off/c.im.cluster-c.base, 0)
	end := min(up(off+n, c.im.cluster)-c.base, int64(len(c.refs)))
	for i := first; i < end; i++ {
		was, is := c.uses[i]&useMask, use&useMask
		if was != useNone && (was != is || is != useData && is != useCompressed) {
			c.problem("overlap", "the cluster at offset %d is used for %s and for %s", (c.base+i)*c.im.cluster, useNames[was], useNames[is])
		}
		c.uses[i] |= use &^ useMask
		if was == useNone {
			c.uses[i] |= is
		}
		c.refs[i] = uint16(min(int64(c.refs[i])+times, math.MaxUint16))
	}
}

// readL2 counts what an L2 table names.
func (c *checker) readL2(ctx context.Context, l2 int64, u l2Use) error {
	im := c.im
	step := im.cluster / im.h.l2Entries()
	return c.each(ctx, l2, im.cluster, step, func(b []byte, i int64) error {
		e := binary.BigEndian.Uint64(b)
		if e == 0 && (step == 8 || binary.BigEndian.Uint64(b[8:]) == 0) {
			return nil
		}
		err := c.entry(b, e, l2, (u.index*im.h.l2Entries()+i)*im.cluster, u)
		if err != nil {
			err = fmt.Errorf("L2 table at offset %d, entry %d: %w", l2, i, err)
		}
		return c.bad("L2", err)
	})
}

// entry counts what an L2 entry, which describes the disk from off on, names.
func (c *checker) entry(b []byte, e uint64, l2, off int64, u l2Use) error {
	im := c.im
	if _, err := im.entry(b, l2, off); err != nil {
		return err
	}
	if e&flagCompressed != 0 {
		if e&flagCopied != 0 {
			return bad("the entry is %#x: a compressed cluster is never the only one", e)
		}
		x, err := im.place(int64(e & (flagCompressed - 1)))
		if err == nil {
			c.add(useCompressed, x.off, x.n, u.refs)
		}
		return err
	}
	host := int64(e & offsetMask)
	if host == 0 || im.external {
		return nil
	}
	use := uint8(useData)
	if u.active {
		use |= copied(e)
	}
	c.add(use, host, im.cluster, u.refs)
	// A cluster that reads as zeros may have a place too.
	return im.checkData(host, l2, off)
}

// countBlocks counts the refcount blocks.
func (c *checker) countBlocks(ctx context.Context) error {
	return c.each(ctx, c.im.h.refsOff, c.im.h.refsLen, 8, func(b []byte, i int64) error {
		off, err := c.block(b, i)
		if err == nil && off != 0 {
			c.add(useRefBlock, off, c.im.cluster, 1)
		}
		return c.bad("refcount table", err)
	})
}

// block reads an entry of the refcount table; 0 means that no cluster of the
// block is in use.
func (c *checker) block(b []byte, i int64) (int64, error) {
	e := binary.BigEndian.Uint64(b)
	if e == 0 {
		return 0, nil
	}
	off := int64(e)
	if e > math.MaxInt64 || off%c.im.cluster != 0 {
		return 0, bad("refcount table entry %d is %#x", i, e)
	}
	if err := c.im.checkPlace(off, c.im.cluster, c.im.file.Size()); err != nil {
		return 0, fmt.Errorf("refcount table entry %d: the block %w", i, err)
	}
	return off, nil
}

// countBitmaps counts the bitmaps' directory, tables and bits. When the image
// says that they are out of date, nothing of them counts.
func (c *checker) countBitmaps(ctx context.Context) error {
	im := c.im
	if im.h.bitmaps == nil || im.h.autoclear&bitBitmaps == 0 {
		return nil
	}
	list, err := im.Bitmaps(ctx)
	if err != nil {
		return c.bad("bitmaps", err)
	}
	_, dir, _ := im.bitmapDir()
	c.add(useBitmaps, dir.off, dir.n, 1)
	sum := int64(0)
	for _, b := range list {
		if sum += b.tableSize * 8; sum > im.file.Size() {
			return c.bad("bitmaps", bad("the tables of %d bitmaps take more bytes than the file has: they overlap", len(list)))
		}
		c.add(useBitmaps, b.table, b.tableSize*8, 1)
		if err := im.usable(b); err != nil && !b.InUse && c.pass == 0 {
			c.problem("bitmaps", "bitmap %.100q: %v", b.Name, err)
		}
		err := c.each(ctx, b.table, b.tableSize*8, 8, func(p []byte, i int64) error {
			host, _, err := im.parseBitmapEntry(p)
			if err == nil && host != 0 {
				c.add(useBitmaps, host, im.cluster, 1)
			}
			if err != nil {
				err = fmt.Errorf("bitmap %.100q: table at offset %d, entry %d: %w", b.Name, b.table, i, err)
			}
			return c.bad("bitmaps", err)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// compare compares the uses of n clusters with their refcounts. A window
// begins with a refcount block.
func (c *checker) compare(ctx context.Context, n int64) error {
	im := c.im
	if im.h.incompatible&bitDirty != 0 {
		return nil
	}
	perBlock := im.cluster * 8 >> im.h.refOrder
	var d difference
	for i := int64(0); i < n; i += perBlock {
		if err := ctx.Err(); err != nil {
			return err
		}
		k := (c.base + i) / perBlock
		off := int64(0)
		if k*8 < im.h.refsLen {
			b, err := im.slice(ctx, im.h.refsOff+k*8, im.h.refsOff+im.h.refsLen)
			if err == nil {
				off, err = c.block(b, k)
			}
			if errors.Is(err, image.ErrFormat) {
				continue // was told: what the block would say is unknown
			}
			if err != nil {
				return err
			}
		}
		if err := c.compareBlock(ctx, &d, off, i, min(perBlock, n-i)); err != nil {
			return err
		}
	}
	c.tell(d)
	return nil
}

// compareBlock compares the clusters that a refcount block counts, the first of
// which has that number in the window.
func (c *checker) compareBlock(ctx context.Context, d *difference, off, first, n int64) error {
	if off == 0 {
		for i := range n {
			c.cluster(d, first+i, 0)
		}
		return nil
	}
	bits := int64(1) << c.im.h.refOrder
	step := max(bits/8, 1)
	return c.each(ctx, off, up(n*bits, 8), step, func(b []byte, i int64) error {
		switch bits {
		case 16:
			c.cluster(d, first+i, uint64(binary.BigEndian.Uint16(b)))
		case 32:
			c.cluster(d, first+i, uint64(binary.BigEndian.Uint32(b)))
		case 64:
			c.cluster(d, first+i, binary.BigEndian.Uint64(b))
		default:
			for j := int64(0); j < 8/bits && i*8/bits+j < n; j++ {
				c.cluster(d, first+i*8/bits+j, uint64(b[0])>>(j*bits)&(1<<bits-1))
			}
		}
		return nil
	})
}

// difference is a run of clusters whose refcounts are wrong in the same way.
type difference struct {
	first, n      int64 // clusters
	used, counted uint64
}

// cluster compares one cluster of the window.
func (c *checker) cluster(d *difference, i int64, counted uint64) {
	used, use := uint64(c.refs[i]), c.uses[i]
	at := (c.base + i) * c.im.cluster
	if counted == 1 && use&useUncopied != 0 || counted != 1 && use&useCopied != 0 {
		c.problem("copied flag", "the cluster at offset %d, %s, is counted %d times, and an entry says otherwise", at, useNames[use&useMask], counted)
	}
	if used == counted || used == math.MaxUint16 && counted > used {
		return
	}
	if d.n > 0 && d.first+d.n == c.base+i && d.used == used && d.counted == counted {
		d.n++
		return
	}
	c.tell(*d)
	*d = difference{c.base + i, 1, used, counted}
}

func (c *checker) tell(d difference) {
	off := d.first * c.im.cluster
	switch {
	case d.n == 0:
	case d.counted > d.used:
		c.problem("leak", "leak: %d clusters from offset %d on are counted %d times and used %d times", d.n, off, d.counted, d.used)
	default:
		c.problem("refcounts", "%d clusters from offset %d on are used %d times and counted %d times: the next write may overwrite them", d.n, off, d.used, d.counted)
	}
}
