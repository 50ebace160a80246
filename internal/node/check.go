package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

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
	end := n.o.Report.task("check", m)
	defer end()
	o.Undeleted = back
	return r.Check(ctx, o)
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
	report, err := repo.CheckKeyless(ctx, store, ro.Cache, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	report.Problems = append(report.Problems, hidden...)
	return report, nil
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
		from, err := n.from(ctx, q)
		if err != nil {
			return nil, err
		}
		defer func() {
			if closeErr := from.Close(); closeErr != nil {
				n.o.Report.note("close %s: %v", q.From, closeErr)
			}
		}()
		if o.From = from.repo; o.From.ID() == r.ID() {
			return nil, usage("--from %s is the same repository: a repository cannot be repaired from itself", q.From)
		}
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

// from opens the repository to repair from.
func (n *Node) from(ctx context.Context, q RepairRequest) (*Node, error) {
	o := n.o
	o.Repo, o.Passphrase = q.From, q.Passphrase
	from := &Node{o: o, state: n.state}
	if _, err := from.Repo(ctx); errors.Is(err, repo.ErrPassphrase) {
		return nil, fmt.Errorf("--from: %w; check HOLDFAST_FROM_PASSPHRASE or HOLDFAST_FROM_PASSPHRASE_FILE, or type it again", err)
	} else if errors.Is(err, repo.ErrNotRepository) {
		return nil, fmt.Errorf("--from: %w; check --from", err)
	} else if err != nil {
		return nil, fmt.Errorf("--from: %w", err)
	}
	return from, nil
}
