package repo

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
)

const (
	// rewriteBelow is the share of a pack's bytes, in percent, below which the
	// rest that is needed is copied elsewhere: to copy 60 frees 40 at least.
	rewriteBelow = 60
	// quarantineMax bounds the packs of one quarantine entry: some 2 TiB.
	quarantineMax = 1 << 17
	// defaultWatch is how long a lease must show no sign of life to be called
	// dead: fifteen beats (docs/format.md §6.1).
	defaultWatch = 15 * time.Minute
)

// PruneOptions of Prune.
type PruneOptions struct {
	// Session is the id of the prune's lease, as for Begin; "" makes one up.
	Session string
	// DryRun finds what would be done, and changes nothing.
	DryRun bool
	// Watch is how long leases on which something waits are watched. One that
	// has shown no sign of life in all that time is revoked. 0 is 15 minutes,
	// negative does not watch at all.
	Watch time.Duration
	// Report is told what is being done and how far it is. done and total are
	// bytes for "copy", else counts; "entries" are of the chain, being deleted.
	Report func(step string, done, total int64)

	checkpointEvery uint64 // for tests; 0 is checkpointEvery
	mergeLeast      int    // for tests; 0 is mergeLeast
}

// PruneReport is what Prune did or, in a dry run, would do. Bytes are stored bytes.
type PruneReport struct {
	DryRun    bool  `json:"dry_run"`
	Points    int   `json:"points"`
	Pinned    int   `json:"pinned_points"` // forgotten, but kept by pins
	Packs     int   `json:"packs"`         // of the inventory, before
	PackBytes int64 `json:"pack_bytes"`
	LiveBytes int64 `json:"live_bytes"` // of items that points need

	// Quarantined now: no run counts them as present any more.
	Quarantined      int   `json:"quarantined_packs"`
	QuarantinedBytes int64 `json:"quarantined_bytes"`
	// Leftover are packs among them that dead runs had left unannounced.
	Leftover int `json:"leftover_packs"`
	// Rewritten are packs among them whose needed items were copied.
	Rewritten   int   `json:"rewritten_packs"`
	CopiedBytes int64 `json:"copied_bytes"` // written to new packs

	// Removed from the store, quarantined now or earlier.
	Removed      int   `json:"removed_packs"`
	RemovedBytes int64 `json:"removed_bytes"`

	// Waiting in quarantine for runs to end.
	Waiting      int      `json:"waiting_packs"`
	WaitingBytes int64    `json:"waiting_bytes"`
	WaitsFor     []Lease  `json:"waits_for"`
	Revoked      []string `json:"revoked"` // leases found dead

	// Merged are index objects that were small, and are in few large ones now.
	Merged int `json:"merged_indexes,omitempty"`
	// Checkpoint is the number of the entry with the whole state, if one was
	// written, RemovedEntries how many need not be read any more and were
	// deleted.
	Checkpoint     uint64 `json:"checkpoint,omitempty"`
	RemovedEntries int    `json:"removed_entries,omitempty"`
	// Locked are packs that would go or be rewritten, and whose lock holds. They
	// stay as they are; a prune after LockedUntil frees the last of them.
	Locked      int        `json:"locked_packs"`
	LockedBytes int64      `json:"locked_bytes"`
	LockedUntil *time.Time `json:"locked_until,omitempty"`

	// Lost are points of which chunks have no copy: prune cannot help them,
	// and did not harm them.
	Lost  map[PointID]int64 `json:"lost_chunks,omitempty"`
	Notes []string          `json:"notes,omitempty"`
}

