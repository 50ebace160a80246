package lease

import (
	"context"
	"errors"
	"strings"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

func leases(store blob.Store) *Leases {
	master := &seal.Key{1}
	return &Leases{Store: store, Repo: [16]byte{1}, Newest: func() (uint32, *seal.Key) { return 1, master },
		Master: func(context.Context, uint32) (*seal.Key, error) { return master, nil }}
}

// A lease is seen from its beginning to its end, with its newest beat; what
// cannot be read is one that everything waits for.
func TestLease(t *testing.T) {
	ctx, store := t.Context(), new(blob.Mem)
	l := leases(store)
	a, b := Lease{Session: strings.Repeat("a", 16), Host: "h", PID: 7, Chain: 5}, Lease{Session: strings.Repeat("b", 16), Chain: 9, Tier: "far"}
	if err := errors.Join(l.Begin(ctx, a), l.Begin(ctx, b)); err != nil {
		t.Fatal(err)
	}
	if err := l.Begin(ctx, a); !errors.Is(err, blob.ErrExist) {
		t.Errorf("twice: %v", err)
	}
	for n := range 3 {
		if err := l.Beat(ctx, a.Session, n+1); err != nil {
			t.Fatal(err)
		}
	}
	a.Beat = "000000000003"
	open := func(over ...string) map[string]Lease {
		t.Helper()
		open, err := l.Open(ctx, func(session string) bool { return len(over) > 0 && session == over[0] })
		if err != nil {
			t.Fatal(err)
		}
		return open
	}
	if o := open(); len(o) != 2 || o[a.Session] != a || o[b.Session] != b || Horizon(o) != 5 {
		t.Errorf("%+v", o)
	}
	if o := open(a.Session); len(o) != 1 || Horizon(o) != 9 {
		t.Errorf("one is over: %+v", o)
	}
	names, err := l.There(ctx)
	if err != nil || len(names) != 3 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		if err := l.Check(ctx, name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		store.Damage(name, func(p []byte) []byte { p[len(p)-1] ^= 1; return p })
		if err := l.Check(ctx, name); !errors.Is(err, seal.ErrDamaged) {
			t.Errorf("%s, damaged: %v", name, err)
		}
	}
	if o := open(); len(o) != 2 || o[a.Session].Tier != "?" || Horizon(o) != 0 {
		t.Errorf("damaged: %+v", o)
	}
	for range 2 {
		if err := errors.Join(l.End(ctx, a.Session), l.End(ctx, b.Session)); err != nil {
			t.Fatal(err)
		}
	}
	if o := open(); len(o) != 0 {
		t.Errorf("ended: %+v", o)
	}
}

// A pin names its point inside as in its name, and goes with its session.
func TestPin(t *testing.T) {
	ctx, store := t.Context(), new(blob.Mem)
	l := leases(store)
	if err := errors.Join(l.Pin(ctx, "aa", "p1", "h"), l.Pin(ctx, "aa", "p2", "h"), l.Pin(ctx, "aab", "p1", "h")); err != nil {
		t.Fatal(err)
	}
	if err := l.Pin(ctx, "aa", "p1", "h"); !errors.Is(err, blob.ErrExist) {
		t.Errorf("twice: %v", err)
	}
	if id, err := l.ReadPin(ctx, PinName("aa", "p2")); err != nil || id != "p2" || l.Check(ctx, PinName("aa", "p2")) != nil {
		t.Errorf("%s, %v", id, err)
	}
	p, _ := store.Get(ctx, PinName("aa", "p1"), 0, -1)
	store.Damage(PinName("aa", "p2"), func([]byte) []byte { return p })
	if _, err := l.ReadPin(ctx, PinName("aa", "p2")); !errors.Is(err, seal.ErrDamaged) {
		t.Errorf("another one: %v", err)
	}
	if err := l.Unpin(ctx, "aa"); err != nil {
		t.Fatal(err)
	}
	if names, err := l.Pins(ctx); err != nil || len(names) != 1 || names[0] != PinName("aab", "p1") {
		t.Errorf("%v, %v", names, err)
	}
}
