package s3

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/minio/minio-go/v7"

	"holdfast/internal/blob"
)

func (s *Store) Lock(ctx context.Context, name string, l blob.Lock) error {
	if err := blob.CheckName(name); err != nil {
		return err
	}
	if _, err := s.lock(ctx, s.key(name), l, l); err != nil {
		return fmt.Errorf("lock %s: %w", name, explain(err))
	}
	return nil
}

// lock locks the newest version in the way l, unless it is locked as well as
// enough, and reads the lock back. It tells which version that is.
func (s *Store) lock(ctx context.Context, key string, l, enough blob.Lock) (version string, err error) {
	h, err := s.head(ctx, key, "")
	if err != nil {
		return "", err
	}
	if h.lock.Holds(enough) {
		return h.version, nil
	}
	if h.version == "" {
		return "", fmt.Errorf("%w: the bucket keeps no versions; Object Lock is chosen when a bucket is made", blob.ErrNoLock)
	}
	mode := minio.Governance
	if max(l.Mode, h.lock.Mode) == blob.Compliance {
		mode = minio.Compliance
	}
	// S3 keeps whole seconds.
	until := l.Until.UTC().Add(time.Second - 1).Truncate(time.Second)
	if h.lock.Until.After(until) {
		until = h.lock.Until
	}
	err = s.retry(ctx, func(ctx context.Context) error {
		return s.core.PutObjectRetention(ctx, s.o.Bucket, key, minio.PutObjectRetentionOptions{Mode: &mode, RetainUntilDate: &until, VersionID: h.version})
	})
	if hasCode(err, "InvalidRequest", "InvalidBucketObjectLockConfiguration", "ObjectLockConfigurationNotFoundError", "NotImplemented") {
		return "", fmt.Errorf("%w: %w", blob.ErrNoLock, err)
	} else if err != nil {
		return "", err
	}
	back, err := s.head(ctx, key, h.version)
	if err != nil {
		return "", err
	}
	if !back.lock.Holds(l) {
		return "", fmt.Errorf("%w: it accepted a lock, but reads back %s; do the credentials have s3:GetObjectRetention?", blob.ErrNoLock, lockText(back.lock))
	}
	return h.version, nil
}

func lockText(l blob.Lock) string {
	switch l.Mode {
	case blob.Governance:
		return "governance until " + l.Until.Format(time.RFC3339)
	case blob.Compliance:
		return "compliance until " + l.Until.Format(time.RFC3339)
	}
	return "no lock"
}

func (s *Store) Locked(ctx context.Context, name string) (blob.Lock, error) {
	if err := blob.CheckName(name); err != nil {
		return blob.Lock{}, err
	}
	h, err := s.head(ctx, s.key(name), "")
	if err != nil {
		return blob.Lock{}, fmt.Errorf("read the lock of %s: %w", name, explain(err))
	}
	return h.lock, nil
}

// The canary is locked for canaryLock, and again when less than canaryRest is
// left: so much may the server's clock differ from this machine's.
const (
	canaryLock = 26 * time.Hour
	canaryRest = 2 * time.Hour
)

func (s *Store) Canary(ctx context.Context, mode blob.LockMode) error {
	if err := s.canary(ctx, mode); err != nil {
		return fmt.Errorf("try whether locks hold: %w", explain(err))
	}
	return nil
}

func (s *Store) canary(ctx context.Context, mode blob.LockMode) error {
	if err := s.prepare(ctx); err != nil {
		return err
	}
	key := s.key(canaryName)
	if err := s.create(ctx, key, []byte("Holdfast locks this object and tries to delete it.\n")); err != nil && !errors.Is(err, blob.ErrExist) {
		return err
	}
	now := time.Now()
	version, err := s.lock(ctx, key, blob.Lock{Until: now.Add(canaryLock), Mode: mode}, blob.Lock{Until: now.Add(canaryRest), Mode: mode})
	if err != nil {
		return err
	}
	err = s.removeVersion(ctx, key, version)
	if err != nil && !errors.Is(err, blob.ErrLocked) {
		return err
	}
	if _, headErr := s.head(ctx, key, version); errors.Is(headErr, blob.ErrNotExist) {
		return fmt.Errorf("%w: a locked object could be deleted", blob.ErrNoLock)
	} else if headErr != nil {
		return headErr
	}
	if err == nil {
		return fmt.Errorf("%w: it says that it has deleted a locked object", blob.ErrNoLock)
	}
	return nil
}

func (s *Store) Hidden(ctx context.Context, prefix string) iter.Seq2[blob.Hidden, error] {
	return func(yield func(blob.Hidden, error) bool) {
		err := s.walk(ctx, s.key(prefix), true, func(o []minio.ObjectInfo) bool {
			name, ok := s.name(o[0].Key)
			for i := 1; ok && i < len(o); i++ {
				if o[i].IsDeleteMarker {
					continue
				}
				if !yield(blob.Hidden{Name: name, Version: o[i].VersionID, Size: o[i].Size, Deleted: o[0].IsDeleteMarker}, nil) {
					return false
				}
			}
			return true
		})
		if err != nil {
			yield(blob.Hidden{}, fmt.Errorf("list hidden versions %q: %w", prefix, explain(err)))
		}
	}
}

func (s *Store) GetHidden(ctx context.Context, h blob.Hidden) ([]byte, error) {
	if err := blob.CheckName(h.Name); err != nil {
		return nil, err
	}
	p, err := s.get(ctx, s.key(h.Name), h.Version, 0, -1)
	if err != nil {
		return nil, fmt.Errorf("get version %s of %s: %w", h.Version, h.Name, explain(err))
	}
	return p, nil
}

func (s *Store) Restore(ctx context.Context, h blob.Hidden) error {
	if err := blob.CheckName(h.Name); err != nil {
		return err
	}
	if err := s.unhide(ctx, s.key(h.Name), h); err != nil {
		return fmt.Errorf("restore version %s of %s: %w", h.Version, h.Name, explain(err))
	}
	return nil
}

func (s *Store) unhide(ctx context.Context, key string, h blob.Hidden) error {
	versions, err := s.versionsOf(ctx, key)
	if err != nil {
		return err
	}
	above := 0
	onlyMarkers := true
	for above < len(versions) && versions[above].VersionID != h.Version {
		onlyMarkers = onlyMarkers && versions[above].IsDeleteMarker
		above++
	}
	switch {
	case above == len(versions):
		return blob.ErrNotExist
	case !onlyMarkers:
		return s.copyUp(ctx, key, h)
	}
	for _, m := range versions[:above] {
		if err := s.removeVersion(ctx, key, m.VersionID); err != nil {
			return err
		}
	}
	back, err := s.head(ctx, key, "")
	if err == nil && back.version != h.Version {
		err = fmt.Errorf("version %s has come to light in its place", back.version)
	}
	return err
}

// copyUp makes a version the newest by a copy of it, made by the server.
func (s *Store) copyUp(ctx context.Context, key string, h blob.Hidden) error {
	old, err := s.head(ctx, key, h.Version)
	if err != nil {
		return err
	}
	err = s.retry(ctx, func(ctx context.Context) error {
		_, err := s.core.Client.CopyObject(ctx, minio.CopyDestOptions{Bucket: s.o.Bucket, Object: key},
			minio.CopySrcOptions{Bucket: s.o.Bucket, Object: key, VersionID: h.Version})
		return err
	})
	if err != nil {
		return err
	}
	back, err := s.head(ctx, key, "")
	if err == nil && (back.size != old.size || back.mark != old.mark) {
		err = errors.New("the server says that it has copied it, but another one is there")
	}
	return err
}
