package repo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/tree"
)

// errUnlocked: there is something that the point needs and that is not locked.
var errUnlocked = errors.New("not all is locked")

// lockedAt says for what state of the chain a run has locked all that its point
// needs.
type lockedAt struct {
	head       uint64 // 0: for none
	rule       Immutability
	distrusted uint64
	roots      map[Root]blob.Lock // the point's maps, and how all of them is locked
	warning    error              // why the commit entry is not locked
}

// Lock locks all that the point needs, which has all its disks and files, as
// the repository's rule wants it; without one it does nothing. Commit does so
// too, but then there is little left to do. report is told how many of the
// objects to be locked are, in parallel; nil is nobody.
func (run *Run) Lock(ctx context.Context, p *Point, report func(done, total int64)) error {
	if err := run.Flush(ctx); err != nil {
		return err
	}
	run.announcing.Lock()
	defer run.announcing.Unlock()
	return run.lock(ctx, p, report)
}

// isLocked refuses unless all was locked that a point needs which follows s.
func (run *Run) isLocked(s *chain.State) error {
	if s.Locks.Days > 0 && (run.locked.head != s.Head || run.locked.rule != s.Locks.Immutability) {
		return errUnlocked
	}
	return nil
}

// canLock refuses a store that cannot do what the rule wants, before a run has
// stored anything.
func (r *Repo) canLock() error {
	if _, ok := blob.As[blob.Locker](r.store); !ok && r.current().Locks.Days > 0 {
		return fmt.Errorf("restore points are to be immutable: %w: it has no means to", blob.ErrNoLock)
	}
	return nil
}

// lock locks what the point needs as things are now. The caller holds announcing.
func (run *Run) lock(ctx context.Context, p *Point, report func(done, total int64)) error {
	for {
		s := run.r.current()
		if s.Locks.Days == 0 {
			return nil
		}
		err := run.lockFor(ctx, s, p, report)
		if !errors.Is(err, blob.ErrNotExist) {
			return err
		}
		// An index object may have been replaced, or a key, since s was read.
		if err := run.r.refresh(ctx); err != nil {
			return err
		}
		if run.r.current().Head == s.Head {
			return fmt.Errorf("%w: what the restore point rests on is missing: %w; run check, then back up again", ErrDamaged, err)
		}
	}
}

func (run *Run) lockFor(ctx context.Context, s *chain.State, p *Point, report func(done, total int64)) error {
	r := run.r
	want := wantedLock(s.Locks.Immutability, r.now())
	names, err := r.common(ctx, s)
	if err != nil {
		return err
	}
	n := newNeeds(run.fetchNode, run.presentIn)
	if run.locked.distrusted != s.Locks.Distrusted {
		run.locked.roots = nil
	}
	least, err := run.walk(ctx, n, s, p, want)
	if err != nil {
		return err
	}
	own := map[string]bool{}
	run.mu.Lock()
	for _, name := range run.unannounced() {
		own[packName(name)] = true
	}
	run.mu.Unlock()
	packs := slices.Collect(maps.Keys(own))
	extends := false
	for _, name := range n.take() {
		packs = append(packs, packName(name))
		extends = extends || !r.locks.holds(packName(name), want)
	}
	for _, i := range run.shelf {
		names = append(names, index.Name(i.digest))
	}
	if extends {
		// The version that is shown gets the lock: it must be the right one.
		back, err := Undelete(ctx, r.store)
		if err != nil {
			return fmt.Errorf("look for what somebody has deleted: %w", err)
		}
		for _, u := range back {
			r.locks.set(u.Object, blob.Lock{})
		}
	}
	if err := r.lockAll(ctx, slices.Concat(names, packs), want, report); err != nil {
		return err
	}
	for _, name := range packs {
		if l := r.locks.get(name); l.Until.Before(least.Until) {
			least.Until = l.Until
		}
	}
	run.locked = lockedAt{head: s.Head, rule: s.Locks.Immutability, distrusted: s.Locks.Distrusted}
	if !n.lost {
		run.locked.roots = map[Root]blob.Lock{}
		for _, m := range mapsOf(p) {
			run.locked.roots[m.root] = least
		}
	}
	return nil
}

// walk finds the packs on which the point rests. Of a map of which all is
// locked it walks nothing, of one that began as a copy of such only what
// differs. It gives the least lock of what it did not walk.
func (run *Run) walk(ctx context.Context, n *needs, s *chain.State, p *Point, want blob.Lock) (least blob.Lock, err error) {
	least = blob.Lock{Until: lockEnd(want.Until), Mode: want.Mode}
	holds := func(root Root) bool {
		l, ok := run.locked.roots[root]
		if !ok {
			l = run.r.locks.get(rootKey(s, root))
		}
		if l.Holds(want) && l.Until.Before(least.Until) {
			least.Until = l.Until
		}
		return l.Holds(want)
	}
	for _, m := range mapsOf(p) {
		if holds(m.root) {
			continue
		}
		root, err := tree.ParseRoot(string(m.root), m.size)
		if err != nil {
			return least, err
		}
		var base tree.Root
		run.mu.Lock()
		from := run.basis[m.root]
		run.mu.Unlock()
		if run.verified == 0 && from.ID != (tree.ID{}) && holds(Root(from.String())) {
			base = from
		}
		if err := n.walk(ctx, base, root); err != nil {
			return least, fmt.Errorf("%s: %w", m.what, err)
		}
	}
	return least, nil
}

// presentIn gives the pack of an item, or none for one that is on its way in a
// pack of the run's own.
func (run *Run) presentIn(id pack.ID) (name [32]byte, there bool, err error) {
	run.mu.Lock()
	fresh := run.fresh[id]
	run.mu.Unlock()
	if fresh {
		return name, true, nil
	}
	return run.r.presentIn(id)
}

// settleLocks remembers the maps that were committed. The commit entry is not
// locked when its writer could not: that costs the point nothing, but is told.
func (run *Run) settleLocks() {
	r := run.r
	s := r.current()
	if run.locked.head == 0 || s.Locks.Days == 0 {
		return
	}
	want := wantedLock(s.Locks.Immutability, r.now())
	for root, l := range run.locked.roots {
		r.locks.set(rootKey(s, root), l)
	}
	_ = r.locks.save(r.now()) // it is there to save work
	if name := chain.Name(run.locked.head + 1); !r.locks.holds(name, want) {
		run.locked.warning = fmt.Errorf("the restore point is there, but %s is not locked yet: the next backup or check does it", name)
	}
}
