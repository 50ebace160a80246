package blob

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
)

// Tiers is a store with others beside it: objects whose names begin with a
// prefix may lie in any of them, or in several. It creates all objects in its
// own store and finds them wherever they are. An object must be in one store
// before it is deleted from another; then reads and listings beside that miss
// nothing.
//
// What cannot be reached is never taken for absent: each other store has an
// object, its mark, without which it does not count as reached.
type Tiers struct {
	own    Store
	prefix string
	mark   string

	mu     sync.Mutex       // guards what follows
	tiers  []*tier          // replaced, never changed
	hints  map[string]*tier // objects seen there and not in the own store; may be wrong
	sealed error            // why nothing can be written
	except string           // but objects whose names begin with this
}

// ErrUnreachable: one of the stores beside the own one does not answer, or lacks
// its mark.
var ErrUnreachable = errors.New("cannot be reached")

// Tier is one of the stores beside the own one.
type Tier struct {
	Name     string
	Location string // for people, and to tell whether it is another one
	// Open gives the store. It is called when the store is first needed, and
	// again after it has failed.
	Open func(ctx context.Context) (Store, error)
}

type tier struct {
	Tier

	opening sync.Mutex // held while it is opened
	store   Store      // nil before that; guarded by opening
}

// NewTiers gives own with no others yet. Only names that begin with prefix may
// be in them; mark is the object that each of them has.
func NewTiers(own Store, prefix, mark string) *Tiers {
	return &Tiers{own: own, prefix: prefix, mark: mark, hints: map[string]*tier{}}
}

// Set replaces the stores beside the own one. Those that stay are not opened again.
func (t *Tiers) Set(tiers []Tier) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := t.tiers
	t.tiers, t.hints = nil, map[string]*tier{}
	for _, n := range tiers {
		next := &tier{Tier: n}
		for _, o := range old {
			if o.Name == n.Name && o.Location == n.Location {
				next = o
			}
		}
		t.tiers = append(t.tiers, next)
	}
}

// Seal makes every write fail with why, but of objects whose names begin with
// except; nil lifts it.
func (t *Tiers) Seal(why error, except string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.sealed, t.except = why, except
}

// Own is the store without the others.
func (t *Tiers) Own() Store { return t.own }

func (t *Tiers) under() Store { return t.own }

func (t *Tiers) all() []*tier {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.tiers
}

// At opens one of the other stores and sees that it is there.
func (t *Tiers) At(ctx context.Context, name string) (Store, error) {
	for _, r := range t.all() {
		if r.Name == name {
			return r.reach(ctx, t.mark)
		}
	}
	return nil, fmt.Errorf("tier %s: %w", name, ErrNotExist)
}

// Reach sees that every store is there.
func (t *Tiers) Reach(ctx context.Context) error {
	for _, r := range t.all() {
		if _, err := r.reach(ctx, t.mark); err != nil {
			return err
		}
	}
	return nil
}

// open gives the store, whatever is in it.
func (r *tier) open(ctx context.Context) (Store, error) {
	r.opening.Lock()
	defer r.opening.Unlock()
	if r.store != nil {
		return r.store, nil
	}
	s, err := r.Open(ctx)
	if err != nil {
		return nil, fmt.Errorf("tier %s %w: %w", r.Name, ErrUnreachable, err)
	}
	r.store = s
	return s, nil
}

// reach gives the store if its mark is there: a disk that is not mounted looks
// like an empty directory.
func (r *tier) reach(ctx context.Context, mark string) (Store, error) {
	s, err := r.open(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := s.Get(ctx, mark, 0, 1); errors.Is(err, ErrNotExist) {
		return nil, fmt.Errorf("tier %s %w: %s holds nothing of this repository: is it mounted?", r.Name, ErrUnreachable, r.Location)
	} else if err != nil {
		return nil, fmt.Errorf("tier %s %w: %w", r.Name, ErrUnreachable, err)
	}
	return s, nil
}

func (t *Tiers) writable(name string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sealed != nil && !(t.except != "" && strings.HasPrefix(name, t.except)) {
		return t.sealed
	}
	return nil
}

func (t *Tiers) Put(ctx context.Context, name string, data []byte) error {
	if err := t.writable(name); err != nil {
		return fmt.Errorf("put %s: %w", name, err)
	}
	return t.own.Put(ctx, name, data)
}

func (t *Tiers) hint(name string) *tier {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.hints[name]
}

func (t *Tiers) setHint(name string, r *tier) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if r == nil {
		delete(t.hints, name)
	} else {
		t.hints[name] = r
	}
}

