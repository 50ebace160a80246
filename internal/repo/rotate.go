package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/seal"
)

// Rotate makes a new master key, for all that is stored from now on. Old data
// keeps its keys, and passphrases stay. Processes that have the repository
// open go on, and learn the new key when they meet it.
func (r *Repo) Rotate(ctx context.Context) (Keyring, error) {
	u, err := r.changeable(ctx)
	if err != nil {
		return Keyring{}, err
	}
	if err := r.putRing(ctx, u, u.root, u.generation); err != nil {
		return Keyring{}, err
	}
	if err := r.announceKeys(ctx, u.number+1); err != nil {
		return Keyring{}, err
	}
	err = r.learn(ctx)
	r.lockKeys(ctx)
	return r.Keyring(), err
}

// changeable gives what a change of keys starts from: the newest keyring.
func (r *Repo) changeable(ctx context.Context) (*unlocked, error) {
	if err := r.refresh(ctx); err != nil {
		return nil, err
	}
	if err := r.learn(ctx); err != nil {
		return nil, err
	}
	u, s := r.keys.Now(), r.current()
	if damage := s.Damage(); len(damage) > 0 {
		return nil, fmt.Errorf("%s; keys cannot be changed before it is back: put it back from a copy of the repository", damage[0])
	}
	names, err := blob.Names(ctx, r.store, "keyring/")
	if err != nil {
		return nil, err
	}
	// A number that was used before would hide the keyring that had it.
	for _, name := range names {
		if n, err := ringNumber(name); err == nil && n > u.number && name == ringName(r.id, n) {
			return nil, fmt.Errorf("%s: %w, or it is damaged: it does not open; use another passphrase, or put it back from a copy of the repository", name, ErrKeys)
		}
	}
	if s.Keyring > u.number {
		return nil, fmt.Errorf("%s: %w: missing; put it back from a copy of the repository", ringName(r.id, s.Keyring), ErrDamaged)
	}
	return u, nil
}

// putRing stores the keyring that follows u, with a new master key: the moment
// in which the keys change.
func (r *Repo) putRing(ctx context.Context, u *unlocked, root *seal.Key, generation int) error {
	p, err := sealRing(r.id, root, generation, u.nextRing())
	if err != nil {
		return err
	}
	mine, err := blob.Claim(ctx, r.store, ringName(r.id, u.number+1), p)
	if err != nil {
		return fmt.Errorf("store the new keyring: %w", err)
	}
	if !mine {
		return errLostRace
	}
	return nil
}

var errLostRace = fmt.Errorf("%w by somebody else at the same time: nothing was done; run it again", ErrKeys)

// announceKeys tells other processes. The entry is sealed with the old master
// key, so that they can read it.
func (r *Repo) announceKeys(ctx context.Context, number int) error {
	e := chain.Sealed{Keyring: ringDigits(number)}
	if err := r.append(ctx, chain.Keys, chain.Clear{}, e, func(*chain.State) error { return nil }); err != nil {
		return fmt.Errorf("the keys are changed, but not recorded: %w", err)
	}
	return nil
}

// RootChange is what RotateRoot did.
type RootChange struct {
	Keyring
	Kept    []Slot `json:"kept"`    // the new slots
	Dropped []Slot `json:"dropped"` // what opens the repository no more
}

