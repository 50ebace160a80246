package repo

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

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

// liveRing is the newest keyring that this process knows.
type liveRing struct{ now atomic.Pointer[unlocked] }

// Newest is the master key for new objects.
func (l *liveRing) Newest() (uint32, *seal.Key) { return l.now.Load().ring.Newest() }

// Master is the master key of that number, or ErrNoKey.
func (l *liveRing) Master(n uint32) (*seal.Key, error) { return l.now.Load().ring.Master(n) }

// master is the master key of that number. For one that is not known it looks
// whether the keys were changed.
func (r *Repo) master(ctx context.Context, n uint32) (*seal.Key, error) {
	k, err := r.ring.Master(n)
	if err == nil || n == 0 {
		return k, err
	}
	if err := r.learn(ctx); err != nil {
		return nil, err
	}
	return r.ring.Master(n)
}

// learn takes in keyrings that were made since this repository was opened, if
// it can: one under a new root key opens only with the passphrase.
func (r *Repo) learn(ctx context.Context) error {
	r.learning.Lock()
	defer r.learning.Unlock()
	names, err := blob.Names(ctx, r.store, "keyring/")
	if err != nil {
		return err
	}
	if slices.Equal(names, r.ringNames) {
		return nil
	}
	old := r.ring.now.Load()
	rings, err := readRings(ctx, r.store, r.id)
	if err != nil {
		return err
	}
	u := rings.open(old.root)
	if (u == nil || rings.newest() > u.number) && len(r.secret) > 0 {
		v, err := unlock(ctx, r.store, r.id, r.secret, nil, old.slot, r.current().Removed)
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
		r.ring.now.Store(u)
	}
	r.ringNames = names
	return nil
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
		raw, err := getDocument(ctx, s, name, seal.Keyring, id)
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

// ringClear is a keyring's clear part.
type ringClear struct {
	Root int `json:"root"` // generation of the root key
}

func sealRing(repo [16]byte, root *seal.Key, generation int, ring *seal.Ring) ([]byte, error) {
	content, err := json.Marshal(ring)
	if err != nil {
		return nil, err
	}
	return sealed(seal.NewHeader(seal.Keyring, 0, 0, repo), ringClear{generation}, content, root, "keyring")
}

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
		k := slotDoc{id: strings.TrimPrefix(name, "keys/")}
		k.raw, k.err = getSlot(ctx, s, name, id)
		if k.err == nil {
			if err := seal.Unmarshal(k.raw.Clear, &k.kdf); err != nil {
				k = slotDoc{id: k.id, err: fmt.Errorf("%s: %w", name, err)}
			}
		}
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

// credential is what somebody typed to open a repository.
type credential struct {
	text     []byte
	recovery []byte // the 32 bytes, when the text is a recovery key
	mistyped error  // what is wrong with it, when it looks like one
}

func newCredential(text []byte) *credential {
	c := &credential{text: text}
	c.recovery, c.mistyped = parseRecovery(string(text))
	return c
}

// open gives the root key, or ErrPassphrase.
func (k *slotDoc) open(c *credential) (*seal.Key, error) {
	if k.err != nil {
		return nil, k.err
	}
	secret := c.text
	if k.kdf.Kind == seal.KindRecovery {
		secret = c.recovery
	}
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

// unlock finds the root key, which may be given, or else is in the slot that the
// passphrase opens, and with it the newest keyring. The slot first is tried before
// the others: each costs time.
// Slots in removed open nothing, though a lock may keep them.
func unlock(ctx context.Context, s blob.Store, id [16]byte, passphrase, key []byte, first string, removed map[string]bool) (*unlocked, error) {
	for try := 1; ; try++ {
		rings, err := readRings(ctx, s, id)
		if err != nil {
			return nil, err
		}
		if len(key) == len(seal.Key{}) {
			if u := rings.open((*seal.Key)(bytes.Clone(key))); u != nil {
				return u, nil
			}
		}
		u, unlockErr := unlockSlot(ctx, s, id, newCredential(passphrase), &rings, first, removed)
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
func unlockSlot(ctx context.Context, s blob.Store, id [16]byte, c *credential, rings *rings, first string, removed map[string]bool) (*unlocked, error) {
	slots, err := readSlots(ctx, s, id)
	if err != nil {
		return nil, err
	}
	slots = slices.DeleteFunc(slots, func(k slotDoc) bool { return removed[k.id] })
	cost := func(k slotDoc) int {
		switch {
		case k.id == first:
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

// usedSlot is the slot that opened the repository on this machine last. That it
// cannot be told costs time only.
func (r *Repo) usedSlot() string {
	p, _ := os.ReadFile(filepath.Join(r.cache, "slot"))
	return string(p)
}

func (r *Repo) useSlot(id string) {
	if id == "" || id == r.usedSlot() || os.MkdirAll(r.cache, 0o700) != nil {
		return
	}
	_ = os.WriteFile(filepath.Join(r.cache, "slot"), []byte(id), 0o600)
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
	p, err := sealed(seal.NewHeader(seal.Slot, slotByDigest, 0, repo), kdf, root[:], &kek, "slot")
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

// getSlot reads a slot and proves what can be proved without its passphrase.
func getSlot(ctx context.Context, s blob.Store, name string, id [16]byte) (*seal.Raw, error) {
	p, err := s.Get(ctx, name, 0, -1)
	if err != nil {
		return nil, err
	}
	return parseSlot(p, name, id)
}

func parseSlot(p []byte, name string, id [16]byte) (*seal.Raw, error) {
	raw, err := seal.Parse(p, seal.Slot)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%s: %w", name, err)
	case raw.Header.Repo != id:
		return nil, fmt.Errorf("%s: %w", name, seal.ErrForeign)
	}
	return raw, fitsName(name, p, raw)
}

// fitsName wants a slot's bytes to be those that its name says.
func fitsName(name string, p []byte, raw *seal.Raw) error {
	if raw.Header.Kind == slotByDigest && name != slotName(slotDigest(p)) {
		return fmt.Errorf("%s: %w: its bytes are not what its name says", name, ErrDamaged)
	}
	return nil
}

// keys checks that keyrings and slots can be read, and that the newest keyring is
// there.
func (c *checker) keys(ctx context.Context) error {
	rings, err := readRings(ctx, c.r.store, c.r.id)
	if err != nil {
		return err
	}
	if known := c.r.current().Keyring; known > rings.newest() {
		c.problem(Problem{Object: ringName(c.r.id, known), What: "missing or damaged: what was stored since it was made cannot be read; put it back with \"holdfast key import\", or from a copy of the repository"})
	} else if rings.damage != nil && len(rings.list) == 0 {
		c.problem(Problem{Object: "keyring", What: rings.damage.Error()})
	}
	for name, err := range rings.bad {
		if name != ringName(c.r.id, c.r.current().Keyring) {
			c.problem(Problem{Object: name, What: err.Error()})
		}
	}
	u := c.r.ring.now.Load()
	for _, d := range rings.list { // the older ones, too: whoever puts back a lost keyring goes on from them
		var clear ringClear
		err := seal.Unmarshal(d.raw.Clear, &clear)
		if err == nil && clear.Root == u.generation {
			_, err = d.raw.Open(u.root, "keyring")
		}
		if err != nil {
			c.problem(Problem{Object: d.name, What: err.Error() + "; put it back with \"holdfast key import\", or from a copy of the repository"})
		}
	}
	slots, err := readSlots(ctx, c.r.store, c.r.id)
	if err != nil {
		return err
	}
	for _, k := range slots {
		if k.err != nil {
			c.problem(Problem{Object: slotName(k.id), What: k.err.Error() + "; remove it with \"holdfast key remove\", and add its passphrase again"})
		}
	}
	return nil
}

// stillOpens looks, when the chain is known, whether what opened the repository
// is over: a lock may keep slots that were removed, and slots and keyrings of a
// root key that was replaced.
func (r *Repo) stillOpens(ctx context.Context) error {
	s := r.current()
	if u := r.ring.now.Load(); s.Removed[u.slot] {
		docs, err := readSlots(ctx, r.store, r.id)
		if err != nil {
			return err
		}
		if r.remaining(docs, u, "") > 0 { // with nothing else left it is better than none
			again, err := unlock(ctx, r.store, r.id, r.secret, nil, "", s.Removed)
			if err != nil {
				return fmt.Errorf("key %s was removed: %w", u.slot, err)
			}
			r.ring.now.Store(again) // another slot for the same passphrase
		}
	}
	u := r.ring.now.Load()
	if s.Keyring > u.number {
		raw, err := getDocument(ctx, r.store, ringName(r.id, s.Keyring), seal.Keyring, r.id)
		switch {
		case err == nil && clearRoot(raw) > u.generation:
			return ErrKeys
		case err != nil && !errors.Is(err, blob.ErrNotExist) && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion):
			return err
		}
	}
	r.useSlot(u.slot)
	return nil
}
