package repo

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/seal"
)

// Tiers are other stores that hold packs of the repository (docs/format.md
// §6.5). Which there are stands in the chain; where a pack lies stands nowhere,
// and blob.Tiers finds it. What moves packs is in move.go, what makes a tier
// open as a repository in mirror.go, and what prune owes to tiers in heirs.go.

const (
	packsPrefix = "packs/"
	// tierName is the object that makes a store a tier.
	tierName = "tier"
)

var (
	// ErrTierExists: a tier of that name, or at that location, is there.
	ErrTierExists = errors.New("there is such a tier already")
	ErrNoTier     = errors.New("no such tier")
	// ErrForked: what lies in a tier is of another repository, or it went on as
	// a repository of its own.
	ErrForked = errors.New("the tier does not belong to this repository as it is")
	// ErrMirror: the repository was opened in a tier of it, where nothing is
	// written.
	ErrMirror = errors.New("this store is a tier of the repository")
	// ErrBusy: runs under way move packs the other way.
	ErrBusy = errors.New("packs are being moved the other way")
	// ErrOnlyThere: a tier holds what is nowhere else.
	ErrOnlyThere = errors.New("packs are only in this tier")
)

// attach makes the stores of the state's tiers be looked into.
func (r *Repo) attach(s *chain.State) {
	var tiers []blob.Tier
	for _, t := range s.Tiers {
		if t.Name == r.mirrorOf {
			continue // it is the own store
		}
		tiers = append(tiers, blob.Tier{Name: t.Name, Location: t.Location, Open: func(ctx context.Context) (blob.Store, error) {
			if r.openTier == nil {
				return nil, errors.New("nothing here opens tiers")
			}
			return r.openTier(ctx, t.Location)
		}})
	}
	r.tiers.Set(tiers)
}

// settle finds out, when the chain was read first, whether the own store is a
// tier, and attaches the others.
func (r *Repo) settle(ctx context.Context) error {
	if len(r.state.Tiers) == 0 {
		return nil
	}
	name, err := r.mark(ctx, r.tiers.Own())
	if errors.Is(err, ErrDamaged) {
		return fmt.Errorf("%w; it says that this store is a tier; delete that object to read it as the repository's own one", err)
	} else if err != nil && !errors.Is(err, blob.ErrNotExist) {
		return err
	}
	if r.state.Tier(name) != nil { // else it was, and TakeOver was cut off after its entry
		r.mirrorOf = name
		r.isMirror = fmt.Errorf("%w (%s): it can be restored from, but not written to. When the repository's own store is lost for good, \"holdfast tier remove %s --take-over\" makes this one take its place",
			ErrMirror, r.mirrorOf, r.mirrorOf)
		r.tiers.Seal(r.isMirror, "pins/")
	}
	r.attach(r.state)
	return nil
}

// behind explains why a tier seems to be an older copy of the repository.
func (r *Repo) behind(ctx context.Context, err error) error {
	name, markErr := r.mark(ctx, r.tiers.Own())
	if markErr != nil {
		return err
	}
	return fmt.Errorf("%w: this store is its tier %s, which has a copy of the chain up to entry %d of %s; if the repository's own store is lost, delete %s to go on with this copy",
		ErrRolledBack, name, r.state.Head, r.state.Time.Format("2006-01-02 15:04"), r.chain.Memory)
}

// mark reads a store's object "tier" and gives the tier's name.
func (r *Repo) mark(ctx context.Context, s blob.Store) (string, error) {
	raw, err := getDocument(ctx, s, tierName, seal.Tier, r.id)
	if err != nil {
		return "", err
	}
	master, err := r.master(ctx, raw.Header.Key)
	if err == nil {
		_, err = raw.Open(master, "tier")
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w", tierName, err)
	}
	return markName(raw)
}

// markName reads the tier's name in its mark.
func markName(raw *seal.Raw) (string, error) {
	var clear struct {
		Name string `json:"name"`
	}
	if err := seal.Unmarshal(raw.Clear, &clear); err != nil {
		return "", fmt.Errorf("%s: %w", tierName, err)
	}
	if !tierNames.MatchString(clear.Name) {
		return "", fmt.Errorf("%s: %w: no name of a tier", tierName, ErrDamaged)
	}
	return clear.Name, nil
}

// readingCache is where a check remembers what it has read in a store: in each
// tier there is another copy.
func readingCache(cache, tier string) string {
	if cache == "" || tier == "" {
		return cache
	}
	return filepath.Join(cache, "tier-"+tier)
}

// Mirror is the name of the tier in which the repository was opened; "" when it
// is in its own store.
func (r *Repo) Mirror() string { return r.mirrorOf }

// Tiers gives the tiers.
func (r *Repo) Tiers(ctx context.Context) ([]Tier, error) {
	err := r.refresh(ctx)
	return slices.Clone(r.current().Tiers), err
}

var tierNames = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

