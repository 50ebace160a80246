package libvirt

import (
	"context"
	"errors"
	"fmt"
	"path"
	"time"

	virt "github.com/digitalocean/go-libvirt"

	"holdfast/internal/hypervisor"
)

// This file and target_*.go are the hypervisor.Target.
//
// A recovered domain reads from a restore point over NBD, beneath a qcow2
// overlay on the host's storage or directly. Its disks have the error policy
// "stop": a guest whose restore point does not answer is paused, sees no
// error, and goes on where it was (Unpause). libvirt 9.0 passes no reconnect
// delay to QEMU, so the pause is the rule and not the exception.
//
// The domain's metadata names its owner and keeps what the disks' drivers
// were like; Migrate puts them back.

// domain states and reasons of virDomainState and its companions that are not
// looked up by a constant of the RPC library.
const (
	stateRunning     = int32(virt.DomainRunning)
	statePaused      = int32(virt.DomainPaused)
	statePMSuspended = int32(virt.DomainPmsuspended)
)

// cleanup bounds what is done after the caller's context may have ended.
const cleanup = 60 * time.Second

// detached is a context for a step that must be finished once it is begun.
func detached(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), cleanup)
}

// Preflight checks a recovery before anything is made. Memory is not checked:
// hosts may give more than they have.
func (h *Host) Preflight(ctx context.Context, vm hypervisor.NewVM, storage string, need int64) ([]string, error) {
	if err := h.storageFits(ctx, storage, need); err != nil || vm.Name == "" {
		return nil, err
	}
	config, err := configFile(vm, "domain.xml")
	if err != nil {
		return nil, err
	}
	host, err := h.facts(ctx)
	if err != nil {
		return nil, err
	}
	dom, notes, err := recovered(config, vm, host)
	if err != nil {
		return nil, err
	}
	if err := h.free(ctx, dom); err != nil {
		return nil, err
	}
	if err := h.networksExist(ctx, dom); err != nil {
		return nil, err
	}
	return notes, nil
}

// configFile gives a file of the restore point's configuration.
func configFile(vm hypervisor.NewVM, name string) ([]byte, error) {
	for _, f := range vm.Config {
		if f.Name == name {
			return f.Data, nil
		}
	}
	if vm.Kind != "" && vm.Kind != Kind {
		return nil, fmt.Errorf("a VM backed up from a %s host has no libvirt configuration: restore its disks with \"restore --to\" and define the VM by hand", vm.Kind)
	}
	return nil, fmt.Errorf("the restore point has no %s", name)
}

// free makes sure that neither the name nor the UUID of dom is taken: libvirt
// would change the domain that has both.
func (h *Host) free(ctx context.Context, dom *element) error {
	name := dom.at("name").text()
	_, err := call(ctx, h, "look up VM "+name, func(l *virt.Libvirt) (virt.Domain, error) { return l.DomainLookupByName(name) })
	if err == nil {
		return fmt.Errorf("%w: there is a VM named %s on %s: choose another with --name", hypervisor.ErrExist, name, h.uri)
	} else if !is(err, virt.ErrNoDomain) {
		return err
	}
	id := dom.at("uuid").text()
	if id == "" {
		return nil
	}
	d, err := h.domain(ctx, hypervisor.VMID(id))
	if err == nil {
		return fmt.Errorf("%w: %s on %s has the UUID %s: choose a new identity with --name", hypervisor.ErrExist, d.Name, h.uri, id)
	} else if !errors.Is(err, hypervisor.ErrNotExist) {
		return err
	}
	return nil
}

// networksExist makes sure that the libvirt networks that dom names are there
// and active.
func (h *Host) networksExist(ctx context.Context, dom *element) error {
	for _, nic := range dom.at("devices").all("interface") {
		name := nic.at("source").attr("network")
		if nic.attr("type") != "network" || name == "" {
			continue
		}
		n, err := call(ctx, h, "look up network "+name, func(l *virt.Libvirt) (virt.Network, error) { return l.NetworkLookupByName(name) })
		if is(err, virt.ErrNoNetwork) {
			return fmt.Errorf("the VM's network %s is not on %s: make it, or recover with --isolated", name, h.uri)
		} else if err != nil {
			return err
		}
		on, err := call(ctx, h, "look at network "+name, func(l *virt.Libvirt) (int32, error) { return l.NetworkIsActive(n) })
		if err != nil {
			return err
		}
		if on == 0 {
			return fmt.Errorf("the VM's network %s is not active on %s: start it (virsh net-start %s), or recover with --isolated", name, h.uri, name)
		}
	}
	return nil
}

