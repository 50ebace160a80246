package libvirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	virt "github.com/digitalocean/go-libvirt"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
	"holdfast/internal/image/qcow2"
	"holdfast/internal/nbd"
)

const (
	// changed is the name under which QEMU exports the merged bitmap.
	changed = "holdfast-changed"
	// closeLimit bounds each step of giving a host back what it was.
	closeLimit = 2 * time.Minute
)

// snapshot is a pull-mode backup job: QEMU serves every disk as it was when
// the job began, over NBD, and copies what the guest overwrites to scratch
// files first.
type snapshot struct {
	h     *Host
	d     virt.Domain
	vm    hypervisor.VM
	name  string // Owner.Owned(): of the checkpoint, the socket, the scratch files
	level hypervisor.Consistency
	notes []string
	disks []vdisk // those in the backup
	// checkpoint is name, or "" when no disk can have one.
	checkpoint string
	since      string
	// full says, for each disk without a list of changes, why.
	full  map[hypervisor.DiskID]string
	serve *serving
	shell bool // QEMU was started by us over a stopped guest's disks
	// reuse: the scratch files are made by us, see makeScratch.
	reuse bool
	// begun: the job was started, so Close must end it.
	begun     bool
	committed bool
}

// Snapshot takes snapshots one after the other.
func (h *Host) Snapshot(ctx context.Context, reqs []hypervisor.Request, o hypervisor.SnapshotOptions) []hypervisor.Outcome {
	if o.Consistency == "" {
		o.Consistency = hypervisor.Filesystem
	}
	if o.FreezeLimit <= 0 {
		o.FreezeLimit = defaultFreeze
	}
	out := make([]hypervisor.Outcome, len(reqs))
	for i, r := range reqs {
		s, err := h.snapshot(ctx, r, o)
		if err != nil {
			out[i].Err = fmt.Errorf("snapshot of %s: %w", r.VM, err)
			continue
		}
		out[i].Snapshot = s
	}
	return out
}

