package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/internal/hypervisor"
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
// own. On an error all that was made there is removed.
func (n *Node) RestoreVM(ctx context.Context, p repo.Point, q VMRequest) (_ Placed, err error) {
	if err := onHost(q.Storage); err != nil {
		return Placed{}, err
	}
	r, err := n.Repo(ctx)
	if err != nil {
		return Placed{}, err
	}
	t, err := n.target(ctx, q.Host)
	if err != nil {
		return Placed{}, err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	vm := hypervisor.NewVM{
		Name: q.Name, Kind: p.Kind, Isolated: q.Isolated, NewIdentity: q.NewIdentity,
		Owner: hypervisor.Owner{Repository: r.ID(), History: string(p.History), Session: state.NewID()},
	}
	if vm.Name == "" {
		vm.Name = p.VM
	}
	vm.NewIdentity = vm.NewIdentity || vm.Name != p.VM
	var need int64
	for _, f := range p.Files {
		data, err := r.ReadFile(ctx, f)
		if err != nil {
			return Placed{}, fmt.Errorf("configuration %s: %w", f.Name, err)
		}
		vm.Config = append(vm.Config, hypervisor.File{Name: f.Name, Data: data})
		if f.Name == "nvram" {
			vm.NVRAM = hypervisor.DiskPath(q.Storage, vm.Owner.DiskName(vm.Name, "nvram"), "fd")
		}
	}
	for _, d := range p.Disks {
		data, err := n.dataBytes(ctx, d)
		if err != nil {
			return Placed{}, err
		}
		need += data
		name := vm.Owner.DiskName(vm.Name, hypervisor.DiskID(d.ID))
		vm.Disks = append(vm.Disks, hypervisor.NewDisk{
			ID: hypervisor.DiskID(d.ID), Size: d.Size, Format: fileFormat(d, ""),
			Path: hypervisor.DiskPath(q.Storage, name, fileFormat(d, "")),
		})
	}
	notes, err := t.Preflight(ctx, vm, q.Storage, need)
	if err != nil {
		return Placed{}, err
	}
	placed := Placed{VM: vm.Name, Host: q.Host, Notes: notes}
	id, err := n.place(ctx, t, &vm, p, q.Storage, &placed)
	placed.ID = string(id)
	return placed, err
}

// place makes the disks, fills them, and defines the VM at last.
func (n *Node) place(ctx context.Context, t hypervisor.Target, vm *hypervisor.NewVM, p repo.Point, storage string, placed *Placed) (_ hypervisor.VMID, err error) {
	var made []string
	defer func() {
		if err == nil {
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
		defer cancel()
		for _, path := range made {
			if e := t.RemoveDisk(ctx, path); e != nil {
				err = errors.Join(err, fmt.Errorf("remove %s by hand: %w", path, e))
			}
		}
	}()
	for i, d := range vm.Disks {
		d.Path = ""
		name := vm.Owner.DiskName(vm.Name, d.ID)
		d, out, err := t.CreateDisk(ctx, storage, name, d)
		if err != nil {
			return "", err
		}
		made = append(made, d.Path)
		written, err := n.fill(ctx, out, p.Disks[i], p.Disks[i].ID)
		if err = errors.Join(err, out.Close()); err != nil {
			return "", fmt.Errorf("restore disk %s: %w", d.ID, err)
		}
		vm.Disks[i] = d
		placed.Disks = append(placed.Disks, Restored{Disk: string(d.ID), File: d.Path, Format: d.Format, Size: d.Size, Bytes: written})
	}
	return t.CreateVM(ctx, *vm)
}
