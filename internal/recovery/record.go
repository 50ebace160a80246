package recovery

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/internal/hypervisor"
	"holdfast/internal/publish"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

// State of a session.
type State string

// States of a session, in their usual order.
const (
	Publishing State = "publishing"
	Running    State = "running"
	Validated  State = "validated"
	Migrating  State = "migrating"
	Local      State = "local"
	Done       State = "done"
	Undone     State = "undone"
)

// Row is what the table says of a state.
type Row struct {
	State State   `json:"state"`
	Next  []State `json:"next"` // states that may follow
	Means string  `json:"means"`
	Safe  string  `json:"safe"` // what an operator may do in it
	// serving: a process has to serve the restore point.
	serving bool
}

// ErrState means that a session is in a state that does not allow what was
// asked for.
var ErrState = errors.New("not possible in this state")

const untilLocal = "validating only. No patches, upgrades, drivers or integration components, nothing that changes boot files: refused until local"

// Table lists the states in order: the one place that says what may follow and
// what is safe.
func Table() []Row {
	return []Row{
		{Publishing, []State{Running, Undone}, "being made; one whose command is gone can only be undone", "nothing yet", true},
		{Running, []State{Validated, Migrating, Undone}, "the guest runs from the restore point", untilLocal, true},
		{Validated, []State{Running, Migrating, Undone}, "the guest runs from the restore point and was found good", untilLocal, true},
		{Migrating, []State{Local, Undone}, "its disks become local while it runs; migrate continues it", untilLocal, true},
		{Local, []State{Done}, "its disks are local; the publication is being ended", "everything", false},
		{Done, nil, "over: the VM is local and Holdfast keeps nothing of it but this record", "everything", false},
		{Undone, nil, "being removed; undo finishes it", "nothing: it is going", false},
	}
}

// row gives a state's row; ok is false for a state that is not in the table.
func row(s State) (Row, bool) {
	for _, r := range Table() {
		if r.State == s {
			return r, true
		}
	}
	return Row{}, false
}

// Kind tells what a session is for.
type Kind string

const (
	Recovery    Kind = "recovery"
	Publication Kind = "publication" // disks are served and no VM is made
)

// Record is a session's record on disk.
type Record struct {
	ID       string           `json:"id"`
	Kind     Kind             `json:"kind"`
	State    State            `json:"state"`
	Location string           `json:"location"` // of the repository
	Point    repo.PointID     `json:"point"`
	VM       string           `json:"vm"` // its name in the restore point
	Owner    hypervisor.Owner `json:"owner"`

	Publication publish.Spec `json:"publication"`
	Times       Times        `json:"times"`

	// Of a recovery alone:
	Host     string          `json:"host,omitempty"`
	Storage  string          `json:"storage,omitempty"` // where its disks are, or shall be
	Name     string          `json:"name,omitempty"`    // of the recovered VM
	VMID     hypervisor.VMID `json:"vm_id,omitempty"`
	Writes   Writes          `json:"writes,omitempty"`
	Isolated bool            `json:"isolated,omitempty"`
	Disks    []Disk          `json:"disks,omitempty"`
	NVRAM    string          `json:"nvram,omitempty"` // the file on the host
	Data     int64           `json:"data,omitempty"`  // bytes to be copied; 0 when not known
	Notes    []string        `json:"notes,omitempty"`
}

// Disk of a recovery.
type Disk struct {
	ID   hypervisor.DiskID `json:"id"`
	Size int64             `json:"size"`
	URI  string            `json:"uri,omitempty"` // where it is served
	// Files are all that may have been made on the host for this disk; undo
	// removes them. The last one is the disk in the end.
	Files []string `json:"files,omitempty"`
}

// Times of a session's phases; nil when it has not come there.
type Times struct {
	Created   time.Time  `json:"created"`
	Published *time.Time `json:"published,omitempty"`  // clients can connect
	FirstRead *time.Time `json:"first_read,omitempty"` // the guest has read
	Started   *time.Time `json:"started,omitempty"`    // the VM was started
	Answering *time.Time `json:"answering,omitempty"`  // its agent has answered
	Migrating *time.Time `json:"migrating,omitempty"`  // migrate was called first
	Migrated  *time.Time `json:"migrated,omitempty"`   // local, verified
	Done      *time.Time `json:"done,omitempty"`
}

// newRecord is the record of a recovery that begins.
func newRecord(q Request, t time.Time) Record {
	r := Record{
		ID: state.NewID(), Kind: Recovery, State: Publishing,
		Location: q.Location, Point: q.Point.ID, VM: q.Point.VM,
		Host: q.Host, Storage: q.Storage, Name: q.Name, Writes: q.Writes, Isolated: q.Isolated,
		Times: Times{Created: t},
	}
	r.Owner = hypervisor.Owner{Repository: q.Repository, History: string(q.Point.History), Session: r.ID}
	if r.Name == "" {
		r.Name = q.Point.VM
	}
	if r.Writes == "" {
		r.Writes = HostOverlay
	}
	for _, d := range q.Point.Disks {
		r.Disks = append(r.Disks, Disk{ID: hypervisor.DiskID(d.ID), Size: d.Size})
	}
	r.Publication.Disks = exports(q.Point)
	if r.Writes == ServerOverlay {
		r.Publication.Overlay = overlays
	}
	return r
}

// overlays stands in a Spec for the session's own directory of overlays, since
// the state directory may be moved.
const overlays = "overlays"

// exports are a point's disks as they are published.
func exports(p repo.Point) []publish.Disk {
	var out []publish.Disk
	for _, d := range p.Disks {
		out = append(out, publish.Disk{Name: d.ID, Size: d.Size, Root: string(d.Root), Identity: string(p.ID) + "/" + d.ID})
	}
	return out
}

// enter changes the state and notes the time.
func (r *Record) enter(s State, t time.Time) error {
	from, ok := row(r.State)
	if !ok {
		return fmt.Errorf("session %s is in state %q, which this Holdfast does not know: use a newer one", r.ID, r.State)
	}
	if r.State != s && !slices.Contains(from.Next, s) {
		return fmt.Errorf("%w: session %s is %s: %s", ErrState, r.ID, r.State, from.Means)
	}
	r.State = s
	set := func(p **time.Time) {
		if *p == nil {
			*p = &t
		}
	}
	switch s {
	case Running:
		set(&r.Times.Started)
	case Migrating:
		set(&r.Times.Migrating)
	case Local:
		set(&r.Times.Migrated)
	case Done:
		set(&r.Times.Done)
	}
	return nil
}
