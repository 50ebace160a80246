package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"holdfast/internal/mover"
	"holdfast/internal/repo"
	"holdfast/internal/retention"
	"holdfast/internal/state"
)

// Forgetting is what ForgetPoints decided about one restore point.
type Forgetting struct {
	Point   repo.Point
	Keep    bool
	Reasons []string
}

// ForgetOptions of ForgetPoints.
type ForgetOptions struct {
	Rules retention.Rules
	// DryRun decides and changes nothing.
	DryRun bool
	// Now is the time, in the zone in which days are counted.
	Now time.Time
}

// clockSkew is how far in the future a point may lie before rules are refused:
// then the clock here, or that of the machine that made it, is wrong.
const clockSkew = 25 * time.Hour

// ForgetPoints drops restore points: those that are named, or those that the rules
// let go of the VM named, or, with no name, of every VM. A word is a VM if one
// has that name, else a point.
func (n *Node) ForgetPoints(ctx context.Context, words []string, o ForgetOptions) ([]Forgetting, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	all, err := r.Points(ctx)
	if err != nil {
		return nil, err
	}
	points, named, err := meant(all, words)
	if err != nil {
		return nil, err
	}
	var list []Forgetting
	switch {
	case named && !o.Rules.Empty():
		return nil, usage("rules are for VMs: name one VM, or none for all, or points without rules")
	case named:
		for _, p := range points {
			if p.Keep.Holds(o.Now) {
				return nil, fmt.Errorf("restore point %s of %s is marked to stay %s; \"holdfast keep %s --clear\" takes the mark off", p.ID, p.VM, p.Keep.In(o.Now.Location()), p.ID)
			}
			list = append(list, Forgetting{p, false, []string{"named"}})
		}
	case o.Rules.Empty():
		return nil, usage("without a rule nothing can go: say what stays, as in --keep-daily 7 --keep-weekly 4; or name restore points")
	default:
		if list, err = decide(points, o); err != nil {
			return nil, err
		}
	}
	var ids []repo.PointID
	for _, f := range list {
		if !f.Keep {
			ids = append(ids, f.Point.ID)
		}
	}
	if o.DryRun || len(ids) == 0 {
		return list, nil
	}
	return list, r.Forget(ctx, ids, o.Now)
}

// decide applies the rules; the result is in order of VM and time.
func decide(points []repo.Point, o ForgetOptions) ([]Forgetting, error) {
	items := make([]retention.Item, len(points))
	for i, p := range points {
		if p.Time.After(o.Now.Add(clockSkew)) {
			return nil, fmt.Errorf("restore point %s of %s is of %s, which is yet to come: set this machine's clock right, or forget that point by its id; until then rules cannot be trusted",
				p.ID, p.VM, p.Time.In(o.Now.Location()).Format("2006-01-02 15:04"))
		}
		items[i] = retention.Item{ID: string(p.ID), History: string(p.History), Time: p.Time}
		if p.Keep.Holds(o.Now) {
			items[i].Mark = "marked to stay " + p.Keep.In(o.Now.Location())
		}
	}
	list := make([]Forgetting, len(points))
	for i, d := range retention.Apply(o.Rules, items, o.Now) {
		list[i] = Forgetting{points[i], d.Keep, d.Reasons}
	}
	slices.SortStableFunc(list, func(a, b Forgetting) int {
		if c := strings.Compare(label(a.Point), label(b.Point)); c != 0 {
			return c
		}
		return a.Point.Time.Compare(b.Point.Time)
	})
	return list, nil
}

// meant gives the points that the words mean, and whether they were named
// one by one.
func meant(all []repo.Point, words []string) (points []repo.Point, named bool, err error) {
	if len(words) == 0 {
		return all, false, nil
	}
	seen := map[repo.PointID]bool{}
	for _, word := range words {
		mine, vmErr := ofVM(all, word)
		if vmErr != nil && !errors.Is(vmErr, repo.ErrNotExist) {
			return nil, false, vmErr
		}
		p, err := findPoint(all, word)
		switch {
		case vmErr == nil && err == nil:
			return nil, false, usage("%q is a VM and the beginning of a restore point's id; say %s for the VM, or %s for the point", word, label(mine[0]), p.ID)
		case vmErr == nil && len(words) > 1:
			return nil, false, usage("%q is a VM: name one VM, or restore points only", word)
		case vmErr == nil:
			return mine, false, nil
		case err != nil:
			return nil, false, err
		case !seen[p.ID]:
			seen[p.ID] = true
			points = append(points, p)
		}
	}
	return points, true, nil
}

