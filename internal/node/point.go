package node

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"holdfast/internal/repo"
)

// minPrefix is how many digits of a restore point's id are needed.
const minPrefix = 4

// label is how an operator tells a VM from others of its name.
func label(p repo.Point) string { return p.Host + "/" + p.VM }

// Points lists the restore points of a VM (its name, or HOST/VM), of all VMs
// when vm is "", oldest first.
func (n *Node) Points(ctx context.Context, vm string) ([]repo.Point, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	points, err := r.Points(ctx)
	if err != nil {
		return nil, err
	}
	if vm != "" {
		if points, err = ofVM(points, vm); err != nil {
			return nil, err
		}
	}
	slices.SortStableFunc(points, func(a, b repo.Point) int { return a.Time.Compare(b.Time) })
	return points, nil
}

// ofVM picks the points of one VM. On one host a name means one VM at a time:
// a VM that was made anew under its old name continues there. The same name on
// two hosts is ambiguous. A VM that was renamed is found by its former names
// too, when no other has them now.
func ofVM(points []repo.Point, vm string) ([]repo.Point, error) {
	newest := map[repo.HistoryID]repo.Point{}
	for _, p := range points {
		newest[p.History] = p
	}
	is := func(p repo.Point) bool { return p.VM == vm || label(p) == vm }
	histories := map[repo.HistoryID]bool{}
	labels := map[string]bool{}
	take := func(now repo.Point, match bool) {
		if match {
			histories[now.History] = true
			labels[label(now)] = true
		}
	}
	for _, p := range newest {
		take(p, is(p))
	}
	if len(histories) == 0 {
		for _, p := range points {
			take(newest[p.History], is(p))
		}
	}
	switch len(labels) {
	case 0:
		return nil, fmt.Errorf("%w: there is none of a VM %q; \"holdfast points\" lists what there is", repo.ErrNotExist, vm)
	case 1:
		return slices.DeleteFunc(slices.Clone(points), func(p repo.Point) bool { return !histories[p.History] }), nil
	}
	var choices []string
	for l := range labels {
		choices = append(choices, l)
	}
	slices.Sort(choices)
	return nil, usage("several VMs are named %q; say which: %s", vm, strings.Join(choices, ", "))
}

// Point finds a restore point by its id, an unambiguous prefix of one of at
// least four digits, VM@latest or HOST/VM@latest.
func (n *Node) Point(ctx context.Context, spec string) (repo.Point, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return repo.Point{}, err
	}
	points, err := r.Points(ctx)
	if err != nil {
		return repo.Point{}, err
	}
	return findPoint(points, spec)
}

func findPoint(points []repo.Point, spec string) (repo.Point, error) {
	if vm, when, ok := cutLast(spec, "@"); ok {
		if when != "latest" {
			return repo.Point{}, usage("restore point %q: after the @ comes \"latest\"", spec)
		}
		mine, err := ofVM(points, vm)
		if err != nil {
			return repo.Point{}, err
		}
		return latest(mine), nil
	}
	var found []repo.Point
	for _, p := range points {
		if spec != "" && strings.HasPrefix(string(p.ID), spec) {
			found = append(found, p)
		}
	}
	switch {
	case len(found) > 0 && len(spec) < minPrefix:
		return repo.Point{}, usage("restore point %q: give at least %d digits of its id", spec, minPrefix)
	case len(found) > 1:
		ids := make([]string, len(found))
		for i, p := range found {
			ids[i] = string(p.ID)
		}
		return repo.Point{}, usage("restore point %q is ambiguous; say which: %s", spec, strings.Join(ids, ", "))
	case len(found) == 0 && slices.ContainsFunc(points, func(p repo.Point) bool { return p.VM == spec || label(p) == spec }):
		return repo.Point{}, usage("%q is a VM: its newest restore point is %s@latest, \"holdfast points %s\" lists all", spec, spec, spec)
	case len(found) == 0:
		return repo.Point{}, fmt.Errorf("%w: %q is neither the beginning of an id nor VM@latest; \"holdfast points\" lists what there is", repo.ErrNotExist, spec)
	}
	return found[0], nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// latest is the newest of points, which are in the order of their commits.
func latest(points []repo.Point) repo.Point {
	best := points[0]
	for _, p := range points[1:] {
		if !p.Time.Before(best.Time) {
			best = p
		}
	}
	return best
}

// Pinned gives the sessions that run from a restore point.
func (n *Node) Pinned(ctx context.Context, id repo.PointID) ([]string, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	pins, err := r.Pins(ctx)
	if err != nil {
		return nil, err
	}
	return pins[id], nil
}

// ReadFile returns a piece of a restore point's configuration by its name.
func (n *Node) ReadFile(ctx context.Context, p repo.Point, name string) ([]byte, error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(p.Files))
	for i, f := range p.Files {
		if f.Name == name {
			return r.ReadFile(ctx, f)
		}
		names[i] = f.Name
	}
	if len(names) == 0 {
		return nil, fmt.Errorf("restore point %s has no configuration files", p.ID)
	}
	return nil, fmt.Errorf("restore point %s has no file %q; it has %s", p.ID, name, strings.Join(names, ", "))
}
