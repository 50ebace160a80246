package repo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"

	"holdfast/internal/disk"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
	"holdfast/internal/repo/internal/tree"
)

// ErrPointExists: the repository has that restore point already.
var ErrPointExists = errors.New("the repository has that restore point already")

const (
	// provingPacks is how many packs are read back at once. They have places of
	// their own, so that reading back does not keep the next packs waiting: a
	// link carries both directions at once.
	provingPacks = 2
	// proofRead bounds one request of reading back, bytes.
	proofRead = 4 << 20
)

// Changed yields the extents in which d differs from base, as whole chunks,
// with Zero where d has zeros. Both are disks of one repository; they may
// differ in size. Only the maps are read, and of them only what differs.
func (d *DiskReader) Changed(ctx context.Context, base *DiskReader) disk.Extents {
	return disk.Merge(func(yield func(disk.Extent, error) bool) {
		if base.r != d.r {
			yield(disk.Extent{}, errors.New("disks of two repositories cannot be compared by their maps"))
			return
		}
		_, end := chunkRange(0, d.size)
		stopped := false
		err := tree.Diff(ctx, d.r.node, base.root, d.root, end, func(from, to int64, zero bool) bool {
			off := from * ChunkSize
			stopped = !yield(disk.Extent{Off: off, Len: min(to*ChunkSize, d.size) - off, Zero: zero}, nil)
			return !stopped
		})
		if err != nil && !stopped {
			yield(disk.Extent{}, err)
		}
	})
}

// ReadBack says how much of what a run stores is read back from the store.
type ReadBack string

const (
	// ReadNothing back: the store is believed. A backup does.
	ReadNothing ReadBack = ""
	// ReadAll that was stored: each pack must have the digest that it was given.
	ReadAll ReadBack = "all"
	// ReadSample of each pack: its end, and a sixteenth somewhere within, which
	// must open.
	ReadSample ReadBack = "sample"
)

// ReadBack makes the run read each pack back from the store before it counts as
// stored: so all that the run ever announces was. It is to be called before
// anything is written.
func (run *Run) ReadBack(how ReadBack) {
	run.readBack, run.proving = how, make(chan struct{}, provingPacks)
}

// prove reads a pack back, and twice before it calls it bad.
func (run *Run) prove(p index.Pack) error {
	if run.readBack == ReadNothing {
		return nil
	}
	select {
	case run.proving <- struct{}{}:
	case <-run.ctx.Done():
		return context.Cause(run.ctx)
	}
	defer func() { <-run.proving }()
	var err error
	for range 2 {
		if run.readBack == ReadSample {
			err = run.r.provePart(run.ctx, p)
		} else {
			err = run.r.proveAll(run.ctx, p)
		}
		if err == nil {
			return nil
		} else if !errors.Is(err, ErrDamaged) {
			return fmt.Errorf("read back what was stored: %w", err)
		}
	}
	return fmt.Errorf("the store does not give back what was stored there; it was read twice, and nothing of it counts: %w", err)
}

// proveAll compares a pack's digest with its name.
func (r *Repo) proveAll(ctx context.Context, k index.Pack) error {
	h := sha256.New()
	for off := int64(0); off < k.Size; off += proofRead {
		p, err := r.get(ctx, packName(k.Name), off, min(proofRead, k.Size-off))
		if err != nil {
			return err
		}
		h.Write(p)
	}
	if [32]byte(h.Sum(nil)) != k.Name {
		return fmt.Errorf("%s: %w: its bytes are not what its name says", packName(k.Name), ErrDamaged)
	}
	return nil
}

// provePart opens a random sixteenth of a pack's items, and its last one, behind
// which the pack must go on to its full length.
func (r *Repo) provePart(ctx context.Context, k index.Pack) error {
	offs := make([]int64, len(k.Items)+1)
	offs[0] = seal.HeaderLen
	for i, it := range k.Items {
		offs[i+1] = offs[i] + int64(it.Stored)
	}
	n := (len(k.Items) + 15) / 16
	first, last := rand.IntN(len(k.Items)-n+1), len(k.Items)-1
	if err := r.proveItems(ctx, k, offs, first, first+n, offs[first+n]); err != nil {
		return err
	}
	return r.proveItems(ctx, k, offs, last, last+1, k.Size)
}

