package repo

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"sync"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/keyring"
	"holdfast/internal/repo/internal/seal"
)

// CheckKeyless proves what can be proved without a key (docs/format.md §7): the
// chain of signatures, that every index object and pack that it names is there
// in its length, and with ReadData that its bytes are those that were written.
// It is for whoever keeps the store and must not read what is in it. Nothing is
// changed, and nothing can be told of restore points. cache, if not "", is the
// Options.Cache in which this machine remembers what it has read.
func CheckKeyless(ctx context.Context, s blob.Store, cache string, o CheckOptions) (*CheckReport, error) {
	for {
		k, err := newKeyless(ctx, s, o)
		if err != nil {
			return nil, err
		}
		if cache != "" {
			k.cache = filepath.Join(cache, hex.EncodeToString(k.id[:]))
		}
		if err := k.check(ctx); err != nil {
			return nil, err
		}
		if len(k.report.Problems) == 0 {
			return &k.report, nil
		}
		// What is missing may have been replaced beside this check.
		if _, err := s.Get(ctx, chain.Name(k.report.Entries+1), 0, 1); err != nil {
			return &k.report, nil
		}
	}
}

func (k *keyless) check(ctx context.Context) error {
	for _, step := range []func(context.Context) error{k.chain, k.keys, k.indexes, k.stored, k.locks} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// keyless sees what a storage server can.
type keyless struct {
	store  blob.Store
	o      CheckOptions
	cache  string
	id     [16]byte
	pub    []byte
	config [32]byte // its SHA-256
	tiers  bool     // packs may be in other stores
	live   map[[32]byte]bool
	rule   Immutability
	packs  map[[32]byte]packInfo

	mu     sync.Mutex // guards report while packs are read
	report CheckReport
}

func newKeyless(ctx context.Context, s blob.Store, o CheckOptions) (*keyless, error) {
	p, err := s.Get(ctx, configName, 0, -1)
	if errors.Is(err, blob.ErrNotExist) {
		return nil, ErrNotRepository
	} else if err != nil {
		return nil, err
	}
	c, id, err := parseConfig(p)
	if err != nil {
		return nil, fmt.Errorf("config: %w; put that object back from a copy of the repository", err)
	}
	return &keyless{store: s, o: o, id: id, pub: c.VerifyKey, config: sha256.Sum256(p),
		packs: map[[32]byte]packInfo{}}, nil
}

func (k *keyless) problem(object, what string) {
	k.report.Problems = append(k.report.Problems, Problem{Object: object, What: what})
}

// chain follows the entries, which give the live index objects.
func (k *keyless) chain(ctx context.Context) error {
	c := chain.Chain{Store: k.store, Repo: k.id, Verify: k.pub, Config: k.config}
	o, err := c.Outline(ctx)
	if err != nil {
		return err
	}
	k.live, k.tiers, k.rule, k.report.Entries = o.Indexes, o.Tiers, o.Locks, o.Head
	for _, p := range o.Problems {
		k.problem(p.Object, p.What)
	}
	return nil
}

// keys looks at the form of key slots and keyrings. That they open cannot be
// told from here.
func (k *keyless) keys(ctx context.Context) error {
	for _, dir := range []string{"keys", "keyring"} {
		names, err := blob.Names(ctx, k.store, dir+"/")
		if err != nil {
			return err
		}
		mine := 0
		for _, name := range names {
			p, err := k.store.Get(ctx, name, 0, -1)
			if err == nil {
				err = keyring.Check(name, p, k.id)
			}
			switch {
			case err == nil:
				mine++
			case errors.Is(err, ErrDamaged):
				k.problem(name, err.Error())
			case !errors.Is(err, seal.ErrForeign) && !errors.Is(err, blob.ErrNotExist):
				return err
			}
		}
		if mine == 0 {
			k.problem(dir, "none is left: the repository cannot be opened; put them back from a copy of it")
		}
	}
	return nil
}

// indexes reads the live index objects' clear parts.
func (k *keyless) indexes(ctx context.Context) error {
	for d := range k.live {
		p, err := k.store.Get(ctx, index.Name(d), 0, -1)
		var o *index.Object
		if err == nil {
			o, err = index.Parse(p, d, k.id, k.pub)
		}
		if errors.Is(err, ErrDamaged) || errors.Is(err, seal.ErrForeign) || errors.Is(err, blob.ErrNotExist) {
			k.problem(index.Name(d), err.Error())
			continue
		} else if err != nil {
			return err
		}
		for _, pack := range o.Packs {
			if _, twice := k.packs[pack.Name]; !twice {
				k.report.PackBytes += pack.Size
			}
			k.packs[pack.Name] = packInfo{size: pack.Size, index: d}
		}
	}
	k.report.Packs = len(k.packs)
	return nil
}

// stored looks at the packs.
func (k *keyless) stored(ctx context.Context) error {
	tier, err := k.tier(ctx)
	if err != nil {
		return err
	}
	seen := verifiedIn(readingCache(k.cache, tier))
	there, err := listSizes(ctx, k.store)
	if err != nil {
		return err
	}
	read := seen.choose(k.packs, k.o)
	var done int64
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for name, info := range k.packs {
		g.Go(func() error {
			p, what, err := k.pack(gctx, name, info, there, read[name])
			if err != nil {
				return err
			}
			k.mu.Lock()
			defer k.mu.Unlock()
			if what.second == "missing" && k.tiers {
				k.report.Elsewhere++
			} else if what.second != "" {
				k.problem(packName(name), what.second)
			} else if what.first != "" {
				k.report.Transient = append(k.report.Transient, Problem{Object: packName(name), What: what.first})
			}
			if read[name] && what.second != "missing" {
				seen.note(name)
				k.report.ReadPacks++
				k.report.ReadBytes += int64(p)
			}
			if done += info.size; k.o.Report != nil {
				k.o.Report(done, k.report.PackBytes)
			}
			return nil
		})
	}
	err = g.Wait()
	k.report.Unread = seen.unread(k.packs)
	if !k.o.ReadData {
		return err
	}
	return errors.Join(err, seen.save(k.packs))
}

// tier gives the name of the tier that the store says it is; "" for none.
func (k *keyless) tier(ctx context.Context) (string, error) {
	raw, err := getDocument(ctx, k.store, tierName, seal.Tier, k.id)
	switch {
	case err == nil:
		name, err := markName(raw)
		if errors.Is(err, ErrDamaged) {
			k.problem(tierName, err.Error())
			err = nil
		}
		return name, err
	case errors.Is(err, ErrDamaged):
		k.problem(tierName, err.Error())
	case !errors.Is(err, blob.ErrNotExist) && !errors.Is(err, seal.ErrForeign):
		return "", err
	}
	return "", nil
}

// pack gives how many bytes were read, and what is wrong.
func (k *keyless) pack(ctx context.Context, name [32]byte, info packInfo, there map[[32]byte]int64, read bool) (int, suspicion, error) {
	size, ok := there[name]
	switch {
	case !ok:
		return 0, suspicion{second: "missing"}, nil
	case size != info.size:
		return 0, suspicion{second: fmt.Sprintf("%d bytes long, should be %d", size, info.size)}, nil
	case !read:
		return 0, suspicion{}, nil
	}
	p, what, err := readTwice(ctx, k.store, packName(name), name)
	return len(p), what, err
}
