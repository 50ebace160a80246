package repo

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/keyring"
)

const (
	day = 24 * time.Hour
	// lockStep is what ends of locks are rounded up to, so that an object is
	// locked again once in a step.
	lockStep = 7 * day
	// lockMargin is how much the store's clock may be ahead of this machine's.
	lockMargin = day
	// locking is how many objects are locked at once: each takes some requests.
	locking = 16
)

// wantedLock is the least lock of what a point needs that is committed at that time.
func wantedLock(rule Immutability, now time.Time) blob.Lock {
	return blob.Lock{Until: now.Add(time.Duration(rule.Days)*day + lockMargin), Mode: blob.ParseLockMode(rule.Mode)}
}

// rootKey is under what the lock cache has a whole map: all its items have a
// good copy that is locked. Distrust may take that copy, and nothing else does.
func rootKey(s *chain.State, r Root) string {
	return "map " + string(r) + " " + strconv.FormatUint(s.Locks.Distrusted, 10)
}

// lockEnd is when a lock ends that is to hold until t at least.
func lockEnd(t time.Time) time.Time {
	const step = int64(lockStep / time.Second)
	return time.Unix((t.Unix()/step+1)*step, 0).UTC()
}

// Immutable tells the rule.
func (r *Repo) Immutable(ctx context.Context) (Immutability, error) {
	err := r.refresh(ctx)
	return r.current().Locks.Immutability, err
}

// ErrNoRule is returned for a store that does not keep the locks which a rule
// that is to be set would want.
var ErrNoRule = errors.New("no immutability")

// TryLocks proves that a store keeps locks of that mode, before a rule is set.
// ErrNoRule is the proof of the contrary.
func TryLocks(ctx context.Context, s blob.Store, mode string) error {
	err := tryLocks(ctx, s, mode)
	if errors.Is(err, blob.ErrNoLock) {
		err = fmt.Errorf("%w: %w", ErrNoRule, err)
	}
	return err
}

func tryLocks(ctx context.Context, s blob.Store, mode string) error {
	m := blob.ParseLockMode(mode)
	if m == 0 {
		return fmt.Errorf("lock mode %q is neither governance nor compliance", mode)
	}
	l, ok := blob.As[blob.Locker](s)
	if !ok {
		return fmt.Errorf("%w: it has no means to", blob.ErrNoLock)
	}
	return l.Canary(ctx, m)
}

// ErrLockMode is returned by SetImmutable: locks that are held do not become
// compliance locks.
var ErrLockMode = errors.New("there are governance locks, which nobody turns into compliance locks")

// SetImmutable sets the rule, once the store has proved that it keeps it, and
// locks what all living points need. When only the latter fails, the rule is
// set, and check does the rest. report is told how many objects are locked.
func (r *Repo) SetImmutable(ctx context.Context, rule Immutability, report func(done, total int64)) error {
	if rule.Days < 0 || rule.Days > MaxImmutableDays {
		return fmt.Errorf("immutable for %d days: at most %d", rule.Days, MaxImmutableDays)
	}
	if rule.Days == 0 {
		rule.Mode = ""
	} else if err := TryLocks(ctx, r.store, rule.Mode); err != nil {
		return fmt.Errorf("nothing was changed: %w", err)
	}
	allowed := func(s *chain.State) error {
		switch {
		case rule.Days > 0 && blob.ParseLockMode(s.Locks.Mode) == blob.Governance && blob.ParseLockMode(rule.Mode) == blob.Compliance:
			return ErrLockMode
		case rule.Days == s.Locks.Days && (rule.Days == 0 || rule.Mode == s.Locks.Mode):
			return errNothing
		}
		return nil
	}
	err := r.append(ctx, chain.Locks, chain.Clear{Locks: &rule}, chain.Sealed{}, allowed)
	if err != nil && !errors.Is(err, errNothing) {
		return fmt.Errorf("immutability: %w", err)
	}
	s := r.current()
	now := r.now()
	until := func(p *Point) time.Time {
		return later(wantedLock(s.Locks.Immutability, now).Until, keptUntil(s, p.ID, now))
	}
	if err := r.protect(ctx, s, until, report); err != nil {
		return fmt.Errorf("the rule is set, but not all is locked yet, which \"holdfast check\" does: %w", err)
	}
	return nil
}

func later(a, b time.Time) time.Time {
	if a.Before(b) {
		return b
	}
	return a
}

// keptUntil is until when a mark wants a point's locks to hold; zero for not
// at all.
func keptUntil(s *chain.State, id PointID, now time.Time) time.Time {
	mark := s.Keep[id]
	if s.Locks.Days == 0 || !mark.Holds(now) {
		return time.Time{}
	}
	t, err := time.Parse(time.RFC3339, string(mark))
	if err != nil { // for ever
		return wantedLock(s.Locks.Immutability, now).Until
	}
	if most := now.Add(MaxImmutableDays * day); t.After(most) {
		return most
	}
	return t
}

