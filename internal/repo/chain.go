package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"time"

	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
)

// kind is what a chain entry does (docs/format.md §6).
type kind uint16

const (
	kindAdd kind = iota + 1
	kindCommit
	kindForget
	kindKeep
	kindRevoke
	kindQuarantine
	kindSweep
	kindKeys
	kindCheckpoint
	kindDistrust
	kindLocks
	kindTiers
)

// entryClear is an entry's clear part.
type entryClear struct {
	Number   uint64     `json:"number"`
	Previous seal.Hex   `json:"previous"`
	Time     time.Time  `json:"time"`
	Adds     []seal.Hex `json:"adds,omitempty"`
	Drops    []seal.Hex `json:"drops,omitempty"`
	Lease    string     `json:"lease,omitempty"`
	Start    uint64     `json:"start,omitempty"` // state.older after this entry
	Tiers    int        `json:"tiers,omitempty"` // how many, where an entry tells them

	Locks *Immutability `json:"locks,omitempty"`
}

// entrySealed is the union of all kinds' sealed parts.
type entrySealed struct {
	Point  *Point    `json:"point,omitempty"`
	Points []PointID `json:"points,omitempty"`
	Packs  []string  `json:"packs,omitempty"`
	Items  []badItem `json:"items,omitempty"`

	Keyring string   `json:"keyring,omitempty"` // 8 digits: the newest one
	Removed []string `json:"removed,omitempty"` // key slots
	Until   *Until   `json:"until,omitempty"`

	Tiers []Tier `json:"tiers,omitempty"`
}

// badItem is a copy of an item that cannot be read.
type badItem struct {
	Pack seal.Hex `json:"pack"`
	ID   seal.Hex `json:"id"`
}

type badKey struct {
	pack [32]byte
	id   pack.ID
}

// state is what the chain says up to its head. A state is replaced, never
// changed, once it is in Repo.state.
type state struct {
	head       uint64
	digest     [32]byte // of entry head, or of config
	points     map[PointID]Point
	order      []PointID
	committed  map[PointID]uint64  // the entry of each point
	forgotten  map[PointID]*Point  // nil for one that no pin can name any more
	keep       map[PointID]Until   // marked to stay
	indexes    map[[32]byte]bool   // live index objects
	added      map[[32]byte]adding // by what entry, of each of those
	over       map[string]kind     // leases: committed or revoked
	quarantine map[[32]byte]uint64 // packs, and the entry that put them there
	bad        map[badKey]bool
	time       time.Time       // of the head, for people
	keyring    int             // number of the newest one that an entry names
	removed    map[string]bool // key slots
	tiers      []Tier          // other stores that hold packs; Turned included. Replaced, never changed
	// quarantined is the newest entry that put packs into quarantine, moved the
	// newest that changed which copies count: quarantine, sweep, distrust.
	quarantined, moved uint64
	// mended is the newest entry that put others in the place of lost index
	// objects. What those alone knew of is in the inventory no more.
	mended uint64
	// checkpoint is the number of the newest one, older that of the one before
	// it, from which the chain has to be read.
	checkpoint, older uint64
	// locks is the rule on immutability; a checkpoint carries its Immutability.
	locks lockState
	// gaps are entries that are damaged or missing. Reading goes on without
	// them; nothing is appended to a chain with gaps. healed are those before a
	// checkpoint, which has what they said.
	gaps, healed []gap
	// header is how entry head begins, in the store.
	header [seal.HeaderLen]byte
	// unknown: digest and header are not known, since entry head is a gap.
	unknown bool
	// proving: a checkpoint must agree with the entries before it.
	proving bool
}

// adding tells when, and in which run, an index object was added.
type adding struct {
	Entry uint64 `json:"entry"`
	Lease string `json:"lease,omitempty"` // "" for no run's own
}

func newState(config [32]byte) *state {
	return &state{digest: config, points: map[PointID]Point{}, committed: map[PointID]uint64{}, forgotten: map[PointID]*Point{}, keep: map[PointID]Until{},
		indexes: map[[32]byte]bool{}, added: map[[32]byte]adding{},
		over: map[string]kind{}, quarantine: map[[32]byte]uint64{}, bad: map[badKey]bool{}, removed: map[string]bool{}}
}

func entryName(n uint64) string { return fmt.Sprintf("chain/%012d", n) }

