// Package recovery runs lost VMs from their restore points: it makes sessions,
// keeps them alive, moves their VMs to production storage, and removes them.
//
//	recover   preflight → session recorded → point pinned → publication serving
//	          → overlays made → VM defined → VM started
//	resume    serving processes that died are started again → paused guests go on
//	migrate   state migrating → disks made local, verified → state local
//	          → publication ended, pin removed → state done
//	undo      state undone → VM stopped and deleted → its files removed
//	          → publication ended → pin removed → session removed
//
// # After a crash
//
// The record of a session is on disk before the first thing is made for it,
// and names beforehand every file that may be made; the VM carries the
// session's id. So undo works from any half-made state, also when its maker
// was killed between two steps, and leaves the host as it was found. It is
// idempotent, as resume and migrate are. The record goes last.
//
// The publication is served by a process of its own, which outlives the
// command that started it and holds the session's serve lock. Commands that
// change a session hold its command lock. Who has got the serve lock reads the
// record and goes away when the session is over; undo and migrate take that
// lock once the serving process has ended, so none can start behind their
// back.
//
// # The host
//
// A host overlay keeps the guest's writes on production storage; a server
// overlay keeps them here, in the session's directory. How a host moves disks
// to its storage is its adapter's business (hypervisor.Target.Migrate).
package recovery

import (
	"context"
	"errors"
	"fmt"
	"path"
	"time"

	"holdfast/internal/hypervisor"
	"holdfast/internal/publish"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

// Writes says where the writes of a recovered guest go.
type Writes string

const (
	HostOverlay   Writes = "host"   // an overlay on the host's storage
	ServerOverlay Writes = "server" // an overlay of ours, in the session
)

// Deps are what the commands need of the world.
type Deps struct {
	State *state.Dir
	// Target connects to a host; the command closes it.
	Target func(ctx context.Context, host string) (hypervisor.Target, error)
	// Pin and Unpin keep and release a point in the repository at location.
	Pin   func(ctx context.Context, location, session string, point repo.PointID) error
	Unpin func(ctx context.Context, location, session string) error
	// Listen says under which addresses (publish.Spec.Listen) a session's
	// exports can be reached from a host.
	Listen func(ctx context.Context, host, session string) ([]string, error)
	// Serve starts the process that serves a session and returns when it
	// does. The process calls Serve of this package.
	Serve func(ctx context.Context, session string) (publish.Ready, error)
	// Sockets removes what lies outside the session's directory for its
	// listeners. It may be nil.
	Sockets func(session string) error
	// Report tells the operator of a step. It may be nil.
	Report func(Event)

	// signal ends a serving process; nil sends signals. Tests serve in their
	// own process.
	signal func(session string, pid int, hard bool)
}

// Event is something an operator wants to hear of.
type Event struct {
	Session string
	Text    string
}

func (d *Deps) report(session, format string, args ...any) {
	if d.Report != nil {
		d.Report(Event{session, fmt.Sprintf(format, args...)})
	}
}

// Request asks for a recovery.
type Request struct {
	Location   string // of the repository, so that another process can open it
	Repository string // its id
	Point      repo.Point
	Config     []hypervisor.File // the point's configuration
	// Data finds out how many bytes of the point's disks are not zeros; 0 when
	// it cannot. The storage should have room for them. It is called when the
	// guest runs, which it would otherwise wait for.
	Data func(ctx context.Context) int64

	Host    string // as the operator names it
	Storage string // directory on the host
	Name    string // "" keeps the VM's name
	// NewIdentity gives the VM another UUID and other MAC addresses.
	NewIdentity bool
	Writes      Writes // "" means HostOverlay
	Isolated    bool
	Wait        bool // until the guest's agent answers
}

// overlayRoom is what a storage must have free for each overlay at the start.
const overlayRoom = 64 << 20

// cleanup bounds what is done after the caller's context may have ended.
const cleanup = 2 * time.Minute

func detached(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), cleanup)
}

// command is one command at work on one session.
type command struct {
	Deps
	s      *state.Session
	lock   *state.Lock
	serve  *state.Lock // held once the serving process is ended for good
	target hypervisor.Target
	r      Record
}

