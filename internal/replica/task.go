package replica

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/disk"
	"holdfast/internal/mover"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

const (
	// workers is how many blocks of a disk are under way at once: 1 MiB each at
	// most, so that 50 ms of way to the source leave room for 300 MB/s.
	workers = 16
	// window is how far from their order chunks may come, bytes: a source on a
	// spinning disk is read several times faster so, and what comes fills eight
	// packs or fewer, which are read back together.
	window = 128 << 20
	// maxKept bounds the extents that are kept in memory: 24 bytes each. A disk
	// with more of them has its maps compared again each time they are needed.
	maxKept = 1 << 18
	// samples is how many chunks of a disk are compared by their ids at the end.
	samples = 32
)

// task is the copy of one point.
type task struct {
	job    *Job
	point  repo.Point
	result *Result

	session string
	journal *state.Run
	write   *repo.Run
	base    *repo.Point // in the source; nil when no point of this history is in both
	copied  *repo.Point // the same in the target
	proofs  []func(context.Context) error
}

func (t *task) warn(format string, args ...any) {
	t.result.Warnings = append(t.result.Warnings, fmt.Sprintf(format, args...))
}

// run copies the point, in the order of the package comment.
func (t *task) run(ctx context.Context) (err error) {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if there, err := targetPoints(ctx, t.job.To); err != nil {
		return err
	} else if _, ok := there[t.point.ID]; ok {
		return repo.ErrPointExists
	}
	t.session = state.NewID()
	t.journal, err = t.job.State.NewRun(state.RunRecord{
		ID: t.session, Started: time.Now().UTC(), Repository: t.job.To.ID(), Source: t.job.From.ID(),
		Tasks: []state.Task{{VM: t.point.VM, History: string(t.point.History), Step: "copy", Note: string(t.point.ID)}},
	})
	if err != nil {
		return err
	}
	defer func() { t.end(err) }()
	if err := t.open(ctx); err != nil {
		return err
	}
	p, err := t.copyAll(ctx)
	if err != nil {
		return err
	}
	if err := t.write.Flush(ctx); err != nil {
		return fmt.Errorf("store in the target: %w", err)
	}
	for _, proof := range t.proofs {
		if err := proof(ctx); err != nil {
			return err
		}
	}
	if err := t.write.CommitCopy(ctx, &p); err != nil {
		return err
	}
	t.result.NewBytes, t.result.StoredBytes = p.NewBytes, p.StoredBytes
	return nil
}

// open pins the point, opens the lease, and finds and pins the base. Only what
// is in the target after the lease began is a base.
func (t *task) open(ctx context.Context) error {
	if err := t.job.From.Pin(ctx, t.session, t.point.ID); err != nil {
		return err
	}
	var err error
	if t.write, err = t.job.To.Begin(ctx, t.session); err != nil {
		return fmt.Errorf("begin in the target: %w", err)
	}
	t.write.ReadBack(cmp.Or(t.job.ReadBack, repo.ReadAll))
	there, err := targetPoints(ctx, t.job.To)
	if err != nil {
		return err
	}
	if _, ok := there[t.point.ID]; ok {
		return repo.ErrPointExists
	}
	points, err := t.job.From.Points(ctx)
	if err != nil {
		return err
	}
	for t.base = nearest(points, t.point, there); t.base != nil; t.base = nearest(points, t.point, there) {
		err := t.pinBase(ctx)
		if err == nil {
			copied := there[t.base.ID]
			t.copied, t.result.Base = &copied, t.base.ID
			return nil
		} else if !errors.Is(err, repo.ErrNotExist) {
			return err
		}
		delete(there, t.base.ID) // forgotten this very moment: another will do
	}
	return nil
}

// pinBase keeps the base's maps in both: those of the source are compared, that
// of the target becomes part of the new point.
func (t *task) pinBase(ctx context.Context) error {
	if err := t.job.From.Pin(ctx, t.session, t.base.ID); err != nil {
		return err
	}
	return t.job.To.Pin(ctx, t.session, t.base.ID)
}

