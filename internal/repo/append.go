package repo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/seal"
)

// current is the state as last refreshed.
func (r *Repo) current() *chain.State {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.state
}

// append creates the next entry of the chain. allowed sees the state that the
// entry will follow, each time that another writer was faster. When append
// returns nil the entry is durable and refreshed into the state.
func (r *Repo) append(ctx context.Context, k chain.Kind, c chain.Clear, e chain.Sealed, allowed func(*chain.State) error) error {
	content, err := json.Marshal(e)
	if err != nil {
		return err
	}
	return r.appendContent(ctx, k, c, content, e.Point, allowed)
}

// appendContent is append for a sealed part as it is; point is what it
// commits, if it does.
func (r *Repo) appendContent(ctx context.Context, k chain.Kind, c chain.Clear, content []byte, point *Point, allowed func(*chain.State) error) error {
	r.refreshing.Lock()
	defer r.refreshing.Unlock()
	for {
		if _, err := r.refreshLocked(ctx); err != nil {
			return err
		}
		s := r.current()
		if damage := s.Damage(); len(damage) > 0 {
			return fmt.Errorf("%s; reading and restoring work, but nothing can be added: put the entry back from a copy of the repository", damage[0])
		}
		if err := allowed(s); err != nil {
			return err
		}
		n, p, ours, err := r.chain.Put(ctx, s, k, c, content)
		if err != nil {
			return err
		}
		if ours {
			err := r.arrived(context.WithoutCancel(ctx), n, p, point)
			r.lockEntry(ctx, n)
			return err
		}
	}
}

// arrived takes in the news after entry n, whose bytes p this process has just
// stored, and makes sure that n is in the chain.
func (r *Repo) arrived(ctx context.Context, n uint64, p []byte, point *Point) error {
	anew, err := r.refreshLocked(ctx)
	if err != nil || !anew {
		return err
	}
	return r.chain.Counts(ctx, r.current(), n, p, point)
}

// refresh reads the entries after the head and the index objects that are new.
func (r *Repo) refresh(ctx context.Context) error {
	r.refreshing.Lock()
	defer r.refreshing.Unlock()
	_, err := r.refreshLocked(ctx)
	return err
}

// refreshLocked tells whether the chain had to be read anew: entries after
// the head that was known have been deleted.
func (r *Repo) refreshLocked(ctx context.Context) (anew bool, err error) {
	old := r.current()
	s := old
	for {
		next, again, err := r.chain.Next(ctx, s)
		anew = anew || again
		if errors.Is(err, seal.ErrNoKey) {
			return anew, fmt.Errorf("%w: %s", ErrKeys, err)
		} else if err != nil {
			return anew, err
		}
		s = next
		// An index object that is gone may have been replaced meanwhile.
		if err := r.takeIndexes(ctx, old, s); errors.Is(err, errMoved) {
			continue
		} else if err != nil {
			return anew, err
		}
		break
	}
	if s.Keyring > old.Keyring {
		if err := r.learn(ctx); err != nil {
			return anew, err
		}
	}
	if s == old {
		return anew, nil
	}
	r.mu.Lock()
	r.state = s
	r.mu.Unlock()
	if !slices.Equal(s.Tiers, old.Tiers) {
		r.attach(s)
	}
	return anew, r.chain.Remember(s)
}

// takeIndexes brings the index up to the state s, which follows old. It is made
// anew with a checkpoint between them: packs that are gone are in the quarantine
// no more then, so that nothing of them may be found; and when lost index objects
// were replaced: what those alone knew of is not there any more.
func (r *Repo) takeIndexes(ctx context.Context, old, s *chain.State) error {
	if s.Checkpoint == old.Checkpoint && s.Mended == old.Mended {
		return r.readIndexes(ctx, s, r.index)
	}
	x, err := r.openIndex(s)
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.lostIndexes, r.found, r.drop = nil, nil, nil
	r.mu.Unlock()
	if err := r.readIndexes(ctx, s, x); err != nil {
		return errors.Join(err, x.Close())
	}
	return r.index.Replace(x)
}
