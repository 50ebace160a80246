package repo

import (
	"context"
	"errors"
	"fmt"
	"os"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/lease"
)

// Pin keeps a point's data until Unpin, whatever is forgotten or pruned. It is
// durable when Pin returns; the point is looked for after that, so a prune
// beside it cannot have missed the pin. Pinning twice is no error.
// session is at most 64 lower-case hex digits.
func (r *Repo) Pin(ctx context.Context, session string, id PointID) error {
	// Before as well: a pin of a point whose data is gone stops every prune for
	// as long as it is there.
	if err := r.refresh(ctx); err != nil {
		return err
	}
	name := lease.PinName(session, id)
	_, there := r.current().Points[id]
	if !there {
		if _, err := r.store.Get(ctx, name, 0, 0); err == nil {
			return nil // pinned before; since the point was forgotten after that, its data is kept
		} else if !errors.Is(err, blob.ErrNotExist) {
			return err
		}
		return fmt.Errorf("pin %s: %w", id, ErrNotExist)
	}
	host, _ := os.Hostname()
	if err := r.leases.Pin(ctx, session, id, host); errors.Is(err, blob.ErrExist) {
		return nil // and if the point was forgotten since, its data is kept
	} else if err != nil {
		return fmt.Errorf("pin %s: %w", id, err)
	}
	if err := r.refresh(ctx); err != nil {
		return err
	}
	if _, ok := r.current().Points[id]; !ok {
		return errors.Join(fmt.Errorf("pin %s: %w", id, ErrNotExist), r.store.Delete(ctx, name))
	}
	return nil
}

// Unpin removes a session's pins. None is no error.
func (r *Repo) Unpin(ctx context.Context, session string) error {
	return r.leases.Unpin(ctx, session)
}

// Pins gives the sessions that pin a point, by point.
func (r *Repo) Pins(ctx context.Context) (map[PointID][]string, error) {
	names, err := r.leases.Pins(ctx)
	if err != nil {
		return nil, err
	}
	pins := map[PointID][]string{}
	for _, name := range names {
		session, point, ok := lease.Split(name)
		if !ok {
			return nil, fmt.Errorf("%s: %w: not a pin's name", name, ErrDamaged)
		}
		pins[PointID(point)] = append(pins[PointID(point)], session)
	}
	return pins, nil
}
