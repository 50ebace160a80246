package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/keyring"
	"holdfast/internal/repo/internal/seal"
)

// mirroring is how many objects are copied at once where their order does not matter.
const mirroring = 8

// mirror brings a tier's mirror up to date, and gives the state that it then
// holds, or a later one. It may run beside others, and be cut off anywhere.
func (r *Repo) mirror(ctx context.Context, tier string) (*chain.State, error) {
	for {
		s, err := r.tryMirror(ctx, tier)
		if errors.Is(err, errMoved) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("the copy of the index and the chain in tier %s: %w", tier, err)
		}
		return s, nil
	}
}

// tryMirror fails with errMoved when something was deleted that it was to copy.
func (r *Repo) tryMirror(ctx context.Context, tier string) (*chain.State, error) {
	// Listed before the chain is read: what is there and not in the inventory
	// then was dropped from it, and is not yet to come.
	far, err := r.tierStore(ctx, tier)
	if err != nil {
		return nil, err
	}
	m := &mirrorer{r: r, far: far, there: map[string]bool{}}
	for _, prefix := range []string{configName, "keys/", "keyring/", "index/", "chain/"} {
		names, err := blob.Names(ctx, far, prefix)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			m.there[name] = true
		}
	}
	if err := r.refresh(ctx); err != nil {
		return nil, err
	}
	m.s = r.current()
	if damage := r.Damage(); len(damage) > 0 {
		return nil, fmt.Errorf("%s; run check first", damage[0])
	}
	for _, step := range []func(context.Context) error{m.keys, m.indexes, m.chain, m.config, m.tidy} {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	return m.s, nil
}

// mirrorer is the work of one tryMirror.
type mirrorer struct {
	r     *Repo
	far   blob.Store
	s     *chain.State
	there map[string]bool // what the mirror has
	keep  map[string]bool // key slots and keyrings that are to stay
}

// copy copies an object that the mirror lacks. right tells whether its bytes
// are; nil where that cannot be told.
func (m *mirrorer) copy(ctx context.Context, name string, right func([]byte) bool) error {
	if m.there[name] {
		return nil
	}
	own, err := m.r.tiers.Own().Get(ctx, name, 0, -1)
	if errors.Is(err, blob.ErrNotExist) {
		if err := m.r.refresh(ctx); err != nil {
			return err
		}
		if m.r.current().Head != m.s.Head {
			return errMoved
		}
	}
	if err != nil {
		return err
	}
	if right != nil && !right(own) {
		return fmt.Errorf("%s: %w in the own store; run check first", name, ErrDamaged)
	}
	err = m.far.Put(ctx, name, own)
	if !errors.Is(err, blob.ErrExist) {
		return err
	}
	there, err := m.far.Get(ctx, name, 0, -1)
	if err == nil && !bytes.Equal(there, own) {
		err = fmt.Errorf("%w: %s is another one there", ErrForked, name)
	}
	return err
}

// keys copies slots, then keyrings, as they are at one moment: the keyrings are
// the same before and after the slots were listed, so slots for the newest one
// are among these.
func (m *mirrorer) keys(ctx context.Context) error {
	own := m.r.tiers.Own()
	for {
		rings, err := blob.Names(ctx, own, "keyring/")
		if err != nil {
			return err
		}
		docs, u, err := m.r.slots(ctx)
		if err != nil {
			return err
		}
		slots, err := blob.Names(ctx, own, "keys/")
		if err != nil {
			return err
		}
		again, err := blob.Names(ctx, own, "keyring/")
		if err != nil {
			return err
		}
		if !slices.Equal(rings, again) {
			continue
		}
		for _, k := range docs {
			if !slices.Contains(slots, keyring.SlotName(k.ID)) {
				return errMoved
			}
		}
		if m.r.remaining(docs, u, "") == 0 {
			return fmt.Errorf("keys: %w: no key slot opens the newest keyring", ErrDamaged)
		}
		m.keep = map[string]bool{}
		for _, name := range slices.Concat(slots, rings) {
			m.keep[name] = true
			if err := m.copy(ctx, name, nil); errors.Is(err, blob.ErrNotExist) {
				return errMoved // it was removed since
			} else if err != nil {
				return err
			}
		}
		return nil
	}
}

func (m *mirrorer) indexes(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(mirroring)
	for d := range m.s.Indexes {
		g.Go(func() error {
			return m.copy(gctx, index.Name(d), func(p []byte) bool { return sha256.Sum256(p) == d })
		})
	}
	return g.Wait()
}

// chain copies the entries in their order, unless there is no config yet.
func (m *mirrorer) chain(ctx context.Context) error {
	names, err := blob.Names(ctx, m.r.tiers.Own(), "chain/")
	if err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(1)
	if !m.there[configName] {
		g.SetLimit(mirroring)
	}
	for _, name := range names {
		if name > chain.Name(m.s.Head) {
			break
		}
		g.Go(func() error {
			err := m.copy(gctx, name, func(p []byte) bool {
				raw, err := seal.Parse(p, seal.Entry)
				return err == nil && raw.Verify(m.r.id, m.r.pub) == nil
			})
			if errors.Is(err, blob.ErrNotExist) && name < chain.Name(m.s.Older) {
				return nil // a prune has just deleted it, and nobody has to read it
			}
			return err
		})
	}
	return g.Wait()
}

// config makes the mirror a repository.
func (m *mirrorer) config(ctx context.Context) error { return m.copy(ctx, configName, nil) }

// tidy deletes what the own store has no more.
func (m *mirrorer) tidy(ctx context.Context) error {
	for name := range m.there {
		var gone bool
		switch dir, base, _ := strings.Cut(name, "/"); dir {
		case "index":
			d, err := seal.ParseDigest(base)
			gone = err == nil && !m.s.Indexes[d]
		case "keys", "keyring":
			if m.keep[name] {
				break
			}
			_, err := m.r.tiers.Own().Get(ctx, name, 0, 1)
			gone = errors.Is(err, blob.ErrNotExist)
		}
		if !gone {
			continue
		}
		if err := m.far.Delete(ctx, name); err != nil && !errors.Is(err, blob.ErrNotExist) && !errors.Is(err, blob.ErrLocked) {
			return err
		}
	}
	return nil
}