func (h *Host) snapshot(ctx context.Context, r hypervisor.Request, o hypervisor.SnapshotOptions) (_ *snapshot, err error) {
	d, err := h.domain(ctx, r.VM)
	if err != nil {
		return nil, err
	}
	s := &snapshot{h: h, d: d, name: r.Owner.Owned(), level: o.Consistency, since: string(r.Since)}
	if s.vm, err = h.describe(ctx, d); err != nil {
		return nil, err
	}
	if s.vm.State == hypervisor.Stopped {
		if err := s.checkStopped(ctx, o.Consistency); err != nil {
			return nil, err
		}
	}
	cfg, notes, err := h.config(ctx, d, s.vm.State)
	if err != nil {
		return nil, err
	}
	s.vm.Config, s.notes = cfg, notes

	var g *guest
	if s.vm.State != hypervisor.Stopped {
		if g, err = s.ask(ctx, o.Consistency); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.vm.State == hypervisor.Stopped {
		if err := h.startShell(ctx, d, s.name); err != nil {
			return nil, err
		}
		s.shell = true
	}
	if err := s.plan(ctx, r); err != nil {
		return nil, err
	}
	if err := s.take(ctx, g, o); err != nil {
		return nil, err
	}
	return s, s.sameDisks(ctx)
}

// checkStopped refuses what a stopped domain may have that is not at rest.
func (s *snapshot) checkStopped(ctx context.Context, c hypervisor.Consistency) error {
	if on, err := s.h.active(ctx, s.d); err != nil {
		return err
	} else if on {
		return fmt.Errorf("a run of Holdfast holds the stopped guest's disks, or died and is cleaned by the next")
	}
	saved, err := call(ctx, s.h, "managed save of "+s.d.Name, func(l *virt.Libvirt) (int32, error) { return l.DomainHasManagedSaveImage(s.d, 0) })
	if err != nil {
		return err
	}
	if saved != 0 && c != hypervisor.Crash {
		return fmt.Errorf("the guest was saved to a file while it ran, so its disks are as after a loss of power: start it, or use --consistency crash")
	}
	return nil
}

// ask questions the agent, and refuses what the level needs and is not there.
func (s *snapshot) ask(ctx context.Context, c hypervisor.Consistency) (*guest, error) {
	if s.vm.State == hypervisor.Paused {
		if c == hypervisor.Crash {
			return nil, nil
		}
		return nil, fmt.Errorf("the guest is paused: let it run, or %s", crashAdvice)
	}
	g, err := s.h.ask(ctx, s.d)
	switch {
	case err == nil:
		s.vm.Config = append(s.vm.Config, hypervisor.File{Name: "osinfo.json", Data: g.info})
	case c == hypervisor.Crash && errors.Is(err, ErrAgent):
		s.notes = append(s.notes, "no guest agent: the guest's system is not described")
		return nil, nil
	case errors.Is(err, ErrAgent):
		return nil, fmt.Errorf("%w; install and start qemu-guest-agent in the guest, or %s", err, crashAdvice)
	default:
		return nil, err
	}
	if c == hypervisor.Application && !g.windows() {
		hook, err := s.h.hook(ctx, s.d)
		if err != nil {
			return nil, fmt.Errorf("applications cannot take part in the snapshot: %w; use --consistency filesystem to do without", err)
		}
		s.notes = append(s.notes, "freeze hook "+hook)
	}
	return g, nil
}

// plan finds out what can be read and tracked. The domain is active.
func (s *snapshot) plan(ctx context.Context, r hypervisor.Request) error {
	_, live, err := s.h.xml(ctx, s.d, 0)
	if err != nil {
		return err
	}
	for _, v := range disks(live) {
		if v.Excluded != "" {
			continue
		}
		if v.Size, err = s.h.size(ctx, s.d, v.ID); err != nil {
			return err
		}
		s.disks = append(s.disks, v)
	}
	if len(s.disks) == 0 {
		return errors.New("the VM has no disk to back up")
	}
	if err := s.h.busy(ctx, s.d, s.disks); err != nil {
		return err
	}
	nodes, err := s.h.blockNodes(ctx, s.d)
	if err != nil {
		return err
	}
	for i, v := range s.disks {
		if s.disks[i].bare = trackable(v, nodes); s.disks[i].bare != "" {
			s.notes = append(s.notes, fmt.Sprintf("disk %s: %s", v.ID, s.disks[i].bare))
		} else {
			s.checkpoint = s.name
		}
	}
	if s.full, err = s.h.untracked(ctx, s.d, s.disks, nodes, r.Since, r.Owner); err != nil {
		return err
	}
	if s.serve, err = s.h.serving(s.name); err != nil {
		return err
	}
	return s.makeScratch(ctx)
}

// makeScratch makes the scratch files, empty qcow2 images, which libvirt would
// make otherwise. It would have QEMU do it, by the job blockdev-create, and
// QEMU 7.2 dies on an assertion (in qcow2_get_specific_info), and the guest
// with it, when anybody asks for its block nodes at that moment: the likes of
// virsh domblkinfo do. Where we may not make files in the disk's directory
// libvirt has to.
func (s *snapshot) makeScratch(ctx context.Context) error {
	s.reuse = true
	for i, v := range s.disks {
		err := s.h.emptyImage(ctx, s.scratch(v), v.Size)
		switch {
		case err == nil:
		case ctx.Err() != nil || errors.Is(err, ErrLost):
			s.disks, err = s.disks[:i], errors.Join(err, s.removeScratch(s.h))
			return err
		default:
			s.reuse = false
			return s.removeScratch(s.h)
		}
	}
	return nil
}

func (s *snapshot) removeScratch(h *Host) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), closeLimit)
	defer cancel()
	for _, v := range s.disks {
		err = errors.Join(err, h.RemoveDisk(ctx, s.scratch(v)))
	}
	return err
}

