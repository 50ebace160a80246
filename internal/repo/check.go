package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
	"holdfast/internal/repo/internal/tree"
)

// CheckOptions of Check.
type CheckOptions struct {
	// ReadData reads and authenticates every stored byte, not only that
	// everything is there in its right length.
	ReadData bool
	// Percent, with ReadData, reads only so much of the packs' bytes, those first
	// whose last reading by this machine is the longest ago. Repeated checks read
	// everything in 100/Percent times. 0 and 100 read all.
	Percent float64
	// Undeleted is what was brought back before, for the report: that it is not
	// locked is no further problem.
	Undeleted []Undeleted
	// Report is told how many bytes of packs were looked at, of how many.
	Report func(done, total int64)
}

// CheckReport is what Check found.
type CheckReport struct {
	Entries   uint64 `json:"chain_entries"`
	Points    int    `json:"points"`
	Packs     int    `json:"packs"`
	PackBytes int64  `json:"pack_bytes"`
	Nodes     int    `json:"nodes"`      // of disk maps, equal ones counted once
	ReadPacks int    `json:"read_packs"` // of which every byte was read now
	ReadBytes int64  `json:"read_bytes"`
	// Unread counts packs that this machine has never read whole.
	Unread   int       `json:"unread_packs"`
	Problems []Problem `json:"problems"`
	// Transient is what was wrong when it was read first, and right the second
	// time: the stored bytes are good, the way here is not.
	Transient []Problem `json:"transient"`
	// Mended counts damaged packs of which everything was stored anew since.
	Mended int `json:"mended_packs"`
	// Elsewhere counts packs that are in another store, or lost with it: those
	// that a tier opened by itself does not have, and without a key those that
	// this store does not have.
	Elsewhere int `json:"elsewhere_packs,omitempty"`
	// Distrusted counts damaged copies that the next runs will store again.
	Distrusted int `json:"distrusted"`

	Locks *LockReport `json:"locks,omitempty"` // nil without a rule on immutability
	// Undeleted is what somebody had deleted or overwritten, and is back.
	Undeleted []Undeleted `json:"undeleted"`

	worn []wornPack // damaged and not mended
}

// Problem is one thing that is wrong.
type Problem struct {
	Object string  `json:"object"`          // the stored object, or the disk, that is damaged
	Point  PointID `json:"point,omitempty"` // when a restore point has lost something
	What   string  `json:"what"`
}

// Check proves the repository: the chain, the index objects, that every pack is
// there in its length (with ReadData also byte for byte), and that every map
// and chunk of every restore point is found. Damage is listed, and recorded in
// the chain, so that the next runs store again what they meet of it. An error
// means that the check itself could not be done.
func (r *Repo) Check(ctx context.Context, o CheckOptions) (*CheckReport, error) {
	for {
		report, err := r.check(ctx, o)
		if !errors.Is(err, errMoved) {
			return report, err
		}
	}
}

// check fails with errMoved when what it found wrong may be the work of a
// prune beside it.
func (r *Repo) check(ctx context.Context, o CheckOptions) (*CheckReport, error) {
	c := newChecker(r, o)
	if err := c.chain(ctx); err != nil {
		return nil, err
	}
	if err := c.keys(ctx); err != nil {
		return nil, err
	}
	if err := c.small(ctx); err != nil {
		return nil, err
	}
	if err := c.tiers(ctx); err != nil {
		return nil, err
	}
	if err := c.indexes(ctx); err != nil {
		return nil, err
	}
	if err := c.stored(ctx); err != nil {
		if errors.Is(err, ErrDamaged) && c.r.refresh(ctx) == nil && c.r.current().Moved != c.moved {
			return nil, errMoved
		}
		return nil, err
	}
	if err := c.points(ctx); err != nil {
		return nil, err
	}
	if err := c.still(ctx); err != nil {
		return nil, err
	}
	if err := c.locks(ctx); err != nil {
		return nil, err
	}
	if len(c.r.current().Damage()) > 0 || c.r.mirrorOf != "" {
		return &c.report, nil // nothing can be recorded in a chain with gaps
	}
	// Without a lease: one of a check that died would keep prunes waiting. A prune
	// beside this that has read the index before it was lost may take the new
	// object for one that no entry will add, and delete it. Then the index is lost
	// once more, and made up for once more.
	if err := c.r.mend(ctx); err != nil {
		return nil, err
	}
	return &c.report, c.distrust(ctx)
}

