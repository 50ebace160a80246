package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/mover"
	"holdfast/internal/repo"
	"holdfast/internal/retention"
	"holdfast/internal/state"
)

// anyAge is the policy of a tier to which everything goes.
const anyAge = "0"

// TierRequest is a tier to add, or to change.
type TierRequest struct {
	Name      string
	Location  string // written as Options.Repo is
	OlderThan string // a period as 14d, or "0"
	Copy      bool
}

// AddTier adds a store to the repository, or changes the location or policy of
// the tier of that name.
func (n *Node) AddTier(ctx context.Context, q TierRequest) (t repo.Tier, err error) {
	if _, err := before(q.OlderThan, time.Now()); err != nil {
		return t, err
	}
	own, err := n.Location()
	if err != nil {
		return t, err
	}
	location, err := locate(q.Location)
	if err != nil {
		return t, err
	}
	if location == own {
		return t, usage("tier %s: %s is where the repository itself is", q.Name, location)
	}
	t = repo.Tier{Name: q.Name, Location: location, OlderThan: q.OlderThan, Copy: q.Copy}
	r, err := n.Repo(ctx)
	if err != nil {
		return t, err
	}
	store, err := n.makeStore(ctx, location)
	if err == nil {
		err = r.AddTier(ctx, t, store)
	}
	if err != nil {
		return t, fmt.Errorf("add the tier %s: %w", location, err)
	}
	return t, nil
}

// makeStore opens the store at a location, made if it is a directory that is
// not there, and sees that it can be written to.
func (n *Node) makeStore(ctx context.Context, location string) (blob.Store, error) {
	if !onS3(location) {
		s, err := blob.CreateDir(location)
		if err != nil {
			return nil, err
		}
		return blob.Limit(s, n.o.Rates), nil
	}
	s, err := n.openS3(ctx, location)
	if err != nil {
		return nil, err
	}
	return blob.Limit(s, n.o.Rates), s.Probe(ctx)
}

// before gives the time before which packs have to be made to be older than a
// period.
func before(period string, now time.Time) (time.Time, error) {
	if period == anyAge {
		return now.AddDate(100, 0, 0), nil // whatever the clocks of other machines say
	}
	p, err := retention.ParsePeriod(period)
	if err != nil {
		return now, usage("--older-than: %w, or 0", err)
	}
	return p.Before(now), nil
}

// Tiers tells what is in the tiers. mirror is the name of the tier that the
// repository was opened in, "" when it is in its own store.
func (n *Node) Tiers(ctx context.Context) (infos []repo.TierInfo, mirror string, err error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, "", err
	}
	infos, err = r.TierInfos(ctx)
	return infos, r.Mirror(), err
}

// TierNames gives the names of the tiers, reachable or not.
func (n *Node) TierNames(ctx context.Context) (names []string, err error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	tiers, err := r.Tiers(ctx)
	for _, t := range tiers {
		names = append(names, t.Name)
	}
	return names, err
}

// MoveRequest says what to move.
type MoveRequest struct {
	Tier      string // "" for all that are not being emptied
	OlderThan string // in place of the tier's policy; "" for that
	Copy      bool   // leave packs in the own store whatever the policy says
	Back      bool   // empty the tier
	DryRun    bool
	ReadBack  repo.ReadBack
	// Wait is for how long to watch runs that move packs the other way; 0 does
	// not wait.
	Wait time.Duration
}

// Move moves packs to tiers, or back. The reports are of what was done, also
// when it fails.
func (n *Node) Move(ctx context.Context, q MoveRequest) ([]*repo.MoveReport, error) {
	if q.Back && (q.Tier == "" || q.OlderThan != "" || q.Copy) {
		return nil, usage("--back empties one tier: name it, without --older-than and --copy")
	}
	if q.OlderThan != "" {
		if _, err := before(q.OlderThan, time.Now()); err != nil {
			return nil, err
		}
	}
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	tiers, err := r.Tiers(ctx)
	if err != nil {
		return nil, err
	}
	var reports []*repo.MoveReport
	found := false
	for _, t := range tiers {
		if q.Tier != "" && t.Name != q.Tier {
			continue
		}
		found = true
		if q.Tier == "" && t.Back {
			n.o.Report.note("tier %s is being emptied, and left alone: \"holdfast tier move %s\" fills it again", t.Name, t.Name)
			continue
		}
		report, err := n.moveTier(ctx, r, t, q)
		if report != nil {
			reports = append(reports, report)
		}
		if err != nil {
			return reports, err
		}
	}
	if !found && q.Tier != "" {
		return nil, fmt.Errorf("%q: %w", q.Tier, repo.ErrNoTier)
	}
	return reports, nil
}

