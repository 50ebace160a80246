package keyring

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

// Keys are what this process knows of a repository's keys, and follow their
// changes. Set comes before all else.
type Keys struct {
	Store  blob.Store
	Repo   [16]byte
	Secret []byte // the passphrase, to follow a change of the root key; may be empty

	now      atomic.Pointer[Unlocked]
	learning sync.Mutex // held while keyrings are read
	names    []string   // the keyrings that were read last; guarded by learning
}

// Now gives the newest keys that are known.
func (k *Keys) Now() *Unlocked { return k.now.Load() }

// Set makes these the keys that are known.
func (k *Keys) Set(u *Unlocked) { k.now.Store(u) }

// Newest is the master key for new objects, with its number.
func (k *Keys) Newest() (uint32, *seal.Key) { return k.Now().Ring.Newest() }

// Master is the master key of that number, or seal.ErrNoKey.
func (k *Keys) Master(n uint32) (*seal.Key, error) { return k.Now().Ring.Master(n) }

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
	rings, err := Read(ctx, k.Store, k.Repo)
	if err != nil {
		return err
	}
	u := rings.Open(old.Root)
	if (u == nil || rings.Newest() > u.Number) && len(k.Secret) > 0 {
		v, err := Unlock(ctx, k.Store, k.Repo, Means{Passphrase: k.Secret, First: old.Slot, Removed: removed})
		switch {
		case err == nil:
			u = v
		case !errors.Is(err, ErrPassphrase) && !errors.Is(err, seal.ErrDamaged):
			return err
		}
	}
	if u != nil && u.Number > old.Number {
		if !bytes.Equal(u.Ring.IDs, old.Ring.IDs) || !bytes.Equal(u.Ring.Sign, old.Ring.Sign) {
			return fmt.Errorf("keyring %d: %w: its keys for ids and signatures are not this repository's", u.Number, seal.ErrDamaged)
		}
		if bytes.Equal(u.Root[:], old.Root[:]) {
			u.Slot = old.Slot
		}
		k.Set(u)
	}
	k.names = names
	return nil
}

// ErrPassphrase: no key slot opens with it.
var ErrPassphrase = errors.New("wrong passphrase")

// Means is what to unlock a repository with.
type Means struct {
	Passphrase []byte          // or a recovery key
	Key        []byte          // the root key, if it is known; tried before the passphrase
	First      string          // the slot that is tried before others: each costs time
	Removed    map[string]bool // slots that open nothing, though a lock may keep them
}

// Unlock finds the root key, which may be given, or else is in the slot that the
// passphrase opens, and with it the newest keyring. It fails with ErrPassphrase,
// seal.ErrDamaged, seal.ErrVersion or the store's error.
func Unlock(ctx context.Context, s blob.Store, id [16]byte, m Means) (*Unlocked, error) {
	for try := 1; ; try++ {
		rings, err := Read(ctx, s, id)
		if err != nil {
			return nil, err
		}
		if len(m.Key) == len(seal.Key{}) {
			if u := rings.Open((*seal.Key)(bytes.Clone(m.Key))); u != nil {
				return u, nil
			}
		}
		u, unlockErr := unlockSlot(ctx, s, id, NewCredential(m.Passphrase), &rings, &m)
		if unlockErr == nil || try == 3 {
			return u, unlockErr
		}
		// The root key may have been changed between the two listings.
		again, err := Read(ctx, s, id)
		if err != nil {
			return nil, err
		}
		if again.Newest() == rings.Newest() {
			return nil, unlockErr
		}
	}
}

// unlockSlot tries the slots. One whose root key opens no keyring is left from
// a change of keys that was cut off.
func unlockSlot(ctx context.Context, s blob.Store, id [16]byte, c *Credential, rings *Rings, m *Means) (*Unlocked, error) {
	slots, err := ReadSlots(ctx, s, id)
	if err != nil {
		return nil, err
	}
	slots = slices.DeleteFunc(slots, func(k Slot) bool { return m.Removed[k.ID] })
	cost := func(k Slot) int {
		switch {
		case k.ID == m.First:
			return 0
		case c.recovery != nil && k.KDF.Kind == seal.KindRecovery:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(slots, func(a, b Slot) int { return cmp.Compare(cost(a), cost(b)) })
	var damage error
	var orphan bool
	tried := 0
	for _, k := range slots {
		root, err := k.Open(c)
		switch {
		case err == nil:
			if u := rings.Open(root); u != nil {
				u.Slot = k.ID
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
		return nil, rings.Damage
	case damage != nil && tried > 0:
		return nil, fmt.Errorf("%w, or that of a key slot that cannot be read: %w", ErrPassphrase, damage)
	case damage != nil:
		return nil, fmt.Errorf("no key slot opens: %w", damage)
	case tried == 0:
		return nil, fmt.Errorf("keys: %w: no key slot is left; put back keys/ from a copy of the repository, or with \"holdfast key import\"", seal.ErrDamaged)
	case c.Mistyped != nil:
		return nil, fmt.Errorf("%w: it looks like a recovery key, but %w", ErrPassphrase, c.Mistyped)
	}
	return nil, ErrPassphrase
}
