package repo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
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
	name := pinName(session, id)
	_, there := r.current().Points[id]
	if !there {
		if _, err := r.store.Get(ctx, name, 0, 0); err == nil {
			return nil // pinned before; since the point was forgotten after that, its data is kept
		} else if !errors.Is(err, blob.ErrNotExist) {
			return err
		}
		return fmt.Errorf("pin %s: %w", id, ErrNotExist)
	}
	if err := r.putPin(ctx, session, id); errors.Is(err, blob.ErrExist) {
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

func pinName(session string, id PointID) string { return fmt.Sprintf("pins/%s.%s", session, id) }

func (r *Repo) putPin(ctx context.Context, session string, id PointID) error {
	host, _ := os.Hostname()
	p, err := json.Marshal(map[string]any{"session": session, "point": id, "host": host})
	if err != nil {
		return err
	}
	number, master := r.keys.Newest()
	return putSealed(ctx, r.store, pinName(session, id), seal.NewHeader(seal.Pin, 0, number, r.id), struct{}{}, p, master, "pin")
}

// Unpin removes a session's pins. None is no error.
func (r *Repo) Unpin(ctx context.Context, session string) error {
	names, err := blob.Names(ctx, r.store, "pins/"+session+".")
	for _, name := range names {
		if delErr := r.store.Delete(ctx, name); !errors.Is(delErr, blob.ErrNotExist) {
			err = errors.Join(err, delErr)
		}
	}
	return err
}

// Pins gives the sessions that pin a point, by point.
func (r *Repo) Pins(ctx context.Context) (map[PointID][]string, error) {
	names, err := blob.Names(ctx, r.store, "pins/")
	if err != nil {
		return nil, err
	}
	pins := map[PointID][]string{}
	for _, name := range names {
		session, point, ok := splitName(name)
		if !ok {
			return nil, fmt.Errorf("%s: %w: not a pin's name", name, ErrDamaged)
		}
		pins[PointID(point)] = append(pins[PointID(point)], session)
	}
	return pins, nil
}
