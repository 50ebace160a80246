package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"holdfast/internal/blob"
	"holdfast/internal/repo"
)

// Stats counts what the repository holds.
func (n *Node) Stats(ctx context.Context) (*repo.Stats, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	return r.Stats(ctx)
}

// Packs lists the packs that the index knows, by kind and name.
func (n *Node) Packs(ctx context.Context) ([]repo.PackInfo, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	packs := []repo.PackInfo{}
	err = r.Packs(ctx, func(p repo.PackInfo) error {
		packs = append(packs, p)
		return nil
	})
	slices.SortFunc(packs, func(a, b repo.PackInfo) int { return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Pack, b.Pack)) })
	return packs, err
}

// Object takes a stored object apart. A chain entry may be named by its number
// without leading zeros, a pack without its directory.
func (n *Node) Object(ctx context.Context, name string, secrets bool) (*repo.Object, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	dir, base, _ := strings.Cut(name, "/")
	switch number, err := strconv.ParseUint(base, 10, 64); {
	case dir == "chain" && err == nil:
		name = fmt.Sprintf("chain/%012d", number)
	case dir == "packs" && len(base) == 64:
		name = "packs/" + base[:2] + "/" + base
	}
	o, err := r.Object(ctx, name, secrets)
	if errors.Is(err, blob.ErrNotExist) || errors.Is(err, blob.ErrName) {
		return nil, fmt.Errorf("there is no object %q: names are as in docs/format.md: config, chain/1, keys/…, keyring/…, index/…, packs/…, leases/…, pins/…", name)
	}
	return o, err
}

// Indexes lists the live index objects.
func (n *Node) Indexes(ctx context.Context) ([]repo.IndexInfo, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	return r.Indexes(ctx)
}

// Index gives what an index object lists, or where an item lies.
func (n *Node) Index(ctx context.Context, id string) ([]repo.PackItems, []repo.Item, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, nil, err
	}
	return r.Index(ctx, strings.TrimPrefix(id, "index/"))
}
