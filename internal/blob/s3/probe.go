package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"

	"github.com/minio/minio-go/v7"

	"holdfast/internal/blob"
)

// ErrUnsupported: the server does not do what a repository needs. The error
// names it.
var ErrUnsupported = fmt.Errorf("%w", blob.ErrUnfit)

func unsupported(feature, saw string) error {
	return fmt.Errorf("%w: it does not support %s (%s)", ErrUnsupported, feature, saw)
}

const conditional = "conditional writes (If-None-Match)"

// The store's own keys: no object has such a name.
const (
	probeName  = ".tmp-probe"
	canaryName = ".tmp-canary"
)

var probeData = []byte("Holdfast writes this object twice, to see that the second time is refused.\n")

// prepare finds out, before a process's first write, whether the server honours
// conditional writes and what else it asks for.
func (s *Store) prepare(ctx context.Context) error {
	if s.prepared.Load() {
		return nil
	}
	select {
	case <-s.preparing:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { s.preparing <- struct{}{} }()
	if s.prepared.Load() {
		return nil
	}
	if err := s.askLocking(ctx); err != nil {
		return err
	}
	if err := s.probeTwice(ctx); err != nil {
		return err
	}
	s.prepared.Store(true)
	return nil
}

// askLocking sets sendMD5. Who may not know assumes that it is asked for.
func (s *Store) askLocking(ctx context.Context) error {
	err := s.retry(ctx, func(ctx context.Context) error {
		_, _, _, _, err := s.core.GetObjectLockConfig(ctx, s.o.Bucket)
		return err
	})
	_, answered := errors.AsType[minio.ErrorResponse](err)
	switch {
	case err == nil, hasStatus(err, http.StatusForbidden):
		s.sendMD5 = true
	case hasCode(err, "NoSuchBucket"), !answered:
		return err
	}
	return nil
}

// probeTwice writes one object at most twice. It stays: the next process needs
// one request only.
func (s *Store) probeTwice(ctx context.Context) error {
	for range 2 {
		var was error
		err := s.retry(ctx, func(ctx context.Context) error {
			if was = s.putOnce(ctx, s.key(probeName), probeData, newMark()); taken(was) {
				return nil
			}
			return was
		})
		switch {
		case hasStatus(err, http.StatusNotImplemented):
			return unsupported(conditional, err.Error())
		case err != nil:
			return err
		case taken(was):
			return nil
		}
	}
	return unsupported(conditional, "it overwrote an object that was there")
}

// Probe proves that the server does all that a repository needs: of writers that
// race for a name one wins; what was written is read and listed at once; what is
// deleted is gone. It is for a new repository, and for its check.
func (s *Store) Probe(ctx context.Context) error {
	if err := s.prepare(ctx); err != nil {
		return explain(err)
	}
	key := s.key(probeName + "-" + newMark())
	err := s.probe(ctx, key)
	rmErr := s.remove(ctx, key)
	if errors.Is(rmErr, blob.ErrNotExist) || errors.Is(rmErr, blob.ErrLocked) { // by a default lock of the bucket
		rmErr = nil
	}
	if err == nil && rmErr == nil {
		_, err = s.head(ctx, key, "")
		switch {
		case errors.Is(err, blob.ErrNotExist):
			err = nil
		case err == nil && !s.sendMD5:
			err = unsupported("reading what was just changed", "an object that was deleted is still there")
		}
	}
	return explain(errors.Join(err, rmErr))
}

func (s *Store) probe(ctx context.Context, key string) error {
	const racers = 8
	contents, errs := make([][]byte, racers), make([]error, racers)
	var wg sync.WaitGroup
	for i := range racers {
		contents[i] = bytes.Repeat([]byte{byte('a' + i)}, 10_000)
		wg.Go(func() { errs[i] = s.create(ctx, key, contents[i]) })
	}
	wg.Wait()
	winner := -1
	for i, err := range errs {
		switch {
		case errors.Is(err, blob.ErrExist):
		case err != nil:
			return err
		case winner >= 0:
			return unsupported(conditional, "two writers of one object both won")
		default:
			winner = i
		}
	}
	if winner < 0 {
		return unsupported(conditional, "no writer of a new object won")
	}
	for _, r := range [][2]int64{{0, -1}, {5_000, 100}, {9_990, -1}} {
		p, err := s.get(ctx, key, "", r[0], r[1])
		if err != nil {
			return err
		}
		want := contents[winner][r[0]:]
		if r[1] >= 0 {
			want = want[:r[1]]
		}
		if !bytes.Equal(p, want) {
			return unsupported("reading what was just written", "other bytes came back")
		}
	}
	listed := false
	err := s.walk(ctx, key, func(o minio.ObjectInfo) bool {
		listed = o.Key == key && o.Size == int64(len(contents[winner]))
		return false
	})
	if err == nil && !listed {
		err = unsupported("listing what was just written", "it is not in the list")
	}
	return err
}
