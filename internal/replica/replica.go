// Package replica copies restore points from one repository to another: a
// second copy, in another place, under other keys.
//
//	run journalled → source point and bases pinned → lease in the target →
//	maps compared in the source → what differs read there, sealed anew in the
//	target → packs read back → map compared → commit → lease, pins, journal cleared
//
// Chunk ids are keyed per repository, so what the target has cannot be told by
// ids. It is told by points that both have: a copy keeps the id of its point.
// Of these the nearest of the same history is the base: its map and the new
// point's are compared in the source, equal subtrees are passed over, and the
// target's map of the base is changed where they differ. Without a base
// everything is read in the source; what the target has by chance is not
// sent, as in a backup.
//
// # What is proved
//
// Every chunk is authenticated when it is read from the source, and decoded
// and compared before it is sealed for the target. Each pack is read back
// from the target before it counts: all of it, which must have the digest that
// it was given, or a sample, as the job says. Before the
// commit the new map is compared with the source's wherever they were not
// equal by their base: zeros where there are zeros, a present chunk where there
// is one; and of a sample of chunks, of the base's part too, the source's bytes
// must have the ids that the target's map names. That what the store gives
// back today is on its disks for years is not proved: that is what check
// with its reading of all data is for, in the target as in the source.
//
// # After a crash
//
// There is no point, or a whole one. What an unfinished run has announced is
// found by the next one and not sent again; it announces every ten minutes. Its
// lease and pins are removed by the next copy between the two repositories from
// this machine.
//
// Copies may run beside one another, backups and prunes. Two that copy one
// point compete with their commits; the second finds it there.
package replica

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/internal/mover"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

// ErrSame is returned for two names of one repository, or for a plain copy
// of its directory: that holds every point already, under the same keys.
var ErrSame = errors.New("both are the same repository")

// Job is what to copy, from where, to where.
type Job struct {
	From, To *repo.Repo
	State    *state.Dir
	Points   []repo.Point // of From, in the order in which to copy them
	// ReadBack of what is sent; "" is all. Over a slow link, and where reading
	// costs money, a sample halves what passes.
	ReadBack repo.ReadBack
	Watch    Watch
}

// Watch is told what goes on. Its function may be nil.
type Watch struct {
	// Disk gives the meter of a disk that is about to be read. end is called when
	// that is over.
	Disk func(p repo.Point, disk string, m *mover.Meter) (end func())
}

// State of a point after, or in a plan before, a copy.
type State string

const (
	Copied  State = "copied"
	There   State = "there" // it was there before, or another copy was faster
	Planned State = "planned"
	Failed  State = "failed"
)

// Result is what became of one point.
type Result struct {
	Point repo.PointID `json:"point,omitempty"`
	VM    string       `json:"vm"`
	Host  string       `json:"host"`
	Time  time.Time    `json:"time,omitzero"`
	State State        `json:"state"`
	// Base is the point from which the differences were taken; "" without one.
	Base repo.PointID `json:"base,omitempty"`
	// ReadBytes is what was read in the source, before compression; of a planned
	// point what would be, which is the most that would be sent.
	ReadBytes   int64 `json:"read_bytes"`
	NewBytes    int64 `json:"new_bytes"`
	StoredBytes int64 `json:"stored_bytes"`
	// FullReason says, per disk, why it was read whole; "" when differences were known.
	FullReason string  `json:"full_reason"`
	Seconds    float64 `json:"seconds"`
	// Warnings are things to cure that cost the copy nothing.
	Warnings []string `json:"warnings,omitempty"`
	Error    string   `json:"error,omitempty"`
	Err      error    `json:"-"`
}

func result(p repo.Point, s State) Result {
	return Result{Point: p.ID, VM: p.VM, Host: p.Host, Time: p.Time, State: s}
}

func (r *Result) fail(err error) { r.State, r.Err, r.Error = Failed, err, err.Error() }

