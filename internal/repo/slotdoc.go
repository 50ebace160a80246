package repo

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

// slotDoc is a key slot as stored.
type slotDoc struct {
	id  string
	kdf seal.KDF
	raw *seal.Raw
	err error // why it cannot be read; then only id is set
}

func slotName(id string) string { return "keys/" + id }

// readSlots reads all key slots of a repository, the newest generation first.
func readSlots(ctx context.Context, s blob.Store, id [16]byte) ([]slotDoc, error) {
	names, err := blob.Names(ctx, s, "keys/")
	if err != nil {
		return nil, err
	}
	var slots []slotDoc
	for _, name := range names {
		k := readSlot(ctx, s, id, strings.TrimPrefix(name, "keys/"))
		switch {
		case k.err == nil, errors.Is(k.err, ErrDamaged), errors.Is(k.err, ErrVersion):
			slots = append(slots, k)
		case errors.Is(k.err, seal.ErrForeign), errors.Is(k.err, blob.ErrNotExist):
		default:
			return nil, k.err
		}
	}
	slices.SortStableFunc(slots, func(a, b slotDoc) int { return cmp.Compare(b.kdf.Root, a.kdf.Root) })
	return slots, nil
}

// open gives the root key, or ErrPassphrase.
func (k *slotDoc) open(c *credential) (*seal.Key, error) {
	if k.err != nil {
		return nil, k.err
	}
	secret := c.secret(k.kdf.Kind)
	if len(secret) == 0 {
		return nil, ErrPassphrase
	}
	kek, err := k.kdf.Key(secret)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", slotName(k.id), err)
	}
	root, err := k.raw.Open(&kek, "slot")
	if err != nil || len(root) != len(seal.Key{}) {
		return nil, ErrPassphrase
	}
	return (*seal.Key)(root), nil
}

// putSlot stores a slot for a root key and gives its id. kdf says all but salt and
// time, which are new.
func putSlot(ctx context.Context, s blob.Store, repo [16]byte, root *seal.Key, secret []byte, kdf seal.KDF) (string, error) {
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
	return id, s.Put(ctx, slotName(id), p)
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

// state says what a slot is good for. removed are those that a chain entry has
// removed.
func (k *slotDoc) state(u *unlocked, removed map[string]bool) SlotState {
	switch {
	case k.err != nil:
		return SlotDamaged
	case removed[k.id]:
		return SlotOld
	case k.kdf.Root > u.generation:
		return SlotUnfinished
	case k.kdf.RootID == u.root.RootID(), k.kdf.RootID == "" && k.kdf.Root == u.generation:
		return SlotCurrent
	}
	return SlotOld
}

// readSlot reads one slot; its err says why it cannot be read.
func readSlot(ctx context.Context, s blob.Store, repo [16]byte, id string) slotDoc {
	k := slotDoc{id: id}
	raw, err := document(ctx, s, slotName(id), seal.Slot, repo)
	if err == nil {
		if err = seal.Unmarshal(raw.Clear, &k.kdf); err != nil {
			err = fmt.Errorf("%s: %w", slotName(id), err)
		}
	}
	if err != nil {
		return slotDoc{id: id, err: err}
	}
	k.raw = raw
	return k
}
