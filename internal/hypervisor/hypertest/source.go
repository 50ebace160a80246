package hypertest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
)

// VMs lists the host's VMs by name.
func (c *Conn) VMs(ctx context.Context) ([]hypervisor.VM, error) {
	if err := c.step(ctx, "vms"); err != nil {
		return nil, err
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	var out []hypervisor.VM
	for _, vm := range c.m.vms {
		out = append(out, vm.describe())
	}
	slices.SortFunc(out, func(a, b hypervisor.VM) int { return strings.Compare(a.Name+string(a.ID), b.Name+string(b.ID)) })
	return out, nil
}

// Plan gives singletons.
func (c *Conn) Plan(ctx context.Context, ids []hypervisor.VMID) ([][]hypervisor.VMID, error) {
	if err := c.step(ctx, "plan"); err != nil {
		return nil, err
	}
	var out [][]hypervisor.VMID
	for _, id := range ids {
		out = append(out, []hypervisor.VMID{id})
	}
	return out, nil
}

// Snapshot copies the disks' maps of pages at one instant.
func (c *Conn) Snapshot(ctx context.Context, reqs []hypervisor.Request, o hypervisor.SnapshotOptions) []hypervisor.Outcome {
	out := make([]hypervisor.Outcome, len(reqs))
	for i, r := range reqs {
		s, err := c.snapshot(ctx, r, o)
		if err != nil {
			out[i].Err = fmt.Errorf("snapshot of %s: %w", r.VM, err)
			continue
		}
		out[i].Snapshot = s
	}
	return out
}

func (c *Conn) snapshot(ctx context.Context, r hypervisor.Request, o hypervisor.SnapshotOptions) (*memSnapshot, error) {
	if err := c.step(ctx, "snapshot", r.VM); err != nil {
		return nil, err
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	vm, err := c.vm(r.VM)
	if err != nil {
		return nil, err
	}
	if o.Consistency == "" {
		o.Consistency = hypervisor.Filesystem
	}
	if vm.job != nil {
		return nil, fmt.Errorf("backup job %s is active", vm.job.name)
	}
	if vm.state != hypervisor.Stopped && !vm.agent && o.Consistency != hypervisor.Crash {
		return nil, errors.New("guest agent does not answer; use --consistency crash")
	}
	name := r.Owner.Owned()
	if vm.marks[hypervisor.ReferencePoint(name)] != nil {
		return nil, fmt.Errorf("reference point %s exists", name)
	}
	s := &memSnapshot{c: c, name: name, since: r.Since, level: o.Consistency, disks: map[hypervisor.DiskID]*memImage{}}
	s.vm = vm.describe()
	s.vm.Config = slices.Clone(vm.config)
	mark := map[hypervisor.DiskID]dirty{}
	for _, d := range vm.disks {
		if d.Excluded != "" {
			continue
		}
		im := &memImage{s: s, file: memFile{d.size, maps.Clone(d.pages)}}
		if d.served != "" && !d.straight {
			return nil, fmt.Errorf("disk %s runs from a restore point: migrate it first", d.ID)
		}
		im.why, im.changed = vm.changedSince(d, r.Since)
		if d.tracked {
			mark[d.ID] = dirty{}
		} else {
			s.notes = append(s.notes, fmt.Sprintf("disk %s: its changes are not tracked", d.ID))
		}
		s.disks[d.ID] = im
	}
	if len(mark) > 0 {
		vm.marks[hypervisor.ReferencePoint(name)] = mark
		s.marked = true
	}
	vm.job = s
	return s, nil
}

// changedSince gives a disk's changes, or why there are none to be had.
func (vm *memVM) changedSince(d *memDisk, since hypervisor.ReferencePoint) (why string, ex []disk.Extent) {
	switch mark := vm.marks[since]; {
	case since == "":
		return "no reference point", nil
	case !d.tracked:
		return "raw disk: its changes are not tracked", nil
	case mark == nil:
		return "reference point " + string(since) + " is gone from the host", nil
	case mark[d.ID] == nil:
		return "disk is new since the last backup", nil
	case d.lost[since]:
		return "change tracking is inconsistent", nil
	case d.lies:
		return "", nil
	default:
		for _, p := range slices.Sorted(maps.Keys(mark[d.ID])) {
			ex = append(ex, disk.Extent{Off: p * PageSize, Len: PageSize})
		}
		return "", ex
	}
}

// Forget removes a reference point.
func (c *Conn) Forget(ctx context.Context, id hypervisor.VMID, ref hypervisor.ReferencePoint) error {
	if err := c.step(ctx, "forget", id, ref); err != nil {
		return err
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if vm := c.m.vms[id]; vm != nil {
		delete(vm.marks, ref)
	}
	return nil
}

// Clean ends jobs and removes reference points of dead sessions.
func (c *Conn) Clean(ctx context.Context, id hypervisor.VMID, repository string, dead func(session string) bool, keep []hypervisor.ReferencePoint) ([]string, error) {
	if err := c.step(ctx, "clean", id); err != nil {
		return nil, err
	}
	// dead is the caller's and may take its time: it is not called under the lock.
	c.m.mu.Lock()
	vm, err := c.vm(id)
	var names []string
	if err == nil {
		if vm.job != nil {
			names = append(names, vm.job.name)
		}
		for ref := range vm.marks {
			names = append(names, string(ref))
		}
	}
	c.m.mu.Unlock()
	if err != nil {
		return nil, err
	}
	stale := map[string]bool{}
	for _, n := range names {
		if repo, session, ok := owned(n); ok && repo == fmt.Sprintf("%.8s", repository) && dead(session) {
			stale[n] = true
		}
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	var did []string
	if vm.job != nil && stale[vm.job.name] {
		did = append(did, "ended job "+vm.job.name)
		vm.job.dead = true
		vm.job = nil
	}
	for _, ref := range slices.Sorted(maps.Keys(vm.marks)) {
		if stale[string(ref)] && !slices.Contains(keep, ref) {
			did = append(did, "removed reference point "+string(ref))
			delete(vm.marks, ref)
		}
	}
	return did, nil
}

// memSnapshot is a snapshot; its fields but disks are guarded by Mem.mu once
// it is made.
type memSnapshot struct {
	c      *Conn
	name   string
	since  hypervisor.ReferencePoint
	vm     hypervisor.VM
	level  hypervisor.Consistency
	notes  []string
	disks  map[hypervisor.DiskID]*memImage
	marked bool
	dead   bool // its guest stopped, or it was cleaned away
	done   bool // committed
	closed bool
}

func (s *memSnapshot) VM() hypervisor.VM                   { return s.vm }
func (s *memSnapshot) Consistency() hypervisor.Consistency { return s.level }
func (s *memSnapshot) Notes() []string                     { return slices.Clone(s.notes) }

// usable says why no disk may be read.
func (s *memSnapshot) usable() error {
	s.c.m.mu.Lock()
	defer s.c.m.mu.Unlock()
	switch {
	case s.dead:
		return ErrStopped
	case s.done:
		return errors.New("snapshot is committed: no disk may be read")
	case s.closed:
		return errors.New("snapshot is closed")
	}
	return nil
}

func (s *memSnapshot) image(id hypervisor.DiskID) (*memImage, error) {
	im := s.disks[id]
	if im == nil {
		return nil, fmt.Errorf("%w: disk %s is not in the snapshot", hypervisor.ErrNotExist, id)
	}
	return im, s.usable()
}

func (s *memSnapshot) Open(ctx context.Context, id hypervisor.DiskID) (disk.Reader, error) {
	if err := s.c.step(ctx, "open", s.vm.ID, id); err != nil {
		return nil, err
	}
	im, err := s.image(id)
	if err != nil {
		return nil, err
	}
	return im, nil
}

func (s *memSnapshot) Changed(ctx context.Context, id hypervisor.DiskID) disk.Extents {
	if err := s.c.step(ctx, "changed", s.vm.ID, id); err != nil {
		return disk.Fail(err)
	}
	im, err := s.image(id)
	if err != nil {
		return disk.Fail(err)
	}
	if im.why != "" {
		return disk.Fail(fmt.Errorf("%w: %s", hypervisor.ErrNoReference, im.why))
	}
	return disk.List(im.changed...)
}

func (s *memSnapshot) Commit(ctx context.Context) (hypervisor.ReferencePoint, error) {
	if err := s.c.step(ctx, "commit", s.vm.ID); err != nil {
		return "", err
	}
	s.c.m.mu.Lock()
	defer s.c.m.mu.Unlock()
	if s.dead {
		return "", ErrStopped
	}
	s.done = true
	if !s.marked {
		return "", nil
	}
	return hypervisor.ReferencePoint(s.name), nil
}

func (s *memSnapshot) Close() error {
	s.c.m.mu.Lock()
	closed := s.closed
	s.c.m.mu.Unlock()
	if closed {
		return nil
	}
	if err := s.c.step(context.Background(), "close", s.vm.ID); err != nil {
		return err
	}
	s.c.m.mu.Lock()
	defer s.c.m.mu.Unlock()
	s.closed = true
	vm := s.c.m.vms[s.vm.ID]
	if vm == nil {
		return nil
	}
	if vm.job == s {
		vm.job = nil
	}
	if !s.done {
		delete(vm.marks, hypervisor.ReferencePoint(s.name))
	}
	return nil
}

// memImage is a disk of a snapshot.
type memImage struct {
	s       *memSnapshot
	file    memFile
	why     string
	changed []disk.Extent
}

func (i *memImage) Size() int64 { return i.file.size }

func (i *memImage) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := i.s.c.step(ctx, "read", i.s.vm.ID); err != nil {
		return err
	}
	if err := disk.CheckRange(i.file.size, off, int64(len(p))); err != nil {
		return err
	}
	if err := i.s.usable(); err != nil {
		return err
	}
	i.file.read(p, off)
	return nil
}

func (i *memImage) Extents(ctx context.Context, off, n int64) disk.Extents {
	if err := disk.CheckRange(i.file.size, off, n); err != nil {
		return disk.Fail(err)
	}
	if err := i.s.usable(); err != nil {
		return disk.Fail(err)
	}
	return disk.Merge(i.file.extents(off, n))
}

func (f *memFile) extents(off, n int64) disk.Extents {
	return func(yield func(disk.Extent, error) bool) {
		for end := off + n; off < end; {
			k := min(end-off, PageSize-off%PageSize)
			_, data := f.pages[off/PageSize]
			if !yield(disk.Extent{Off: off, Len: k, Zero: !data}, nil) {
				return
			}
			off += k
		}
	}
}

func (i *memImage) Close() error { return nil }
