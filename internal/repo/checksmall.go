package repo

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/keyring"
	"holdfast/internal/repo/internal/lease"
	"holdfast/internal/repo/internal/seal"
)

// small reads leases, beats and pins. No data is lost with one of them, but
// prune waits for a lease that it cannot read, and refuses for a pin.
func (c *checker) small(ctx context.Context) error {
	names, err := c.r.leases.There(ctx)
	pins, pinsErr := c.r.leases.Pins(ctx)
	if err = errors.Join(err, pinsErr); err != nil {
		return err
	}
	for _, name := range append(names, pins...) {
		session, _, more := lease.Split(name)
		what := "prune waits for its run; if that has died, \"holdfast prune --wait\" finds out and ends it"
		switch {
		case strings.HasPrefix(name, "pins/"):
			what = fmt.Sprintf("prune refuses as long as it is there; when its session is gone for certain: holdfast unpin %s --force", session)
		case more:
			what = "only its name counts; it goes with its run"
		}
		err := c.r.leases.Check(ctx, name)
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

// keys checks that keyrings and slots can be read, and that the newest keyring is
// there.
func (c *checker) keys(ctx context.Context) error {
	rings, err := keyring.Read(ctx, c.r.store, c.r.id)
	if err != nil {
		return err
	}
	if known := c.r.current().Keyring; known > rings.Newest() {
		c.problem(Problem{Object: keyring.Name(c.r.id, known), What: "missing or damaged: what was stored since it was made cannot be read; put it back with \"holdfast key import\", or from a copy of the repository"})
	} else if rings.Damage != nil && len(rings.List) == 0 {
		c.problem(Problem{Object: "keyring", What: rings.Damage.Error()})
	}
	for name, err := range rings.Bad {
		if name != keyring.Name(c.r.id, c.r.current().Keyring) {
			c.problem(Problem{Object: name, What: err.Error()})
		}
	}
	u := c.r.keys.Now()
	for _, d := range rings.List { // the older ones, too: whoever puts back a lost keyring goes on from them
		if err := d.Check(u); err != nil {
			c.problem(Problem{Object: d.Name, What: err.Error() + "; put it back with \"holdfast key import\", or from a copy of the repository"})
		}
	}
	slots, err := keyring.ReadSlots(ctx, c.r.store, c.r.id)
	if err != nil {
		return err
	}
	for _, k := range slots {
		if k.Err != nil {
			c.problem(Problem{Object: keyring.SlotName(k.ID), What: k.Err.Error() + "; remove it with \"holdfast key remove\", and add its passphrase again"})
		}
	}
	return nil
}
