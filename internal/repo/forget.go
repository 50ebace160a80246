package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/internal/repo/internal/chain"
)

// UntilTime marks to stay until t.
func UntilTime(t time.Time) Until { return Until(t.UTC().Format(time.RFC3339)) }

// ErrKept is returned by Forget for a point that is marked to stay.
var ErrKept = errors.New("marked to stay")

// errNothing ends an append that has become needless.
var errNothing = errors.New("nothing to do")

// Forget makes the points be no more, all in one entry. Their data goes with a
// later prune; that of a pinned one stays until the pin goes. A point that
// another has forgotten meanwhile is no error; one that never was is
// ErrNotExist, and one whose mark holds at now is ErrKept: then none is
// forgotten.
func (r *Repo) Forget(ctx context.Context, ids []PointID, now time.Time) error {
	ids = slices.Compact(slices.Sorted(slices.Values(ids)))
	allowed := func(s *chain.State) error {
		left := 0
		for _, id := range ids {
			_, live := s.Points[id]
			_, gone := s.Forgotten[id]
			switch {
			case !live && !gone:
				return fmt.Errorf("%s: %w", id, ErrNotExist)
			case live && s.Keep[id].Holds(now):
				return fmt.Errorf("%s: %w %s; take the mark off first", id, ErrKept, s.Keep[id].In(now.Location()))
			case live:
				left++
			}
		}
		if left == 0 {
			return errNothing
		}
		return nil
	}
	err := r.append(ctx, chain.Forget, chain.Clear{}, chain.Sealed{Points: ids}, allowed)
	if err != nil && !errors.Is(err, errNothing) {
		return fmt.Errorf("forget: %w", err)
	}
	return nil
}

// Keep marks points to stay until then, whatever the rules of retention say;
// "" takes the mark off. It replaces an earlier mark.
func (r *Repo) Keep(ctx context.Context, ids []PointID, until Until) error {
	if _, err := time.Parse(time.RFC3339, string(until)); err != nil && until != "" && until != Forever {
		return fmt.Errorf("keep: %q is neither a time nor %q", until, Forever)
	}
	allowed := func(s *chain.State) error {
		same := true
		for _, id := range ids {
			if _, ok := s.Points[id]; !ok {
				return fmt.Errorf("%s: %w", id, ErrNotExist)
			}
			same = same && s.Keep[id] == until
		}
		if same {
			return errNothing
		}
		return nil
	}
	err := r.append(ctx, chain.Keep, chain.Clear{}, chain.Sealed{Points: ids, Until: &until}, allowed)
	if err != nil && !errors.Is(err, errNothing) {
		return fmt.Errorf("keep: %w", err)
	}
	if err := r.lockKept(ctx, ids); err != nil {
		return fmt.Errorf("keep: it is marked, but not all that it needs is locked: %w", err)
	}
	return nil
}
