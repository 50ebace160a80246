package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

const (
	// readAhead is how many entries are read at once: at 50 ms a call, a
	// thousand take less than a second.
	readAhead = 64
	// maxGap bounds how many entries may be missing in a chain that is read all
	// the same.
	maxGap = 1 << 20
	// readAgain bounds how often the chain is read anew when prunes beside it
	// delete what was listed.
	readAgain = 5
)

// gap is an entry that is damaged, or one or more that are missing.
type gap struct {
	last    uint64
	missing bool
	text    string
}

func (g gap) String() string { return g.text }

// skip goes past the next entry, which is damaged.
func (s *state) skip(why error) {
	s.head++
	s.unknown = true
	s.gaps = append(s.gaps, gap{s.head, false, why.Error()})
}

// miss goes past the next entries up to the last one, which are not there.
func (s *state) miss(last uint64) {
	if last <= s.head {
		return
	}
	g := absent(s.head+1, last)
	g.text += fmt.Sprintf(": %v: missing", ErrDamaged)
	s.head, s.unknown = last, true
	s.gaps = append(s.gaps, g)
}

// entryNumbers lists the entries that are in the store, ascending.
func entryNumbers(ctx context.Context, s blob.Store) ([]uint64, error) {
	names, err := blob.Names(ctx, s, "chain/")
	if err != nil {
		return nil, err
	}
	var numbers []uint64
	for _, name := range names {
		if n, ok := entryNumber(name); ok {
			numbers = append(numbers, n)
		}
	}
	return numbers, nil
}

// lastEntry is the number of the newest entry that is in the store; 0 when
// there is none.
func lastEntry(ctx context.Context, s blob.Store) (uint64, error) {
	numbers, err := entryNumbers(ctx, s)
	if len(numbers) == 0 {
		return 0, err
	}
	return numbers[len(numbers)-1], nil
}

// entryNumber is the number of the entry of that name.
func entryNumber(name string) (uint64, bool) {
	n, err := strconv.ParseUint(strings.TrimPrefix(name, "chain/"), 10, 64)
	return n, err == nil && n > 0 && entryName(n) == name
}

// fetched is an entry's stored bytes; nil when it is not there any more.
type fetched struct {
	number uint64
	data   []byte
}

// fetch reads entries, many at once, and yields them in order.
func fetch(ctx context.Context, s blob.Store, numbers []uint64) iter.Seq2[fetched, error] {
	type answer struct {
		data []byte
		err  error
	}
	return func(yield func(fetched, error) bool) {
		var wg sync.WaitGroup
		defer wg.Wait()
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		answers := make([]chan answer, len(numbers))
		ask := func(i int) {
			if i >= len(numbers) {
				return
			}
			to := make(chan answer, 1)
			answers[i] = to
			wg.Go(func() {
				p, err := s.Get(ctx, entryName(numbers[i]), 0, -1)
				to <- answer{p, err}
			})
		}
		for i := range readAhead {
			ask(i)
		}
		for i, n := range numbers {
			a := <-answers[i]
			answers[i] = nil
			ask(i + readAhead)
			if errors.Is(a.err, blob.ErrNotExist) {
				a = answer{}
			}
			if !yield(fetched{n, a.data}, a.err) || a.err != nil {
				return
			}
		}
	}
}

// genesis is the state before the first entry.
func (r *Repo) genesis() *state {
	s := newState(r.config)
	s.time = r.created
	return s
}

// follow takes entries into a state, after those that it has. each, if not
// nil, sees the state after every one. vanished tells that entries which were
// listed are not there any more.
func (r *Repo) follow(ctx context.Context, s *state, numbers []uint64, each func(*state) error) (vanished bool, err error) {
	for e, err := range fetch(ctx, r.store, numbers) {
		if err != nil {
			return vanished, err
		}
		s.miss(e.number - 1)
		if e.data == nil {
			vanished = true
			s.miss(e.number)
		} else if err := s.skipDamage(r.apply(ctx, s, e.data)); err != nil {
			return vanished, err
		}
		if each != nil {
			if err := each(s); err != nil {
				return vanished, err
			}
		}
	}
	return vanished, nil
}

