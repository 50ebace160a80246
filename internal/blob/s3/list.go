package s3

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"slices"

	"github.com/minio/minio-go/v7"

	"holdfast/internal/blob"
)

func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		err := s.walk(ctx, s.key(prefix), func(o minio.ObjectInfo) bool {
			name, ok := s.name(o.Key)
			return !ok || yield(blob.Info{Name: name, Size: o.Size}, nil)
		})
		if err != nil {
			yield(blob.Info{}, fmt.Errorf("list %q: %w", prefix, explain(err)))
		}
	}
}

// walk calls f for each key that starts with prefix, in ascending order, until
// f returns false. Keys come in this order from S3; another order would mean
// that a page was lost or came twice, and is an error. A page that cannot be had
// is asked for again from the last key on.
func (s *Store) walk(ctx context.Context, prefix string, f func(minio.ObjectInfo) bool) error {
	owner := false
	w := walk{f: f}
	for w.more = true; w.more; {
		err := s.retry(ctx, func(ctx context.Context) error {
			begin := w.done
			for i := range s.core.ListObjectsIter(ctx, s.o.Bucket, minio.ListObjectsOptions{
				Prefix: prefix, Recursive: true, StartAfter: w.done, FetchOwner: &owner,
			}) {
				err := i.Err
				if err == nil {
					err = w.take(i)
				}
				if err != nil && w.done != begin && s.cure(err) == likely {
					return nil // it got on: the next page has as many tries as the first
				}
				if err != nil || !w.more {
					return err
				}
			}
			// The library ends a listing without a word when its context does.
			if err := ctx.Err(); err != nil {
				return err
			}
			w.more = false
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// walk is a listing under way.
type walk struct {
	f    func(minio.ObjectInfo) bool
	done string // the last key that f was called for
	more bool   // f wants to go on
}

func (w *walk) take(i minio.ObjectInfo) error {
	if i.Key <= w.done {
		return final(unsupported("listings in order", fmt.Sprintf("%q came after %q", i.Key, w.done)))
	}
	w.done = i.Key
	w.more = w.f(i)
	return nil
}

// versions calls f for each key that starts with prefix, in ascending order,
// until f returns false: with all its versions and delete markers, newest first.
// All are listed before: S3 lists them in this order, but there are servers that
// list the delete markers of a page before its versions (versitygw 1.8). Where a
// marker lies between versions is not certain then; what is shown is the first.
func (s *Store) versions(ctx context.Context, prefix string, f func([]minio.ObjectInfo) bool) error {
	var all []minio.ObjectInfo
	err := s.retry(ctx, func(ctx context.Context) error {
		all = all[:0]
		for i := range s.core.ListObjectsIter(ctx, s.o.Bucket, minio.ListObjectsOptions{Prefix: prefix, Recursive: true, WithVersions: true}) {
			if i.Err != nil {
				return i.Err
			}
			// The rest of what it tells is much, and not needed.
			all = append(all, minio.ObjectInfo{Key: i.Key, VersionID: i.VersionID, Size: i.Size, IsLatest: i.IsLatest, IsDeleteMarker: i.IsDeleteMarker})
		}
		return ctx.Err() // the library ends a listing without a word when its context does
	})
	if err != nil {
		return err
	}
	latest := map[bool]int{true: 0, false: 1}
	slices.SortStableFunc(all, func(a, b minio.ObjectInfo) int {
		return cmp.Or(cmp.Compare(a.Key, b.Key), cmp.Compare(latest[a.IsLatest], latest[b.IsLatest]))
	})
	for from := 0; from < len(all); {
		to := from + 1
		for to < len(all) && all[to].Key == all[from].Key {
			to++
		}
		if !f(all[from:to]) {
			break
		}
		from = to
	}
	return nil
}

// versionsOf lists the versions and delete markers of one key, newest first.
func (s *Store) versionsOf(ctx context.Context, key string) (list []minio.ObjectInfo, err error) {
	err = s.versions(ctx, key, func(o []minio.ObjectInfo) bool {
		if o[0].Key == key {
			list = o
		}
		return false // longer keys come after it
	})
	return list, err
}
