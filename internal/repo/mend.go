package repo

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
)

// Damage says what is wrong with the chain and the index objects, as far as it
// showed when they were read. A repository with damage can be read and
// restored from; what is said here is for the operator to see.
func (r *Repo) Damage() []string {
	s := r.current()
	r.mu.RLock()
	defer r.mu.RUnlock()
	return append(s.Damage(), r.lostIndexes...)
}

// readIndexes takes the index objects that the cache x does not have into it. One that
// is lost is made up for from the packs themselves, in the cache alone; the
// next run stores the result in its place.
func (r *Repo) readIndexes(ctx context.Context, s *chain.State, x *index.Index) error {
	lost, drop, err := r.fillIndex(ctx, s, x)
	if err != nil {
		return err
	}
	if len(lost) == 0 && len(s.Damage()) == 0 {
		return nil
	}
	r.mu.RLock()
	done := len(r.lostIndexes) == len(lost) && r.found != nil
	r.mu.RUnlock()
	if done {
		return nil
	}
	if _, err := r.store.Get(ctx, chain.Name(s.Head+1), 0, -1); err == nil {
		return errMoved
	}
	if _, err := r.makeUp(ctx, s, drop, x); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lostIndexes = lost
	return nil
}

const (
	// indexReaders is how many index objects are read at once, indexBytes how
	// many of their bytes: in memory each takes some five times its size.
	indexReaders = 32
	indexBytes   = 20 << 20
)

// fillIndex takes the index objects that x does not have into it, all in one
// step, and tells which are lost, and why.
func (r *Repo) fillIndex(ctx context.Context, s *chain.State, x *index.Index) (why []string, lost map[[32]byte]bool, err error) {
	lost = map[[32]byte]bool{}
	var missing [][32]byte
	for d := range s.Indexes {
		if !x.Has(d) {
			missing = append(missing, d)
		}
	}
	if len(missing) == 0 {
		return nil, lost, nil
	}
	b := x.NewBatch()
	err = r.readMany(ctx, missing, func(d [32]byte, packs []index.Pack, err error) error {
		if errors.Is(err, ErrDamaged) {
			why, lost[d] = append(why, err.Error()), true
			return nil
		} else if err != nil {
			return err
		}
		return b.Add(d, packs)
	})
	if err == nil {
		err = b.Finish()
	}
	if err != nil {
		return nil, nil, errors.Join(err, b.Abort())
	}
	return why, lost, nil
}

// readMany reads index objects, many at once and in no order, and calls f for
// one after the other.
func (r *Repo) readMany(ctx context.Context, list [][32]byte, f func(d [32]byte, packs []index.Pack, err error) error) error {
	sizes := map[string]int64{}
	if len(list) > 2 {
		for i, err := range r.store.List(ctx, "index/") {
			if err != nil {
				return err
			}
			sizes[i.Name] = i.Size
		}
	}
	turn := make(chan struct{}, 1) // to call f
	room := semaphore.NewWeighted(indexBytes)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(indexReaders)
	for _, d := range list {
		n := min(indexBytes, max(1, sizes[index.Name(d)]))
		if room.Acquire(gctx, n) != nil {
			break // said below
		}
		g.Go(func() error {
			defer room.Release(n)
			packs, err := r.readIndex(gctx, d)
			turn <- struct{}{}
			defer func() { <-turn }()
			return f(d, packs, err)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return ctx.Err()
}

// makeUp takes into the cache what the packs that no sound index object lists
// hold, and keeps it for mend.
func (r *Repo) makeUp(ctx context.Context, s *chain.State, lost map[[32]byte]bool, x *index.Index) ([]index.Pack, error) {
	found, err := r.scan(ctx, s, lost)
	if err != nil {
		return nil, err
	}
	if err := x.Add([32]byte{}, found); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.found, r.drop = found, lost
	return found, nil
}

// scan reads the directories of all packs that no index object lists.
func (r *Repo) scan(ctx context.Context, s *chain.State, lost map[[32]byte]bool) ([]index.Pack, error) {
	listed := map[string]bool{}
	for d := range s.Indexes {
		if lost[d] {
			continue
		}
		packs, err := r.readIndex(ctx, d)
		if errors.Is(err, ErrDamaged) {
			continue // the cache has what it said
		} else if err != nil {
			return nil, err
		}
		for _, k := range packs {
			listed[packName(k.Name)] = true
		}
	}
	found := []index.Pack{}
	for i, err := range r.store.List(ctx, "packs/") {
		if err != nil {
			return nil, err
		}
		if name, err := packDigest(i.Name); listed[i.Name] || err != nil || s.Quarantine[name] != 0 {
			continue
		}
		k, err := r.readDirectory(ctx, i)
		if errors.Is(err, ErrDamaged) || errors.Is(err, blob.ErrNotExist) {
			continue // an unreadable pack that nothing lists holds nothing that is known
		} else if err != nil {
			return nil, err
		}
		found = append(found, k)
	}
	return found, nil
}

// readDirectory lists a pack's items from the pack alone.
func (r *Repo) readDirectory(ctx context.Context, i blob.Info) (k index.Pack, err error) {
	if k.Name, err = packDigest(i.Name); err != nil {
		return k, err
	}
	p, err := r.store.Get(ctx, i.Name, 0, -1)
	if err != nil {
		return k, err
	}
	h, master, err := r.packHeader(ctx, p)
	if err != nil {
		return k, fmt.Errorf("%s: %w", i.Name, err)
	}
	entries, err := pack.Directory(p, h, master)
	if err != nil {
		return k, fmt.Errorf("%s: %w", i.Name, err)
	}
	k.Size, k.Kind = int64(len(p)), h.Kind
	for _, e := range entries {
		k.Items = append(k.Items, index.Item{ID: e.ID, Stored: e.Stored})
	}
	return k, nil
}

// mend stores what scan found in the place of lost index objects, before a run
// builds on it.
func (r *Repo) mend(ctx context.Context) error {
	r.mu.RLock()
	found, drop := r.found, r.drop
	r.mu.RUnlock()
	if len(drop) == 0 {
		return nil
	}
	var c chain.Clear
	for d := range drop {
		c.Drops = append(c.Drops, seal.Hex(d[:]))
	}
	for len(found) > 0 {
		n := indexful(found)
		d, err := r.putIndex(ctx, found[:n])
		if err != nil {
			return fmt.Errorf("mend the index: %w", err)
		}
		c.Adds = append(c.Adds, d[:])
		found = found[n:]
	}
	if err := r.append(ctx, chain.Add, c, chain.Sealed{}, func(*chain.State) error { return nil }); err != nil {
		return fmt.Errorf("mend the index: %w", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lostIndexes, r.found, r.drop = nil, nil, nil
	return nil
}
