// Package tree is the disk map: a shallow tree of content-addressed nodes
// (docs/format.md §4). Reader looks chunk ids up, Writer changes some and
// rewrites only the touched nodes.
package tree

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/bits"
	"strconv"
	"strings"

	"holdfast/internal/repo/internal/pack"
)

const (
	// Fanout is the number of children of a node.
	Fanout = 256
	// ChunkSize is the length of a chunk, bytes.
	ChunkSize = 64 << 10
	// MaxNode is the length of a full node, bytes.
	MaxNode = headLen + Fanout*32

	headLen = 4 + Fanout/8
)

// ErrNode is returned for bytes that are no node.
var ErrNode = errors.New("not a map node")

// ID is a chunk's or node's id; the zero value stands for "all zeros".
type ID = pack.ID

// Root is a map's top: "zero", or levels and id of the top node.
type Root struct {
	Levels int
	ID     ID // zero value: a disk of zeros
}

// Levels is how many levels a disk of that many bytes has.
func Levels(size int64) int {
	l := 1
	for span := int64(ChunkSize * Fanout); span < size; span *= Fanout {
		l++
		if span > 1<<62/Fanout {
			break
		}
	}
	return l
}

// String is the form that manifests keep.
func (r Root) String() string {
	if r.ID == (ID{}) {
		return "zero"
	}
	return strconv.Itoa(r.Levels) + ":" + hex.EncodeToString(r.ID[:])
}

// ParseRoot reads a root for a disk of that many bytes.
func ParseRoot(s string, size int64) (Root, error) {
	r := Root{Levels: Levels(size)}
	if s == "zero" {
		return r, nil
	}
	l, id, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(id)
	if err != nil || len(b) != 32 || l != strconv.Itoa(r.Levels) {
		return r, fmt.Errorf("%w: root %.80q of a disk of %d bytes", ErrNode, s, size)
	}
	r.ID = ID(b)
	return r, nil
}

// Node is one node; a zero child id means "all zeros".
type Node struct {
	Level    int
	Children [Fanout]ID
}

// Empty reports whether no child is present.
func (n *Node) Empty() bool { return n.Children == [Fanout]ID{} }

// Marshal gives the node's bytes.
func (n *Node) Marshal() []byte {
	p := make([]byte, headLen, MaxNode)
	count := 0
	for i := range n.Children {
		if n.Children[i] != (ID{}) {
			p[4+i/8] |= 1 << (i % 8)
			p = append(p, n.Children[i][:]...)
			count++
		}
	}
	p[0] = byte(n.Level)
	binary.LittleEndian.PutUint16(p[2:], uint16(count))
	return p
}

// Unmarshal reads a node that must be of the given level.
func Unmarshal(p []byte, level int) (*Node, error) {
	if len(p) < headLen {
		return nil, fmt.Errorf("%w: %d bytes", ErrNode, len(p))
	}
	count, present := int(binary.LittleEndian.Uint16(p[2:])), 0
	for _, b := range p[4:headLen] {
		present += bits.OnesCount8(b)
	}
	if int(p[0]) != level || p[1] != 0 || count != present || count == 0 || len(p) != headLen+32*count {
		return nil, fmt.Errorf("%w: level %d with %d children in %d bytes, level %d wanted", ErrNode, p[0], count, len(p), level)
	}
	n := &Node{Level: level}
	ids := p[headLen:]
	for i := range n.Children {
		if p[4+i/8]&(1<<(i%8)) != 0 {
			n.Children[i] = ID(ids)
			if n.Children[i] == (ID{}) {
				return nil, fmt.Errorf("%w: child %d is present and zero", ErrNode, i)
			}
			ids = ids[32:]
		}
	}
	return n, nil
}

// Fetch gets a node; nodes it returns are shared and never changed.
type Fetch func(ctx context.Context, id ID, level int) (*Node, error)

// span is how many chunks a child at that level covers.
func span(level int) int64 { return 1 << (8 * level) }

// Lookup fills ids with the chunk ids of chunks first, first+1, …
func Lookup(ctx context.Context, fetch Fetch, root Root, first int64, ids []ID) error {
	return lookup(ctx, fetch, root.ID, root.Levels-1, 0, first, ids)
}

// lookup fills the part of ids that the subtree starting at chunk base covers.
func lookup(ctx context.Context, fetch Fetch, id ID, level int, base, first int64, ids []ID) error {
	if id == (ID{}) {
		clear(ids)
		return nil
	}
	n, err := fetch(ctx, id, level)
	if err != nil {
		return err
	}
	for s := span(level); len(ids) > 0; {
		i := (first - base) / s
		take := min(int64(len(ids)), base+(i+1)*s-first)
		if level == 0 {
			ids[0], take = n.Children[i], 1
		} else if err := lookup(ctx, fetch, n.Children[i], level-1, base+i*s, first, ids[:take]); err != nil {
			return err
		}
		first, ids = first+take, ids[take:]
	}
	return nil
}

// Present calls found with runs of chunks within [first, end) that are not
// zeros, ascending; neighbouring runs are not merged. It stops when found says
// false.
func Present(ctx context.Context, fetch Fetch, root Root, first, end int64, found func(from, to int64) bool) error {
	_, err := present(ctx, fetch, root.ID, root.Levels-1, 0, first, end, found)
	return err
}

func present(ctx context.Context, fetch Fetch, id ID, level int, base, first, end int64, found func(from, to int64) bool) (bool, error) {
	if id == (ID{}) || first >= end {
		return true, nil
	}
	n, err := fetch(ctx, id, level)
	if err != nil {
		return false, err
	}
	s := span(level)
	for i := max(0, (first-base)/s); i < Fanout && base+i*s < end; i++ {
		from := max(first, base+i*s)
		if level > 0 {
			if more, err := present(ctx, fetch, n.Children[i], level-1, base+i*s, from, min(end, base+(i+1)*s), found); !more || err != nil {
				return false, err
			}
			continue
		}
		to := from
		for i < Fanout && to < end && n.Children[i] != (ID{}) {
			i, to = i+1, to+1
		}
		if to > from && !found(from, to) {
			return false, nil
		}
	}
	return true, nil
}

// Walk goes through the map's nodes, parents first. enter says whether to fetch
// a node at all; leaf gets each leaf that was entered, with its first chunk.
func Walk(ctx context.Context, fetch Fetch, root Root, enter func(id ID) bool, leaf func(n *Node, firstChunk int64) error) error {
	var walk func(id ID, level int, base int64) error
	walk = func(id ID, level int, base int64) error {
		if id == (ID{}) || !enter(id) {
			return nil
		}
		n, err := fetch(ctx, id, level)
		if err != nil {
			return err
		}
		if level == 0 {
			return leaf(n, base)
		}
		for i, c := range n.Children {
			if err := walk(c, level-1, base+int64(i)*span(level)); err != nil {
				return err
			}
		}
		return nil
	}
	return walk(root.ID, root.Levels-1, 0)
}