// end releases what the run holds. What cannot be released stays in the
// journal, for the next copy to clean up.
func (t *task) end(err error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var left error
	if t.write != nil {
		left = t.write.Close()
	} else { // a Begin that failed may have opened its lease
		left = t.job.To.EndLease(ctx, t.session)
	}
	left = errors.Join(left, t.job.To.Unpin(ctx, t.session), t.job.From.Unpin(ctx, t.session))
	over := t.journal.End
	if left != nil {
		over = t.journal.Abandon
		if err == nil {
			t.warn("the next copy cleans up: %v", left)
		}
	}
	if e := over(); e != nil {
		t.warn("journal: %v", e)
	}
}

// copyAll copies disks and files and gives the point as the target is to have it.
func (t *task) copyAll(ctx context.Context) (repo.Point, error) {
	p := t.point
	p.CopiedFrom, p.Session = t.job.From.ID(), t.session
	// The mark on the host belongs to the repository whose next backup starts
	// from it: here it would be used, and then removed, behind that one's back.
	p.Reference, p.ReferenceNote = "", "this restore point was copied from another repository"
	p.Disks, p.Files = nil, nil
	for _, d := range t.point.Disks {
		root, err := t.disk(ctx, d)
		if err != nil {
			return p, fmt.Errorf("disk %s: %w", d.ID, err)
		}
		d.Root = root
		p.Disks = append(p.Disks, d)
	}
	for _, f := range t.point.Files {
		saved, err := t.file(ctx, f)
		if err != nil {
			return p, fmt.Errorf("configuration %s: %w", f.Name, err)
		}
		p.Files = append(p.Files, saved)
	}
	return p, nil
}

func (t *task) file(ctx context.Context, f repo.File) (repo.File, error) {
	data, err := t.job.From.ReadFile(ctx, f)
	if err != nil {
		return f, err
	}
	t.result.ReadBytes += f.Size
	saved, err := t.write.PutFile(ctx, f.Name, data)
	if err != nil {
		return f, err
	}
	m, err := t.write.Map(saved.Root, saved.Size)
	if err != nil {
		return f, err
	}
	ok, err := m.Matches(ctx, data, 0)
	return saved, t.same(ok, err, 0)
}

// disk copies one disk; when its base turns out to be damaged, without it:
// then all is read, and what is not whole in the target is stored again.
func (t *task) disk(ctx context.Context, d repo.Disk) (repo.Root, error) {
	src, err := t.job.From.OpenDisk(ctx, d)
	if err != nil {
		return "", err
	}
	before, base, err := t.openBase(ctx, d.ID)
	if err == nil && base != nil {
		var root repo.Root
		if root, err = t.copyDisk(ctx, d, src, before, base); err == nil {
			return root, nil
		}
	}
	reason := whyNoBase(t.base)
	if err != nil {
		if !errors.Is(err, repo.ErrDamaged) {
			return "", err
		}
		reason = fmt.Sprintf("restore point %s, copied before, cannot serve as its base: %v", t.base.ID, err)
	}
	t.result.FullReason = joined(t.result.FullReason, d.ID+": "+reason)
	return t.copyDisk(ctx, d, src, nil, nil)
}

// openBase opens a disk of the base in the source and in the target; nil
// without one.
func (t *task) openBase(ctx context.Context, id string) (before, base *repo.DiskReader, err error) {
	i, k := diskOf(t.base, id), diskOf(t.copied, id)
	if i < 0 || k < 0 {
		return nil, nil, nil
	}
	if t.base.Disks[i].Size != t.copied.Disks[k].Size {
		return nil, nil, fmt.Errorf("%w: the two repositories disagree on its size", repo.ErrDamaged)
	}
	if before, err = t.job.From.OpenDisk(ctx, t.base.Disks[i]); err != nil {
		return nil, nil, err
	}
	base, err = t.job.To.OpenDisk(ctx, t.copied.Disks[k])
	return before, base, err
}

