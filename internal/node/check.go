package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"holdfast/internal/blob"
	"holdfast/internal/mover"
	"holdfast/internal/repo"
)

// CheckRequest says what to check.
type CheckRequest struct {
	// ReadData is the percentage of the stored bytes to read, 0 for none.
	ReadData float64
	// Keyless asks for no passphrase, and proves what can be proved without.
	Keyless bool
}

func (q CheckRequest) options(m *mover.Meter) repo.CheckOptions {
	return repo.CheckOptions{ReadData: q.ReadData > 0, Percent: q.ReadData, Report: m.Set}
}

// Check proves the repository.
func (n *Node) Check(ctx context.Context, q CheckRequest) (*repo.CheckReport, error) {
	check := n.check
	if q.Keyless {
		check = n.checkKeyless
	}
	m := &mover.Meter{}
	report, err := check(ctx, q.options(m), m)
	if report != nil {
		sortProblems(report.Problems)
		sortProblems(report.Transient)
	}
	return report, err
}

func (n *Node) check(ctx context.Context, o repo.CheckOptions, m *mover.Meter) (*repo.CheckReport, error) {
	back, err := n.undelete(ctx) // before it is opened: it may not open without
	if err != nil {
		return nil, err
	}
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	path, err := n.Location()
	if err != nil {
		return nil, err
	}
	store, err := n.openStore(ctx, path)
	if err != nil {
		return nil, err
	}
	end := n.o.Report.task("check", m)
	defer end()
	caught, err := n.try(ctx, store)
	if err != nil {
		return nil, err
	}
	o.Undeleted = back
	report, err := r.Check(ctx, o)
	return withProblems(report, caught), err
}

// try tells what the store is caught at when it is tried.
func (n *Node) try(ctx context.Context, store blob.Store) ([]repo.Problem, error) {
	p, ok := blob.As[blob.Prober](store)
	if !ok {
		return nil, nil
	}
	err := p.Probe(ctx)
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return nil, err
	case errors.Is(err, blob.ErrUnfit):
		return []repo.Problem{{Object: "store", What: err.Error()}}, nil
	default: // as it must be for somebody who may only read
		n.o.Report.note("the store was not tried for what a repository needs: %v", err)
	}
	return nil, nil
}

func withProblems(r *repo.CheckReport, more []repo.Problem) *repo.CheckReport {
	if r != nil {
		r.Problems = append(r.Problems, more...)
	}
	return r
}

func (n *Node) checkKeyless(ctx context.Context, o repo.CheckOptions, m *mover.Meter) (*repo.CheckReport, error) {
	path, err := n.Location()
	if err != nil {
		return nil, err
	}
	hidden, err := n.hidden(ctx, path)
	if err != nil {
		return nil, err
	}
	if len(hidden) > 0 && hidden[0].Object == "config" {
		return &repo.CheckReport{Problems: hidden}, nil // what it would prove the rest by
	}
	store, err := n.store(ctx, path)
	if err != nil {
		return nil, err
	}
	ro, err := n.options()
	if err != nil {
		return nil, err
	}
	end := n.o.Report.task("check", m)
	defer end()
	caught, err := n.try(ctx, store)
	if err != nil {
		return nil, err
	}
	report, err := repo.CheckKeyless(ctx, store, ro.Cache, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return withProblems(report, append(caught, hidden...)), nil
}

func sortProblems(p []repo.Problem) {
	slices.SortFunc(p, func(a, b repo.Problem) int {
		return cmp.Or(cmp.Compare(a.Point, b.Point), cmp.Compare(a.What, b.What), cmp.Compare(a.Object, b.Object))
	})
}

// RepairRequest says from what to repair.
type RepairRequest struct {
	// From is another repository with the same VMs, "" for none.
	From string
	// Passphrase gives that one's passphrase, as Options.Passphrase does.
	Passphrase func(ctx context.Context, create bool) ([]byte, error)
	// Check is what to look at for damage first.
	Check CheckRequest
}

// Repair mends the repository.
func (n *Node) Repair(ctx context.Context, q RepairRequest) (*repo.RepairReport, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	looked := &mover.Meter{}
	o := repo.RepairOptions{Check: q.Check.options(looked)}
	if q.From != "" {
		from, done, err := n.from(ctx, q)
		if err != nil {
			return nil, err
		}
		defer func() {
			if closeErr := done(); closeErr != nil {
				n.o.Report.note("close %s: %v", q.From, closeErr)
			}
		}()
		o.From = from.repo
	}
	end := n.o.Report.task("check", looked)
	defer end()
	report, err := r.Repair(ctx, o)
	if err != nil {
		return nil, err
	}
	for _, p := range [][]repo.Problem{report.Check.Problems, report.Check.Transient, report.Left} {
		sortProblems(p)
	}
	return report, nil
}

// from opens the repository to repair from. It may be an older copy of this
// one's directory, so what this machine remembers of this one is not asked.
func (n *Node) from(ctx context.Context, q RepairRequest) (from *Node, done func() error, err error) {
	own, err := n.Location()
	if err != nil {
		return nil, nil, err
	}
	if theirs, err := locate(q.From); err != nil {
		return nil, nil, err
	} else if theirs == own {
		return nil, nil, usage("--from %s is the same repository: a repository cannot be repaired from itself", q.From)
	}
	d, err := n.State()
	if err != nil {
		return nil, nil, err
	}
	caches := filepath.Join(d.Path(), "cache")
	if err := os.MkdirAll(caches, 0o700); err != nil {
		return nil, nil, err
	}
	cache, err := os.MkdirTemp(caches, "from-*")
	if err != nil {
		return nil, nil, err
	}
	from, err = n.second(ctx, "from", q.From, cache, q.Passphrase)
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(cache))
	}
	return from, func() error { return errors.Join(from.Close(), os.RemoveAll(cache)) }, nil
}
