// Package keyring is what opens a repository (docs/format.md §2): key slots,
// keyrings, and the passphrases and recovery keys of those who open it.
//
// # From a passphrase to the keys
//
//	passphrase ─ Argon2id ─ Slot ── root key ── Ring ── master keys, keys for ids and signatures
//
// A Slot is stored for each passphrase or recovery key, and seals the root key. A
// Ring seals all other keys under the root key. Unlock goes from left to right;
// Keys keeps the result, and takes in what others change.
//
// # How keys change
//
// A keyring's name holds its number and the repository's id, so that of two
// processes that change the keys at once one finds the name taken: creating
// keyring n+1 is the moment in which the keys change. What a change needs to
// be of use, new slots, is stored before it; what it makes useless, old slots
// and keyrings, is deleted after it. The chain entry that follows tells other
// processes, and shows later that a keyring has been lost.
//
// A slot is removed by a chain entry first and deleted then. The chain orders
// removals, so that two of them cannot take each other for the slot that stays.
//
// That order is package repo's to keep. Here nothing is deleted, and nothing is
// stored but by PutSlot. All is safe in parallel.
package keyring

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

// Unlocked is what opens a repository's objects. It is replaced as a whole,
// never changed.
type Unlocked struct {
	Root       *seal.Key
	Slot       string // id of the slot that it came from; "" when it was given
	Generation int    // of the root key
	Number     int    // of the keyring
	Name       string // of the keyring
	Ring       *seal.Ring
}

// Rings are the keyrings of a repository.
type Rings struct {
	List   []Ring           // that can be read, the newest first
	Damage error            // of those that cannot, the last; never nil
	Bad    map[string]error // all of them, by name
}

// Ring is a keyring as stored.
type Ring struct {
	Name   string
	Number int // counts changes of the keys, from 1
	raw    *seal.Raw
}

// Name is the name of a repository's keyring of that number.
func Name(repo [16]byte, number int) string {
	return fmt.Sprintf("keyring/%08d-%s", number, hex.EncodeToString(repo[:4]))
}

// Number is the number of the keyring of that name; seal.ErrDamaged for no
// keyring's name.
func Number(name string) (int, error) {
	digits, _, _ := strings.Cut(strings.TrimPrefix(name, "keyring/"), "-")
	n, err := strconv.Atoi(digits)
	if err != nil || len(digits) != 8 || n < 1 {
		return 0, fmt.Errorf("%s: %w: not a keyring's name", name, seal.ErrDamaged)
	}
	return n, nil
}

// Read reads all keyrings of a repository. One that is damaged is no error.
func Read(ctx context.Context, s blob.Store, id [16]byte) (Rings, error) {
	names, err := blob.Names(ctx, s, "keyring/")
	if err != nil {
		return Rings{}, err
	}
	r := Rings{Damage: fmt.Errorf("keyring: %w: missing", seal.ErrDamaged), Bad: map[string]error{}}
	for _, name := range slices.Backward(names) {
		raw, err := document(ctx, s, name, seal.Keyring, id)
		var n int
		if err == nil {
			n, err = Number(name)
		}
		switch {
		case err == nil:
			r.List = append(r.List, Ring{name, n, raw})
		case errors.Is(err, seal.ErrForeign), errors.Is(err, blob.ErrNotExist):
		case errors.Is(err, seal.ErrDamaged), errors.Is(err, seal.ErrVersion):
			r.Damage = err
			r.Bad[name] = err
		default:
			return Rings{}, err
		}
	}
	return r, nil
}

// Newest is the greatest number; 0 when there is none.
func (r *Rings) Newest() int {
	if len(r.List) == 0 {
		return 0
	}
	return r.List[0].Number
}

// Open gives the newest keyring that the root key opens, or nil.
func (r *Rings) Open(root *seal.Key) *Unlocked {
	for _, d := range r.List {
		content, err := d.raw.Open(root, "keyring")
		if err != nil {
			continue
		}
		var clear ringClear
		ring, err := seal.ParseRing(content)
		if err == nil {
			err = seal.Unmarshal(d.raw.Clear, &clear)
		}
		if err != nil {
			r.Damage = fmt.Errorf("%s: %w", d.Name, err)
			continue
		}
		return &Unlocked{Root: root, Generation: clear.Root, Number: d.Number, Name: d.Name, Ring: ring}
	}
	return nil
}

