package repo

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

// How keys change (docs/format.md §2).
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

// unlocked is what opens a repository's objects. It is replaced as a whole,
// never changed.
type unlocked struct {
	root       *seal.Key
	slot       string // id of the slot that it came from; "" when it was given
	generation int    // of the root key
	number     int    // of the keyring
	name       string // of the keyring
	ring       *seal.Ring
}

// rings are the keyrings of a repository, the newest first.
type rings struct {
	list   []ringDoc
	damage error            // of those that cannot be read, the last
	bad    map[string]error // all of them, by name
}

type ringDoc struct {
	name   string
	number int
	raw    *seal.Raw
}

func ringName(repo [16]byte, number int) string {
	return fmt.Sprintf("keyring/%08d-%s", number, hex.EncodeToString(repo[:4]))
}

func ringNumber(name string) (int, error) {
	digits, _, _ := strings.Cut(strings.TrimPrefix(name, "keyring/"), "-")
	n, err := strconv.Atoi(digits)
	if err != nil || len(digits) != 8 || n < 1 {
		return 0, fmt.Errorf("%s: %w: not a keyring's name", name, ErrDamaged)
	}
	return n, nil
}

func readRings(ctx context.Context, s blob.Store, id [16]byte) (rings, error) {
	names, err := blob.Names(ctx, s, "keyring/")
	if err != nil {
		return rings{}, err
	}
	r := rings{damage: fmt.Errorf("keyring: %w: missing", ErrDamaged), bad: map[string]error{}}
	for _, name := range slices.Backward(names) {
		raw, err := document(ctx, s, name, seal.Keyring, id)
		var n int
		if err == nil {
			n, err = ringNumber(name)
		}
		switch {
		case err == nil:
			r.list = append(r.list, ringDoc{name, n, raw})
		case errors.Is(err, seal.ErrForeign), errors.Is(err, blob.ErrNotExist):
		case errors.Is(err, ErrDamaged), errors.Is(err, ErrVersion):
			r.damage = err
			r.bad[name] = err
		default:
			return rings{}, err
		}
	}
	return r, nil
}

// newest is the greatest number.
func (r *rings) newest() int {
	if len(r.list) == 0 {
		return 0
	}
	return r.list[0].number
}

// open gives the newest keyring that the root key opens, or nil.
func (r *rings) open(root *seal.Key) *unlocked {
	for _, d := range r.list {
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
			r.damage = fmt.Errorf("%s: %w", d.name, err)
			continue
		}
		return &unlocked{root: root, generation: clear.Root, number: d.number, name: d.name, ring: ring}
	}
	return nil
}

// generation is that of the root key, as the clear part says; 0 when it says none.
func (d *ringDoc) generation() int { return generation(d.raw) }

// opens reports whether a root key opens it.
func (d *ringDoc) opens(root *seal.Key) bool {
	_, err := d.raw.Open(root, "keyring")
	return err == nil
}

// check proves what can be proved with those keys.
func (d *ringDoc) check(u *unlocked) error {
	var clear ringClear
	err := seal.Unmarshal(d.raw.Clear, &clear)
	if err == nil && clear.Root == u.generation {
		_, err = d.raw.Open(u.root, "keyring")
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
	magic, ok := magics[path.Dir(name)]
	if !ok {
		return 0
	}
	raw, err := seal.Parse(p, magic)
	if err != nil {
		return 0
	}
	return generation(raw)
}

var magics = map[string]string{"keys": seal.Slot, "keyring": seal.Keyring}

// Check proves what can be proved without a key of the bytes of a slot or keyring
// with that name. It fails with seal.ErrDamaged, seal.ErrForeign or
// seal.ErrVersion.
func Check(name string, p []byte, repo [16]byte) error {
	magic, ok := magics[path.Dir(name)]
	if !ok {
		return fmt.Errorf("%s: %w: not a key's name", name, ErrDamaged)
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
	if magic == seal.Slot && raw.Header.Kind == slotByDigest && name != slotName(slotDigest(p)) {
		return nil, fmt.Errorf("%s: %w: its bytes are not what its name says", name, ErrDamaged)
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

// sealRing gives the bytes of a keyring under a root key of that generation.
func sealRing(repo [16]byte, root *seal.Key, generation int, ring *seal.Ring) ([]byte, error) {
	content, err := json.Marshal(ring)
	if err != nil {
		return nil, err
	}
	return seal.MarshalUnsigned(seal.NewHeader(seal.Keyring, 0, 0, repo), ringClear{generation}, content, root, "keyring")
}

// firstRing gives the keys of a new repository.
func firstRing() *unlocked {
	ids, sign, master := randomKey(), randomKey(), randomKey()
	return &unlocked{root: randomKey(), generation: 1, number: 1,
		ring: &seal.Ring{IDs: ids[:], Sign: sign[:], Masters: []seal.Master{{Number: 1, Key: master[:]}}}}
}

// nextRing is the keyring with one more master key.
func (u *unlocked) nextRing() *seal.Ring {
	next := *u.ring
	master := randomKey()
	next.Masters = append(slices.Clone(u.ring.Masters), seal.Master{Number: uint32(len(u.ring.Masters) + 1), Key: master[:]})
	return &next
}

// nextRoot is a new root key, as yet without a keyring.
func (u *unlocked) nextRoot() *unlocked {
	return &unlocked{root: randomKey(), generation: u.generation + 1}
}

func randomKey() *seal.Key {
	var k seal.Key
	rand.Read(k[:])
	return &k
}