// proveItems reads from item i on up to the offset end, and opens items up to j.
func (r *Repo) proveItems(ctx context.Context, k index.Pack, offs []int64, i, j int, end int64) error {
	o, err := r.opener(ctx, k.Name)
	if err != nil {
		return err
	}
	p, err := r.get(ctx, packName(k.Name), offs[i], end-offs[i])
	if err != nil {
		return err
	}
	for n := i; n < j; n++ {
		if _, err := o.Open(nil, p[offs[n]-offs[i]:offs[n+1]-offs[i]], n, k.Items[n].ID, pack.MaxContent); err != nil {
			return fmt.Errorf("%s: %w", packName(k.Name), err)
		}
	}
	return nil
}

// CommitCopy is Commit for a point that comes from another repository: it
// keeps its id. ErrPointExists when the repository has it, which another copy
// may have committed at the last moment: exactly one does.
func (run *Run) CommitCopy(ctx context.Context, p *Point) error {
	if b, err := hex.DecodeString(string(p.ID)); err != nil || len(b) != 16 {
		return fmt.Errorf("copy restore point %.80q: not an id", p.ID)
	}
	return run.commit(ctx, p, func(s *chain.State) error {
		if _, there := s.Points[p.ID]; there {
			return ErrPointExists
		}
		return run.mayCommit(s)
	})
}

// Forgotten gives the ids of the points that the repository once had and has
// no more. A copy does not bring them back unasked.
func (r *Repo) Forgotten(ctx context.Context) (map[PointID]bool, error) {
	if err := r.refresh(ctx); err != nil {
		return nil, err
	}
	ids := map[PointID]bool{}
	for id := range r.current().Forgotten {
		ids[id] = true
	}
	return ids, nil
}

// Map is a disk's map that a run has finished and not yet committed.
type Map struct {
	run  *Run
	root tree.Root
	size int64
}

// Map opens a map that DiskWriter.Finish or PutFile gave.
func (run *Run) Map(root Root, size int64) (*Map, error) {
	t, err := tree.ParseRoot(string(root), size)
	return &Map{run, t, size}, err
}

// Holds proves, for extents as another repository's map of the same disk has
// them, that this map has zeros where they are Zero and elsewhere chunks that
// are in this repository. No chunk is read.
func (m *Map) Holds(ctx context.Context, extents disk.Extents) error {
	const step = 4096 // chunks: 128 KiB of ids
	ids := make([]pack.ID, step)
	for e, err := range extents {
		if err != nil {
			return err
		}
		if err := checkAligned(m.size, e.Off, e.Len); err != nil {
			return err
		}
		first, count := chunkRange(e.Off, e.Len)
		for ; count > 0; first, count = first+step, count-step {
			some := ids[:min(step, count)]
			if err := tree.Lookup(ctx, m.run.fetchNode, m.root, first, some); err != nil {
				return err
			}
			for i, id := range some {
				if err := m.right(id, e.Zero); err != nil {
					return fmt.Errorf("chunk at %d: %w", (first+int64(i))*ChunkSize, err)
				}
			}
		}
	}
	return ctx.Err()
}

func (m *Map) right(id pack.ID, zero bool) error {
	if (id == pack.ID{}) != zero {
		return fmt.Errorf("%w: the new map is not that of the source", ErrDamaged)
	}
	if zero {
		return nil
	}
	m.run.mu.Lock()
	there := m.run.fresh[id]
	m.run.mu.Unlock()
	if there {
		return nil
	}
	there, err := m.run.r.present(id)
	if err == nil && !there {
		err = fmt.Errorf("%w: chunk %x is not in the repository any more", ErrDamaged, id[:8])
	}
	return err
}

// Matches is DiskReader.Matches for this map.
func (m *Map) Matches(ctx context.Context, p []byte, off int64) (bool, error) {
	return matches(ctx, m.run.r, m.run.fetchNode, m.root, m.size, p, off)
}
