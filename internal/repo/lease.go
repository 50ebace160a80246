package repo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/seal"
)

// Lease is a run that has not ended: it is under way, or has died.
type Lease struct {
	Session string `json:"session"`
	Host    string `json:"host"` // for people
	PID     int    `json:"pid"`  // for people
	// Chain is the newest entry that it knew when it began: what was in
	// quarantine then it does not use. 0 when the lease cannot be read.
	Chain uint64 `json:"chain"`
	// Tier is the tier whose packs it moves; "" for none, "?" when the lease
	// cannot be read.
	Tier string `json:"tier,omitempty"`

	beat string // the newest beat's name; "" before the first
}

// splitName takes apart the name of a lease, leases/SESSION, of its beat,
// leases/SESSION.NUMBER, or of a pin, pins/SESSION.POINT.
func splitName(name string) (session, rest string, more bool) {
	_, base, _ := strings.Cut(name, "/")
	return strings.Cut(base, ".")
}

// leases lists the leases that are open: there, and neither committed nor
// revoked in s, which may be older than the listing.
func (r *Repo) leases(ctx context.Context, s *chain.State) (map[string]Lease, error) {
	names, err := blob.Names(ctx, r.store, "leases/")
	if err != nil {
		return nil, err
	}
	open := map[string]Lease{}
	for _, name := range names { // sorted: a lease comes before its beats
		session, beat, isBeat := splitName(name)
		if s.Over[session] != 0 {
			continue
		}
		if !isBeat {
			l, err := r.readLease(ctx, session)
			if errors.Is(err, blob.ErrNotExist) {
				continue // it has ended since
			} else if err != nil && !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) && !errors.Is(err, seal.ErrForeign) {
				return nil, err
			} else if err != nil {
				l.Tier = "?"
			}
			open[session] = l
		} else if l, ok := open[session]; ok {
			l.beat = beat
			open[session] = l
		}
	}
	return open, nil
}

// readLease reads who holds a lease. On damage the zero values make it one
// that everything has to wait for.
func (r *Repo) readLease(ctx context.Context, session string) (Lease, error) {
	l := Lease{Session: session}
	raw, err := getDocument(ctx, r.store, "leases/"+session, seal.Lease, r.id)
	if err != nil {
		return l, err
	}
	master, err := r.keys.Master(raw.Header.Key)
	if err != nil {
		return l, err
	}
	who, err := raw.Open(master, "lease")
	if err != nil {
		return l, err
	}
	var clear struct {
		Lease string `json:"lease"`
		Chain uint64 `json:"chain"`
	}
	if err := errors.Join(seal.Unmarshal(who, &l), seal.Unmarshal(raw.Clear, &clear)); err != nil {
		return Lease{Session: session}, err
	}
	if clear.Lease != session {
		return Lease{Session: session}, fmt.Errorf("leases/%s: %w: it is the lease of %.80q", session, ErrDamaged, clear.Lease)
	}
	l.Session, l.Chain = session, clear.Chain
	return l, nil
}

// horizon is the newest entry that all of the leases knew when they began:
// what was put into quarantine up to there none of them uses.
func horizon(open map[string]Lease) uint64 {
	h := uint64(math.MaxUint64)
	for _, l := range open {
		h = min(h, l.Chain)
	}
	return h
}

// watchPolls is how often the beats are looked at while leases are watched.
const watchPolls = 30

// watch looks at the leases for as long as limit, and gives those that have
// shown no sign of life in all that time. It ends early when every one has
// shown one, or has ended. The time is this process's own: when the machine
// stood still in between, watching begins again.
func (r *Repo) watch(ctx context.Context, leases map[string]Lease, limit time.Duration) ([]string, error) {
	silent := maps.Clone(leases)
	poll := limit / watchPolls
	began := time.Now() // its monotonic part counts
	for last := began; len(silent) > 0 && time.Since(began) < limit; {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(poll):
		}
		if err := r.refresh(ctx); err != nil {
			return nil, err
		}
		now, err := r.leases(ctx, r.current())
		if err != nil {
			return nil, err
		}
		for session, l := range silent {
			if n, open := now[session]; !open || n.beat != l.beat {
				delete(silent, session)
			}
		}
		if gap := time.Since(last); gap > 3*poll+time.Minute {
			began = time.Now()
		}
		last = time.Now()
	}
	return slices.Sorted(maps.Keys(silent)), nil
}

// revoke ends a dead run's lease, unless it has ended by itself.
func (r *Repo) revoke(ctx context.Context, session string) error {
	err := r.append(ctx, chain.Revoke, chain.Clear{Lease: session}, chain.Sealed{}, func(s *chain.State) error {
		if s.Over[session] != 0 {
			return errNothing
		}
		return nil
	})
	if err != nil && !errors.Is(err, errNothing) {
		return fmt.Errorf("revoke lease %s: %w", session, err)
	}
	return r.EndLease(ctx, session)
}
