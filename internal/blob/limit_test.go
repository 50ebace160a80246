package blob_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
)

func TestLimitConformance(t *testing.T) {
	blobtest.Store(t, func(*testing.T) blob.Store {
		return blob.Limit(new(blob.Mem), blob.Rates{Up: 1 << 40, Down: 1 << 40})
	})
}

// Ten objects take as long as their bytes do at that rate, however many go at once.
func TestLimitRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := context.Background()
		s := blob.Limit(new(blob.Mem), blob.Rates{Up: 1000, Down: 500})
		began := time.Now()
		errs := make(chan error)
		for i := range 11 { // the first one does not wait
			go func() { errs <- s.Put(ctx, string(rune('a'+i)), make([]byte, 1000)) }()
		}
		for range 11 {
			if err := <-errs; err != nil {
				t.Fatal(err)
			}
		}
		if d := time.Since(began); d != 10*time.Second {
			t.Errorf("10 objects after the first went up in %s, want 10 s", d)
		}
		began = time.Now()
		for i := range 3 {
			if _, err := s.Get(ctx, string(rune('a'+i)), 0, -1); err != nil {
				t.Fatal(err)
			}
		}
		if d := time.Since(began); d != 4*time.Second {
			t.Errorf("2 objects after the first came down in %s, want 4 s", d)
		}
	})
}

func TestLimitCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := blob.Limit(new(blob.Mem), blob.Rates{Up: 1})
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.Put(ctx, "a", make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		if err := s.Put(ctx, "b", nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("put: %v", err)
		}
	})
}

func TestAs(t *testing.T) {
	m := new(blob.Mem)
	if got, ok := blob.As[*blob.Mem](blob.Limit(m, blob.Rates{Up: 1})); !ok || got != m {
		t.Error("the store is not found below its limit")
	}
	if _, ok := blob.As[blob.Locker](blob.Limit(m, blob.Rates{Up: 1})); ok {
		t.Error("a store in memory locks")
	}
}
