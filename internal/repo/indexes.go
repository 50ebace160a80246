package repo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/seal"
)

func indexName(d [32]byte) string { return "index/" + hex.EncodeToString(d[:]) }

// indexClear is an index object's clear part.
type indexClear struct {
	Packs      []packRow  `json:"packs"`
	Made       []int64    `json:"made,omitempty"`
	Supersedes []seal.Hex `json:"supersedes,omitempty"`
}

// packRow is ["<64 hex>", size, kind].
type packRow struct {
	Name [32]byte
	Size int64
	Kind uint16
}

func (p packRow) MarshalJSON() ([]byte, error) {
	return json.Marshal([]any{hex.EncodeToString(p.Name[:]), p.Size, p.Kind})
}

func (p *packRow) UnmarshalJSON(b []byte) error {
	var name string
	row := []any{&name, &p.Size, &p.Kind}
	if err := json.Unmarshal(b, &row); err != nil {
		return err
	}
	d, err := seal.ParseDigest(name)
	p.Name = d
	return err
}

// readIndex reads a live index object.
func (r *Repo) readIndex(ctx context.Context, d [32]byte) ([]index.Pack, error) {
	name := indexName(d)
	p, err := r.store.Get(ctx, name, 0, -1)
	if errors.Is(err, blob.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: missing", name, ErrDamaged)
	} else if err != nil {
		return nil, err
	}
	if sha256.Sum256(p) != d {
		return nil, fmt.Errorf("%s: %w: its bytes are not what its name says", name, ErrDamaged)
	}
	raw, err := seal.Parse(p, seal.Index)
	if err == nil {
		err = raw.Verify(r.id, r.pub)
	}
	var c indexClear
	if err == nil {
		err = seal.Unmarshal(raw.Clear, &c)
	}
	var master *seal.Key
	if err == nil {
		master, err = r.master(ctx, raw.Header.Key)
	}
	var content []byte
	if err == nil {
		content, err = raw.OpenOver(master, "index")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	packs := make([]index.Pack, len(c.Packs))
	for i, row := range c.Packs {
		packs[i] = index.Pack{Name: row.Name, Size: row.Size, Kind: row.Kind}
		if len(c.Made) == len(packs) {
			packs[i].Made = c.Made[i]
		}
	}
	if err := index.Unmarshal(content, packs); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return packs, nil
}

// putIndex stores an index object for the packs.
func (r *Repo) putIndex(ctx context.Context, packs []index.Pack, supersedes ...seal.Hex) ([32]byte, error) {
	c := indexClear{Packs: make([]packRow, len(packs)), Made: make([]int64, len(packs)), Supersedes: supersedes}
	for i, k := range packs {
		c.Packs[i], c.Made[i] = packRow{k.Name, k.Size, k.Kind}, k.Made
	}
	clear, err := json.Marshal(c)
	if err != nil {
		return [32]byte{}, err
	}
	number, master := r.keys.Newest()
	d := seal.Document{Header: seal.NewHeader(seal.Index, 0, number, r.id), Clear: clear, Sealed: index.Marshal(packs)}
	p, err := d.Marshal(master, "index", r.sign)
	if err != nil {
		return [32]byte{}, err
	}
	sum := sha256.Sum256(p)
	return sum, r.store.Put(ctx, indexName(sum), p)
}
