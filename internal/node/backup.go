package node

import (
	"context"
	"errors"
	"fmt"
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

// Backup makes one restore point per VM. The error is of what failed before
// any VM was touched.
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
	vms, err := choose(all, q.Host, q.VMs)
	if err != nil {
		return nil, err
	}
	if history != "" && len(vms) != 1 {
		return nil, usage("--history is for one VM: name it")
	}
	if len(vms) == 0 {
		return nil, fmt.Errorf("%s has no VMs: nothing was backed up", q.Host)
	}
	w := watch{report: n.o.Report}
	defer w.done()
	return backup.Run(ctx, backup.Job{
		Repo: r, Source: s, State: n.state, Host: q.Host, VMs: vms, History: history,
		Options: hypervisor.SnapshotOptions{Consistency: q.Consistency, FreezeLimit: q.FreezeLimit, Live: q.Live},
		Watch:   backup.Watch{Step: w.step, Disk: w.disk},
	}), nil
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

// Failed joins the errors of the VMs that were not backed up.
func Failed(results []backup.Result) error {
	var errs []error
	for _, r := range results {
		if r.Err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", r.VM, r.Err))
		}
	}
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("back up %w", errs[0])
	}
	return fmt.Errorf("%d of %d VMs were not backed up: %w", len(errs), len(results), errors.Join(errs...))
}
