package recovery

import (
	"context"
	"errors"
	"fmt"

	"holdfast/internal/hypervisor"
	"holdfast/internal/state"
)

// Undo removes a session and all that was made for it. It can be called in any
// state until the VM is local, also for a session whose maker was killed, and
// again when it failed.
func Undo(ctx context.Context, d Deps, id string) (Record, error) {
	c, err := take(d, id, "undo")
	if err != nil {
		return Record{}, err
	}
	defer c.close()
	return c.r, c.undo(ctx)
}

// undo removes everything, the record last. Each step does nothing when its
// thing is gone.
func (c *command) undo(ctx context.Context) error {
	if err := c.enter(Undone); err != nil {
		if c.r.State == Local || c.r.State == Done {
			return fmt.Errorf("%w: the VM is local and yours: it is not touched", err)
		}
		return err
	}
	if c.r.Kind == Recovery {
		if err := c.connect(ctx); err != nil {
			return fmt.Errorf("session %s stays until its host answers: %w", c.r.ID, err)
		}
		if err := c.removeVM(ctx); err != nil {
			return err
		}
	}
	// After the guest, which would see errors otherwise.
	if err := c.endServing(ctx); err != nil {
		return err
	}
	if err := c.Unpin(ctx, c.r.Location, c.r.ID); err != nil {
		return err
	}
	if err := c.sockets(); err != nil {
		return err
	}
	return c.s.Remove(c.serve, c.lock)
}

func (c *command) sockets() error {
	if c.Sockets == nil {
		return nil
	}
	return c.Sockets(c.r.ID)
}

// removeVM removes the VM and every file that may have been made for it. The
// VM is found by the session's id: whoever made it may not have lived to
// record its own.
func (c *command) removeVM(ctx context.Context) error {
	id, err := c.target.Find(ctx, c.r.ID)
	switch {
	case errors.Is(err, hypervisor.ErrNotExist):
	case err != nil:
		return err
	default:
		if err := c.target.Stop(ctx, id); err != nil {
			return err
		}
		if err := c.target.DeleteVM(ctx, id); err != nil {
			return err
		}
		c.report(c.r.ID, "VM %s removed", c.r.Name)
	}
	var files []string
	if c.r.NVRAM != "" {
		files = append(files, c.r.NVRAM)
	}
	for _, d := range c.r.Disks {
		files = append(files, d.Files...)
	}
	err = nil
	for _, f := range files {
		err = errors.Join(err, c.target.RemoveDisk(ctx, f))
	}
	return err
}

// Forget removes the record of a session that is done.
func Forget(d Deps, id string) error {
	c, err := take(d, id, "forget")
	if err != nil {
		return err
	}
	defer c.close()
	if c.r.State != Done {
		return fmt.Errorf("%w: session %s is %s", ErrState, c.r.ID, c.r.State)
	}
	return c.s.Remove(c.lock)
}

// Discard removes a session whose record cannot be read, with what lies in
// its directory. What it made on a host or pinned stays.
func Discard(st *state.Dir, id string) error {
	s, err := st.Session(id)
	if err != nil {
		return err
	}
	var r Record
	if err := s.Load(&r); !errors.Is(err, state.ErrDamaged) {
		return fmt.Errorf("%w: the record of session %s is readable: undo it", ErrState, s.ID())
	}
	lock, err := s.LockServe()
	if err != nil {
		return err
	}
	return s.Remove(lock)
}
