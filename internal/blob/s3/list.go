package s3

import (
	"context"
	"fmt"
	"iter"

	"github.com/minio/minio-go/v7"

	"holdfast/internal/blob"
)

func (s *Store) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		err := s.walk(ctx, s.key(prefix), false, func(o []minio.ObjectInfo) bool {
			name, ok := s.name(o[0].Key)
			return !ok || yield(blob.Info{Name: name, Size: o[0].Size}, nil)
		})
		if err != nil {
			yield(blob.Info{}, fmt.Errorf("list %q: %w", prefix, explain(err)))
		}
	}
}

// walk calls f for each key that starts with prefix, in ascending order, until
// f returns false: with the object, or with all versions and delete markers,
// newest first. Keys come in this order from S3; another order would mean that
// a page was lost or came twice, and is an error. A page that cannot be had is
// asked for again from the last key on.
func (s *Store) walk(ctx context.Context, prefix string, versions bool, f func([]minio.ObjectInfo) bool) error {
	owner := false
	w := walk{f: f, versions: versions}
	for w.more = true; w.more; {
		err := s.retry(ctx, func(ctx context.Context) error {
			begin := w.done
			w.group = nil
			for i := range s.core.ListObjectsIter(ctx, s.o.Bucket, minio.ListObjectsOptions{
				Prefix: prefix, Recursive: true, WithVersions: versions, StartAfter: w.done, FetchOwner: &owner,
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
			w.flush()
			w.more = false
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// walk gathers the versions of each key.
type walk struct {
	f        func([]minio.ObjectInfo) bool
	versions bool
	group    []minio.ObjectInfo // of one key, which may not be complete yet
	done     string             // the last key that f was called for
	more     bool               // f wants to go on
}

func (w *walk) take(i minio.ObjectInfo) error {
	last := w.done
	if len(w.group) > 0 {
		last = w.group[0].Key
	}
	if i.Key < last || i.Key == last && (!w.versions || len(w.group) == 0) {
		return final(unsupported("listings in order", fmt.Sprintf("%q came after %q", i.Key, last)))
	}
	if i.Key != last || !w.versions {
		w.flush()
	}
	w.group = append(w.group, i)
	if !w.versions {
		w.flush()
	}
	return nil
}

func (w *walk) flush() {
	if len(w.group) > 0 && w.more {
		w.done = w.group[0].Key
		w.more = w.f(w.group)
	}
	w.group = nil
}

// versionsOf lists the versions and delete markers of one key, newest first.
func (s *Store) versionsOf(ctx context.Context, key string) (list []minio.ObjectInfo, err error) {
	err = s.walk(ctx, key, true, func(o []minio.ObjectInfo) bool {
		if o[0].Key == key {
			list = o
		}
		return false // longer keys come after it
	})
	return list, err
}
