package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/blob"
	"holdfast/internal/disk"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/tree"
)

// What is read in bulk is looked up first, sorted by pack and place, and read
// in that order: disks that turn are several times faster then, and a request
// to a store far away brings more.

// ReadWindow is how far from its order a disk is best read (DiskReader.Feed),
// bytes: enough that what thirty backups have left in thirty places of a disk
// is read with little seeking. What is known of its chunks takes 2 MB.
const ReadWindow = 1 << 30

const (
	// nearBytes and farBytes bound one request to a store: for one on this
	// machine so that what was read stays in the processor's cache until it is
	// opened; a request to one far away costs as much time as a few MiB.
	nearBytes = 1 << 20
	farBytes  = 4 << 20
	// nearGap is what is read and thrown away rather than skipped, of a disk: a
	// seek, 10 ms, takes as long. farGap is that over a line, and of single reads,
	// whose neighbours nobody may want.
	nearGap = 1500 << 10
	farGap  = 64 << 10
	// pieceBytes bounds what Feed gives at once.
	pieceBytes = 1 << 20
)

// wanted is an item that is to be read, and where it lies.
type wanted struct {
	id   pack.ID
	key  int64 // what it is for: the chunk's number on the disk
	at   index.Place
	turn int // of its pack
}

// stretch is a part of a pack that is read at once for the items in it. One
// whose items lie nowhere that is known is empty.
type stretch struct {
	items    []wanted
	from, to uint32 // in the pack, bytes
}

// plan finds where the items lie, and sorts them into stretches: pack after
// pack, in the order in which the items first need them.
func (r *Repo) plan(items []wanted) ([]stretch, error) {
	max, gap := uint32(farBytes), uint32(farGap)
	if r.near() {
		max, gap = nearBytes, nearGap
	}
	return r.planIn(items, max, gap)
}

// planIn is plan for stretches of up to max bytes and a gap.
func (r *Repo) planIn(items []wanted, max, gap uint32) ([]stretch, error) {
	turns := map[[32]byte]int{}
	var last [32]byte
	for i := range items {
		w := &items[i]
		var places []index.Place
		var err error
		if w.id != (pack.ID{}) {
			places, err = r.places(w.id)
		}
		if err != nil {
			return nil, err
		}
		if len(places) == 0 {
			w.turn = -1
			continue
		}
		w.at = places[0]
		for _, p := range places[1:] { // a copy beside what is read anyway
			if p.Pack == last {
				w.at = p
			}
		}
		last = w.at.Pack
		if _, known := turns[last]; !known {
			turns[last] = len(turns)
		}
		w.turn = turns[last]
	}
	slices.SortFunc(items, func(a, b wanted) int {
		return cmp.Or(cmp.Compare(a.turn, b.turn), cmp.Compare(a.at.Offset, b.at.Offset), cmp.Compare(a.key, b.key))
	})
	var all []stretch
	for first, i := 0, 1; i <= len(items); i++ {
		a, z := &items[first], &items[i-1]
		s := stretch{items[first:i], a.at.Offset, z.at.Offset + z.at.Stored}
		if n := len(all); n > 0 && a.turn >= 0 && all[n-1].items[0].turn == a.turn && a.at.Offset-all[n-1].to <= gap {
			s.from = all[n-1].to // the head goes on
		}
		if i < len(items) {
			b := &items[i]
			if b.turn == z.turn && (b.turn < 0 || b.at.Offset < s.to || b.at.Offset-s.to <= gap && b.at.Offset+b.at.Stored-a.at.Offset <= max) {
				continue
			}
		}
		all, first = append(all, s), i
	}
	return all, nil
}

// fetch reads a stretch, in buf's memory if that is large enough, and gives the
// opener of its pack; nil when what is there is damaged. A pack that is new is
// read from its header on, if that is near.
func (r *Repo) fetch(ctx context.Context, s *stretch, buf []byte) ([]byte, *pack.Opener, error) {
	if s.items[0].turn < 0 {
		return buf, nil, nil
	}
	name := s.items[0].at.Pack
	o, known := cached(ctx, &r.openers.lru, name)
	if !known && (s.from <= farGap || s.from <= nearGap && r.near()) {
		s.from = 0
	}
	n := int(s.to - s.from)
	buf = slices.Grow(buf[:0], n)[:n]
	err := blob.Fill(ctx, r.store, packName(name), int64(s.from), buf)
	if err == nil && !known {
		if s.from == 0 {
			o, err = r.openerOf(ctx, name, buf)
		} else {
			o, err = r.opener(ctx, name)
		}
	}
	if errors.Is(err, ErrDamaged) || errors.Is(err, blob.ErrNotExist) || errors.Is(err, blob.ErrTruncated) {
		return buf, nil, nil
	}
	return buf, o, err
}