// emptyImage makes a qcow2 image that holds nothing.
func (h *Host) emptyImage(ctx context.Context, file string, size int64) error {
	if h.Local() {
		w, err := qcow2.Create(file, size, qcow2.Options{})
		if err != nil {
			return err
		}
		return w.Close()
	}
	dir, err := os.MkdirTemp("", "holdfast-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	tmp := filepath.Join(dir, "empty")
	w, err := qcow2.Create(tmp, size, qcow2.Options{})
	if err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	b, err := os.ReadFile(tmp)
	if err != nil {
		return err
	}
	return h.putFile(ctx, file, b)
}

// take begins the job, with the guest frozen if the level asks for it.
func (s *snapshot) take(ctx context.Context, g *guest, o hypervisor.SnapshotOptions) (err error) {
	if s.vm.State != hypervisor.Running || o.Consistency == hypervisor.Crash {
		return s.begin(ctx)
	}
	f, err := s.h.freeze(ctx, s.d, o.FreezeLimit)
	if err != nil {
		return fmt.Errorf("%w; %s", err, crashAdvice)
	}
	err = s.begin(ctx)
	if err = errors.Join(err, f.thaw()); err != nil {
		return err
	}
	s.notes = append(s.notes, fmt.Sprintf("filesystems were frozen for %d ms (%d of them)", f.took.Milliseconds(), f.filesystems))
	return nil
}

// begin starts the job. When libvirt refuses it, it is tried again with less
// tracking: a backup never fails because tracking is lost.
func (s *snapshot) begin(ctx context.Context) error {
	err := s.try(ctx)
	if err == nil || !s.refused(err) {
		return err
	}
	tracked := false
	for _, v := range s.disks {
		if s.full[v.ID] == "" {
			tracked = true
			s.full[v.ID] = "libvirt refused to list changes since " + s.since + ": " + err.Error()
		}
	}
	if tracked {
		if err = s.try(ctx); err == nil || !s.refused(err) {
			return err
		}
	}
	if s.checkpoint == "" {
		return err
	}
	s.checkpoint = ""
	first := err
	if err = s.try(ctx); err != nil {
		return errors.Join(first, err)
	}
	s.notes = append(s.notes, "no checkpoint could be made, the next run will read everything: "+first.Error())
	return nil
}

// refused reports whether libvirt itself said no, and may say yes to less.
func (s *snapshot) refused(err error) bool {
	var ve virt.Error
	return errors.As(err, &ve) && !is(err, virt.ErrNoDomain, virt.ErrOperationTimeout, virt.ErrOperationAborted) && !strings.Contains(ve.Message, "domain is not running")
}

// try is one attempt to start the job.
func (s *snapshot) try(ctx context.Context) error {
	cp := virt.OptString(nil)
	if s.checkpoint != "" {
		cp = virt.OptString{s.checkpointXML()}
	}
	if err := context.Cause(ctx); err != nil {
		return err
	}
	// Not under ctx: the job may begin although nobody waits. It is short.
	bg, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeLimit)
	defer cancel()
	s.begun = true
	flags := virt.DomainBackupBeginFlags(0)
	if s.reuse {
		flags = virt.DomainBackupBeginReuseExternal
	}
	err := s.h.do(bg, "begin the backup job", func(l *virt.Libvirt) error {
		return l.DomainBackupBegin(s.d, s.backupXML(), cp, flags)
	})
	var ve virt.Error
	if errors.As(err, &ve) {
		s.begun = false // libvirt undid what it had begun
	}
	return err
}

// backupXML follows libvirt's "Backup XML format". Disks that are not named in
// it are left alone.
func (s *snapshot) backupXML() string {
	b := el("domainbackup", "mode", "pull")
	b.add(s.serve.element())
	ds := el("disks")
	for _, v := range s.disks {
		e := el("disk", "name", string(v.ID), "backup", "yes", "type", "file", "backupmode", "full", "exportname", string(v.ID))
		if s.full[v.ID] == "" {
			e.set("backupmode", "incremental")
			e.set("incremental", s.since)
			e.set("exportbitmap", changed)
		}
		e.add(el("scratch", "file", s.scratch(v)))
		ds.add(e)
	}
	b.add(ds)
	return b.String()
}

// checkpointXML follows libvirt's "Checkpoint XML format". Without a disk
// being named there with "no", libvirt would give it a bitmap or refuse.
func (s *snapshot) checkpointXML() string {
	c := el("domaincheckpoint")
	name := el("name")
	name.setText(s.checkpoint)
	c.add(name)
	ds := el("disks")
	for _, d := range s.vm.Disks {
		mode := "no"
		for _, v := range s.disks {
			if v.ID == d.ID && v.bare == "" {
				mode = "bitmap"
			}
		}
		if d.ID != "" && !s.dropped(d.ID) {
			ds.add(el("disk", "name", string(d.ID), "checkpoint", mode))
		}
	}
	c.add(ds)
	return c.String()
}

