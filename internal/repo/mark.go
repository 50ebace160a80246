package repo

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/lease"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
	"holdfast/internal/repo/internal/tree"
)

// ErrRefused: prune will not remove anything as things are; the text says why
// and what to do.
var ErrRefused = errors.New("prune removes nothing")

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrRefused, fmt.Errorf(format, args...))
}

// marker finds what living and pinned points need. It keeps one bit for each
// item of the inventory, about 200 bytes for each pack, and the ids of map nodes
// that it has walked, but none of chunks: they are known by their places. Ten
// million chunks in twenty thousand packs take 10 MB, and the batches in which
// they are looked up 70 MB.
type marker struct {
	r     *Repo
	own   string // the pruner's lease; "" in a dry run
	there map[[32]byte]int64
	old   *chain.State // before there was listed

	// As of state:
	state  *chain.State
	before map[string]Lease // open, listed before state was read; without the own
	after  map[string]Lease // listed after that
	packs  map[[32]byte]*packMark
	read   map[[32]byte]bool    // index objects in packs
	points map[PointID]bool     // walked
	roots  map[string]tree.Root // walked last, by history and disk
	pins   map[PointID]string   // named by pins, and by whose
	pinned int                  // forgotten points that are pinned
	notes  map[string]bool

	filling   chan struct{} // held by who adds to chunks; before resolving
	resolving chan struct{} // held by who looks a batch of chunks up
	chunks    *chunkBatch   // of walked nodes, not looked up yet; by who holds filling

	mu     sync.Mutex        // guards the bits of packs while walking, and what follows
	spare  *chunkBatch       // to be used for the next ones
	nodes  map[tree.ID]bool  // walked, or being walked
	walked []PointID         // points whose maps were walked
	lost   map[PointID]int64 // chunks of which there is no copy
}

// neededChunk is a chunk that a point needs. Chunks are looked up many at
// once, in the index's order.
type neededChunk struct {
	id    pack.ID
	point int32 // index in marker.walked
}

// chunkBatch has chunks by the first byte of their ids, so that what is sorted
// at once stays in the processor's cache.
type chunkBatch struct {
	n    int
	some [256][]neededChunk
}

func newBatch() *chunkBatch {
	b := new(chunkBatch)
	const room = batchChunks / len(b.some) * 9 / 8 // ids are as good as random
	all := make([]neededChunk, len(b.some)*room)
	for i := range b.some {
		b.some[i] = all[i*room : i*room : (i+1)*room]
	}
	return b
}

const (
	// batchChunks is how many chunks are looked up at once: 21 MB. Those of a
	// first byte are numbered by chunkBits.
	batchChunks = 1 << 19
	chunkBits   = 20
	// resolvers is in how many parts, side by side.
	resolvers = 2
)

// packMark is a pack of the inventory.
type packMark struct {
	size    int64
	kind    uint16
	items   int
	indexes [][32]byte // that list it; hardly ever more than one
	added   chain.Adding
	missing bool // not in the store, which a check has recorded
	stuck   bool // holds what cannot be read and has no other copy

	live      []uint64 // bits of items that are needed from here
	liveBytes int64
	copied    []uint64 // bits of items that were copied to other packs
}

// itemBytes is how many bytes the items take: the size without what every
// pack has besides (docs/format.md §3).
func (k *packMark) itemBytes() int64 {
	return max(1, k.size-seal.HeaderLen-seal.TagLen-16-40*int64(k.items))
}

// uncopied lists the items that are needed and were not copied.
func (k *packMark) uncopied() (numbers []int) {
	for i := range k.items {
		if bit(k.live, i) && !bit(k.copied, i) {
			numbers = append(numbers, i)
		}
	}
	return numbers
}

func (k *packMark) needed() bool {
	for w, bits := range k.live {
		if k.copied == nil && bits != 0 || k.copied != nil && bits&^k.copied[w] != 0 {
			return true
		}
	}
	return false
}

func bit(bits []uint64, i int) bool { return bits != nil && bits[i/64]&(1<<(i%64)) != 0 }

func setBit(bits *[]uint64, i, n int) {
	if *bits == nil {
		*bits = make([]uint64, (n+63)/64)
	}
	(*bits)[i/64] |= 1 << (i % 64)
}

