package s3

import (
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"holdfast/internal/blob"
	"holdfast/internal/blob/s3/s3test"
)

func put(t *testing.T, s blob.Store, name, data string) {
	t.Helper()
	if err := s.Put(t.Context(), name, []byte(data)); err != nil {
		t.Fatal(err)
	}
}

func hidden(t *testing.T, s *Store, prefix string) []blob.Hidden {
	t.Helper()
	var list []blob.Hidden
	for h, err := range s.Hidden(t.Context(), prefix) {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, h)
	}
	return list
}

// testLocks is what a store with Object Lock does; unlock ends the lock of an object.
func testLocks(t *testing.T, s *Store) {
	ctx := t.Context()
	soon, later := time.Now().Add(time.Hour), time.Now().Add(48*time.Hour+time.Millisecond)
	put(t, s, "packs/1", "data")
	if l, err := s.Locked(ctx, "packs/1"); err != nil || l != (blob.Lock{}) {
		t.Fatalf("before: %v, %v", l, err)
	}
	if err := s.Lock(ctx, "packs/0", blob.Lock{Until: soon, Mode: blob.Governance}); !errors.Is(err, blob.ErrNotExist) {
		t.Errorf("lock nothing: %v", err)
	}
	for _, l := range []blob.Lock{{Until: soon, Mode: blob.Governance}, {Until: later, Mode: blob.Governance}, {Until: soon, Mode: blob.Governance}} {
		if err := s.Lock(ctx, "packs/1", l); err != nil {
			t.Fatal(err)
		}
		if got, err := s.Locked(ctx, "packs/1"); err != nil || !got.Holds(l) {
			t.Errorf("locked %v, want %v: %v", got, l, err)
		}
	}
	if got, _ := s.Locked(ctx, "packs/1"); got.Until.Before(later) {
		t.Errorf("a shorter lock has shortened it to %s", got.Until)
	}
	if err := s.Delete(ctx, "packs/1"); !errors.Is(err, blob.ErrLocked) {
		t.Errorf("delete: %v", err)
	}
	if p, err := s.Get(ctx, "packs/1", 0, -1); string(p) != "data" {
		t.Errorf("after the delete: %q, %v", p, err)
	}
	put(t, s, "packs/2", "data")
	if err := s.Lock(ctx, "packs/2", blob.Lock{Until: soon, Mode: blob.Compliance}); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Locked(ctx, "packs/2"); err != nil || got.Mode != blob.Compliance {
		t.Errorf("%v, %v", got, err)
	}
	if err := s.Delete(ctx, "packs/2"); !errors.Is(err, blob.ErrLocked) {
		t.Errorf("delete: %v", err)
	}
	if h := hidden(t, s, ""); len(h) != 0 {
		t.Errorf("a delete that failed has hidden %v", h)
	}
	for range 2 {
		for _, mode := range []blob.LockMode{blob.Governance, blob.Compliance} {
			if err := s.Canary(ctx, mode); err != nil {
				t.Errorf("canary: %v", err)
			}
		}
	}
}

func TestLocks(t *testing.T) {
	testLocks(t, at(t, s3test.New(t, s3test.Options{Locking: true}), "p"))
	t.Run("misbehaving", func(t *testing.T) {
		testLocks(t, at(t, s3test.New(t, s3test.Options{Locking: true, Faults: &s3test.Faults{Chance: 0.2}}), "p"))
	})
}

// A store that does not lock says so, and the canary finds one that lies.
func TestNoLocks(t *testing.T) {
	ctx := t.Context()
	l := blob.Lock{Until: time.Now().Add(time.Hour), Mode: blob.Compliance}
	for _, o := range []s3test.Options{{}, {Versioned: true}} {
		s := at(t, s3test.New(t, o), "p")
		put(t, s, "a", "data")
		if err := s.Lock(ctx, "a", l); !errors.Is(err, blob.ErrNoLock) {
			t.Errorf("%+v: lock: %v", o, err)
		}
		if err := s.Canary(ctx, blob.Compliance); !errors.Is(err, blob.ErrNoLock) {
			t.Errorf("%+v: canary: %v", o, err)
		}
	}
	s := at(t, s3test.New(t, s3test.Options{Locking: true, IgnoreLocks: true}), "p")
	put(t, s, "a", "data")
	if err := s.Lock(ctx, "a", l); err != nil {
		t.Errorf("lock: %v", err)
	}
	if err := s.Canary(ctx, blob.Compliance); !errors.Is(err, blob.ErrNoLock) {
		t.Errorf("canary of a store that forgets its locks: %v", err)
	}
}

