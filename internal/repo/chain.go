package repo

import (
	"bytes"
	"context"
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
	"time"

	"golang.org/x/sync/errgroup"

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
)

// entryClear is an entry's clear part.
type entryClear struct {
	Number   uint64     `json:"number"`
	Previous seal.Hex   `json:"previous"`
	Time     time.Time  `json:"time"`
	Adds     []seal.Hex `json:"adds,omitempty"`
	Drops    []seal.Hex `json:"drops,omitempty"`
	Lease    string     `json:"lease,omitempty"`

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
	forgotten  map[PointID]Point   // a pin may still keep their data
	keep       map[PointID]Until   // marked to stay
	indexes    map[[32]byte]bool   // live index objects
	added      map[[32]byte]adding // by what entry, of each of those
	over       map[string]kind     // leases: committed or revoked
	quarantine map[[32]byte]uint64 // packs, and the entry that put them there
	bad        map[badKey]bool
	time       time.Time       // of the head, for people
	keyring    int             // number of the newest one that an entry names
	removed    map[string]bool // key slots
	// quarantined is the newest entry that put packs into quarantine, moved the
	// newest that changed which copies count: quarantine, sweep, distrust.
	quarantined, moved uint64
	// locks is the rule on immutability; a checkpoint carries its Immutability.
	locks lockState
	// gaps are entries that are damaged or missing. Reading goes on without
	// them; nothing is appended to a chain with gaps.
	gaps []string
	// unknown: digest is not known, since entry head is a gap.
	unknown bool
}

// adding tells when, and in which run, an index object was added.
type adding struct {
	entry uint64
	lease string
}

