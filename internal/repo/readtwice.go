package repo

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
)

// suspicion is what was wrong when an object was read; "" when nothing was.
type suspicion struct{ first, second string }

// readTwice reads an object whose SHA-256 is known, and once more when that
// went wrong: the way here may have been at fault. p is what was read last, nil
// when it could not be. An error means that the store answers nothing at all,
// which says nothing about the object.
func readTwice(ctx context.Context, s blob.Getter, name string, sum [32]byte) (p []byte, what suspicion, err error) {
	return twice(ctx, s, name, sum, func() ([]byte, error) { return s.Get(ctx, name, 0, -1) })
}

// twice is readTwice by a function.
func twice(ctx context.Context, s blob.Getter, name string, sum [32]byte, read func() ([]byte, error)) (p []byte, what suspicion, err error) {
	for _, w := range []*string{&what.first, &what.second} {
		p, err = read()
		switch {
		case err == nil && sha256.Sum256(p) == sum:
			return p, what, nil
		case err == nil:
			*w = "its bytes have changed"
		case ctx.Err() != nil:
			return nil, what, ctx.Err()
		case errors.Is(err, blob.ErrNotExist):
			*w = "missing"
		default:
			*w = fmt.Sprintf("cannot be read: %v", err)
		}
	}
	if err != nil && !errors.Is(err, blob.ErrNotExist) {
		if _, probe := s.Get(ctx, configName, 0, 1); probe != nil {
			return nil, what, err
		}
		if t, ok := s.(interface{ Reach(context.Context) error }); ok && t.Reach(ctx) != nil {
			return nil, what, err
		}
		p = nil
	}
	return p, what, nil
}

// notHere is what is wrong with a pack that a tier, opened by itself, lacks.
const notHere = "not in this tier"

// ownFirst reads an object's copy in the own store, and another one only when
// there is none: a check wants to know of one that cannot be read, where others
// are glad of another.
type ownFirst struct{ t *blob.Tiers }

func (o ownFirst) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	p, err := o.t.Own().Get(ctx, name, off, n)
	if errors.Is(err, blob.ErrNotExist) {
		return o.t.Get(ctx, name, off, n)
	}
	return p, err
}

func (o ownFirst) Reach(ctx context.Context) error { return o.t.Reach(ctx) }

// wornPack is a pack that is not what it was.
type wornPack struct {
	name  [32]byte
	what  string
	items []index.Item
	bad   map[pack.ID]bool // items that are lost with it
	there bool             // its bytes can be read
}

// packProblems reports the damaged packs, but for those that the chain knows to
// be so and of which every item lies elsewhere by now: that is mended, and
// prune will remove what is left.
func (c *checker) packProblems() {
	known := c.r.current().Bad
	for _, w := range c.worn {
		mended := true
		for _, it := range w.items {
			ok, err := c.readable(it.ID)
			mended = mended && known[chain.Copy{Pack: w.name, ID: it.ID}] && ok && err == nil
		}
		if mended {
			c.report.Mended++
			continue
		}
		if w.what == notHere {
			c.report.Elsewhere++
			continue
		}
		c.report.worn = append(c.report.worn, w)
		what := fmt.Sprintf("%s: %d of %d chunks lost", w.what, len(w.bad), len(w.items))
		if len(w.bad) == 0 {
			what += "; \"holdfast repair\" stores them where they are safe"
		}
		c.problem(Problem{Object: packName(w.name), What: what})
	}
}

// copies gives everywhere that an item lies, copies known to be bad last: what
// could not be read once may be readable now, and it proves itself.
func (r *Repo) copies(id pack.ID) ([]index.Place, error) {
	good, err := r.places(id)
	if err != nil || len(good) > 0 || len(r.current().Bad) == 0 {
		return good, err
	}
	return r.index.Lookup(id, nil)
}
