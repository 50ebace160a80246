package node

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"holdfast/internal/backup"
	"holdfast/internal/hypervisor"
	"holdfast/internal/mover"
	"holdfast/internal/repo"
)

// BackupRequest says what to back up.
type BackupRequest struct {
	Host        string
	VMs         []string // names; none: all
	Consistency hypervisor.Consistency
	FreezeLimit time.Duration // 0: the default
	Live        bool
	// History continues the history of the VM of that name (or HOST/VM, or a
	// history's id) under the new identity of the one VM backed up.
	History string
}

// Backup makes one restore point per VM. A VM that is not there, like one that
// fails, does not stop the others. The error is of what failed before any VM
// was touched.
func (n *Node) Backup(ctx context.Context, q BackupRequest) (results []backup.Result, err error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	var history repo.HistoryID
	if q.History != "" {
		if history, err = n.history(ctx, q.History); err != nil {
			return nil, err
		}
	}
	s, err := n.source(ctx, q.Host)
	if err != nil {
		return nil, err
	}
	defer func() {
		if closeErr := s.Close(); closeErr != nil {
			n.o.Report.note("close the connection to %s: %v", q.Host, closeErr)
		}
	}()
	all, err := s.VMs(ctx)
	if err != nil {
		return nil, fmt.Errorf("list the VMs of %s: %w", q.Host, err)
	}
	vms, unknown, err := choose(all, q.Host, q.VMs)
	if err != nil {
		return nil, err
	}
	if history != "" && len(vms)+len(unknown) != 1 {
		return nil, usage("--history is for one VM: name it")
	}
	for _, name := range unknown {
		err := fmt.Errorf("%w on %s; \"holdfast vms %s\" lists what there is", hypervisor.ErrNotExist, q.Host, q.Host)
		results = append(results, backup.Result{VM: name, Host: q.Host, Err: err, Error: err.Error()})
	}
	if len(vms)+len(unknown) == 0 {
		return nil, fmt.Errorf("%s has no VMs: nothing was backed up", q.Host)
	}
	w := watch{report: n.o.Report}
	defer w.done()
	return append(results, backup.Run(ctx, backup.Job{
		Repo: r, Source: s, State: n.state, Host: q.Host, VMs: vms, History: history,
		Options: hypervisor.SnapshotOptions{Consistency: q.Consistency, FreezeLimit: q.FreezeLimit, Live: q.Live},
		Watch:   backup.Watch{Step: w.step, Disk: w.disk, Lock: func(string) func(done, total int64) { return n.locking() }},
	})...), nil
}

// history finds a history by a VM's name, or by its own id.
func (n *Node) history(ctx context.Context, vm string) (repo.HistoryID, error) {
	points, err := n.repo.Points(ctx)
	if err != nil {
		return "", err
	}
	for _, p := range points {
		if string(p.History) == vm {
			return p.History, nil
		}
	}
	mine, err := ofVM(points, vm)
	if err != nil {
		return "", fmt.Errorf("--history: %w", err)
	}
	return latest(mine).History, nil
}

// watch turns what backup tells into tasks of a Report: a disk's ends when
// another begins or its VM goes on to something else.
type watch struct {
	report Report

	mu  sync.Mutex // guards end
	end func()
}

func (w *watch) next(end func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.end != nil {
		w.end()
	}
	w.end = end
}

func (w *watch) done() { w.next(nil) }

func (w *watch) step(vm, what string) { w.done() }

func (w *watch) disk(vm, disk string, m *mover.Meter) {
	w.done()
	w.next(w.report.task(vm+" "+disk, m))
}

// Failed is the error of a backup in which some VMs were not backed up, or nil.
func Failed(results []backup.Result) error {
	var f failures
	for _, r := range results {
		if r.Err != nil {
			f.vms, f.errs = append(f.vms, r.VM), append(f.errs, r.Err)
		}
	}
	switch len(f.errs) {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("back up %s: %w", f.vms[0], f.errs[0])
	}
	f.of = len(results)
	return &f
}

// failures are the errors of several VMs.
type failures struct {
	vms  []string
	errs []error
	of   int
}

func (f *failures) Error() string {
	return fmt.Sprintf("%d of %d VMs were not backed up: %s; each one's reason stands in the result", len(f.vms), f.of, strings.Join(f.vms, ", "))
}

func (f *failures) Unwrap() []error { return f.errs }
