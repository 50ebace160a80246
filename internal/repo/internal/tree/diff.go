package tree

import (
	"context"

	"golang.org/x/sync/errgroup"
)

// diffFetches is how many nodes a Diff fetches side by side.
const diffFetches = 16

// Diff calls found with runs of chunks below end that differ between the maps
// a and b, ascending; neighbouring runs are not merged. zero says that b has
// zeros there. It stops when found says false.
//
// Equal subtrees are not fetched, nor is anything of a where b is zero. The
// children of one node are fetched side by side: over a slow link one
// after another would take longer than the data.
func Diff(ctx context.Context, fetch Fetch, a, b Root, end int64, found func(from, to int64, zero bool) bool) error {
	d := differ{fetch, end, found}
	_, err := d.roots(ctx, a, b)
	return err
}

type differ struct {
	fetch Fetch
	end   int64
	found func(from, to int64, zero bool) bool
}

// roots brings both maps to the same height.
func (d *differ) roots(ctx context.Context, a, b Root) (bool, error) {
	if a.Levels == b.Levels {
		an, bn, err := d.pair(ctx, a.ID, b.ID, a.Levels-1)
		if an == bn || err != nil {
			return err == nil, err
		}
		return d.nodes(ctx, an, bn, 0)
	}
	if a.Levels > b.Levels { // what a has more lies behind b's end
		top, err := d.node(ctx, a.ID, a.Levels-1)
		if err != nil {
			return false, err
		}
		return d.roots(ctx, Root{a.Levels - 1, top.Children[0]}, b)
	}
	top, err := d.node(ctx, b.ID, b.Levels-1)
	if err != nil {
		return false, err
	}
	if more, err := d.roots(ctx, a, Root{b.Levels - 1, top.Children[0]}); !more || err != nil {
		return false, err
	}
	rest := *top
	rest.Children[0] = ID{}
	return d.nodes(ctx, &Node{Level: top.Level}, &rest, 0)
}

func (d *differ) node(ctx context.Context, id ID, level int) (*Node, error) {
	if id == (ID{}) {
		return &Node{Level: level}, nil
	}
	return d.fetch(ctx, id, level)
}

// pair fetches two nodes; nil for both when they are equal.
func (d *differ) pair(ctx context.Context, a, b ID, level int) (an, bn *Node, err error) {
	if a == b {
		return nil, nil, nil
	}
	if an, err = d.node(ctx, a, level); err == nil {
		bn, err = d.node(ctx, b, level)
	}
	if err != nil {
		return nil, nil, err
	}
	return an, bn, nil
}

// nodes compares two nodes that begin at chunk base.
func (d *differ) nodes(ctx context.Context, a, b *Node, base int64) (bool, error) {
	if a.Level == 0 {
		return d.leaves(a, b, base), nil
	}
	s := span(a.Level)
	var as, bs [Fanout]*Node
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(diffFetches)
	for i := range int64(Fanout) {
		x, y := a.Children[i], b.Children[i]
		if x == y || y == (ID{}) || base+i*s >= d.end {
			continue
		}
		g.Go(func() (err error) {
			as[i], bs[i], err = d.pair(gctx, x, y, a.Level-1)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return false, err
	}
	for i := range int64(Fanout) {
		from := base + i*s
		switch {
		case from >= d.end || a.Children[i] == b.Children[i]:
		case b.Children[i] == (ID{}):
			if !d.found(from, min(from+s, d.end), true) {
				return false, nil
			}
		default:
			if more, err := d.nodes(ctx, as[i], bs[i], from); !more || err != nil {
				return false, err
			}
		}
	}
	return true, nil
}

func (d *differ) leaves(a, b *Node, base int64) bool {
	n := min(Fanout, d.end-base)
	for i := int64(0); i < n; {
		if a.Children[i] == b.Children[i] {
			i++
			continue
		}
		from, zero := i, b.Children[i] == ID{}
		for i < n && a.Children[i] != b.Children[i] && (b.Children[i] == ID{}) == zero {
			i++
		}
		if !d.found(base+from, base+i, zero) {
			return false
		}
	}
	return true
}
