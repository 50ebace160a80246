package repo

import (
	"context"
	"errors"
	"fmt"

	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/tree"
)

// ErrPruned: what a run had built on was removed while it went on.
var ErrPruned = errors.New("a prune took away what this run had found present")

// errMoved: the chain has news that change what is being thought.
var errMoved = errors.New("the chain has moved on")

// errUnverified: a quarantine came between; look at every item again.
var errUnverified = errors.New("not verified since copies were taken away")

// mayCommit refuses once the lease is over, and as long as it is not certain
// that every item of the point has a copy outside the quarantine, and that all
// is locked that the rule wants to be.
func (run *Run) mayCommit(s *chain.State) error {
	if err := run.rests(s); err != nil {
		return err
	}
	return run.isLocked(s)
}

// rests refuses as long as it is not certain that every item of the point has a
// copy outside the quarantine. Certain is:
// no pack that the run used is in quarantine, and the maps that it built on
// are those of living points, which no prune touches. Else the point's maps
// have to be walked.
func (run *Run) rests(s *chain.State) error {
	if err := run.mayAnnounce(s); err != nil {
		return err
	}
	run.mu.Lock()
	defer run.mu.Unlock()
	if s.Mended > max(run.verified, run.began) {
		return errUnverified // what was found present may have been lost with an index object
	}
	if s.Quarantined <= run.verified {
		return nil
	}
	for name := range run.uses {
		if s.Quarantine[name] > run.verified {
			return errUnverified
		}
	}
	for _, root := range run.bases {
		if !s.HasRoot(root) {
			return errUnverified
		}
	}
	return nil
}

// appendPoint creates the commit entry.
func (run *Run) appendPoint(ctx context.Context, p *Point, allowed func(*chain.State) error) error {
	for {
		err := run.r.append(ctx, chain.Commit, run.entry(), chain.Sealed{Point: p}, allowed)
		switch {
		case errors.Is(err, errUnverified):
			err = run.verify(ctx, p)
		case errors.Is(err, errUnlocked):
			err = run.lock(ctx, p, nil)
		default:
			return err
		}
		if err != nil {
			return err
		}
	}
}

// verify proves that every item of the point is present.
func (run *Run) verify(ctx context.Context, p *Point) error {
	s := run.r.current()
	seen := map[tree.ID]bool{}
	for _, m := range mapsOf(p) {
		root, err := tree.ParseRoot(string(m.root), m.size)
		if err != nil {
			return err
		}
		err = tree.Walk(ctx, run.fetchNode, root, func(id tree.ID) bool {
			was := seen[id]
			seen[id] = true
			return !was
		}, func(n *tree.Node, _ int64) error {
			for _, id := range n.Children {
				if err := run.holds(s, id); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("%s: %w", m.what, err)
		}
	}
	for id := range seen {
		if err := run.holds(s, id); err != nil {
			return err
		}
	}
	run.mu.Lock()
	defer run.mu.Unlock()
	for _, k := range run.unannounced() {
		if s.Quarantine[k] != 0 {
			return ErrPruned // a pruner took this run for dead
		}
	}
	run.verified = max(s.Quarantined, s.Mended)
	run.locked = lockedAt{} // it may rest on other packs now
	return nil
}

// holds wants an item to be present, or on its way with this run's entry. The
// point rests on the pack where it was found from then on.
func (run *Run) holds(s *chain.State, id pack.ID) error {
	if id == (pack.ID{}) {
		return nil
	}
	run.mu.Lock()
	fresh := run.fresh[id]
	run.mu.Unlock()
	if fresh {
		return nil
	}
	places, err := run.r.places(id)
	if err != nil {
		return err
	}
	for _, p := range places {
		if s.Quarantine[p.Pack] == 0 {
			run.mu.Lock()
			run.uses[p.Pack] = true
			run.mu.Unlock()
			return nil
		}
	}
	return fmt.Errorf("%w: %x; run it again", ErrPruned, id[:8])
}

// unannounced gives the packs that only this run's entry will list.
// The caller holds mu and announcing.
func (run *Run) unannounced() (names [][32]byte) {
	for _, k := range run.packs {
		names = append(names, k.Name)
	}
	for _, s := range run.shelf {
		for _, k := range s.packs {
			names = append(names, k.Name)
		}
	}
	return names
}

// diskMap is the map of a disk or file of a point.
type diskMap struct {
	what string
	root Root
	size int64
}

// maps gives the maps of all disks and files.
func mapsOf(p *Point) []diskMap {
	var all []diskMap
	for _, d := range p.Disks {
		all = append(all, diskMap{"disk " + d.ID, d.Root, d.Size})
	}
	for _, f := range p.Files {
		all = append(all, diskMap{f.Name, f.Root, f.Size})
	}
	return all
}
