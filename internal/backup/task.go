package backup

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
	"holdfast/internal/mover"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

// samples is how many "unchanged" chunks of a disk are read in each run to
// catch a change map that lies: 4 MiB of reading.
const samples = 64

// run makes the restore point from the snapshot, in the order of the package
// comment.
func (t *task) run(ctx context.Context) error {
	vm := t.snapshot.VM()
	p := &repo.Point{
		History: t.history, VM: vm.Name, Kind: vm.Kind, Host: vm.Host, VMID: string(vm.ID),
		Time: time.Now().UTC().Truncate(time.Second), Consistency: string(t.snapshot.Consistency()),
		Session: t.session,
	}
	t.result.Consistency = p.Consistency
	if err := t.journalStep("reading"); err != nil {
		return err
	}
	for _, d := range vm.Disks {
		if d.Excluded != "" {
			p.Notes = append(p.Notes, fmt.Sprintf("disk %s is not in this point: %s", d.ID, d.Excluded))
			continue
		}
		saved, err := t.disk(ctx, d)
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
		p.Disks = append(p.Disks, saved)
		if saved.FullReason != "" {
			t.result.FullReason = joined(t.result.FullReason, fmt.Sprintf("%s: %s", d.ID, saved.FullReason))
		}
	}
	for _, f := range vm.Config {
		saved, err := t.write.PutFile(ctx, f.Name, f.Data)
		if err != nil {
			return fmt.Errorf("configuration %s: %w", f.Name, err)
		}
		p.Files = append(p.Files, saved)
	}
	t.step("committing")
	var report func(done, total int64)
	if t.job.Watch.Lock != nil {
		report = t.job.Watch.Lock(t.vm.Name)
	}
	if err := t.write.Lock(ctx, p, report); err != nil {
		return err
	}
	if err := t.reference(ctx, p); err != nil {
		return err
	}
	p.Notes = append(t.snapshot.Notes(), p.Notes...) // Commit may have added some
	t.result.Notes = append(t.result.Notes, p.Notes...)
	p.ReadBytes = t.result.ReadBytes
	if err := t.write.Commit(ctx, p); err != nil {
		return err
	}
	t.result.Point, t.result.NewBytes, t.result.StoredBytes = p.ID, p.NewBytes, p.StoredBytes
	t.afterCommit(ctx, p)
	return nil
}

func joined(list, s string) string {
	if list == "" {
		return s
	}
	return list + "; " + s
}

func (t *task) journalStep(step string) error {
	return t.journal.Update(func(r *state.RunRecord) { r.Tasks[0].Step = step })
}

// reference ends reading and takes the new reference point into the point.
// A failure costs the reference, never the point, but for one: disks that
// changed while they were read are no restore point.
func (t *task) reference(ctx context.Context, p *repo.Point) error {
	if err := t.journalStep("commit"); err != nil {
		return err
	}
	ref, err := t.snapshot.Commit(ctx)
	switch {
	case errors.Is(err, hypervisor.ErrChanged):
		return err
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		p.ReferenceNote = err.Error()
		t.warn("no reference point, the next run reads and compares: %v", err)
	case ref == "":
		p.ReferenceNote = "this host cannot list changes"
	}
	p.Reference = string(ref)
	return nil
}

// afterCommit closes the snapshot and forgets the reference that was
// replaced. Nothing here can undo the point; what fails becomes a warning.
func (t *task) afterCommit(ctx context.Context, p *repo.Point) {
	if err := t.journalStep("closing"); err != nil {
		t.warn("journal: %v", err)
	}
	t.step("closing")
	t.closeSnapshot()
	old := t.since()
	if old == "" || string(old) == p.Reference {
		return
	}
	if err := t.job.Source.Forget(ctx, t.vm.ID, old); err != nil {
		t.warn("forget the old reference point: %v", err)
	}
}

// disk stores one disk of the snapshot.
func (t *task) disk(ctx context.Context, d hypervisor.Disk) (repo.Disk, error) {
	saved := repo.Disk{ID: string(d.ID), Size: d.Size, Format: d.Format, Sector: d.Sector, Path: d.Path}
	src, err := t.snapshot.Open(ctx, d.ID)
	if err != nil {
		return saved, err
	}
	saved.Size = src.Size()
	saved.Root, saved.FullReason, err = t.copy(ctx, d.ID, src)
	return saved, errors.Join(err, src.Close())
}

// copy brings the disk's map up to date: by the host's change map where there
// is one that can be believed, else by reading everything.
func (t *task) copy(ctx context.Context, id hypervisor.DiskID, src disk.Reader) (repo.Root, string, error) {
	base, full, err := t.openBase(ctx, id)
	if err != nil {
		return "", "", err
	}
	root, full, err := t.copyFrom(ctx, id, src, base, full)
	if base != nil && errors.Is(err, repo.ErrDamaged) {
		return t.copyFrom(ctx, id, src, nil, damagedMap(err))
	}
	return root, full, err
}

func damagedMap(err error) string { return fmt.Sprintf("the newest point's map is damaged: %v", err) }