// Keep marks a restore point to stay until then; "" takes the mark off.
func (n *Node) Keep(ctx context.Context, spec string, until repo.Until) (repo.Point, error) {
	p, err := n.Point(ctx, spec)
	if err != nil {
		return p, err
	}
	r, err := n.Repo(ctx)
	if err != nil {
		return p, err
	}
	p.Keep = until
	return p, r.Keep(ctx, []repo.PointID{p.ID}, until)
}

// PruneOptions of Prune.
type PruneOptions struct {
	DryRun bool
	// Wait is for how long to watch the runs that something waits for: those
	// without a sign of life in all that time are over. 0 does not wait.
	Wait time.Duration
}

// Prune frees what no restore point needs.
func (n *Node) Prune(ctx context.Context, o PruneOptions) (*repo.PruneReport, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	d, err := n.State()
	if err != nil {
		return nil, err
	}
	m := &mover.Meter{}
	end := func() {}
	defer func() { end() }()
	opts := repo.PruneOptions{DryRun: o.DryRun, Watch: o.Wait, Session: state.NewID()}
	if o.Wait <= 0 {
		opts.Watch = -1
	}
	copying := false
	opts.Report = func(step string, done, total int64) {
		switch {
		case step == "watch":
			n.o.Report.note("watching %d runs under way for a sign of life, at most %s", total, o.Wait)
		case step == "copy" && !copying:
			copying = true
			end = n.o.Report.task("rewrite packs", m)
			fallthrough
		case step == "copy":
			m.Set(done, total)
		case step == "entries" && done%1000 == 0:
			n.o.Report.note("deleted %d of %d entries of the chain that need not be read any more", done, total)
		}
	}
	if o.DryRun {
		return r.Prune(ctx, opts)
	}
	if err := n.endDead(ctx, r, d); err != nil {
		return nil, err
	}
	// In the journal, so that the next prune here knows if this one has died.
	journal, err := d.NewRun(state.RunRecord{ID: opts.Session, Started: time.Now().UTC(), Repository: r.ID()})
	if err != nil {
		return nil, err
	}
	report, err := r.Prune(ctx, opts)
	return report, errors.Join(err, journal.End())
}

// endDead ends the leases of runs of this machine whose process is dead. What
// a backup has left on a host, the next backup of that VM cleans up.
func (n *Node) endDead(ctx context.Context, r *repo.Repo, d *state.Dir) error {
	runs, err := d.Runs()
	if err != nil {
		return err
	}
	for _, run := range runs {
		if run.Alive || run.Err != nil || run.Repository != r.ID() {
			continue
		}
		if err := r.EndLease(ctx, run.ID); err != nil {
			return fmt.Errorf("end the lease of run %s, which has died: %w", run.ID, err)
		}
		if len(run.Tasks) == 0 { // of a prune
			if err := d.EndRun(run.ID); err != nil && !errors.Is(err, state.ErrLocked) {
				return err
			}
		}
	}
	return nil
}

// Unpin removes the pins of a session that is gone, given by its id or a
// prefix of at least four digits, and gives the whole id and the points.
func (n *Node) Unpin(ctx context.Context, session string) (id string, points []repo.PointID, err error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return "", nil, err
	}
	pins, err := r.Pins(ctx)
	if err != nil {
		return "", nil, err
	}
	found := map[string][]repo.PointID{}
	for p, sessions := range pins {
		for _, s := range sessions {
			if len(session) >= minPrefix && strings.HasPrefix(s, session) {
				found[s] = append(found[s], p)
			}
		}
	}
	switch len(found) {
	case 0:
		return "", nil, fmt.Errorf("no restore point is pinned by a session %q; \"holdfast show POINT\" lists a point's sessions", session)
	case 1:
	default:
		return "", nil, usage("%d sessions begin with %q; give more digits", len(found), session)
	}
	for s, p := range found {
		id, points = s, p
	}
	slices.Sort(points)
	return id, points, r.Unpin(ctx, id)
}