// AddTier makes a store a tier. The store is empty, or was this tier before. For
// the name of a tier that there is, its location and policy are changed.
func (r *Repo) AddTier(ctx context.Context, t Tier, far blob.Store) error {
	if !tierNames.MatchString(t.Name) {
		return fmt.Errorf("%q is no name for a tier: up to 32 of a-z, 0-9 and -", t.Name)
	}
	add := func(tiers []Tier) ([]Tier, error) {
		for i, o := range tiers {
			switch {
			case o.Name == t.Name:
				t.Back, t.Turned = o.Back, o.Turned
				if o == t {
					return nil, errNothing
				}
				tiers[i] = t
				return tiers, nil
			case o.Location == t.Location:
				return nil, fmt.Errorf("%w: %s", ErrTierExists, o.Name)
			}
		}
		t.Back = false
		return append(tiers, t), nil
	}
	if err := r.refresh(ctx); err != nil {
		return err
	}
	if _, err := add(slices.Clone(r.current().Tiers)); err != nil && !errors.Is(err, errNothing) {
		return err
	}
	if err := r.claimStore(ctx, t.Name, far, r.current().Tier(t.Name) != nil); err != nil {
		return err
	}
	if err := r.changeTiers(ctx, add); err != nil {
		return err
	}
	_, err := r.mirror(ctx, t.Name)
	return err
}

// claimStore marks a store as a tier. One that is known must be marked already.
func (r *Repo) claimStore(ctx context.Context, name string, far blob.Store, known bool) error {
	if r.mirrorOf != "" {
		return r.isMirror
	}
	// What TakeOver left when it was cut off.
	if err := r.tiers.Own().Delete(ctx, tierName); err != nil && !errors.Is(err, blob.ErrNotExist) {
		return err
	}
	err := r.sound(ctx, name, far)
	if !errors.Is(err, blob.ErrNotExist) {
		return err
	}
	if known {
		return fmt.Errorf("nothing of tier %s is there: is it mounted?", name)
	}
	for i, err := range far.List(ctx, "") {
		if err != nil {
			return err
		}
		return fmt.Errorf("it is not empty (it holds %s): a tier needs a place of its own", i.Name)
	}
	number, master := r.keys.Newest()
	err = putSealed(ctx, far, tierName, seal.NewHeader(seal.Tier, 0, number, r.id), map[string]string{"name": name}, []byte("{}"), master, "tier")
	if err != nil && !errors.Is(err, blob.ErrExist) {
		return err
	}
	return r.sound(ctx, name, far)
}

// changeTiers tells other tiers by an entry. change gets a list of its own.
func (r *Repo) changeTiers(ctx context.Context, change func([]Tier) ([]Tier, error)) error {
	for {
		if err := r.refresh(ctx); err != nil {
			return err
		}
		old := r.current()
		tiers, err := change(slices.Clone(old.Tiers))
		if errors.Is(err, errNothing) {
			return nil
		} else if err != nil {
			return err
		}
		for i := range tiers {
			tiers[i].Turned = 0
		}
		err = r.append(ctx, chain.Tiers, chain.Clear{Tiers: len(tiers)}, chain.Sealed{Tiers: tiers}, func(s *chain.State) error {
			if !slices.Equal(s.Tiers, old.Tiers) {
				return errMoved
			}
			return nil
		})
		if !errors.Is(err, errMoved) {
			return err
		}
	}
}

// tierStore opens a tier to write to it: it is this repository's, it is not the
// own store under another name, and its mirror is of the own chain.
func (r *Repo) tierStore(ctx context.Context, name string) (blob.Store, error) {
	if r.mirrorOf != "" {
		return nil, r.isMirror
	}
	far, err := r.tiers.At(ctx, name)
	if err != nil {
		return nil, err
	}
	switch own, err := r.mark(ctx, r.tiers.Own()); {
	case err == nil && own == name:
		return nil, fmt.Errorf("tier %s: %w: it is the repository's own store", name, ErrForked)
	case err != nil && !errors.Is(err, blob.ErrNotExist):
		return nil, err
	}
	if err := r.sound(ctx, name, far); err != nil {
		return nil, fmt.Errorf("tier %s: %w", name, err)
	}
	return far, nil
}