// dropped reports whether a disk of the configuration is not in the shell.
func (s *snapshot) dropped(id hypervisor.DiskID) bool {
	return s.shell && !slices.ContainsFunc(s.disks, func(v vdisk) bool { return v.ID == id })
}

// scratch is the path of a disk's scratch file: beside an image, where there
// is room for what it holds; else where QEMU keeps its own things.
func (s *snapshot) scratch(v vdisk) string { return s.h.scratch(s.name, v) }

func (h *Host) scratch(name string, v vdisk) string {
	dir := h.runDir()
	if v.file != "" {
		dir = path.Dir(v.file)
	}
	return path.Join(dir, name+scratchSuffix(string(v.ID)))
}

// sameDisks makes sure that no disk came or went between the reading of the
// configuration and the snapshot.
func (s *snapshot) sameDisks(ctx context.Context) error {
	if s.shell {
		return nil
	}
	_, live, err := s.h.xml(ctx, s.d, 0)
	if err != nil {
		return err
	}
	var now, then []string
	for _, v := range disks(live) {
		now = append(now, string(v.ID)+" "+v.Path)
	}
	for _, v := range s.vm.Disks {
		then = append(then, string(v.ID)+" "+v.Path)
	}
	if !slices.Equal(now, then) {
		return errors.New("a disk was attached to or detached from the guest during the snapshot: run the backup again")
	}
	return nil
}

func (s *snapshot) VM() hypervisor.VM                   { return s.vm }
func (s *snapshot) Consistency() hypervisor.Consistency { return s.level }
func (s *snapshot) Notes() []string                     { return slices.Clone(s.notes) }

func (s *snapshot) disk(id hypervisor.DiskID) (vdisk, error) {
	for _, v := range s.disks {
		if v.ID == id {
			return v, nil
		}
	}
	return vdisk{}, fmt.Errorf("%w: disk %s is not in the snapshot of %s", hypervisor.ErrNotExist, id, s.d.Name)
}

// dial connects to a disk's export.
func (s *snapshot) dial(ctx context.Context, id hypervisor.DiskID, conns int, contexts ...string) (*nbd.Client, error) {
	c, err := s.serve.dial(ctx, string(id), nbd.DialOptions{Conns: conns, Contexts: contexts})
	if err != nil {
		return nil, s.explain(ctx, fmt.Errorf("open disk %s of %s: %w", id, s.d.Name, err))
	}
	return c, nil
}

// Open reads a disk as it was at the snapshot's instant. The reader is good
// until Commit or Close.
func (s *snapshot) Open(ctx context.Context, id hypervisor.DiskID) (disk.Reader, error) {
	if _, err := s.disk(id); err != nil {
		return nil, err
	}
	if s.committed {
		return nil, errors.New("snapshot is committed: no disk may be read")
	}
	c, err := s.dial(ctx, id, 2)
	if err != nil {
		return nil, err
	}
	return &image{s, c}, nil
}

// Changed lists what the bitmaps since the reference point say.
func (s *snapshot) Changed(ctx context.Context, id hypervisor.DiskID) disk.Extents {
	if _, err := s.disk(id); err != nil {
		return disk.Fail(err)
	}
	if why := s.full[id]; why != "" {
		return disk.Fail(fmt.Errorf("%w: %s", hypervisor.ErrNoReference, why))
	}
	return func(yield func(disk.Extent, error) bool) {
		c, err := s.dial(ctx, id, 1, nbd.DirtyBitmap(changed))
		if err != nil {
			yield(disk.Extent{}, err)
			return
		}
		defer c.Close() // a reading connection: nothing is lost with it
		first := true
		for e, err := range c.Dirty(ctx, changed, 0, c.Size()) {
			if errors.Is(err, nbd.ErrNoContext) && first {
				err = fmt.Errorf("%w: QEMU does not export the bitmap of disk %s", hypervisor.ErrNoReference, id)
			} else if err != nil {
				err = s.explain(ctx, err)
			}
			if !yield(e, err) || err != nil {
				return
			}
			first = false
		}
	}
}