// copyDisk copies where src differs from before, of which base is the copy.
func (t *task) copyDisk(ctx context.Context, d repo.Disk, src, before, base *repo.DiskReader) (repo.Root, error) {
	w, err := t.write.Disk(ctx, base, d.Size)
	if err != nil {
		return "", err
	}
	total, again, err := gather(differences(ctx, src, before))
	if err != nil {
		return "", err
	}
	m := &mover.Meter{}
	m.AddTotal(total)
	if t.job.Watch.Disk != nil {
		defer t.job.Watch.Disk(t.point, d.ID, m)()
	}
	if err := t.move(ctx, w, src, again, m, base); err != nil {
		return "", err
	}
	if base != nil { // what the target has lost of the base, as far as it knows
		lost := disk.Clip(base.Missing(ctx), 0, d.Size)
		if err := t.move(ctx, w, src, lost, m, base); err != nil {
			return "", err
		}
	}
	root, err := w.Finish(ctx)
	if err != nil {
		return "", err
	}
	return root, t.willProve(root, d, src, again)
}

func (t *task) move(ctx context.Context, w *repo.DiskWriter, src *repo.DiskReader, extents disk.Extents, m *mover.Meter, base *repo.DiskReader) error {
	zeros := mover.SkipZeros // a new map is all zeros
	if base != nil {
		zeros = mover.WriteZeros
	}
	c, err := mover.Copy(ctx, w, src, extents, mover.Options{Align: repo.ChunkSize, Window: window, Workers: workers, Zeros: zeros, Meter: m})
	t.result.ReadBytes += c.Read
	return err
}

// willProve notes the proof of a disk's new map, which is taken when all is stored.
func (t *task) willProve(root repo.Root, d repo.Disk, src *repo.DiskReader, changed disk.Extents) error {
	m, err := t.write.Map(root, d.Size)
	if err != nil {
		return err
	}
	t.proofs = append(t.proofs, func(ctx context.Context) error {
		err := m.Holds(ctx, changed)
		if err == nil {
			err = t.compare(ctx, m, src, changed)
		}
		if err != nil {
			return fmt.Errorf("prove the copy of disk %s: %w", d.ID, err)
		}
		return nil
	})
	return nil
}

// compare compares a sample of chunks by their ids.
func (t *task) compare(ctx context.Context, m *repo.Map, src *repo.DiskReader, changed disk.Extents) error {
	offs, err := sample(src.Size(), changed)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for _, off := range offs {
		g.Go(func() error {
			p := make([]byte, min(repo.ChunkSize, src.Size()-off))
			if err := src.ReadAt(ctx, p, off); err != nil {
				return err
			}
			ok, err := m.Matches(ctx, p, off)
			return t.same(ok, err, off)
		})
	}
	return g.Wait()
}

func (t *task) same(ok bool, err error, off int64) error {
	if err == nil && !ok {
		err = fmt.Errorf("%w: at byte %d the target would not hold what the source does; nothing was committed", repo.ErrDamaged, off)
	}
	return err
}

// sample gives places of chunks, ascending: half of them in what has changed,
// the others anywhere on the disk.
func sample(size int64, changed disk.Extents) ([]int64, error) {
	var offs []int64
	within := func(off, n int64) int64 { return (off + rand.Int64N(n)) / repo.ChunkSize * repo.ChunkSize }
	seen := 0
	for e, err := range changed {
		if err != nil {
			return nil, err
		}
		// Each extent has the same chance to stay.
		if seen++; len(offs) < samples/2 {
			offs = append(offs, within(e.Off, e.Len))
		} else if i := rand.IntN(seen); i < len(offs) {
			offs[i] = within(e.Off, e.Len)
		}
	}
	for range samples / 2 {
		if size > 0 {
			offs = append(offs, within(0, size))
		}
	}
	slices.Sort(offs)
	return slices.Compact(offs), nil
}

// differences are where src differs from before, or with nil what it has.
func differences(ctx context.Context, src, before *repo.DiskReader) disk.Extents {
	if before == nil {
		return src.Extents(ctx, 0, src.Size())
	}
	return src.Changed(ctx, before)
}

// gather goes through extents once: it sums the data in them, and gives them
// to be gone through again, from memory if they are not too many.
func gather(extents disk.Extents) (total int64, again disk.Extents, err error) {
	var kept []disk.Extent
	many := false
	for e, err := range extents {
		if err != nil {
			return 0, nil, err
		}
		if !e.Zero {
			total += e.Len
		}
		if many = many || len(kept) == maxKept; !many {
			kept = append(kept, e)
		}
	}
	if many {
		return total, extents, nil
	}
	return total, disk.List(kept...), nil
}
