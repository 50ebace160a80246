package blobtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/internal/blob"
)

// Locking is a store in memory that keeps versions and locks, as a bucket with
// Object Lock does. Hide, Overwrite and Destroy are what a stranger with a
// writer's rights can do. The zero value is empty and ready.
type Locking struct {
	// ForgetLocks makes a store whose locks do not read back.
	ForgetLocks bool
	// IgnoreLocks makes one that shows its locks and does not keep them.
	IgnoreLocks bool
	// Now is the store's clock; nil is time.Now.
	Now func() time.Time

	mu      sync.Mutex
	objects map[string][]version // newest first; guarded by mu, and so are all below
	made    int
	calls   map[string]int
}

type version struct {
	id     string
	data   []byte
	marker bool // a delete marker
	lock   blob.Lock
}

// Clone returns an independent store with the same objects, versions and locks.
func (s *Locking) Clone() *Locking {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &Locking{ForgetLocks: s.ForgetLocks, IgnoreLocks: s.IgnoreLocks, Now: s.Now, objects: map[string][]version{}, made: s.made}
	for name, versions := range s.objects {
		c.objects[name] = slices.Clone(versions)
	}
	return c
}

// Count is how often a method was called.
func (s *Locking) Count(method string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls[method]
}

func (s *Locking) enter(ctx context.Context, method string) error {
	if s.calls == nil {
		s.calls = map[string]int{}
	}
	s.calls[method]++
	return ctx.Err()
}

// shown is the version that Get reads; the caller holds mu.
func (s *Locking) shown(name string) *version {
	if v := s.objects[name]; len(v) > 0 && !v[0].marker {
		return &v[0]
	}
	return nil
}

func (s *Locking) add(name string, v version) {
	if s.objects == nil {
		s.objects = map[string][]version{}
	}
	s.made++
	v.id = fmt.Sprint(s.made)
	s.objects[name] = append([]version{v}, s.objects[name]...)
}

// holds reports whether a lock keeps a version.
func (s *Locking) holds(v *version) bool {
	now := time.Now()
	if s.Now != nil {
		now = s.Now()
	}
	return !s.IgnoreLocks && v.lock.Mode != 0 && now.Before(v.lock.Until)
}

func (s *Locking) Put(ctx context.Context, name string, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := errors.Join(s.enter(ctx, "Put"), blob.CheckName(name)); err != nil {
		return err
	}
	if s.shown(name) != nil {
		return fmt.Errorf("put %s: %w", name, blob.ErrExist)
	}
	s.add(name, version{data: bytes.Clone(data)})
	return nil
}

func (s *Locking) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enter(ctx, "Get"); err != nil {
		return nil, err
	}
	v := s.shown(name)
	if v == nil {
		return nil, fmt.Errorf("get %s: %w", name, blob.ErrNotExist)
	}
	size := int64(len(v.data))
	if n < 0 {
		n = size - off
	}
	if off < 0 || off > size || n < 0 || n > size-off {
		return nil, fmt.Errorf("get %s [%d, +%d) of %d: %w", name, off, n, size, blob.ErrTruncated)
	}
	return append([]byte{}, v.data[off:off+n]...), nil
}

// names with the prefix, shown or not; the caller holds mu.
func (s *Locking) names(prefix string) []string {
	names := slices.Sorted(maps.Keys(s.objects))
	return slices.DeleteFunc(names, func(n string) bool { return !strings.HasPrefix(n, prefix) })
}

func (s *Locking) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		s.mu.Lock()
		err := s.enter(ctx, "List")
		var all []blob.Info
		for _, name := range s.names(prefix) {
			if v := s.shown(name); v != nil {
				all = append(all, blob.Info{Name: name, Size: int64(len(v.data))})
			}
		}
		s.mu.Unlock()
		if err != nil {
			yield(blob.Info{}, err)
			return
		}
		for _, i := range all {
			if !yield(i, ctx.Err()) {
				return
			}
		}
	}
}

func (s *Locking) Delete(ctx context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enter(ctx, "Delete"); err != nil {
		return err
	}
	if s.shown(name) == nil {
		return fmt.Errorf("delete %s: %w", name, blob.ErrNotExist)
	}
	for v := s.objects[name]; len(v) > 0; v = s.objects[name] { // the oldest first
		if old := &v[len(v)-1]; s.holds(old) {
			return fmt.Errorf("delete %s: %w until %s", name, blob.ErrLocked, old.lock.Until)
		}
		s.objects[name] = v[:len(v)-1]
	}
	delete(s.objects, name)
	return nil
}

