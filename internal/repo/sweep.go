package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/lease"
	"holdfast/internal/repo/internal/seal"
)

// deleting is how many objects are deleted at once.
const deleting = 8

// due divides the packs in quarantine that are still there into those that can
// go and those that wait for a run that began before they were put there.
// Leases were listed after the chain was read, so after every quarantine in it.
func (p *pruner) due() (free, wait [][32]byte) {
	h := lease.Horizon(p.m.after)
	for name, entry := range p.m.state.Quarantine {
		k := p.m.packs[name]
		_, listed := p.m.there[name]
		switch {
		case k == nil && !listed:
		case k != nil && k.needed(): // by no rule, but then it is not touched
		case entry <= h:
			free = append(free, name)
		default:
			wait = append(wait, name)
		}
	}
	slices.SortFunc(free, func(a, b [32]byte) int { return bytes.Compare(a[:], b[:]) })
	return free, wait
}

// sweep removes what can go: the index objects are replaced by an entry, then
// the packs deleted, then the index objects.
func (p *pruner) sweep(ctx context.Context) error {
	for {
		if err := p.m.catchUp(ctx); err != nil {
			return err
		}
		free, wait := p.due()
		free, err := p.unlocked(ctx, free)
		if err != nil {
			return err
		}
		p.report.Waiting, p.report.WaitingBytes, p.report.WaitsFor = len(wait), 0, []Lease{}
		for _, name := range wait {
			p.report.WaitingBytes += p.size(name)
		}
		if len(wait) > 0 {
			p.waitsFor(p.m.state.Quarantined)
		}
		if len(free) == 0 {
			return nil
		}
		sizes := make([]int64, len(free))
		for i, name := range free {
			sizes[i] = p.size(name)
		}
		tiers, err := p.heirs(ctx, free)
		if err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
		old, err := p.supersede(ctx, free)
		if errors.Is(err, errMoved) {
			continue
		} else if err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
		if err := p.mirrors(ctx, tiers); err != nil {
			return err
		}
		return p.remove(ctx, free, sizes, old)
	}
}

// waitsFor lists the leases that began before an entry.
func (p *pruner) waitsFor(entry uint64) {
	for _, l := range p.m.after {
		if l.Chain < entry {
			p.report.WaitsFor = append(p.report.WaitsFor, l)
		}
	}
	slices.SortFunc(p.report.WaitsFor, func(a, b Lease) int { return strings.Compare(a.Session, b.Session) })
}

// supersede replaces the index objects that list the packs by ones that do
// not, and gives the old ones.
func (p *pruner) supersede(ctx context.Context, packs [][32]byte) (old [][32]byte, err error) {
	gone, affected := map[[32]byte]bool{}, map[[32]byte]bool{}
	for _, name := range packs {
		gone[name] = true
		if k := p.m.packs[name]; k != nil {
			for _, d := range k.indexes {
				affected[d] = true
			}
		}
	}
	if len(affected) == 0 {
		return nil, nil // what an earlier sweep did not come to delete
	}
	old = slices.SortedFunc(maps.Keys(affected), func(a, b [32]byte) int { return bytes.Compare(a[:], b[:]) })
	return old, p.replace(ctx, old, gone, p.unmoved)
}

// replace puts others in the place of index objects, by a sweep entry: what they
// list but the packs that are gone, to which it adds what it has seen.
func (p *pruner) replace(ctx context.Context, old [][32]byte, gone map[[32]byte]bool, allowed func(*chain.State) error) error {
	var c chain.Clear // without the lease: the packs are not this run's
	for _, d := range old {
		c.Drops = append(c.Drops, seal.Hex(bytes.Clone(d[:])))
	}
	var keep []index.Pack
	items := 0
	flush := func(least int) error { // as long as so many items are there
		for len(keep) > 0 && (items >= least || len(keep) >= indexPacks) {
			n := indexful(keep)
			d, err := p.r.putIndex(ctx, keep[:n], c.Drops...)
			if err != nil {
				return err
			}
			c.Adds = append(c.Adds, bytes.Clone(d[:]))
			for _, k := range keep[:n] {
				items -= len(k.Items)
			}
			keep = keep[n:]
		}
		return nil
	}
	err := p.r.readMany(ctx, old, func(d [32]byte, list []index.Pack, err error) error {
		if err := p.m.gone(ctx, p.m.state, err); err != nil {
			return err
		}
		for _, k := range list {
			if gone[k.Name] {
				continue
			}
			gone[k.Name] = true // once is enough
			keep = append(keep, k)
			items += len(k.Items)
		}
		return flush(indexItems)
	})
	if err == nil {
		err = flush(0)
	}
	if err == nil {
		err = p.lockIndexes(ctx, c.Adds, old)
	}
	if err == nil {
		err = p.r.append(ctx, chain.Sweep, c, chain.Sealed{}, allowed)
	}
	if err != nil {
		return err
	}
	return p.m.adopt(ctx)
}