func newChecker(r *Repo, o CheckOptions) *checker {
	return &checker{r: r, o: o, report: CheckReport{Undeleted: o.Undeleted}, packs: map[[32]byte]packInfo{}, bad: map[chain.Copy]bool{}, lost: map[tree.ID]int64{}}
}

type packInfo struct {
	size   int64
	index  [32]byte // the index object that lists it; zero when none does
	number int      // within that
}

type checker struct {
	r     *Repo
	o     CheckOptions
	packs map[[32]byte]packInfo
	lost  map[tree.ID]int64 // by node: chunks below that cannot be read
	moved uint64            // state.moved at the start

	mu     sync.Mutex // guards what follows
	bad    map[chain.Copy]bool
	worn   []wornPack
	report CheckReport
}

func (c *checker) problem(p Problem) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Problems = append(c.report.Problems, p)
}

// chain reads all entries again; they must lead to the state we know.
func (c *checker) chain(ctx context.Context) error {
	if err := c.r.refresh(ctx); err != nil {
		return err
	}
	known := c.r.current()
	c.moved = known.Moved
	problems, vanished, err := c.r.chain.Compare(ctx, known)
	if err != nil {
		return err
	}
	if vanished { // a prune beside this check may have deleted them by right
		if err := c.r.refresh(ctx); err != nil {
			return err
		}
		if c.r.current().Checkpoint != known.Checkpoint {
			return errMoved
		}
	}
	for _, what := range problems {
		c.problem(Problem{Object: "chain", What: what})
	}
	c.report.Entries, c.report.Points = known.Head, len(known.Points)
	return nil
}

// indexes reads all live index objects and notes the packs. What a lost one
// listed is found in the packs themselves.
func (c *checker) indexes(ctx context.Context) error {
	s := c.r.current()
	lost := map[[32]byte]bool{}
	for d := range s.Indexes {
		packs, err := c.r.readIndex(ctx, d)
		if errors.Is(err, ErrDamaged) {
			c.problem(Problem{Object: index.Name(d), What: err.Error()})
			if err := c.still(ctx); err != nil {
				return err
			}
			lost[d] = true
			continue
		} else if err != nil {
			return err
		}
		c.note(d, packs)
	}
	if len(lost) > 0 || len(s.Damage()) > 0 {
		found, err := c.r.makeUp(ctx, s, lost, c.r.index)
		if err != nil {
			return err
		}
		c.note([32]byte{}, found)
	}
	c.report.Packs = len(c.packs)
	return nil
}

func (c *checker) note(index [32]byte, packs []index.Pack) {
	s := c.r.current()
	for i, k := range packs {
		if s.Quarantine[k.Name] != 0 {
			continue // nothing may rest on it, and it may be gone any time
		}
		c.packs[k.Name] = packInfo{k.Size, index, i}
		c.report.PackBytes += k.Size
	}
}

// items lists what is in a pack.
func (c *checker) items(ctx context.Context, info packInfo) ([]index.Item, error) {
	if info.index == ([32]byte{}) {
		c.r.mu.RLock()
		defer c.r.mu.RUnlock()
		return c.r.found[info.number].Items, nil
	}
	packs, err := c.r.readIndex(ctx, info.index)
	if err != nil {
		return nil, err
	}
	return packs[info.number].Items, nil
}

