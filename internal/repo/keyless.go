package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/blob"
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
		if _, err := s.Get(ctx, entryName(k.report.Entries+1), 0, 1); err != nil {
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
	live   map[[32]byte]bool
	rule   lockState
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
		live: map[[32]byte]bool{}, packs: map[[32]byte]packInfo{}}, nil
}

func (k *keyless) problem(object, what string) {
	k.report.Problems = append(k.report.Problems, Problem{Object: object, What: what})
}

// chain follows the entries: numbers, signatures, predecessors. They give the
// live index objects.
func (k *keyless) chain(ctx context.Context) error {
	names, err := listNames(ctx, k.store, "chain/")
	if err != nil {
		return err
	}
	next, previous := uint64(1), k.config[:]
	for _, name := range names {
		n, err := strconv.ParseUint(strings.TrimPrefix(name, "chain/"), 10, 64)
		if err != nil || entryName(n) != name {
			k.problem(name, "not the name of an entry")
			continue
		}
		c, checkpoint, sum, err := k.entry(ctx, name)
		if errors.Is(err, ErrDamaged) || errors.Is(err, seal.ErrForeign) {
			k.problem(name, err.Error())
			next, previous, k.report.Entries = k.missing(next, n), nil, n
			continue
		} else if err != nil {
			return err
		}
		switch {
		case c.Number != n:
			k.problem(name, fmt.Sprintf("it is entry %d", c.Number))
		case checkpoint && n != next:
			previous = nil // what was before it may be gone
		case n != next:
			previous = nil
			k.missing(next, n)
		}
		if n == next && previous != nil && !bytes.Equal(c.Previous, previous) {
			k.problem(name, "it does not follow its predecessor; an entry was exchanged or removed")
		}
		if checkpoint {
			clear(k.live)
		}
		k.take(&c)
		next, previous = n+1, sum[:]
		k.report.Entries = n
	}
	return nil
}

// missing reports the entries from next up to before n, and gives n + 1.
func (k *keyless) missing(next, n uint64) uint64 {
	switch {
	case next+1 == n:
		k.problem(entryName(next), "missing")
	case next < n:
		k.problem(entryName(next), fmt.Sprintf("missing, and all up to %s", entryName(n-1)))
	}
	return n + 1
}

func (k *keyless) take(c *entryClear) {
	if c.Locks != nil {
		if err := k.rule.take(c.Locks); err != nil {
			k.problem(entryName(c.Number), err.Error())
		}
	}
	for _, d := range c.Adds {
		if len(d) == 32 {
			k.live[[32]byte(d)] = true
		}
	}
	for _, d := range c.Drops {
		if len(d) == 32 {
			delete(k.live, [32]byte(d))
		}
	}
}

func (k *keyless) entry(ctx context.Context, name string) (c entryClear, checkpoint bool, sum [32]byte, err error) {
	p, err := k.store.Get(ctx, name, 0, -1)
	if err != nil {
		return c, false, sum, err
	}
	raw, err := seal.Parse(p, seal.Entry)
	if err == nil {
		err = raw.Verify(k.id, k.pub)
	}
	if err != nil {
		return c, false, sum, err
	}
	return c, kind(raw.Header.Kind) == kindCheckpoint, sha256.Sum256(p), seal.Unmarshal(raw.Clear, &c)
}

// keys looks at the form of key slots and keyrings. That they open cannot be
// told from here.
func (k *keyless) keys(ctx context.Context) error {
	for _, w := range []struct{ prefix, magic string }{{"keys/", seal.Slot}, {"keyring/", seal.Keyring}} {
		names, err := listNames(ctx, k.store, w.prefix)
		if err != nil {
			return err
		}
		mine := 0
		for _, name := range names {
			_, err := getDocument(ctx, k.store, name, w.magic, k.id)
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
			k.problem(strings.TrimSuffix(w.prefix, "/"), "none is left: the repository cannot be opened; put them back from a copy of it")
		}
	}
	return nil
}

// indexes reads the live index objects' clear parts.
func (k *keyless) indexes(ctx context.Context) error {
	for d := range k.live {
		c, err := k.index(ctx, d)
		if errors.Is(err, ErrDamaged) || errors.Is(err, seal.ErrForeign) || errors.Is(err, blob.ErrNotExist) {
			k.problem(indexName(d), err.Error())
			continue
		} else if err != nil {
			return err
		}
		for _, row := range c.Packs {
			if _, twice := k.packs[row.Name]; !twice {
				k.report.PackBytes += row.Size
			}
			k.packs[row.Name] = packInfo{size: row.Size, index: d}
		}
	}
	k.report.Packs = len(k.packs)
	return nil
}

func (k *keyless) index(ctx context.Context, d [32]byte) (c indexClear, err error) {
	p, err := k.store.Get(ctx, indexName(d), 0, -1)
	if err != nil {
		return c, err
	}
	if sha256.Sum256(p) != d {
		return c, fmt.Errorf("%w: its bytes are not what its name says", ErrDamaged)
	}
	raw, err := seal.Parse(p, seal.Index)
	if err == nil {
		err = raw.Verify(k.id, k.pub)
	}
	if err != nil {
		return c, err
	}
	return c, seal.Unmarshal(raw.Clear, &c)
}

// stored looks at the packs.
func (k *keyless) stored(ctx context.Context) error {
	seen := verifiedIn(k.cache)
	there := map[string]int64{}
	for i, err := range k.store.List(ctx, "packs/") {
		if err != nil {
			return err
		}
		there[i.Name] = i.Size
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
			if what.second != "" {
				k.problem(packName(name), what.second)
			} else if what.first != "" {
				k.report.Transient = append(k.report.Transient, Problem{Object: packName(name), What: what.first})
			}
			if read[name] {
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
	err := g.Wait()
	k.report.Unread = seen.unread(k.packs)
	if !k.o.ReadData {
		return err
	}
	return errors.Join(err, seen.save(k.packs))
}

// pack gives how many bytes were read, and what is wrong.
func (k *keyless) pack(ctx context.Context, name [32]byte, info packInfo, there map[string]int64, read bool) (int, suspicion, error) {
	size, ok := there[packName(name)]
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
