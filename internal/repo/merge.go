package repo

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
)

const (
	// mergeLeast is how many index objects a merge is worth: other machines read
	// the whole index anew after it, and so many small ones in a few seconds.
	mergeLeast = 1024
	// mergeMost bounds what one entry replaces, and so its size.
	mergeMost = 8 * mergeLeast
)

// merge puts few large index objects in the place of many small ones, by sweep
// entries that free no pack.
func (p *pruner) merge(ctx context.Context) error {
	for {
		if err := p.m.catchUp(ctx); err != nil {
			return err
		}
		old := p.small()
		if len(old) == 0 {
			return nil
		}
		p.o.Report("merge", 0, int64(len(old)))
		// Nothing is decided by marks here: any entry may come between, as long as
		// all that is replaced is there.
		err := p.replace(ctx, old, map[[32]byte]bool{}, func(s *state) error {
			for _, d := range old {
				if !s.indexes[d] {
					return errMoved
				}
			}
			return p.run.mayAnnounce(s)
		})
		if errors.Is(err, errMoved) {
			continue
		} else if err != nil {
			return fmt.Errorf("merge index objects: %w", err)
		}
		p.report.Merged += len(old)
		if err := p.remove(ctx, nil, nil, old); err != nil {
			return err
		}
	}
}

// small chooses the index objects to merge, in the order in which they were
// added; none when it is not worth it. What a run under way has added is not
// touched: its packs are known by that. From the smallest on, as many are
// chosen as are no larger than all smaller ones together: so what is merged is
// twice as large as any of them, an item is written anew some twenty times in a
// repository's life, and of those left each is larger than all before it.
func (p *pruner) small() [][32]byte {
	type object struct {
		digest [32]byte
		items  int
	}
	sizes, packs := map[[32]byte]int{}, map[[32]byte]int{}
	for _, k := range p.m.packs {
		for _, d := range k.indexes {
			sizes[d] += k.items
			packs[d]++
		}
	}
	s := p.m.state
	var all []object
	for d := range s.indexes {
		if 2*sizes[d] < indexItems && 2*packs[d] < indexPacks && !p.m.shielded(s.added[d]) {
			all = append(all, object{d, sizes[d]})
		}
	}
	slices.SortFunc(all, func(a, b object) int {
		return cmp.Or(cmp.Compare(a.items, b.items), bytes.Compare(a.digest[:], b.digest[:]))
	})
	n, before := 0, 0
	for i, o := range all[:min(len(all), mergeMost)] {
		if i > 0 && o.items <= before {
			n = i + 1
		}
		before += o.items
	}
	if n < cmp.Or(p.o.mergeLeast, mergeLeast) {
		return nil
	}
	var chosen [][32]byte
	for _, o := range all[:n] {
		chosen = append(chosen, o.digest)
	}
	// Packs of one time go at one time: they are to lie together.
	slices.SortFunc(chosen, func(a, b [32]byte) int {
		return cmp.Or(cmp.Compare(s.added[a].entry, s.added[b].entry), bytes.Compare(a[:], b[:]))
	})
	return chosen
}