// Prune frees what no point needs. It works in two phases, each of which can
// be cut off anywhere: packs are put in quarantine by an entry of the chain,
// and removed, after a sweep entry that replaces the index objects, when no
// run is left that began before that. So it may run beside everything, other
// prunes too. What a run under way has stored is not touched.
//
// It needs to know everything first: with a gap in the chain, an index object,
// a map of a point or a pin that cannot be read, or a listing that lacks
// something, it returns ErrRefused and has removed nothing.
func (r *Repo) Prune(ctx context.Context, o PruneOptions) (*PruneReport, error) {
	if o.Watch == 0 {
		o.Watch = defaultWatch
	}
	if o.Report == nil {
		o.Report = func(string, int64, int64) {}
	}
	p := &pruner{r: r, o: o, report: PruneReport{DryRun: o.DryRun, WaitsFor: []Lease{}, Revoked: []string{}}}
	if o.DryRun {
		return p.dry(ctx)
	}
	// Its lease keeps other prunes off what this one has stored and not yet
	// announced.
	if o.Session == "" {
		o.Session = RandomID()
	}
	run, err := r.Begin(ctx, o.Session)
	if err != nil {
		return nil, err
	}
	p.run = run
	err = p.prune(ctx)
	err = errors.Join(err, run.Close())
	p.finish()
	return &p.report, err
}

type pruner struct {
	r   *Repo
	o   PruneOptions
	run *Run
	m   *marker
	// indexes are the index objects listed at the start.
	indexes []string
	locked  map[[32]byte]time.Time // packs that are in the way of a lock, and its end
	strays  bool                   // there are packs in no index, of runs that are open
	report  PruneReport
}

// start lists what the store holds and marks what points need.
func (p *pruner) start(ctx context.Context) error {
	if err := p.r.refresh(ctx); err != nil {
		return err
	}
	p.m = &marker{r: p.r, old: p.r.current(), there: map[[32]byte]int64{}, filling: make(chan struct{}, 1), resolving: make(chan struct{}, 1)}
	if p.run != nil {
		p.m.own = p.run.lease
	}
	p.o.Report("list", 0, 0)
	if err := p.reachable(ctx); err != nil {
		return err
	}
	for i, err := range p.r.store.List(ctx, "packs/") {
		if err != nil {
			return fmt.Errorf("list packs: %w", err)
		}
		name, err := packDigest(i.Name)
		if err != nil {
			p.note("%s is no pack; left alone", i.Name)
			continue
		}
		p.m.there[name] = i.Size
	}
	var err error
	if p.indexes, err = blob.Names(ctx, p.r.store, "index/"); err != nil {
		return fmt.Errorf("list index objects: %w", err)
	}
	p.o.Report("mark", 0, int64(len(p.m.old.Points)))
	if err := p.m.catchUp(ctx); err != nil {
		return err
	}
	for d := range p.m.old.Indexes {
		if _, there := slices.BinarySearch(p.indexes, index.Name(d)); p.m.state.Indexes[d] && !there {
			return refuse("the store does not list %s, which is there: its listing cannot be relied on", index.Name(d))
		}
	}
	p.report.Packs = len(p.m.packs)
	for _, k := range p.m.packs {
		p.report.PackBytes += k.size
		p.report.LiveBytes += k.liveBytes
	}
	return nil
}

func (p *pruner) note(format string, args ...any) {
	p.report.Notes = append(p.report.Notes, fmt.Sprintf(format, args...))
}

func (p *pruner) finish() {
	if p.m == nil || p.m.state == nil {
		return
	}
	p.report.Points, p.report.Pinned = len(p.m.state.Points), p.m.pinned
	p.countLocked()
	if len(p.m.lost) > 0 {
		p.report.Lost = p.m.missing()
	}
	p.report.Notes = append(p.report.Notes, slices.Sorted(maps.Keys(p.m.notes))...)
}

// prune does first what needs no room in the store, so that a full one gets
// some; then it rewrites.
func (p *pruner) prune(ctx context.Context) error {
	if err := p.start(ctx); err != nil {
		return err
	}
	if err := p.extend(ctx); err != nil {
		return err
	}
	if err := p.quarantine(ctx, p.dead, p.leftover); err != nil {
		return err
	}
	if err := p.sweep(ctx); err != nil {
		return err
	}
	if err := p.rewrite(ctx); err != nil {
		return err
	}
	if err := p.sweep(ctx); err != nil {
		return err
	}
	if (p.report.Waiting > 0 || p.strays) && p.o.Watch > 0 {
		if err := p.end(ctx); err != nil {
			return err
		}
		none := func() [][32]byte { return nil }
		if err := p.quarantine(ctx, none, p.leftover); err != nil {
			return err
		}
		if err := p.sweep(ctx); err != nil {
			return err
		}
	}
	if err := p.tidy(ctx); err != nil {
		return err
	}
	if err := p.merge(ctx); err != nil {
		return err
	}
	return p.checkpoint(ctx)
}

