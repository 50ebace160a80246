// Package backup makes restore points: one run per VM, in the one order that
// survives a crash at any step.
//
//	lease opened → run journalled → snapshot (guest thawed at once) → packs and
//	disk maps → index objects → locks → Snapshot.Commit (new reference point) → commit
//	of the restore point, naming the reference → Snapshot.Close → old reference
//	forgotten → journal cleared
//
// A crash before the commit leaves no point, and costs the next run reading
// more; the reference that the newest point names stays until a newer point
// names another. What a dead run left on a host is found through the journal,
// and by the session id in every name, and removed before the next snapshot.
//
// A host's change map is a hint. Where it is missing, lost, or found wrong by
// the sample that every run takes of "unchanged" chunks, the disk is read
// whole and compared with the newest point, within the same history; the
// result says why.
//
// VMs are backed up one after another, or group by group where the host shares
// a snapshot among them; within a VM the disks follow one another, and each
// disk's blocks are read, hashed and compressed in parallel.
package backup

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/internal/hypervisor"
	"holdfast/internal/mover"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

// Job is what to back up, from where, to where.
type Job struct {
	Repo   *repo.Repo
	Source hypervisor.Source
	State  *state.Dir
	// Host is the source as the operator names it: it goes into the journal.
	Host string
	VMs  []hypervisor.VM
	// History continues that history instead of the VMs' own: for one VM that
	// runs under a new identity. "" for each VM's own.
	History repo.HistoryID
	Options hypervisor.SnapshotOptions
	Watch   Watch
}

// Watch is told what goes on. Any of its functions may be nil; they are
// called from one goroutine.
type Watch struct {
	// Step says what is being done for a VM.
	Step func(vm, what string)
	// Disk gives the meter of a disk that is about to be read.
	Disk func(vm, disk string, m *mover.Meter)
	// Lock gives what is told, in parallel, how many of the objects are locked
	// that a VM's point needs and that no lock keeps for long enough.
	Lock func(vm string) (report func(done, total int64))
}

// Result is what became of one VM.
type Result struct {
	VM          string       `json:"vm"`
	Host        string       `json:"host"`
	Point       repo.PointID `json:"point,omitempty"` // "" when it failed
	ReadBytes   int64        `json:"read_bytes"`
	NewBytes    int64        `json:"new_bytes"`
	StoredBytes int64        `json:"stored_bytes"`
	// FullReason says, per disk, why it was read whole; "" when changes were known.
	FullReason  string   `json:"full_reason"`
	Consistency string   `json:"consistency"`
	Seconds     float64  `json:"seconds"`
	Notes       []string `json:"notes,omitempty"`
	// Warnings are things to cure that cost this point nothing.
	Warnings []string `json:"warnings,omitempty"`
	Error    string   `json:"error,omitempty"`
	Err      error    `json:"-"`
}

// Run backs the VMs up. One VM's failure does not stop the others: there is
// one Result per VM, in the order of job.VMs, but when ctx ends the rest fails
// with its error.
func Run(ctx context.Context, job Job) []Result {
	results := make([]Result, len(job.VMs))
	place := map[hypervisor.VMID]int{}
	ids := make([]hypervisor.VMID, len(job.VMs))
	for i, vm := range job.VMs {
		results[i] = Result{VM: vm.Name, Host: job.Host}
		ids[i], place[vm.ID] = vm.ID, i
	}
	groups, err := job.Source.Plan(ctx, ids)
	if err != nil {
		for i := range results {
			results[i].fail(fmt.Errorf("plan: %w", err))
		}
		return results
	}
	for _, group := range groups {
		tasks := make([]*task, len(group))
		for i, id := range group {
			at := place[id]
			tasks[i] = &task{job: &job, vm: job.VMs[at], result: &results[at]}
		}
		job.group(ctx, tasks)
	}
	return results
}

func (r *Result) fail(err error) {
	r.Err, r.Error, r.Point = err, err.Error(), ""
}

// group takes one snapshot of VMs that share it, and backs them up in turn.
func (job *Job) group(ctx context.Context, tasks []*task) {
	var ready []*task
	var reqs []hypervisor.Request
	for _, t := range tasks {
		t.started = time.Now()
		if err := t.prepare(ctx); err != nil {
			t.finish(err)
			continue
		}
		ready = append(ready, t)
		reqs = append(reqs, t.request())
	}
	if len(ready) == 0 {
		return
	}
	for i, o := range job.Source.Snapshot(ctx, reqs, job.Options) {
		ready[i].snapshot = o.Snapshot
		if o.Err != nil {
			ready[i].finish(fmt.Errorf("snapshot: %w", o.Err))
		}
	}
	for _, t := range ready {
		if t.snapshot != nil {
			t.finish(t.run(ctx))
		}
	}
}

// task is the backup of one VM.
type task struct {
	job     *Job
	vm      hypervisor.VM
	result  *Result
	started time.Time

	session  string
	journal  *state.Run
	write    *repo.Run
	history  repo.HistoryID
	base     *repo.Point // the history's newest point; nil for the first
	snapshot hypervisor.Snapshot
}

func (t *task) step(what string) {
	if t.job.Watch.Step != nil {
		t.job.Watch.Step(t.vm.Name, what)
	}
}

func (t *task) warn(format string, args ...any) {
	t.result.Warnings = append(t.result.Warnings, fmt.Sprintf(format, args...))
}

