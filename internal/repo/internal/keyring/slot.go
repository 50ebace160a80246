package keyring

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

// Slot is a key slot as stored.
type Slot struct {
	ID  string // 16 hex digits
	KDF seal.KDF
	Err error // why it cannot be read; then only ID is set
	raw *seal.Raw
}

// SlotName is the name of the slot with that id.
func SlotName(id string) string { return "keys/" + id }

// ReadSlots reads all key slots of a repository, the newest generation of the root
// key first. One that is damaged is no error: see its Err.
func ReadSlots(ctx context.Context, s blob.Store, id [16]byte) ([]Slot, error) {
	names, err := blob.Names(ctx, s, "keys/")
	if err != nil {
		return nil, err
	}
	var slots []Slot
	for _, name := range names {
		k := ReadSlot(ctx, s, id, strings.TrimPrefix(name, "keys/"))
		switch {
		case k.Err == nil, errors.Is(k.Err, seal.ErrDamaged), errors.Is(k.Err, seal.ErrVersion):
			slots = append(slots, k)
		case errors.Is(k.Err, seal.ErrForeign), errors.Is(k.Err, blob.ErrNotExist):
		default:
			return nil, k.Err
		}
	}
	slices.SortStableFunc(slots, func(a, b Slot) int { return cmp.Compare(b.KDF.Root, a.KDF.Root) })
	return slots, nil
}

// ReadSlot reads one slot; its Err says why it cannot be read.
func ReadSlot(ctx context.Context, s blob.Store, repo [16]byte, id string) Slot {
	k := Slot{ID: id}
	raw, err := document(ctx, s, SlotName(id), seal.Slot, repo)
	if err == nil {
		if err = seal.Unmarshal(raw.Clear, &k.KDF); err != nil {
			err = fmt.Errorf("%s: %w", SlotName(id), err)
		}
	}
	if err != nil {
		return Slot{ID: id, Err: err}
	}
	k.raw = raw
	return k
}

// Open gives the root key. It fails with ErrPassphrase, or as the slot cannot be
// read. It takes as long as the KDF says.
func (k *Slot) Open(c *Credential) (*seal.Key, error) {
	if k.Err != nil {
		return nil, k.Err
	}
	secret := c.Secret(k.KDF.Kind)
	if len(secret) == 0 {
		return nil, ErrPassphrase
	}
	kek, err := k.KDF.Key(secret)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", SlotName(k.ID), err)
	}
	root, err := k.raw.Open(&kek, "slot")
	if err != nil || len(root) != len(seal.Key{}) {
		return nil, ErrPassphrase
	}
	return (*seal.Key)(root), nil
}

// PutSlot stores a slot for a root key and gives its id, which may be there though
// an error is given. secret is the passphrase, or a recovery key's 32 bytes
// (Credential.Secret). kdf says all but salt, time and root id, which are new.
func PutSlot(ctx context.Context, s blob.Store, repo [16]byte, root *seal.Key, secret []byte, kdf seal.KDF) (string, error) {
	kdf.Salt = make([]byte, 16)
	rand.Read(kdf.Salt)
	kdf.Created = time.Now().UTC()
	kdf.RootID = root.RootID()
	kek, err := kdf.Key(secret)
	if err != nil {
		return "", err
	}
	p, err := seal.MarshalUnsigned(seal.NewHeader(seal.Slot, slotByDigest, 0, repo), kdf, root[:], &kek, "slot")
	if err != nil {
		return "", err
	}
	id := slotDigest(p)
	return id, s.Put(ctx, SlotName(id), p)
}

// slotByDigest is the kind of slots that are named by their bytes, so that
// damage shows to those as well who have not the passphrase.
const slotByDigest = 1

func slotDigest(p []byte) string {
	sum := sha256.Sum256(p)
	return hex.EncodeToString(sum[:8])
}

// SlotState says what a slot is good for.
type SlotState string

const (
	SlotCurrent SlotState = "current"
	// SlotOld: its root key was replaced, or it was removed; it awaits deletion.
	SlotOld SlotState = "old"
	// SlotUnfinished: made for a change of the root key that is under way or was cut off.
	SlotUnfinished SlotState = "unfinished"
	SlotDamaged    SlotState = "damaged"
)

// State says what a slot is good for. removed are those that a chain entry has
// removed.
func (k *Slot) State(u *Unlocked, removed map[string]bool) SlotState {
	switch {
	case k.Err != nil:
		return SlotDamaged
	case removed[k.ID]:
		return SlotOld
	case k.KDF.Root > u.Generation:
		return SlotUnfinished
	case k.KDF.RootID == u.Root.RootID(), k.KDF.RootID == "" && k.KDF.Root == u.Generation:
		return SlotCurrent
	}
	return SlotOld
}
