package repo

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/codec"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/seal"
	"holdfast/internal/repo/internal/tree"
)

const (
	configName = "config"

	chunkCacheBytes = 64 << 20
	nodeCacheCount  = 2048 // of 8 KiB
	openerCount     = 4096 // of about 1 KiB
)

// config is the clear part of the object of that name (docs/format.md §1.3).
type config struct {
	ChunkSize int       `json:"chunk_size"`
	Fanout    int       `json:"fanout"`
	VerifyKey seal.Hex  `json:"verify_key"`
	Features  []string  `json:"features"`
	Created   time.Time `json:"created"`
}

// Init makes a repository on an empty store and opens it. The object "config"
// is created last: before it there is no repository.
func Init(ctx context.Context, s blob.Store, passphrase []byte, o Options) (*Repo, error) {
	return initialize(ctx, s, passphrase, o, seal.DefaultKDF())
}

// initialize is Init with a choice of the key derivation's cost.
func initialize(ctx context.Context, s blob.Store, passphrase []byte, o Options, kdf seal.KDF) (*Repo, error) {
	if len(passphrase) == 0 {
		return nil, fmt.Errorf("%w: it is empty", ErrPassphrase)
	}
	if _, err := s.Get(ctx, configName, 0, -1); err == nil {
		return nil, ErrExist
	} else if !errors.Is(err, blob.ErrNotExist) {
		return nil, err
	}
	var repo [16]byte
	rand.Read(repo[:])
	root, seed := randomKey(), randomKey()
	ids, master := randomKey(), randomKey()
	sign := ed25519.NewKeyFromSeed(seed[:])
	if err := putSlot(ctx, s, repo, root, passphrase, kdf); err != nil {
		return nil, err
	}
	ring := seal.Ring{IDs: ids[:], Sign: seed[:], Masters: []seal.Master{{Number: 1, Key: master[:]}}}
	if err := putRing(ctx, s, repo, root, 1, &ring); err != nil {
		return nil, err
	}
	clear, err := json.Marshal(config{tree.ChunkSize, tree.Fanout, seal.Hex(sign.Public().(ed25519.PublicKey)), []string{}, time.Now().UTC()})
	if err != nil {
		return nil, err
	}
	d := seal.Document{Header: seal.NewHeader(seal.Config, 0, 0, repo), Clear: clear}
	p, err := d.Marshal(nil, "", sign)
	if err != nil {
		return nil, err
	}
	if err := s.Put(ctx, configName, p); errors.Is(err, blob.ErrExist) {
		return nil, ErrExist
	} else if err != nil {
		return nil, err
	}
	return Open(ctx, s, passphrase, o)
}

func randomKey() *seal.Key {
	var k seal.Key
	rand.Read(k[:])
	return &k
}

// RandomID gives 32 random lower-case hex digits.
func RandomID() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

func putSlot(ctx context.Context, s blob.Store, repo [16]byte, root *seal.Key, passphrase []byte, kdf seal.KDF) error {
	kdf.Salt = make([]byte, 16)
	rand.Read(kdf.Salt)
	kdf.Created = time.Now().UTC()
	kek, err := kdf.Key(passphrase)
	if err != nil {
		return err
	}
	return putSealed(ctx, s, "keys/"+RandomID()[:16], seal.NewHeader(seal.Slot, 0, 0, repo), kdf, root[:], &kek, "slot")
}

func putRing(ctx context.Context, s blob.Store, repo [16]byte, root *seal.Key, generation int, ring *seal.Ring) error {
	content, err := json.Marshal(ring)
	if err != nil {
		return err
	}
	name := fmt.Sprintf("keyring/%08d-%s", generation, RandomID()[:8])
	return putSealed(ctx, s, name, seal.NewHeader(seal.Keyring, 0, 0, repo), map[string]int{"root": 1}, content, root, "keyring")
}

// putSealed stores an unsigned document with a clear part as JSON.
func putSealed(ctx context.Context, s blob.Store, name string, h seal.Header, clear any, content []byte, key *seal.Key, purpose string) error {
	c, err := json.Marshal(clear)
	if err != nil {
		return err
	}
	d := seal.Document{Header: h, Clear: c, Sealed: content}
	p, err := d.Marshal(key, purpose, nil)
	if err != nil {
		return err
	}
	return s.Put(ctx, name, p)
}