// Generation is that of the root key, as the clear part says; 0 when it says none.
func (d *Ring) Generation() int { return generation(d.raw) }

// Opens reports whether a root key opens it.
func (d *Ring) Opens(root *seal.Key) bool {
	_, err := d.raw.Open(root, "keyring")
	return err == nil
}

// Check proves what can be proved with those keys: that it opens, if it is under
// their root key. It fails with seal.ErrDamaged.
func (d *Ring) Check(u *Unlocked) error {
	var clear ringClear
	err := seal.Unmarshal(d.raw.Clear, &clear)
	if err == nil && clear.Root == u.Generation {
		_, err = d.raw.Open(u.Root, "keyring")
	}
	return err
}

// generation is the one that the clear part of a slot or keyring says; 0 when it
// says none.
func generation(raw *seal.Raw) int {
	var clear ringClear // a slot's has the same member
	if seal.Unmarshal(raw.Clear, &clear) != nil {
		return 0
	}
	return clear.Root
}

// Generation is the one of the root key that a slot or keyring belongs to, whose
// name and bytes these are; 0 when they do not say.
func Generation(name string, p []byte) int {
	raw, err := seal.Parse(p, magics[path.Dir(name)])
	if err != nil {
		return 0
	}
	return generation(raw)
}

// magics of what is below keys/ and keyring/.
var magics = map[string]string{"keys": seal.Slot, "keyring": seal.Keyring}

// Check proves what can be proved without a key of the bytes of a slot or keyring
// with that name. It fails with seal.ErrDamaged, seal.ErrForeign or
// seal.ErrVersion.
func Check(name string, p []byte, repo [16]byte) error {
	magic, ok := magics[path.Dir(name)]
	if !ok {
		return fmt.Errorf("%s: %w: not a key's name", name, seal.ErrDamaged)
	}
	_, err := parse(name, p, magic, repo)
	return err
}

// parse reads a slot or keyring and proves what can be proved without a key.
func parse(name string, p []byte, magic string, repo [16]byte) (*seal.Raw, error) {
	raw, err := seal.ParseOf(p, magic, repo)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if magic == seal.Slot && raw.Header.Kind == slotByDigest && name != SlotName(slotDigest(p)) {
		return nil, fmt.Errorf("%s: %w: its bytes are not what its name says", name, seal.ErrDamaged)
	}
	return raw, nil
}

func document(ctx context.Context, s blob.Store, name, magic string, repo [16]byte) (*seal.Raw, error) {
	p, err := s.Get(ctx, name, 0, -1)
	if err != nil {
		return nil, err
	}
	return parse(name, p, magic, repo)
}

// ringClear is a keyring's clear part.
type ringClear struct {
	Root int `json:"root"` // generation of the root key
}

// Seal gives the bytes of a keyring under a root key of that generation.
func Seal(repo [16]byte, root *seal.Key, generation int, ring *seal.Ring) ([]byte, error) {
	content, err := json.Marshal(ring)
	if err != nil {
		return nil, err
	}
	return seal.MarshalUnsigned(seal.NewHeader(seal.Keyring, 0, 0, repo), ringClear{generation}, content, root, "keyring")
}

// New gives the keys of a new repository.
func New() *Unlocked {
	ids, sign, master := randomKey(), randomKey(), randomKey()
	return &Unlocked{Root: randomKey(), Generation: 1, Number: 1,
		Ring: &seal.Ring{IDs: ids[:], Sign: sign[:], Masters: []seal.Master{{Number: 1, Key: master[:]}}}}
}

// NextRing is the keyring with one more master key.
func (u *Unlocked) NextRing() *seal.Ring {
	next := *u.Ring
	master := randomKey()
	next.Masters = append(slices.Clone(u.Ring.Masters), seal.Master{Number: uint32(len(u.Ring.Masters) + 1), Key: master[:]})
	return &next
}

// NextRoot is a new root key, as yet without a keyring.
func (u *Unlocked) NextRoot() *Unlocked {
	return &Unlocked{Root: randomKey(), Generation: u.Generation + 1}
}

func randomKey() *seal.Key {
	var k seal.Key
	rand.Read(k[:])
	return &k
}