// CreateVM defines a domain. What it made is removed again when a later step
// fails, also when ctx ended meanwhile.
func (h *Host) CreateVM(ctx context.Context, vm hypervisor.NewVM) (hypervisor.VMID, error) {
	config, err := configFile(vm, "domain.xml")
	if err != nil {
		return "", err
	}
	host, err := h.facts(ctx)
	if err != nil {
		return "", err
	}
	dom, _, err := recovered(config, vm, host)
	if err != nil {
		return "", err
	}
	if err := h.free(ctx, dom); err != nil {
		return "", err
	}
	// From here on to the end, whatever becomes of ctx.
	ctx, cancel := detached(ctx)
	defer cancel()
	if vm.NVRAM != "" {
		nvram, err := configFile(vm, "nvram")
		if err != nil {
			return "", err
		}
		if err := h.putFile(ctx, vm.NVRAM, nvram); err != nil {
			return "", fmt.Errorf("make the firmware's variable store: %w", err)
		}
	}
	d, err := call(ctx, h, "define VM "+vm.Name, func(l *virt.Libvirt) (virt.Domain, error) {
		return l.DomainDefineXMLFlags(dom.String(), 0)
	})
	if err != nil {
		if vm.NVRAM != "" {
			err = errors.Join(err, h.RemoveDisk(ctx, vm.NVRAM))
		}
		return "", err
	}
	return hypervisor.VMID(formatUUID(d.UUID)), nil
}

// Find looks through the metadata of all domains.
func (h *Host) Find(ctx context.Context, session string) (hypervisor.VMID, error) {
	doms, err := call(ctx, h, "list VMs", func(l *virt.Libvirt) ([]virt.Domain, error) {
		doms, _, err := l.ConnectListAllDomains(1, 0)
		return doms, err
	})
	if err != nil {
		return "", err
	}
	for _, d := range doms {
		o, ok, err := h.ownerOf(ctx, d)
		if err != nil {
			return "", err
		}
		if ok && o.Session == session {
			return hypervisor.VMID(formatUUID(d.UUID)), nil
		}
	}
	return "", fmt.Errorf("%w: none of session %s on %s", hypervisor.ErrNotExist, session, h.uri)
}

// ownerOf reads whose a domain is; ok is false when it is not ours.
func (h *Host) ownerOf(ctx context.Context, d virt.Domain) (o hypervisor.Owner, ok bool, err error) {
	meta, err := call(ctx, h, "read the metadata of "+d.Name, func(l *virt.Libvirt) (string, error) {
		return l.DomainGetMetadata(d, int32(virt.DomainMetadataElement), virt.OptString{metadataURI}, 0)
	})
	if is(err, virt.ErrNoDomainMetadata, virt.ErrNoDomain) {
		return o, false, nil
	} else if err != nil {
		return o, false, err
	}
	// libvirt gives the element without its prefix and namespace.
	e, err := parseTree([]byte(meta))
	if err != nil {
		return o, false, nil // whatever it is, it is not what we wrote
	}
	o = hypervisor.Owner{Repository: e.attr("repository"), History: e.attr("history"), Session: e.attr("session")}
	return o, localName(e.name) == "owner" && o.Session != "", nil
}

// Start starts the domain; one that runs is no error.
func (h *Host) Start(ctx context.Context, id hypervisor.VMID) error { return h.start(ctx, id, 0) }

func (h *Host) start(ctx context.Context, id hypervisor.VMID, flags virt.DomainCreateFlags) error {
	d, err := h.domain(ctx, id)
	if err != nil {
		return err
	}
	state, _, err := h.state(ctx, d)
	if err != nil {
		return err
	}
	if state != hypervisor.Stopped {
		return nil
	}
	_, err = call(ctx, h, "start VM "+d.Name, func(l *virt.Libvirt) (virt.Domain, error) {
		return l.DomainCreateWithFlags(d, uint32(flags))
	})
	return err
}