// remove deletes packs, then index objects. What it does not come to, a later
// prune finds in quarantine and deletes.
func (p *pruner) remove(ctx context.Context, packs [][32]byte, sizes []int64, indexes [][32]byte) error {
	var mu sync.Mutex
	var failed []error
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(deleting)
	for i, name := range packs {
		g.Go(func() error {
			err := p.r.store.Delete(gctx, packName(name))
			mu.Lock()
			defer mu.Unlock()
			if err == nil || errors.Is(err, blob.ErrNotExist) {
				delete(p.m.there, name)
				p.report.Removed++
				p.report.RemovedBytes += sizes[i]
				p.o.Report("remove", int64(p.report.Removed), int64(len(packs)))
				return nil
			}
			if errors.Is(err, blob.ErrLocked) {
				p.isLocked(name, time.Time{})
				return nil
			}
			failed = append(failed, err)
			return gctx.Err()
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	g = new(errgroup.Group)
	g.SetLimit(deleting)
	for _, d := range indexes {
		g.Go(func() error {
			if err := p.r.forget(ctx, index.Name(d)); err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = append(failed, err)
			}
			return ctx.Err()
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if len(failed) > 0 {
		return fmt.Errorf("%d objects could not be deleted, and nothing needs them; prune again: %w", len(failed), failed[0])
	}
	return nil
}

// end watches the leases that something waits for, and revokes the dead ones.
func (p *pruner) end(ctx context.Context) error {
	watched := map[string]Lease{}
	for _, l := range p.report.WaitsFor {
		watched[l.Session] = l
	}
	if p.strays {
		maps.Copy(watched, p.m.before)
	}
	p.o.Report("watch", 0, int64(len(watched)))
	dead, err := p.r.watch(ctx, watched, p.o.Watch)
	if err != nil {
		return err
	}
	for _, session := range dead {
		if err := p.r.revoke(ctx, session); err != nil {
			return err
		}
		p.report.Revoked = append(p.report.Revoked, session)
	}
	return nil
}

// tidy deletes small things that are over: what is left of leases that were
// committed or revoked, and, when no run is open, index objects that no entry
// lists: replaced by a sweep, or never added by a run that died.
func (p *pruner) tidy(ctx context.Context) error {
	names, err := p.r.leases.There(ctx)
	if err != nil {
		return err
	}
	for _, name := range names {
		session, _, _ := lease.Split(name)
		if p.m.state.Over[session] == 0 {
			continue
		}
		if err := p.r.store.Delete(ctx, name); err != nil && !errors.Is(err, blob.ErrNotExist) {
			return err
		}
	}
	if err := p.m.catchUp(ctx); err != nil {
		return err
	}
	if len(p.m.before) > 0 {
		return nil
	}
	for _, name := range p.indexes {
		d, err := seal.ParseDigest(strings.TrimPrefix(name, "index/"))
		if err != nil || p.m.state.Indexes[d] || p.r.locks.get(name).Until.After(p.r.now()) {
			continue
		}
		ours, err := p.header(ctx, name, seal.Index)
		if err != nil {
			return err
		}
		if !ours {
			continue
		}
		if err := p.r.forget(ctx, name); err != nil {
			return err
		}
	}
	return nil
}
