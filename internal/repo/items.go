package repo

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
	"holdfast/internal/repo/internal/tree"
)

func packName(d [32]byte) string {
	h := hex.EncodeToString(d[:])
	return packsPrefix + h[:2] + "/" + h
}

// openerCache keeps packs' openers, so that a pack's header is read once.
type openerCache struct {
	lru lru[[32]byte, *pack.Opener]
}

// opener reads a pack's header.
func (r *Repo) opener(ctx context.Context, name [32]byte) (*pack.Opener, error) {
	return r.openerOf(ctx, name, nil)
}

// openerOf is opener for a pack whose first bytes are there; they are read when
// they are not.
func (r *Repo) openerOf(ctx context.Context, name [32]byte, p []byte) (*pack.Opener, error) {
	return r.openers.lru.get(ctx, name, func() (_ *pack.Opener, err error) {
		if len(p) < seal.HeaderLen {
			if p, err = r.get(ctx, packName(name), 0, seal.HeaderLen); err != nil {
				return nil, err
			}
		}
		h, master, err := r.packHeader(ctx, p)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", packName(name), err)
		}
		return pack.NewOpener(p, h, master), nil
	})
}

func (r *Repo) packHeader(ctx context.Context, p []byte) (seal.Header, *seal.Key, error) {
	h, err := seal.ParseHeader(p, seal.Pack)
	if err != nil {
		return h, nil, err
	}
	if h.Repo != r.id {
		return h, nil, fmt.Errorf("%w: %w", ErrDamaged, seal.ErrForeign)
	}
	master, err := r.master(ctx, h.Key)
	return h, master, err
}

// get reads from an object that must be there: that it is missing or shorter
// is damage.
func (r *Repo) get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	p, err := r.store.Get(ctx, name, off, n)
	if errors.Is(err, blob.ErrNotExist) || errors.Is(err, blob.ErrTruncated) {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return p, err
}

