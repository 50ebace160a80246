package repo

import (
	"context"
	"errors"
	"fmt"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/seal"
)

// readIndex reads a live index object.
func (r *Repo) readIndex(ctx context.Context, d [32]byte) ([]index.Pack, error) {
	name := index.Name(d)
	p, err := r.store.Get(ctx, name, 0, -1)
	if errors.Is(err, blob.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: missing", name, ErrDamaged)
	} else if err != nil {
		return nil, err
	}
	o, err := index.Parse(p, d, r.id, r.pub)
	var master *seal.Key
	if err == nil {
		master, err = r.master(ctx, o.Key)
	}
	var packs []index.Pack
	if err == nil {
		packs, err = o.Open(master)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return packs, nil
}

// putIndex stores an index object for the packs.
func (r *Repo) putIndex(ctx context.Context, packs []index.Pack, supersedes ...seal.Hex) ([32]byte, error) {
	number, master := r.keys.Newest()
	d, p, err := index.Marshal(packs, supersedes, r.id, number, master, r.sign)
	if err != nil {
		return d, err
	}
	return d, r.store.Put(ctx, index.Name(d), p)
}
