package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
	"holdfast/internal/repo/internal/tree"
)

// RepairOptions of Repair.
type RepairOptions struct {
	// From is a repository with the same VMs, or a copy of this one's objects in
	// another store, opened with a cache of its own; or nil.
	From *Repo
	// Check is what to look at for damage first.
	Check CheckOptions
	// Report is told how many plain bytes were stored anew so far.
	Report func(bytes int64)
}

// RepairReport is what Repair found and did.
type RepairReport struct {
	// Check is what was found.
	Check *CheckReport `json:"check"`
	// Chunks and Nodes were stored anew, Bytes the plain bytes of both.
	Chunks int   `json:"refilled_chunks"`
	Nodes  int   `json:"refilled_nodes"`
	Bytes  int64 `json:"refilled_bytes"`
	// Left is what restore points still lack.
	Left []Problem `json:"left"`
}

// Repair checks the repository, which marks what is damaged as lost and
// rebuilds lost index objects, and stores anew what still opens of damaged
// packs, and what From has of what is lost.
// Ids are keyed, so two repositories have no id in common: what lies at the same place
// of the same disk, in the same restore point or another one of the same VM, is
// read from there and taken if it has the id that is wanted here. So a wrong
// guess costs time and nothing else, and From need not be trusted.
//
// Nothing is overwritten and nothing deleted. After a crash it is done again.
func (r *Repo) Repair(ctx context.Context, o RepairOptions) (*RepairReport, error) {
	check, err := r.Check(ctx, o.Check)
	if err != nil {
		return nil, err
	}
	report := &RepairReport{Check: check, Left: lostPoints(check)}
	if len(check.worn) == 0 && (o.From == nil || len(report.Left) == 0) {
		return report, nil
	}
	var sources []Point
	if o.From != nil {
		if sources, err = o.From.Points(ctx); err != nil {
			return nil, fmt.Errorf("the other repository: %w", err)
		}
	}
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		return nil, err
	}
	f := &refill{r: r, run: run, o: o, sources: sources, report: report, tried: map[tree.ID]bool{},
		packer: &packer{run: run, kind: pack.Chunks, target: chunkPackBytes}}
	err = f.salvage(ctx, check.worn)
	if err == nil {
		err = f.points(ctx)
	}
	if err == nil {
		err = f.packer.flush(ctx)
	}
	if err == nil {
		err = run.Flush(ctx)
	}
	// Closing a run that made no point announces what it stored.
	if err = errors.Join(err, run.Close()); err != nil {
		return nil, err
	}
	if err := f.give(ctx, check.worn); err != nil {
		return nil, err
	}
	after, err := r.Check(ctx, CheckOptions{})
	if err != nil {
		return nil, err
	}
	report.Left = lostPoints(after)
	return report, nil
}

func lostPoints(c *CheckReport) []Problem {
	left := []Problem{}
	for _, p := range c.Problems {
		if p.Point != "" {
			left = append(left, p)
		}
	}
	return left
}

// refill is the work of one Repair.
type refill struct {
	r       *Repo
	run     *Run
	o       RepairOptions
	sources []Point // of the other repository
	report  *RepairReport
	packer  *packer
	tried   map[tree.ID]bool // whole subtrees, and chunks, that were dealt with
}

// points goes through the maps of all points.
func (f *refill) points(ctx context.Context) error {
	s := f.r.current()
	for _, id := range s.Order {
		p, ok := s.Points[id]
		if !ok {
			continue
		}
		for _, d := range allDisks(&p) {
			root, err := tree.ParseRoot(string(d.Root), d.Size)
			if err != nil || root.ID == (tree.ID{}) {
				continue
			}
			at := &place{f: f, p: &p, d: d}
			if err := at.node(ctx, root.ID, root.Levels-1, 0); err != nil {
				return err
			}
		}
	}
	return nil
}

// allDisks gives a point's disks and its configuration as disks; the latter
// have names that no disk's id has.
func allDisks(p *Point) []Disk {
	disks := slices.Clone(p.Disks)
	for _, f := range p.Files {
		disks = append(disks, Disk{ID: "file/" + f.Name, Size: f.Size, Root: f.Root})
	}
	return disks
}

// place is a disk of a point that is gone through, with the disks elsewhere
// that may hold the same.
type place struct {
	f    *refill
	p    *Point
	d    Disk
	from []*DiskReader // opened when first needed
	open bool
}

