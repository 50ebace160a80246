package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

// unlocked leaves out packs whose lock holds: nothing can be had for them yet,
// and points may rest on them that are protected (docs/format.md §6.3). By this
// machine's clock some may be left alone too long; the store decides on what is
// deleted.
func (p *pruner) unlocked(ctx context.Context, packs [][32]byte) ([][32]byte, error) {
	locker, ok := blob.As[blob.Locker](p.r.store)
	if !ok || p.r.current().locks.Mode == "" || len(packs) == 0 {
		return packs, nil
	}
	ends := make([]time.Time, len(packs))
	now := p.r.now()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(locking)
	for i, pack := range packs {
		name := packName(pack)
		if ends[i] = p.r.locks.get(name).Until; ends[i].After(now) {
			continue
		}
		g.Go(func() error {
			l, err := locker.Locked(gctx, name)
			if errors.Is(err, blob.ErrNotExist) {
				return nil
			} else if err != nil {
				return fmt.Errorf("is %s locked: %w", name, err)
			}
			p.r.locks.set(name, l)
			ends[i] = l.Until
			return nil
		})
	}
	if err := errors.Join(g.Wait(), p.r.locks.save(p.r.now())); err != nil {
		return nil, err
	}
	free := slices.Clone(packs)[:0]
	for i, pack := range packs {
		if ends[i].After(now) {
			p.isLocked(pack, ends[i])
		} else {
			free = append(free, pack)
		}
	}
	return free, nil
}

// isLocked notes a pack that waits for its lock's end, zero when that is not
// known. The caller sees to it that nobody else does so at the same time.
func (p *pruner) isLocked(pack [32]byte, until time.Time) {
	if p.locked == nil {
		p.locked = map[[32]byte]time.Time{}
	}
	p.locked[pack] = later(p.locked[pack], until)
}

func (p *pruner) countLocked() {
	p.report.Locked, p.report.LockedBytes = len(p.locked), 0
	var last time.Time
	for pack, until := range p.locked {
		p.report.LockedBytes += p.size(pack)
		last = later(last, until)
	}
	if !last.IsZero() {
		p.report.LockedUntil = &last
	}
}

// extend locks what points need that are marked to stay. That it cannot be done
// keeps nobody from pruning: it goes into the report.
func (p *pruner) extend(ctx context.Context) error {
	s, now := p.m.state, p.r.now()
	err := p.r.protect(ctx, s, func(point *Point) time.Time { return keptUntil(s, point.ID, now) }, nil)
	if err != nil && ctx.Err() == nil {
		p.note("restore points that are marked to stay are not locked: %v", err)
		err = nil
	}
	return err
}

// lockKept locks what points need that were just marked to stay.
func (r *Repo) lockKept(ctx context.Context, ids []PointID) error {
	s, now := r.current(), r.now()
	return r.protect(ctx, s, func(p *Point) (t time.Time) {
		if slices.Contains(ids, p.ID) {
			t = keptUntil(s, p.ID, now)
		}
		return t
	}, nil)
}

// lockOwn locks what the prune has stored and not announced: some of it may take
// the place of what is locked.
func (p *pruner) lockOwn(ctx context.Context) error {
	s := p.r.current()
	if s.locks.Days == 0 {
		return nil
	}
	p.run.announcing.Lock()
	defer p.run.announcing.Unlock()
	var names []string
	p.run.mu.Lock()
	for _, pack := range p.run.unannounced() {
		names = append(names, packName(pack))
	}
	p.run.mu.Unlock()
	for _, i := range p.run.shelf {
		names = append(names, indexName(i.digest))
	}
	return p.r.lock(ctx, names, s.locks.want(p.r.now()))
}

// lockIndexes locks index objects that are about to replace old ones, as the rule
// wants it, and as long as any of these is: points that are marked to stay may
// need that.
func (p *pruner) lockIndexes(ctx context.Context, digests []seal.Hex, old [][32]byte) error {
	s := p.r.current()
	if s.locks.Days == 0 {
		return nil
	}
	want := s.locks.want(p.r.now())
	for _, d := range old {
		want.Until = later(want.Until, p.r.locks.get(indexName(d)).Until.Add(-time.Second))
	}
	var names []string
	for _, d := range digests {
		names = append(names, indexName([32]byte(d)))
	}
	return p.r.lock(ctx, names, want)
}
