package blobtest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"holdfast/internal/blob"
)

// Locker runs the conformance suite of a store that locks in that mode. open
// gives an empty store each time. What it locks stays locked for an hour or two.
func Locker(t *testing.T, mode blob.LockMode, open func(t *testing.T) blob.Store) {
	ctx := context.Background()
	with := func(t *testing.T) (blob.Store, blob.Locker) {
		s := open(t)
		l, ok := blob.As[blob.Locker](s)
		if !ok {
			t.Fatal("the store is no Locker")
		}
		return s, l
	}
	hours := func(n int) blob.Lock {
		return blob.Lock{Until: time.Now().Add(time.Duration(n) * time.Hour), Mode: mode}
	}
	t.Run("lock, extend, never shorten", func(t *testing.T) {
		s, l := with(t)
		must(t, s.Put(ctx, "a/one", []byte("one")))
		must(t, s.Put(ctx, "a/two", []byte("two")))
		if got, err := l.Locked(ctx, "a/one"); err != nil || got != (blob.Lock{}) {
			t.Errorf("before: %+v, %v", got, err)
		}
		first, longer := hours(1), hours(2)
		for _, step := range []struct{ lock, least blob.Lock }{{first, first}, {longer, longer}, {first, longer}, {longer, longer}} {
			must(t, l.Lock(ctx, "a/one", step.lock))
			got, err := l.Locked(ctx, "a/one")
			if err != nil || !got.Holds(step.least) || got.Until.After(step.least.Until.Add(time.Minute)) {
				t.Errorf("locked until %s in mode %s, want %s: %v", got.Until, got.Mode, step.least.Until, err)
			}
		}
		if err := s.Delete(ctx, "a/one"); !errors.Is(err, blob.ErrLocked) {
			t.Errorf("delete: %v, want ErrLocked", err)
		}
		if err := s.Put(ctx, "a/one", []byte("another")); !errors.Is(err, blob.ErrExist) {
			t.Errorf("put: %v, want ErrExist", err)
		}
		if got, err := s.Get(ctx, "a/one", 0, -1); err != nil || string(got) != "one" {
			t.Errorf("get: %q, %v", got, err)
		}
		if got := list(t, s, "a/"); len(got) != 2 {
			t.Errorf("listed %v", got)
		}
		must(t, s.Delete(ctx, "a/two"))
	})
	t.Run("what is not there", func(t *testing.T) {
		_, l := with(t)
		if err := l.Lock(ctx, "a/none", hours(1)); !errors.Is(err, blob.ErrNotExist) {
			t.Errorf("lock: %v, want ErrNotExist", err)
		}
		if _, err := l.Locked(ctx, "a/none"); !errors.Is(err, blob.ErrNotExist) {
			t.Errorf("locked: %v, want ErrNotExist", err)
		}
		if err := l.Lock(ctx, "../a", hours(1)); !errors.Is(err, blob.ErrName) {
			t.Errorf("lock: %v, want ErrName", err)
		}
	})
	t.Run("many at once", func(t *testing.T) {
		s, l := with(t)
		const objects = 40
		errs := make([]error, objects)
		var wg sync.WaitGroup
		for i := range objects {
			wg.Go(func() {
				name := fmt.Sprintf("a/%02d", i)
				if errs[i] = s.Put(ctx, name, []byte(name)); errs[i] == nil {
					errs[i] = l.Lock(ctx, name, hours(1))
				}
			})
		}
		wg.Wait()
		must(t, errors.Join(errs...))
		for i := range objects {
			if err := s.Delete(ctx, fmt.Sprintf("a/%02d", i)); !errors.Is(err, blob.ErrLocked) {
				t.Errorf("delete %d: %v", i, err)
			}
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		s, l := with(t)
		must(t, s.Put(ctx, "a/one", nil))
		ctx, cancel := context.WithCancel(ctx)
		cancel()
		if err := l.Lock(ctx, "a/one", hours(1)); !errors.Is(err, context.Canceled) {
			t.Errorf("lock: %v", err)
		}
	})
	t.Run("canary", func(t *testing.T) {
		s, l := with(t)
		must(t, l.Canary(ctx, mode))
		must(t, l.Canary(ctx, mode))
		if got := list(t, s, ""); got != nil {
			t.Errorf("it shows: %v", got)
		}
	})
}
