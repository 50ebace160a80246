package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/minio/minio-go/v7"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/blob/s3/s3test"
)

// bucket makes a bucket on it.
func bucket(t *testing.T, endpoint, name string, o minio.MakeBucketOptions) Options {
	t.Helper()
	opts := Options{Bucket: name, Endpoint: endpoint, PathStyle: true, Keys: &Keys{Access: s3test.AccessKey, Secret: s3test.SecretKey}}
	if err := with(t, opts).core.MakeBucket(t.Context(), name, o); err != nil {
		t.Fatal(err)
	}
	return opts
}

func TestVersitygw(t *testing.T) {
	endpoint := s3test.Versitygw(t)
	ctx := t.Context()
	for name, o := range map[string]minio.MakeBucketOptions{"plain": {}, "locking": {ObjectLocking: true}} {
		opts := bucket(t, endpoint, name, o)
		t.Run(name, func(t *testing.T) {
			n := 0
			blobtest.Store(t, func(t *testing.T) blob.Store {
				n++
				o := opts
				o.Prefix = fmt.Sprintf("store-%d", n)
				s, err := Create(t.Context(), o)
				if err != nil {
					t.Fatal(err)
				}
				return s
			})
			// The order of its listing, where its directories could differ from it.
			s := with(t, opts)
			for _, name := range []string{"o/a/b", "o/a-b", "o/a.b", "o/a0", "o/a", "o/z"} {
				if name != "o/a" { // a name that is a directory's too: no object of a repository
					put(t, s, name, "x")
				}
			}
			if got := names(t, s, "o/"); len(got) != 5 {
				t.Errorf("listed %v", got)
			}
			big := bytes.Repeat([]byte("0123456789abcdef"), blob.MaxSize/16)
			if err := s.Put(ctx, "big", big); err != nil {
				t.Fatal(err)
			}
			if p, err := s.Get(ctx, "big", 0, -1); err != nil || !bytes.Equal(p, big) {
				t.Errorf("the largest object: %v", err)
			}
		})
	}
	t.Run("locks", func(t *testing.T) {
		o := bucket(t, endpoint, "locks", minio.MakeBucketOptions{ObjectLocking: true})
		testLocks(t, with(t, o))
	})
	t.Run("hidden", func(t *testing.T) {
		s := with(t, bucket(t, endpoint, "hidden", minio.MakeBucketOptions{ObjectLocking: true}))
		hide, overwrite := strangers(t, s)
		testHidden(t, s, hide, overwrite)
	})
	t.Run("a wrong secret", func(t *testing.T) {
		o := Options{Bucket: "plain", Endpoint: endpoint, PathStyle: true, Keys: &Keys{Access: s3test.AccessKey, Secret: "wrong"}}
		if _, err := with(t, o).Get(context.Background(), "config", 0, -1); !hasCode(err, "SignatureDoesNotMatch") {
			t.Errorf("%v", err)
		}
	})
	t.Run("no locks", func(t *testing.T) {
		o := Options{Bucket: "plain", Endpoint: endpoint, PathStyle: true}
		if err := with(t, Options{Bucket: "plain", Endpoint: endpoint, PathStyle: true, Keys: &Keys{Access: s3test.AccessKey, Secret: s3test.SecretKey}}).Canary(ctx, blob.Compliance); !errors.Is(err, blob.ErrNoLock) {
			t.Errorf("canary of %s: %v", o, err)
		}
	})
}