// take locks a session for a command and reads its record.
func take(d Deps, id, name string) (*command, error) {
	s, err := d.State.Session(id)
	if err != nil {
		return nil, err
	}
	lock, err := s.LockCommand(name)
	if err != nil {
		return nil, err
	}
	c := &command{Deps: d, s: s, lock: lock}
	if err := s.Load(&c.r); err != nil {
		lock.Release()
		return nil, err
	}
	return c, nil
}

// connect opens the host, once.
func (c *command) connect(ctx context.Context) error {
	if c.target != nil {
		return nil
	}
	t, err := c.Target(ctx, c.r.Host)
	if err != nil {
		return err
	}
	c.target = t
	return nil
}

// close gives up what the command holds.
func (c *command) close() error {
	var err error
	if c.target != nil {
		err = c.target.Close()
	}
	for _, l := range []*state.Lock{c.serve, c.lock} {
		if l != nil {
			l.Release() // closing twice is harmless: Remove may have done it
		}
	}
	return err
}

// enter moves the session to a state, durably, if the table allows it.
func (c *command) enter(s State) error {
	if err := c.r.enter(s, time.Now().UTC()); err != nil {
		return err
	}
	return c.s.Save(&c.r)
}

// Recover brings a VM up from its restore point and returns when it is
// started, or when its agent answers. On an error all that was made is
// removed again; what could not be removed stays recorded, for undo.
func Recover(ctx context.Context, d Deps, q Request) (Record, error) {
	c := &command{Deps: d, r: newRecord(q, time.Now().UTC())}
	if err := c.connect(ctx); err != nil {
		return Record{}, err
	}
	defer c.close()
	vm, err := c.plan(ctx, q)
	if err != nil {
		return Record{}, err
	}
	if c.s, c.lock, err = d.State.NewSession(c.r.ID, &c.r, "recover"); err != nil {
		return Record{}, err
	}
	if err := c.bringUp(ctx, vm); err != nil {
		uctx, cancel := detached(ctx)
		defer cancel()
		if uerr := c.undo(uctx); uerr != nil {
			err = errors.Join(err, fmt.Errorf("not all that was made could be removed: try again with \"holdfast undo %s\": %w", c.r.ID, uerr))
		}
		return c.r, err
	}
	if err := c.measure(ctx, q.Data); err != nil {
		return c.r, err
	}
	if q.Wait {
		err = c.waitAgent(ctx)
	}
	return c.r, err
}

// measure notes how much a migration will copy, and whether the storage has
// room for that.
func (c *command) measure(ctx context.Context, data func(context.Context) int64) error {
	if c.r.Data = data(ctx); c.r.Data == 0 {
		return nil
	}
	if _, err := c.target.Preflight(ctx, hypervisor.NewVM{}, c.r.Storage, c.r.Data); err != nil && ctx.Err() == nil {
		c.note("migrating it there will not do: %v", err)
	}
	return c.s.Save(&c.r)
}

// plan checks what can be checked beforehand and completes the record.
func (c *command) plan(ctx context.Context, q Request) (hypervisor.NewVM, error) {
	r := &c.r
	if !path.IsAbs(q.Storage) {
		return hypervisor.NewVM{}, fmt.Errorf("storage %q is not an absolute path", q.Storage)
	}
	if len(q.Point.Disks) == 0 {
		return hypervisor.NewVM{}, fmt.Errorf("restore point %s has no disks", q.Point.ID)
	}
	var err error
	if r.Publication.Listen, err = c.Listen(ctx, q.Host, r.ID); err != nil {
		return hypervisor.NewVM{}, err
	}
	vm := hypervisor.NewVM{
		Name: r.Name, Config: q.Config, Kind: q.Point.Kind, NewIdentity: q.NewIdentity, Isolated: q.Isolated, Owner: r.Owner,
	}
	var need int64
	for i, d := range r.Disks {
		// The very address comes with the publication.
		vm.Disks = append(vm.Disks, hypervisor.NewDisk{ID: d.ID, Size: d.Size, Served: publish.URI(r.Publication.Listen[0], string(d.ID))})
		if r.Writes == HostOverlay {
			r.Disks[i].Files = []string{hypervisor.DiskPath(r.Storage, r.Owner.DiskName(r.Name, d.ID), "")}
			vm.Disks[i].Path, vm.Disks[i].Format = r.Disks[i].Files[0], "qcow2"
			need += overlayRoom
		}
	}
	for _, f := range q.Config {
		if f.Name == "nvram" {
			r.NVRAM = hypervisor.DiskPath(r.Storage, r.Owner.DiskName(r.Name, "nvram"), "fd")
			vm.NVRAM = r.NVRAM
		}
	}
	notes, err := c.target.Preflight(ctx, vm, r.Storage, need)
	if err != nil {
		return vm, err
	}
	r.Notes = notes
	for _, n := range r.Notes {
		c.report(r.ID, "note: %s", n)
	}
	return vm, nil
}