// sound proves that a store is this tier, and that its mirror's newest entry is
// one of the chain. ErrNotExist: it is not a tier.
func (r *Repo) sound(ctx context.Context, name string, far blob.Store) error {
	is, err := r.mark(ctx, far)
	switch {
	case errors.Is(err, seal.ErrForeign):
		return fmt.Errorf("%w: it is one of another repository", ErrForked)
	case err != nil:
		return err
	case is != name:
		return fmt.Errorf("%w: it is tier %s", ErrForked, is)
	}
	n, err := chain.Last(ctx, far)
	if err != nil || n == 0 {
		return err
	}
	last := chain.Name(n)
	there, err := far.Get(ctx, last, 0, -1)
	if err != nil {
		return err
	}
	own, err := r.tiers.Own().Get(ctx, last, 0, -1)
	switch {
	case errors.Is(err, blob.ErrNotExist) && n <= r.current().Head:
		return nil // before a checkpoint
	case errors.Is(err, blob.ErrNotExist):
		return fmt.Errorf("%w: its copy of the chain goes on to %s, which this repository does not have; it was written to, or this is an older copy of the repository", ErrForked, last)
	case err != nil:
		return err
	case string(own) != string(there):
		if raw, err := seal.Parse(there, seal.Entry); err != nil || raw.Verify(r.id, r.pub) != nil {
			return fmt.Errorf("%s: %w there: delete it, and it is copied anew", last, ErrDamaged)
		}
		return fmt.Errorf("%w: its %s is another one; it was taken into use as a repository of its own", ErrForked, last)
	}
	return nil
}

// soundTiers is tierStore for all.
func (r *Repo) soundTiers(ctx context.Context) error {
	for _, t := range r.current().Tiers {
		if _, err := r.tierStore(ctx, t.Name); err != nil {
			return err
		}
	}
	return nil
}

// tiers reports tiers that cannot be used. One that cannot be reached ends the
// check: what is there is not known.
func (c *checker) tiers(ctx context.Context) error {
	if c.r.mirrorOf != "" {
		return nil
	}
	for _, t := range c.r.current().Tiers {
		_, err := c.r.tierStore(ctx, t.Name)
		if errors.Is(err, ErrForked) || errors.Is(err, ErrDamaged) {
			c.problem(Problem{Object: "tier " + t.Name, What: err.Error()})
		} else if err != nil {
			return err
		}
	}
	return nil
}

// TakeOver makes the tier in which the repository was opened its own store. Of
// several tiers it has to be the one whose copy of the chain goes farthest: the
// others would not belong to it any more. force takes this one all the same.
func (r *Repo) TakeOver(ctx context.Context, force bool) error {
	name := r.mirrorOf
	if name == "" {
		return errors.New("this is the repository's own store; open its tier with --repo")
	}
	if err := r.farthest(ctx); err != nil && !force {
		return err
	}
	r.tiers.Seal(nil, "")
	err := r.changeTiers(ctx, func(tiers []Tier) ([]Tier, error) {
		n := len(tiers)
		tiers = slices.DeleteFunc(tiers, func(t Tier) bool { return t.Name == name })
		if len(tiers) == n {
			return nil, errNothing
		}
		return tiers, nil
	})
	if err != nil {
		r.tiers.Seal(r.isMirror, "pins/")
		return err
	}
	r.mirrorOf, r.isMirror = "", nil
	if err := r.tiers.Own().Delete(ctx, tierName); err != nil && !errors.Is(err, blob.ErrNotExist) {
		return err
	}
	return nil
}

// farthest proves that no other tier's copy of the chain goes on after this one.
func (r *Repo) farthest(ctx context.Context) error {
	for _, t := range r.current().Tiers {
		if t.Name == r.mirrorOf {
			continue
		}
		far, err := r.tiers.At(ctx, t.Name)
		if err != nil {
			return fmt.Errorf("whether tier %s has a newer copy of the chain is not known: %w", t.Name, err)
		}
		n, err := chain.Last(ctx, far)
		if err != nil {
			return fmt.Errorf("tier %s: %w", t.Name, err)
		}
		if n > r.current().Head {
			return fmt.Errorf("tier %s has a newer copy of the chain, up to %s: take that one", t.Name, chain.Name(n))
		}
	}
	return nil
}

// listSizes gives the packs that one store has, with their sizes.
func listSizes(ctx context.Context, s blob.Store) (map[[32]byte]int64, error) {
	there := map[[32]byte]int64{}
	for i, err := range s.List(ctx, packsPrefix) {
		if err != nil {
			return nil, fmt.Errorf("list packs: %w", err)
		}
		if name, err := packDigest(i.Name); err == nil {
			there[name] = i.Size
		}
	}
	return there, nil
}

// heldPack is a pack of the inventory, outside the quarantine.
type heldPack struct {
	size int64
	kind uint16
	made int64 // seconds since 1970; 0: not known, counts as old
}

// held gives the packs that the state's index objects list and that are not in
// quarantine.
func (r *Repo) held(ctx context.Context, s *chain.State) (map[[32]byte]heldPack, error) {
	held := map[[32]byte]heldPack{}
	for d := range s.Indexes {
		packs, err := r.readIndex(ctx, d)
		if errors.Is(err, ErrDamaged) && r.refresh(ctx) == nil && r.current().Moved != s.Moved {
			return nil, errMoved
		} else if err != nil {
			return nil, err
		}
		for _, k := range packs {
			if s.Quarantine[k.Name] == 0 {
				held[k.Name] = heldPack{k.Size, k.Kind, k.Made}
			}
		}
	}
	return held, nil
}
