package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/lease"
	"holdfast/internal/repo/internal/seal"
)

// checkpointEvery is how many entries make a prune write a checkpoint. An empty
// machine reads two to three times as many, readAhead at once.
const checkpointEvery = 1024

// checkpoint writes the state into the chain when much has come since the last
// time, and deletes the entries that need not be read any more.
func (p *pruner) checkpoint(ctx context.Context) error {
	written := false
	for {
		if err := p.m.catchUp(ctx); err != nil {
			return err
		}
		if p.m.state.Head-p.m.state.Checkpoint < p.every() {
			break
		}
		err := p.writeCheckpoint(ctx)
		if errors.Is(err, errMoved) {
			continue
		} else if errors.Is(err, seal.ErrTooLarge) {
			p.note("the state of this repository is too large for a checkpoint: opening it on a new machine reads its whole chain")
			break
		} else if err != nil {
			return fmt.Errorf("checkpoint: %w", err)
		}
		written = true
		p.report.Checkpoint = p.r.current().Checkpoint
		break
	}
	if err := p.dropEntries(ctx, written); err != nil {
		return fmt.Errorf("checkpoint: %w", err)
	}
	return nil
}

func (p *pruner) every() uint64 {
	if p.o.checkpointEvery > 0 {
		return p.o.checkpointEvery
	}
	return checkpointEvery
}

// writeCheckpoint fails with errMoved when the chain has gone on.
func (p *pruner) writeCheckpoint(ctx context.Context) error {
	p.o.Report("checkpoint", 0, 0)
	a, err := p.abridged(ctx)
	if err != nil {
		return err
	}
	clear, content, err := a.Encode()
	if err != nil {
		return err
	}
	return p.r.appendContent(ctx, chain.Checkpoint, clear, content, nil, p.unmoved)
}

// abridged is the state that was marked, without what can matter to nobody any
// more.
func (p *pruner) abridged(ctx context.Context) (*chain.State, error) {
	names, err := p.r.leases.There(ctx)
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	left := map[string]bool{}
	for _, name := range names {
		session, _, _ := lease.Split(name)
		left[session] = true
	}
	return p.m.state.Abridged(chain.Needless{
		Lease: func(session string) bool { return !left[session] },
		Pack: func(name [32]byte) bool {
			_, listed := p.m.there[name]
			return !listed && p.m.packs[name] == nil
		},
		Horizon: lease.Horizon(p.m.after),
		Point:   func(id PointID) bool { return p.m.pins[id] == "" },
	}), nil
}

// dropEntries deletes the entries before the chain's start, when the rest, as
// it is in the store, gives the state that is known. A checkpoint that was just
// written is proved in any case.
func (p *pruner) dropEntries(ctx context.Context, written bool) error {
	for {
		s := p.r.current()
		numbers, err := chain.Numbers(ctx, p.r.store)
		if err != nil {
			return err
		}
		from, _ := slices.BinarySearch(numbers, s.Older)
		if from == 0 && !written {
			return nil
		}
		err = p.r.proveChain(ctx, s, numbers)
		if errors.Is(err, errMoved) {
			continue
		} else if err != nil {
			return err
		}
		return p.deleteEntries(ctx, numbers[:from])
	}
}

// proveChain reads the entries from the chain's start on from the store, and
// compares the state that they give with s. It fails with errMoved when
// another prune has made the chain begin elsewhere since.
func (r *Repo) proveChain(ctx context.Context, s *chain.State, numbers []uint64) error {
	err := r.chain.Prove(ctx, s, numbers)
	if err == nil {
		return nil
	}
	if err := r.refresh(ctx); err != nil {
		return err
	}
	if r.current().Checkpoint != s.Checkpoint {
		return errMoved
	}
	return fmt.Errorf("%w; no entry was deleted; run check", err)
}

// deleteEntries deletes entries in ascending order, one after the other: who
// creates an entry relies on it. What it does not come to is left for a later
// prune.
func (p *pruner) deleteEntries(ctx context.Context, numbers []uint64) error {
	for i, n := range numbers {
		err := p.r.store.Delete(ctx, chain.Name(n))
		switch {
		case errors.Is(err, blob.ErrLocked):
			return nil
		case err != nil && !errors.Is(err, blob.ErrNotExist):
			return err
		}
		p.report.RemovedEntries++
		p.o.Report("entries", int64(i+1), int64(len(numbers)))
	}
	return nil
}