// elsewhere gives the stores beside the own one that may hold a name.
func (t *Tiers) elsewhere(name string) []*tier {
	if !strings.HasPrefix(name, t.prefix) {
		return nil
	}
	return t.all()
}

func (t *Tiers) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	tiers := t.elsewhere(name)
	if len(tiers) == 0 {
		return t.own.Get(ctx, name, off, n)
	}
	if r := t.hint(name); r != nil {
		if p, err := r.get(ctx, name, off, n); err == nil {
			return p, nil
		}
		t.setHint(name, nil)
	}
	p, err := t.own.Get(ctx, name, off, n)
	// Once more, since it may have been brought back from where it was looked
	// for last to where it was looked for first.
	for try := 0; try < 2 && err != nil && ctx.Err() == nil; try++ {
		q, found, tierErr := t.getOther(ctx, tiers, name, off, n, errors.Is(err, ErrNotExist))
		if found {
			return q, nil
		} else if tierErr != nil && absent(err) {
			return nil, tierErr
		}
		p, err = t.own.Get(ctx, name, off, n)
	}
	if err != nil && absent(err) && ctx.Err() == nil {
		for _, r := range tiers {
			if _, err := r.reach(ctx, t.mark); err != nil {
				return nil, fmt.Errorf("get %s: %w", name, err)
			}
		}
	}
	return p, err
}

// Fill implements Filler.
func (t *Tiers) Fill(ctx context.Context, name string, off int64, p []byte) error {
	if len(t.elsewhere(name)) == 0 {
		return Fill(ctx, t.own, name, off, p)
	}
	q, err := t.Get(ctx, name, off, int64(len(p)))
	copy(p, q)
	return err
}

// GetOther reads from the other stores before the own one: for an object whose
// own copy has turned out damaged.
func (t *Tiers) GetOther(ctx context.Context, name string, off, n int64) ([]byte, error) {
	if p, found, _ := t.getOther(ctx, t.elsewhere(name), name, off, n, false); found {
		return p, nil
	}
	return t.own.Get(ctx, name, off, n)
}

// getOther asks the tiers. An error is that of one that could not be asked.
// only says that the own store does not have it.
func (t *Tiers) getOther(ctx context.Context, tiers []*tier, name string, off, n int64, only bool) (p []byte, found bool, err error) {
	for _, r := range tiers {
		q, tierErr := r.get(ctx, name, off, n)
		if tierErr == nil {
			if only {
				t.setHint(name, r)
			}
			return q, true, nil
		} else if !absent(tierErr) {
			err = tierErr
		}
	}
	return nil, false, err
}

// absent tells of an answer that the object is not there, or not whole.
func absent(err error) bool { return errors.Is(err, ErrNotExist) || errors.Is(err, ErrTruncated) }

func (r *tier) get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	s, err := r.open(ctx)
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", name, err)
	}
	p, err := s.Get(ctx, name, off, n)
	if err != nil {
		return nil, fmt.Errorf("tier %s: %w", r.Name, err)
	}
	return p, nil
}