func (s *Locking) Lock(ctx context.Context, name string, l blob.Lock) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enter(ctx, "Lock"); err != nil {
		return err
	}
	v := s.shown(name)
	switch {
	case v == nil:
		return fmt.Errorf("lock %s: %w", name, blob.ErrNotExist)
	case s.ForgetLocks:
		return fmt.Errorf("lock %s: %w", name, blob.ErrNoLock)
	case v.lock.Mode == blob.Governance && l.Mode == blob.Compliance && s.holds(v):
		return fmt.Errorf("lock %s: access denied", name)
	}
	l.Mode = max(l.Mode, v.lock.Mode)
	if v.lock.Until.After(l.Until) {
		l.Until = v.lock.Until
	}
	v.lock = l
	return nil
}

func (s *Locking) Locked(ctx context.Context, name string) (blob.Lock, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enter(ctx, "Locked"); err != nil {
		return blob.Lock{}, err
	}
	v := s.shown(name)
	if v == nil {
		return blob.Lock{}, fmt.Errorf("read the lock of %s: %w", name, blob.ErrNotExist)
	}
	return v.lock, nil
}

func (s *Locking) Canary(ctx context.Context, _ blob.LockMode) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enter(ctx, "Canary"); err != nil {
		return err
	}
	if s.ForgetLocks || s.IgnoreLocks {
		return fmt.Errorf("canary: %w", blob.ErrNoLock)
	}
	return nil
}

func (s *Locking) Hidden(ctx context.Context, prefix string) iter.Seq2[blob.Hidden, error] {
	return func(yield func(blob.Hidden, error) bool) {
		s.mu.Lock()
		err := s.enter(ctx, "Hidden")
		var all []blob.Hidden
		for _, name := range s.names(prefix) {
			versions := s.objects[name]
			for i := 1; i < len(versions); i++ {
				if v := versions[i]; !v.marker {
					all = append(all, blob.Hidden{Name: name, Version: v.id, Size: int64(len(v.data)), Deleted: versions[0].marker})
				}
			}
		}
		s.mu.Unlock()
		if err != nil {
			yield(blob.Hidden{}, err)
			return
		}
		for _, h := range all {
			if !yield(h, ctx.Err()) {
				return
			}
		}
	}
}

func (s *Locking) at(h blob.Hidden) (int, error) {
	i := slices.IndexFunc(s.objects[h.Name], func(v version) bool { return v.id == h.Version && !v.marker })
	if i < 0 {
		return i, fmt.Errorf("version %s of %s: %w", h.Version, h.Name, blob.ErrNotExist)
	}
	return i, nil
}

func (s *Locking) GetHidden(ctx context.Context, h blob.Hidden) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enter(ctx, "GetHidden"); err != nil {
		return nil, err
	}
	i, err := s.at(h)
	if err != nil {
		return nil, err
	}
	return bytes.Clone(s.objects[h.Name][i].data), nil
}

func (s *Locking) Restore(ctx context.Context, h blob.Hidden) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.enter(ctx, "Restore"); err != nil {
		return err
	}
	i, err := s.at(h)
	if err != nil {
		return err
	}
	all := s.objects[h.Name]
	if slices.ContainsFunc(all[:i], func(v version) bool { return !v.marker }) {
		s.add(h.Name, version{data: all[i].data})
	} else {
		s.objects[h.Name] = all[i:]
	}
	return nil
}

// All names that have a version, shown or not.
func (s *Locking) All() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.names("")
}

// Hide deletes an object as a client does that names no version.
func (s *Locking) Hide(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(name, version{marker: true})
}

// Overwrite puts an object without a condition.
func (s *Locking) Overwrite(name string, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(name, version{data: bytes.Clone(data)})
}

// Destroy deletes every version that no lock keeps.
func (s *Locking) Destroy(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.objects[name] = slices.DeleteFunc(s.objects[name], func(v version) bool { return !s.holds(&v) })
	if len(s.objects[name]) == 0 {
		delete(s.objects, name)
	}
}

// BestLock is the longest lock of those versions that have the content.
func (s *Locking) BestLock(name string, right func([]byte) bool) (best blob.Lock) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, v := range s.objects[name] {
		if !v.marker && right(v.data) && v.lock.Until.After(best.Until) {
			best = v.lock
		}
	}
	return best
}
