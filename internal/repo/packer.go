package repo

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"sync"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
)

const (
	chunkPackBytes = 16 << 20
	nodePackBytes  = 4 << 20
)

// packer gathers items until they fill a pack. Items of one pack are laid in
// the order of their positions, though they come from workers in parallel.
// Safe in parallel.
type packer struct {
	run    *Run
	kind   uint16
	target int // bytes at which a pack is closed

	mu    sync.Mutex // guards items and arena
	items []packItem
	arena []byte // the items' data, one after another
}

type packItem struct {
	pack.Item
	at       int64 // position on the disk, in chunks; 0 for nodes, which keep the order they came in
	off, len int   // in the arena
}

// add takes an item in; data is copied. When the pack is full, add hands it to
// be stored, waiting while too many others are.
func (k *packer) add(ctx context.Context, id pack.ID, at int64, plain int, data []byte) error {
	k.mu.Lock()
	if k.arena == nil {
		k.arena = (*arenas.Get().(*[]byte))[:0]
	}
	k.items = append(k.items, packItem{pack.Item{ID: id, Plain: plain}, at, len(k.arena), len(data)})
	k.arena = append(k.arena, data...)
	full := len(k.arena) >= k.target
	var items []packItem
	var arena []byte
	if full {
		items, arena = k.items, k.arena
		k.items, k.arena = nil, nil
	}
	k.mu.Unlock()
	if full {
		return k.run.storePack(ctx, k.kind, items, arena)
	}
	return k.run.failed()
}

// flush hands over what there is.
func (k *packer) flush(ctx context.Context) error {
	k.mu.Lock()
	items, arena := k.items, k.arena
	k.items, k.arena = nil, nil
	k.mu.Unlock()
	if len(items) == 0 {
		return k.run.failed()
	}
	return k.run.storePack(ctx, k.kind, items, arena)
}

var arenas = sync.Pool{New: func() any { p := make([]byte, 0, chunkPackBytes+256<<10); return &p }}

// storePack seals and stores a pack in the background.
func (run *Run) storePack(ctx context.Context, kind uint16, items []packItem, arena []byte) error {
	slot, more := run.slots, run.moreSlots
	if !run.quick.Load() {
		more = nil
	}
	select {
	case slot <- struct{}{}:
	case more <- struct{}{}:
		slot = more
	case <-ctx.Done():
		return ctx.Err()
	case <-run.ctx.Done():
		return context.Cause(run.ctx)
	}
	run.storing.Go(func() {
		began := time.Now()
		p, err := run.r.putPack(run.ctx, kind, items, arena)
		run.quick.Store(time.Since(began) < quickPack)
		<-slot
		if err == nil {
			err = run.prove(p)
		}
		if err != nil {
			run.fail(err)
			return
		}
		run.mu.Lock()
		defer run.mu.Unlock()
		run.packs = append(run.packs, p)
		run.uses[p.Name] = true
		run.stored += p.Size
		run.packedItems += len(p.Items)
	})
	return run.failed()
}

// putPack seals items, which it sorts, and stores them. It takes the arena: on a
// store far away a pack waits long, and need not be in memory twice meanwhile.
func (r *Repo) putPack(ctx context.Context, kind uint16, items []packItem, arena []byte) (index.Pack, error) {
	slices.SortStableFunc(items, func(a, b packItem) int { return cmp.Compare(a.at, b.at) })
	plain := make([]pack.Item, len(items))
	for i, it := range items {
		plain[i] = it.Item
		plain[i].Data = arena[it.off : it.off+it.len]
	}
	number, master := r.keys.Newest()
	buf := arenas.Get().(*[]byte)
	p, entries := pack.Build(*buf, seal.NewHeader(seal.Pack, kind, number, r.id), master, plain)
	k := index.Pack{Name: sha256.Sum256(p), Size: int64(len(p)), Kind: kind, Made: time.Now().Unix(), Items: make([]index.Item, len(entries))}
	for i, e := range entries {
		k.Items[i] = index.Item{ID: e.ID, Stored: e.Stored}
	}
	arenas.Put(&arena)
	defer arenas.Put(&p)
	// The name is the content's digest, so a name that is taken is this pack.
	if err := r.store.Put(ctx, packName(k.Name), p); err != nil && !errors.Is(err, blob.ErrExist) {
		return k, err
	}
	return k, nil
}
