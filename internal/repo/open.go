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
	"os"
	"path/filepath"
	"strings"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/codec"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/keyring"
	"holdfast/internal/repo/internal/lease"
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
	u := keyring.New()
	sign := ed25519.NewKeyFromSeed(u.Ring.Sign)
	kdf.Root = u.Generation
	if _, err := keyring.PutSlot(ctx, s, repo, u.Root, passphrase, kdf); err != nil {
		return nil, err
	}
	p, err := keyring.Seal(repo, u.Root, u.Generation, u.Ring)
	if err != nil {
		return nil, err
	}
	if err := s.Put(ctx, keyring.Name(repo, u.Number), p); err != nil {
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

// RandomID gives 32 random lower-case hex digits.
func RandomID() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// putSealed stores an unsigned document with a clear part as JSON.
func putSealed(ctx context.Context, s blob.Store, name string, h seal.Header, clear any, content []byte, key *seal.Key, purpose string) error {
	p, err := seal.MarshalUnsigned(h, clear, content, key, purpose)
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
	tiers := blob.NewTiers(s, packsPrefix, tierName)
	r := &Repo{store: tiers, tiers: tiers, openTier: o.OpenTier, id: id, pub: ed25519.PublicKey(c.VerifyKey), slotKDF: seal.DefaultKDF()}
	if o.Compression == Small {
		r.compressor = codec.Small
	}
	r.cache = filepath.Join(o.Cache, r.ID())
	r.locks, r.now = locksIn(r.cache), time.Now
	r.keys = &keyring.Keys{Store: tiers, Repo: id, Secret: bytes.Clone(passphrase)}
	u, err := keyring.Unlock(ctx, s, id, keyring.Means{Passphrase: passphrase, Key: o.Key, First: r.usedSlot()})
	if err != nil {
		return nil, err
	}
	r.keys.Set(u)
	r.sign = ed25519.NewKeyFromSeed(u.Ring.Sign)
	if !r.pub.Equal(r.sign.Public()) {
		return nil, fmt.Errorf("config: %w: its verify key is not this repository's", ErrDamaged)
	}
	r.deriveIDs()
	r.nodes.max, r.chunks.max = nodeCacheCount, chunkCacheBytes/ChunkSize
	r.openers.lru.max = openerCount
	r.leases = &lease.Leases{Store: tiers, Repo: id, Newest: r.keys.Newest, Master: r.master}
	r.chain = &chain.Chain{Store: tiers, Repo: id, Verify: r.pub, Config: sha256.Sum256(p), Made: c.Created,
		Master: r.master, Newest: r.keys.Newest, Sign: r.sign, Memory: filepath.Join(r.cache, "head")}
	r.state = r.chain.Genesis()
	if r.state, err = r.chain.Read(ctx); errors.Is(err, ErrRolledBack) {
		return nil, r.behind(ctx, err)
	} else if err != nil {
		return nil, err
	}
	if err := r.settle(ctx); err != nil {
		return nil, err
	}
	if r.state.Keyring > u.Number {
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

// master is the master key of that number. For one that is not known it looks
// whether the keys were changed.
func (r *Repo) master(ctx context.Context, n uint32) (*seal.Key, error) {
	k, err := r.keys.Master(n)
	if err == nil || n == 0 {
		return k, err
	}
	if err := r.learn(ctx); err != nil {
		return nil, err
	}
	return r.keys.Master(n)
}

// learn takes in changes of the keys.
func (r *Repo) learn(ctx context.Context) error { return r.keys.Learn(ctx, r.current().Removed) }

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

// stillOpens looks, when the chain is known, whether what opened the repository
// is over: a lock may keep slots that were removed, and slots and keyrings of a
// root key that was replaced.
func (r *Repo) stillOpens(ctx context.Context) error {
	s := r.current()
	if u := r.keys.Now(); s.Removed[u.Slot] {
		docs, err := keyring.ReadSlots(ctx, r.store, r.id)
		if err != nil {
			return err
		}
		if r.remaining(docs, u, "") > 0 { // with nothing else left it is better than none
			again, err := keyring.Unlock(ctx, r.store, r.id, keyring.Means{Passphrase: r.keys.Secret, Removed: s.Removed})
			if err != nil {
				return fmt.Errorf("key %s was removed: %w", u.Slot, err)
			}
			r.keys.Set(again) // another slot for the same passphrase
		}
	}
	u := r.keys.Now()
	if s.Keyring > u.Number {
		name := keyring.Name(r.id, s.Keyring)
		p, err := r.store.Get(ctx, name, 0, -1)
		if err == nil {
			err = keyring.Check(name, p, r.id)
		}
		switch {
		case err == nil && keyring.Generation(name, p) > u.Generation:
			return ErrKeys
		case err != nil && !errors.Is(err, blob.ErrNotExist) && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion):
			return err
		}
	}
	r.useSlot(u.Slot)
	return nil
}

// openIndex opens the cache as far as it fits s.
func (r *Repo) openIndex(s *chain.State) (*index.Index, error) {
	return index.Open(filepath.Join(r.cache, "index"), func(d [32]byte) bool { return s.Indexes[d] })
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
	raw, err := seal.ParseOf(p, magic, id)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return raw, nil
}
