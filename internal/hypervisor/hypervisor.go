// Package hypervisor is the seam to the machines that run VMs. A Source gives
// snapshots of running or stopped VMs and the extents changed since a
// reference point; a Target takes recovered VMs. Adapters live in the
// packages below; a complete one in memory lives in hypertest.
//
// Everything an adapter makes on a host carries the Owner's ids in its name,
// so that what a dead session left can be told from what is in use and from
// what is somebody else's.
package hypervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/internal/disk"
)

type (
	// VMID is a VM's identity on its host, surviving a change of its name: a
	// libvirt UUID; for a folder the canonical path of the image or directory.
	VMID string
	// DiskID names a disk within its VM and is the same in every run: libvirt's
	// target ("vda"), a folder's image name without its directory.
	DiskID string
	// ReferencePoint is the mark from which a host lists a VM's changed
	// extents. It covers all disks of the VM; opaque to all but its adapter.
	// "" means none.
	ReferencePoint string
)

// State of a VM on its host.
type State string

const (
	Running State = "running"
	Paused  State = "paused"  // stopped in its tracks; Health tells whether by an I/O error
	Stopped State = "stopped" // no guest is running
)

// VM is a virtual machine as its host describes it.
type VM struct {
	ID    VMID
	Name  string
	Kind  string // the adapter: "libvirt", "folder"
	Host  string // the host as the operator names it: a URI or a directory
	State State
	Disks []Disk // in the order of the configuration
	// Config is the whole configuration, set only in a Snapshot's VM.
	Config []File
}

// Disk is one disk of a VM.
type Disk struct {
	ID     DiskID
	Size   int64  // virtual size, bytes
	Format string // of the file that holds it: "raw", "qcow2"
	Sector int64  // of the disk, logical, bytes; 0 when the host does not say
	Path   string // where the host keeps it, for the operator's eyes
	// Excluded says why the disk is not backed up (a CD-ROM, an empty drive).
	Excluded string
}

// File is a piece of a VM's configuration: "domain.xml", "nvram", "osinfo.json".
type File struct {
	Name string
	Data []byte
}

// Consistency is what a snapshot promises about the guest's state.
type Consistency string

const (
	Crash       Consistency = "crash"       // as after a loss of power
	Filesystem  Consistency = "filesystem"  // all mounted filesystems frozen
	Application Consistency = "application" // applications took part: VSS writers; a freeze with hooks confirmed
)

// Owner says whose a thing on a host is. Each field is lower-case hex.
type Owner struct {
	Repository string // repository id
	History    string // history id
	Session    string // the run or recovery session that made it
}

// Request asks for a snapshot of one VM.
type Request struct {
	VM VMID
	// Since is the reference point that Changed shall be relative to. It is
	// fixed before the snapshot since libvirt must know it then. "" for none.
	Since ReferencePoint
	Owner Owner
}

// SnapshotOptions hold for all VMs of one call.
type SnapshotOptions struct {
	Consistency Consistency // "" means Filesystem
	// FreezeLimit bounds how long a guest stays frozen, whatever fails or dies.
	// 0 means 10 s.
	FreezeLimit time.Duration
	// Live allows a copy of disks that are being written without a snapshot;
	// the point is marked as not of one instant. Folder hosts only.
	Live bool
}

// Outcome is what became of one Request: a Snapshot or an error.
type Outcome struct {
	Snapshot Snapshot
	Err      error
}

var (
	// ErrNoReference is wrapped, with the reason, by Snapshot.Changed when the
	// host cannot list changes: read and compare.
	ErrNoReference = errors.New("no change tracking")
	// ErrNotExist means that there is no such VM or disk.
	ErrNotExist = errors.New("no such VM")
	// ErrChanged means that disks were written while they were read: what was
	// read is no restore point.
	ErrChanged = errors.New("the disks changed while they were read")
	// ErrExist means that a name is taken on the host.
	ErrExist = errors.New("name is taken")
)

// Source is a host to back up from. Methods may run in parallel.
type Source interface {
	// VMs lists the host's VMs, without Config.
	VMs(ctx context.Context) ([]VM, error)
	// Plan groups VMs that share a volume snapshot; singletons elsewhere.
	Plan(ctx context.Context, ids []VMID) ([][]VMID, error)
	// Snapshot takes one snapshot of each VM asked for, of all its disks at one
	// instant. There is one Outcome per Request, in their order; one VM's
	// refusal does not fail the others.
	Snapshot(ctx context.Context, reqs []Request, o SnapshotOptions) []Outcome
	// Forget removes a reference point that no restore point needs any more.
	// One that is already gone is not an error.
	Forget(ctx context.Context, id VMID, ref ReferencePoint) error
	// Clean removes from the VM what sessions of the repository left there
	// (jobs, snapshots, reference points, scratch files) where dead(session)
	// says that the session is over; only reference points in keep stay, which
	// restore points name. It says what it removed. Foreign things are never
	// touched.
	Clean(ctx context.Context, id VMID, repository string, dead func(session string) bool, keep []ReferencePoint) ([]string, error)
	Close() error
}

// Snapshot is all disks of one VM at one instant. Open and Changed may run in
// parallel, also for several disks.
type Snapshot interface {
	// VM describes the VM at the snapshot's instant, with its Config.
	VM() VM
	// Consistency is the level that was reached.
	Consistency() Consistency
	// Notes say what an operator should know about this point ("made live: not
	// of one instant").
	Notes() []string
	Open(ctx context.Context, id DiskID) (disk.Reader, error)
	// Changed lists extents that may have changed since Request.Since: too much
	// perhaps, never too little. It fails with ErrNoReference and its reason
	// before yielding anything.
	Changed(ctx context.Context, id DiskID) disk.Extents
	// Commit ends reading and makes the snapshot's instant a reference point.
	// "" with a nil error means that the host has none to give. After Commit
	// no disk may be read. An error costs the reference, never the point.
	Commit(ctx context.Context) (ReferencePoint, error)
	// Close releases everything. Without a Commit before, the host is left as
	// it was before the snapshot, the Since reference point included. An error
	// after a Commit means that the host needs a cure, and says which.
	Close() error
}

// Owned gives the ids as the part of a name that all things of Holdfast carry
// on a host: "holdfast-<repository, 8>-<history, 8>-<session>".
func (o Owner) Owned() string {
	return fmt.Sprintf("holdfast-%.8s-%.8s-%s", o.Repository, o.History, o.Session)
}