// apply checks entry n's bytes against the state and takes it in.
func (c *Chain) apply(ctx context.Context, s *state, p []byte) error {
	n := s.head + 1
	raw, err := seal.Parse(p, seal.Entry)
	if err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	if err := raw.Verify(c.Repo, c.Verify); err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	var clear entryClear
	var sealed entrySealed
	if err := seal.Unmarshal(raw.Clear, &clear); err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	if clear.Number != n || !s.unknown && !bytes.Equal(clear.Previous, s.digest[:]) {
		return fmt.Errorf("%s: %w: it does not follow its predecessor; an entry was exchanged or removed", entryName(n), ErrDamaged)
	}
	master, err := c.Master(ctx, raw.Header.Key)
	if err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	content, err := raw.Open(master, "chain")
	if err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	if kind(raw.Header.Kind) == kindCheckpoint {
		err = s.takeCheckpoint(&clear, content)
	} else if err = seal.Unmarshal(content, &sealed); err == nil {
		err = s.take(kind(raw.Header.Kind), &clear, &sealed)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	s.head, s.digest, s.unknown, s.time = n, sha256.Sum256(p), false, clear.Time
	copy(s.header[:], p)
	return nil
}

// take changes the state as the entry says.
func (s *state) take(k kind, c *entryClear, e *entrySealed) error {
	switch k {
	case kindAdd:
		if len(c.Drops) > 0 {
			s.mended, s.locks.Distrusted = c.Number, c.Number
		}
	case kindKeys:
		if err := s.takeKeys(e); err != nil {
			return err
		}
	case kindSweep:
		s.moved = c.Number
	case kindTiers:
		s.takeTiers(c.Number, e.Tiers)
	case kindCommit:
		if e.Point == nil || e.Point.ID == "" {
			return fmt.Errorf("%w: commit without a point", ErrDamaged)
		}
		if _, ok := s.forgotten[e.Point.ID]; ok { // it was copied here once more
			s.order = slices.DeleteFunc(s.order, func(id PointID) bool { return id == e.Point.ID })
			delete(s.forgotten, e.Point.ID)
		}
		s.committed[e.Point.ID] = c.Number
		s.points[e.Point.ID] = *e.Point
		s.order = append(s.order, e.Point.ID)
		s.over[c.Lease] = k
		s.locks.Commit = c.Number
	case kindForget:
		for _, id := range e.Points {
			if p, ok := s.points[id]; ok {
				s.forgotten[id] = &p
				delete(s.points, id)
				delete(s.committed, id)
			}
		}
	case kindKeep:
		for _, id := range e.Points {
			if e.Until == nil || *e.Until == "" {
				delete(s.keep, id)
			} else {
				s.keep[id] = *e.Until
			}
		}
	case kindRevoke:
		s.over[c.Lease] = k
	case kindQuarantine:
		for _, h := range e.Packs {
			name, err := parseDigest(h)
			if err != nil {
				return err
			}
			if s.quarantine[name] == 0 {
				s.quarantine[name] = c.Number
			}
		}
		s.quarantined, s.moved = c.Number, c.Number
	case kindDistrust:
		for _, i := range e.Items {
			if len(i.Pack) != 32 || len(i.ID) != 32 {
				return fmt.Errorf("%w: distrusted item", ErrDamaged)
			}
			s.bad[badKey{[32]byte(i.Pack), pack.ID(i.ID)}] = true
		}
		s.moved = c.Number
		s.locks.Distrusted = c.Number
	case kindLocks:
		if err := s.locks.take(c.Locks); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%w: chain entry of kind %d", ErrVersion, k)
	}
	for _, d := range c.Adds {
		if len(d) != 32 {
			return fmt.Errorf("%w: index digest", ErrDamaged)
		}
		s.indexes[[32]byte(d)] = true
		s.added[[32]byte(d)] = adding{c.Number, c.Lease}
	}
	for _, d := range c.Drops {
		if len(d) == 32 {
			delete(s.indexes, [32]byte(d))
			delete(s.added, [32]byte(d))
			s.moved = c.Number
		}
	}
	return nil
}

// takeKeys notes what an entry says of the keys.
func (s *state) takeKeys(e *entrySealed) error {
	if e.Keyring != "" {
		n, err := strconv.Atoi(e.Keyring)
		if err != nil {
			return fmt.Errorf("%w: keyring %.80q", ErrDamaged, e.Keyring)
		}
		s.keyring = max(s.keyring, n)
	}
	for _, id := range e.Removed {
		s.removed[id] = true
	}
	return nil
}

// takeTiers takes over the tiers that entry n tells.
func (s *state) takeTiers(n uint64, tiers []Tier) {
	tiers = slices.Clone(tiers)
	for i := range tiers {
		t := &tiers[i]
		t.Turned = n
		if old := s.tier(t.Name); old != nil && old.Back == t.Back {
			t.Turned = old.Turned
		}
	}
	s.tiers = tiers
	s.moved = n // who has missed a pack looks again
}

// tier gives a tier of the state, or nil.
func (s *state) tier(name string) *Tier {
	for i := range s.tiers {
		if s.tiers[i].Name == name {
			return &s.tiers[i]
		}
	}
	return nil
}

// hasRoot reports whether a living point has that map.
func (s *state) hasRoot(root Root) bool {
	if root == "zero" {
		return true
	}
	for _, p := range s.points {
		for _, d := range p.Disks {
			if d.Root == root {
				return true
			}
		}
		for _, f := range p.Files {
			if f.Root == root {
				return true
			}
		}
	}
	return false
}

func parseDigest(s string) (d [32]byte, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 32 {
		return d, fmt.Errorf("%w: digest %.80q", ErrDamaged, s)
	}
	return [32]byte(b), nil
}

func (s *state) clone() *state {
	c := *s
	c.points, c.committed, c.indexes, c.over = cloneMap(s.points), cloneMap(s.committed), cloneMap(s.indexes), cloneMap(s.over)
	c.quarantine, c.bad, c.removed = cloneMap(s.quarantine), cloneMap(s.bad), cloneMap(s.removed)
	c.forgotten, c.keep, c.added = cloneMap(s.forgotten), cloneMap(s.keep), cloneMap(s.added)
	c.order = append([]PointID(nil), s.order...)
	c.gaps, c.healed = slices.Clip(s.gaps), slices.Clip(s.healed)
	return &c
}

func cloneMap[K comparable, V any](m map[K]V) map[K]V {
	c := make(map[K]V, len(m)+1)
	for k, v := range m {
		c[k] = v
	}
	return c
}
