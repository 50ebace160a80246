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
	return Keyring{u.number, u.generation, len(u.ring.Masters)}
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
func (r *Repo) slots(ctx context.Context) ([]slotDoc, *unlocked, error) {
	if err := r.refresh(ctx); err != nil {
		return nil, nil, err
	}
	if err := r.learn(ctx); err != nil {
		return nil, nil, err
	}
	docs, err := readSlots(ctx, r.store, r.id)
	return docs, r.keys.Now(), err
}

func (r *Repo) slot(u *unlocked, k slotDoc) Slot {
	if k.err != nil {
		return Slot{ID: k.id, State: SlotDamaged, Problem: k.err.Error()}
	}
	s := Slot{ID: k.id, Label: k.kdf.Label, Kind: Passphrase, Created: k.kdf.Created, State: r.slotState(u, k), InUse: k.id == u.slot,
		Generation: k.kdf.Root, KDF: KDFCost{k.kdf.Time, k.kdf.Memory, k.kdf.Threads}}
	if k.kdf.Kind == seal.KindRecovery {
		s.Kind = Recovery
	}
	return s
}

func (r *Repo) slotState(u *unlocked, k slotDoc) SlotState { return k.state(u, r.current().Removed) }

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
	return r.addSlot(ctx, label, newCredential(passphrase), r.slotKDF)
}

// AddRecovery makes a slot for a new recovery key, which it gives in the form in
// which it is printed.
func (r *Repo) AddRecovery(ctx context.Context, label string) (Slot, string, error) {
	c, printed := newRecovery()
	s, err := r.addSlot(ctx, label, c, seal.RecoveryKDF())
	return s, printed, err
}

func (r *Repo) addSlot(ctx context.Context, label string, c *credential, kdf seal.KDF) (Slot, error) {
	if err := checkLabel(label); err != nil {
		return Slot{}, err
	}
	docs, u, err := r.slots(ctx)
	if err != nil {
		return Slot{}, err
	}
	for _, k := range docs {
		if k.kdf.Kind == kdf.Kind && r.slotState(u, k) == SlotCurrent {
			if _, err := k.open(c); err == nil {
				return Slot{}, fmt.Errorf("key %s has that passphrase already", k.id)
			}
		}
	}
	kdf.Label, kdf.Root = label, u.generation
	var k slotDoc
	id, err := putSlot(ctx, r.store, r.id, u.root, c.secret(kdf.Kind), kdf)
	if err == nil {
		k, err = r.readBack(ctx, id, u, c)
	}
	if err != nil {
		if id != "" { // a Put that failed may have done its work
			err = errors.Join(err, r.forget(context.WithoutCancel(ctx), slotName(id)))
		}
		return Slot{}, err
	}
	r.lockKeys(ctx)
	return r.slot(u, k), nil
}

// readBack proves that a new slot opens the repository.
func (r *Repo) readBack(ctx context.Context, id string, u *unlocked, c *credential) (slotDoc, error) {
	k := readSlot(ctx, r.store, r.id, id)
	if k.err != nil {
		return k, k.err
	}
	root, err := k.open(c)
	if err != nil || !bytes.Equal(root[:], u.root[:]) {
		return k, fmt.Errorf("the new key slot was read back and does not open: %w", errors.Join(ErrDamaged, err))
	}
	if err := r.learn(ctx); err != nil {
		return k, err
	}
	rings, err := readRings(ctx, r.store, r.id)
	if err != nil {
		return k, err
	}
	if now := rings.open(u.root); now == nil || now.number != rings.newest() {
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
	e := chain.Sealed{Keyring: ringDigits(u.number), Removed: []string{id}}
	if err := r.append(ctx, chain.Keys, chain.Clear{}, e, stays); err != nil {
		return fmt.Errorf("remove key %s: %w", id, err)
	}
	if err := r.forget(ctx, slotName(id)); err != nil {
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
		case k.id != id:
		case r.slotState(u, k) == SlotUnfinished:
			return fmt.Errorf("key %s belongs to a change of keys that is under way, or was cut off; the next one removes it", id)
		case r.remaining(docs, u, id) == 0:
			return fmt.Errorf("key %s: %w", id, ErrLastSlot)
		case k.id == u.slot && inUse != id:
			return fmt.Errorf("key %s: %w", id, ErrSlotInUse)
		default:
			return nil
		}
	}
	return fmt.Errorf("key %s: %w", id, ErrNoSlot)
}

// remaining counts the slots that open the repository when id does no more.
func (r *Repo) remaining(docs []slotDoc, u *unlocked, id string) (n int) {
	for _, k := range docs {
		if k.id != id && r.slotState(u, k) == SlotCurrent {
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
	rings, err := readRings(ctx, r.store, r.id)
	if err != nil {
		return err
	}
	if newest := max(rings.newest(), r.current().Keyring); newest != u.number {
		return nil // whoever knows the newest one tidies
	}
	if r.remaining(docs, u, "") == 0 {
		return fmt.Errorf("keys: %w: no key slot opens the newest keyring; nothing was deleted", ErrDamaged)
	}
	for _, k := range docs {
		if r.slotState(u, k) == SlotOld || r.current().Removed[k.id] {
			err = errors.Join(err, r.forget(ctx, slotName(k.id)))
		}
	}
	for _, d := range rings.list {
		if g := d.generation(); 0 < g && g < u.generation && d.number < u.number {
			err = errors.Join(err, r.forget(ctx, d.name))
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