func newState(config [32]byte) *state {
	return &state{digest: config, points: map[PointID]Point{}, forgotten: map[PointID]Point{}, keep: map[PointID]Until{},
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
	if err := seal.Unmarshal(content, &sealed); err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	if err := s.take(kind(raw.Header.Kind), &c, &sealed); err != nil {
		return fmt.Errorf("%s: %w", entryName(n), err)
	}
	s.head, s.digest, s.unknown, s.time = n, sha256.Sum256(p), false, c.Time
	return nil
}

// skip goes past an entry that is damaged or missing.
func (s *state) skip(why error) {
	s.head++
	s.unknown = true
	s.gaps = append(s.gaps, why.Error())
}

// take changes the state as the entry says.
func (s *state) take(k kind, c *entryClear, e *entrySealed) error {
	switch k {
	case kindAdd:
	case kindKeys:
		if err := s.takeKeys(e); err != nil {
			return err
		}
	case kindSweep:
		s.moved = c.Number
	case kindCommit:
		if e.Point == nil || e.Point.ID == "" {
			return fmt.Errorf("%w: commit without a point", ErrDamaged)
		}
		if _, ok := s.forgotten[e.Point.ID]; ok { // it was copied here once more
			s.order = slices.DeleteFunc(s.order, func(id PointID) bool { return id == e.Point.ID })
			delete(s.forgotten, e.Point.ID)
		}
		s.points[e.Point.ID] = *e.Point
		s.order = append(s.order, e.Point.ID)
		s.over[c.Lease] = k
		s.locks.commit = c.Number
	case kindForget:
		for _, id := range e.Points {
			if p, ok := s.points[id]; ok {
				s.forgotten[id] = p
				delete(s.points, id)
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
		s.locks.distrusted = c.Number
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

// load reads the whole chain: at Open, before anything is shared.
func (r *Repo) load(ctx context.Context) error {
	seen, err := r.seen()
	if err != nil {
		return err
	}
	entries, err := r.entries(ctx)
	if err != nil {
		return err
	}
	for _, p := range entries {
		if err := r.applyOrSkip(ctx, r.state, p); err != nil {
			return err
		}
		if r.state.head == seen.Number && !r.state.unknown && !bytes.Equal(seen.Digest, r.state.digest[:]) {
			return r.rolledBack(seen)
		}
	}
	if seen.Number > r.state.head {
		return r.rolledBack(seen)
	}
	return r.remember(r.state)
}

// entries reads all entries up to the greatest number; nil for one that is not
// there.
func (r *Repo) entries(ctx context.Context) ([][]byte, error) {
	names, err := listNames(ctx, r.store, "chain/")
	if err != nil || len(names) == 0 {
		return nil, err
	}
	last, err := strconv.ParseUint(strings.TrimPrefix(names[len(names)-1], "chain/"), 10, 64)
	if err != nil || last > uint64(len(names))+maxGap {
		return nil, fmt.Errorf("%s: %w: not the name of the chain's newest entry", names[len(names)-1], ErrDamaged)
	}
	entries := make([][]byte, last)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range entries {
		g.Go(func() error {
			p, err := r.store.Get(gctx, entryName(uint64(i+1)), 0, -1)
			if errors.Is(err, blob.ErrNotExist) {
				return nil
			}
			entries[i] = p
			return err
		})
	}
	return entries, g.Wait()
}

// maxGap bounds how many entries may be missing in a chain that is read all
// the same.
const maxGap = 1 << 20

// applyOrSkip takes an entry in, or notes that it is damaged or missing.
func (r *Repo) applyOrSkip(ctx context.Context, s *state, p []byte) error {
	if p == nil {
		s.skip(fmt.Errorf("%s: %w: missing", entryName(s.head+1), ErrDamaged))
		return nil
	}
	return s.skipDamage(r.apply(ctx, s, p))
}

// skipDamage notes damage; other errors it returns.
func (s *state) skipDamage(err error) error {
	if errors.Is(err, ErrDamaged) || errors.Is(err, seal.ErrForeign) {
		s.skip(err)
		return nil
	}
	return err
}

// headSeen is the newest chain entry that this machine has seen.
type headSeen struct {
	Number uint64   `json:"number"`
	Digest seal.Hex `json:"digest"`
}

func (r *Repo) headPath() string { return filepath.Join(r.cache, "head") }

func (r *Repo) seen() (h headSeen, err error) {
	p, err := os.ReadFile(r.headPath())
	if errors.Is(err, os.ErrNotExist) {
		return h, nil
	} else if err != nil {
		return h, err
	}
	if err := json.Unmarshal(p, &h); err != nil {
		return h, fmt.Errorf("%s: %w; delete it to go on without the detection of a rollback", r.headPath(), err)
	}
	return h, nil
}

func (r *Repo) rolledBack(seen headSeen) error {
	return fmt.Errorf("%w: entry %d of its chain is missing or another one; if you put back an older copy yourself, delete %s",
		ErrRolledBack, seen.Number, r.headPath())
}

// remember keeps the head for the next Open. A crash here costs only that.
func (r *Repo) remember(s *state) error {
	if s.head == 0 || s.unknown {
		return nil
	}
	if err := os.MkdirAll(r.cache, 0o700); err != nil {
		return err
	}
	p, err := json.Marshal(headSeen{s.head, s.digest[:]})
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(r.cache, "head-*")
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), r.headPath())
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// refresh reads the entries after the head and the index objects that are new.
func (r *Repo) refresh(ctx context.Context) error {
	r.refreshing.Lock()
	defer r.refreshing.Unlock()
	return r.refreshLocked(ctx)
}

func (r *Repo) refreshLocked(ctx context.Context) error {
	old := r.current()
	s := old
	for {
		p, err := r.store.Get(ctx, entryName(s.head+1), 0, -1)
		if errors.Is(err, blob.ErrNotExist) {
			// An index object that is gone may have been replaced meanwhile.
			if err := r.readIndexes(ctx, s); errors.Is(err, errMoved) {
				continue
			} else if err != nil {
				return err
			}
			break
		} else if err != nil {
			return err
		}
		if s == old {
			s = old.clone()
		}
		err = r.apply(ctx, s, p)
		if errors.Is(err, seal.ErrNoKey) && len(s.gaps) == 0 {
			return fmt.Errorf("%w: %s", ErrKeys, err) // not damage: it was whole when it was opened
		}
		if err := s.skipDamage(err); err != nil {
			return err
		}
	}
	if s.keyring > old.keyring {
		if err := r.learn(ctx); err != nil {
			return err
		}
	}
	if s == old {
		return nil
	}
	r.mu.Lock()
	r.state = s
	r.mu.Unlock()
	return r.remember(s)
}

func (s *state) clone() *state {
	c := *s
	c.points, c.indexes, c.over = cloneMap(s.points), cloneMap(s.indexes), cloneMap(s.over)
	c.quarantine, c.bad, c.removed = cloneMap(s.quarantine), cloneMap(s.bad), cloneMap(s.removed)
	c.forgotten, c.keep, c.added = cloneMap(s.forgotten), cloneMap(s.keep), cloneMap(s.added)
	c.order = append([]PointID(nil), s.order...)
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

func (r *Repo) live(index [32]byte) bool { return r.current().indexes[index] }

func indexName(d [32]byte) string { return "index/" + hex.EncodeToString(d[:]) }

// indexClear is an index object's clear part.
type indexClear struct {
	Packs      []packRow  `json:"packs"`
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
		content, err = raw.Open(master, "index")
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	packs := make([]index.Pack, len(c.Packs))
	for i, row := range c.Packs {
		packs[i] = index.Pack{Name: row.Name, Size: row.Size, Kind: row.Kind}
	}
	if err := index.Unmarshal(content, packs); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return packs, nil
}

// putIndex stores an index object for the packs.
func (r *Repo) putIndex(ctx context.Context, packs []index.Pack, supersedes ...seal.Hex) ([32]byte, error) {
	c := indexClear{Packs: make([]packRow, len(packs)), Supersedes: supersedes}
	for i, k := range packs {
		c.Packs[i] = packRow{k.Name, k.Size, k.Kind}
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
	r.refreshing.Lock()
	defer r.refreshing.Unlock()
	for {
		if err := r.refreshLocked(ctx); err != nil {
			return err
		}
		s := r.current()
		if len(s.gaps) > 0 {
			return fmt.Errorf("%s; reading and restoring work, but nothing can be added: put the entry back from a copy of the repository", s.gaps[0])
		}
		if err := allowed(s); err != nil {
			return err
		}
		c.Number, c.Previous, c.Time = s.head+1, s.digest[:], time.Now().UTC()
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
		mine, err := r.putEntry(ctx, entryName(c.Number), p)
		if err != nil {
			return err
		}
		if mine {
			err := r.refreshLocked(context.WithoutCancel(ctx))
			r.lockEntry(ctx, c.Number)
			return err
		}
	}
}

// putEntry creates an entry and says whether it is ours. A Put that failed may
// have done its work all the same, so the store is asked what is there.
func (r *Repo) putEntry(ctx context.Context, name string, p []byte) (mine bool, err error) {
	putErr := r.store.Put(ctx, name, p)
	if putErr == nil {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	there, err := r.store.Get(ctx, name, 0, -1)
	switch {
	case err == nil && bytes.Equal(there, p):
		return true, nil
	case err == nil && errors.Is(putErr, blob.ErrExist):
		return false, nil
	}
	return false, putErr
}