// bringUp makes everything, in the order that must hold.
func (c *command) bringUp(ctx context.Context, vm hypervisor.NewVM) error {
	if err := c.Pin(ctx, c.r.Location, c.r.ID, c.r.Point); err != nil {
		return err
	}
	if err := c.publish(ctx); err != nil {
		return err
	}
	for i, d := range vm.Disks {
		d.Served = c.r.Disks[i].URI
		if c.r.Writes == HostOverlay {
			var err error
			d.Path, d.Format = "", ""
			if d, _, err = c.target.CreateDisk(ctx, c.r.Storage, c.r.Owner.DiskName(c.r.Name, d.ID), d); err != nil {
				return err
			}
		}
		vm.Disks[i] = d
	}
	id, err := c.target.CreateVM(ctx, vm)
	if err != nil {
		return err
	}
	c.r.VMID = id
	// The guest writes from now on: the record knows of it before that.
	if err := c.s.Save(&c.r); err != nil {
		return err
	}
	if err := c.target.Start(ctx, id); err != nil {
		return err
	}
	if err := c.enter(Running); err != nil {
		return err
	}
	c.report(c.r.ID, "VM %s started", c.r.Name)
	return nil
}

// publish starts the serving process and notes where it serves.
func (c *command) publish(ctx context.Context) error {
	ready, err := c.Serve(ctx, c.r.ID)
	if err != nil {
		return fmt.Errorf("serve the restore point: %w", err)
	}
	c.r.Publication.Listen = ready.Listen
	for i, d := range c.r.Disks {
		if c.r.Disks[i].URI = ready.URIs[string(d.ID)]; c.r.Disks[i].URI == "" {
			return fmt.Errorf("serve the restore point: disk %s is not served", d.ID)
		}
	}
	c.r.Times.Published = now()
	if err := c.s.Save(&c.r); err != nil {
		return err
	}
	c.report(c.r.ID, "restore point published")
	return nil
}

func now() *time.Time {
	t := time.Now().UTC()
	return &t
}

// How a guest is waited for.
const (
	agentLimit = 10 * time.Minute
	agentLook  = 250 * time.Millisecond
)

// waitAgent waits until the guest answers. A guest that does not is left
// running: it may need longer, or have no agent.
func (c *command) waitAgent(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, agentLimit, fmt.Errorf("its agent did not answer within %s", agentLimit))
	defer cancel()
	tick := time.NewTicker(agentLook)
	defer tick.Stop()
	for {
		he, err := c.target.Health(ctx, c.r.VMID)
		switch {
		case err != nil && ctx.Err() == nil:
			return err
		case he.Agent:
			c.r.Times.Answering = now()
			return c.s.Save(&c.r)
		case he.IOError:
			return fmt.Errorf("the guest is paused: its restore point does not answer: run \"holdfast resume\"")
		case he.State == hypervisor.Stopped && err == nil:
			return errors.New("the guest has stopped")
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("VM %s runs (session %s), but %w", c.r.Name, c.r.ID, context.Cause(ctx))
		case <-tick.C:
		}
	}
}
