package chain

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
)

// Copy is one copy of an item: chunks and nodes may lie in several packs.
type Copy struct {
	Pack [32]byte
	ID   pack.ID
}

// State is what the chain says up to its head. It is replaced, never changed, once
// it is handed out, so that it may be read by all.
type State struct {
	Head       uint64
	Digest     [32]byte            // of entry head, or of config
	Points     map[PointID]Point   // that are not forgotten
	Order      []PointID           // by their commits; forgotten ones may be among them
	Committed  map[PointID]uint64  // the entry of each point
	Forgotten  map[PointID]*Point  // nil for one that no pin can name any more
	Keep       map[PointID]Until   // marked to stay
	Indexes    map[[32]byte]bool   // live index objects
	Added      map[[32]byte]Adding // by what entry, of each of those
	Over       map[string]Kind     // leases: committed or revoked
	Quarantine map[[32]byte]uint64 // packs, and the entry that put them there
	Bad        map[Copy]bool       // that cannot be read
	Time       time.Time           // of the head, for people
	Keyring    int                 // number of the newest one that an entry names
	Removed    map[string]bool     // key slots
	Tiers      []Tier              // other stores that hold packs; Turned included. Replaced, never changed
	// Quarantined is the newest entry that put packs into quarantine, Moved the
	// newest that changed which copies count: quarantine, sweep, distrust.
	Quarantined, Moved uint64
	// Mended is the newest entry that put others in the place of lost index
	// objects. What those alone knew of is in the inventory no more.
	Mended uint64
	// Checkpoint is the number of the newest one, Older that of the one before
	// it, from which the chain has to be read.
	Checkpoint, Older uint64
	// Locks is the rule on immutability; a checkpoint carries its Immutability.
	Locks LockState
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

// Adding tells when, and in which run, an index object was added.
type Adding struct {
	Entry uint64 `json:"entry"`
	Lease string `json:"lease,omitempty"` // "" for no run's own
}

func newState(config [32]byte) *State {
	return &State{Digest: config, Points: map[PointID]Point{}, Committed: map[PointID]uint64{}, Forgotten: map[PointID]*Point{}, Keep: map[PointID]Until{},
		Indexes: map[[32]byte]bool{}, Added: map[[32]byte]Adding{},
		Over: map[string]Kind{}, Quarantine: map[[32]byte]uint64{}, Bad: map[Copy]bool{}, Removed: map[string]bool{}}
}

// apply checks entry n's bytes against the state and takes it in.
func (c *Chain) apply(ctx context.Context, s *State, p []byte) error {
	n := s.Head + 1
	raw, err := seal.Parse(p, seal.Entry)
	if err != nil {
		return fmt.Errorf("%s: %w", Name(n), err)
	}
	if err := raw.Verify(c.Repo, c.Verify); err != nil {
		return fmt.Errorf("%s: %w", Name(n), err)
	}
	var clear Clear
	var sealed Sealed
	if err := seal.Unmarshal(raw.Clear, &clear); err != nil {
		return fmt.Errorf("%s: %w", Name(n), err)
	}
	if clear.Number != n || !s.unknown && !bytes.Equal(clear.Previous, s.Digest[:]) {
		return fmt.Errorf("%s: %w: it does not follow its predecessor; an entry was exchanged or removed", Name(n), seal.ErrDamaged)
	}
	master, err := c.Master(ctx, raw.Header.Key)
	if err != nil {
		return fmt.Errorf("%s: %w", Name(n), err)
	}
	content, err := raw.Open(master, "chain")
	if err != nil {
		return fmt.Errorf("%s: %w", Name(n), err)
	}
	if Kind(raw.Header.Kind) == Checkpoint {
		err = s.takeCheckpoint(&clear, content)
	} else if err = seal.Unmarshal(content, &sealed); err == nil {
		err = s.take(Kind(raw.Header.Kind), &clear, &sealed)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", Name(n), err)
	}
	s.Head, s.Digest, s.unknown, s.Time = n, sha256.Sum256(p), false, clear.Time
	copy(s.header[:], p)
	return nil
}

// take changes the state as the entry says.
func (s *State) take(k Kind, c *Clear, e *Sealed) error {
	switch k {
	case Add:
		if len(c.Drops) > 0 {
			s.Mended, s.Locks.Distrusted = c.Number, c.Number
		}
	case Keys:
		if err := s.takeKeys(e); err != nil {
			return err
		}
	case Sweep:
		s.Moved = c.Number
	case Tiers:
		s.takeTiers(c.Number, e.Tiers)
	case Commit:
		if e.Point == nil || e.Point.ID == "" {
			return fmt.Errorf("%w: commit without a point", seal.ErrDamaged)
		}
		if _, ok := s.Forgotten[e.Point.ID]; ok { // it was copied here once more
			s.Order = slices.DeleteFunc(s.Order, func(id PointID) bool { return id == e.Point.ID })
			delete(s.Forgotten, e.Point.ID)
		}
		s.Committed[e.Point.ID] = c.Number
		s.Points[e.Point.ID] = *e.Point
		s.Order = append(s.Order, e.Point.ID)
		s.Over[c.Lease] = k
		s.Locks.Commit = c.Number
	case Forget:
		for _, id := range e.Points {
			if p, ok := s.Points[id]; ok {
				s.Forgotten[id] = &p
				delete(s.Points, id)
				delete(s.Committed, id)
			}
		}
	case Keep:
		for _, id := range e.Points {
			if e.Until == nil || *e.Until == "" {
				delete(s.Keep, id)
			} else {
				s.Keep[id] = *e.Until
			}
		}
	case Revoke:
		s.Over[c.Lease] = k
	case Quarantine:
		for _, h := range e.Packs {
			name, err := seal.ParseDigest(h)
			if err != nil {
				return err
			}
			if s.Quarantine[name] == 0 {
				s.Quarantine[name] = c.Number
			}
		}
		s.Quarantined, s.Moved = c.Number, c.Number
	case Distrust:
		for _, i := range e.Items {
			if len(i.Pack) != 32 || len(i.ID) != 32 {
				return fmt.Errorf("%w: distrusted item", seal.ErrDamaged)
			}
			s.Bad[Copy{[32]byte(i.Pack), pack.ID(i.ID)}] = true
		}
		s.Moved = c.Number
		s.Locks.Distrusted = c.Number
	case Locks:
		if err := s.Locks.take(c.Locks); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%w: chain entry of kind %d", seal.ErrVersion, k)
	}
	for _, d := range c.Adds {
		if len(d) != 32 {
			return fmt.Errorf("%w: index digest", seal.ErrDamaged)
		}
		s.Indexes[[32]byte(d)] = true
		s.Added[[32]byte(d)] = Adding{c.Number, c.Lease}
	}
	for _, d := range c.Drops {
		if len(d) == 32 {
			delete(s.Indexes, [32]byte(d))
			delete(s.Added, [32]byte(d))
			s.Moved = c.Number
		}
	}
	return nil
}

// takeKeys notes what an entry says of the keys.
func (s *State) takeKeys(e *Sealed) error {
	if e.Keyring != "" {
		n, err := strconv.Atoi(e.Keyring)
		if err != nil {
			return fmt.Errorf("%w: keyring %.80q", seal.ErrDamaged, e.Keyring)
		}
		s.Keyring = max(s.Keyring, n)
	}
	for _, id := range e.Removed {
		s.Removed[id] = true
	}
	return nil
}

// takeTiers takes over the tiers that entry n tells.
func (s *State) takeTiers(n uint64, tiers []Tier) {
	tiers = slices.Clone(tiers)
	for i := range tiers {
		t := &tiers[i]
		t.Turned = n
		if old := s.Tier(t.Name); old != nil && old.Back == t.Back {
			t.Turned = old.Turned
		}
	}
	s.Tiers = tiers
	s.Moved = n // who has missed a pack looks again
}

// Tier gives the tier of that name, or nil.
func (s *State) Tier(name string) *Tier {
	for i := range s.Tiers {
		if s.Tiers[i].Name == name {
			return &s.Tiers[i]
		}
	}
	return nil
}

// HasRoot reports whether a living point has that map.
func (s *State) HasRoot(root Root) bool {
	if root == "zero" {
		return true
	}
	for _, p := range s.Points {
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

func (s *State) clone() *State {
	c := *s
	c.Points, c.Committed, c.Indexes, c.Over = maps.Clone(s.Points), maps.Clone(s.Committed), maps.Clone(s.Indexes), maps.Clone(s.Over)
	c.Quarantine, c.Bad, c.Removed = maps.Clone(s.Quarantine), maps.Clone(s.Bad), maps.Clone(s.Removed)
	c.Forgotten, c.Keep, c.Added = maps.Clone(s.Forgotten), maps.Clone(s.Keep), maps.Clone(s.Added)
	c.Order = slices.Clone(s.Order)
	c.gaps, c.healed = slices.Clip(s.gaps), slices.Clip(s.healed)
	return &c
}
