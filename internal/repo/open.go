package repo

import (
	"bytes"
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

	chunkCacheBytes = 136 << 20
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
	kdf.Root = 1
	if _, err := putSlot(ctx, s, repo, root, passphrase, kdf); err != nil {
		return nil, err
	}
	ring := seal.Ring{IDs: ids[:], Sign: seed[:], Masters: []seal.Master{{Number: 1, Key: master[:]}}}
	p, err := sealRing(repo, root, 1, &ring)
	if err != nil {
		return nil, err
	}
	if err := s.Put(ctx, ringName(repo, 1), p); err != nil {
		return nil, err
	}
	clear, err := json.Marshal(config{tree.ChunkSize, tree.Fanout, seal.Hex(sign.Public().(ed25519.PublicKey)), []string{}, time.Now().UTC()})
	if err != nil {
		return nil, err
	}
	d := seal.Document{Header: seal.NewHeader(seal.Config, 0, 0, repo), Clear: clear}
	if p, err = d.Marshal(nil, "", sign); err != nil {
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

// putSealed stores an unsigned document with a clear part as JSON.
func putSealed(ctx context.Context, s blob.Store, name string, h seal.Header, clear any, content []byte, key *seal.Key, purpose string) error {
	p, err := sealed(h, clear, content, key, purpose)
	if err != nil {
		return err
	}
	return s.Put(ctx, name, p)
}

// sealed gives an unsigned document with a clear part as JSON.
func sealed(h seal.Header, clear any, content []byte, key *seal.Key, purpose string) ([]byte, error) {
	c, err := json.Marshal(clear)
	if err != nil {
		return nil, err
	}
	d := seal.Document{Header: h, Clear: c, Sealed: content}
	return d.Marshal(key, purpose, nil)
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
	tiers := blob.NewTiers(s, packsPrefix, tierName)
	r := &Repo{store: tiers, tiers: tiers, openTier: o.OpenTier, id: id, pub: ed25519.PublicKey(c.VerifyKey), secret: bytes.Clone(passphrase), slotKDF: seal.DefaultKDF()}
	if o.Compression == Small {
		r.compressor = codec.Small
	}
	r.cache = filepath.Join(o.Cache, r.ID())
	r.locks, r.now = locksIn(r.cache), time.Now
	u, err := unlock(ctx, s, id, passphrase, o.Key, r.usedSlot(), nil)
	if err != nil {
		return nil, err
	}
	r.ring.now.Store(u)
	r.sign = ed25519.NewKeyFromSeed(u.ring.Sign)
	if !r.pub.Equal(r.sign.Public()) {
		return nil, fmt.Errorf("config: %w: its verify key is not this repository's", ErrDamaged)
	}
	r.deriveIDs()
	r.nodes.max, r.chunks.max = nodeCacheCount, chunkCacheBytes/ChunkSize
	r.openers.lru.max = openerCount
	r.config, r.created = sha256.Sum256(p), c.Created
	r.state = r.genesis()
	if err := r.load(ctx); errors.Is(err, ErrRolledBack) {
		return nil, r.behind(ctx, err)
	} else if err != nil {
		return nil, err
	}
	if err := r.settle(ctx); err != nil {
		return nil, err
	}
	if r.state.keyring > u.number {
		if err := r.learn(ctx); err != nil {
			return nil, err
		}
	}
	if err := r.stillOpens(ctx); err != nil {
		return nil, err
	}
	if r.index, err = r.openIndex(r.state); err != nil {
		return nil, err
	}
	if err := r.refresh(ctx); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	return r, nil
}

// openIndex opens the cache as far as it fits s.
func (r *Repo) openIndex(s *state) (*index.Index, error) {
	return index.Open(filepath.Join(r.cache, "index"), func(d [32]byte) bool { return s.indexes[d] })
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
