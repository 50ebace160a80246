package recovery

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"

	"holdfast/internal/hypervisor"
)

// Migrate moves a session's VM to production storage while it runs, and ends
// the session. storage "" means the one it was recovered to, or the one that a
// migration before was told. Cancelling ctx leaves it to be continued: what is
// local is not copied again.
func Migrate(ctx context.Context, d Deps, id, storage string, progress hypervisor.Progress) (Record, error) {
	c, err := take(d, id, "migrate")
	if err != nil {
		return Record{}, err
	}
	defer c.close()
	switch {
	case c.r.Kind != Recovery:
		return c.r, fmt.Errorf("%w: session %s only serves disks", ErrState, c.r.ID)
	case c.r.State == Done:
		return c.r, nil
	case c.r.State == Local:
		return c.r, c.finish(ctx)
	}
	if err := c.connect(ctx); err != nil {
		return c.r, err
	}
	if err := c.aim(ctx, storage); err != nil {
		return c.r, err
	}
	// A publication that died is brought back first.
	if did, err := resume(ctx, d, c.s, c.r); err != nil {
		return c.r, err
	} else if did != "" {
		c.report(c.r.ID, "%s", did)
	}
	vm, err := c.target.Find(ctx, c.r.ID)
	if err != nil {
		return c.r, err
	}
	if err := c.target.Migrate(ctx, vm, c.r.Storage, progress); err != nil {
		if ctx.Err() != nil {
			return c.r, fmt.Errorf("interrupted: continue with \"holdfast migrate %s\": %w", c.r.ID, err)
		}
		return c.r, err
	}
	// The VM is local and verified: what follows is finished once begun, and if
	// not, by resume.
	ctx, cancel := detached(ctx)
	defer cancel()
	if err := c.enter(Local); err != nil {
		return c.r, err
	}
	c.report(c.r.ID, "all disks of %s are local", c.r.Name)
	if note, err := c.target.Network(ctx, vm); err != nil {
		c.note("network not checked: %v", err)
	} else {
		c.note("network: %s", note)
	}
	return c.r, c.finish(ctx)
}

func (c *command) note(format string, args ...any) {
	n := fmt.Sprintf(format, args...)
	if !slices.Contains(c.r.Notes, n) {
		c.r.Notes = append(c.r.Notes, n)
	}
	c.report(c.r.ID, "%s", n)
}

// aim enters the state migrating and records beforehand the files that the
// host may make.
func (c *command) aim(ctx context.Context, storage string) error {
	if storage == "" {
		storage = c.r.Storage
	}
	if !path.IsAbs(storage) {
		return fmt.Errorf("storage %q is not an absolute path", storage)
	}
	storage = path.Clean(storage)
	if c.r.State == Migrating && storage != path.Clean(c.r.Storage) {
		return fmt.Errorf("%w: a migration to %s has begun: continue it without --storage", ErrState, c.r.Storage)
	}
	if c.r.State != Migrating {
		if _, err := c.target.Preflight(ctx, hypervisor.NewVM{}, storage, c.r.Data); err != nil {
			return err
		}
	}
	c.r.Storage = storage
	for i, d := range c.r.Disks {
		file := hypervisor.DiskPath(storage, c.r.Owner.DiskName(c.r.Name, d.ID), "")
		if !slices.Contains(d.Files, file) {
			c.r.Disks[i].Files = append(slices.Clone(d.Files), file)
		}
	}
	return c.enter(Migrating)
}

// finish ends a session whose VM is local.
func (c *command) finish(ctx context.Context) error {
	if err := c.endServing(ctx); err != nil {
		return err
	}
	if err := c.dropOldFiles(ctx); err != nil {
		return err
	}
	if err := c.Unpin(ctx, c.r.Location, c.r.ID); err != nil {
		return err
	}
	if err := c.sockets(); err != nil {
		return err
	}
	if err := c.enter(Done); err != nil {
		return err
	}
	return c.s.Clear()
}

// dropOldFiles removes overlays that the VM has left for another storage.
func (c *command) dropOldFiles(ctx context.Context) error {
	var err error
	for i, d := range c.r.Disks {
		if len(d.Files) < 2 {
			continue
		}
		if cerr := c.connect(ctx); cerr != nil {
			return errors.Join(err, cerr)
		}
		last := len(d.Files) - 1
		for _, f := range d.Files[:last] {
			err = errors.Join(err, c.target.RemoveDisk(ctx, f))
		}
		if err == nil {
			c.r.Disks[i].Files = d.Files[last:]
		}
	}
	return err
}