// promised is until when the rule wants a point to be locked; zero when that
// is over.
func promised(s *chain.State, p *Point, now time.Time) time.Time {
	t := p.Time.Add(time.Duration(s.Locks.Days) * day)
	if s.Locks.Days == 0 || !t.After(now) || p.Time.After(now.Add(lockMargin)) {
		return time.Time{}
	}
	return t
}

// protect locks what living points need until the times that until gives; zero
// for a point that is left out.
func (r *Repo) protect(ctx context.Context, s *chain.State, until func(*Point) time.Time, report func(done, total int64)) error {
	if s.Locks.Days == 0 {
		return nil
	}
	ends, err := r.needsOf(ctx, s, until)
	if err != nil || len(ends) == 0 {
		return err
	}
	return r.lockEach(ctx, ends, blob.ParseLockMode(s.Locks.Mode), report)
}

// needsOf gives what living points need, and until when it is to be locked:
// the latest of what until says for the points.
func (r *Repo) needsOf(ctx context.Context, s *chain.State, until func(*Point) time.Time) (map[string]time.Time, error) {
	type claim struct {
		p     Point
		until time.Time
	}
	var claims []claim
	for _, id := range s.Order {
		if p, ok := s.Points[id]; ok {
			if t := until(&p); !t.IsZero() {
				claims = append(claims, claim{p, t})
			}
		}
	}
	ends := map[string]time.Time{}
	if len(claims) == 0 {
		return ends, nil
	}
	slices.SortStableFunc(claims, func(a, b claim) int { return b.until.Compare(a.until) })
	common, err := r.common(ctx, s)
	if err != nil {
		return nil, err
	}
	for _, name := range common {
		ends[name] = claims[0].until
	}
	n := newNeeds(r.node, r.presentIn)
	for _, c := range claims { // the latest first: what was seen is locked long enough
		if err := n.point(ctx, &c.p); err != nil {
			return nil, err
		}
		for _, pack := range n.take() {
			ends[packName(pack)] = c.until
		}
	}
	return ends, nil
}

// common lists what every point needs besides packs.
func (r *Repo) common(ctx context.Context, s *chain.State) ([]string, error) {
	names, err := r.keyNames(ctx)
	if err != nil {
		return nil, err
	}
	for n := max(1, s.Older); n <= s.Head; n++ {
		names = append(names, chain.Name(n))
	}
	for d := range s.Indexes {
		names = append(names, index.Name(d))
	}
	return names, nil
}

// lock makes sure that objects are locked at least so, as this machine has read
// back now or earlier.
func (r *Repo) lock(ctx context.Context, names []string, want blob.Lock) error {
	return r.lockAll(ctx, names, want, nil)
}

// lockAll is lock, and tells report how many of the objects that were not locked
// so far are. It is called in parallel; nil is nobody.
func (r *Repo) lockAll(ctx context.Context, names []string, want blob.Lock, report func(done, total int64)) error {
	ends := make(map[string]time.Time, len(names))
	for _, name := range names {
		ends[name] = want.Until
	}
	return r.lockEach(ctx, ends, want.Mode, report)
}

func (r *Repo) lockEach(ctx context.Context, ends map[string]time.Time, mode blob.LockMode, report func(done, total int64)) error {
	maps.DeleteFunc(ends, func(name string, until time.Time) bool {
		return r.locks.holds(name, blob.Lock{Until: until, Mode: mode})
	})
	if len(ends) == 0 {
		return nil
	}
	locker, ok := blob.As[blob.Locker](r.store)
	if !ok {
		return fmt.Errorf("%w: it has no means to", blob.ErrNoLock)
	}
	var done atomic.Int64
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(locking)
	for name, until := range ends {
		g.Go(func() error {
			l := blob.Lock{Until: lockEnd(until), Mode: mode}
			if err := locker.Lock(gctx, name, l); err != nil {
				return fmt.Errorf("lock %s: %w", name, err)
			}
			r.locks.set(name, l)
			if n := done.Add(1); report != nil {
				report(n, int64(len(ends)))
			}
			return nil
		})
	}
	return errors.Join(g.Wait(), r.locks.save(r.now()))
}

// lockKeys locks keys that were just made, as lockEntry does.
func (r *Repo) lockKeys(ctx context.Context) {
	s := r.current()
	if s.Locks.Days == 0 {
		return
	}
	names, err := r.keyNames(ctx)
	if err == nil {
		_ = r.lock(ctx, names, wantedLock(s.Locks.Immutability, r.now()))
	}
}

// keyNames lists what opens the repository.
func (r *Repo) keyNames(ctx context.Context) ([]string, error) {
	docs, u, err := r.slots(ctx)
	if err != nil {
		return nil, err
	}
	names := []string{configName, u.Name}
	for _, k := range docs {
		if r.slotState(u, k) == SlotCurrent {
			names = append(names, keyring.SlotName(k.ID))
		}
	}
	return names, nil
}

// lockEntry locks an entry that was just created. When it cannot, the next run
// or check does.
func (r *Repo) lockEntry(ctx context.Context, n uint64) {
	s := r.current()
	if s.Locks.Days == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	_ = r.lock(ctx, []string{chain.Name(n)}, wantedLock(s.Locks.Immutability, r.now()))
}
