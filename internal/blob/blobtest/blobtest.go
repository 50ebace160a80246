// Package blobtest is what every blob.Store must pass, and the stores with
// which the code above is tested: Faulty fails at a chosen call, and a cut
// there shows what a loss of power would leave.
package blobtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"

	"holdfast/internal/blob"
)

// Store runs the conformance suite. open gives an empty store each time.
func Store(t *testing.T, open func(t *testing.T) blob.Store) {
	ctx := context.Background()
	t.Run("put, get, list, delete", func(t *testing.T) {
		s := open(t)
		data := []byte("0123456789")
		must(t, s.Put(ctx, "a/b/one", data))
		data[0] = 'x' // the caller's slice is the caller's
		got, err := s.Get(ctx, "a/b/one", 0, -1)
		must(t, err)
		if string(got) != "0123456789" {
			t.Fatalf("got %q", got)
		}
		for _, r := range []struct {
			off, n int64
			want   string
		}{{3, 4, "3456"}, {10, 0, ""}, {9, -1, "9"}, {0, 10, "0123456789"}} {
			got, err := s.Get(ctx, "a/b/one", r.off, r.n)
			if err != nil || string(got) != r.want {
				t.Errorf("get [%d, +%d): %q, %v", r.off, r.n, got, err)
			}
			p := make([]byte, len(r.want))
			if err := blob.Fill(ctx, s, "a/b/one", r.off, p); err != nil || string(p) != r.want {
				t.Errorf("fill at %d: %q, %v", r.off, p, err)
			}
		}
		for _, r := range [][2]int64{{8, 3}, {11, 1}, {11, -1}, {-1, 2}} {
			if _, err := s.Get(ctx, "a/b/one", r[0], r[1]); !errors.Is(err, blob.ErrTruncated) {
				t.Errorf("get [%d, +%d): %v, want ErrTruncated", r[0], r[1], err)
			}
			if err := blob.Fill(ctx, s, "a/b/one", r[0], make([]byte, max(1, r[1]))); !errors.Is(err, blob.ErrTruncated) {
				t.Errorf("fill at %d: %v, want ErrTruncated", r[0], err)
			}
		}
		must(t, s.Put(ctx, "a/two", nil))
		must(t, s.Put(ctx, "ab", []byte("z")))
		for prefix, want := range map[string][]string{
			"": {"a/b/one", "a/two", "ab"}, "a/": {"a/b/one", "a/two"}, "a": {"a/b/one", "a/two", "ab"},
			"a/b/o": {"a/b/one"}, "none/": nil, "a/b/one": {"a/b/one"},
		} {
			if got := list(t, s, prefix); !slices.Equal(got, want) {
				t.Errorf("list %q: %v, want %v", prefix, got, want)
			}
		}
		must(t, s.Delete(ctx, "a/b/one"))
		if _, err := s.Get(ctx, "a/b/one", 0, -1); !errors.Is(err, blob.ErrNotExist) {
			t.Errorf("get after delete: %v", err)
		}
		if err := blob.Fill(ctx, s, "a/b/one", 0, make([]byte, 1)); !errors.Is(err, blob.ErrNotExist) {
			t.Errorf("fill after delete: %v", err)
		}
		if err := s.Delete(ctx, "a/b/one"); !errors.Is(err, blob.ErrNotExist) {
			t.Errorf("delete twice: %v", err)
		}
	})
	t.Run("never over an existing name", func(t *testing.T) {
		s := open(t)
		must(t, s.Put(ctx, "n", []byte("first")))
		if err := s.Put(ctx, "n", []byte("second")); !errors.Is(err, blob.ErrExist) {
			t.Fatalf("second put: %v", err)
		}
		if got, _ := s.Get(ctx, "n", 0, -1); string(got) != "first" {
			t.Fatalf("got %q", got)
		}
	})
	t.Run("one winner", func(t *testing.T) {
		s := open(t)
		for round := range 20 {
			name := fmt.Sprintf("race/%d", round)
			var wg sync.WaitGroup
			wins := make([]bool, 8)
			for i := range wins {
				wg.Go(func() { wins[i] = s.Put(ctx, name, bytes.Repeat([]byte{byte(i)}, 1000)) == nil })
			}
			wg.Wait()
			got, err := s.Get(ctx, name, 0, -1)
			must(t, err)
			n := 0
			for i, w := range wins {
				if w {
					n++
					if len(got) != 1000 || got[0] != byte(i) || got[999] != byte(i) {
						t.Fatalf("winner %d, content of %d", i, got[0])
					}
				}
			}
			if n != 1 {
				t.Fatalf("%d winners", n)
			}
		}
	})
	t.Run("bad names", func(t *testing.T) {
		s := open(t)
		for _, name := range []string{"", "/a", "a/", "a//b", "../a", "a/../b", "A", "a b", "a\x00", "a\\b"} {
			if err := s.Put(ctx, name, nil); !errors.Is(err, blob.ErrName) {
				t.Errorf("put %q: %v", name, err)
			}
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		s := open(t)
		ctx, cancel := context.WithCancel(ctx)
		cancel()
		if err := s.Put(ctx, "a", nil); !errors.Is(err, context.Canceled) {
			t.Errorf("put: %v", err)
		}
		if got := list(t, s, ""); got != nil {
			t.Errorf("listed %v", got)
		}
	})
}

func list(t *testing.T, s blob.Store, prefix string) []string {
	var names []string
	for i, err := range s.List(context.Background(), prefix) {
		must(t, err)
		names = append(names, i.Name)
	}
	slices.Sort(names)
	return names
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