// copyFrom makes the disk's map from the base's. With full it reads everything.
func (t *task) copyFrom(ctx context.Context, id hypervisor.DiskID, src disk.Reader, base *repo.DiskReader, full string) (repo.Root, string, error) {
	w, err := t.write.Disk(ctx, base, src.Size())
	if err != nil {
		return "", "", err
	}
	if full == "" {
		full, err = t.copyChanged(ctx, id, w, src, base)
		if err != nil {
			return "", "", err
		}
	}
	if full != "" {
		all := func() disk.Extents { return src.Extents(ctx, 0, src.Size()) }
		if err := t.move(ctx, id, w, src, all); err != nil {
			return "", "", err
		}
	}
	root, err := w.Finish(ctx)
	return root, full, err
}

// openBase opens the disk as the newest point has it. full says why changes
// alone will not do.
func (t *task) openBase(ctx context.Context, id hypervisor.DiskID) (base *repo.DiskReader, full string, err error) {
	if t.base == nil {
		return nil, "first backup", nil
	}
	i := slices.IndexFunc(t.base.Disks, func(d repo.Disk) bool { return d.ID == string(id) })
	if i < 0 {
		return nil, "new disk", nil
	}
	base, err = t.job.Repo.OpenDisk(ctx, t.base.Disks[i])
	if errors.Is(err, repo.ErrDamaged) {
		return nil, damagedMap(err), nil
	} else if err != nil {
		return nil, "", err
	}
	if t.since() == "" {
		reason := "the newest point has no reference point"
		if t.base.VMID != string(t.vm.ID) {
			reason = "first backup under this identity"
		} else if t.base.ReferenceNote != "" {
			reason = t.base.ReferenceNote
		}
		return base, reason, nil
	}
	return base, "", nil
}

// copyChanged stores what the host says has changed, and what the repository
// has lost. full says why that was not enough.
func (t *task) copyChanged(ctx context.Context, id hypervisor.DiskID, w *repo.DiskWriter, src disk.Reader, base *repo.DiskReader) (full string, err error) {
	if base.Size() != src.Size() {
		return fmt.Sprintf("the disk's size went from %d to %d bytes", base.Size(), src.Size()), nil
	}
	changed := func() disk.Extents { return t.snapshot.Changed(ctx, id) }
	s := newSample(src.Size())
	for e, err := range changed() {
		if errors.Is(err, hypervisor.ErrNoReference) {
			return reasonOf(err), nil
		} else if err != nil {
			return "", err
		}
		s.pass(e)
	}
	if err := t.move(ctx, id, w, src, changed); err != nil {
		return "", err
	}
	c, err := mover.Copy(ctx, w, src, base.Missing(ctx), mover.Options{Align: repo.ChunkSize, Zeros: mover.WriteZeros})
	t.result.ReadBytes += c.Read
	if err != nil {
		return "", err
	}
	return t.verify(ctx, src, base, s.unchanged())
}

// verify compares chunks that the host calls unchanged.
func (t *task) verify(ctx context.Context, src disk.Reader, base *repo.DiskReader, offs []int64) (full string, err error) {
	for _, off := range offs {
		p := make([]byte, min(repo.ChunkSize, src.Size()-off))
		if err := src.ReadAt(ctx, p, off); err != nil {
			return "", fmt.Errorf("sample at %d: %w", off, err)
		}
		t.result.ReadBytes += int64(len(p))
		same, err := base.Matches(ctx, p, off)
		if err != nil {
			return "", fmt.Errorf("sample at %d: %w", off, err)
		}
		if !same {
			return fmt.Sprintf("the host's change map is wrong: it does not name the change at byte %d", off), nil
		}
	}
	return "", nil
}

// reasonOf is the reason that an adapter gave, without the sentinel's words.
func reasonOf(err error) string {
	if err == nil {
		return ""
	}
	return strings.TrimPrefix(err.Error(), hypervisor.ErrNoReference.Error()+": ")
}

// move copies extents of the disk into its map, under a meter.
func (t *task) move(ctx context.Context, id hypervisor.DiskID, w *repo.DiskWriter, src disk.Reader, extents func() disk.Extents) error {
	total, err := disk.DataBytes(extents())
	if err != nil {
		return err
	}
	m := &mover.Meter{}
	m.AddTotal(total)
	if t.job.Watch.Disk != nil {
		t.job.Watch.Disk(t.vm.Name, string(id), m)
	}
	c, err := mover.Copy(ctx, w, src, extents(), mover.Options{Align: repo.ChunkSize, Meter: m, Zeros: mover.WriteZeros})
	t.result.ReadBytes += c.Read
	return err
}

// sample is random chunks of a disk, of which those that no changed extent
// touches are compared.
type sample struct {
	offs []int64 // ascending
	keep []int64
}

func newSample(size int64) *sample {
	s := &sample{}
	for range samples {
		if size > 0 {
			s.offs = append(s.offs, rand.Int64N(size)/repo.ChunkSize*repo.ChunkSize)
		}
	}
	slices.Sort(s.offs)
	s.offs = slices.Compact(s.offs)
	return s
}

// pass takes the next changed extent; they come in ascending order.
func (s *sample) pass(e disk.Extent) {
	for len(s.offs) > 0 && s.offs[0] < e.End() {
		if s.offs[0]+repo.ChunkSize <= e.Off {
			s.keep = append(s.keep, s.offs[0])
		}
		s.offs = s.offs[1:]
	}
}

// unchanged gives the chunks that no extent touched.
func (s *sample) unchanged() []int64 { return append(s.keep, s.offs...) }
