package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/seal"
)

// Undeleted is an object that somebody had deleted or written over, and of which
// the store still has the right version.
type Undeleted struct {
	Object string `json:"object"`
	What   string `json:"what"` // "deleted" or "overwritten"
}

// ErrHidden is returned by whoever finds that a repository does not open because
// somebody has deleted or overwritten something of it that can be brought back.
var ErrHidden = errors.New("somebody has deleted or overwritten what opens this repository, and the store has it still")

// Undelete brings back what somebody has deleted from a repository, or written
// over, on a store that keeps versions; on others it does nothing. It needs no
// key (docs/format.md §6.3), destroys nothing, and works where the repository
// does not even open. With ErrNotRepository there is none, nor was.
func Undelete(ctx context.Context, s blob.Store) ([]Undeleted, error) {
	return undelete(ctx, s, true, "")
}

// FindHidden lists what Undelete would bring back.
func FindHidden(ctx context.Context, s blob.Store) ([]Undeleted, error) {
	return undelete(ctx, s, false, "")
}

// WhyClosed adds to the error of a repository that does not open that somebody
// has hidden what opens it, if that is so: ErrHidden.
func WhyClosed(ctx context.Context, s blob.Store, err error) error {
	hidden, lookErr := undelete(ctx, s, false, configName, "keys/", "keyring/", "chain/")
	if len(hidden) == 0 || lookErr != nil {
		return err
	}
	return fmt.Errorf("%w (%s, with it %d in all): %w", ErrHidden, hidden[0].Object, len(hidden), err)
}

func undelete(ctx context.Context, s blob.Store, restore bool, prefixes ...string) ([]Undeleted, error) {
	v, ok := blob.As[blob.Versions](s)
	if !ok {
		return nil, nil
	}
	u := &undeleter{store: s, versions: v, restore: restore, hidden: map[string][]blob.Hidden{}, view: view{s, map[string][]byte{}}}
	for _, prefix := range prefixes {
		for h, err := range v.Hidden(ctx, prefix) {
			if err != nil {
				return nil, err
			}
			u.hidden[h.Name] = append(u.hidden[h.Name], h)
		}
	}
	if len(u.hidden) == 0 {
		return nil, nil
	}
	err := u.all(ctx)
	return u.back, err
}

type undeleter struct {
	store    blob.Store
	versions blob.Versions
	restore  bool
	hidden   map[string][]blob.Hidden // by name, newest first
	view     view                     // with what was brought back, or would be
	back     []Undeleted
}

// view is a store with some objects as they should be.
type view struct {
	blob  blob.Store
	right map[string][]byte
}

func (v view) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	p, ok := v.right[name]
	if !ok || off != 0 || n >= 0 {
		return v.blob.Get(ctx, name, off, n)
	}
	return bytes.Clone(p), nil
}

func (v view) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		for name, p := range v.right {
			if strings.HasPrefix(name, prefix) && !yield(blob.Info{Name: name, Size: int64(len(p))}, nil) {
				return
			}
		}
		for i, err := range v.blob.List(ctx, prefix) {
			if _, known := v.right[i.Name]; err == nil && known {
				continue
			}
			if !yield(i, err) {
				return
			}
		}
	}
}

func (v view) Put(context.Context, string, []byte) error { return errors.ErrUnsupported }
func (v view) Delete(context.Context, string) error      { return errors.ErrUnsupported }

// all goes from what proves to what is proved.
func (u *undeleter) all(ctx context.Context) error {
	if err := u.object(ctx, configName, func(p []byte) bool { _, _, err := parseConfig(p); return err == nil }); err != nil {
		return err
	}
	k, err := newKeyless(ctx, u.view, CheckOptions{})
	if err != nil {
		return err
	}
	names := slices.Sorted(maps.Keys(u.hidden))
	digests := false
	for _, name := range names {
		dir, _, _ := strings.Cut(name, "/")
		switch dir {
		case "chain":
			err = u.object(ctx, name, func(p []byte) bool { return k.isEntry(p, name) })
		case "keys":
			err = u.object(ctx, name, func(p []byte) bool { return k.isOurs(p, seal.Slot) })
		case "keyring":
			err = u.object(ctx, name, func(p []byte) bool { return k.isOurs(p, seal.Keyring) })
		case "index", "packs":
			digests = true
		}
		if err != nil {
			return err
		}
	}
	if !digests {
		return nil
	}
	// Of these only what is needed.
	if err := k.chain(ctx); err != nil {
		return err
	}
	for d := range k.live {
		if err := u.named(ctx, index.Name(d), d); err != nil {
			return err
		}
	}
	if err := k.indexes(ctx); err != nil {
		return err
	}
	for d, info := range k.packs {
		name := packName(d)
		if h := u.hidden[name]; len(h) == 1 && h[0].Deleted && h[0].Size == info.size {
			// There is nothing that it could be worse than: it is not read, which
			// may be all that the repository holds, before it is there again.
			if err := u.bring(ctx, h[0]); err != nil {
				return err
			}
		} else if err := u.named(ctx, name, d); err != nil {
			return err
		}
	}
	return nil
}

// isEntry reports whether these are the bytes of the entry of that name.
func (k *keyless) isEntry(p []byte, name string) bool {
	n, ok := chain.Number(name)
	_, _, err := chain.Parse(p, n, k.id, k.pub)
	return ok && err == nil
}

func (k *keyless) isOurs(p []byte, magic string) bool {
	raw, err := seal.Parse(p, magic)
	return err == nil && raw.Header.Repo == k.id
}

// named brings back an object that is named by its digest.
func (u *undeleter) named(ctx context.Context, name string, digest [32]byte) error {
	if len(u.hidden[name]) == 0 {
		return nil
	}
	shown, err := u.store.Get(ctx, name, 0, -1)
	if err == nil && sha256.Sum256(shown) == digest {
		return nil
	} else if err != nil && !errors.Is(err, blob.ErrNotExist) {
		return err
	}
	return u.object(ctx, name, func(p []byte) bool { return sha256.Sum256(p) == digest })
}

// object makes the oldest right version the one that is shown.
func (u *undeleter) object(ctx context.Context, name string, right func([]byte) bool) error {
	for _, h := range slices.Backward(u.hidden[name]) {
		p, err := u.versions.GetHidden(ctx, h)
		if errors.Is(err, blob.ErrNotExist) {
			continue // it has gone since
		} else if err != nil {
			return err
		}
		if !right(p) {
			continue
		}
		shown, err := u.store.Get(ctx, name, 0, -1)
		if err != nil && !errors.Is(err, blob.ErrNotExist) {
			return err
		}
		if err == nil && bytes.Equal(shown, p) {
			return nil // it was written over, and brought back
		}
		if !strings.HasPrefix(name, "packs/") {
			u.view.right[name] = p
		}
		return u.bring(ctx, h)
	}
	return nil
}

func (u *undeleter) bring(ctx context.Context, h blob.Hidden) error {
	if u.restore {
		if err := u.versions.Restore(ctx, h); err != nil {
			return fmt.Errorf("bring back %s, which somebody has deleted: %w", h.Name, err)
		}
	}
	what := "overwritten"
	if h.Deleted {
		what = "deleted"
	}
	u.back = append(u.back, Undeleted{h.Name, what})
	return nil
}