// start finds the number of the checkpoint from which the chain has to be
// read: what the newest entry that can be read says. 0 is the first entry.
func (r *Repo) start(ctx context.Context, numbers []uint64) (uint64, error) {
	for _, n := range slices.Backward(numbers) {
		p, err := r.store.Get(ctx, entryName(n), 0, -1)
		if errors.Is(err, blob.ErrNotExist) {
			continue
		} else if err != nil {
			return 0, err
		}
		if c, _, err := parseEntry(p, n, r.id, r.pub); err == nil {
			return c.Start, nil
		} else if !errors.Is(err, ErrDamaged) && !errors.Is(err, seal.ErrForeign) {
			return 0, err
		}
	}
	return 0, nil
}

// parseEntry reads an entry as far as that can be done without a key.
func parseEntry(p []byte, n uint64, id [16]byte, pub []byte) (c entryClear, k kind, err error) {
	raw, err := seal.Parse(p, seal.Entry)
	if err == nil {
		err = raw.Verify(id, pub)
	}
	if err == nil {
		err = seal.Unmarshal(raw.Clear, &c)
	}
	if err == nil && c.Number != n {
		err = fmt.Errorf("%w: it is entry %d", ErrDamaged, c.Number)
	}
	if err != nil {
		return c, 0, err
	}
	return c, kind(raw.Header.Kind), nil
}

// load reads the chain: at Open, before anything is shared.
func (r *Repo) load(ctx context.Context) error {
	seen, err := r.seen()
	if err != nil {
		return err
	}
	if r.state, err = r.readChain(ctx, seen); err != nil {
		return err
	}
	return r.remember(r.state)
}

// readChain reads the chain as it is in the store. It must contain the entry
// seen, or go on behind it to a checkpoint; with ErrRolledBack it gives the
// state as far as it was read.
func (r *Repo) readChain(ctx context.Context, seen headSeen) (*state, error) {
	for try := 1; ; try++ {
		numbers, err := entryNumbers(ctx, r.store)
		if err != nil {
			return nil, err
		}
		from := 0
		if len(numbers) > readAhead {
			start, err := r.start(ctx, numbers)
			if err != nil {
				return nil, err
			}
			from, _ = slices.BinarySearch(numbers, start)
		}
		s, vanished, err := r.readFrom(ctx, numbers, from, seen)
		if err != nil {
			return s, err
		}
		if len(s.gaps) > 0 && vanished && try < readAgain {
			continue // prunes have gone on since the listing
		}
		if len(s.gaps) > 0 && from > 0 {
			if s, _, err = r.readFrom(ctx, numbers, 0, seen); err != nil {
				return s, err
			}
		}
		for _, g := range s.gaps {
			if g.missing && g.last > uint64(len(numbers))+maxGap {
				return nil, fmt.Errorf("%s: %w: not the name of the chain's newest entry", entryName(s.head), ErrDamaged)
			}
		}
		return s, nil
	}
}

// readFrom reads the chain from one of its entries on.
func (r *Repo) readFrom(ctx context.Context, numbers []uint64, from int, seen headSeen) (*state, bool, error) {
	s := r.genesis()
	if _, there := slices.BinarySearch(numbers[:from], seen.Number); there {
		p, err := r.store.Get(ctx, entryName(seen.Number), 0, -1)
		if err != nil && !errors.Is(err, blob.ErrNotExist) {
			return nil, false, err
		}
		if sum := sha256.Sum256(p); err == nil && !bytes.Equal(sum[:], seen.Digest) {
			return s, false, r.rolledBack(seen)
		}
	}
	vanished, err := r.follow(ctx, s, numbers[from:], func(s *state) error {
		if s.head == seen.Number && !s.unknown && !bytes.Equal(seen.Digest, s.digest[:]) {
			return r.rolledBack(seen)
		}
		return nil
	})
	if err == nil && seen.Number > s.head {
		err = r.rolledBack(seen)
	}
	return s, vanished, err
}

// skipDamage notes damage; other errors it returns.
func (s *state) skipDamage(err error) error {
	if errors.Is(err, ErrDamaged) || errors.Is(err, seal.ErrForeign) {
		s.skip(err)
		return nil
	}
	return err
}

// headSeen is the newest chain entry that this machine has seen.
type headSeen struct {
	Number uint64   `json:"number"`
	Digest seal.Hex `json:"digest"`
}

func (r *Repo) headPath() string { return filepath.Join(r.cache, "head") }

