package folder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
	"holdfast/internal/image"
	"holdfast/internal/image/formats"
)

const (
	// attempts is how often a moment is sought at which no more than one of a
	// VM's files is being written.
	attempts = 5
	// tick is longer than the clock's that stamps files (10 ms at most): of two
	// writes within it the second may leave no trace in the times.
	tick = 50 * time.Millisecond
)

// Snapshot takes the VMs one after another. See the package comment for what
// it does about images in use.
func (s *Source) Snapshot(ctx context.Context, reqs []hypervisor.Request, o hypervisor.SnapshotOptions) []hypervisor.Outcome {
	outcomes := make([]hypervisor.Outcome, len(reqs))
	for i, r := range reqs {
		snap, err := s.snapshot(ctx, r, o)
		if err != nil {
			outcomes[i].Err = fmt.Errorf("snapshot of %s: %w", r.VM, err)
			continue
		}
		outcomes[i].Snapshot = snap
	}
	return outcomes
}

func (s *Source) snapshot(ctx context.Context, r hypervisor.Request, o hypervisor.SnapshotOptions) (*snapshot, error) {
	if o.Consistency == "" {
		o.Consistency = hypervisor.Filesystem
	}
	v, err := s.find(ctx, r.VM)
	if err != nil {
		return nil, err
	}
	for attempt := 1; ; attempt++ {
		snap, again, err := s.try(ctx, v, r.Owner, o, attempt == attempts)
		if !again {
			return snap, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(tick):
		}
	}
}

// try takes a snapshot. again means that it may succeed a moment later, which
// is not so for the last attempt.
func (s *Source) try(ctx context.Context, v vm, owner hypervisor.Owner, o hypervisor.SnapshotOptions, last bool) (_ *snapshot, again bool, err error) {
	snap := &snapshot{vm: s.vm(v), level: o.Consistency, set: &set{src: s, files: map[string]*file{}}}
	done := false
	defer func() {
		if !done {
			err = errors.Join(err, snap.Close())
		}
	}()
	bad := snap.openDisks(ctx, v, o.Live) // finds out which files it takes
	cloned := false
	if bad == nil {
		cloned, bad = snap.clone(ctx, v, owner)
	}
	unstable := snap.set.unstable(time.Now())
	users, err := snap.set.users(ctx)
	if err != nil {
		return nil, false, err
	}
	// One that changed by itself leaves the clones of one instant: that at
	// which it was cloned. Without clones none may. And one that nobody has
	// open may be at rest in a moment, as a stopped guest's must be for all
	// but the crash level.
	rest := !cloned || len(users) == 0 && o.Consistency != hypervisor.Crash && !o.Live
	if !last && (bad != nil && len(users)+len(unstable) > 0 || len(unstable) > 1 || len(unstable) > 0 && rest) {
		return nil, true, nil
	}
	use := strings.Join(slices.Sorted(maps.Values(users)), ", ")
	if use == "" && len(unstable) > 0 {
		use = fmt.Sprintf("%s changed just now", unstable[0])
	}
	if err := judge(use, cloned, len(unstable), o, snap.set.noClone); err != nil {
		return nil, false, err
	}
	if bad != nil {
		return nil, false, bad
	}
	if use != "" {
		snap.vm.State, snap.level = hypervisor.Running, hypervisor.Crash
		snap.note(o.Live, cloned, len(unstable))
	}
	snap.check = use == "" && !cloned
	if snap.vm.Config, err = s.config(v); err != nil {
		return nil, false, err
	}
	if len(v.left) > 0 {
		snap.notes = append(snap.notes, fmt.Sprintf("not in this point, being too large for configuration: %s", strings.Join(v.left, ", ")))
	}
	done = true
	return snap, false, nil
}

// judge refuses images in use where what is asked for cannot be had. use says
// who uses them, "" for nobody.
func judge(use string, cloned bool, unstable int, o hypervisor.SnapshotOptions, noClone error) error {
	switch {
	case use == "" || o.Live:
		return nil
	case !cloned:
		return fmt.Errorf("in use: %s: stop the guest, use --live, or put the folder on a filesystem with reflinks (%w)", use, noClone)
	case unstable > 1:
		return fmt.Errorf("in use: %s: its images change too fast to be copied at one instant: stop the guest, or use --live", use)
	case o.Consistency != hypervisor.Crash:
		return fmt.Errorf("in use: %s: a guest cannot be frozen from here: stop it, or use --consistency crash", use)
	}
	return nil
}

// snapshot is a VM's images, cloned or as they are.
type snapshot struct {
	vm     hypervisor.VM
	level  hypervisor.Consistency
	notes  []string
	set    *set
	disks  map[hypervisor.DiskID]*image.Chain
	check  bool        // Commit makes sure that nothing changed
	ended  atomic.Bool // by Commit or Close: nothing may be opened
	closed bool
}

var _ hypervisor.Snapshot = (*snapshot)(nil)

