package repo

import (
	"context"
	"errors"
	"path/filepath"
	"sync"
	"sync/atomic"

	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
)

// liveIndex is the index cache, which is replaced as a whole when what it
// knows is in the inventory no more. What a sweep takes out of the inventory
// needs no such care: it is in quarantine.
type liveIndex struct {
	now atomic.Pointer[index.Index]

	mu      sync.Mutex     // guards retired
	retired []*index.Index // look-ups in them may be under way
}

func (l *liveIndex) Has(source [32]byte) bool { return l.now.Load().Has(source) }

func (l *liveIndex) Add(source [32]byte, packs []index.Pack) error {
	return l.now.Load().Add(source, packs)
}

func (l *liveIndex) Lookup(id pack.ID, places []index.Place) ([]index.Place, error) {
	return l.now.Load().Lookup(id, places)
}

func (l *liveIndex) set(x *index.Index) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old := l.now.Swap(x); old != nil {
		l.retired = append(l.retired, old)
	}
}

// Close closes all. No look-up may be under way.
func (l *liveIndex) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.now.Load().Close()
	for _, x := range l.retired {
		err = errors.Join(err, x.Close())
	}
	l.retired = nil
	return err
}

// openIndex opens the cache as far as it fits s.
func (r *Repo) openIndex(s *state) (*index.Index, error) {
	return index.Open(filepath.Join(r.cache, "index"), func(d [32]byte) bool { return s.indexes[d] })
}

// reindex puts an index in the place of the one that knows more than s.
func (r *Repo) reindex(ctx context.Context, s *state) error {
	x, err := r.openIndex(s)
	if err != nil {
		return err
	}
	for d := range s.indexes {
		if x.Has(d) {
			continue
		}
		packs, err := r.readIndex(ctx, d)
		if errors.Is(err, ErrDamaged) {
			continue // readIndexes has seen to that
		}
		if err == nil {
			err = x.Add(d, packs)
		}
		if err != nil {
			return errors.Join(err, x.Close())
		}
	}
	r.index.set(x)
	return nil
}
