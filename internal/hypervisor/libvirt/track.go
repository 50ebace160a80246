package libvirt

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	virt "github.com/digitalocean/go-libvirt"

	"holdfast/internal/hypervisor"
)

// blockNode is a node of QEMU's block graph (QMP query-named-block-nodes).
type blockNode struct {
	Name   string `json:"node-name"`
	Driver string `json:"drv"`
	Image  struct {
		Specific struct {
			Data struct {
				Compat string `json:"compat"` // of qcow2: "0.10", "1.1"
			} `json:"data"`
		} `json:"format-specific"`
	} `json:"image"`
	Bitmaps []struct {
		Name         string `json:"name"`
		Inconsistent bool   `json:"inconsistent"`
		Persistent   bool   `json:"persistent"`
	} `json:"dirty-bitmaps"`
}

// blockNodes asks a running guest's QEMU for its block graph.
func (h *Host) blockNodes(ctx context.Context, d virt.Domain) (map[string]blockNode, error) {
	var list []blockNode
	if err := h.monitor(ctx, d, "query-named-block-nodes", map[string]any{"flat": true}, &list); err != nil {
		return nil, err
	}
	m := map[string]blockNode{}
	for _, n := range list {
		m[n.Name] = n
	}
	return m, nil
}

// checkpoints lists the names of a domain's checkpoints, anybody's.
func (h *Host) checkpoints(ctx context.Context, d virt.Domain) ([]string, error) {
	list, err := call(ctx, h, "list checkpoints of "+d.Name, func(l *virt.Libvirt) ([]virt.DomainCheckpoint, error) {
		r, _, err := l.DomainListAllCheckpoints(d, 1, 0)
		return r, err
	})
	var names []string
	for _, c := range list {
		names = append(names, c.Name)
	}
	return names, err
}

// checkpointDisks returns the disks of a checkpoint with the names of their
// bitmaps. It is empty, without an error, when libvirt has no such checkpoint.
func (h *Host) checkpointDisks(ctx context.Context, d virt.Domain, name string) (map[hypervisor.DiskID]string, error) {
	s, err := call(ctx, h, "checkpoint "+name, func(l *virt.Libvirt) (string, error) {
		c, err := l.DomainCheckpointLookupByName(d, name, 0)
		if err != nil {
			return "", err
		}
		return l.DomainCheckpointGetXMLDesc(c, uint32(virt.DomainCheckpointXMLNoDomain))
	})
	if is(err, virt.ErrNoDomainCheckpoint) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	e, err := parseTree([]byte(s))
	if err != nil {
		return nil, fmt.Errorf("checkpoint %s: %w", name, err)
	}
	m := map[hypervisor.DiskID]string{}
	for _, c := range e.at("disks").all("disk") {
		if c.attr("checkpoint") == "bitmap" {
			m[hypervisor.DiskID(c.attr("name"))] = orDefault(c.attr("bitmap"), name)
		}
	}
	return m, nil
}

// trackable says why no bitmap can be kept for a disk, "" if one can.
func trackable(v vdisk, nodes map[string]blockNode) string {
	switch {
	case v.Format != "qcow2":
		return v.Format + " disk: it cannot keep track of its changes, a qcow2 disk can"
	case nodes[v.node].Image.Specific.Data.Compat == "0.10":
		return "qcow2 disk of the old version 2: it cannot keep track of its changes (qemu-img amend -o compat=1.1 changes that)"
	}
	return ""
}

// untracked says, for each disk whose changes since the reference point cannot
// be listed, why. The domain must be active.
func (h *Host) untracked(ctx context.Context, d virt.Domain, vs []vdisk, nodes map[string]blockNode, since hypervisor.ReferencePoint, o hypervisor.Owner) (map[hypervisor.DiskID]string, error) {
	why := map[hypervisor.DiskID]string{}
	all := func(reason string) map[hypervisor.DiskID]string {
		for _, v := range vs {
			if why[v.ID] == "" {
				why[v.ID] = reason
			}
		}
		return why
	}
	for _, v := range vs {
		if v.bare != "" {
			why[v.ID] = v.bare
		}
	}
	if since == "" {
		return all("no reference point"), nil
	}
	if got, ok := parseOwned(string(since)); !ok || got.Repository != fmt.Sprintf("%.8s", o.Repository) {
		return all(fmt.Sprintf("checkpoint %s is not of this repository", since)), nil
	}
	marks, err := h.checkpointDisks(ctx, d, string(since))
	if err != nil {
		return nil, err
	}
	if marks == nil {
		return all(fmt.Sprintf("checkpoint %s is gone from the host", since)), nil
	}
	for _, v := range vs {
		if why[v.ID] != "" {
			continue
		}
		why[v.ID] = bitmapState(v, nodes, marks[v.ID])
		if why[v.ID] == "" {
			delete(why, v.ID)
		}
	}
	return why, nil
}

// bitmapState says what is wrong with a disk's bitmap, "" if nothing is.
func bitmapState(v vdisk, nodes map[string]blockNode, bitmap string) string {
	if bitmap == "" {
		return "disk is new since the last backup"
	}
	n, ok := nodes[v.node]
	if !ok {
		return "QEMU does not show the disk's bitmaps"
	}
	for _, b := range n.Bitmaps {
		switch {
		case b.Name != bitmap:
		case b.Inconsistent:
			return "bitmap " + bitmap + " is inconsistent: the guest's QEMU did not end in good order"
		default:
			return ""
		}
	}
	return "bitmap " + bitmap + " is missing: the disk was replaced, or has a snapshot of somebody's above it"
}

