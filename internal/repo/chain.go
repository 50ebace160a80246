package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/index"
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
	entry uint64
	lease string
}

func newState(config [32]byte) *state {
	return &state{digest: config, points: map[PointID]Point{}, committed: map[PointID]uint64{}, forgotten: map[PointID]*Point{}, keep: map[PointID]Until{},
		indexes: map[[32]byte]bool{}, added: map[[32]byte]adding{},
		over: map[string]kind{}, quarantine: map[[32]byte]uint64{}, bad: map[badKey]bool{}, removed: map[string]bool{}}
}

func entryName(n uint64) string { return fmt.Sprintf("chain/%012d", n) }

// apply checks entry n's bytes against the state and takes it in.
func (r *Repo) apply(ctx context.Context, s *state, p []byte) error {
	n := s.head + 1
	raw, err := seal.Parse(p, seal.Entry)
	if err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	if err := raw.Verify(r.id, r.pub); err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	var c entryClear
	var sealed entrySealed
	if err := seal.Unmarshal(raw.Clear, &c); err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	if c.Number != n || !s.unknown && !bytes.Equal(c.Previous, s.digest[:]) {
		return fmt.Errorf("%s: %w: it does not follow its predecessor; an entry was exchanged or removed", entryName(n), ErrDamaged)
	}
	master, err := r.master(ctx, raw.Header.Key)
	if err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	content, err := raw.Open(master, "chain")
	if err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	if kind(raw.Header.Kind) == kindCheckpoint {
		err = s.takeCheckpoint(&c, content)
	} else if err = seal.Unmarshal(content, &sealed); err == nil {
		err = s.take(kind(raw.Header.Kind), &c, &sealed)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	s.head, s.digest, s.unknown, s.time = n, sha256.Sum256(p), false, c.Time
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

// current is the state as last refreshed.
func (r *Repo) current() *state {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.state
}

func indexName(d [32]byte) string { return "index/" + hex.EncodeToString(d[:]) }

// indexClear is an index object's clear part.
type indexClear struct {
	Packs      []packRow  `json:"packs"`
	Made       []int64    `json:"made,omitempty"`
	Supersedes []seal.Hex `json:"supersedes,omitempty"`
}

// packRow is ["<64 hex>", size, kind].
type packRow struct {
	Name [32]byte
	Size int64
	Kind uint16
}

func (p packRow) MarshalJSON() ([]byte, error) {
	return json.Marshal([]any{hex.EncodeToString(p.Name[:]), p.Size, p.Kind})
}

func (p *packRow) UnmarshalJSON(b []byte) error {
	var name string
	row := []any{&name, &p.Size, &p.Kind}
	if err := json.Unmarshal(b, &row); err != nil {
		return err
	}
	d, err := parseDigest(name)
	p.Name = d
	return err
}

// readIndex reads a live index object.
func (r *Repo) readIndex(ctx context.Context, d [32]byte) ([]index.Pack, error) {
	name := indexName(d)
	p, err := r.store.Get(ctx, name, 0, -1)
	if errors.Is(err, blob.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w: missing", name, ErrDamaged)
	} else if err != nil {
		return nil, err
	}
	if sha256.Sum256(p) != d {
		return nil, fmt.Errorf("%s: %w: its bytes are not what its name says", name, ErrDamaged)
	}
	raw, err := seal.Parse(p, seal.Index)
	if err == nil {
		err = raw.Verify(r.id, r.pub)
	}
	var c indexClear
	if err == nil {
		err = seal.Unmarshal(raw.Clear, &c)
	}
	var master *seal.Key
	if err == nil {
		master, err = r.master(ctx, raw.Header.Key)
	}
	var content []byte
	if err == nil {
		content, err = raw.OpenOver(master, "index")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	packs := make([]index.Pack, len(c.Packs))
	for i, row := range c.Packs {
		packs[i] = index.Pack{Name: row.Name, Size: row.Size, Kind: row.Kind}
		if len(c.Made) == len(packs) {
			packs[i].Made = c.Made[i]
		}
	}
	if err := index.Unmarshal(content, packs); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return packs, nil
}

// putIndex stores an index object for the packs.
func (r *Repo) putIndex(ctx context.Context, packs []index.Pack, supersedes ...seal.Hex) ([32]byte, error) {
	c := indexClear{Packs: make([]packRow, len(packs)), Made: make([]int64, len(packs)), Supersedes: supersedes}
	for i, k := range packs {
		c.Packs[i], c.Made[i] = packRow{k.Name, k.Size, k.Kind}, k.Made
	}
	clear, err := json.Marshal(c)
	if err != nil {
		return [32]byte{}, err
	}
	number, master := r.ring.Newest()
	d := seal.Document{Header: seal.NewHeader(seal.Index, 0, number, r.id), Clear: clear, Sealed: index.Marshal(packs)}
	p, err := d.Marshal(master, "index", r.sign)
	if err != nil {
		return [32]byte{}, err
	}
	sum := sha256.Sum256(p)
	return sum, r.store.Put(ctx, indexName(sum), p)
}

// append creates the next entry of the chain. allowed sees the state that the
// entry will follow, each time that another writer was faster. When append
// returns nil the entry is durable and refreshed into the state.
func (r *Repo) append(ctx context.Context, k kind, c entryClear, e entrySealed, allowed func(*state) error) error {
	content, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return r.appendContent(ctx, k, c, content, e.Point, allowed)
}

// appendContent is append for a sealed part as it is; point is what it
// commits, if it does.
func (r *Repo) appendContent(ctx context.Context, k kind, c entryClear, content []byte, point *Point, allowed func(*state) error) error {
	r.refreshing.Lock()
	defer r.refreshing.Unlock()
	for {
		if _, err := r.refreshLocked(ctx); err != nil {
			return err
		}
		s := r.current()
		if len(s.gaps) > 0 {
			return fmt.Errorf("%s; reading and restoring work, but nothing can be added: put the entry back from a copy of the repository", s.gaps[0])
		}
		if err := allowed(s); err != nil {
			return err
		}
		c.Number, c.Previous, c.Time, c.Start = s.head+1, s.digest[:], time.Now().UTC(), s.older
		if k == kindCheckpoint {
			c.Start = s.checkpoint
		}
		clear, err := json.Marshal(c)
		if err != nil {
			return err
		}
		number, master := r.ring.Newest()
		d := seal.Document{Header: seal.NewHeader(seal.Entry, uint16(k), number, r.id), Clear: clear, Sealed: content}
		p, err := d.Marshal(master, "chain", r.sign)
		if err != nil {
			return err
		}
		mine, err := blob.Claim(ctx, r.store, entryName(c.Number), p)
		if err != nil {
			return err
		}
		if mine {
			err := r.arrived(context.WithoutCancel(ctx), c.Number, p, point)
			r.lockEntry(ctx, c.Number)
			return err
		}
	}
}

// ErrLeftBehind: this process stood still while others went on for so long
// that it cannot be told whether what it added counts.
var ErrLeftBehind = errors.New("this process stood still while the repository's chain went on for thousands of entries; what it was about to do is void")

// arrived takes in the news after entry n, whose bytes p this process has just
// stored, and makes sure that n is in the chain. Its name may have been free
// because the true entry n was deleted: then entry n-1 is gone as well, which
// shows (docs/format.md §6.4).
func (r *Repo) arrived(ctx context.Context, n uint64, p []byte, point *Point) error {
	anew, err := r.refreshLocked(ctx)
	if err != nil || !anew {
		return err
	}
	s := r.current()
	if n >= s.older {
		if there, err := r.store.Get(ctx, entryName(n), 0, -1); err != nil || bytes.Equal(there, p) {
			return err
		}
		return ErrLeftBehind
	}
	if point != nil {
		_, live := s.points[point.ID]
		_, gone := s.forgotten[point.ID]
		if live || gone {
			return nil
		}
	}
	// What is before the chain's start is nothing to anybody.
	if err := r.store.Delete(ctx, entryName(n)); err != nil && !errors.Is(err, blob.ErrNotExist) {
		return errors.Join(ErrLeftBehind, err)
	}
	return ErrLeftBehind
}
