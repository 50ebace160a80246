package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo"
)

// Immutable tells the repository's rule on immutability.
func (n *Node) Immutable(ctx context.Context) (repo.Immutability, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return repo.Immutability{}, err
	}
	return r.Immutable(ctx)
}

// SetImmutable sets it, and locks what restore points need. Mode "" is that of
// the rule before, else governance.
func (n *Node) SetImmutable(ctx context.Context, rule repo.Immutability) (repo.Immutability, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return rule, err
	}
	was, err := r.Immutable(ctx)
	if err != nil {
		return rule, err
	}
	if rule.Mode == "" {
		rule.Mode = was.Mode
	}
	if rule.Mode == "" {
		rule.Mode = blob.Governance.String()
	}
	if err := r.SetImmutable(ctx, rule, n.locking()); err != nil {
		return rule, err
	}
	return r.Immutable(ctx)
}

// locking gives a function that tells now and then how many objects are locked.
// It is called in parallel.
func (n *Node) locking() func(done, total int64) {
	began := time.Now()
	told := make(chan time.Time, 1)
	told <- began
	return func(done, total int64) {
		last := <-told
		if now := time.Now(); now.Sub(last) > 10*time.Second {
			last = now
			left := time.Duration(float64(now.Sub(began)) / float64(done) * float64(total-done))
			n.o.Report.note("locked %d of %d objects, about %s left", done, total, left.Round(time.Second))
		}
		told <- last
	}
}

// undelete brings back what somebody has deleted or overwritten in the
// repository's store, if that keeps it. It needs no passphrase.
func (n *Node) undelete(ctx context.Context) ([]repo.Undeleted, error) {
	path, err := n.Location()
	if err != nil {
		return nil, err
	}
	store, err := n.openStore(ctx, path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // whoever opens it says so
	} else if err != nil {
		return nil, fmt.Errorf("open the repository: %w", err)
	}
	back, err := repo.Undelete(ctx, store)
	if errors.Is(err, repo.ErrNotRepository) {
		return nil, nil
	} else if ctx.Err() != nil {
		return nil, err
	} else if err != nil {
		n.o.Report.note("warning: whether somebody has deleted or overwritten something is not known: %v", err)
	}
	for i, u := range back {
		if i == 10 {
			n.o.Report.note("… and %d more", len(back)-i)
			break
		}
		n.o.Report.note("%s was %s by somebody, and is back", u.Object, u.What)
	}
	return back, nil
}

// hidden lists what undelete would bring back, as problems.
func (n *Node) hidden(ctx context.Context, location string) ([]repo.Problem, error) {
	store, err := n.openStore(ctx, location)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // whoever opens it says so
	} else if err != nil {
		return nil, fmt.Errorf("open the repository: %w", err)
	}
	list, err := repo.FindHidden(ctx, store)
	if ctx.Err() != nil {
		return nil, err
	} else if err != nil && !errors.Is(err, repo.ErrNotRepository) {
		n.o.Report.note("warning: whether somebody has deleted or overwritten something is not known: %v", err)
	}
	var problems []repo.Problem
	for _, u := range list {
		problems = append(problems, repo.Problem{Object: u.Object, What: u.What + " by somebody; \"holdfast check\" with the passphrase brings it back"})
	}
	return problems, nil
}
