package repo

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

// Keys are what this process knows of a repository's keys. They are replaced when
// others have changed them. Safe in parallel.
type Keys struct {
	Store  blob.Store
	Repo   [16]byte
	Secret []byte // the passphrase, to follow a change of the root key; may be empty

	now      atomic.Pointer[unlocked]
	learning sync.Mutex // held while keyrings are read
	names    []string   // the keyrings that were read last; guarded by learning
}

// Now gives the newest keys that are known; nil before Set.
func (k *Keys) Now() *unlocked { return k.now.Load() }

// Set makes these the keys that are known.
func (k *Keys) Set(u *unlocked) { k.now.Store(u) }

// Newest is the master key for new objects, with its number.
func (k *Keys) Newest() (uint32, *seal.Key) { return k.Now().ring.Newest() }

// Master is the master key of that number, or seal.ErrNoKey.
func (k *Keys) Master(n uint32) (*seal.Key, error) { return k.Now().ring.Master(n) }

// Learn takes in keyrings that were made since the repository was opened, if it
// can: one under a new root key opens only with the passphrase. removed are key
// slots that open nothing any more.
func (k *Keys) Learn(ctx context.Context, removed map[string]bool) error {
	k.learning.Lock()
	defer k.learning.Unlock()
	names, err := blob.Names(ctx, k.Store, "keyring/")
	if err != nil {
		return err
	}
	if slices.Equal(names, k.names) {
		return nil
	}
	old := k.Now()
	rings, err := readRings(ctx, k.Store, k.Repo)
	if err != nil {
		return err
	}
	u := rings.open(old.root)
	if (u == nil || rings.newest() > u.number) && len(k.Secret) > 0 {
		v, err := unlock(ctx, k.Store, k.Repo, means{passphrase: k.Secret, first: old.slot, removed: removed})
		switch {
		case err == nil:
			u = v
		case !errors.Is(err, ErrPassphrase) && !errors.Is(err, ErrDamaged):
			return err
		}
	}
	if u != nil && u.number > old.number {
		if !bytes.Equal(u.ring.IDs, old.ring.IDs) || !bytes.Equal(u.ring.Sign, old.ring.Sign) {
			return fmt.Errorf("keyring %d: %w: its keys for ids and signatures are not this repository's", u.number, ErrDamaged)
		}
		if bytes.Equal(u.root[:], old.root[:]) {
			u.slot = old.slot
		}
		k.Set(u)
	}
	k.names = names
	return nil
}

// ErrPassphrase: no key slot opens with it.
var ErrPassphrase = errors.New("wrong passphrase")

// means is what to unlock a repository with.
type means struct {
	passphrase []byte          // or a recovery key
	key        []byte          // the root key, if it is known; tried before the passphrase
	first      string          // the slot that is tried before others: each costs time
	removed    map[string]bool // slots that open nothing, though a lock may keep them
}

// unlock finds the root key, which may be given, or else is in the slot that the
// passphrase opens, and with it the newest keyring. It fails with ErrPassphrase,
// seal.ErrDamaged, seal.ErrVersion or the store's error.
func unlock(ctx context.Context, s blob.Store, id [16]byte, m means) (*unlocked, error) {
	for try := 1; ; try++ {
		rings, err := readRings(ctx, s, id)
		if err != nil {
			return nil, err
		}
		if len(m.key) == len(seal.Key{}) {
			if u := rings.open((*seal.Key)(bytes.Clone(m.key))); u != nil {
				return u, nil
			}
		}
		u, unlockErr := unlockSlot(ctx, s, id, newCredential(m.passphrase), &rings, &m)
		if unlockErr == nil || try == 3 {
			return u, unlockErr
		}
		// The root key may have been changed between the two listings.
		again, err := readRings(ctx, s, id)
		if err != nil {
			return nil, err
		}
		if again.newest() == rings.newest() {
			return nil, unlockErr
		}
	}
}

// unlockSlot tries the slots. One whose root key opens no keyring is left from
// a change of keys that was cut off.
func unlockSlot(ctx context.Context, s blob.Store, id [16]byte, c *credential, rings *rings, m *means) (*unlocked, error) {
	slots, err := readSlots(ctx, s, id)
	if err != nil {
		return nil, err
	}
	slots = slices.DeleteFunc(slots, func(k slotDoc) bool { return m.removed[k.id] })
	cost := func(k slotDoc) int {
		switch {
		case k.id == m.first:
			return 0
		case c.recovery != nil && k.kdf.Kind == seal.KindRecovery:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(slots, func(a, b slotDoc) int { return cmp.Compare(cost(a), cost(b)) })
	var damage error
	var orphan bool
	tried := 0
	for _, k := range slots {
		root, err := k.open(c)
		switch {
		case err == nil:
			if u := rings.open(root); u != nil {
				u.slot = k.id
				return u, nil
			}
			orphan = true
		case errors.Is(err, ErrPassphrase):
			tried++
		default:
			damage = errors.Join(damage, err)
		}
	}
	switch {
	case orphan:
		return nil, rings.damage
	case damage != nil && tried > 0:
		return nil, fmt.Errorf("%w, or that of a key slot that cannot be read: %w", ErrPassphrase, damage)
	case damage != nil:
		return nil, fmt.Errorf("no key slot opens: %w", damage)
	case tried == 0:
		return nil, fmt.Errorf("keys: %w: no key slot is left; put back keys/ from a copy of the repository, or with \"holdfast key import\"", ErrDamaged)
	case c.mistyped != nil:
		return nil, fmt.Errorf("%w: it looks like a recovery key, but %w", ErrPassphrase, c.mistyped)
	}
	return nil, ErrPassphrase
}
