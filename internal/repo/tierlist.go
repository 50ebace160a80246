package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/tree"
)

// TierInfo is a tier with what is in it.
type TierInfo struct {
	Tier
	// Problem says why the tier cannot be used; "" when it can. What follows is
	// not known then.
	Problem string
	Packs   int   // of the inventory
	Bytes   int64 // stored bytes of those
	// Only are packs that are in no other store, OnlyBytes their stored bytes.
	Only      int
	OnlyBytes int64
	// Points are restore points that the tier alone would give back.
	Points int
	// Entry is how far the tier's copy of the chain goes.
	Entry uint64
}

// TierInfos looks into all tiers. What makes one of them unusable is told in
// its Problem.
func (r *Repo) TierInfos(ctx context.Context) ([]TierInfo, error) {
	if err := r.refresh(ctx); err != nil {
		return nil, err
	}
	s := r.current()
	held, err := r.held(ctx, s)
	if errors.Is(err, errMoved) {
		return r.TierInfos(ctx)
	} else if err != nil {
		return nil, err
	}
	stores, problems, err := r.listAll(ctx, s)
	if err != nil {
		return nil, err
	}
	infos := []TierInfo{}
	for i, t := range s.Tiers {
		info := TierInfo{Tier: t}
		if problems[i] != nil {
			info.Problem = problems[i].Error()
			infos = append(infos, info)
			continue
		}
		for name, k := range held {
			if size, ok := stores[i+1][name]; !ok || size != k.size {
				continue
			}
			info.Packs++
			info.Bytes += k.size
			if !elsewhere(stores, i+1, name, k.size) {
				info.Only++
				info.OnlyBytes += k.size
			}
		}
		if err := r.countWhole(ctx, s, &info, held, stores[i+1]); err != nil {
			return nil, err
		}
		infos = append(infos, info)
	}
	return infos, nil
}

// listAll lists the packs of the own store and of each tier, in that order. A
// tier that cannot be listed has a problem.
func (r *Repo) listAll(ctx context.Context, s *chain.State) (stores []map[[32]byte]int64, problems []error, err error) {
	own, err := listSizes(ctx, r.tiers.Own())
	if err != nil {
		return nil, nil, err
	}
	stores = append(stores, own)
	for _, t := range s.Tiers {
		if t.Name == r.mirrorOf {
			stores, problems = append(stores, own), append(problems, nil)
			continue
		}
		far, err := r.tiers.At(ctx, t.Name)
		if err == nil && r.mirrorOf == "" {
			err = r.sound(ctx, t.Name, far)
		}
		var there map[[32]byte]int64
		if err == nil {
			there, err = listSizes(ctx, far)
		}
		if ctx.Err() != nil {
			return nil, nil, ctx.Err()
		}
		stores, problems = append(stores, there), append(problems, err)
	}
	return stores, problems, nil
}

func elsewhere(stores []map[[32]byte]int64, but int, name [32]byte, size int64) bool {
	for i, there := range stores {
		if n, ok := there[name]; i != but && ok && n == size {
			return true
		}
	}
	return false
}

// countWhole counts the points that a tier alone would give back: their entry is
// in its mirror, and each item lies in a pack that is there and listed there.
func (r *Repo) countWhole(ctx context.Context, s *chain.State, info *TierInfo, held map[[32]byte]heldPack, there map[[32]byte]int64) error {
	far := r.tiers.Own()
	if info.Name != r.mirrorOf {
		var err error
		if far, err = r.tiers.At(ctx, info.Name); err != nil {
			return err
		}
	}
	var err error
	if info.Entry, err = chain.Last(ctx, far); err != nil || info.Entry == 0 {
		return err
	}
	indexes, err := blob.Names(ctx, far, "index/")
	if err != nil {
		return err
	}
	listed := map[[32]byte]bool{} // packs
	for d := range s.Indexes {
		if _, ok := slices.BinarySearch(indexes, index.Name(d)); !ok {
			continue
		}
		packs, err := r.readIndex(ctx, d)
		if err != nil {
			return err
		}
		for _, k := range packs {
			size, ok := there[k.Name]
			listed[k.Name] = ok && size == k.Size && held[k.Name].size == k.Size
		}
	}
	w := &wholes{r: r, listed: listed, nodes: map[tree.ID]bool{}}
	for _, p := range s.Points {
		whole := s.Committed[p.ID] <= info.Entry
		for _, m := range mapsOf(&p) {
			if !whole {
				break
			}
			root, err := tree.ParseRoot(string(m.root), m.size)
			if err != nil {
				return err
			}
			if whole, err = w.node(ctx, root.ID, root.Levels-1); err != nil {
				return err
			}
		}
		if whole {
			info.Points++
		}
	}
	return nil
}

// wholes tells whether all below a map node lies in some packs.
type wholes struct {
	r      *Repo
	listed map[[32]byte]bool
	nodes  map[tree.ID]bool
}

