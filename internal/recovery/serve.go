package recovery

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"holdfast/internal/publish"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

// served is what the serving process notes beside the session's record, which
// belongs to the commands.
type served struct {
	Ready     *publish.Ready `json:"ready,omitempty"`
	FirstRead *time.Time     `json:"first_read,omitempty"` // ever, not by this process
}

const servedNote = "served"

// ErrOver means that a session needs no serving any more.
var ErrOver = errors.New("session is over")

// Serve is the life of a serving process: it publishes what the session's
// record says until ctx is done. deps opens the repository at the record's
// location; the deps' Ready and FirstRead are Serve's own. ready is called
// when clients can connect.
//
// ErrLocked (of state) means that another process serves already, ErrOver that
// none is needed.
func Serve(ctx context.Context, st *state.Dir, id string, deps func(ctx context.Context, r Record) (publish.Deps, error),
	ready func(publish.Ready) error) error {
	s, err := st.Session(id)
	if err != nil {
		return err
	}
	lock, err := s.LockServe()
	if err != nil {
		return err
	}
	defer lock.Release()
	// Under the lock: the session may have ended before it was ours.
	var r Record
	if err := s.Load(&r); err != nil {
		return err
	}
	if row, ok := row(r.State); !ok || !row.serving {
		return fmt.Errorf("%w: %s is %s", ErrOver, r.ID, r.State)
	}
	d, err := deps(ctx, r)
	if err != nil {
		return err
	}
	var note served
	if err := s.LoadNote(servedNote, &note); err != nil && !errors.Is(err, state.ErrNotExist) && !errors.Is(err, state.ErrDamaged) {
		return err
	}
	// One writer: Ready and FirstRead may come at once.
	notes := make(chan func(*served), 2)
	written := make(chan error, 1)
	go func() {
		var err error
		for change := range notes {
			change(&note)
			err = errors.Join(err, s.SaveNote(servedNote, &note))
		}
		written <- err
	}()
	d.Ready = func(r publish.Ready) error {
		notes <- func(n *served) { n.Ready = &r }
		return ready(r)
	}
	if note.FirstRead == nil {
		d.FirstRead = func(t time.Time) { t = t.UTC(); notes <- func(n *served) { n.FirstRead = &t } }
	}
	spec := r.Publication
	if spec.Overlay == overlays {
		spec.Overlay = s.Path(overlays)
	}
	err = publish.Serve(ctx, spec, d)
	close(notes)
	return errors.Join(err, <-written)
}

// How a serving process is ended.
const (
	stopGrace = 45 * time.Second // more than a server waits for its requests
	stopLimit = 60 * time.Second
	stopLook  = 10 * time.Millisecond
)

// endServing ends the serving process and takes its place, so that no other
// can begin.
func (c *command) endServing(ctx context.Context) error {
	if c.serve != nil {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, stopLimit, errors.New("it does not end"))
	defer cancel()
	tick := time.NewTicker(stopLook)
	defer tick.Stop()
	begun, told, killed := time.Now(), 0, 0
	for {
		lock, err := c.s.LockServe()
		if err == nil {
			c.serve = lock
			return nil
		}
		if !errors.Is(err, state.ErrLocked) {
			return err
		}
		h, ok := c.s.Serving()
		switch {
		case !ok || h.PID == 0:
		case h.PID != told:
			told = h.PID
			c.end(h.PID, false)
		case time.Since(begun) > stopGrace && h.PID != killed:
			killed = h.PID
			c.end(h.PID, true)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("end the serving process %d of session %s: %w", h.PID, c.r.ID, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// end sends a serving process a signal, never its own process.
func (c *command) end(pid int, hard bool) {
	switch {
	case c.signal != nil:
		c.signal(c.r.ID, pid, hard)
	case pid == os.Getpid():
	case hard:
		kill(pid)
	default:
		terminate(pid)
	}
}

// PublicationRequest asks for a point's disks to be served, and no VM.
type PublicationRequest struct {
	Location   string
	Repository string
	Point      repo.Point
	Disk       string   // "" means all
	Listen     []string // publish.Spec.Listen
	// Overlay is the directory for the writes; "" serves read-only. It is the
	// operator's and is not removed.
	Overlay string
	TLS     *publish.TLS // nil: in clear
}

// NewPublication records a session that serves disks. The caller calls Serve
// for it, here or in another process, and Undo in the end.
func NewPublication(d Deps, q PublicationRequest) (Record, error) {
	r := Record{
		ID: state.NewID(), Kind: Publication, State: Running, Location: q.Location, Point: q.Point.ID, VM: q.Point.VM,
		Publication: publish.Spec{Listen: q.Listen, Overlay: q.Overlay, TLS: q.TLS}, Times: Times{Created: time.Now().UTC()},
	}
	r.Owner.Repository, r.Owner.History, r.Owner.Session = q.Repository, string(q.Point.History), r.ID
	for _, e := range exports(q.Point) {
		if q.Disk == "" || q.Disk == e.Name {
			r.Publication.Disks = append(r.Publication.Disks, e)
		}
	}
	if len(r.Publication.Disks) == 0 {
		return Record{}, fmt.Errorf("restore point %s has no disk %q", q.Point.ID, q.Disk)
	}
	_, lock, err := d.State.NewSession(r.ID, &r, "publish")
	if err != nil {
		return Record{}, err
	}
	return r, lock.Release()
}
