package repo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/lease"
)

// Lease is a run that has not ended: it is under way, or has died.
type Lease = lease.Lease

// openLeases lists the leases that are neither committed nor revoked in s, which may be
// older than the listing.
func (r *Repo) openLeases(ctx context.Context, s *chain.State) (map[string]Lease, error) {
	return r.leases.Open(ctx, func(session string) bool { return s.Over[session] != 0 })
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
		now, err := r.openLeases(ctx, r.current())
		if err != nil {
			return nil, err
		}
		for session, l := range silent {
			if n, open := now[session]; !open || n.Beat != l.Beat {
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