// dry finds what prune would do first; what would be waited for shows in
// leases open now.
func (p *pruner) dry(ctx context.Context) (*PruneReport, error) {
	if err := p.start(ctx); err != nil {
		return nil, err
	}
	s := p.m.state
	left, err := p.leftover(ctx)
	if err != nil {
		return nil, err
	}
	free, wait := p.due()
	dead, sparse := p.dead(), p.sparse()
	for _, packs := range []*[][32]byte{&left, &free, &dead, &sparse} {
		if *packs, err = p.unlocked(ctx, *packs); err != nil {
			return nil, err
		}
	}
	p.count(dead, left)
	for _, name := range sparse {
		k := p.m.packs[name]
		if s.Quarantine[name] != 0 {
			continue
		}
		p.report.Rewritten++
		p.report.CopiedBytes += k.liveBytes
		p.count([][32]byte{name}, nil)
	}
	for _, name := range free {
		p.report.Removed++
		p.report.RemovedBytes += p.size(name)
	}
	if len(p.m.after) == 0 { // then what is quarantined goes at once
		p.report.Removed += p.report.Quarantined
		p.report.RemovedBytes += p.report.QuarantinedBytes
	} else {
		p.report.Waiting = len(wait) + p.report.Quarantined
		p.report.WaitingBytes = p.report.QuarantinedBytes
		for _, name := range wait {
			p.report.WaitingBytes += p.size(name)
		}
		p.waitsFor(s.Head + 1)
	}
	p.report.Merged = len(p.small())
	if s.Head-s.Checkpoint >= p.every() {
		p.report.Checkpoint = s.Head + 1
	}
	p.finish()
	return &p.report, nil
}

func (p *pruner) size(name [32]byte) int64 {
	if k := p.m.packs[name]; k != nil {
		return k.size
	}
	return p.m.there[name]
}

func (p *pruner) count(packs, left [][32]byte) {
	p.report.Leftover += len(left)
	for _, name := range slices.Concat(packs, left) {
		p.report.Quarantined++
		p.report.QuarantinedBytes += p.size(name)
	}
}

// dead lists packs of which nothing is needed.
func (p *pruner) dead() [][32]byte {
	return p.choose(func(k *packMark) bool { return !k.needed() })
}

// sparse lists packs so little of which is needed that it is worth copying,
// and those in quarantine that hold the last good copy of something, which no
// writer by the rules leaves behind.
func (p *pruner) sparse() [][32]byte {
	packs := p.choose(func(k *packMark) bool {
		return !k.stuck && k.needed() && k.liveBytes*100 < k.itemBytes()*rewriteBelow
	})
	for name, k := range p.m.packs {
		if p.m.state.Quarantine[name] != 0 && !k.stuck && k.needed() {
			packs = append(packs, name)
		}
	}
	return packs
}

// choose lists packs that are neither in quarantine nor of a run under way, in
// the order in which they were added.
func (p *pruner) choose(want func(*packMark) bool) (packs [][32]byte) {
	for name, k := range p.m.packs {
		if p.m.state.Quarantine[name] == 0 && !p.m.shielded(k.added) && want(k) {
			packs = append(packs, name)
		}
	}
	slices.SortFunc(packs, func(a, b [32]byte) int {
		ka, kb := p.m.packs[a], p.m.packs[b]
		if ka.added.Entry != kb.added.Entry {
			return int(int64(ka.added.Entry) - int64(kb.added.Entry))
		}
		return bytes.Compare(a[:], b[:])
	})
	return packs
}