func (n *Node) moveTier(ctx context.Context, r *repo.Repo, t repo.Tier, q MoveRequest) (*repo.MoveReport, error) {
	o := repo.MoveOptions{Copy: q.Copy || t.Copy, Back: q.Back, DryRun: q.DryRun, ReadBack: q.ReadBack, Watch: q.Wait}
	if q.Wait <= 0 {
		o.Watch = -1
	}
	if !q.Back {
		period := t.OlderThan
		if q.OlderThan != "" {
			period = q.OlderThan
		}
		var err error
		if o.Before, err = before(period, time.Now()); err != nil {
			return nil, err
		}
	}
	m := &mover.Meter{}
	end := n.o.Report.task("tier "+t.Name, m)
	defer end()
	o.Report = m.Set
	if q.DryRun {
		return r.Move(ctx, t.Name, o)
	}
	var report *repo.MoveReport
	err := n.journalled(ctx, r, func(session string) (err error) {
		o.Session = session
		report, err = r.Move(ctx, t.Name, o)
		return err
	})
	return report, err
}

// journalled does work that holds a lease, under a session that the next prune
// or tier command of this machine ends if this process dies.
func (n *Node) journalled(ctx context.Context, r *repo.Repo, do func(session string) error) error {
	d, err := n.State()
	if err != nil {
		return err
	}
	if r.Mirror() == "" {
		if err := n.endDead(ctx, r, d); err != nil {
			return err
		}
	}
	session := state.NewID()
	journal, err := d.NewRun(state.RunRecord{ID: session, Started: time.Now().UTC(), Repository: r.ID()})
	if err != nil {
		return err
	}
	return errors.Join(do(session), journal.End())
}

// RemoveTierRequest says which tier to remove.
type RemoveTierRequest struct {
	Name     string
	Force    bool // though packs are only there; with TakeOver, though another tier has, or may have, more
	TakeOver bool // the repository was opened in it, and goes on there
	DryRun   bool
	Wait     time.Duration // as in MoveRequest
}

// RemoveTier takes a tier out of the repository. What lies there stays.
func (n *Node) RemoveTier(ctx context.Context, q RemoveTierRequest) (*repo.TierRemoval, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	if q.TakeOver {
		return n.takeOver(ctx, r, q)
	}
	o := repo.RemoveTierOptions{Force: q.Force, DryRun: q.DryRun, Watch: q.Wait}
	if q.Wait <= 0 {
		o.Watch = -1
	}
	var removal *repo.TierRemoval
	remove := func(session string) (err error) {
		o.Session = session
		removal, err = r.RemoveTier(ctx, q.Name, o)
		if errors.Is(err, repo.ErrOnlyThere) {
			err = fmt.Errorf("tier %s: %d %w, and restore points need them: \"holdfast tier move %s --back\" brings them back first; or, if the tier is lost, --force gives up what is in them",
				q.Name, removal.Only, repo.ErrOnlyThere, q.Name)
		}
		return err
	}
	if q.DryRun || r.Mirror() != "" {
		return removal, remove("")
	}
	err = n.journalled(ctx, r, remove)
	return removal, err
}

func (n *Node) takeOver(ctx context.Context, r *repo.Repo, q RemoveTierRequest) (*repo.TierRemoval, error) {
	location, err := n.Location()
	if err != nil {
		return nil, err
	}
	if r.Mirror() != q.Name {
		return nil, usage("--take-over is for a repository that was opened in its tier %s: name that with --repo", q.Name)
	}
	removal := &repo.TierRemoval{Tier: q.Name, Location: location, DryRun: q.DryRun, Revoked: []string{}}
	if q.DryRun {
		return removal, nil
	}
	return removal, r.TakeOver(ctx, q.Force)
}