// fill is get into buf's memory, if that is large enough.
func (r *Repo) fill(ctx context.Context, name string, off int64, n int, buf []byte) ([]byte, error) {
	if n > blob.MaxSize {
		return nil, fmt.Errorf("%w: %s: %d bytes at %d", ErrDamaged, name, n, off)
	}
	p := slices.Grow(buf[:0], n)[:n]
	err := blob.Fill(ctx, r.store, name, off, p)
	if errors.Is(err, blob.ErrNotExist) || errors.Is(err, blob.ErrTruncated) {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return p, err
}

// packDigest is the inverse of packName.
func packDigest(name string) (d [32]byte, err error) {
	if len(name) < 64 {
		return d, fmt.Errorf("%s: %w: not a pack's name", name, ErrDamaged)
	}
	if d, err = seal.ParseDigest(name[len(name)-64:]); err == nil && packName(d) != name {
		err = fmt.Errorf("%s: %w: not a pack's name", name, ErrDamaged)
	}
	return d, err
}

// places gives everywhere that an item lies, without copies known to be bad.
// Those in quarantine, which may be gone any time, come last.
func (r *Repo) places(id pack.ID) ([]index.Place, error) {
	all, err := r.index.Lookup(id, nil)
	if err != nil {
		return nil, err
	}
	s := r.current()
	if len(s.Bad) == 0 && len(s.Quarantine) == 0 {
		return all, nil
	}
	good := all[:0]
	var last []index.Place
	for _, p := range all {
		switch {
		case s.Bad[chain.Copy{Pack: p.Pack, ID: id}]:
		case s.Quarantine[p.Pack] != 0:
			last = append(last, p)
		default:
			good = append(good, p)
		}
	}
	return append(good, last...), nil
}

// present reports whether an item need not be stored again.
func (r *Repo) present(id pack.ID) (bool, error) {
	_, there, err := r.presentIn(id)
	return there, err
}

// presentIn gives the pack on which presence rests.
func (r *Repo) presentIn(id pack.ID) (name [32]byte, there bool, err error) {
	all, err := r.places(id)
	if err != nil || len(all) == 0 || r.current().Quarantine[all[0].Pack] != 0 {
		return name, false, err
	}
	return all[0].Pack, true, nil
}

// item reads one item and appends its content to dst, at most max bytes: from
// any copy that opens. A copy is read twice before it is called bad. As often as
// a prune has moved it since the chain was last read, the new copy is found.
// The caller does not hold refreshing.
func (r *Repo) item(ctx context.Context, dst []byte, id pack.ID, max int) ([]byte, error) {
	for n := len(dst); ; {
		moved := r.current().Moved
		var err error
		if dst, err = r.itemKnown(ctx, dst[:n], id, max); !errors.Is(err, ErrDamaged) {
			return dst, err
		}
		if r.refresh(ctx) != nil || r.current().Moved == moved {
			return dst, err
		}
	}
}

// itemKnown reads an item from where it was when the chain was last read.
func (r *Repo) itemKnown(ctx context.Context, dst []byte, id pack.ID, max int) ([]byte, error) {
	places, err := r.copies(id)
	if err != nil {
		return dst, err
	}
	if len(places) == 0 {
		return dst, fmt.Errorf("%w: chunk %x is in no pack", ErrDamaged, id[:8])
	}
	n := len(dst)
	for _, p := range places {
		for range 2 {
			if dst, err = r.open(ctx, dst[:n], p, id, max); err == nil || !errors.Is(err, ErrDamaged) {
				return dst, err
			}
		}
		if len(r.current().Tiers) > 0 {
			if other, otherErr := r.openOther(ctx, dst[:n], p, id, max); otherErr == nil {
				return other, nil
			}
		}
	}
	return dst[:n], err
}

// open reads the copy of an item at one place.
func (r *Repo) open(ctx context.Context, dst []byte, at index.Place, id pack.ID, max int) ([]byte, error) {
	o, err := r.opener(ctx, at.Pack)
	if err != nil {
		return dst, err
	}
	buf := sealedItems.Get().(*[]byte)
	defer sealedItems.Put(buf)
	p, err := r.fill(ctx, packName(at.Pack), int64(at.Offset), int(at.Stored), *buf)
	if err != nil {
		return dst, err
	}
	*buf = p
	if dst, err = o.Open(dst, p, int(at.Number), id, max); err != nil {
		return dst, fmt.Errorf("%s: %w", packName(at.Pack), err)
	}
	return dst, nil
}

// sealedItems are buffers for items as they are stored.
var sealedItems = sync.Pool{New: func() any { return new([]byte) }}

// openOther is open for the copy of the pack in a tier, when that in the own
// store is damaged.
func (r *Repo) openOther(ctx context.Context, dst []byte, at index.Place, id pack.ID, max int) ([]byte, error) {
	head, err := r.tiers.GetOther(ctx, packName(at.Pack), 0, seal.HeaderLen)
	if err != nil {
		return dst, err
	}
	h, master, err := r.packHeader(ctx, head)
	if err != nil {
		return dst, err
	}
	p, err := r.tiers.GetOther(ctx, packName(at.Pack), int64(at.Offset), int64(at.Stored))
	if err != nil {
		return dst, err
	}
	return pack.NewOpener(head, h, master).Open(dst, p, int(at.Number), id, max)
}

// node fetches a map node through the cache.
func (r *Repo) node(ctx context.Context, id tree.ID, level int) (*tree.Node, error) {
	n, err := r.nodes.get(ctx, id, func() (*tree.Node, error) {
		p, err := r.item(ctx, nil, id, tree.MaxNode)
		if err != nil {
			return nil, err
		}
		n, err := tree.Unmarshal(p, level)
		if err != nil {
			return nil, fmt.Errorf("%w: node %x: %w", ErrDamaged, id[:8], err)
		}
		return n, nil
	})
	if err == nil && n.Level != level {
		return nil, fmt.Errorf("%w: node %x is of level %d, %d wanted", ErrDamaged, id[:8], n.Level, level)
	}
	return n, err
}

// errNotCached says that a node is not at hand.
var errNotCached = errors.New("not in the cache")

// cachedNode gives a map node that is in the cache.
func (r *Repo) cachedNode(_ context.Context, id tree.ID, level int) (*tree.Node, error) {
	if n, ok := r.nodes.peek(id); ok && n.Level == level {
		return n, nil
	}
	return nil, errNotCached
}
