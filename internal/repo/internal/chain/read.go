package chain

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"iter"
	"slices"
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

// Damage says what is wrong with entries, as far as it bears on the state: each
// is damaged or missing, and nothing behind makes that good. Nothing can be
// appended then.
func (s *State) Damage() []string {
	var damage []string
	for _, g := range s.gaps {
		damage = append(damage, g.text)
	}
	return damage
}

// skip goes past the next entry, which is damaged.
func (s *State) skip(why error) {
	s.Head++
	s.unknown = true
	s.gaps = append(s.gaps, gap{s.Head, false, why.Error()})
}

// miss goes past the next entries up to the last one, which are not there.
func (s *State) miss(last uint64) {
	if last <= s.Head {
		return
	}
	g := absent(s.Head+1, last)
	g.text += fmt.Sprintf(": %v: missing", seal.ErrDamaged)
	s.Head, s.unknown = last, true
	s.gaps = append(s.gaps, g)
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
				p, err := s.Get(ctx, Name(numbers[i]), 0, -1)
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

// Genesis is the state before the first entry.
func (c *Chain) Genesis() *State {
	s := newState(c.Config)
	s.Time = c.Made
	return s
}

// follow takes entries into a state, after those that it has. each, if not
// nil, sees the state after every one. vanished tells that entries which were
// listed are not there any more.
func (c *Chain) follow(ctx context.Context, s *State, numbers []uint64, each func(*State) error) (vanished bool, err error) {
	for e, err := range fetch(ctx, c.Store, numbers) {
		if err != nil {
			return vanished, err
		}
		s.miss(e.number - 1)
		if e.data == nil {
			vanished = true
			s.miss(e.number)
		} else if err := s.skipDamage(c.apply(ctx, s, e.data)); err != nil {
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
func (c *Chain) start(ctx context.Context, numbers []uint64) (uint64, error) {
	for _, n := range slices.Backward(numbers) {
		p, err := c.Store.Get(ctx, Name(n), 0, -1)
		if errors.Is(err, blob.ErrNotExist) {
			continue
		} else if err != nil {
			return 0, err
		}
		if clear, _, err := Parse(p, n, c.Repo, c.Verify); err == nil {
			return clear.Start, nil
		} else if !errors.Is(err, seal.ErrDamaged) && !errors.Is(err, seal.ErrForeign) {
			return 0, err
		}
	}
	return 0, nil
}

// Read reads the chain as it is in the store, from the newest checkpoints on,
// and remembers its head. It fails with ErrRolledBack when the chain does not go
// on from what this machine has seen; the state is given all the same, as far as
// it was read. Entries that are damaged or missing are no error: see
// State.Damage.
func (c *Chain) Read(ctx context.Context) (*State, error) {
	seen, err := c.seen()
	if err != nil {
		return nil, err
	}
	s, err := c.read(ctx, seen)
	if err != nil {
		return s, err
	}
	return s, c.Remember(s)
}

// read reads the chain as it is in the store. It must contain the entry
// seen, or go on behind it to a checkpoint; with ErrRolledBack it gives the
// state as far as it was read.
func (c *Chain) read(ctx context.Context, seen headSeen) (*State, error) {
	for try := 1; ; try++ {
		numbers, err := Numbers(ctx, c.Store)
		if err != nil {
			return nil, err
		}
		from := 0
		if len(numbers) > readAhead {
			start, err := c.start(ctx, numbers)
			if err != nil {
				return nil, err
			}
			from, _ = slices.BinarySearch(numbers, start)
		}
		s, vanished, err := c.readFrom(ctx, numbers, from, seen)
		if err != nil {
			return s, err
		}
		if len(s.gaps) > 0 && vanished && try < readAgain {
			continue // prunes have gone on since the listing
		}
		if len(s.gaps) > 0 && from > 0 {
			if s, _, err = c.readFrom(ctx, numbers, 0, seen); err != nil {
				return s, err
			}
		}
		for _, g := range s.gaps {
			if g.missing && g.last > uint64(len(numbers))+maxGap {
				return nil, fmt.Errorf("%s: %w: not the name of the chain's newest entry", Name(s.Head), seal.ErrDamaged)
			}
		}
		return s, nil
	}
}

// readFrom reads the chain from one of its entries on.
func (c *Chain) readFrom(ctx context.Context, numbers []uint64, from int, seen headSeen) (*State, bool, error) {
	s := c.Genesis()
	if _, there := slices.BinarySearch(numbers[:from], seen.Number); there {
		p, err := c.Store.Get(ctx, Name(seen.Number), 0, -1)
		if err != nil && !errors.Is(err, blob.ErrNotExist) {
			return nil, false, err
		}
		if sum := sha256.Sum256(p); err == nil && !bytes.Equal(sum[:], seen.Digest) {
			return s, false, c.rolledBack(seen)
		}
	}
	vanished, err := c.follow(ctx, s, numbers[from:], func(s *State) error {
		if s.Head == seen.Number && !s.unknown && !bytes.Equal(seen.Digest, s.Digest[:]) {
			return c.rolledBack(seen)
		}
		return nil
	})
	if err == nil && seen.Number > s.Head {
		err = c.rolledBack(seen)
	}
	return s, vanished, err
}

// skipDamage notes damage; other errors it returns.
func (s *State) skipDamage(err error) error {
	if errors.Is(err, seal.ErrDamaged) || errors.Is(err, seal.ErrForeign) {
		s.skip(err)
		return nil
	}
	return err
}

// Compare reads all entries up to known's head again, those as well that need not
// be read any more, and says in what they are damaged or lead elsewhere than to
// known. vanished tells that entries went while they were read.
func (c *Chain) Compare(ctx context.Context, known *State) (problems []string, vanished bool, err error) {
	numbers, err := Numbers(ctx, c.Store)
	if err != nil {
		return nil, false, err
	}
	numbers = slices.DeleteFunc(numbers, func(n uint64) bool { return n > known.Head })
	s := c.Genesis()
	s.proving = true
	if vanished, err = c.follow(ctx, s, numbers, nil); err != nil {
		return nil, vanished, err
	}
	s.miss(known.Head)
	if what, err := s.differs(known); err != nil {
		return nil, vanished, err
	} else if what != "" && len(s.gaps)+len(known.gaps) == 0 {
		problems = append(problems, "its "+what+" are not what they were when it was read first; open the repository anew")
	}
	for _, g := range s.healed {
		if g.last >= s.Older { // what is before it is not read any more
			problems = append(problems, g.text+"; nothing is lost by that: the checkpoint behind it has what it said")
		}
	}
	return append(problems, s.Damage()...), vanished, nil
}

// Prove reads the entries from the chain's start on from the store, in which there
// are those numbers, and compares the state that they give with s.
func (c *Chain) Prove(ctx context.Context, s *State, numbers []uint64) error {
	start := s.Older
	if start == 0 { // a first checkpoint: what is before it says nothing about it
		start = s.Checkpoint
	}
	from, there := slices.BinarySearch(numbers, start)
	if !there {
		return fmt.Errorf("%w: entry %d, where the chain begins, is not there", seal.ErrDamaged, start)
	}
	numbers = slices.DeleteFunc(slices.Clone(numbers[from:]), func(n uint64) bool { return n > s.Head })
	back := c.Genesis()
	back.Head, back.unknown = start-1, true
	back.proving = true
	if _, err := c.follow(ctx, back, numbers, nil); err != nil {
		return err
	}
	if gaps := slices.Concat(back.healed, back.gaps); len(gaps) > 0 {
		return fmt.Errorf("what was read back from the store is not what is known: %s", gaps[0].text)
	}
	what, err := back.differs(s)
	if err == nil && (what != "" || back.Head != s.Head || back.Digest != s.Digest) {
		err = fmt.Errorf("%w: the chain as read back from the store does not say what is known (%s)", seal.ErrDamaged, what)
	}
	return err
}

// Next reads what was added after old, which it leaves as it is, and gives the
// state after that: old itself when nothing was. anew tells that the chain had
// to be read from elsewhere, since old's head has been deleted, as prunes do
// that go on for long. ErrNoKey: an entry is sealed with a key that is not known.
func (c *Chain) Next(ctx context.Context, old *State) (s *State, anew bool, err error) {
	s = old
	for ahead := 1; ; ahead = min(2*ahead, readAhead) {
		entries, behind, err := c.news(ctx, s, ahead)
		if err != nil {
			return old, anew, err
		}
		if behind {
			var seen headSeen
			if !s.unknown {
				seen = headSeen{s.Head, s.Digest[:]}
			}
			if s, err = c.read(ctx, seen); err != nil {
				return old, anew, err
			}
			anew = true
			continue
		}
		for _, p := range entries {
			if s == old {
				s = old.clone()
				s.proving = true
			}
			err = c.apply(ctx, s, p)
			if errors.Is(err, seal.ErrNoKey) && len(s.gaps) == 0 {
				return old, anew, err // not damage: it was whole before
			}
			if err := s.skipDamage(err); err != nil {
				return old, anew, err
			}
		}
		if len(entries) < ahead {
			break
		}
	}
	if s != old {
		s.proving = false
	}
	return s, anew, nil
}

// news reads up to n entries behind the head, and looks whether the head is
// still there: if not, behind it may be entries that were deleted.
func (c *Chain) news(ctx context.Context, s *State, n int) (entries [][]byte, behind bool, err error) {
	var lookErr error
	var looking sync.WaitGroup
	looking.Go(func() { behind, lookErr = c.overtaken(ctx, s) })
	numbers := make([]uint64, n)
	for i := range numbers {
		numbers[i] = s.Head + 1 + uint64(i)
	}
	for e, fetchErr := range fetch(ctx, c.Store, numbers) {
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
func (c *Chain) overtaken(ctx context.Context, s *State) (bool, error) {
	if s.Head == 0 {
		numbers, err := Numbers(ctx, c.Store)
		return len(numbers) > 0 && (numbers[0] != 1 || len(numbers) > 1 && numbers[1] != 2), err
	}
	p, err := c.Store.Get(ctx, Name(s.Head), 0, seal.HeaderLen)
	switch {
	case errors.Is(err, blob.ErrNotExist):
		return true, nil
	case errors.Is(err, blob.ErrTruncated):
		return !s.unknown, nil
	}
	return !s.unknown && err == nil && !bytes.Equal(p, s.header[:]), err
}