// List yields each name once, with the own store's size if that has it. It
// fails when any store's listing does.
func (t *Tiers) List(ctx context.Context, prefix string) iter.Seq2[Info, error] {
	tiers := t.all()
	if len(tiers) == 0 || !strings.HasPrefix(prefix, t.prefix) && !strings.HasPrefix(t.prefix, prefix) {
		return t.own.List(ctx, prefix)
	}
	return func(yield func(Info, error) bool) {
		seen, more := map[string]bool{}, true
		list := func(s Store, prefix string, from *tier) {
			for i, err := range s.List(ctx, prefix) {
				if err != nil {
					if from != nil {
						err = fmt.Errorf("tier %s: %w", from.Name, err)
					}
					more = false
					yield(Info{}, err)
					return
				}
				if seen[i.Name] {
					continue
				}
				if strings.HasPrefix(i.Name, t.prefix) {
					seen[i.Name] = true
					t.setHint(i.Name, from)
				} else if from != nil {
					continue
				}
				if more = yield(i, nil); !more {
					return
				}
			}
		}
		list(t.own, prefix, nil)
		within := prefix
		if !strings.HasPrefix(prefix, t.prefix) {
			within = t.prefix
		}
		for _, r := range tiers {
			if !more {
				return
			}
			s, err := r.reach(ctx, t.mark)
			if err != nil {
				yield(Info{}, fmt.Errorf("list %q: %w", prefix, err))
				return
			}
			list(s, within, r)
		}
		if more { // what was brought back between the two listings
			list(t.own, within, nil)
		}
	}
}

// Delete deletes every copy.
func (t *Tiers) Delete(ctx context.Context, name string) error {
	if err := t.writable(name); err != nil {
		return fmt.Errorf("delete %s: %w", name, err)
	}
	err := t.own.Delete(ctx, name)
	for _, r := range t.elsewhere(name) {
		s, tierErr := r.reach(ctx, t.mark)
		if tierErr == nil {
			if tierErr = s.Delete(ctx, name); tierErr != nil {
				tierErr = fmt.Errorf("tier %s: %w", r.Name, tierErr)
			}
		}
		switch {
		case err != nil && errors.Is(err, ErrNotExist):
			err = tierErr
		case tierErr != nil && !errors.Is(tierErr, ErrNotExist):
			err = errors.Join(err, tierErr)
		}
	}
	return err
}

// tiersLocker is the ability to lock of a store with others beside it: an object is
// locked where it lies.
type tiersLocker struct {
	t   *Tiers
	own Locker
}

// each does something with each store that holds a name.
func (l *tiersLocker) each(ctx context.Context, name string, do func(Locker) error) error {
	err := do(l.own)
	tiers := l.t.elsewhere(name)
	if len(tiers) == 0 || err != nil && !errors.Is(err, ErrNotExist) {
		return err
	}
	for _, r := range tiers {
		s, tierErr := r.reach(ctx, l.t.mark)
		if tierErr != nil {
			return tierErr
		}
		there, ok := As[Locker](s)
		if ok {
			tierErr = do(there)
		} else if _, tierErr = s.Get(ctx, name, 0, 0); tierErr == nil {
			tierErr = ErrNoLock
		}
		switch {
		case errors.Is(tierErr, ErrNotExist):
		case tierErr != nil && err != nil: // it lies here and not in the own store
			return fmt.Errorf("tier %s: %w", r.Name, tierErr)
		case tierErr == nil:
			err = nil
		}
	}
	return err
}

// Lock locks an object in the own store, or, when that does not have it, in a
// tier, which must be able to. A copy beside one that is locked in the own
// store is locked if its tier can.
func (l *tiersLocker) Lock(ctx context.Context, name string, lock Lock) error {
	return l.each(ctx, name, func(there Locker) error { return there.Lock(ctx, name, lock) })
}

// Locked is the best lock of any copy.
func (l *tiersLocker) Locked(ctx context.Context, name string) (best Lock, err error) {
	err = l.each(ctx, name, func(there Locker) error {
		lock, err := there.Locked(ctx, name)
		if err == nil && lock.Holds(best) {
			best = lock
		}
		return err
	})
	return best, err
}

// Canary tries the own store.
func (l *tiersLocker) Canary(ctx context.Context, mode LockMode) error {
	return l.own.Canary(ctx, mode)
}