// Stop pulls the plug.
func (h *Host) Stop(ctx context.Context, id hypervisor.VMID) error {
	d, err := h.domain(ctx, id)
	if errors.Is(err, hypervisor.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	err = h.do(ctx, "stop VM "+d.Name, func(l *virt.Libvirt) error { return l.DomainDestroyFlags(d, 0) })
	if is(err, virt.ErrOperationInvalid, virt.ErrNoDomain) { // it is off
		return nil
	}
	return err
}

// DeleteVM removes a domain that CreateVM made, and refuses any other.
func (h *Host) DeleteVM(ctx context.Context, id hypervisor.VMID) error {
	d, err := h.domain(ctx, id)
	if errors.Is(err, hypervisor.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if _, ours, err := h.ownerOf(ctx, d); err != nil {
		return err
	} else if !ours {
		return fmt.Errorf("VM %s was not made by Holdfast: it is not deleted", d.Name)
	}
	const all = virt.DomainUndefineManagedSave | virt.DomainUndefineSnapshotsMetadata | virt.DomainUndefineCheckpointsMetadata | virt.DomainUndefineNvram
	err = h.do(ctx, "delete VM "+d.Name, func(l *virt.Libvirt) error { return l.DomainUndefineFlags(d, all) })
	if is(err, virt.ErrNoDomain) {
		return nil
	}
	return err
}

// state reads a domain's state; ioError: it is paused since its storage did
// not answer.
func (h *Host) state(ctx context.Context, d virt.Domain) (s hypervisor.State, ioError bool, err error) {
	type pair struct{ state, reason int32 }
	p, err := call(ctx, h, "state of VM "+d.Name, func(l *virt.Libvirt) (p pair, err error) {
		p.state, p.reason, err = l.DomainGetState(d, 0)
		return p, err
	})
	if err != nil {
		return "", false, err
	}
	switch p.state {
	case stateRunning, int32(virt.DomainBlocked), int32(virt.DomainShutdown):
		return hypervisor.Running, false, nil
	case statePaused, statePMSuspended:
		return hypervisor.Paused, p.state == statePaused && p.reason == int32(virt.DomainPausedIoerror), nil
	}
	return hypervisor.Stopped, false, nil
}

// Health asks libvirt, and the agent of a guest that runs.
func (h *Host) Health(ctx context.Context, id hypervisor.VMID) (hypervisor.Health, error) {
	d, err := h.domain(ctx, id)
	if err != nil {
		return hypervisor.Health{}, err
	}
	var he hypervisor.Health
	if he.State, he.IOError, err = h.state(ctx, d); err != nil || he.State != hypervisor.Running {
		return he, err
	}
	switch err := h.agent(ctx, d, 2*time.Second, "guest-ping", nil, nil); {
	case err == nil:
		he.Agent = true
	case ctx.Err() != nil || errors.Is(err, ErrLost):
		return he, err
	}
	return he, nil
}

// How a guest is let go on: QEMU notices at the first request that its server
// is back and pauses the guest once more; the next resume lets it run. Several
// disks, and attempts that QEMU makes some time apart, take more.
const (
	unpauseLimit  = 60 * time.Second
	unpauseLook   = 100 * time.Millisecond
	unpauseStable = 10 // looks at a running guest until it counts as running
)

// Unpause resumes the guest until it stays running for a second. A guest that
// is off, or paused by somebody, is left alone.
func (h *Host) Unpause(ctx context.Context, id hypervisor.VMID) error {
	d, err := h.domain(ctx, id)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, unpauseLimit, errors.New("its storage still does not answer"))
	defer cancel()
	look := time.NewTicker(unpauseLook)
	defer look.Stop()
	for stable, waited := 0, 5; stable < unpauseStable; {
		state, ioError, err := h.state(ctx, d)
		switch {
		case err != nil:
			return err
		case !ioError && state != hypervisor.Running:
			return nil
		case !ioError:
			stable++
		case waited < 5: // QEMU waits a while between its attempts to connect
			waited++
		default:
			stable, waited = 0, 0
			err = h.do(ctx, "resume VM "+d.Name, func(l *virt.Libvirt) error { return l.DomainResume(d) })
			if err != nil && !is(err, virt.ErrOperationInvalid) {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("resume VM %s: %w", d.Name, context.Cause(ctx))
		case <-look.C:
		}
	}
	return nil
}

// domainXML reads a domain's configuration, as it runs or as it will start
// next, passwords included.
func (h *Host) domainXML(ctx context.Context, d virt.Domain, inactive bool) (*element, error) {
	flags := virt.DomainXMLSecure
	if inactive {
		flags |= virt.DomainXMLInactive
	}
	s, err := call(ctx, h, "read the configuration of "+d.Name, func(l *virt.Libvirt) (string, error) { return l.DomainGetXMLDesc(d, flags) })
	if err != nil {
		return nil, err
	}
	return parseDomain([]byte(s))
}

// cleanPath is a storage directory as it stands in paths.
func cleanPath(dir string) string { return path.Clean(dir) }
