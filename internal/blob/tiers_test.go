package blob_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
)

// tiers gives a store with others beside it, for names that begin with prefix.
func tiers(t *testing.T, own blob.Store, prefix string, others ...blob.Store) *blob.Tiers {
	all := blob.NewTiers(own, prefix, "mark")
	var list []blob.Tier
	for i, s := range others {
		if err := s.Put(context.Background(), "mark", []byte("m")); err != nil && !errors.Is(err, blob.ErrExist) {
			t.Fatal(err)
		}
		list = append(list, blob.Tier{Name: fmt.Sprint("t", i), Open: func(context.Context) (blob.Store, error) { return s, nil }})
	}
	all.Set(list)
	return all
}

func TestTiersConformance(t *testing.T) {
	blobtest.Store(t, func(t *testing.T) blob.Store { return tiers(t, new(blob.Mem), "packs/") })
	blobtest.Store(t, func(t *testing.T) blob.Store { return tiers(t, new(blob.Mem), "a/", new(blob.Mem), new(blob.Mem)) })
	blobtest.Store(t, func(t *testing.T) blob.Store { return tiers(t, new(blob.Mem), "a", new(blob.Mem)) })
}

func names(t *testing.T, s blob.Store, prefix string) (names []string) {
	t.Helper()
	for i, err := range s.List(context.Background(), prefix) {
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, i.Name)
	}
	slices.Sort(names)
	return names
}