// Open opens the repository on a store. It fails with ErrNotRepository,
// ErrVersion, ErrPassphrase, ErrDamaged or ErrRolledBack, or with the store's error.
func Open(ctx context.Context, s blob.Store, passphrase []byte, o Options) (*Repo, error) {
	if o.Cache == "" {
		return nil, errors.New("a repository needs a cache directory")
	}
	p, err := s.Get(ctx, configName, 0, -1)
	if errors.Is(err, blob.ErrNotExist) {
		return nil, ErrNotRepository
	} else if err != nil {
		return nil, err
	}
	c, id, err := parseConfig(p)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	r := &Repo{store: s, id: id, pub: ed25519.PublicKey(c.VerifyKey)}
	if o.Compression == Small {
		r.compressor = codec.Small
	}
	if r.root, r.ring, err = unlock(ctx, s, id, passphrase, o.Key); err != nil {
		return nil, err
	}
	r.sign = ed25519.NewKeyFromSeed(r.ring.Sign)
	if !r.pub.Equal(r.sign.Public()) {
		return nil, fmt.Errorf("config: %w: its verify key is not this repository's", ErrDamaged)
	}
	r.deriveIDs()
	r.cache = filepath.Join(o.Cache, r.ID())
	r.nodes.max, r.chunks.max = nodeCacheCount, chunkCacheBytes/ChunkSize
	r.openers.lru.max = openerCount
	r.state = newState(sha256.Sum256(p))
	if err := r.load(ctx); err != nil {
		return nil, err
	}
	if r.index, err = index.Open(filepath.Join(r.cache, "index"), r.live); err != nil {
		return nil, err
	}
	if err := r.refresh(ctx); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

func parseConfig(p []byte) (c config, id [16]byte, err error) {
	if len(p) < 4 || string(p[:4]) != seal.Config {
		return c, id, ErrNotRepository
	}
	raw, err := seal.Parse(p, seal.Config)
	if err != nil {
		return c, id, err
	}
	if err := seal.Unmarshal(raw.Clear, &c); err != nil {
		return c, id, err
	}
	if len(c.Features) > 0 {
		return c, id, fmt.Errorf("%w: it uses %s", ErrVersion, strings.Join(c.Features, ", "))
	}
	if c.ChunkSize != tree.ChunkSize || c.Fanout != tree.Fanout || len(c.VerifyKey) != ed25519.PublicKeySize {
		return c, id, fmt.Errorf("%w: parameters", ErrDamaged)
	}
	return c, raw.Header.Repo, raw.Verify(raw.Header.Repo, ed25519.PublicKey(c.VerifyKey))
}

// unlock finds the root key, which may be given, or else is in the slot that the
// passphrase opens, and with it the newest keyring.
func unlock(ctx context.Context, s blob.Store, id [16]byte, passphrase, key []byte) (*seal.Key, *seal.Ring, error) {
	if len(key) == len(seal.Key{}) {
		root := (*seal.Key)(key)
		if ring, err := newestRing(ctx, s, id, root); err == nil {
			return root, ring, nil
		}
	}
	root, err := findRoot(ctx, s, id, passphrase)
	if err != nil {
		return nil, nil, err
	}
	ring, err := newestRing(ctx, s, id, root)
	return root, ring, err
}

func findRoot(ctx context.Context, s blob.Store, id [16]byte, passphrase []byte) (*seal.Key, error) {
	names, err := listNames(ctx, s, "keys/")
	if err != nil {
		return nil, err
	}
	slots := 0
	var damage error
	for _, name := range names {
		root, err := openSlot(ctx, s, name, id, passphrase)
		switch {
		case err == nil:
			return root, nil
		case errors.Is(err, ErrPassphrase):
			slots++
		case errors.Is(err, seal.ErrForeign):
		case errors.Is(err, ErrDamaged), errors.Is(err, ErrVersion):
			damage = errors.Join(damage, err)
		default:
			return nil, err
		}
	}
	if damage != nil {
		return nil, fmt.Errorf("no key slot opens: %w", damage)
	}
	if slots == 0 {
		return nil, fmt.Errorf("keys: %w: no key slot is left; put back keys/ from a copy of the repository", ErrDamaged)
	}
	return nil, ErrPassphrase
}

func openSlot(ctx context.Context, s blob.Store, name string, id [16]byte, passphrase []byte) (*seal.Key, error) {
	raw, err := getDocument(ctx, s, name, seal.Slot, id)
	if err != nil {
		return nil, err
	}
	var kdf seal.KDF
	if err := seal.Unmarshal(raw.Clear, &kdf); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	kek, err := kdf.Key(passphrase)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	root, err := raw.Open(&kek, "slot")
	if err != nil || len(root) != len(seal.Key{}) {
		return nil, ErrPassphrase
	}
	return (*seal.Key)(root), nil
}

func newestRing(ctx context.Context, s blob.Store, id [16]byte, root *seal.Key) (*seal.Ring, error) {
	names, err := listNames(ctx, s, "keyring/")
	if err != nil {
		return nil, err
	}
	err = fmt.Errorf("keyring: %w: missing", ErrDamaged)
	for _, name := range slices.Backward(names) {
		raw, docErr := getDocument(ctx, s, name, seal.Keyring, id)
		if docErr == nil {
			var content []byte
			if content, docErr = raw.Open(root, "keyring"); docErr == nil {
				return seal.ParseRing(content)
			}
		}
		if !errors.Is(docErr, seal.ErrForeign) {
			err = fmt.Errorf("%s: %w", name, docErr)
		}
	}
	return nil, err
}

// getDocument reads an object and checks its form and repository.
func getDocument(ctx context.Context, s blob.Store, name, magic string, id [16]byte) (*seal.Raw, error) {
	p, err := s.Get(ctx, name, 0, -1)
	if err != nil {
		return nil, err
	}
	raw, err := seal.Parse(p, magic)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if raw.Header.Repo != id {
		return nil, fmt.Errorf("%s: %w", name, seal.ErrForeign)
	}
	return raw, nil
}

// listNames gives the names under a prefix, sorted.
func listNames(ctx context.Context, s blob.Store, prefix string) ([]string, error) {
	var names []string
	for i, err := range s.List(ctx, prefix) {
		if err != nil {
			return nil, err
		}
		names = append(names, i.Name)
	}
	slices.Sort(names)
	return names, nil
}
