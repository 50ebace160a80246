package repo

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
)

// rewriting is how many packs are read at once for copying.
const rewriting = 3

// rewrite copies what is needed of sparse packs into new ones, which the
// quarantine entry of the old ones adds. What became needed while it copied is
// copied as well.
func (p *pruner) rewrite(ctx context.Context) error {
	chosen := map[[32]byte]bool{}
	for {
		if err := p.m.catchUp(ctx); err != nil {
			return err
		}
		var todo [][32]byte
		sparse, err := p.unlocked(ctx, p.sparse())
		if err != nil {
			return err
		}
		for i, name := range sparse {
			if i < quarantineMax {
				todo = append(todo, name)
				chosen[name] = true
			}
		}
		if len(todo) == 0 {
			break
		}
		if err := p.copy(ctx, todo); err != nil {
			return fmt.Errorf("rewrite packs: %w", err)
		}
	}
	if len(chosen) == 0 {
		return nil
	}
	if err := p.run.Flush(ctx); err != nil {
		return fmt.Errorf("rewrite packs: %w", err)
	}
	if err := p.lockOwn(ctx); err != nil {
		return fmt.Errorf("rewrite packs: %w", err)
	}
	before := p.report.Quarantined
	err := p.quarantine(ctx, func() [][32]byte {
		return p.choose(func(k *packMark) bool { return k.copied != nil && !k.needed() })
	}, nil)
	if err != nil {
		return err
	}
	p.report.Rewritten = p.report.Quarantined - before
	// What no quarantine entry has added must be in the chain all the same
	// before the old copies go.
	p.run.announcing.Lock()
	err = p.run.announce(ctx)
	p.run.announcing.Unlock()
	p.run.mu.Lock()
	p.report.CopiedBytes = p.run.stored
	p.run.mu.Unlock()
	return err
}

// copy copies the packs' needed items.
func (p *pruner) copy(ctx context.Context, packs [][32]byte) error {
	var done atomic.Int64
	var total int64
	for _, name := range packs {
		total += p.m.packs[name].liveBytes
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(rewriting)
	for i, name := range packs {
		k := p.m.packs[name]
		g.Go(func() error {
			if err := p.copyPack(gctx, int64(i)<<20, name, k); err != nil {
				return err
			}
			p.o.Report("copy", done.Add(k.liveBytes), total)
			return p.run.announceSome(gctx)
		})
	}
	return g.Wait()
}

// copyPack copies what is needed of one pack, item by item, each proven to be
// what its id says. A pack with an item that cannot be read stays.
func (p *pruner) copyPack(ctx context.Context, at int64, name [32]byte, k *packMark) error {
	data, err := p.r.get(ctx, packName(name), 0, -1)
	if err == nil && int64(len(data)) != k.size {
		err = fmt.Errorf("%w: %d bytes, should be %d", ErrDamaged, len(data), k.size)
	}
	var h seal.Header
	var master *seal.Key
	if err == nil {
		h, master, err = p.r.packHeader(ctx, data)
	}
	var entries []pack.Entry
	if err == nil {
		entries, err = pack.Directory(data, h, master)
	}
	if err == nil && len(entries) != k.items {
		err = fmt.Errorf("%w: %d items, should be %d", ErrDamaged, len(entries), k.items)
	}
	if err != nil {
		return p.stick(name, k, err)
	}
	o := pack.NewOpener(data, h, master)
	var buf []byte
	for _, i := range k.uncopied() {
		e := entries[i]
		content, err := o.Open(nil, data[e.Offset:e.Offset+e.Stored], i, e.ID, pack.MaxContent)
		if err == nil && p.contentName(k.kind, content) != e.ID {
			err = fmt.Errorf("%w: item %d is not what its id says", ErrDamaged, i)
		}
		if err != nil {
			// Perhaps it is the way here that is bad, or another copy is good.
			if content, err = p.r.item(ctx, nil, e.ID, pack.MaxContent); err != nil {
				return p.stick(name, k, err)
			}
		}
		if k.kind == pack.Nodes {
			buf = append(append(buf[:0], 0), content...)
		} else {
			buf = p.r.compressor.Encode(buf[:0], content)
		}
		if err := p.packer(k.kind).add(ctx, e.ID, at+int64(i), len(content), buf); err != nil {
			return err
		}
		setBit(&k.copied, i, k.items)
	}
	return nil
}

func (p *pruner) contentName(kind uint16, content []byte) pack.ID {
	if kind == pack.Nodes {
		return p.r.nodeID(content)
	}
	return p.r.chunkID(content)
}

// stick leaves a damaged pack where it is.
func (p *pruner) stick(name [32]byte, k *packMark, err error) error {
	if !errors.Is(err, ErrDamaged) {
		return err
	}
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	k.stuck = true
	p.m.notes[fmt.Sprintf("%s was not rewritten: %v; run check --read-data", packName(name), err)] = true
	return nil
}