// explain says why reading failed, as far as the host can tell.
func (s *snapshot) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), agentLimit)
	defer cancel()
	on, aerr := s.h.active(ctx, s.d)
	switch {
	case errors.Is(aerr, ErrLost):
		return fmt.Errorf("%w during the backup: run it again when the daemon answers: %w", ErrLost, err)
	case aerr == nil && !on:
		return fmt.Errorf("the guest stopped during the backup: run it again: %w", err)
	}
	return err
}

// Commit makes sure that the checkpoint is there. Without one ("" and nil),
// the notes say why.
func (s *snapshot) Commit(ctx context.Context) (hypervisor.ReferencePoint, error) {
	s.committed = true
	if s.checkpoint == "" {
		return "", nil
	}
	marks, err := s.h.checkpointDisks(ctx, s.d, s.checkpoint)
	if err == nil && marks == nil {
		err = fmt.Errorf("checkpoint %s is gone from the host", s.checkpoint)
	}
	if err != nil {
		s.committed = false // so that Close tries to remove it
		return "", err
	}
	if !s.shell {
		if err := s.sameDisks(ctx); err != nil && !errors.Is(err, ErrLost) && ctx.Err() == nil {
			s.notes = append(s.notes, "a disk was attached to or detached from the guest during the backup: a new one is in the next restore point")
		}
	}
	return hypervisor.ReferencePoint(s.checkpoint), nil
}

// Close gives the host back. It works over a new connection when the old one
// broke.
func (s *snapshot) Close() (err error) {
	if !s.begun && !s.shell && !s.reuse {
		return nil
	}
	h := s.h
	ctx, cancel := context.WithTimeout(context.Background(), closeLimit)
	defer cancel()
	if h.wire.lost() != nil {
		if h, err = Open(ctx, s.h.uri, s.h.o); err != nil {
			return fmt.Errorf("the backup job of %s is left behind until the next run: %w", s.d.Name, err)
		}
		defer func() { err = errors.Join(err, h.Close()) }()
	}
	if s.begun {
		err = h.endJob(ctx, s.d, s.name)
		if s.checkpoint != "" && !s.committed {
			err = errors.Join(err, h.dropCheckpoint(ctx, s.d, s.checkpoint))
		}
	}
	if s.shell {
		err = errors.Join(err, h.stopShell(s.d))
	}
	s.begun, s.shell, s.reuse = false, false, false
	if s.serve != nil {
		err = errors.Join(err, s.serve.close())
	}
	if h.Local() {
		err = errors.Join(err, remove(path.Join(h.runDir(), s.name+".sock")))
	}
	return errors.Join(err, s.removeScratch(h))
}

// remove deletes a file; one that is not there is no error.
func remove(p string) error {
	if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// endJob aborts the backup job of that name, and waits until it is gone. No
// job, or another one, is no error.
func (h *Host) endJob(ctx context.Context, d virt.Domain, name string) error {
	for first := true; ; first = false {
		j, err := h.backupJob(ctx, d)
		if err != nil || j == nil || j.name != name {
			return err
		}
		if first {
			// libvirt has one job at a time, so this one is ours.
			err := h.do(ctx, "end the backup job of "+d.Name, func(l *virt.Libvirt) error { return l.DomainAbortJob(d) })
			if err != nil && !is(err, virt.ErrOperationInvalid) {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("end the backup job of %s: %w", d.Name, context.Cause(ctx))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// image is a disk of a snapshot.
type image struct {
	s *snapshot
	c *nbd.Client
}

func (i *image) Size() int64 { return i.c.Size() }

func (i *image) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := i.c.ReadAt(ctx, p, off); err != nil {
		if errors.Is(err, disk.ErrRange) {
			return err
		}
		return i.s.explain(ctx, err)
	}
	return nil
}

func (i *image) Extents(ctx context.Context, off, n int64) disk.Extents {
	return func(yield func(disk.Extent, error) bool) {
		for e, err := range i.c.Extents(ctx, off, n) {
			if err != nil && !errors.Is(err, disk.ErrRange) {
				err = i.s.explain(ctx, err)
			}
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}

func (i *image) Close() error { return i.c.Close() }
