package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/seal"
)

// LockReport is what a check found of locks.
type LockReport struct {
	Immutability
	Objects int `json:"objects"` // whose locks were read back
	Locked  int `json:"locked"`  // of these, locked now: too short or not at all before
}

// locks tries whether the store keeps its locks, reads back those of all that
// points within their time need, and locks what is not, or too short. It is a
// problem where the store had told that it was locked, or cannot lock.
func (c *checker) locks(ctx context.Context) error {
	s := c.r.current()
	if s.Locks.Days == 0 {
		return nil
	}
	c.report.Locks = &LockReport{Immutability: s.Locks.Immutability}
	err := tryLocks(ctx, c.r.store, s.Locks.Mode)
	if errors.Is(err, blob.ErrNoLock) {
		c.problem(noLocks(s.Locks.Immutability, err))
		return nil
	} else if ctx.Err() != nil {
		return err
	} else if err != nil {
		c.problem(Problem{Object: "locks", What: fmt.Sprintf("whether the store keeps its locks could not be tried: %v", err)})
		return nil
	}
	now := c.r.now()
	must, err := c.r.needsOf(ctx, s, func(p *Point) time.Time {
		t := promised(s, p, now)
		if mark := s.Keep[p.ID]; mark != Forever {
			t = later(t, keptUntil(s, p.ID, now))
		}
		return t
	})
	if err != nil {
		return err
	}
	want, err := c.r.needsOf(ctx, s, func(p *Point) time.Time { return keptUntil(s, p.ID, now) })
	if err != nil {
		return err
	}
	for name, t := range must {
		want[name] = later(want[name], t)
	}
	locker, _ := blob.As[blob.Locker](c.r.store)
	var mu sync.Mutex // guards what may be known of locks by now
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(locking)
	for name, until := range want {
		g.Go(func() error {
			was, now, err := c.lockAgain(gctx, locker, name, blob.Lock{Until: until, Mode: blob.ParseLockMode(s.Locks.Mode)})
			if errors.Is(err, blob.ErrNotExist) {
				return nil // that it is missing is told elsewhere
			}
			mu.Lock()
			defer mu.Unlock()
			c.report.Locks.Objects++
			if now != was {
				c.report.Locks.Locked++
			}
			switch {
			case gctx.Err() != nil:
				return gctx.Err()
			case err != nil:
				c.problem(Problem{Object: name, What: fmt.Sprintf("cannot be locked: %v", err)})
			case !must[name].IsZero() && !was.Holds(blob.Lock{Until: must[name], Mode: blob.ParseLockMode(s.Locks.Mode)}) && wasLocked(s, name) && !c.undeleted(name):
				c.problem(Problem{Object: name, What: fmt.Sprintf("it was %s, should be until %s; it is locked now", lockText(was), must[name].UTC().Format(time.DateOnly))})
			}
			return nil
		})
	}
	return errors.Join(g.Wait(), c.r.locks.save(c.r.now()))
}

func (c *checker) undeleted(name string) bool {
	return slices.ContainsFunc(c.o.Undeleted, func(u Undeleted) bool { return u.Object == name })
}

func noLocks(rule Immutability, err error) Problem {
	return Problem{Object: "locks", What: fmt.Sprintf("the rule is that restore points are immutable for %d days, and the store does not keep that: %v", rule.Days, err)}
}

func lockText(l blob.Lock) string {
	if l.Mode == 0 {
		return "not locked"
	}
	return fmt.Sprintf("locked (%s) until %s", l.Mode, l.Until.UTC().Format(time.DateOnly))
}

// lockAgain reads an object's lock, and makes it so if it is less.
func (c *checker) lockAgain(ctx context.Context, locker blob.Locker, name string, want blob.Lock) (was, now blob.Lock, err error) {
	if was, err = locker.Locked(ctx, name); err != nil {
		return was, was, err
	}
	now = was
	if !was.Holds(want) {
		l := blob.Lock{Until: lockEnd(want.Until), Mode: want.Mode}
		if err = locker.Lock(ctx, name, l); err == nil {
			now = l
		}
	}
	c.r.locks.set(name, now)
	return was, now, err
}

// wasLocked reports whether an object was there, and locked, when the newest
// point was committed. That point's own entry may not be: its writer may have
// died. Keys may have been made since.
func wasLocked(s *chain.State, name string) bool {
	switch dir, rest, _ := strings.Cut(name, "/"); dir {
	case "chain":
		n, ok := chain.Number(name)
		return ok && n >= s.Older && n < s.Locks.Commit
	case "index":
		d, err := seal.ParseDigest(rest)
		return err == nil && s.Added[d].Entry <= s.Locks.Commit
	case "keys", "keyring":
		return false
	}
	return true
}

// locks tries whether the store keeps its locks, as far as that goes without a
// key.
func (k *keyless) locks(ctx context.Context) error {
	if k.rule.Days == 0 {
		return nil
	}
	k.report.Locks = &LockReport{Immutability: k.rule}
	err := tryLocks(ctx, k.store, k.rule.Mode)
	if errors.Is(err, blob.ErrNoLock) {
		k.report.Problems = append(k.report.Problems, noLocks(k.rule, err))
		return nil
	}
	return err
}
