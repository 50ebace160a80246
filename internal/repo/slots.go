package repo

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/keyring"
	"holdfast/internal/repo/internal/seal"
)

var (
	ErrNoSlot    = errors.New("no such key")
	ErrLastSlot  = errors.New("it is the last key: without it nobody can open the repository")
	ErrSlotInUse = errors.New("it is the key that opened the repository just now")
)

// KeyKind says what opens a slot.
type KeyKind string

const (
	Passphrase KeyKind = "passphrase"
	Recovery   KeyKind = "recovery" // a recovery key
)

// SlotState says what a slot is good for.
type SlotState = keyring.SlotState

const (
	SlotCurrent = keyring.SlotCurrent
	// SlotOld: its root key was replaced, or it was removed; it awaits deletion.
	SlotOld = keyring.SlotOld
	// SlotUnfinished: made for a change of the root key that is under way or was cut off.
	SlotUnfinished = keyring.SlotUnfinished
	SlotDamaged    = keyring.SlotDamaged
)

// Slot is a key slot: one passphrase or recovery key that opens the repository.
type Slot struct {
	ID         string    `json:"slot"` // 16 hex digits
	Label      string    `json:"label"`
	Kind       KeyKind   `json:"kind"`
	Created    time.Time `json:"created"`
	State      SlotState `json:"state"`
	InUse      bool      `json:"in_use"`     // it opened this Repo
	Generation int       `json:"generation"` // of its root key
	KDF        KDFCost   `json:"kdf"`
	Problem    string    `json:"problem,omitempty"` // of a damaged one
}

// KDFCost is what trying a passphrase costs (Argon2id).
type KDFCost struct {
	Time      uint32 `json:"time"`
	MemoryKiB uint32 `json:"memory_kib"`
	Threads   uint8  `json:"threads"`
}

// Keyring tells of the newest keyring.
type Keyring struct {
	Number     int `json:"keyring"`    // counts changes
	Generation int `json:"generation"` // of the root key
	Masters    int `json:"masters"`    // how many master keys there are; the newest is used for new data
}

// Keyring tells of the keyring that is in use.
func (r *Repo) Keyring() Keyring {
	u := r.keys.Now()
	return Keyring{u.Number, u.Generation, len(u.Ring.Masters)}
}

// Head is the newest entry of the chain.
type Head struct {
	Number uint64    `json:"number"`
	Time   time.Time `json:"time"` // for people
}

// Head reads the chain to its end and tells of it. With an empty chain its time
// is the repository's making.
func (r *Repo) Head(ctx context.Context) (Head, error) {
	if err := r.refresh(ctx); err != nil {
		return Head{}, err
	}
	s := r.current()
	return Head{s.Head, s.Time}, nil
}

// Slots lists all key slots, the oldest first.
func (r *Repo) Slots(ctx context.Context) ([]Slot, error) {
	docs, u, err := r.slots(ctx)
	if err != nil {
		return nil, err
	}
	slots := make([]Slot, len(docs))
	for i, k := range docs {
		slots[i] = r.slot(u, k)
	}
	slices.SortFunc(slots, byAge)
	return slots, nil
}

func byAge(a, b Slot) int { return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID)) }

// slots reads slots and keyrings anew.
func (r *Repo) slots(ctx context.Context) ([]keyring.Slot, *keyring.Unlocked, error) {
	if err := r.refresh(ctx); err != nil {
		return nil, nil, err
	}
	if err := r.learn(ctx); err != nil {
		return nil, nil, err
	}
	docs, err := keyring.ReadSlots(ctx, r.store, r.id)
	return docs, r.keys.Now(), err
}