// A lock that does not read back is none.
func TestLockReadBack(t *testing.T) {
	s := at(t, s3test.New(t, s3test.Options{Locking: true, ForgetLocks: true}), "p")
	put(t, s, "a", "data")
	if err := s.Lock(t.Context(), "a", blob.Lock{Until: time.Now().Add(time.Hour), Mode: blob.Governance}); !errors.Is(err, blob.ErrNoLock) {
		t.Errorf("lock: %v", err)
	}
}

// A delete that comes to a lock has not changed the object, though it has begun.
func TestDeleteHalfWay(t *testing.T) {
	srv := s3test.New(t, s3test.Options{Locking: true})
	s := at(t, srv, "p")
	put(t, s, "a", "old")
	srv.Overwrite("p/a", []byte("new"))
	if err := s.Lock(t.Context(), "a", blob.Lock{Until: time.Now().Add(time.Hour), Mode: blob.Governance}); err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(t.Context(), "a"); !errors.Is(err, blob.ErrLocked) {
		t.Errorf("delete: %v", err)
	}
	if p, err := s.Get(t.Context(), "a", 0, -1); string(p) != "new" {
		t.Errorf("afterwards: %q, %v", p, err)
	}
}

// A delete in a bucket with versions leaves none, and none comes to light.
func TestDeleteVersions(t *testing.T) {
	srv := s3test.New(t, s3test.Options{Versioned: true, Page: 2})
	s := at(t, srv, "p")
	put(t, s, "a", "1")
	put(t, s, "ab", "other")
	for range 3 {
		srv.Overwrite("p/a", []byte("stranger"))
		srv.Hide("p/a")
	}
	srv.Overwrite("p/a", []byte("newest"))
	if err := s.Delete(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if n := srv.VersionCount("p/a"); n != 0 {
		t.Errorf("%d versions are left", n)
	}
	if n := srv.VersionCount("p/ab"); n != 1 {
		t.Errorf("the longer name has %d versions", n)
	}
}

// What a stranger has deleted or overwritten is found and undone. hide and
// overwrite do what the stranger does, with an object's name.
func testHidden(t *testing.T, s *Store, hide, overwrite func(name string)) {
	ctx := t.Context()
	for _, name := range []string{"packs/1", "packs/2", "packs/3"} {
		put(t, s, name, "data of "+name)
	}
	if h := hidden(t, s, ""); len(h) != 0 {
		t.Fatalf("hidden: %v", h)
	}
	hide("packs/1")
	hide("packs/1")
	overwrite("packs/2")
	if got := names(t, s, "packs/"); len(got) != 2 {
		t.Fatalf("listed %v", got)
	}
	h := hidden(t, s, "packs/")
	if len(h) != 2 || h[0].Name != "packs/1" || !h[0].Deleted || h[1].Name != "packs/2" || h[1].Deleted {
		t.Fatalf("hidden: %+v", h)
	}
	for _, v := range h {
		want := "data of " + v.Name
		if p, err := s.GetHidden(ctx, v); err != nil || string(p) != want || v.Size != int64(len(want)) {
			t.Errorf("hidden %s: %q, %v", v.Name, p, err)
		}
		if err := s.Restore(ctx, v); err != nil {
			t.Fatal(err)
		}
		if p, err := s.Get(ctx, v.Name, 0, -1); err != nil || string(p) != want {
			t.Errorf("restored %s: %q, %v", v.Name, p, err)
		}
	}
	// What was written over the second is kept, hidden in turn, with the original.
	left := hidden(t, s, "")
	if len(left) != 2 || left[0].Name != "packs/2" || left[1].Name != "packs/2" {
		t.Errorf("hidden afterwards: %+v", left)
	}
	if err := s.Restore(ctx, blob.Hidden{Name: "packs/3", Version: "00000000-0000-0000-0000-000000000000"}); !errors.Is(err, blob.ErrNotExist) {
		t.Errorf("restore a version that there is not: %v", err)
	}
}

// strangers do things by the library, without conditions.
func strangers(t *testing.T, s *Store) (hide, overwrite func(string)) {
	return func(name string) {
			err := s.retry(t.Context(), func(ctx context.Context) error {
				return s.core.RemoveObject(ctx, s.o.Bucket, s.key(name), minio.RemoveObjectOptions{})
			})
			if err != nil {
				t.Fatal(err)
			}
		}, func(name string) {
			err := s.retry(t.Context(), func(ctx context.Context) error {
				_, err := s.core.Client.PutObject(ctx, s.o.Bucket, s.key(name), nil, 0, minio.PutObjectOptions{SendContentMd5: true})
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
}

func TestHidden(t *testing.T) {
	srv := s3test.New(t, s3test.Options{Versioned: true, Page: 1})
	s := at(t, srv, "p")
	testHidden(t, s, func(name string) { srv.Hide("p/" + name) }, func(name string) { srv.Overwrite("p/"+name, []byte("x")) })
	if !slices.Contains(srv.Keys(), "p/packs/1") {
		t.Error("not shown")
	}
}
