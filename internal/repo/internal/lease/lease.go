// Package lease is the small objects by which a repository's users know of one
// another (docs/format.md §6.1).
//
//	leases/SESSION          a run that has not ended: it is under way, or has died
//	leases/SESSION.NUMBER   its beat: the number grows as long as it is alive
//	pins/SESSION.POINT      a session that reads a point, whose data stays
//
// A run relies on nothing in quarantine after the entry that its lease names. What
// ends a lease is an entry of the chain, a commit or a revocation; the object is
// deleted after that. Nobody's clock counts: a run is dead when its beat has not
// changed while somebody watched. No lease, beat or pin is ever locked.
package lease

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/seal"
)

// Leases are a repository's leases and pins. Safe in parallel; the fields are not
// changed once it is in use.
type Leases struct {
	Store blob.Store
	Repo  [16]byte // id of the repository
	// Newest gives the master key of new objects and its number, Master that of
	// a number.
	Newest func() (uint32, *seal.Key)
	Master func(ctx context.Context, number uint32) (*seal.Key, error)
}

// Lease is a run that has not ended: it is under way, or has died.
type Lease struct {
	Session string `json:"session"` // 16 to 64 lower-case hex digits
	Host    string `json:"host"`    // for people
	PID     int    `json:"pid"`     // for people
	// Chain is the newest entry that it knew when it began: what was in
	// quarantine then it does not use. 0 when the lease cannot be read.
	Chain uint64 `json:"chain"`
	// Tier is the tier whose packs it moves; "" for none, "?" when the lease
	// cannot be read.
	Tier string `json:"tier,omitempty"`

	Beat string `json:"-"` // the newest beat; "" before the first
}

// clearPart and who are the parts of a lease as stored.
type clearPart struct {
	Chain uint64 `json:"chain"`
	Lease string `json:"lease"`
}

type who struct {
	Host string `json:"host"`
	PID  int    `json:"pid"`
	Tier string `json:"tier,omitempty"`
}

const dir = "leases/"

// Split takes apart the name of a lease, of a beat or of a pin; more is false for
// that of a lease.
func Split(name string) (session, rest string, more bool) {
	_, base, _ := strings.Cut(name, "/")
	return strings.Cut(base, ".")
}

// Begin stores a lease. It fails with blob.ErrExist when its session has one.
func (l *Leases) Begin(ctx context.Context, run Lease) error {
	return l.put(ctx, dir+run.Session, seal.Lease, clearPart{run.Chain, run.Session}, who{run.Host, run.PID, run.Tier}, "lease")
}

// Beat stores a lease's beat of that number, from 1, and deletes the one before.
func (l *Leases) Beat(ctx context.Context, session string, n int) error {
	err := l.put(ctx, BeatName(session, n), seal.Beat, map[string]int{"beat": n}, struct{}{}, "lease")
	if err == nil && n > 1 {
		_ = l.Store.Delete(ctx, BeatName(session, n-1)) // End deletes what is left
	}
	return err
}

// BeatName is the name of a lease's beat.
func BeatName(session string, n int) string { return fmt.Sprintf("%s%s.%012d", dir, session, n) }

// End deletes a lease and its beats. None is no error.
func (l *Leases) End(ctx context.Context, session string) error {
	names, err := blob.Names(ctx, l.Store, dir+session)
	// The lease itself, which sorts first, goes last: a lease without beats is
	// alive, a beat without its lease is nothing.
	for _, name := range slices.Backward(names) {
		if delErr := l.Store.Delete(ctx, name); !errors.Is(delErr, blob.ErrNotExist) {
			err = errors.Join(err, delErr)
		}
	}
	return err
}

// There gives the names of leases and beats that are there, sorted.
func (l *Leases) There(ctx context.Context) ([]string, error) { return blob.Names(ctx, l.Store, dir) }

// Exists reports whether a lease of the session, or a beat, is there.
func (l *Leases) Exists(ctx context.Context, session string) (bool, error) {
	names, err := blob.Names(ctx, l.Store, dir+session)
	return len(names) > 0, err
}

// Open lists the leases that are there, but for those that are over.
func (l *Leases) Open(ctx context.Context, over func(session string) bool) (map[string]Lease, error) {
	names, err := l.There(ctx)
	if err != nil {
		return nil, err
	}
	open := map[string]Lease{}
	for _, name := range names { // sorted: a lease comes before its beats
		session, beat, isBeat := Split(name)
		if over(session) {
			continue
		}
		if !isBeat {
			run, err := l.read(ctx, session)
			if errors.Is(err, blob.ErrNotExist) {
				continue // it has ended since
			} else if err != nil && !errors.Is(err, seal.ErrDamaged) && !errors.Is(err, seal.ErrVersion) && !errors.Is(err, seal.ErrForeign) {
				return nil, err
			} else if err != nil {
				run = Lease{Session: session, Tier: "?"} // everything has to wait for it
			}
			open[session] = run
		} else if run, ok := open[session]; ok {
			run.Beat = beat
			open[session] = run
		}
	}
	return open, nil
}