// catchUp brings the marks up to the chain's end: all of them anew when copies
// were moved by another, else only those of what was added.
func (m *marker) catchUp(ctx context.Context) error {
	for {
		if err := m.tryCatchUp(ctx); !errors.Is(err, errMoved) {
			return err
		}
	}
}

// readIndex reads an index object that is live in s. It fails with errMoved
// when that is gone because another prune has replaced it since.
func (m *marker) readIndex(ctx context.Context, s *chain.State, d [32]byte) ([]index.Pack, error) {
	packs, err := m.r.readIndex(ctx, d)
	return packs, m.gone(ctx, s, err)
}

// gone is what it means that an index object which is live in s could not be read.
func (m *marker) gone(ctx context.Context, s *chain.State, err error) error {
	if !errors.Is(err, ErrDamaged) {
		return err
	}
	if err := m.r.refresh(ctx); err != nil {
		return err
	}
	if m.r.current().Head != s.Head {
		return errMoved
	}
	return refuse("%w; run check, or back up: both make the index anew from the packs", err)
}

// tryCatchUp fails with errMoved when it must begin anew.
func (m *marker) tryCatchUp(ctx context.Context) error {
	known := m.state
	if known == nil {
		known = m.r.current()
	}
	before, err := m.open(ctx, known)
	if err != nil {
		return err
	}
	if err := m.r.refresh(ctx); err != nil {
		return err
	}
	s := m.r.current()
	if damage := m.r.Damage(); len(damage) > 0 {
		return refuse("%s; run check, and put back what it names from a copy of the repository", damage[0])
	}
	if m.state == nil || m.state.Moved != s.Moved {
		m.packs, m.read, m.points = map[[32]byte]*packMark{}, map[[32]byte]bool{}, map[PointID]bool{}
		m.lost, m.notes = map[PointID]int64{}, map[string]bool{}
		m.chunks, m.walked, m.nodes, m.roots = nil, nil, map[tree.ID]bool{}, map[string]tree.Root{}
	}
	if err := m.inventory(ctx, s); err != nil {
		return err
	}
	if m.after, err = m.open(ctx, s); err != nil {
		return err
	}
	for session := range s.Over {
		delete(before, session)
	}
	m.state, m.before = s, before
	for _, id := range s.Order {
		if p, ok := s.Points[id]; ok {
			if err := m.point(ctx, &p); err != nil {
				return err
			}
		}
	}
	if err := m.readPins(ctx, s); err != nil {
		return err
	}
	chunks := m.chunks
	m.chunks = nil
	if err := m.markChunks(chunks); err != nil {
		return err
	}
	for id, session := range m.pins { // what lacks chunks only because it is gone
		if _, live := s.Points[id]; !live && m.lost[id] > 0 && m.withdrawn(ctx, lease.PinName(session, id)) {
			delete(m.lost, id)
			m.pinned--
		}
	}
	return nil
}

