package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"holdfast/internal/mover"
	"holdfast/internal/replica"
	"holdfast/internal/repo"
)

// CopyRequest says what to copy, and where to.
type CopyRequest struct {
	// To is the second repository, written as Options.Repo is.
	To string
	// Passphrase gives that one's passphrase, as Options.Passphrase does.
	Passphrase func(ctx context.Context, create bool) ([]byte, error)
	// What names VMs and restore points; none: all points.
	What     []string
	ReadBack repo.ReadBack // of what is sent
	DryRun   bool
}

// Copy copies restore points that the other repository lacks to it, the oldest
// first. What is not there, and what fails, does not stop the others. The error is of what
// failed before any point was touched.
func (n *Node) Copy(ctx context.Context, q CopyRequest) ([]replica.Result, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	points, err := r.Points(ctx)
	if err != nil {
		return nil, err
	}
	named, results, err := choosePoints(points, q.What)
	if err != nil {
		return nil, err
	}
	other, err := n.other(ctx, q)
	if err != nil {
		return nil, err
	}
	defer func() {
		if closeErr := other.Close(); closeErr != nil {
			n.o.Report.note("close %s: %v", q.To, closeErr)
		}
	}()
	job := replica.Job{From: r, To: other.repo, State: n.state, ReadBack: q.ReadBack, Watch: replica.Watch{
		Disk: func(p repo.Point, disk string, m *mover.Meter) func() {
			return n.o.Report.task(fmt.Sprintf("%s %.8s %s", p.VM, p.ID, disk), m)
		}}}
	missing, forgotten, err := replica.Missing(ctx, job.From, job.To)
	if errors.Is(err, replica.ErrSame) {
		return nil, usage("--to %s: %w: a second copy needs one of its own, made by \"holdfast init\"", q.To, err)
	} else if err != nil {
		return nil, err
	}
	isMissing := func(p repo.Point) bool {
		return slices.ContainsFunc(missing, func(m repo.Point) bool { return m.ID == p.ID })
	}
	left := 0
	for _, p := range points {
		switch why, ok := named[p.ID]; {
		case !ok && len(q.What) > 0:
		case why == byID, isMissing(p):
			job.Points = append(job.Points, p)
		case slices.ContainsFunc(forgotten, func(f repo.Point) bool { return f.ID == p.ID }):
			left++
		}
	}
	if left > 0 {
		n.o.Report.note("restore points that %s has forgotten, and that are copied only when they are named: %d", q.To, left)
	}
	do := replica.Run
	if q.DryRun {
		do = replica.Plan
	}
	done, err := do(ctx, job)
	return append(results, done...), err
}

// other opens the second repository.
func (n *Node) other(ctx context.Context, q CopyRequest) (*Node, error) {
	if q.To == "" {
		return nil, usage("no repository to copy to: name it with --to")
	}
	other, err := n.second(ctx, "to", q.To, "", q.Passphrase)
	if errors.Is(err, repo.ErrNotRepository) {
		return nil, fmt.Errorf("%w, or make one there with \"holdfast init --repo %s\"", err, q.To)
	}
	return other, err
}

// second opens another repository, which that flag names. cache is where, "" for
// the state directory's.
func (n *Node) second(ctx context.Context, flag, location, cache string, passphrase func(context.Context, bool) ([]byte, error)) (*Node, error) {
	o := n.o
	o.Repo, o.Passphrase = location, passphrase
	second := &Node{o: o, state: n.state, cache: cache}
	_, err := second.Repo(ctx)
	switch env := "HOLDFAST_" + strings.ToUpper(flag) + "_PASSPHRASE"; {
	case errors.Is(err, repo.ErrPassphrase):
		return nil, fmt.Errorf("--%s: %w; check %s or %s_FILE, or type it again", flag, err, env, env)
	case errors.Is(err, repo.ErrNotRepository):
		return nil, fmt.Errorf("--%s: %w; check --%s", flag, err, flag)
	case err != nil:
		return nil, fmt.Errorf("--%s: %w", flag, err)
	}
	return second, nil
}

// How a point was chosen.
type chosen int

const (
	ofItsVM chosen = iota + 1
	byID
)

// choosePoints picks the points that words name. A word is a VM if one has that
// name, else a point. Words that name nothing become failed results.
func choosePoints(points []repo.Point, words []string) (map[repo.PointID]chosen, []replica.Result, error) {
	picked := map[repo.PointID]chosen{}
	var failed []replica.Result
	for _, word := range words {
		mine, vmErr := ofVM(points, word)
		p, pointErr := findPoint(points, word)
		var wrong *UsageError
		switch {
		case vmErr == nil && pointErr == nil:
			return nil, nil, usage("%q is a VM, and the beginning of the id of restore point %s; say %s, or more digits", word, p.ID, label(latest(mine)))
		case vmErr == nil:
			for _, p := range mine {
				picked[p.ID] = max(picked[p.ID], ofItsVM)
			}
		case errors.As(vmErr, &wrong):
			return nil, nil, vmErr
		case pointErr == nil:
			picked[p.ID] = byID
		case errors.As(pointErr, &wrong):
			return nil, nil, pointErr
		default:
			err := fmt.Errorf("%w: %q is neither a VM nor the beginning of an id; \"holdfast points\" lists what there is", repo.ErrNotExist, word)
			failed = append(failed, replica.Result{VM: word, State: replica.Failed, Err: err, Error: err.Error()})
		}
	}
	return picked, failed, nil
}

// CopyFailed is the error of a copy of which some points failed, or nil.
func CopyFailed(results []replica.Result) error {
	var which []string
	var errs []error
	for _, r := range results {
		if r.Err != nil {
			name := r.VM
			if r.Point != "" {
				name = fmt.Sprintf("%.8s of %s", r.Point, r.VM)
			}
			which, errs = append(which, name), append(errs, r.Err)
		}
	}
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("copy %s: %w", which[0], errs[0])
	}
	return &copyFailures{which, errs, len(results)}
}

type copyFailures struct {
	which []string
	errs  []error
	of    int
}

func (f *copyFailures) Error() string {
	return fmt.Sprintf("%d of %d restore points were not copied: %s; each one's reason stands in the result", len(f.errs), f.of, strings.Join(f.which, ", "))
}

func (f *copyFailures) Unwrap() []error { return f.errs }