// read reads who holds a lease.
func (l *Leases) read(ctx context.Context, session string) (Lease, error) {
	var clear clearPart
	var w who
	if err := l.get(ctx, dir+session, seal.Lease, &clear, &w, "lease"); err != nil {
		return Lease{}, err
	}
	if clear.Lease != session {
		return Lease{}, fmt.Errorf("%s%s: %w: it is the lease of %.80q", dir, session, seal.ErrDamaged, clear.Lease)
	}
	return Lease{Session: session, Host: w.Host, PID: w.PID, Chain: clear.Chain, Tier: w.Tier}, nil
}

// Check reads the lease, beat or pin of that name. It fails with seal.ErrDamaged,
// seal.ErrVersion, seal.ErrForeign or the store's error.
func (l *Leases) Check(ctx context.Context, name string) error {
	session, _, more := Split(name)
	var err error
	switch {
	case strings.HasPrefix(name, pins):
		_, err = l.ReadPin(ctx, name)
	case more:
		err = l.get(ctx, name, seal.Beat, nil, nil, "lease")
	default:
		_, err = l.read(ctx, session)
	}
	return err
}

// Horizon is the newest entry that all of the leases knew when they began:
// what was put into quarantine up to there none of them uses.
func Horizon(open map[string]Lease) uint64 {
	h := uint64(math.MaxUint64)
	for _, l := range open {
		h = min(h, l.Chain)
	}
	return h
}

const pins = "pins/"

// pin is a pin's content.
type pin struct {
	Host    string        `json:"host"` // for people
	Point   chain.PointID `json:"point"`
	Session string        `json:"session"`
}

// PinName is the name of a session's pin of a point.
func PinName(session string, id chain.PointID) string {
	return fmt.Sprintf("%s%s.%s", pins, session, id)
}

// Pin stores a pin. It fails with blob.ErrExist when it is there.
func (l *Leases) Pin(ctx context.Context, session string, id chain.PointID, host string) error {
	return l.put(ctx, PinName(session, id), seal.Pin, struct{}{}, pin{host, id, session}, "pin")
}

// Unpin deletes a session's pins. None is no error.
func (l *Leases) Unpin(ctx context.Context, session string) error {
	names, err := blob.Names(ctx, l.Store, pins+session+".")
	for _, name := range names {
		if delErr := l.Store.Delete(ctx, name); !errors.Is(delErr, blob.ErrNotExist) {
			err = errors.Join(err, delErr)
		}
	}
	return err
}

// Pins gives the names of the pins, sorted.
func (l *Leases) Pins(ctx context.Context) ([]string, error) { return blob.Names(ctx, l.Store, pins) }

// ReadPin gives the point that a pin names, inside as well as in its name.
func (l *Leases) ReadPin(ctx context.Context, name string) (chain.PointID, error) {
	var p pin
	if err := l.get(ctx, name, seal.Pin, nil, &p, "pin"); err != nil {
		return "", err
	}
	if name != PinName(p.Session, p.Point) {
		return "", fmt.Errorf("%s: %w: its name is not what it says", name, seal.ErrDamaged)
	}
	return p.Point, nil
}

func (l *Leases) put(ctx context.Context, name, magic string, clear, content any, purpose string) error {
	c, err := json.Marshal(content)
	if err != nil {
		return err
	}
	number, master := l.Newest()
	p, err := seal.MarshalUnsigned(seal.NewHeader(magic, 0, number, l.Repo), clear, c, master, purpose)
	if err != nil {
		return err
	}
	return l.Store.Put(ctx, name, p)
}

// get reads an object's parts; nil is for one that does not matter.
func (l *Leases) get(ctx context.Context, name, magic string, clear, content any, purpose string) error {
	p, err := l.Store.Get(ctx, name, 0, -1)
	if err != nil {
		return err
	}
	raw, err := seal.ParseOf(p, magic, l.Repo)
	var master *seal.Key
	if err == nil {
		master, err = l.Master(ctx, raw.Header.Key)
	}
	var c []byte
	if err == nil {
		c, err = raw.Open(master, purpose)
	}
	if err == nil && content != nil {
		err = seal.Unmarshal(c, content)
	}
	if err == nil && clear != nil {
		err = seal.Unmarshal(raw.Clear, clear)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