// Missing gives the points of from that to does not have, and apart from them
// those that to had and has forgotten: what a repository keeps is its own
// affair. Both in the order of their commits.
func Missing(ctx context.Context, from, to *repo.Repo) (missing, forgotten []repo.Point, err error) {
	if from.ID() == to.ID() {
		return nil, nil, ErrSame
	}
	points, err := from.Points(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("list the restore points: %w", err)
	}
	there, err := targetPoints(ctx, to)
	if err != nil {
		return nil, nil, err
	}
	gone, err := to.Forgotten(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, p := range points {
		switch _, ok := there[p.ID]; {
		case ok:
		case gone[p.ID]:
			forgotten = append(forgotten, p)
		default:
			missing = append(missing, p)
		}
	}
	return missing, forgotten, nil
}

// targetPoints are the points of the target, by id.
func targetPoints(ctx context.Context, to *repo.Repo) (map[repo.PointID]repo.Point, error) {
	points, err := to.Points(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the restore points of the target: %w", err)
	}
	byID := make(map[repo.PointID]repo.Point, len(points))
	for _, p := range points {
		byID[p.ID] = p
	}
	return byID, nil
}

// Run copies the points. One's failure does not stop the others: there is one
// Result per point, in the order of job.Points; when ctx ends the rest fails
// with its error. The error is of what failed before any point was touched.
func Run(ctx context.Context, job Job) ([]Result, error) {
	if job.From.ID() == job.To.ID() {
		return nil, ErrSame
	}
	if err := job.clean(ctx); err != nil {
		return nil, fmt.Errorf("clean up after an earlier copy: %w", err)
	}
	results := make([]Result, len(job.Points))
	for i, p := range job.Points {
		results[i] = result(p, Copied)
		t := &task{job: &job, point: p, result: &results[i]}
		began := time.Now()
		switch err := t.run(ctx); {
		case errors.Is(err, repo.ErrPointExists):
			results[i].State = There
		case err != nil:
			results[i].fail(err)
		}
		results[i].Seconds = time.Since(began).Seconds()
	}
	return results, nil
}

// clean removes what dead copies between the two repositories, of this machine,
// have left.
func (job *Job) clean(ctx context.Context) error {
	runs, err := job.State.Runs()
	if err != nil {
		return err
	}
	for _, r := range runs {
		if r.Alive || r.Err != nil || r.Source != job.From.ID() || r.Repository != job.To.ID() {
			continue
		}
		if err := errors.Join(job.To.EndLease(ctx, r.ID), job.To.Unpin(ctx, r.ID), job.From.Unpin(ctx, r.ID)); err != nil {
			return err
		}
		if err := job.State.EndRun(r.ID); err != nil && !errors.Is(err, state.ErrLocked) {
			return err
		}
	}
	return nil
}

// Plan says what a Run would read, without changing or storing anything.
func Plan(ctx context.Context, job Job) ([]Result, error) {
	if job.From.ID() == job.To.ID() {
		return nil, ErrSame
	}
	points, err := job.From.Points(ctx)
	if err != nil {
		return nil, err
	}
	there, err := targetPoints(ctx, job.To)
	if err != nil {
		return nil, err
	}
	results := make([]Result, len(job.Points))
	for i, p := range job.Points {
		results[i] = result(p, Planned)
		if _, ok := there[p.ID]; ok {
			results[i].State = There
			continue
		}
		base := nearest(points, p, there)
		if err := plan(ctx, job.From, p, base, &results[i]); err != nil {
			results[i].fail(err)
			continue
		}
		there[p.ID] = p // for the points after it
	}
	return results, nil
}

func plan(ctx context.Context, from *repo.Repo, p repo.Point, base *repo.Point, r *Result) error {
	if base != nil {
		r.Base = base.ID
	}
	for _, d := range p.Disks {
		src, err := from.OpenDisk(ctx, d)
		if err != nil {
			return err
		}
		var before *repo.DiskReader
		if i := diskOf(base, d.ID); i >= 0 {
			if before, err = from.OpenDisk(ctx, base.Disks[i]); err != nil && !errors.Is(err, repo.ErrDamaged) {
				return err
			}
		}
		if before == nil {
			r.FullReason = joined(r.FullReason, d.ID+": "+whyNoBase(base))
		}
		n, _, err := gather(differences(ctx, src, before))
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.ID, err)
		}
		r.ReadBytes += n
	}
	for _, f := range p.Files {
		if !slices.ContainsFunc(files(base), func(b repo.File) bool { return b.Root == f.Root && b.Size == f.Size }) {
			r.ReadBytes += f.Size
		}
	}
	return nil
}

// nearest is the base for p: of the points of its history that the target has
// too, the last before it, or else the first after it; nil if there is none.
func nearest(points []repo.Point, p repo.Point, there map[repo.PointID]repo.Point) *repo.Point {
	var before, after *repo.Point
	passed := false
	for i, q := range points {
		if q.ID == p.ID {
			passed = true
			continue
		}
		if _, ok := there[q.ID]; !ok || q.History != p.History {
			continue
		}
		if !passed {
			before = &points[i]
		} else if after == nil {
			after = &points[i]
		}
	}
	if before != nil {
		return before
	}
	return after
}

// diskOf finds a disk in a point, which may be nil; -1 if it is not there.
func diskOf(p *repo.Point, id string) int {
	if p == nil {
		return -1
	}
	return slices.IndexFunc(p.Disks, func(d repo.Disk) bool { return d.ID == id })
}

func files(p *repo.Point) []repo.File {
	if p == nil {
		return nil
	}
	return p.Files
}

func whyNoBase(base *repo.Point) string {
	if base == nil {
		return "the first of its history that is copied"
	}
	return "the points copied before do not have it"
}

func joined(list, s string) string {
	if list == "" {
		return s
	}
	return list + "; " + s
}