// node refills what is lost of a subtree. first is the chunk at which it begins.
func (at *place) node(ctx context.Context, id tree.ID, level int, first int64) error {
	f := at.f
	if f.tried[id] {
		return nil
	}
	f.tried[id] = true
	n, err := f.run.fetchNode(ctx, id, level)
	if errors.Is(err, ErrDamaged) {
		if err := at.subtree(ctx, id, level, first); err != nil {
			return err
		}
		n, err = f.run.fetchNode(ctx, id, level)
	} else if err == nil {
		err = f.storeNode(ctx, id, n) // what reads well by chance is made good
	}
	if errors.Is(err, ErrDamaged) {
		return nil // nobody has it
	} else if err != nil {
		return err
	}
	for i, child := range n.Children {
		if child == (tree.ID{}) {
			continue
		}
		where := first + int64(i)<<(8*level)
		if level > 0 {
			err = at.node(ctx, child, level-1, where)
		} else {
			err = at.chunk(ctx, child, where)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// chunk refills a chunk that has no good copy.
func (at *place) chunk(ctx context.Context, id pack.ID, index int64) error {
	f := at.f
	if f.tried[id] {
		return nil
	}
	if ok, err := f.r.present(id); err != nil || ok {
		return err
	}
	f.tried[id] = true
	if c, err := f.r.item(ctx, nil, id, ChunkSize); err == nil && f.r.contentID(c) == id {
		return f.store(ctx, id, index, c) // a copy that was given up opens after all
	}
	for _, d := range at.sources(ctx) {
		c, err := chunkAt(ctx, d, index)
		if errors.Is(err, ErrDamaged) {
			continue
		} else if err != nil {
			return err
		}
		if f.r.contentID(c) == id {
			return f.store(ctx, id, index, c)
		}
	}
	return nil
}

// store packs a chunk unless this run has it already.
func (f *refill) store(ctx context.Context, id pack.ID, index int64, c []byte) error {
	mine, err := f.run.claim(id, nil)
	if err != nil || !mine {
		return err
	}
	f.report.Chunks++
	f.report.Bytes += ChunkSize
	f.progress()
	return f.packer.add(ctx, id, index, len(c), f.r.compressor.Encode(nil, c))
}

func (f *refill) progress() {
	if f.o.Report != nil {
		f.o.Report(f.report.Bytes)
	}
}

// chunkAt reads a whole chunk, zeros behind the disk's end.
func chunkAt(ctx context.Context, d *DiskReader, index int64) ([]byte, error) {
	c := make([]byte, ChunkSize)
	off := index * ChunkSize
	if off >= d.size {
		return c, nil
	}
	return c, d.ReadAt(ctx, c[:min(ChunkSize, d.size-off)], off)
}

// subtree rebuilds a lost map node with all below it from what lies at its
// place elsewhere: once to see whether it becomes the node that is wanted, and
// once more to store it.
func (at *place) subtree(ctx context.Context, id tree.ID, level int, first int64) error {
	for _, d := range at.sources(ctx) {
		got, err := at.build(ctx, d, level, first, false)
		if err == nil && got == id {
			_, err = at.build(ctx, d, level, first, true)
			return err
		}
		if err != nil && !errors.Is(err, ErrDamaged) {
			return err
		}
	}
	return nil
}

// build gives the id that a node over d's content has in this repository.
func (at *place) build(ctx context.Context, d *DiskReader, level int, first int64, store bool) (tree.ID, error) {
	n := tree.Node{Level: level}
	step := int64(1) << (8 * level) // chunks per child
	for i := range n.Children {
		where := first + int64(i)*step
		if where*ChunkSize >= min(d.size, at.d.Size) {
			break
		}
		empty, err := isEmpty(ctx, d, where, step)
		if err != nil {
			return tree.ID{}, err
		}
		if empty {
			continue
		}
		if level > 0 {
			n.Children[i], err = at.build(ctx, d, level-1, where, store)
		} else {
			n.Children[i], err = at.buildChunk(ctx, d, where, store)
		}
		if err != nil {
			return tree.ID{}, err
		}
	}
	if n.Empty() {
		return tree.ID{}, nil
	}
	id := at.f.r.nodeID(n.Marshal())
	if !store {
		return id, nil
	}
	return id, at.f.storeNode(ctx, id, &n)
}

// storeNode packs a node that has no good copy.
func (f *refill) storeNode(ctx context.Context, id tree.ID, n *tree.Node) error {
	if ok, err := f.r.present(id); err != nil || ok {
		return err
	}
	f.report.Nodes++
	f.report.Bytes += int64(len(n.Marshal()))
	f.progress()
	_, err := f.run.storeNode(ctx, n)
	return err
}

func (at *place) buildChunk(ctx context.Context, d *DiskReader, index int64, store bool) (pack.ID, error) {
	c, err := chunkAt(ctx, d, index)
	if err != nil {
		return pack.ID{}, err
	}
	id := at.f.r.contentID(c)
	if !store || id == (pack.ID{}) {
		return id, nil
	}
	return id, at.f.store(ctx, id, index, c)
}

// isEmpty reports whether chunks are zeros, by the map alone.
func isEmpty(ctx context.Context, d *DiskReader, first, count int64) (bool, error) {
	off := first * ChunkSize
	for e, err := range d.Extents(ctx, off, min(count*ChunkSize, d.size-off)) {
		if err != nil || !e.Zero {
			return false, err
		}
	}
	return true, nil
}

// sources opens the disks of the other repository that may hold the same: of
// the same point if it was copied, then of others of its history, or of a VM
// of the same identity, those nearest in time first.
func (at *place) sources(ctx context.Context) []*DiskReader {
	if at.open {
		return at.from
	}
	at.open = true
	points := slices.DeleteFunc(slices.Clone(at.f.sources), func(p Point) bool {
		return p.ID != at.p.ID && p.History != at.p.History && (p.VMID == "" || p.VMID != at.p.VMID || p.Kind != at.p.Kind)
	})
	slices.SortStableFunc(points, func(a, b Point) int {
		if (a.ID == at.p.ID) != (b.ID == at.p.ID) {
			if a.ID == at.p.ID {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.Time.Sub(at.p.Time).Abs(), b.Time.Sub(at.p.Time).Abs())
	})
	seen := map[Root]bool{}
	for _, p := range points {
		for _, d := range allDisks(&p) {
			if d.ID != at.d.ID || seen[d.Root] || len(at.from) >= maxSources {
				continue
			}
			seen[d.Root] = true
			reader, err := at.f.o.From.OpenDisk(ctx, d)
			if err != nil {
				continue // damaged there: others may do
			}
			at.from = append(at.from, reader)
		}
	}
	return at.from
}

// maxSources bounds how many points of a history are asked for one chunk.
const maxSources = 16

// salvage stores anew what still opens of damaged packs: what is left of them
// may be no more than luck, and their directories are not to be relied on.
func (f *refill) salvage(ctx context.Context, worn []wornPack) error {
	for _, w := range worn {
		if !w.there {
			continue
		}
		off := uint32(seal.HeaderLen)
		for i, it := range w.items {
			at := index.Place{Pack: w.name, Number: uint32(i), Offset: off, Stored: it.Stored}
			off += it.Stored
			if elsewhere, err := f.elsewhere(it.ID, w.name); err != nil {
				return err
			} else if w.bad[it.ID] || elsewhere {
				continue
			}
			content, err := f.r.open(ctx, nil, at, it.ID, pack.MaxContent)
			if errors.Is(err, ErrDamaged) {
				continue // it has become worse
			} else if err != nil {
				return err
			}
			if err := f.again(ctx, it.ID, content); err != nil {
				return err
			}
		}
	}
	return nil
}

// elsewhere reports whether an item has a good copy in another pack.
func (f *refill) elsewhere(id pack.ID, name [32]byte) (bool, error) {
	places, err := f.r.places(id)
	return slices.ContainsFunc(places, func(p index.Place) bool { return p.Pack != name }), err
}

// again stores an item though there is a copy of it.
func (f *refill) again(ctx context.Context, id pack.ID, content []byte) error {
	f.run.mu.Lock()
	known := f.run.fresh[id]
	f.run.fresh[id] = true
	f.run.mu.Unlock()
	if known {
		return nil
	}
	f.report.Bytes += int64(len(content))
	f.progress()
	if f.r.nodeID(content) == id {
		f.report.Nodes++
		return f.run.nodes.add(ctx, id, 0, len(content), append([]byte{0}, content...))
	}
	f.report.Chunks++
	return f.packer.add(ctx, id, 0, len(content), f.r.compressor.Encode(nil, content))
}

// give gives up what damaged packs hold and others do as well.
func (f *refill) give(ctx context.Context, worn []wornPack) error {
	var items []chain.BadItem
	known := f.r.current().Bad
	for _, w := range worn {
		for _, it := range w.items {
			elsewhere, err := f.elsewhere(it.ID, w.name)
			if err != nil {
				return err
			}
			if elsewhere && !known[chain.Copy{Pack: w.name, ID: it.ID}] {
				items = append(items, chain.BadItem{Pack: w.name[:], ID: it.ID[:]})
			}
		}
	}
	return f.r.distrust(ctx, items)
}