// prepare enters the run into the journal, opens its lease, finds the history
// and cleans up after dead runs. The journal comes first: with it the next run
// finds even a lease that was opened by a call that failed.
func (t *task) prepare(ctx context.Context) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	t.session = state.NewID()
	t.journal, err = t.job.State.NewRun(state.RunRecord{
		ID: t.session, Started: t.started.UTC(), Repository: t.job.Repo.ID(),
		Tasks: []state.Task{{Host: t.job.Host, VM: t.vm.Name, VMID: string(t.vm.ID), Step: "lease"}},
	})
	if err != nil {
		return err
	}
	if t.write, err = t.job.Repo.Begin(ctx, t.session); err != nil {
		return err
	}
	points, err := t.job.Repo.Points(ctx)
	if err != nil {
		return err
	}
	t.find(points)
	if err := t.clean(ctx, points); err != nil {
		return err
	}
	return t.journal.Update(func(r *state.RunRecord) {
		r.Tasks[0].History, r.Tasks[0].Step = string(t.history), "snapshot"
	})
}

// find sets history and base: the newest point of this VM's identity tells the
// history, unless one was asked for.
func (t *task) find(points []repo.Point) {
	t.history = t.job.History
	for _, p := range slices.Backward(points) {
		if t.history == "" && p.Kind == t.vm.Kind && p.VMID == string(t.vm.ID) {
			t.history = p.History
		}
		if t.history != "" && p.History == t.history {
			t.base = &p
			return
		}
	}
	if t.history == "" {
		t.history = repo.HistoryID(repo.RandomID())
	}
}

// clean removes what dead sessions of this repository left on the VM. The
// reference points that the newest point of a history names stay.
func (t *task) clean(ctx context.Context, points []repo.Point) error {
	var keep []hypervisor.ReferencePoint
	newest := map[repo.HistoryID]bool{}
	for _, p := range slices.Backward(points) {
		if !newest[p.History] && p.Reference != "" {
			keep = append(keep, hypervisor.ReferencePoint(p.Reference))
		}
		newest[p.History] = true
	}
	dead, err := t.dead(ctx)
	if err != nil {
		return err
	}
	removed, err := t.job.Source.Clean(ctx, t.vm.ID, t.job.Repo.ID(), dead, keep)
	if err != nil {
		return fmt.Errorf("clean up after an earlier run: %w", err)
	}
	for _, what := range removed {
		t.result.Notes = append(t.result.Notes, "removed what an earlier run had left: "+what)
	}
	return t.endDeadRuns(ctx)
}

// dead gives the test of whether a session is over: not while its process
// runs, here or, as far as its lease tells, elsewhere.
func (t *task) dead(ctx context.Context) (func(session string) bool, error) {
	runs, err := t.job.State.Runs()
	if err != nil {
		return nil, err
	}
	alive := map[string]bool{}
	for _, r := range runs {
		alive[r.ID] = r.Alive
	}
	return func(session string) bool {
		if here, known := alive[session]; known {
			return !here
		}
		open, err := t.job.Repo.LeaseOpen(ctx, session)
		return err == nil && !open
	}, nil
}

// endDeadRuns clears the journal of dead runs of this VM, once cleaned up.
func (t *task) endDeadRuns(ctx context.Context) error {
	runs, err := t.job.State.Runs()
	if err != nil {
		return err
	}
	for _, r := range runs {
		if r.Alive || r.Err != nil || r.Repository != t.job.Repo.ID() || len(r.Tasks) != 1 ||
			r.Tasks[0].VMID != string(t.vm.ID) || r.Tasks[0].Host != t.job.Host {
			continue
		}
		if err := t.job.Repo.EndLease(ctx, r.ID); err != nil {
			return err
		}
		if err := t.job.State.EndRun(r.ID); err != nil && !errors.Is(err, state.ErrLocked) {
			return err
		}
	}
	return nil
}

func (t *task) request() hypervisor.Request {
	return hypervisor.Request{
		VM: t.vm.ID, Since: t.since(),
		Owner: hypervisor.Owner{Repository: t.job.Repo.ID(), History: string(t.history), Session: t.session},
	}
}

// since is the base's reference point, if it is one of this very VM.
func (t *task) since() hypervisor.ReferencePoint {
	if t.base == nil || t.base.Kind != t.vm.Kind || t.base.VMID != string(t.vm.ID) {
		return ""
	}
	return hypervisor.ReferencePoint(t.base.Reference)
}

// finish releases what the task holds and writes the result. What cannot be
// released stays in the journal, for the next run to clean up.
func (t *task) finish(err error) {
	var left []error
	if t.snapshot != nil {
		t.step("closing")
		t.closeSnapshot()
	}
	if t.write != nil {
		left = append(left, t.write.Close())
	} else if t.journal != nil { // a failed Begin may have opened its lease
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		left = append(left, t.job.Repo.EndLease(ctx, t.session))
	}
	if e := errors.Join(left...); e != nil && err == nil {
		t.warn("end of the lease: %v", e)
	}
	if t.journal != nil {
		end := t.journal.End
		if errors.Join(left...) != nil || len(t.result.Warnings) > 0 {
			end = t.journal.Abandon
		}
		if e := end(); e != nil {
			t.warn("journal: %v", e)
		}
	}
	t.result.Seconds = time.Since(t.started).Seconds()
	if err != nil {
		t.result.fail(err)
	}
}

func (t *task) closeSnapshot() {
	if err := t.snapshot.Close(); err != nil {
		t.warn("the host needs a cure, which the next run tries: %v", err)
	}
	t.snapshot = nil
}
