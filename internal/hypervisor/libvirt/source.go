package libvirt

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	virt "github.com/digitalocean/go-libvirt"

	"holdfast/internal/hypervisor"
)

// VMs lists all domains, running or not, sorted by name.
func (h *Host) VMs(ctx context.Context) ([]hypervisor.VM, error) {
	doms, err := call(ctx, h, "list VMs", func(l *virt.Libvirt) ([]virt.Domain, error) {
		doms, _, err := l.ConnectListAllDomains(1, 0)
		return doms, err
	})
	if err != nil {
		return nil, err
	}
	var out []hypervisor.VM
	for _, d := range doms {
		vm, err := h.describe(ctx, d)
		if is(err, virt.ErrNoDomain) {
			continue // undefined meanwhile
		} else if err != nil {
			return nil, err
		}
		out = append(out, vm)
	}
	slices.SortFunc(out, func(a, b hypervisor.VM) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// Plan gives singletons: libvirt's snapshots are of one VM.
func (h *Host) Plan(ctx context.Context, ids []hypervisor.VMID) ([][]hypervisor.VMID, error) {
	var out [][]hypervisor.VMID
	for _, id := range ids {
		out = append(out, []hypervisor.VMID{id})
	}
	return out, nil
}

// Forget deletes a checkpoint. Its bitmaps go with it; those of other
// checkpoints do not depend on them. For a stopped guest a QEMU is started
// over its disks, paused, as for its snapshot.
func (h *Host) Forget(ctx context.Context, id hypervisor.VMID, ref hypervisor.ReferencePoint) error {
	if ref == "" {
		return nil
	}
	d, err := h.domain(ctx, id)
	if errors.Is(err, hypervisor.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	return h.dropCheckpoint(ctx, d, string(ref))
}

// dropCheckpoint deletes a checkpoint if it is there.
func (h *Host) dropCheckpoint(ctx context.Context, d virt.Domain, name string) error {
	marks, err := h.checkpointDisks(ctx, d, name)
	if err != nil || marks == nil {
		return err
	}
	return h.whileActive(ctx, d, name, func() error { return h.deleteCheckpoint(ctx, d, name) })
}

// Clean removes, in this order: a job, a QEMU that a dead session started over
// a stopped guest, checkpoints, bitmaps that no checkpoint knows (of a running
// guest: elsewhere they are not seen), scratch files and sockets. On a host
// that is not this machine only files of jobs and checkpoints that are found
// can be named, and so removed.
func (h *Host) Clean(ctx context.Context, id hypervisor.VMID, repository string, dead func(session string) bool, keep []hypervisor.ReferencePoint) ([]string, error) {
	d, err := h.domain(ctx, id)
	if err != nil {
		return nil, err
	}
	ours := func(name string) bool {
		o, ok := parseOwned(name)
		return ok && o.Repository == fmt.Sprintf("%.8s", repository) && dead(o.Session)
	}
	c := &cleaner{h: h, d: d, ours: ours, keep: keep}
	for _, step := range []func(context.Context) error{c.job, c.shell, c.checkpoints, c.files} {
		if err := step(ctx); err != nil {
			return c.did, fmt.Errorf("clean %s: %w", d.Name, err)
		}
	}
	return c.did, nil
}

type cleaner struct {
	h    *Host
	d    virt.Domain
	ours func(name string) bool
	keep []hypervisor.ReferencePoint
	did  []string
}

func (c *cleaner) job(ctx context.Context) error {
	j, err := c.h.backupJob(ctx, c.d)
	if err != nil || j == nil || !c.ours(j.name) {
		return err
	}
	if err := c.h.endJob(ctx, c.d, j.name); err != nil {
		return err
	}
	c.did = append(c.did, "ended backup job "+j.name)
	return c.scratch(ctx, j.name)
}

// scratch removes the scratch files of that name.
func (c *cleaner) scratch(ctx context.Context, name string) error {
	if c.h.Local() {
		return nil // see files
	}
	_, dom, err := c.h.xml(ctx, c.d, 0)
	if err != nil {
		return err
	}
	for _, v := range disks(dom) {
		if v.Excluded == "" {
			if err := c.h.RemoveDisk(ctx, c.h.scratch(name, v)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *cleaner) shell(ctx context.Context) error {
	on, err := c.h.active(ctx, c.d)
	if err != nil || !on {
		return err
	}
	_, live, err := c.h.xml(ctx, c.d, 0)
	if err != nil || !c.ours(shellOf(live)) {
		return err
	}
	if err := c.h.stopShell(c.d); err != nil {
		return err
	}
	c.did = append(c.did, "ended the paused QEMU of "+shellOf(live))
	return nil
}

func (c *cleaner) checkpoints(ctx context.Context) error {
	all, err := c.h.checkpoints(ctx, c.d)
	if err != nil {
		return err
	}
	var stale []string
	for _, name := range all {
		if c.ours(name) && !slices.Contains(c.keep, hypervisor.ReferencePoint(name)) {
			stale = append(stale, name)
		}
	}
	on, err := c.h.active(ctx, c.d)
	if err != nil || !on && len(stale) == 0 {
		return err
	}
	return c.h.whileActive(ctx, c.d, strings.Join(stale[:min(1, len(stale))], ""), func() error {
		for _, name := range stale {
			if err := c.h.deleteCheckpoint(ctx, c.d, name); err != nil {
				return err
			}
			if did := "deleted checkpoint " + name; !slices.Contains(c.did, did) {
				c.did = append(c.did, did)
			}
			if err := c.scratch(ctx, name); err != nil {
				return err
			}
		}
		gone, err := c.h.deleteBitmaps(ctx, c.d, func(b string) bool { return c.ours(b) && !slices.Contains(all, b) })
		for _, b := range gone {
			c.did = append(c.did, "deleted bitmap "+b)
		}
		return err
	})
}

func (c *cleaner) files(ctx context.Context) error {
	if !c.h.Local() {
		return nil
	}
	_, dom, err := c.h.xml(ctx, c.d, 0)
	if err != nil {
		return err
	}
	dirs := []string{c.h.runDir()}
	for _, v := range disks(dom) {
		if dir := filepath.Dir(v.file); v.file != "" && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	for _, dir := range dirs {
		for _, pat := range []string{"holdfast-*.scratch", "holdfast-*.sock"} {
			found, err := filepath.Glob(filepath.Join(dir, pat))
			if err != nil {
				return err
			}
			for _, p := range found {
				if !c.ours(filepath.Base(p)) {
					continue
				}
				if err := remove(p); err != nil {
					return err
				}
				c.did = append(c.did, "removed "+p)
			}
		}
	}
	return nil
}