// openDisks opens all images with their parents. live means that they may be
// written while they are read.
func (p *snapshot) openDisks(ctx context.Context, v vm, live bool) error {
	p.notes, p.disks = nil, map[hypervisor.DiskID]*image.Chain{}
	for i, m := range v.images {
		if m.err != nil {
			return fmt.Errorf("disk %s: %w", m.id, m.err)
		}
		if m.note != "" {
			p.notes = append(p.notes, m.note)
		}
		if m.excluded != "" {
			continue
		}
		f, err := p.set.open(m.rel)
		if err != nil {
			return fmt.Errorf("disk %s: %w", m.id, err)
		}
		if x := p.set.files[m.rel]; live && x.clone == nil && m.format != image.RawName {
			f.Disk = growing{d: x.d, f: x.f}
		}
		c, err := formats.All().Open(ctx, f, m.format, p.set.resolve)
		if err != nil {
			return fmt.Errorf("disk %s: %w", m.id, err)
		}
		p.disks[p.vm.Disks[i].ID] = c
		p.vm.Disks[i].Size = c.Size()
	}
	return nil
}

// clone clones all files that the open disks read, if the filesystem can, and
// opens the disks again on the clones.
func (p *snapshot) clone(ctx context.Context, v vm, owner hypervisor.Owner) (bool, error) {
	if !p.set.clone(ctx, v.dir(), owner) {
		return false, ctx.Err()
	}
	if err := p.closeDisks(); err != nil {
		return true, err
	}
	return true, p.openDisks(ctx, v, false)
}

func (p *snapshot) note(live, cloned bool, unstable int) {
	switch {
	case cloned && unstable < 2 && live:
		p.notes = append(p.notes, "made live: of one instant, but the guest was not quiesced")
	case cloned && unstable < 2:
		p.notes = append(p.notes, "the images were in use: as after a loss of power")
	default:
		p.notes = append(p.notes, "made live: not of one instant")
	}
}

func (p *snapshot) VM() hypervisor.VM                   { return p.vm }
func (p *snapshot) Consistency() hypervisor.Consistency { return p.level }
func (p *snapshot) Notes() []string                     { return p.notes }

func (p *snapshot) Open(_ context.Context, id hypervisor.DiskID) (disk.Reader, error) {
	if p.ended.Load() {
		return nil, fmt.Errorf("open disk %s: the snapshot has ended", id)
	}
	c := p.disks[id]
	if c == nil {
		return nil, fmt.Errorf("open disk %s: %w", id, hypervisor.ErrNotExist)
	}
	return keep{c}, nil
}

// Changed always fails with ErrNoReference.
func (p *snapshot) Changed(context.Context, hypervisor.DiskID) disk.Extents {
	return disk.Fail(fmt.Errorf("%w in a folder of images", hypervisor.ErrNoReference))
}

// Commit makes sure that images that were read as they are did not change
// while they were: else it fails with hypervisor.ErrChanged, and what was read
// is no restore point. There is no reference point.
func (p *snapshot) Commit(ctx context.Context) (hypervisor.ReferencePoint, error) {
	p.ended.Store(true)
	if !p.check {
		return "", ctx.Err()
	}
	for _, rel := range slices.Sorted(maps.Keys(p.set.files)) {
		if err := p.set.files[rel].unchanged(p.set.src); err != nil {
			return "", fmt.Errorf("%w: %w: stop the guest, use --live, or put the folder on a filesystem with reflinks", hypervisor.ErrChanged, err)
		}
	}
	return "", ctx.Err()
}

func (p *snapshot) closeDisks() error {
	var errs []error
	for _, c := range p.disks {
		errs = append(errs, c.Close())
	}
	p.disks = nil
	return errors.Join(errs...)
}

// Close closes the images; clones are gone with that. A second Close does
// nothing.
func (p *snapshot) Close() error {
	if p.closed {
		return nil
	}
	p.closed = true
	p.ended.Store(true)
	return errors.Join(p.closeDisks(), p.set.Close())
}

// config reads the VM's configuration files.
func (s *Source) config(v vm) ([]hypervisor.File, error) {
	var list []hypervisor.File
	taken := map[string]bool{}
	for _, rel := range v.config {
		f, err := s.open(rel)
		if err != nil {
			return nil, fmt.Errorf("read configuration: %w", err)
		}
		data, err := io.ReadAll(io.LimitReader(f, maxConfig+1))
		if err == nil && len(data) > maxConfig {
			err = errors.New("it grew")
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return nil, fmt.Errorf("read configuration %s: %w", rel, err)
		}
		name := path.Base(rel)
		if taken[name] {
			name = strings.ReplaceAll(strings.TrimPrefix(rel, v.rel+"/"), "/", "_")
		}
		taken[name] = true
		list = append(list, hypervisor.File{Name: name, Data: data})
	}
	return list, nil
}

// keep is a disk that somebody else closes.
type keep struct{ d disk.Reader }

func (k keep) Size() int64  { return k.d.Size() }
func (k keep) Close() error { return nil }
func (k keep) ReadAt(ctx context.Context, p []byte, off int64) error {
	return k.d.ReadAt(ctx, p, off)
}
func (k keep) Extents(ctx context.Context, off, n int64) disk.Extents {
	return k.d.Extents(ctx, off, n)
}
