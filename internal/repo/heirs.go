package repo

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"holdfast/internal/repo/internal/pack"
)

// heirs prepares tiers for losing packs: what is still needed of these, and lies
// in other packs now, is copied to the tier in those, so that its points stay
// whole. It gives the tiers that have some of the packs.
func (p *pruner) heirs(ctx context.Context, free [][32]byte) (tiers []string, err error) {
	for _, t := range p.m.state.Tiers {
		far, err := p.r.tierStore(ctx, t.Name)
		if err != nil {
			return nil, err
		}
		there, err := listSizes(ctx, far)
		if err != nil {
			return nil, fmt.Errorf("tier %s: %w", t.Name, err)
		}
		gone := map[[32]byte]bool{}
		for _, name := range free {
			if _, ok := there[name]; ok {
				gone[name] = true
			}
		}
		if len(gone) == 0 {
			continue
		}
		tiers = append(tiers, t.Name)
		if t.Back {
			continue // it keeps no points
		}
		heirs, err := p.heirsOf(ctx, gone, there)
		if err != nil {
			return nil, err
		}
		m := &carrier{r: p.r, tier: t.Name, far: far, there: there}
		for _, name := range heirs {
			if err := m.send(ctx, task{name: name, heldPack: heldPack{size: p.m.packs[name].size}}); err != nil {
				return nil, err
			}
		}
	}
	return tiers, nil
}

// heirsOf chooses packs that hold all needed items of those that go, beside
// what is there.
func (p *pruner) heirsOf(ctx context.Context, gone map[[32]byte]bool, there map[[32]byte]int64) ([][32]byte, error) {
	indexes, heirs := map[[32]byte]bool{}, map[[32]byte]bool{}
	for name := range gone {
		if k := p.m.packs[name]; k != nil { // else an earlier sweep has dropped it, after this
			for _, d := range k.indexes {
				indexes[d] = true
			}
		}
	}
	for d := range indexes {
		packs, err := p.m.readIndex(ctx, p.m.state, d)
		if err != nil {
			return nil, err
		}
		for _, k := range packs {
			if !gone[k.Name] {
				continue
			}
			for _, it := range k.Items {
				heir, err := p.heir(it.ID, gone, there, heirs)
				if err != nil {
					return nil, err
				}
				if heir != ([32]byte{}) {
					heirs[heir] = true
				}
			}
		}
	}
	return slices.Collect(maps.Keys(heirs)), nil
}

// heir gives the pack that an item has to be copied with; zero for none: nothing
// needs the item, or it stays in the tier with another pack.
func (p *pruner) heir(id pack.ID, gone map[[32]byte]bool, there map[[32]byte]int64, chosen map[[32]byte]bool) (heir [32]byte, err error) {
	places, err := p.r.index.Lookup(id, nil)
	if err != nil {
		return heir, err
	}
	needed, best := false, -1
	for i, at := range places {
		k := p.m.packs[at.Pack]
		if k == nil {
			continue
		}
		needed = needed || bit(k.live, int(at.Number))
		if _, rank := p.m.rank(&at, id); gone[at.Pack] || rank != rankGood {
			continue
		}
		if size, ok := there[at.Pack]; chosen[at.Pack] || ok && size == k.size {
			return heir, nil
		}
		if best < 0 || p.m.newer(&at, &places[best]) {
			best = i
		}
	}
	if needed && best >= 0 {
		heir = places[best].Pack
	}
	return heir, nil
}

// mirrors brings the tiers' mirrors up to date before packs go from them.
func (p *pruner) mirrors(ctx context.Context, tiers []string) error {
	for _, name := range tiers {
		if _, err := p.r.mirror(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// reachable refuses to prune when what a tier holds cannot be known.
func (p *pruner) reachable(ctx context.Context) error {
	if p.r.mirrorOf != "" {
		return p.r.isMirror
	}
	err := p.r.soundTiers(ctx)
	if err != nil && ctx.Err() == nil {
		return refuse("%w; see to that, or remove the tier", err)
	}
	return err
}