// leftover lists packs that no index object lists, and that nobody can
// announce any more. The proof: they were there before the leases were
// listed, none but the own lease was open then, and the chain as read after
// that does not list them. A run's packs come after its lease, and its
// entries before its end.
func (p *pruner) leftover(ctx context.Context) ([][32]byte, error) {
	var left [][32]byte
	var size int64
	for name, n := range p.m.there {
		if p.m.packs[name] != nil || p.m.state.Quarantine[name] != 0 {
			continue
		}
		h, err := p.header(ctx, packName(name), seal.Pack)
		if err != nil {
			return nil, err
		}
		if h {
			left = append(left, name)
			size += n
		}
	}
	slices.SortFunc(left, func(a, b [32]byte) int { return bytes.Compare(a[:], b[:]) })
	switch {
	case len(left) == 0:
		return nil, nil
	case len(p.m.before) > 0:
		p.strays = true
		p.m.notes[fmt.Sprintf("%d packs (%d bytes) are in no index: of runs under way, or left by dead ones; prune looks at them when no run is open", len(left), size)] = true
		return nil, nil
	case len(p.m.lost) > 0:
		p.m.notes[fmt.Sprintf("%d packs are in no index, and stay since chunks are missing: they may be in them", len(left))] = true
		return nil, nil
	}
	return left, nil
}

// header reports whether an object is this repository's, by its header.
func (p *pruner) header(ctx context.Context, name, magic string) (bool, error) {
	b, err := p.r.get(ctx, name, 0, seal.HeaderLen)
	if err == nil {
		var h seal.Header
		if h, err = seal.ParseHeader(b, magic); err == nil && h.Repo == p.r.id {
			return true, nil
		}
	}
	if errors.Is(err, blob.ErrNotExist) {
		return false, nil // it has gone since
	} else if err != nil && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) {
		return false, err
	}
	p.m.notes[name+" is not known to be this repository's; left alone"] = true
	return false, nil
}

// quarantine puts the packs that the functions give into quarantine, with what
// the run has stored added in the same entry. Nothing may have been added to
// the chain between marking and that entry: a point that was would not be
// marked.
func (p *pruner) quarantine(ctx context.Context, dead func() [][32]byte, leftover func(context.Context) ([][32]byte, error)) error {
	for {
		if err := p.m.catchUp(ctx); err != nil {
			return err
		}
		packs := dead()
		var left [][32]byte
		if leftover != nil {
			var err error
			if left, err = leftover(ctx); err != nil {
				return err
			}
		}
		// Behind catchUp: who locks for a commit from now on is seen by unmoved.
		packs, err := p.unlocked(ctx, packs)
		if err != nil {
			return err
		}
		if left, err = p.unlocked(ctx, left); err != nil {
			return err
		}
		all := slices.Concat(packs, left)
		if len(all) == 0 {
			return nil
		}
		if len(all) > quarantineMax {
			p.note("%d packs are more than one prune takes; prune again for the rest", len(all))
			all, left = all[:quarantineMax], nil
			packs = all
		}
		e := chain.Sealed{Packs: make([]string, len(all))}
		for i, name := range all {
			e.Packs[i] = hex.EncodeToString(name[:])
		}
		p.run.announcing.Lock()
		err = p.r.append(ctx, chain.Quarantine, p.run.entry(), e, p.unmoved)
		if err == nil {
			p.run.settle()
		}
		p.run.announcing.Unlock()
		if errors.Is(err, errMoved) {
			continue
		} else if err != nil {
			return fmt.Errorf("quarantine: %w", err)
		}
		p.count(packs, left)
		return p.m.adopt(ctx)
	}
}

// unmoved allows an entry only right behind the state that was looked at.
func (p *pruner) unmoved(s *chain.State) error {
	if err := p.run.mayAnnounce(s); err != nil {
		return err
	}
	if s.Head != p.m.state.Head {
		return errMoved
	}
	return nil
}

// packer gives the run's packer for items of that kind.
func (p *pruner) packer(kind uint16) *packer {
	if kind == pack.Nodes {
		return p.run.nodes
	}
	return p.run.files
}
