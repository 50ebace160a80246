package hypervisor

import (
	"context"
	"fmt"
	"path"
	"strings"

	"holdfast/internal/disk"
)

// NewVM describes a VM to be made on a Target from a restore point.
type NewVM struct {
	Name   string // its name on the target
	Config []File // the configuration from the restore point
	// Kind is the adapter that wrote Config; another one's configuration is
	// translated as far as it goes, or refused with what to do.
	Kind  string
	Disks []NewDisk
	// NewIdentity gives the VM a new UUID and new MAC addresses, so that it can
	// run beside the original.
	NewIdentity bool
	// Isolated leaves every network interface without a connection.
	Isolated bool
	// NVRAM is the path, on the host, of the file that CreateVM makes for the
	// firmware's variables when Config has "nvram", never over an existing
	// one. DeleteVM removes it with the VM; RemoveDisk removes one that was
	// left without a VM.
	NVRAM string
	Owner Owner
}

// NewDisk is one disk of a NewVM.
type NewDisk struct {
	ID   DiskID
	Size int64 // bytes
	// Path is a file that CreateDisk made, with its format; empty for a disk
	// that is used straight from Served.
	Path   string
	Format string // "raw" or "qcow2"
	// Served is the NBD export that holds the restore point: beneath Path (an
	// overlay), or in its place. Empty for a plain local disk.
	Served string // an NBD URI: nbd+unix:///name?socket=/path, nbd://host:port/name
}

// Health is how a recovered VM fares.
type Health struct {
	State State
	// IOError: the guest was paused because its storage did not answer.
	IOError bool
	// Agent: the guest agent answered.
	Agent bool
}

// Progress reports bytes done of bytes in all; total may be 0 when unknown.
type Progress func(done, total int64)

// Target is a host to recover to. Methods may run in parallel for different
// VMs.
type Target interface {
	// Preflight says, before anything is made, what would go wrong: name
	// taken (ErrExist), storage missing or too small, configuration unknown.
	// need is how many bytes will be written to storage. Notes say what the VM
	// will not have, or have otherwise, on this host. With a vm that has no
	// name only the storage is looked at.
	Preflight(ctx context.Context, vm NewVM, storage string, need int64) (notes []string, err error)
	// CreateDisk makes a file for a disk in the storage directory, never over
	// an existing one (ErrExist): a full disk to be written through the result,
	// or, when d.Served is set, an empty overlay above it (then the device is
	// nil). An empty d.Format means qcow2. The file is DiskPath(storage, name,
	// d.Format), so that a caller can record it before it is made. It returns
	// d with Path and Format set. The device is flushed and closed by the
	// caller.
	CreateDisk(ctx context.Context, storage, name string, d NewDisk) (NewDisk, WriteCloser, error)
	// RemoveDisk removes what CreateDisk made. One already gone is no error.
	RemoveDisk(ctx context.Context, path string) error
	// CreateVM defines the VM, stopped. On an error nothing is left.
	CreateVM(ctx context.Context, vm NewVM) (VMID, error)
	// Find gives the VM that CreateVM made for a session (Owner.Session), also
	// when the maker died before it heard of it. ErrNotExist if there is none.
	Find(ctx context.Context, session string) (VMID, error)
	Start(ctx context.Context, id VMID) error
	// Stop turns the VM off at once; one that is off is no error.
	Stop(ctx context.Context, id VMID) error
	// DeleteVM removes the definition of a stopped VM, NVRAM included, and no
	// disk. One already gone is no error.
	DeleteVM(ctx context.Context, id VMID) error
	Health(ctx context.Context, id VMID) (Health, error)
	// Unpause lets a guest go on that was paused by an I/O error, and returns
	// when it runs, reconnecting to its served disks if need be.
	Unpause(ctx context.Context, id VMID) error
	// Migrate makes every disk of the VM local to storage while it runs, and
	// returns when no disk depends on a served one and the configuration has
	// no link left; it verifies both. Cancelling ctx stops the copying and
	// keeps what is local; calling again continues. Files that it makes are
	// DiskPath(storage, Owner.DiskName(VM's name, disk), "qcow2").
	Migrate(ctx context.Context, id VMID, storage string, report Progress) error
	// Network asks the guest agent whether the guest has connectivity, and
	// bounces its links if it has lost it. It says what it found and did.
	Network(ctx context.Context, id VMID) (string, error)
	Close() error
}

// DiskPath is where CreateDisk makes the file of that name and format; an
// empty format means qcow2. Hosts have slashes in their paths.
func DiskPath(storage, name, format string) string {
	if format == "" {
		format = "qcow2"
	}
	return path.Join(storage, name+"."+format)
}

// DiskName names the file that a session makes for a VM's disk: readable,
// and never anybody else's. What is no plain character becomes "_".
func (o Owner) DiskName(vm string, d DiskID) string {
	plain := func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '.', r == '_', r == '-':
			return r
		}
		return '_'
	}
	return fmt.Sprintf("%.64s-%.64s-%.16s", strings.Map(plain, vm), strings.Map(plain, string(d)), o.Session)
}

// WriteCloser is a disk being filled. Close is checked.
type WriteCloser interface {
	disk.Writer
	Close() error
}
