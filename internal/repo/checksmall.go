package repo

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

// small reads leases, beats and pins. No data is lost with one of them, but
// prune waits for a lease that it cannot read, and refuses for a pin.
func (c *checker) small(ctx context.Context) error {
	names, err := blob.Names(ctx, c.r.store, "leases/")
	pins, pinsErr := blob.Names(ctx, c.r.store, "pins/")
	if err = errors.Join(err, pinsErr); err != nil {
		return err
	}
	for _, name := range append(names, pins...) {
		session, _, beat := splitName(name)
		var what string
		switch {
		case strings.HasPrefix(name, "pins/"):
			_, err = c.r.readPin(ctx, name)
			what = fmt.Sprintf("prune refuses as long as it is there; when its session is gone for certain: holdfast unpin %s --force", session)
		case beat:
			err = c.r.readBeat(ctx, name)
			what = "only its name counts; it goes with its run"
		default:
			_, err = c.r.readLease(ctx, session)
			what = "prune waits for its run; if that has died, \"holdfast prune --wait\" finds out and ends it"
		}
		switch {
		case err == nil, errors.Is(err, blob.ErrNotExist), errors.Is(err, seal.ErrForeign):
		case errors.Is(err, ErrDamaged):
			c.problem(Problem{Object: name, What: fmt.Sprintf("%v; %s", err, what)})
		default:
			return err
		}
	}
	return nil
}

func (r *Repo) readBeat(ctx context.Context, name string) error {
	raw, err := getDocument(ctx, r.store, name, seal.Beat, r.id)
	if err != nil {
		return err
	}
	master, err := r.master(ctx, raw.Header.Key)
	if err == nil {
		_, err = raw.Open(master, "lease")
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// keys checks that keyrings and slots can be read, and that the newest keyring is
// there.
func (c *checker) keys(ctx context.Context) error {
	rings, err := readRings(ctx, c.r.store, c.r.id)
	if err != nil {
		return err
	}
	if known := c.r.current().Keyring; known > rings.newest() {
		c.problem(Problem{Object: ringName(c.r.id, known), What: "missing or damaged: what was stored since it was made cannot be read; put it back with \"holdfast key import\", or from a copy of the repository"})
	} else if rings.damage != nil && len(rings.list) == 0 {
		c.problem(Problem{Object: "keyring", What: rings.damage.Error()})
	}
	for name, err := range rings.bad {
		if name != ringName(c.r.id, c.r.current().Keyring) {
			c.problem(Problem{Object: name, What: err.Error()})
		}
	}
	u := c.r.keys.Now()
	for _, d := range rings.list { // the older ones, too: whoever puts back a lost keyring goes on from them
		if err := d.check(u); err != nil {
			c.problem(Problem{Object: d.name, What: err.Error() + "; put it back with \"holdfast key import\", or from a copy of the repository"})
		}
	}
	slots, err := readSlots(ctx, c.r.store, c.r.id)
	if err != nil {
		return err
	}
	for _, k := range slots {
		if k.err != nil {
			c.problem(Problem{Object: slotName(k.id), What: k.err.Error() + "; remove it with \"holdfast key remove\", and add its passphrase again"})
		}
	}
	return nil
}