func TestTiersFind(t *testing.T) {
	ctx := context.Background()
	own, a, b := new(blob.Mem), new(blob.Mem), new(blob.Mem)
	s := tiers(t, own, "packs/", a, b)
	for i, put := range []struct {
		in   blob.Store
		name string
	}{{own, "packs/0"}, {a, "packs/1"}, {b, "packs/2"}, {own, "packs/3"}, {b, "packs/3"}, {own, "index/4"}, {a, "index/5"}} {
		if err := put.in.Put(ctx, put.name, fmt.Append(nil, i)); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second time by hints
		for i, name := range []string{"packs/0", "packs/1", "packs/2", "packs/3"} {
			if p, err := s.Get(ctx, name, 0, -1); err != nil || string(p) != fmt.Sprint(i) {
				t.Errorf("%s: %q, %v", name, p, err)
			}
		}
	}
	if _, err := s.Get(ctx, "index/5", 0, -1); !errors.Is(err, blob.ErrNotExist) {
		t.Errorf("a name of another form was looked for in a tier: %v", err)
	}
	for prefix, want := range map[string]string{"packs/": "packs/0 packs/1 packs/2 packs/3", "": "index/4 packs/0 packs/1 packs/2 packs/3", "packs/2": "packs/2", "index/": "index/4"} {
		if got := strings.Join(names(t, s, prefix), " "); got != want {
			t.Errorf("list %q: %s, want %s", prefix, got, want)
		}
	}
	if err := s.Delete(ctx, "packs/3"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Get(ctx, "packs/3", 0, -1); !errors.Is(err, blob.ErrNotExist) {
		t.Errorf("a copy stayed: %v", err)
	}
	// A copy that is cut off, or that cannot be read, is read elsewhere.
	if err := errors.Join(own.Put(ctx, "packs/9", []byte("he")), a.Put(ctx, "packs/9", []byte("hello"))); err != nil {
		t.Fatal(err)
	}
	if p, err := s.Get(ctx, "packs/9", 0, 5); err != nil || string(p) != "hello" {
		t.Errorf("%q, %v", p, err)
	}
	if p, err := s.GetOther(ctx, "packs/9", 0, 2); err != nil || string(p) != "he" {
		t.Errorf("%q, %v", p, err)
	}
}

// A tier that cannot be reached, or that is not mounted, is not an empty one.
func TestTiersUnreachable(t *testing.T) {
	ctx := context.Background()
	gone := errors.New("gone")
	for what, open := range map[string]func(context.Context) (blob.Store, error){
		"closed":      func(context.Context) (blob.Store, error) { return nil, gone },
		"not mounted": func(context.Context) (blob.Store, error) { return new(blob.Mem), nil },
	} {
		own := new(blob.Mem)
		s := blob.NewTiers(own, "packs/", "mark")
		s.Set([]blob.Tier{{Name: "far", Open: open}})
		if err := s.Put(ctx, "packs/0", []byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(ctx, "packs/0", 0, -1); err != nil {
			t.Errorf("%s: what the own store has: %v", what, err)
		}
		if _, err := s.Get(ctx, "packs/1", 0, -1); err == nil || errors.Is(err, blob.ErrNotExist) || !strings.Contains(err.Error(), "tier far") {
			t.Errorf("%s: get: %v", what, err)
		}
		var last error
		for _, err := range s.List(ctx, "packs/") {
			last = err
		}
		if last == nil || !strings.Contains(last.Error(), "tier far") {
			t.Errorf("%s: list: %v", what, last)
		}
		if err := s.Delete(ctx, "packs/0"); err == nil || errors.Is(err, blob.ErrNotExist) {
			t.Errorf("%s: delete: %v", what, err)
		}
		if err := s.Reach(ctx); err == nil {
			t.Errorf("%s: it was reached", what)
		}
	}
}

func TestTiersSealed(t *testing.T) {
	ctx := context.Background()
	s, why := tiers(t, new(blob.Mem), "packs/", new(blob.Mem)), errors.New("why")
	s.Seal(why, "pins/")
	if err := s.Put(ctx, "packs/1", nil); !errors.Is(err, why) {
		t.Error(err)
	}
	if err := s.Delete(ctx, "packs/1"); !errors.Is(err, why) {
		t.Error(err)
	}
	if err := errors.Join(s.Put(ctx, "pins/1", nil), s.Delete(ctx, "pins/1")); err != nil {
		t.Error(err)
	}
	s.Seal(nil, "")
	if err := s.Put(ctx, "packs/1", nil); err != nil {
		t.Error(err)
	}
}

// Reads and listings beside moves to and fro miss nothing.
func TestTiersBesideMoves(t *testing.T) {
	ctx := context.Background()
	own, far := new(blob.Mem), new(blob.Mem)
	s := tiers(t, own, "packs/", far)
	var all []string
	for i := range 8 {
		all = append(all, fmt.Sprint("packs/", i))
		if err := s.Put(ctx, all[i], []byte("content")); err != nil {
			t.Fatal(err)
		}
	}
	stop := make(chan struct{})
	var moving sync.WaitGroup
	moving.Go(func() {
		rng := rand.New(rand.NewPCG(1, 2))
		for {
			select {
			case <-stop:
				return
			default:
			}
			name := all[rng.IntN(len(all))]
			from, to := own, far
			if _, err := own.Get(ctx, name, 0, 0); err != nil {
				from, to = far, own
			}
			if err := errors.Join(to.Put(ctx, name, []byte("content")), from.Delete(ctx, name)); err != nil {
				t.Error(err)
				return
			}
			time.Sleep(20 * time.Microsecond) // one pack is not moved thrice within one read
		}
	})
	for range 3000 {
		for _, name := range all[:2] {
			if p, err := s.Get(ctx, name, 0, -1); err != nil || string(p) != "content" {
				t.Fatalf("%s: %q, %v", name, p, err)
			}
		}
	}
	for range 300 {
		if got := names(t, s, "packs/"); !slices.Equal(got, all) {
			t.Fatalf("listed %v", got)
		}
	}
	close(stop)
	moving.Wait()
}

// lockable locks in memory, for tests of who is asked.
type lockable struct {
	*blob.Mem
	locks map[string]blob.Lock
}

func (l lockable) Lock(ctx context.Context, name string, k blob.Lock) error {
	if _, err := l.Get(ctx, name, 0, 0); err != nil {
		return err
	}
	l.locks[name] = k
	return nil
}

func (l lockable) Locked(ctx context.Context, name string) (blob.Lock, error) {
	_, err := l.Get(ctx, name, 0, 0)
	return l.locks[name], err
}

func (l lockable) Canary(context.Context, blob.LockMode) error { return nil }

func TestTiersLock(t *testing.T) {
	ctx := context.Background()
	if _, ok := blob.As[blob.Locker](tiers(t, new(blob.Mem), "packs/", lockable{new(blob.Mem), nil})); ok {
		t.Error("the own store does not lock, but seems to")
	}
	own, far := lockable{new(blob.Mem), map[string]blob.Lock{}}, lockable{new(blob.Mem), map[string]blob.Lock{}}
	plain := new(blob.Mem)
	s := tiers(t, blob.Limit(own, blob.Rates{Up: 1 << 40}), "packs/", far, plain)
	l, ok := blob.As[blob.Locker](s)
	if !ok {
		t.Fatal("no lock")
	}
	put := func(in blob.Store, name string) {
		if err := in.Put(ctx, name, nil); err != nil {
			t.Fatal(err)
		}
	}
	put(own, "packs/1")
	put(far, "packs/2")
	put(plain, "packs/3")
	put(own, "packs/4")
	put(plain, "packs/4")
	want := blob.Lock{Until: time.Unix(5, 0), Mode: blob.Compliance}
	for name, locks := range map[string]bool{"packs/1": true, "packs/2": true, "packs/3": false, "packs/4": true, "packs/5": false} {
		err := l.Lock(ctx, name, want)
		if (err == nil) != locks {
			t.Errorf("%s: %v", name, err)
		}
		if got, err := l.Locked(ctx, name); locks && (err != nil || !got.Holds(want)) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

// bringing brings an object back when it is listed: what the own store's listing
// has just not shown is not in the tier any more.
type bringing struct {
	*blob.Mem
	own blob.Store
}

func (b bringing) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	if err := errors.Join(b.own.Put(ctx, "packs/1", nil), b.Delete(ctx, "packs/1")); err != nil {
		panic(err)
	}
	return b.Mem.List(ctx, prefix)
}

func TestTiersListWhileBrought(t *testing.T) {
	own, far := new(blob.Mem), new(blob.Mem)
	if err := far.Put(context.Background(), "packs/1", nil); err != nil {
		t.Fatal(err)
	}
	if got := names(t, tiers(t, own, "packs/", bringing{far, own}), "packs/"); !slices.Equal(got, []string{"packs/1"}) {
		t.Errorf("listed %v", got)
	}
}