// RotateRoot makes a new root key and a new master key, and new slots for the
// passphrase that opened this Repo and for those given, which must be those of
// current slots; recovery keys count as passphrases. All other slots are
// dropped. Old data keeps its keys: whoever has opened the repository before
// and kept its keys can read that still.
func (r *Repo) RotateRoot(ctx context.Context, passphrases [][]byte) (RootChange, error) {
	u, err := r.changeable(ctx)
	if err != nil {
		return RootChange{}, err
	}
	kept, dropped, err := r.partSlots(ctx, u, passphrases)
	if err != nil {
		return RootChange{}, err
	}
	next := u.nextRoot()
	change := RootChange{Dropped: dropped}
	for i := range kept {
		k := &kept[i]
		if k.id, err = putSlot(ctx, r.store, r.id, next.root, k.cred.secret(k.kdf.Kind), k.newKDF(r.slotKDF, next.generation)); err != nil {
			return RootChange{}, errors.Join(err, r.dropSlots(ctx, kept[:i]))
		}
	}
	err = r.putRing(ctx, u, next.root, next.generation)
	if errors.Is(err, errLostRace) {
		return RootChange{}, errors.Join(err, r.dropSlots(ctx, kept))
	} else if err != nil {
		return RootChange{}, err // the keyring may be there: its slots must stay
	}
	for _, k := range kept { // before anything old is deleted
		v, err := unlock(ctx, r.store, r.id, means{passphrase: k.cred.text, first: k.id, removed: r.current().Removed})
		if err != nil || !bytes.Equal(v.root[:], next.root[:]) {
			return RootChange{}, fmt.Errorf("the new keys were read back and do not open: %w; nothing old was deleted", errors.Join(ErrDamaged, err))
		}
		if k.own || next.ring == nil {
			next = v
		}
	}
	if err := r.announceKeys(ctx, u.number+1); err != nil {
		return RootChange{}, err
	}
	r.keys.Set(next)
	r.lockKeys(ctx)
	if err := r.tidy(ctx); err != nil {
		return RootChange{}, err
	}
	slots, err := r.Slots(ctx)
	for _, s := range slots {
		if s.State == SlotCurrent {
			change.Kept = append(change.Kept, s)
		}
	}
	change.Keyring = r.Keyring()
	return change, err
}

// keptSlot is a slot that goes over to a new root key.
type keptSlot struct {
	id   string // of the new slot
	kdf  seal.KDF
	cred *credential
	own  bool // it opened this Repo
}

// newKDF is the old slot's label and kind, at today's cost.
func (k *keptSlot) newKDF(passphrase seal.KDF, generation int) seal.KDF {
	kdf := passphrase
	if k.kdf.Kind == seal.KindRecovery {
		kdf = seal.RecoveryKDF()
	}
	kdf.Label, kdf.Root = k.kdf.Label, generation
	return kdf
}

// partSlots finds the slots that passphrases open, and those that stay behind.
func (r *Repo) partSlots(ctx context.Context, u *unlocked, passphrases [][]byte) (kept []keptSlot, dropped []Slot, err error) {
	docs, err := readSlots(ctx, r.store, r.id)
	if err != nil {
		return nil, nil, err
	}
	if len(r.keys.Secret) > 0 {
		passphrases = append([][]byte{r.keys.Secret}, passphrases...)
	}
	taken := map[string]bool{}
	for i, p := range passphrases {
		c := newCredential(p)
		found := false
		for _, k := range docs {
			if r.slotState(u, k) != SlotCurrent {
				continue
			}
			if root, err := k.open(c); err != nil || !bytes.Equal(root[:], u.root[:]) {
				continue
			}
			found = true
			if !taken[k.id] {
				taken[k.id] = true
				kept = append(kept, keptSlot{kdf: k.kdf, cred: c, own: k.id == u.slot})
			}
			break
		}
		if !found {
			if c.mistyped != nil {
				return nil, nil, fmt.Errorf("passphrase %d: %w: it looks like a recovery key, but %w", i+1, ErrPassphrase, c.mistyped)
			}
			return nil, nil, fmt.Errorf("passphrase %d: %w", i+1, ErrPassphrase)
		}
	}
	if len(kept) == 0 {
		return nil, nil, fmt.Errorf("%w: at least one must go over to the new root key", ErrPassphrase)
	}
	for _, k := range docs {
		if !taken[k.id] && r.slotState(u, k) == SlotCurrent {
			dropped = append(dropped, r.slot(u, k))
		}
	}
	slices.SortFunc(dropped, byAge)
	return kept, dropped, nil
}

// dropSlots deletes the slots of a change that did not happen.
func (r *Repo) dropSlots(ctx context.Context, kept []keptSlot) (err error) {
	for _, k := range kept {
		err = errors.Join(err, r.forget(context.WithoutCancel(ctx), slotName(k.id)))
	}
	return err
}