func (r *Repo) slot(u *keyring.Unlocked, k keyring.Slot) Slot {
	if k.Err != nil {
		return Slot{ID: k.ID, State: SlotDamaged, Problem: k.Err.Error()}
	}
	s := Slot{ID: k.ID, Label: k.KDF.Label, Kind: Passphrase, Created: k.KDF.Created, State: r.slotState(u, k), InUse: k.ID == u.Slot,
		Generation: k.KDF.Root, KDF: KDFCost{k.KDF.Time, k.KDF.Memory, k.KDF.Threads}}
	if k.KDF.Kind == seal.KindRecovery {
		s.Kind = Recovery
	}
	return s
}

func (r *Repo) slotState(u *keyring.Unlocked, k keyring.Slot) SlotState {
	return k.State(u, r.current().Removed)
}

// maxLabel bounds a label, bytes.
const maxLabel = 100

// checkLabel wants a label that fits a line. It is stored in clear.
func checkLabel(label string) error {
	bad := func(c rune) bool { return !unicode.IsPrint(c) }
	if len(label) > maxLabel || !utf8.ValidString(label) || strings.ContainsFunc(label, bad) || strings.TrimSpace(label) != label {
		return fmt.Errorf("label %.120q: at most %d bytes of printable text", label, maxLabel)
	}
	return nil
}

// AddPassphrase makes a slot for a further passphrase. When it returns nil the
// slot is durable, and was read back and opened.
func (r *Repo) AddPassphrase(ctx context.Context, label string, passphrase []byte) (Slot, error) {
	if len(passphrase) == 0 {
		return Slot{}, fmt.Errorf("%w: it is empty", ErrPassphrase)
	}
	return r.addSlot(ctx, label, keyring.NewCredential(passphrase), r.slotKDF)
}

// AddRecovery makes a slot for a new recovery key, which it gives in the form in
// which it is printed.
func (r *Repo) AddRecovery(ctx context.Context, label string) (Slot, string, error) {
	c, printed := keyring.NewRecovery()
	s, err := r.addSlot(ctx, label, c, seal.RecoveryKDF())
	return s, printed, err
}

func (r *Repo) addSlot(ctx context.Context, label string, c *keyring.Credential, kdf seal.KDF) (Slot, error) {
	if err := checkLabel(label); err != nil {
		return Slot{}, err
	}
	docs, u, err := r.slots(ctx)
	if err != nil {
		return Slot{}, err
	}
	for _, k := range docs {
		if k.KDF.Kind == kdf.Kind && r.slotState(u, k) == SlotCurrent {
			if _, err := k.Open(c); err == nil {
				return Slot{}, fmt.Errorf("key %s has that passphrase already", k.ID)
			}
		}
	}
	kdf.Label, kdf.Root = label, u.Generation
	var k keyring.Slot
	id, err := keyring.PutSlot(ctx, r.store, r.id, u.Root, c.Secret(kdf.Kind), kdf)
	if err == nil {
		k, err = r.readBack(ctx, id, u, c)
	}
	if err != nil {
		if id != "" { // a Put that failed may have done its work
			err = errors.Join(err, r.forget(context.WithoutCancel(ctx), keyring.SlotName(id)))
		}
		return Slot{}, err
	}
	r.lockKeys(ctx)
	return r.slot(u, k), nil
}

// readBack proves that a new slot opens the repository.
func (r *Repo) readBack(ctx context.Context, id string, u *keyring.Unlocked, c *keyring.Credential) (keyring.Slot, error) {
	k := keyring.ReadSlot(ctx, r.store, r.id, id)
	if k.Err != nil {
		return k, k.Err
	}
	root, err := k.Open(c)
	if err != nil || !bytes.Equal(root[:], u.Root[:]) {
		return k, fmt.Errorf("the new key slot was read back and does not open: %w", errors.Join(ErrDamaged, err))
	}
	if err := r.learn(ctx); err != nil {
		return k, err
	}
	rings, err := keyring.Read(ctx, r.store, r.id)
	if err != nil {
		return k, err
	}
	if now := rings.Open(u.Root); now == nil || now.Number != rings.Newest() {
		return k, fmt.Errorf("%w meanwhile: nothing was added; run it again", ErrKeys)
	}
	return k, nil
}

