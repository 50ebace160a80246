package chain

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
)

// parts are the members of a checkpoint (docs/format.md §6.4): each gives a
// part of the state as JSON and takes it from there. What a state holds and is
// not here is lost to whoever starts to read at a checkpoint; a test goes
// through the fields. adds are the entry's, in their order.
func (s *State) parts(adds []seal.Hex) map[string]any {
	return map[string]any{
		"points":      &via[[]Point]{s.living, s.setLiving},
		"committed":   &s.Committed,
		"keep":        &s.Keep,
		"forgotten":   &via[[]PointID]{s.gone, s.setGone},
		"pinned":      &via[[]Point]{s.pinned, s.setPinned},
		"added":       &via[[]Adding]{func() []Adding { return s.addedBy(adds) }, func(p []Adding) error { return s.setAdded(adds, p) }},
		"quarantine":  &via[map[string]uint64]{s.quarantineHex, s.setQuarantine},
		"distrust":    &via[[]BadItem]{s.badItems, s.setBad},
		"over":        &s.Over,
		"keyring":     &s.Keyring,
		"removed":     &via[[]string]{func() []string { return slices.Sorted(maps.Keys(s.Removed)) }, s.setRemoved},
		"quarantined": &s.Quarantined,
		"moved":       &s.Moved,
		"mended":      &s.Mended,
		"tiers":       &s.Tiers,
		"locks":       &s.Locks,
		"before":      &via[uint64]{func() uint64 { return s.Checkpoint }, func(n uint64) error { s.Older = n; return nil }},
	}
}

// via is a member that has another form in the checkpoint than in the state.
type via[T any] struct {
	get func() T
	set func(T) error
}

func (v *via[T]) MarshalJSON() ([]byte, error) { return json.Marshal(v.get()) }

func (v *via[T]) UnmarshalJSON(p []byte) error {
	var t T
	if err := json.Unmarshal(p, &t); err != nil {
		return err
	}
	return v.set(t)
}

// content is the sealed part of a checkpoint with this state.
func (s *State) content() ([]byte, error) { return json.Marshal(s.parts(s.adds())) }

// Encode gives the clear and the sealed part of a checkpoint that tells the state,
// proved by reading them back. It fails with seal.ErrTooLarge for more than a
// document takes.
func (s *State) Encode() (clear Clear, content []byte, err error) {
	adds := s.adds()
	if content, err = s.content(); err != nil {
		return clear, nil, err
	}
	if len(content) > seal.MaxContent {
		return clear, nil, seal.ErrTooLarge
	}
	back := newState([32]byte{})
	if err := back.read(adds, content); err != nil {
		return clear, nil, err
	}
	back.Checkpoint, back.Older = s.Checkpoint, s.Older
	if what, err := back.differs(s); err != nil || what != "" {
		return clear, nil, errors.Join(err, fmt.Errorf("its %s would be lost; this is a defect of this program, and nothing was written", what))
	}
	clear = Clear{Adds: adds, Tiers: len(s.Tiers)}
	if s.Locks.Mode != "" {
		clear.Locks = &s.Locks.Immutability
	}
	return clear, content, nil
}

// adds lists the live index objects in the order in which they were added.
func (s *State) adds() []seal.Hex {
	live := slices.SortedFunc(maps.Keys(s.Indexes), func(a, b [32]byte) int {
		if ea, eb := s.Added[a].Entry, s.Added[b].Entry; ea != eb {
			return int(int64(ea) - int64(eb))
		}
		return bytes.Compare(a[:], b[:])
	})
	adds := make([]seal.Hex, len(live))
	for i, d := range live {
		adds[i] = d[:]
	}
	return adds
}

// takeCheckpoint puts the checkpoint's state in the place of this one, and
// makes gaps before it be over. In a state that is being proved, what it says
// must be what the entries before it have said.
func (s *State) takeCheckpoint(c *Clear, content []byte) error {
	n := newState([32]byte{})
	if err := n.read(c.Adds, content); err != nil {
		return err
	}
	n.Checkpoint = c.Number
	if s.proving && !s.unknown && len(s.gaps) == 0 {
		if err := s.agrees(n); err != nil {
			return err
		}
	}
	n.healed = slices.Concat(s.healed, s.gaps)
	n.Head, n.Digest, n.unknown, n.proving = s.Head, s.Digest, s.unknown, s.proving
	*s = *n
	return nil
}

