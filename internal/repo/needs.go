package repo

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/tree"
)

// needs gathers the packs on which maps rest: for each item one where it is
// present. Equal subtrees are walked once. Items that are nowhere are left to
// check.
type needs struct {
	fetch tree.Fetch
	in    func(pack.ID) (name [32]byte, there bool, err error)

	mu    sync.Mutex // guards what follows
	seen  map[tree.ID]bool
	known map[[32]byte]bool
	fresh [][32]byte // packs that take has not given yet
	lost  bool       // something is nowhere, or cannot be read
}

func newNeeds(fetch tree.Fetch, in func(pack.ID) ([32]byte, bool, error)) *needs {
	return &needs{fetch: fetch, in: in, seen: map[tree.ID]bool{}, known: map[[32]byte]bool{}}
}

// take gives the packs that were found since it was called before.
func (n *needs) take() [][32]byte {
	fresh := n.fresh
	n.fresh = nil
	return fresh
}

// point walks all maps of a point.
func (n *needs) point(ctx context.Context, p *Point) error {
	for _, m := range mapsOf(p) {
		root, err := tree.ParseRoot(string(m.root), m.size)
		if err != nil {
			n.lost = true
			continue
		}
		if err := n.walk(ctx, tree.Root{}, root); err != nil {
			return fmt.Errorf("%s of point %s: %w", m.what, p.ID, err)
		}
	}
	return nil
}

// walk goes through a map, but for what is the same, at the same place, in base.
func (n *needs) walk(ctx context.Context, base, root tree.Root) error {
	if root.ID == (tree.ID{}) {
		return nil
	}
	for base.Levels > root.Levels { // what base has more lies behind root's end
		top, err := n.node(ctx, base.ID, base.Levels-1)
		if err != nil {
			return err
		}
		if base = (tree.Root{Levels: base.Levels - 1}); top != nil {
			base.ID = top.Children[0]
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(walkers)
	var visit func(old, id tree.ID, level int) error
	visit = func(old, id tree.ID, level int) error {
		if id == (tree.ID{}) || id == old || !n.first(id) {
			return nil
		}
		if err := n.item(id); err != nil {
			return err
		}
		now, err := n.node(gctx, id, level)
		if err != nil || now == nil {
			return err
		}
		was := &tree.Node{}
		switch {
		case level == base.Levels: // base is the first child, if root is higher
			was.Children[0] = base.ID
		case old != (tree.ID{}):
			if was, err = n.node(gctx, old, level); err != nil {
				return err
			} else if was == nil {
				was = &tree.Node{}
			}
		}
		for i, c := range now.Children {
			switch {
			case c == (tree.ID{}) || c == was.Children[i]:
			case level == 0:
				if err := n.item(c); err != nil {
					return err
				}
			default:
				before := was.Children[i]
				if !g.TryGo(func() error { return visit(before, c, level-1) }) {
					if err := visit(before, c, level-1); err != nil {
						return err
					}
				}
			}
		}
		return nil
	}
	g.Go(func() error {
		old := tree.ID{}
		if base.Levels == root.Levels {
			old = base.ID
		}
		return visit(old, root.ID, root.Levels-1)
	})
	return g.Wait()
}

func (n *needs) first(id tree.ID) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	was := n.seen[id]
	n.seen[id] = true
	return !was
}

// node reads a node; nil when it is damaged.
func (n *needs) node(ctx context.Context, id tree.ID, level int) (*tree.Node, error) {
	if id == (tree.ID{}) {
		return nil, nil
	}
	node, err := n.fetch(ctx, id, level)
	if errors.Is(err, ErrDamaged) || errors.Is(err, tree.ErrNode) {
		n.mu.Lock()
		n.lost = true
		n.mu.Unlock()
		return nil, nil
	}
	return node, err
}

// item notes the pack of an item.
func (n *needs) item(id pack.ID) error {
	name, there, err := n.in(id)
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case !there:
		n.lost = true
	case name != [32]byte{} && !n.known[name]:
		n.known[name] = true
		n.fresh = append(n.fresh, name)
	}
	return nil
}