func (r *Repo) seen() (h headSeen, err error) {
	p, err := os.ReadFile(r.headPath())
	if errors.Is(err, os.ErrNotExist) {
		return h, nil
	} else if err != nil {
		return h, err
	}
	if err := json.Unmarshal(p, &h); err != nil {
		return h, fmt.Errorf("%s: %w; delete it to go on without the detection of a rollback", r.headPath(), err)
	}
	return h, nil
}

func (r *Repo) rolledBack(seen headSeen) error {
	return fmt.Errorf("%w: entry %d of its chain is missing or another one; if you put back an older copy yourself, delete %s",
		ErrRolledBack, seen.Number, r.headPath())
}

// remember keeps the head for the next Open. A crash here costs only that.
func (r *Repo) remember(s *state) error {
	if s.head == 0 || s.unknown {
		return nil
	}
	if err := os.MkdirAll(r.cache, 0o700); err != nil {
		return err
	}
	p, err := json.Marshal(headSeen{s.head, s.digest[:]})
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(r.cache, "head-*")
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), r.headPath())
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
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
	for ahead := 1; ; ahead = min(2*ahead, readAhead) {
		entries, behind, err := r.news(ctx, s, ahead)
		if err != nil {
			return anew, err
		}
		if behind {
			seen := headSeen{Number: s.head}
			if seen.Digest = s.digest[:]; s.unknown {
				seen = headSeen{}
			}
			if s, err = r.readChain(ctx, seen); err != nil {
				return anew, err
			}
			anew = true
			continue
		}
		for _, p := range entries {
			if s == old {
				s = old.clone()
				s.proving = true
			}
			err = r.apply(ctx, s, p)
			if errors.Is(err, seal.ErrNoKey) && len(s.gaps) == 0 {
				return anew, fmt.Errorf("%w: %s", ErrKeys, err) // not damage: it was whole when it was opened
			}
			if err := s.skipDamage(err); err != nil {
				return anew, err
			}
		}
		if len(entries) == ahead {
			continue
		}
		// An index object that is gone may have been replaced meanwhile.
		if err := r.takeIndexes(ctx, old, s); errors.Is(err, errMoved) {
			continue
		} else if err != nil {
			return anew, err
		}
		break
	}
	if s.keyring > old.keyring {
		if err := r.learn(ctx); err != nil {
			return anew, err
		}
	}
	if s == old {
		return anew, nil
	}
	s.proving = false
	r.mu.Lock()
	r.state = s
	r.mu.Unlock()
	if !slices.Equal(s.tiers, old.tiers) {
		r.attach(s)
	}
	return anew, r.remember(s)
}

// news reads up to n entries behind the head, and looks whether the head is
// still there: if not, behind it may be entries that were deleted.
func (r *Repo) news(ctx context.Context, s *state, n int) (entries [][]byte, behind bool, err error) {
	var lookErr error
	var looking sync.WaitGroup
	looking.Go(func() { behind, lookErr = r.overtaken(ctx, s) })
	numbers := make([]uint64, n)
	for i := range numbers {
		numbers[i] = s.head + 1 + uint64(i)
	}
	for e, fetchErr := range fetch(ctx, r.store, numbers) {
		if fetchErr != nil {
			err = fetchErr
			break
		}
		if e.data == nil {
			break
		}
		entries = append(entries, e.data)
	}
	looking.Wait()
	return entries, behind, errors.Join(err, lookErr)
}

// overtaken reports whether the head that is known has been deleted, as a prune
// does when two checkpoints follow it.
func (r *Repo) overtaken(ctx context.Context, s *state) (bool, error) {
	if s.head == 0 {
		numbers, err := entryNumbers(ctx, r.store)
		return len(numbers) > 0 && (numbers[0] != 1 || len(numbers) > 1 && numbers[1] != 2), err
	}
	p, err := r.store.Get(ctx, entryName(s.head), 0, seal.HeaderLen)
	switch {
	case errors.Is(err, blob.ErrNotExist):
		return true, nil
	case errors.Is(err, blob.ErrTruncated):
		return !s.unknown, nil
	}
	return !s.unknown && err == nil && !bytes.Equal(p, s.header[:]), err
}

// takeIndexes brings the index up to the state s, which follows old. It is made
// anew with a checkpoint between them: packs that are gone are in the quarantine
// no more then, so that nothing of them may be found; and when lost index objects
// were replaced: what those alone knew of is not there any more.
func (r *Repo) takeIndexes(ctx context.Context, old, s *state) error {
	if s.checkpoint == old.checkpoint && s.mended == old.mended {
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