// open lists open leases but the own, which must be listed: else the listing
// is not complete.
func (m *marker) open(ctx context.Context, s *chain.State) (map[string]Lease, error) {
	open, err := m.r.openLeases(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	if m.own != "" {
		if _, ok := open[m.own]; !ok {
			if err := m.r.refresh(ctx); err != nil {
				return nil, err
			}
			if m.r.current().Over[m.own] != 0 {
				return nil, ErrRevoked
			}
			return nil, refuse("the store does not list this prune's own lease, leases/%s: its listing cannot be relied on", m.own)
		}
		delete(open, m.own)
	}
	return open, nil
}

// adopt takes over the state after an entry of the pruner's own, unless there
// are other news, which the next catchUp looks at.
func (m *marker) adopt(ctx context.Context) error {
	if s := m.r.current(); s.Head == m.state.Head+1 {
		if err := m.inventory(ctx, s); errors.Is(err, errMoved) {
			m.state = nil // part of it is taken in: begin anew
			return m.catchUp(ctx)
		} else if err != nil {
			return err
		}
		m.state = s
	}
	return nil
}

// inventory reads the index objects that are new, forgets those that are no
// more, and compares the packs that they list with the store's listing.
func (m *marker) inventory(ctx context.Context, s *chain.State) error {
	var unread [][32]byte
	for d := range s.Indexes {
		if !m.read[d] {
			unread = append(unread, d)
		}
	}
	err := m.r.readMany(ctx, unread, func(d [32]byte, packs []index.Pack, err error) error {
		if err := m.gone(ctx, s, err); err != nil {
			return err
		}
		for _, k := range packs {
			if err := m.pack(ctx, s, d, &k); err != nil {
				return err
			}
		}
		m.read[d] = true
		return nil
	})
	if err != nil {
		return err
	}
	// Only now, so that a pack which another index object lists keeps its marks.
	dropped := map[[32]byte]bool{}
	for d := range m.read {
		if !s.Indexes[d] {
			delete(m.read, d)
			dropped[d] = true
		}
	}
	for name, k := range m.packs {
		if len(dropped) == 0 {
			break
		}
		k.indexes = slices.DeleteFunc(k.indexes, func(d [32]byte) bool { return dropped[d] })
		if len(k.indexes) == 0 {
			delete(m.packs, name)
		}
	}
	return nil
}

// pack notes a pack of the inventory. One that was in the inventory before
// the store was listed must have been listed.
func (m *marker) pack(ctx context.Context, s *chain.State, d [32]byte, k *index.Pack) error {
	if have := m.packs[k.Name]; have != nil {
		have.indexes = append(have.indexes, d)
		return nil
	}
	mark := &packMark{size: k.Size, kind: k.Kind, items: len(k.Items), indexes: [][32]byte{d}, added: s.Added[d]}
	m.packs[k.Name] = mark
	size, listed := m.there[k.Name]
	if listed && size == k.Size || !m.old.Indexes[d] || s.Quarantine[k.Name] != 0 {
		return nil
	}
	name := packName(k.Name)
	if !listed {
		if _, err := m.r.store.Get(ctx, name, 0, seal.HeaderLen); err == nil {
			return refuse("the store does not list %s, which is there: its listing cannot be relied on", name)
		} else if !errors.Is(err, blob.ErrNotExist) && !errors.Is(err, blob.ErrTruncated) {
			return err
		}
		mark.missing = true
	}
	bad := 0
	for _, it := range k.Items {
		if s.Bad[chain.Copy{Pack: k.Name, ID: it.ID}] {
			bad++
		}
	}
	if mark.missing && bad < len(k.Items) || bad == 0 {
		return refuse("%s is missing or of a wrong length, and no check has looked into it; run check first", name)
	}
	return nil
}

// point walks the maps of a point that was not walked yet.
func (m *marker) point(ctx context.Context, p *Point) error {
	if m.points[p.ID] {
		return nil
	}
	for _, d := range mapsOf(p) {
		root, err := tree.ParseRoot(string(d.root), d.size)
		if err == nil {
			key := string(p.History) + "/" + d.what
			if err = m.disk(ctx, p.ID, m.roots[key], root); err == nil {
				m.roots[key] = root
			}
		}
		if errors.Is(err, ErrDamaged) || errors.Is(err, tree.ErrNode) {
			if m.r.refresh(ctx) == nil && m.r.current().Moved != m.state.Moved {
				return errMoved // what was looked for may be elsewhere by now
			}
			return refuse("the map of %s of point %s (%s of %s) cannot be read, so what it needs is not known: %w; "+
				"back %s up again and try once more, or forget the point", d.what, p.ID, p.VM, p.Time.Format("2006-01-02 15:04"), err, p.VM)
		} else if err != nil {
			return err
		}
	}
	m.points[p.ID] = true
	return nil
}

// walkers is how many nodes are read at once: a store far away needs it.
const walkers = 16

// disk walks a map but for what is the same, at the same place, in one that was
// walked before: of most leaves a few chunks have changed.
func (m *marker) disk(ctx context.Context, p PointID, before, root tree.Root) error {
	m.mu.Lock()
	point := int32(len(m.walked))
	m.walked = append(m.walked, p)
	m.mu.Unlock()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(walkers)
	empty := new(tree.Node)
	var walk func(old, id tree.ID, level int) error
	walk = func(old, id tree.ID, level int) error {
		m.mu.Lock()
		known := m.nodes[id]
		m.nodes[id] = true
		m.mu.Unlock()
		if known {
			return nil
		}
		if err := m.mark(id); err != nil {
			return err
		}
		n, err := m.r.node(gctx, id, level)
		if err != nil {
			return err
		}
		was := empty
		if old != (tree.ID{}) {
			if o, err := m.r.node(gctx, old, level); err == nil {
				was = o
			}
		}
		if level == 0 {
			return m.need(was, n, point)
		}
		below := make([]tree.ID, tree.Fanout)
		m.mu.Lock()
		for i, c := range n.Children {
			if c != was.Children[i] && !m.nodes[c] {
				below[i] = c
			}
		}
		m.mu.Unlock()
		m.r.ahead(gctx, below, level-1)
		for i, c := range below {
			if c == (tree.ID{}) {
				continue
			}
			if !g.TryGo(func() error { return walk(was.Children[i], c, level-1) }) {
				if err := walk(was.Children[i], c, level-1); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if before.Levels != root.Levels {
		before.ID = tree.ID{}
	}
	if root.ID != (tree.ID{}) && root.ID != before.ID {
		g.Go(func() error { return walk(before.ID, root.ID, root.Levels-1) })
	}
	return g.Wait()
}

// need notes the chunks of a leaf that it was without, and marks those noted when
// they have become many.
func (m *marker) need(was, n *tree.Node, point int32) error {
	// While a batch is full and the one before is still being looked up, nobody
	// fills a third.
	m.filling <- struct{}{}
	if m.chunks == nil {
		m.mu.Lock()
		m.chunks, m.spare = m.spare, nil
		m.mu.Unlock()
	}
	if m.chunks == nil {
		m.chunks = newBatch()
	}
	for i := range n.Children {
		if c := &n.Children[i]; *c != (tree.ID{}) && *c != was.Children[i] {
			some := &m.chunks.some[c[0]]
			*some = append(*some, neededChunk{*c, point})
			m.chunks.n++
		}
	}
	if m.chunks.n < batchChunks {
		<-m.filling
		return nil
	}
	m.resolving <- struct{}{}
	full := m.chunks
	m.chunks = nil
	<-m.filling
	defer func() { <-m.resolving }()
	err := m.markChunks(full)
	for i := range full.some {
		full.some[i] = full.some[i][:0]
	}
	full.n = 0
	m.mu.Lock()
	m.spare = full
	m.mu.Unlock()
	return err
}

// sortChunks gives the order of the chunks' ids: keys of which the lowest
// chunkBits are indexes. Moving keys is less work than moving chunks.
func sortChunks(keys []uint64, chunks []neededChunk) []uint64 {
	const low = 1<<chunkBits - 1
	keys = slices.Grow(keys[:0], len(chunks))[:len(chunks)]
	for i := range chunks {
		keys[i] = binary.BigEndian.Uint64(chunks[i].id[:])&^low | uint64(i)
	}
	slices.Sort(keys)
	for i := range keys { // the few that begin alike
		for j := i; j > 0 && keys[j]&^low == keys[j-1]&^low && bytes.Compare(chunks[keys[j]&low].id[:], chunks[keys[j-1]&low].id[:]) < 0; j-- {
			keys[j], keys[j-1] = keys[j-1], keys[j]
		}
	}
	return keys
}

// markChunks marks chunks in the index's order.
func (m *marker) markChunks(batch *chunkBatch) error {
	if batch == nil || batch.n == 0 {
		return nil
	}
	var g errgroup.Group
	for some := range slices.Chunk(batch.some[:], len(batch.some)/resolvers) {
		g.Go(func() error { return m.markSome(some) })
	}
	return g.Wait()
}

// markSome marks some of a batch's chunks.
func (m *marker) markSome(parts [][]neededChunk) error {
	var order []uint64
	var c *neededChunk
	ids := func(yield func(pack.ID) bool) {
		for _, some := range parts {
			order = sortChunks(order, some)
			for _, key := range order {
				if c = &some[key&(1<<chunkBits-1)]; !yield(c.id) {
					return
				}
			}
		}
	}
	return m.r.index.LookupAll(ids, func(places []index.Place) error {
		if !m.markPlace(c.id, places) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.lost[m.walked[c.point]]++
		}
		return nil
	})
}

var errLost = fmt.Errorf("%w: in no pack", ErrDamaged)

// mark sets the bit of the copy of an item that is to stay.
func (m *marker) mark(id pack.ID) error {
	places, err := m.r.index.Lookup(id, nil)
	if err != nil {
		return err
	}
	if !m.markPlace(id, places) {
		return errLost
	}
	return nil
}

// markPlace is mark for an item of which it is known where it lies. False is
// for one that has no copy.
func (m *marker) markPlace(id pack.ID, places []index.Place) bool {
	var best *packMark
	var at *index.Place
	bestRank := 0
	for i := range places {
		p := &places[i]
		k, rank := m.rank(p, id)
		if rank > bestRank || rank == bestRank && rank > 0 && m.newer(p, at) {
			best, at, bestRank = k, p, rank
		}
	}
	if best == nil {
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if bestRank == rankBad {
		best.stuck = true
	}
	if !bit(best.live, int(at.Number)) {
		setBit(&best.live, int(at.Number), best.items)
		best.liveBytes += int64(at.Stored)
	}
	return true
}

const (
	rankBad        = iota + 1 // known to be bad, but nothing else is there
	rankQuarantine            // the only good copy: it is to be copied
	rankGood
)

// rank gives the pack of a copy, and how good that is to rest on; 0 for not at all.
func (m *marker) rank(p *index.Place, id pack.ID) (*packMark, int) {
	k := m.packs[p.Pack]
	switch {
	case k == nil || k.missing || int(p.Number) >= k.items:
		return nil, 0
	case len(m.state.Bad) > 0 && m.state.Bad[chain.Copy{Pack: p.Pack, ID: id}]:
		return k, rankBad
	case m.state.Quarantine[p.Pack] != 0:
		return k, rankQuarantine
	}
	return k, rankGood
}

// newer prefers the copy that was added later, so that a prune that was cut
// off after copying has not copied in vain.
func (m *marker) newer(a, b *index.Place) bool {
	ka, kb := m.packs[a.Pack], m.packs[b.Pack]
	if ka.added.Entry != kb.added.Entry {
		return ka.added.Entry > kb.added.Entry
	}
	return bytes.Compare(a.Pack[:], b.Pack[:]) > 0
}

// readPins walks the points that are forgotten and pinned. It lists the pins after
// the chain was read: who pins a point looks for it in the chain after.
func (m *marker) readPins(ctx context.Context, s *chain.State) error {
	names, err := m.r.leases.Pins(ctx)
	if err != nil {
		return fmt.Errorf("list pins: %w", err)
	}
	pinned := map[PointID]string{} // and by whom
	for _, name := range names {
		id, err := m.r.leases.ReadPin(ctx, name)
		session, _, _ := lease.Split(name)
		if errors.Is(err, blob.ErrNotExist) {
			continue
		} else if err != nil {
			return refuse("%w; when its session is gone for certain: holdfast unpin %s --force", err, session)
		}
		pinned[id] = session
	}
	m.pins, m.pinned = pinned, 0
	for id, session := range pinned {
		if _, live := s.Points[id]; live {
			continue
		}
		p, known := s.Forgotten[id]
		if !known {
			m.notes[fmt.Sprintf("a pin names point %s, which never was or is younger than this prune", id)] = true
			continue
		}
		if p == nil {
			m.notes[fmt.Sprintf("a pin names point %s, which was forgotten before: its session has not got it", id)] = true
			continue
		}
		err := m.point(ctx, p)
		if errors.Is(err, ErrRefused) && m.withdrawn(ctx, lease.PinName(session, id)) {
			continue
		}
		if err != nil {
			return fmt.Errorf("the point is forgotten, but pinned: %w; when its session is gone for certain: holdfast unpin %s --force", err, session)
		}
		m.pinned++
	}
	return nil
}

// withdrawn waits a little for a pin to go. Who pins a point that is gone finds
// that out at once, and takes the pin away.
func (m *marker) withdrawn(ctx context.Context, name string) bool {
	for range 10 {
		if _, err := m.r.store.Get(ctx, name, 0, 0); errors.Is(err, blob.ErrNotExist) {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(time.Second):
		}
	}
	return false
}

// shielded reports whether what was added so belongs to a run that is under way:
// it has announced it, and will name it in a point that is not there yet.
func (m *marker) shielded(a chain.Adding) bool {
	if a.Lease == "" {
		return false
	}
	_, before := m.before[a.Lease]
	_, after := m.after[a.Lease]
	return before || after || a.Lease == m.own
}

// missing lists points of which chunks have no copy at all.
func (m *marker) missing() map[PointID]int64 { return maps.Clone(m.lost) }
