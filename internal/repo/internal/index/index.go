package index

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"

	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
)

// Pack is a pack as an index object lists it.
type Pack struct {
	Name  [32]byte // SHA-256
	Size  int64    // stored bytes
	Kind  uint16
	Made  int64 // seconds since 1970, by the writer's clock; 0: not known. Not in the cache
	Items []Item
}

// Item is one item of a Pack, in its order.
type Item struct {
	ID     pack.ID
	Stored uint32 // sealed length, bytes
}

// marshal gives the content of an index object (docs/format.md §5).
func marshal(packs []Pack) []byte {
	var p []byte
	for _, k := range packs {
		p = binary.LittleEndian.AppendUint32(p, uint32(len(k.Items)))
		for _, it := range k.Items {
			p = append(p, it.ID[:]...)
			p = binary.LittleEndian.AppendUint32(p, it.Stored)
		}
	}
	return p
}

// unmarshal fills in the items of packs whose names and sizes are known.
func unmarshal(p []byte, packs []Pack) error {
	for i := range packs {
		if len(p) < 4 {
			return fmt.Errorf("%w: index object ends before pack %d", seal.ErrDamaged, i)
		}
		n := binary.LittleEndian.Uint32(p)
		if p = p[4:]; uint64(n)*36 > uint64(len(p)) || n > pack.MaxItems {
			return fmt.Errorf("%w: index object: %d items of pack %d", seal.ErrDamaged, n, i)
		}
		items := make([]Item, n)
		off := int64(seal.HeaderLen)
		for j := range items {
			items[j] = Item{pack.ID(p[:32]), binary.LittleEndian.Uint32(p[32:])}
			if off += int64(items[j].Stored); off > packs[i].Size || items[j].Stored <= seal.TagLen {
				return fmt.Errorf("%w: index object: item %d of pack %d", seal.ErrDamaged, j, i)
			}
			p = p[36:]
		}
		packs[i].Items = items
	}
	if len(p) != 0 {
		return fmt.Errorf("%w: %d bytes behind the index object's items", seal.ErrDamaged, len(p))
	}
	return nil
}

// Index answers where chunks lie. Its methods are safe in parallel.
type Index struct {
	dir string

	adding sync.Mutex // held by Add from end to end; taken before mu

	mu       sync.RWMutex // guards segments; lookups hold it for reading
	segments []*segment   // largest first

	lookups atomic.Uint32
}

const (
	// releaseAfter is after how many lookups the memory that they have touched is
	// given back: each touches a few places, and the system maps up to 2 MiB
	// around each.
	releaseAfter = 16
	// releaseBytes is from which size of a segment on; what is smaller stays.
	releaseBytes = 64 << 20
)

// Open reads the cache directory, making it if need be. Segments that name a
// source outside live are deleted.
func Open(dir string, live func(source [32]byte) bool) (*Index, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	names, err := filepath.Glob(filepath.Join(dir, "*.segment"))
	if err != nil {
		return nil, err
	}
	x := &Index{dir: dir}
	var found []*segment
	for _, name := range names {
		s, err := openSegment(name)
		if errors.Is(err, os.ErrNotExist) {
			continue // another process merged it away
		} else if errors.Is(err, ErrCache) {
			os.Remove(name)
			continue
		} else if err != nil {
			return nil, errors.Join(err, x.Close())
		}
		found = append(found, s)
	}
	slices.SortFunc(found, func(a, b *segment) int { return len(b.sources) - len(a.sources) })
	have := map[[32]byte]bool{}
	for _, s := range found {
		use := true
		for _, src := range s.sources {
			use = use && live(src) && !have[src]
		}
		if !use {
			os.Remove(s.path) // may be in use by another process, which keeps its mapping
			if err := s.unmap(); err != nil {
				return nil, errors.Join(err, x.Close())
			}
			continue
		}
		for _, src := range s.sources {
			have[src] = true
		}
		x.segments = append(x.segments, s)
	}
	x.sort()
	return x, nil
}

func (x *Index) sort() {
	slices.SortFunc(x.segments, func(a, b *segment) int { return int(b.items - a.items) })
}

// Has reports whether an index object's items are in.
func (x *Index) Has(source [32]byte) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	for _, s := range x.segments {
		if s.has[source] {
			return true
		}
	}
	return false
}