// deleteCheckpoint removes a checkpoint of ours and its bitmaps. The domain
// must be active: libvirt deletes bitmaps through QEMU. A broken one is
// removed by hand.
func (h *Host) deleteCheckpoint(ctx context.Context, d virt.Domain, name string) error {
	if _, ok := parseOwned(name); !ok {
		return fmt.Errorf("checkpoint %s is not of Holdfast: not deleted", name)
	}
	del := func(flags virt.DomainCheckpointDeleteFlags) error {
		return h.do(ctx, "delete checkpoint "+name, func(l *virt.Libvirt) error {
			c, err := l.DomainCheckpointLookupByName(d, name, 0)
			if err != nil {
				return err
			}
			return l.DomainCheckpointDelete(c, flags)
		})
	}
	err := del(0)
	if err != nil && !is(err, virt.ErrNoDomainCheckpoint) {
		if errors.Is(err, ErrLost) || ctx.Err() != nil {
			return err
		}
		// libvirt refuses when a bitmap is lost or inconsistent.
		if merr := del(virt.DomainCheckpointDeleteMetadataOnly); merr != nil && !is(merr, virt.ErrNoDomainCheckpoint) {
			return errors.Join(err, merr)
		}
	}
	_, err = h.deleteBitmaps(ctx, d, func(b string) bool { return b == name })
	return err
}

// deleteBitmaps removes persistent bitmaps from a running guest's disks where
// ours(name) says so, and returns their names.
func (h *Host) deleteBitmaps(ctx context.Context, d virt.Domain, ours func(string) bool) ([]string, error) {
	nodes, err := h.blockNodes(ctx, d)
	if err != nil {
		return nil, err
	}
	var gone []string
	for _, n := range nodes {
		for _, b := range n.Bitmaps {
			if !b.Persistent || !ours(b.Name) {
				continue
			}
			err := h.monitor(ctx, d, "block-dirty-bitmap-remove", map[string]any{"node": n.Name, "name": b.Name}, nil)
			if err != nil {
				return gone, err
			}
			if !slices.Contains(gone, b.Name) {
				gone = append(gone, b.Name)
			}
		}
	}
	return gone, nil
}

// job describes the backup job that is active on a domain.
type job struct {
	name  string // of the Owner, from the job's socket or scratch files; "" if foreign
	where string // where it serves, for the operator
}

// backupJob returns the active backup job, nil if there is none.
func (h *Host) backupJob(ctx context.Context, d virt.Domain) (*job, error) {
	s, err := call(ctx, h, "backup job of "+d.Name, func(l *virt.Libvirt) (string, error) { return l.DomainBackupGetXMLDesc(d, 0) })
	if is(err, virt.ErrNoDomainBackup) || is(err, virt.ErrOperationInvalid) {
		return nil, nil // the latter: the domain is not active
	} else if err != nil {
		return nil, err
	}
	e, err := parseTree([]byte(s))
	if err != nil {
		return nil, fmt.Errorf("backup job of %s: %w", d.Name, err)
	}
	j := &job{}
	srv := e.at("server")
	if j.where = srv.attr("socket"); j.where == "" && srv != nil {
		j.where = srv.attr("name") + ":" + srv.attr("port")
	}
	for _, v := range e.at("disks").all("disk") {
		base := baseName(v.at("scratch").attr("file"))
		if _, ok := parseOwned(base); ok && j.name == "" {
			j.name = strings.TrimSuffix(base, scratchSuffix(v.attr("name")))
		}
	}
	return j, nil
}

// busy returns an error that names the job of somebody's that keeps a backup
// from beginning.
func (h *Host) busy(ctx context.Context, d virt.Domain, vs []vdisk) error {
	j, err := h.backupJob(ctx, d)
	if err != nil {
		return err
	}
	switch {
	case j != nil && j.name != "":
		return fmt.Errorf("backup job %s of Holdfast is active on %s: another run is at work there, or one died and is cleaned by the next", j.name, d.Name)
	case j != nil:
		return fmt.Errorf("a backup job of another program is active on %s (serving at %s): wait for it, or end it with virsh domjobabort", d.Name, orDefault(j.where, "no address"))
	}
	for _, v := range vs {
		typ, err := call(ctx, h, "block job of disk "+string(v.ID), func(l *virt.Libvirt) (int32, error) {
			found, typ, _, _, _, err := l.DomainGetBlockJobInfo(d, string(v.ID), 0)
			if found == 0 {
				typ = 0
			}
			return typ, err
		})
		if err != nil {
			return err
		}
		if typ != 0 {
			return fmt.Errorf("a block job (%s) of another program is active on disk %s of %s: wait for it, or end it with virsh blockjob --abort", blockJobName(typ), v.ID, d.Name)
		}
	}
	return nil
}

// blockJobName names a virDomainBlockJobType.
func blockJobName(t int32) string {
	switch virt.DomainBlockJobType(t) {
	case virt.DomainBlockJobTypePull:
		return "pull"
	case virt.DomainBlockJobTypeCopy:
		return "copy"
	case virt.DomainBlockJobTypeCommit:
		return "commit"
	case virt.DomainBlockJobTypeActiveCommit:
		return "active commit"
	case virt.DomainBlockJobTypeBackup:
		return "backup"
	}
	return fmt.Sprintf("type %d", t)
}

func baseName(p string) string { return p[strings.LastIndexByte(p, '/')+1:] }

// scratchSuffix ends the name of a disk's scratch file.
func scratchSuffix(disk string) string { return "-" + disk + ".scratch" }
