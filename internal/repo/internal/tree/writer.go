package tree

import (
	"context"
	"fmt"
	"sync"
)

// maxDirty bounds the nodes that a Writer holds changed in memory: 64 leaves
// of 8 KiB map 1 GiB of disk around where it is being written.
const maxDirty = 96

// Writer changes a map. Set may be called in parallel and in any order; what
// is set in ascending order costs each node one store.
type Writer struct {
	fetch Fetch
	store func(ctx context.Context, n *Node) (ID, error)

	mu     sync.Mutex // guards all below; held while nodes are fetched and stored
	levels int
	root   ID
	dirty  map[place]*dirtyNode
	clock  int64
	end    int64 // chunks of the disk
}

type place struct {
	level int
	index int64 // the node's number within its level
}

type dirtyNode struct {
	Node
	used int64 // clock at the last change
}

// NewWriter starts from base, which maps oldSize bytes, towards a map of size
// bytes. What a shrunken disk's last chunk holds beyond its end is the
// caller's to clear. store keeps a node and gives its id; nodes must be fetchable at once.
func NewWriter(ctx context.Context, fetch Fetch, store func(context.Context, *Node) (ID, error), base Root, oldSize, size int64) (*Writer, error) {
	w := &Writer{fetch: fetch, store: store, levels: Levels(size), dirty: map[place]*dirtyNode{}, end: (size + ChunkSize - 1) / ChunkSize}
	if base.ID == (ID{}) {
		return w, nil
	}
	w.root = base.ID
	// A disk that grew gets levels on top; one that shrank loses them, and
	// what lies beyond its end.
	for l := base.Levels; l < w.levels; l++ {
		n := &Node{Level: l}
		n.Children[0] = w.root
		id, err := store(ctx, n)
		if err != nil {
			return nil, err
		}
		w.root = id
	}
	for l := base.Levels; l > w.levels && w.root != (ID{}); l-- {
		n, err := fetch(ctx, w.root, l-1)
		if err != nil {
			return nil, err
		}
		w.root = n.Children[0]
	}
	if oldSize <= size {
		return w, nil
	}
	return w, w.truncate(ctx)
}

// truncate clears all chunks beyond the end along the right edge of the map.
func (w *Writer) truncate(ctx context.Context) error {
	for level := range w.levels {
		index := w.end >> (8 * (level + 1)) // the node that holds the first child beyond the end
		if index >= 1<<(8*(w.levels-1-level)) {
			continue // the edge falls on the end of the whole map
		}
		n, err := w.node(ctx, place{level, index})
		if err != nil {
			return err
		}
		s := span(level)
		first := (w.end - index*s*Fanout + s - 1) / s
		for i := first; i < Fanout; i++ {
			n.Children[i] = ID{}
		}
	}
	return nil
}

// Set makes chunks first, first+1, … have these ids; zero values are zeros.
func (w *Writer) Set(ctx context.Context, first int64, ids []ID) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if first < 0 || first+int64(len(ids)) > w.end {
		return fmt.Errorf("chunks [%d, +%d) of a disk of %d", first, len(ids), w.end)
	}
	for len(ids) > 0 {
		n, err := w.node(ctx, place{0, first / Fanout})
		if err != nil {
			return err
		}
		took := copy(n.Children[first%Fanout:], ids)
		first, ids = first+int64(took), ids[took:]
		if len(w.dirty) > maxDirty {
			if err := w.evict(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// Zero makes n chunks zeros, whole subtrees at a time.
func (w *Writer) Zero(ctx context.Context, first, n int64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if first < 0 || n < 0 || first+n > w.end {
		return fmt.Errorf("chunks [%d, +%d) of a disk of %d", first, n, w.end)
	}
	for n > 0 {
		level := 0
		for level+1 < w.levels && first%span(level+1) == 0 && (n >= span(level+1) || first+n == w.end) {
			level++
		}
		took := min(n, span(level))
		if err := w.zeroChild(ctx, level, first); err != nil {
			return err
		}
		first, n = first+took, n-took
		if len(w.dirty) > maxDirty {
			if err := w.evict(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// zeroChild clears the child at level that starts at chunk first, unless
// nothing is there.
func (w *Writer) zeroChild(ctx context.Context, level int, first int64) error {
	for p := range w.dirty {
		if p.level < level && p.index>>(8*(level-1-p.level)) == first/span(level) {
			delete(w.dirty, p)
		}
	}
	n, err := w.node(ctx, place{level, first / span(level) / Fanout})
	if err != nil {
		return err
	}
	n.Children[first/span(level)%Fanout] = ID{}
	return nil
}

// node gives a changeable node, making its parents changeable too.
func (w *Writer) node(ctx context.Context, p place) (*dirtyNode, error) {
	w.clock++
	if d, ok := w.dirty[p]; ok {
		d.used = w.clock
		return d, nil
	}
	id := w.root
	if p.level < w.levels-1 {
		parent, err := w.node(ctx, place{p.level + 1, p.index / Fanout})
		if err != nil {
			return nil, err
		}
		id = parent.Children[p.index%Fanout]
	}
	d := &dirtyNode{Node: Node{Level: p.level}, used: w.clock}
	if id != (ID{}) {
		n, err := w.fetch(ctx, id, p.level)
		if err != nil {
			return nil, err
		}
		d.Node = *n
	}
	w.dirty[p] = d
	return d, nil
}

// evict stores the half of the changed nodes that were longest not touched,
// children before their parents.
func (w *Writer) evict(ctx context.Context) error {
	horizon := w.clock - maxDirty/2
	for level := range w.levels {
		for p, d := range w.dirty {
			if p.level == level && d.used < horizon && !w.hasDirtyChild(p) {
				if err := w.settle(ctx, p, d); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (w *Writer) hasDirtyChild(p place) bool {
	for q := range w.dirty {
		if q.level == p.level-1 && q.index/Fanout == p.index {
			return true
		}
	}
	return false
}

// settle stores a node and writes its id into its parent.
func (w *Writer) settle(ctx context.Context, p place, d *dirtyNode) error {
	var id ID
	if !d.Empty() {
		var err error
		if id, err = w.store(ctx, &d.Node); err != nil {
			return err
		}
	}
	delete(w.dirty, p)
	if p.level == w.levels-1 {
		w.root = id
		return nil
	}
	// The parent is changeable: node made it so, and evict and Finish settle
	// children first.
	w.dirty[place{p.level + 1, p.index / Fanout}].Children[p.index%Fanout] = id
	return nil
}

// Finish stores what is changed and gives the root. The Writer may be used on.
func (w *Writer) Finish(ctx context.Context) (Root, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for level := range w.levels {
		for p, d := range w.dirty {
			if p.level == level {
				if err := w.settle(ctx, p, d); err != nil {
					return Root{}, err
				}
			}
		}
	}
	return Root{Levels: w.levels, ID: w.root}, nil
}
