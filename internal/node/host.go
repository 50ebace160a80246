package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"holdfast/internal/hypervisor"
	"holdfast/internal/hypervisor/folder"
	"holdfast/internal/hypervisor/libvirt"
)

// scheme begins what is a URI and no path.
var scheme = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9+.-]*://`)

// isLibvirt tells a libvirt URI from a directory.
func isLibvirt(host string) (bool, error) {
	s := scheme.FindString(host)
	switch {
	case s == "":
		return false, nil
	case strings.HasPrefix(s, "qemu"):
		return true, nil
	}
	return false, usage("host %q: neither a libvirt URI of QEMU (qemu:///system, qemu+ssh://HOST/system) nor a directory of disk images", host)
}

// source opens a host to back up from.
func (n *Node) source(ctx context.Context, host string) (hypervisor.Source, error) {
	virt, err := isLibvirt(host)
	if err != nil {
		return nil, err
	}
	if virt {
		return libvirt.Open(ctx, host, libvirt.Options{Guard: n.guard})
	}
	fi, err := os.Stat(host)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("host %q: no such directory, and no libvirt URI either (qemu:///system)", host)
	} else if err != nil {
		return nil, fmt.Errorf("host: %w", err)
	}
	if !fi.IsDir() {
		return nil, fmt.Errorf("host %q is a file: name the directory that holds the disk images", host)
	}
	abs, err := filepath.Abs(host) // what is recorded must mean the same from elsewhere
	if err != nil {
		return nil, fmt.Errorf("host: %w", err)
	}
	return folder.Open(abs)
}

// runsVMs refuses a host that is a directory.
func runsVMs(host string) error {
	virt, err := isLibvirt(host)
	if err == nil && !virt {
		err = usage("host %q: a directory cannot run a VM: give a libvirt URI (qemu:///system), or restore its disks with \"holdfast restore POINT --to DIR\"", host)
	}
	return err
}

// target opens a host to recover or restore to.
func (n *Node) target(ctx context.Context, host string) (*libvirt.Host, error) {
	if err := runsVMs(host); err != nil {
		return nil, err
	}
	return libvirt.Open(ctx, host, libvirt.Options{Guard: n.guard})
}

// VMs lists a host's VMs by name.
func (n *Node) VMs(ctx context.Context, host string) (vms []hypervisor.VM, err error) {
	s, err := n.source(ctx, host)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if vms, err = s.VMs(ctx); err != nil {
		return nil, fmt.Errorf("list the VMs of %s: %w", host, err)
	}
	slices.SortStableFunc(vms, func(a, b hypervisor.VM) int { return strings.Compare(a.Name, b.Name) })
	return vms, nil
}

// choose picks VMs by name or id; no names mean all. Names that no VM has are
// returned beside.
func choose(all []hypervisor.VM, host string, names []string) (vms []hypervisor.VM, unknown []string, err error) {
	if len(names) == 0 {
		return all, nil, nil
	}
	for _, name := range names {
		var found []hypervisor.VM
		for _, vm := range all {
			if vm.Name == name || string(vm.ID) == name || vm.Host+"/"+vm.Name == name {
				found = append(found, vm)
			}
		}
		switch {
		case len(found) == 0:
			unknown = append(unknown, name)
			continue
		case len(found) > 1:
			ids := make([]string, len(found))
			for i, vm := range found {
				ids[i] = string(vm.ID)
			}
			return nil, nil, usage("%s has several VMs %q; choose one by its id: %s", host, name, strings.Join(ids, ", "))
		}
		if !slices.ContainsFunc(vms, func(vm hypervisor.VM) bool { return vm.ID == found[0].ID }) {
			vms = append(vms, found[0])
		}
	}
	return vms, unknown, nil
}
