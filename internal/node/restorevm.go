package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/internal/hypervisor"
	"holdfast/internal/image"
	"holdfast/internal/image/qcow2"
	"holdfast/internal/recovery"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

// undoLimit bounds what is done after a command has failed or was interrupted.
const undoLimit = 2 * time.Minute

// VMRequest asks for a restore to a host as a new stopped VM.
type VMRequest struct {
	Host    string
	Storage string // directory on the host
	Name    string // "": the VM's own
	// NewIdentity gives the VM a new UUID and MAC addresses. Another name
	// implies it.
	NewIdentity bool
	Isolated    bool
}

// Placed is a VM that a restore made on a host.
type Placed struct {
	VM    string     `json:"vm"`
	ID    string     `json:"id"` // on its host
	Host  string     `json:"host"`
	Disks []Restored `json:"disks"`
	Notes []string   `json:"notes,omitempty"`
}

// RestoreVM makes a restore point's VM on a host, stopped, with disks of its
// own. On an error all that was made there is removed. While it works it is a
// session that is being made, so that undo finds what it has made when it is
// killed.
func (n *Node) RestoreVM(ctx context.Context, p repo.Point, q VMRequest) (_ Placed, err error) {
	if err := runsVMs(q.Host); err != nil {
		return Placed{}, err
	}
	if err := onHost(q.Storage); err != nil {
		return Placed{}, err
	}
	if _, err := n.Repo(ctx); err != nil {
		return Placed{}, err
	}
	d, err := n.deps()
	if err != nil {
		return Placed{}, err
	}
	t, err := n.target(ctx, q.Host)
	if err != nil {
		return Placed{}, err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	vm, rec, need, err := n.planVM(ctx, p, q)
	if err != nil {
		return Placed{}, err
	}
	notes, err := t.Preflight(ctx, vm, q.Storage, need)
	if err != nil {
		return Placed{}, err
	}
	s, lock, err := n.state.NewSession(rec.ID, &rec, "restore")
	if err != nil {
		return Placed{}, err
	}
	placed := Placed{VM: vm.Name, Host: q.Host, Notes: notes}
	if err := n.place(ctx, t, vm, p, q.Storage, &placed); err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
		defer cancel()
		undoErr := lock.Release()
		if undoErr == nil {
			_, undoErr = recovery.Undo(ctx, d, rec.ID)
		}
		if undoErr != nil {
			err = errors.Join(err, fmt.Errorf("not all that was made could be removed: try again with \"holdfast undo %s\": %w", rec.ID, undoErr))
		}
		return Placed{}, err
	}
	return placed, errors.Join(n.repo.Unpin(ctx, rec.ID), s.Remove(lock))
}

// planVM describes the VM to be made, the session that records it, and how
// many bytes will be written.
func (n *Node) planVM(ctx context.Context, p repo.Point, q VMRequest) (vm hypervisor.NewVM, rec recovery.Record, need int64, err error) {
	location, err := n.Location()
	if err != nil {
		return vm, rec, 0, err
	}
	rec = recovery.Record{
		ID: state.NewID(), Kind: recovery.Recovery, State: recovery.Publishing, Location: location, Point: p.ID, VM: p.VM,
		Host: q.Host, Storage: q.Storage, Name: q.Name, Isolated: q.Isolated, Times: recovery.Times{Created: time.Now().UTC()},
	}
	if rec.Name == "" {
		rec.Name = p.VM
	}
	rec.Owner = hypervisor.Owner{Repository: n.repo.ID(), History: string(p.History), Session: rec.ID}
	vm = hypervisor.NewVM{
		Name: rec.Name, Kind: p.Kind, Isolated: q.Isolated, NewIdentity: q.NewIdentity || rec.Name != p.VM, Owner: rec.Owner,
	}
	if vm.Config, err = n.config(ctx, p); err != nil {
		return vm, rec, 0, err
	}
	for _, f := range vm.Config {
		if f.Name == "nvram" {
			vm.NVRAM = hypervisor.DiskPath(q.Storage, rec.Owner.DiskName(rec.Name, "nvram"), "fd")
			rec.NVRAM = vm.NVRAM
		}
	}
	for _, d := range p.Disks {
		data, err := n.dataBytes(ctx, d)
		if err != nil {
			return vm, rec, 0, err
		}
		need += data
		id, format := hypervisor.DiskID(d.ID), hostFormat(d)
		file := hypervisor.DiskPath(q.Storage, rec.Owner.DiskName(rec.Name, id), format)
		vm.Disks = append(vm.Disks, hypervisor.NewDisk{ID: id, Size: d.Size, Format: format, Path: file})
		rec.Disks = append(rec.Disks, recovery.Disk{ID: id, Size: d.Size, Files: []string{file}})
	}
	return vm, rec, need, nil
}

// hostFormat is the format of a disk on a host that runs QEMU.
func hostFormat(d repo.Disk) string {
	if d.Format == qcow2.Name {
		return qcow2.Name
	}
	return image.RawName
}

// place makes the disks, fills them, and defines the VM at last.
func (n *Node) place(ctx context.Context, t hypervisor.Target, vm hypervisor.NewVM, p repo.Point, storage string, placed *Placed) error {
	if err := n.repo.Pin(ctx, vm.Owner.Session, p.ID); err != nil {
		return err
	}
	for i, d := range vm.Disks {
		d.Path = ""
		d, out, err := t.CreateDisk(ctx, storage, vm.Owner.DiskName(vm.Name, d.ID), d)
		if err != nil {
			return err
		}
		written, err := n.fill(ctx, out, p.Disks[i], p.Disks[i].ID)
		if err = errors.Join(err, out.Close()); err != nil {
			return fmt.Errorf("restore disk %s: %w", d.ID, err)
		}
		vm.Disks[i] = d
		placed.Disks = append(placed.Disks, Restored{Disk: string(d.ID), File: d.Path, Format: d.Format, Size: d.Size, Bytes: written})
	}
	id, err := t.CreateVM(ctx, vm)
	placed.ID = string(id)
	return err
}