// RemoveSlot removes a slot: what it was made for opens the repository no more.
// It refuses the last one with ErrLastSlot, and with ErrSlotInUse the one that
// opened this Repo, unless inUse names it too.
func (r *Repo) RemoveSlot(ctx context.Context, id, inUse string) error {
	if err := r.MayRemove(ctx, id, inUse); err != nil {
		return err
	}
	docs, u, err := r.slots(ctx)
	if err != nil {
		return err
	}
	stays := func(*chain.State) error {
		if r.remaining(docs, u, id) == 0 {
			return ErrLastSlot
		}
		return nil
	}
	e := chain.Sealed{Keyring: ringDigits(u.Number), Removed: []string{id}}
	if err := r.append(ctx, chain.Keys, chain.Clear{}, e, stays); err != nil {
		return fmt.Errorf("remove key %s: %w", id, err)
	}
	if err := r.forget(ctx, keyring.SlotName(id)); err != nil {
		return fmt.Errorf("key %s could not be deleted, and still opens the repository: %w", id, err)
	}
	return r.tidy(ctx)
}

func ringDigits(n int) string { return fmt.Sprintf("%08d", n) }

// MayRemove says why RemoveSlot would refuse.
func (r *Repo) MayRemove(ctx context.Context, id, inUse string) error {
	docs, u, err := r.slots(ctx)
	if err != nil {
		return err
	}
	for _, k := range docs {
		switch {
		case k.ID != id:
		case r.slotState(u, k) == SlotUnfinished:
			return fmt.Errorf("key %s belongs to a change of keys that is under way, or was cut off; the next one removes it", id)
		case r.remaining(docs, u, id) == 0:
			return fmt.Errorf("key %s: %w", id, ErrLastSlot)
		case k.ID == u.Slot && inUse != id:
			return fmt.Errorf("key %s: %w", id, ErrSlotInUse)
		default:
			return nil
		}
	}
	return fmt.Errorf("key %s: %w", id, ErrNoSlot)
}

// remaining counts the slots that open the repository when id does no more.
func (r *Repo) remaining(docs []keyring.Slot, u *keyring.Unlocked, id string) (n int) {
	for _, k := range docs {
		if k.ID != id && r.slotState(u, k) == SlotCurrent {
			n++
		}
	}
	return n
}

// tidy deletes what changes of keys have left behind: slots that were removed or
// whose root key is no more, and keyrings under such. A slot of a generation
// to come is left alone: its change may be under way.
func (r *Repo) tidy(ctx context.Context) error {
	docs, u, err := r.slots(ctx)
	if err != nil {
		return err
	}
	rings, err := keyring.Read(ctx, r.store, r.id)
	if err != nil {
		return err
	}
	if newest := max(rings.Newest(), r.current().Keyring); newest != u.Number {
		return nil // whoever knows the newest one tidies
	}
	if r.remaining(docs, u, "") == 0 {
		return fmt.Errorf("keys: %w: no key slot opens the newest keyring; nothing was deleted", ErrDamaged)
	}
	for _, k := range docs {
		if r.slotState(u, k) == SlotOld || r.current().Removed[k.ID] {
			err = errors.Join(err, r.forget(ctx, keyring.SlotName(k.ID)))
		}
	}
	for _, d := range rings.List {
		if g := d.Generation(); 0 < g && g < u.Generation && d.Number < u.Number {
			err = errors.Join(err, r.forget(ctx, d.Name))
		}
	}
	if err != nil {
		return fmt.Errorf("the keys are changed, but an old one could not be deleted: %w", err)
	}
	return nil
}

// forget deletes an object that is over. It may be gone already, or be locked:
// then it stays until its lock has ended, and is over all the same.
func (r *Repo) forget(ctx context.Context, name string) error {
	if err := r.store.Delete(ctx, name); !errors.Is(err, blob.ErrNotExist) && !errors.Is(err, blob.ErrLocked) {
		return err
	}
	return nil
}