func (w *wholes) has(id tree.ID) (bool, error) {
	places, err := w.r.places(id)
	for _, p := range places {
		if w.listed[p.Pack] {
			return true, err
		}
	}
	return false, err
}

func (w *wholes) node(ctx context.Context, id tree.ID, level int) (whole bool, err error) {
	if id == (tree.ID{}) {
		return true, nil
	}
	if whole, ok := w.nodes[id]; ok {
		return whole, nil
	}
	if whole, err = w.has(id); err != nil || !whole {
		return false, err
	}
	n, err := w.r.node(ctx, id, level)
	if errors.Is(err, ErrDamaged) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	for _, child := range n.Children {
		if child == (tree.ID{}) {
			continue
		}
		if level > 0 {
			whole, err = w.node(ctx, child, level-1)
		} else {
			whole, err = w.has(child)
		}
		if err != nil {
			return false, err
		} else if !whole {
			break
		}
	}
	w.nodes[id] = whole
	return whole, nil
}

// RemoveTierOptions of RemoveTier.
type RemoveTierOptions struct {
	Session string // of the lease, as for Begin; "" makes one up
	// Force removes it though packs are only there: what they hold is lost then.
	Force  bool
	DryRun bool
	Watch  time.Duration // as in MoveOptions
}

// TierRemoval is what RemoveTier found and did.
type TierRemoval struct {
	Tier     string   `json:"tier"`
	Location string   `json:"location"`
	DryRun   bool     `json:"dry_run"`
	Only     int      `json:"only_packs"` // that are nowhere else
	Bytes    int64    `json:"only_bytes"`
	Revoked  []string `json:"revoked"`
}

// RemoveTier takes a tier out of the repository; the store itself is not
// touched, and need not be reached. With packs that are only there it fails
// with ErrOnlyThere.
func (r *Repo) RemoveTier(ctx context.Context, name string, o RemoveTierOptions) (*TierRemoval, error) {
	if r.mirrorOf != "" {
		return nil, r.isMirror
	}
	if err := r.refresh(ctx); err != nil {
		return nil, err
	}
	t := r.current().Tier(name)
	if t == nil {
		return nil, fmt.Errorf("%q: %w", name, ErrNoTier)
	}
	removal := &TierRemoval{Tier: name, Location: t.Location, DryRun: o.DryRun, Revoked: []string{}}
	if err := r.onlyThere(ctx, name, removal); err != nil {
		return nil, err
	}
	if removal.Only > 0 && !o.Force {
		return removal, ErrOnlyThere
	} else if o.DryRun {
		return removal, nil
	}
	if o.Session == "" {
		o.Session = RandomID()
	}
	run, err := r.begin(ctx, o.Session, name)
	if err != nil {
		return nil, err
	}
	err = r.remove(ctx, run, name, o, removal)
	return removal, errors.Join(err, run.Close())
}

// remove does it: with nobody left who moves packs there, what is only there
// becomes no more.
func (r *Repo) remove(ctx context.Context, run *Run, name string, o RemoveTierOptions, removal *TierRemoval) error {
	if err := r.turn(ctx, run, name, true, o.Watch, &removal.Revoked); err != nil {
		return err
	}
	if err := r.onlyThere(ctx, name, removal); err != nil {
		return err
	}
	if removal.Only > 0 && !o.Force {
		return ErrOnlyThere
	}
	return r.changeTiers(ctx, func(tiers []Tier) ([]Tier, error) {
		n := len(tiers)
		if tiers = slices.DeleteFunc(tiers, func(t Tier) bool { return t.Name == name }); len(tiers) == n {
			return nil, errNothing
		}
		for _, t := range r.current().Tiers {
			if t.Name == name && !t.Back {
				return nil, ErrBusy
			}
		}
		return tiers, nil
	})
}

// onlyThere counts the packs of the inventory that no other store lists.
func (r *Repo) onlyThere(ctx context.Context, name string, removal *TierRemoval) error {
	s := r.current()
	held, err := r.held(ctx, s)
	if errors.Is(err, errMoved) {
		return r.onlyThere(ctx, name, removal)
	} else if err != nil {
		return err
	}
	own, err := listSizes(ctx, r.tiers.Own())
	if err != nil {
		return err
	}
	stores := []map[[32]byte]int64{own}
	for _, t := range s.Tiers {
		if t.Name == name {
			continue
		}
		var far blob.Store
		if far, err = r.tiers.At(ctx, t.Name); err != nil {
			return err
		}
		there, err := listSizes(ctx, far)
		if err != nil {
			return fmt.Errorf("tier %s: %w", t.Name, err)
		}
		stores = append(stores, there)
	}
	removal.Only, removal.Bytes = 0, 0
	for name, k := range held {
		if !elsewhere(stores, -1, name, k.size) {
			removal.Only++
			removal.Bytes += k.size
		}
	}
	return nil
}