// stored checks that each pack is there, and with ReadData what is in it.
func (c *checker) stored(ctx context.Context) error {
	there, err := listSizes(ctx, c.r.store)
	if err != nil {
		return err
	}
	seen := verifiedIn(readingCache(c.r.cache, c.r.mirrorOf))
	read := seen.choose(c.packs, c.o)
	for k := range c.r.current().Bad { // where damage was found before
		if _, listed := c.packs[k.Pack]; listed {
			read[k.Pack] = true
		}
	}
	var done int64
	head := c.r.heads(packReaders)
	buffers := make(chan []byte, packReaders)
	for range packReaders {
		buffers <- nil
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(packReaders)
	for name, info := range c.packs {
		g.Go(func() error {
			buf := <-buffers
			defer func() { buffers <- buf }()
			load := func(s blob.Getter) ([]byte, error) {
				head <- struct{}{}
				defer func() { <-head }()
				buf = slices.Grow(buf[:0], int(info.size))[:info.size]
				if err := blob.Fill(gctx, s, packName(name), 0, buf); err != nil {
					return nil, err
				}
				return buf, nil
			}
			if !read[name] {
				load = nil
			}
			if err := c.pack(gctx, name, info, there, load); err != nil {
				return err
			}
			c.mu.Lock()
			defer c.mu.Unlock()
			if read[name] {
				seen.note(name)
			}
			if done += info.size; c.o.Report != nil {
				c.o.Report(done, c.report.PackBytes)
			}
			return nil
		})
	}
	err = g.Wait()
	c.packProblems()
	c.report.Unread = seen.unread(c.packs)
	if !c.o.ReadData {
		return err
	}
	// What was read counts though the check was interrupted.
	return errors.Join(err, seen.save(c.packs))
}

// packReaders is how many packs are read at once: 16 MiB each.
const packReaders = 4

// pack checks one pack; read reads it whole, if it is to be read.
func (c *checker) pack(ctx context.Context, name [32]byte, info packInfo, there map[[32]byte]int64, read func(blob.Getter) ([]byte, error)) error {
	size, ok := there[name]
	switch {
	case !ok && c.r.mirrorOf != "":
		return c.badPack(ctx, name, info, notHere, nil)
	case !ok:
		return c.badPack(ctx, name, info, "missing", nil)
	case size != info.size:
		return c.badPack(ctx, name, info, fmt.Sprintf("%d bytes long, should be %d", size, info.size), nil)
	case read == nil:
		return nil
	}
	s := blob.Getter(c.r.store)
	if len(c.r.current().Tiers) > 0 {
		s = ownFirst{c.r.tiers}
	}
	p, what, err := twice(ctx, s, packName(name), name, func() ([]byte, error) { return read(s) })
	if err != nil {
		return err
	}
	c.mu.Lock()
	c.report.ReadPacks++
	c.report.ReadBytes += int64(len(p))
	if p != nil && what.first != "" && what.second == "" {
		c.report.Transient = append(c.report.Transient, Problem{Object: packName(name), What: what.first})
	}
	c.mu.Unlock()
	if what.second == "" {
		return nil
	}
	return c.badPack(ctx, name, info, what.second, p)
}

// badPack notes a damaged pack and its items; with p, those that still open
// stay good.
func (c *checker) badPack(ctx context.Context, name [32]byte, info packInfo, what string, p []byte) error {
	items, err := c.items(ctx, info)
	if err != nil {
		return err
	}
	w := wornPack{name: name, what: what, items: items, bad: map[pack.ID]bool{}, there: p != nil}
	off := uint32(seal.HeaderLen)
	for i, it := range items {
		at := index.Place{Pack: name, Number: uint32(i), Offset: off, Stored: it.Stored}
		off += it.Stored
		if p != nil && c.opens(ctx, p, at, it.ID) {
			continue
		}
		w.bad[it.ID] = true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for id := range w.bad {
		c.bad[chain.Copy{Pack: name, ID: id}] = true
	}
	c.worn = append(c.worn, w)
	return nil
}

// opens tries one item of a damaged pack in memory.
func (c *checker) opens(ctx context.Context, p []byte, at index.Place, id pack.ID) bool {
	if len(p) < seal.HeaderLen || int64(at.Offset)+int64(at.Stored) > int64(len(p)) {
		return false
	}
	h, master, err := c.r.packHeader(ctx, p)
	if err != nil {
		return false
	}
	sealed := append([]byte(nil), p[at.Offset:at.Offset+at.Stored]...)
	_, err = pack.NewOpener(p, h, master).Open(nil, sealed, int(at.Number), id, pack.MaxContent)
	return err == nil
}

// points goes through every restore point's maps.
func (c *checker) points(ctx context.Context) error {
	s := c.r.current()
	for _, id := range s.Order {
		p, ok := s.Points[id]
		if !ok {
			continue
		}
		for _, d := range p.Disks {
			if err := c.disk(ctx, &p, d, "disk "+d.ID); err != nil {
				return err
			}
		}
		for _, f := range p.Files {
			if err := c.disk(ctx, &p, Disk{ID: f.Name, Size: f.Size, Root: f.Root}, f.Name); err != nil {
				return err
			}
		}
	}
	c.report.Nodes = len(c.lost)
	return nil
}

func (c *checker) disk(ctx context.Context, p *Point, d Disk, what string) error {
	root, err := tree.ParseRoot(string(d.Root), d.Size)
	if err != nil {
		c.problem(Problem{Object: what, Point: p.ID, What: err.Error()})
		return nil
	}
	lost, err := c.node(ctx, root.ID, root.Levels-1)
	if err != nil {
		return err
	}
	if lost > 0 {
		_, chunks := chunkRange(0, d.Size)
		lost = min(lost, chunks) // below a lost node it counts all that may have been there
		c.problem(Problem{Object: what, Point: p.ID,
			What: fmt.Sprintf("%s of %s: %d chunks (%d KiB) cannot be read", p.VM, p.Time.Format("2006-01-02 15:04:05"), lost, lost*ChunkSize>>10)})
	}
	return nil
}

// node counts the chunks below a node that cannot be read.
func (c *checker) node(ctx context.Context, id tree.ID, level int) (int64, error) {
	if id == (tree.ID{}) {
		return 0, nil
	}
	if lost, ok := c.lost[id]; ok {
		return lost, nil
	}
	readable, err := c.readable(id)
	if err != nil {
		return 0, err
	}
	var n *tree.Node
	if readable {
		if n, err = c.r.node(ctx, id, level); err != nil && !errors.Is(err, ErrDamaged) {
			return 0, err
		}
	}
	if n == nil {
		c.lost[id] = 1 << (8 * (level + 1)) // all that it may have mapped
		return c.lost[id], nil
	}
	var lost int64
	if level > 0 {
		c.r.ahead(ctx, slices.DeleteFunc(slices.Clone(n.Children[:]), func(child tree.ID) bool {
			_, known := c.lost[child]
			return known
		}), level-1)
	}
	for _, child := range n.Children {
		if child == (tree.ID{}) {
			continue
		}
		if level > 0 {
			l, err := c.node(ctx, child, level-1)
			if err != nil {
				return 0, err
			}
			lost += l
		} else if ok, err := c.readable(child); err != nil {
			return 0, err
		} else if !ok {
			lost++
		}
	}
	c.lost[id] = lost
	return lost, nil
}

// readable reports whether an item has a copy that this check found no fault with.
func (c *checker) readable(id pack.ID) (bool, error) {
	places, err := c.r.places(id)
	if err != nil {
		return false, err
	}
	for _, p := range places {
		if _, listed := c.packs[p.Pack]; listed && !c.bad[chain.Copy{Pack: p.Pack, ID: id}] {
			return true, nil
		}
	}
	return false, nil
}

// distrustItems bounds one chain entry.
const distrustItems = 1 << 16

// distrust records the damaged copies that the chain does not know yet.
func (c *checker) distrust(ctx context.Context) error {
	var items []chain.BadItem
	known := c.r.current().Bad
	for k := range c.bad {
		if !known[k] {
			items = append(items, chain.BadItem{Pack: k.Pack[:], ID: k.ID[:]})
		}
	}
	c.report.Distrusted = len(items)
	return c.r.distrust(ctx, items)
}

func (r *Repo) distrust(ctx context.Context, items []chain.BadItem) error {
	for len(items) > 0 {
		n := min(len(items), distrustItems)
		e := chain.Sealed{Items: items[:n]}
		if err := r.append(ctx, chain.Distrust, chain.Clear{}, e, func(*chain.State) error { return nil }); err != nil {
			return fmt.Errorf("record the damage, so that the next backups mend it: %w", err)
		}
		items = items[n:]
	}
	return nil
}

// still fails with errMoved when there are problems, and copies were moved
// since the check began: then it must begin again.
func (c *checker) still(ctx context.Context) error {
	if len(c.report.Problems) == 0 {
		return nil
	}
	if err := c.r.refresh(ctx); err != nil {
		return err
	}
	if c.r.current().Moved != c.moved {
		return errMoved
	}
	return nil
}