// openEach calls use for each item of a stretch, in their order, with a
// function that appends the item's content, of at most max bytes, to what it is
// given. Which of them is damaged in stored, or all when o is nil, is read once
// more on its own, from any copy.
func (r *Repo) openEach(ctx context.Context, s *stretch, stored []byte, o *pack.Opener, max int, use func(w *wanted, open func([]byte) ([]byte, error)) error) error {
	var content []byte // of the item before: opening destroys what was stored
	for i := range s.items {
		w := &s.items[i]
		again := i > 0 && w.at == s.items[i-1].at && w.turn >= 0 && w.id == s.items[i-1].id
		err := use(w, func(dst []byte) (_ []byte, err error) {
			if again {
				content = append(dst, content...)
				return content, nil
			}
			if o != nil {
				sealed := stored[w.at.Offset-s.from:][:w.at.Stored]
				if content, err = o.Open(dst, sealed, int(w.at.Number), w.id, max); err == nil {
					return content, nil
				}
			}
			content, err = r.item(ctx, dst, w.id, max)
			return content, err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// near reports whether reads from the store are to come one after the other.
func (r *Repo) near() bool {
	_, ok := blob.As[blob.OneHead](r.store)
	return ok && len(r.current().Tiers) == 0
}

// heads is how many of so many workers may read from the store at once.
func (r *Repo) heads(workers int) chan struct{} {
	if r.near() {
		workers = 1
	}
	return make(chan struct{}, workers)
}

// readAll reads stretches, in their order where the store wants that, and calls
// each for them, from so many workers side by side. buf is memory for each that
// stays a worker's.
func (r *Repo) readAll(ctx context.Context, workers int, stretches iter.Seq2[stretch, error],
	each func(ctx context.Context, s *stretch, stored []byte, o *pack.Opener, buf *[]byte) error) error {
	head := r.heads(workers)
	come := make(chan stretch)
	g, gctx := errgroup.WithContext(ctx)
	for range workers {
		g.Go(func() error {
			var stored, buf []byte
			for {
				// Whoever has the head takes what is next, and no other reads before.
				head <- struct{}{}
				s, ok := <-come
				var o *pack.Opener
				var err error
				if ok {
					stored, o, err = r.fetch(gctx, &s, stored)
				}
				<-head
				if err == nil && ok {
					err = each(gctx, &s, stored, o, &buf)
				}
				if err != nil || !ok {
					return err
				}
			}
		})
	}
	var err error
	for s, nextErr := range stretches {
		if err = nextErr; err != nil {
			break
		}
		select {
		case come <- s:
			continue
		case <-gctx.Done():
			err = context.Cause(gctx)
		}
		break
	}
	close(come)
	// A worker's error is the cause.
	if workErr := g.Wait(); workErr != nil {
		return workErr
	}
	return err
}

// Feed implements disk.Feeder. Extents are of whole chunks, but at the disk's
// end.
func (d *DiskReader) Feed(ctx context.Context, extents disk.Extents, window int64, workers int, put func(ctx context.Context, p []byte, off int64) error) error {
	return d.r.readAll(ctx, workers, d.stretches(ctx, extents, window), func(ctx context.Context, s *stretch, stored []byte, o *pack.Opener, buf *[]byte) error {
		p := slices.Grow((*buf)[:0], pieceBytes)
		*buf = p
		var off int64 // of p
		give := func() error {
			n := min(int64(len(p)), d.size-off)
			q := p[:n]
			p = p[:0]
			return put(ctx, q, off)
		}
		err := d.r.openEach(ctx, s, stored, o, ChunkSize, func(w *wanted, open func([]byte) ([]byte, error)) error {
			if n := int64(len(p)); n > 0 && (off+n != w.key*ChunkSize || n == pieceBytes) {
				if err := give(); err != nil {
					return err
				}
			}
			if len(p) == 0 {
				off = w.key * ChunkSize
			}
			n := len(p)
			p = p[:n+ChunkSize]
			return d.fill(p[n:], 0, w, open)
		})
		if err == nil && len(p) > 0 {
			err = give()
		}
		return err
	})
}

// fill makes p what the wanted chunk has from a byte of it on.
func (d *DiskReader) fill(p []byte, from int, w *wanted, open func([]byte) ([]byte, error)) error {
	if w.id == (pack.ID{}) {
		clear(p)
		return nil
	}
	dst := p[:0:len(p)]
	if len(p) < ChunkSize {
		dst = make([]byte, 0, ChunkSize)
	}
	content, err := open(dst)
	if err == nil && len(content) != ChunkSize {
		err = fmt.Errorf("%w: chunk %x has %d bytes", ErrDamaged, w.id[:8], len(content))
	}
	if err != nil {
		return fmt.Errorf("read at %d: %w", w.key*ChunkSize, err)
	}
	if len(p) < ChunkSize || &content[0] != &p[0] {
		copy(p, content[from:])
	}
	return nil
}

// stretches plans the reading of extents, window after window.
func (d *DiskReader) stretches(ctx context.Context, extents disk.Extents, window int64) iter.Seq2[stretch, error] {
	window = (window + ChunkSize - 1) / ChunkSize
	return func(yield func(stretch, error) bool) {
		var items []wanted
		plan := func() bool {
			all, err := d.r.plan(items)
			if err != nil {
				yield(stretch{}, err)
				return false
			}
			items = nil // the stretches have them
			for _, s := range all {
				if !yield(s, nil) {
					return false
				}
			}
			return true
		}
		ids := make([]pack.ID, tree.Fanout)
		for e, err := range extents {
			if err == nil {
				err = checkAligned(d.size, e.Off, e.Len)
			}
			if err != nil {
				yield(stretch{}, err)
				return
			}
			for at, left := chunkRange(e.Off, e.Len); left > 0 && !e.Zero; {
				if len(items) > 0 && at/window != items[0].key/window && !plan() {
					return
				}
				n := min(left, tree.Fanout-at%tree.Fanout, window-at%window)
				if err := tree.Lookup(ctx, d.r.node, d.root, at, ids[:n]); err != nil {
					yield(stretch{}, err)
					return
				}
				for i, id := range ids[:n] {
					items = append(items, wanted{id: id, key: at + int64(i)})
				}
				at, left = at+n, left-n
			}
		}
		if len(items) > 0 {
			plan()
		}
	}
}

var stretchBuffers = sync.Pool{New: func() any { return new([]byte) }}

// readMany fills p, at off, with chunks from the first on, whose ids these are.
func (d *DiskReader) readMany(ctx context.Context, p []byte, off, first int64, ids []pack.ID) error {
	items := make([]wanted, len(ids))
	for i, id := range ids {
		items[i] = wanted{id: id, key: first + int64(i)}
	}
	stretches, err := d.r.planIn(items, farBytes, farGap)
	if err != nil {
		return err
	}
	buf := stretchBuffers.Get().(*[]byte)
	defer stretchBuffers.Put(buf)
	for i := range stretches {
		s := &stretches[i]
		var o *pack.Opener
		if *buf, o, err = d.r.fetch(ctx, s, *buf); err != nil {
			return err
		}
		err := d.r.openEach(ctx, s, *buf, o, ChunkSize, func(w *wanted, open func([]byte) ([]byte, error)) error {
			piece, from := part(p, off, w.key)
			return d.fill(piece, from, w, open)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// aheadBytes is how much of a disk is gone through for its map to be read
// ahead.
const aheadBytes = 64 << 20

// nodeAhead is node for those who go through a map: with a node come those
// below it.
func (r *Repo) nodeAhead(ctx context.Context, id tree.ID, level int) (*tree.Node, error) {
	n, err := r.node(ctx, id, level)
	if err == nil && level > 0 {
		r.ahead(ctx, n.Children[:], level-1)
	}
	return n, err
}

// ahead brings nodes into the cache. What fails here fails again where they are
// needed.
func (r *Repo) ahead(ctx context.Context, ids []tree.ID, level int) {
	var items []wanted
	for _, id := range ids {
		if id == (tree.ID{}) {
			continue
		}
		if _, there := cached(ctx, &r.nodes, id); !there {
			items = append(items, wanted{id: id})
		}
	}
	if len(items) < 2 {
		return
	}
	workers := min(walkers, len(items))
	all, err := r.plan(items)
	if err != nil {
		return
	}
	stretches := func(yield func(stretch, error) bool) {
		for _, s := range all {
			if !yield(s, nil) {
				return
			}
		}
	}
	_ = r.readAll(ctx, workers, stretches, func(ctx context.Context, s *stretch, stored []byte, o *pack.Opener, buf *[]byte) error {
		return r.openEach(ctx, s, stored, o, tree.MaxNode, func(w *wanted, open func([]byte) ([]byte, error)) error {
			p, err := open((*buf)[:0])
			if err != nil {
				return err
			}
			*buf = p
			n, err := tree.Unmarshal(p, level)
			if err == nil {
				_, err = r.nodes.get(ctx, w.id, func() (*tree.Node, error) { return n, nil })
			}
			return err
		})
	})
}

// errAbsent is for what is not in a cache.
var errAbsent = errors.New("not in the cache")

// cached gives what is in a cache, without loading it.
func cached[K comparable, V any](ctx context.Context, c *lru[K, V], key K) (V, bool) {
	v, err := c.get(ctx, key, func() (v V, err error) { return v, errAbsent })
	return v, err == nil
}