// Lookup appends to places everywhere that id lies. Of a large index only what
// was touched last stays in the process's memory, some tens of MiB.
func (x *Index) Lookup(id pack.ID, places []Place) ([]Place, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	if x.lookups.Add(1)%releaseAfter == 0 {
		for _, s := range x.segments {
			if len(s.data) >= releaseBytes {
				release(s.data)
			}
		}
	}
	for _, s := range x.segments {
		var err error
		if places, err = s.lookup(id, places); err != nil {
			return places, err
		}
	}
	return places, nil
}

// Add takes the items of an index object in, and merges small segments.
func (x *Index) Add(source [32]byte, packs []Pack) error {
	x.adding.Lock()
	defer x.adding.Unlock()
	if x.Has(source) {
		return nil
	}
	b := x.NewBatch()
	if err := b.Add(source, packs); err != nil {
		return errors.Join(err, b.Abort())
	}
	if err := b.finish(); err != nil {
		return errors.Join(err, b.Abort())
	}
	return nil
}

// install finishes a segment and puts it in the place of old ones.
// The caller holds adding.
func (x *Index) install(w *segmentWriter, packs, sources [][32]byte, old []*segment) error {
	path, err := w.finish(packs, sources)
	if err != nil {
		return err
	}
	s, err := openSegment(path)
	if err != nil {
		return err
	}
	x.mu.Lock()
	x.segments = slices.DeleteFunc(x.segments, func(s *segment) bool { return slices.Contains(old, s) })
	x.segments = append(x.segments, s)
	x.sort()
	pair := x.mergeable()
	for _, o := range old { // no lookup is under way
		err = errors.Join(err, o.unmap())
	}
	x.mu.Unlock()
	if err != nil {
		return err
	}
	for _, o := range old {
		os.Remove(o.path) // at worst it is found again and removed at the next Open
	}
	if pair != nil {
		return x.merge(pair[0], pair[1])
	}
	return nil
}

// mergeable picks two neighbours in size of which the larger has less than
// three times the smaller's items: so there are some ten segments at most.
func (x *Index) mergeable() []*segment {
	for i := len(x.segments) - 1; i > 0; i-- {
		if x.segments[i-1].items < 3*x.segments[i].items {
			return slices.Clone(x.segments[i-1 : i+1])
		}
	}
	return nil
}

func (x *Index) merge(a, b *segment) error {
	w, err := newSegmentWriter(x.dir)
	if err != nil {
		return err
	}
	packs := make([][32]byte, 0, (len(a.packs)+len(b.packs))/32)
	for _, s := range []*segment{a, b} {
		for i := range uint32(len(s.packs) / 32) {
			packs = append(packs, s.packName(i))
		}
	}
	if err := mergeInto(w, newCursor(a), newCursor(b), uint32(len(a.packs)/32)); err != nil {
		return errors.Join(err, w.abort())
	}
	return x.install(w, packs, slices.Concat(a.sources, b.sources), []*segment{a, b})
}

// Replace takes over y's segments in the place of its own, in one step for
// lookups beside it. y is not to be used any more.
func (x *Index) Replace(y *Index) error {
	x.adding.Lock()
	defer x.adding.Unlock()
	x.mu.Lock()
	defer x.mu.Unlock()
	var err error
	for _, s := range x.segments {
		err = errors.Join(err, s.unmap())
	}
	x.segments = y.segments
	return err
}

// Items is how many items the index holds, copies counted.
func (x *Index) Items() int64 {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var n int64
	for _, s := range x.segments {
		n += s.items
	}
	return n
}

// Close unmaps everything. No lookup may be under way.
func (x *Index) Close() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	var err error
	for _, s := range x.segments {
		err = errors.Join(err, s.unmap())
	}
	x.segments = nil
	return err
}

// nameOf names a segment by its sources.
func nameOf(sources [][32]byte) []byte {
	sorted := slices.Clone(sources)
	slices.SortFunc(sorted, func(a, b [32]byte) int { return bytes.Compare(a[:], b[:]) })
	h := sha256.New()
	for _, s := range sorted {
		h.Write(s[:])
	}
	return h.Sum(nil)[:16]
}
