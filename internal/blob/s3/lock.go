package s3

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/http"
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
	if h.version == "" {
		return "", fmt.Errorf("%w: the bucket keeps no versions; Object Lock is chosen when a bucket is made", blob.ErrNoLock)
	}
	has, err := s.lockOf(ctx, key, h.version)
	if err != nil || has.Holds(enough) {
		return h.version, err
	}
	mode := minio.Governance
	if max(l.Mode, has.Mode) == blob.Compliance {
		mode = minio.Compliance
	}
	// S3 keeps whole seconds.
	until := l.Until.UTC().Add(time.Second - 1).Truncate(time.Second)
	if has.Until.After(until) {
		until = has.Until
	}
	err = s.retry(ctx, func(ctx context.Context) error {
		return s.core.PutObjectRetention(ctx, s.o.Bucket, key, minio.PutObjectRetentionOptions{Mode: &mode, RetainUntilDate: &until, VersionID: h.version})
	})
	if hasCode(err, "InvalidRequest", "InvalidBucketObjectLockConfiguration", "ObjectLockConfigurationNotFoundError", "NotImplemented") {
		return "", fmt.Errorf("%w: %w", blob.ErrNoLock, err)
	} else if err != nil {
		return "", err
	}
	back, err := s.lockOf(ctx, key, h.version)
	if err == nil && !back.Holds(l) {
		err = fmt.Errorf("%w: it accepted a lock, but reads back %s; do the credentials have s3:GetObjectRetention?", blob.ErrNoLock, lockText(back))
	}
	return h.version, err
}

// lockOf reads a version's lock from the headers of HEAD: there all servers tell
// it alike, while some answer GET without it, or the request for the retention
// with XML of another name (versitygw 1.8).
func (s *Store) lockOf(ctx context.Context, key, version string) (l blob.Lock, err error) {
	err = s.retry(ctx, func(ctx context.Context) error {
		info, err := s.core.StatObject(ctx, s.o.Bucket, key, minio.StatObjectOptions{VersionID: version})
		if hasStatus(err, http.StatusNotFound) {
			// HEAD cannot say whose 404 it is.
			if _, err := s.headOnce(ctx, key, version); err != nil {
				return err
			}
			return fmt.Errorf("%w: status 404 for an object that is there", errNotS3)
		} else if err != nil {
			return err
		}
		l, err = lockIn(info.Metadata)
		return err
	})
	return l, err
}

func lockIn(h http.Header) (l blob.Lock, err error) {
	switch mode := h.Get("X-Amz-Object-Lock-Mode"); mode {
	case "":
		return l, nil
	case "GOVERNANCE":
		l.Mode = blob.Governance
	case "COMPLIANCE":
		l.Mode = blob.Compliance
	default:
		return l, final(fmt.Errorf("%w: its lock has the unknown mode %q", blob.ErrNoLock, mode))
	}
	if l.Until, err = time.Parse(time.RFC3339, h.Get("X-Amz-Object-Lock-Retain-Until-Date")); err != nil {
		return blob.Lock{}, final(fmt.Errorf("%w: %w", blob.ErrNoLock, err))
	}
	return l, nil
}

func lockText(l blob.Lock) string {
	if l.Mode == 0 {
		return "no lock"
	}
	return l.Mode.String() + " until " + l.Until.Format(time.RFC3339)
}

func (s *Store) Locked(ctx context.Context, name string) (blob.Lock, error) {
	if err := blob.CheckName(name); err != nil {
		return blob.Lock{}, err
	}
	h, err := s.head(ctx, s.key(name), "")
	var l blob.Lock
	if err == nil && h.version != "" {
		l, err = s.lockOf(ctx, s.key(name), h.version)
	}
	if err != nil {
		return blob.Lock{}, fmt.Errorf("read the lock of %s: %w", name, explain(err))
	}
	return l, nil
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
	key := s.key(canaryName + "-" + mode.String()) // a lock's mode is not changed later
	if err := s.create(ctx, key, []byte("Holdfast locks this object and tries to delete it.\n")); err != nil && !errors.Is(err, blob.ErrExist) {
		return err
	}
	now := time.Now()
	lock := func() (string, error) {
		return s.lock(ctx, key, blob.Lock{Until: now.Add(canaryLock), Mode: mode}, blob.Lock{Until: now.Add(canaryRest), Mode: mode})
	}
	version, err := lock()
	if errors.Is(err, blob.ErrNotExist) { // somebody has deleted it, but to some servers the name is taken all the same
		if err := s.removeMarkers(ctx, key); err != nil {
			return err
		}
		version, err = lock()
	}
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

// removeMarkers removes the delete markers of a key.
func (s *Store) removeMarkers(ctx context.Context, key string) error {
	versions, err := s.versionsOf(ctx, key)
	for _, v := range versions {
		if v.IsDeleteMarker && err == nil {
			err = s.removeVersion(ctx, key, v.VersionID)
		}
	}
	return err
}

func (s *Store) Hidden(ctx context.Context, prefix string) iter.Seq2[blob.Hidden, error] {
	return func(yield func(blob.Hidden, error) bool) {
		err := s.versions(ctx, s.key(prefix), func(o []minio.ObjectInfo) bool {
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
		if hasStatus(err, http.StatusNotImplemented) {
			return // it keeps no versions at all
		}
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