// read takes a checkpoint's members into an empty state.
func (s *State) read(adds []seal.Hex, content []byte) error {
	var members map[string]json.RawMessage
	if err := seal.Unmarshal(content, &members); err != nil {
		return err
	}
	parts := s.parts(adds)
	for name, value := range members {
		part, ok := parts[name]
		if !ok {
			return fmt.Errorf("%w: a checkpoint with %q", seal.ErrVersion, name)
		}
		if string(value) == "null" {
			continue
		}
		if err := seal.Unmarshal(value, part); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if len(s.Added) != len(adds) {
		return fmt.Errorf("%w: %d index objects, of %d it is told who added them", seal.ErrDamaged, len(adds), len(s.Added))
	}
	return nil
}

// Needless says what a checkpoint need not carry (docs/format.md §6.4).
type Needless struct {
	Lease func(session string) bool // nothing is left of the lease in the store
	Pack  func(name [32]byte) bool  // it is neither in the store nor listed by an index object
	// Horizon is the newest entry that all open leases knew when they began.
	Horizon uint64
	Point   func(PointID) bool // no pin names it
}

// Abridged is the state without what can matter to nobody any more.
func (s *State) Abridged(n Needless) *State {
	a := s.clone()
	for lease, k := range s.Over {
		if k == Commit && n.Lease(lease) {
			delete(a.Over, lease)
		}
	}
	for name, entry := range s.Quarantine {
		if entry <= n.Horizon && n.Pack(name) {
			delete(a.Quarantine, name)
		}
	}
	for key := range s.Bad {
		if n.Pack(key.Pack) {
			delete(a.Bad, key)
		}
	}
	for id := range s.Forgotten {
		if n.Point(id) {
			a.Forgotten[id] = nil
		}
	}
	return a
}

// agrees reports whether a checkpoint that follows this state tells it, with
// nothing left out but what may be.
func (s *State) agrees(c *State) error {
	b := s.clone()
	for lease, k := range s.Over {
		if _, there := c.Over[lease]; !there && k == Commit {
			delete(b.Over, lease)
		}
	}
	for name := range s.Quarantine {
		if c.Quarantine[name] == 0 {
			delete(b.Quarantine, name)
		}
	}
	for key := range s.Bad {
		if !c.Bad[key] {
			delete(b.Bad, key)
		}
	}
	for id := range s.Forgotten {
		if there, ok := c.Forgotten[id]; ok && there == nil {
			b.Forgotten[id] = nil
		}
	}
	b.Checkpoint, b.Older = c.Checkpoint, s.Checkpoint
	if what, err := b.differs(c); err != nil {
		return err
	} else if what != "" {
		return fmt.Errorf("%w: the checkpoint's %s are not what the entries before it say", seal.ErrDamaged, what)
	}
	return nil
}

// differs names what the states do not have in common; "" when they are equal.
// Their places in the chain are not compared.
func (s *State) differs(o *State) (string, error) {
	adds, others := s.adds(), o.adds()
	if !slices.EqualFunc(adds, others, func(a, b seal.Hex) bool { return bytes.Equal(a, b) }) {
		return "adds", nil
	}
	if s.Older != o.Older {
		return "before", nil
	}
	theirs := o.parts(others)
	for name, part := range s.parts(adds) {
		a, err := json.Marshal(part)
		if err != nil {
			return "", err
		}
		b, err := json.Marshal(theirs[name])
		if err != nil {
			return "", err
		}
		if !bytes.Equal(a, b) {
			return name, nil
		}
	}
	return "", nil
}

func (s *State) living() []Point {
	points := make([]Point, 0, len(s.Points))
	for _, id := range s.Order {
		if p, ok := s.Points[id]; ok {
			points = append(points, p)
		}
	}
	return points
}

func (s *State) setLiving(points []Point) error {
	for _, p := range points {
		if _, twice := s.Points[p.ID]; twice || p.ID == "" {
			return fmt.Errorf("%w: point %.80q", seal.ErrDamaged, p.ID)
		}
		s.Points[p.ID] = p
		s.Order = append(s.Order, p.ID)
	}
	return nil
}

func (s *State) gone() []PointID { return slices.Sorted(maps.Keys(s.Forgotten)) }

func (s *State) setGone(ids []PointID) error {
	for _, id := range ids {
		if _, known := s.Forgotten[id]; !known { // pinned ones may have come first
			s.Forgotten[id] = nil
		}
	}
	return nil
}

// pinned gives the forgotten points that are known whole.
func (s *State) pinned() []Point {
	points := []Point{}
	for _, p := range s.Forgotten {
		if p != nil {
			points = append(points, *p)
		}
	}
	slices.SortFunc(points, func(a, b Point) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return points
}

func (s *State) setPinned(points []Point) error {
	for _, p := range points {
		s.Forgotten[p.ID] = &p
	}
	return nil
}

func (s *State) addedBy(adds []seal.Hex) []Adding {
	parts := make([]Adding, len(adds))
	for i, d := range adds {
		parts[i] = s.Added[[32]byte(d)]
	}
	return parts
}

func (s *State) setAdded(adds []seal.Hex, parts []Adding) error {
	if len(parts) != len(adds) {
		return fmt.Errorf("%w: %d for %d index objects", seal.ErrDamaged, len(parts), len(adds))
	}
	for i, d := range adds {
		if len(d) != 32 {
			return fmt.Errorf("%w: index digest", seal.ErrDamaged)
		}
		s.Indexes[[32]byte(d)] = true
		s.Added[[32]byte(d)] = parts[i]
	}
	return nil
}

func (s *State) quarantineHex() map[string]uint64 {
	m := make(map[string]uint64, len(s.Quarantine))
	for name, entry := range s.Quarantine {
		m[hex.EncodeToString(name[:])] = entry
	}
	return m
}

func (s *State) setQuarantine(m map[string]uint64) error {
	for h, entry := range m {
		name, err := seal.ParseDigest(h)
		if err != nil {
			return err
		}
		s.Quarantine[name] = entry
	}
	return nil
}

func (s *State) badItems() []BadItem {
	items := make([]BadItem, 0, len(s.Bad))
	for k := range s.Bad {
		items = append(items, BadItem{k.Pack[:], k.ID[:]})
	}
	slices.SortFunc(items, func(a, b BadItem) int {
		if c := bytes.Compare(a.Pack, b.Pack); c != 0 {
			return c
		}
		return bytes.Compare(a.ID, b.ID)
	})
	return items
}

func (s *State) setBad(items []BadItem) error {
	for _, i := range items {
		if len(i.Pack) != 32 || len(i.ID) != 32 {
			return fmt.Errorf("%w: distrusted item", seal.ErrDamaged)
		}
		s.Bad[Copy{[32]byte(i.Pack), pack.ID(i.ID)}] = true
	}
	return nil
}

func (s *State) setRemoved(ids []string) error {
	for _, id := range ids {
		s.Removed[id] = true
	}
	return nil
}
