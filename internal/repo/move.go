package repo

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/pack"
)

// moving is how many packs are moved at once.
const moving = 4

// MoveOptions of Move.
type MoveOptions struct {
	// Session is the id of the lease, as for Begin; "" makes one up.
	Session string
	// Before: chunk packs made before that go to the tier. The clock is that of
	// the machines that made them.
	Before time.Time
	// Copy leaves them in the own store as well.
	Copy bool
	// Back brings packs back to the own store and empties the tier.
	Back bool
	// DryRun finds what would be done, and changes nothing.
	DryRun bool
	// ReadBack says how much of what is stored is read back: ReadAll, which ""
	// is here, or ReadSample.
	ReadBack ReadBack
	// Watch is how long to watch runs that move packs the other way, as in
	// PruneOptions; negative does not wait for them.
	Watch time.Duration
	// Report is told how many bytes of packs were dealt with, of how many.
	Report func(done, total int64)
}

// MoveReport is what Move did or, in a dry run, would do.
type MoveReport struct {
	Tier   string `json:"tier"`
	DryRun bool   `json:"dry_run"`
	Back   bool   `json:"back"`
	// Copied to the tier, or with Back to the own store.
	Copied      int   `json:"copied_packs"`
	CopiedBytes int64 `json:"copied_bytes"`
	// Freed in the own store, or with Back in the tier.
	Freed      int   `json:"freed_packs"`
	FreedBytes int64 `json:"freed_bytes"`
	// Locked were to be freed, and stay until their lock is over.
	Locked int `json:"locked_packs"`
	// Garbage lies in the tier and is for prune to remove.
	Garbage int      `json:"garbage_packs"`
	Revoked []string `json:"revoked"` // leases found dead
	Notes   []string `json:"notes,omitempty"`
}

// Move brings packs to a tier, by age, or back from it. Packs of map nodes are
// copied whatever their age, and stay in the own store. A pack is deleted in one
// place only after it has been read in the other, so it is always somewhere; it
// may be cut off anywhere, and run beside everything. Only the two directions
// exclude one another: Move fails with ErrBusy.
func (r *Repo) Move(ctx context.Context, tier string, o MoveOptions) (*MoveReport, error) {
	if o.Report == nil {
		o.Report = func(int64, int64) {}
	}
	if o.Session == "" {
		o.Session = RandomID()
	}
	m := &carrier{r: r, o: o, tier: tier, report: MoveReport{Tier: tier, DryRun: o.DryRun, Back: o.Back, Revoked: []string{}}}
	if r.mirrorOf != "" {
		return nil, r.isMirror
	}
	if err := r.refresh(ctx); err != nil {
		return nil, err
	}
	if r.current().Tier(tier) == nil {
		return nil, fmt.Errorf("%q: %w", tier, ErrNoTier)
	}
	if o.DryRun {
		return m.plan(ctx)
	}
	run, err := r.begin(ctx, o.Session, tier)
	if err != nil {
		return nil, err
	}
	m.run = run
	if err = r.turn(ctx, run, tier, o.Back, o.Watch, &m.report.Revoked); err == nil {
		err = m.move(ctx)
	}
	return &m.report, errors.Join(err, run.Close())
}

// carrier is the work of one Move.
type carrier struct {
	r    *Repo
	o    MoveOptions
	run  *Run
	tier string
	far  blob.Store
	// here is the own store's listing, there the tier's.
	here, there map[[32]byte]int64

	total int64 // bytes to deal with

	mu     sync.Mutex // guards what follows, while packs are moved
	done   int64
	report MoveReport
}

// task is a pack to deal with.
type task struct {
	name [32]byte
	heldPack
	move bool // delete it where it comes from
}

// turn makes packs of the tier go one way and waits for the runs that may still
// move them the other way (docs/format.md §6.5). Before it turns them it lets
// all runs end: they need not be stopped for this one.
func (r *Repo) turn(ctx context.Context, run *Run, tier string, back bool, watch time.Duration, revoked *[]string) error {
	if err := r.refresh(ctx); err != nil {
		return err
	}
	if t := r.current().Tier(tier); t != nil && t.Back != back {
		err := r.outwait(ctx, tier, watch, revoked, func(session string, _ Lease) bool { return session != run.lease })
		if err != nil {
			return err
		}
	}
	err := r.changeTiers(ctx, func(tiers []Tier) ([]Tier, error) {
		for i := range tiers {
			if t := &tiers[i]; t.Name == tier && t.Back != back {
				t.Back = back
				return tiers, nil
			} else if t.Name == tier {
				return nil, errNothing
			}
		}
		return nil, fmt.Errorf("%q: %w", tier, ErrNoTier)
	})
	if err != nil {
		return err
	}
	return r.outwait(ctx, tier, watch, revoked, func(session string, l Lease) bool {
		t := r.current().Tier(tier)
		return session != run.lease && t != nil && l.Chain < t.Turned
	})
}

// outwait waits for those of the runs on a tier that matter to end, and ends
// dead ones. Who is left is told in the error.
func (r *Repo) outwait(ctx context.Context, tier string, watch time.Duration, revoked *[]string, matters func(string, Lease) bool) error {
	others := func() (map[string]Lease, error) {
		open, err := r.openLeases(ctx, r.current())
		maps.DeleteFunc(open, func(session string, l Lease) bool {
			return l.Tier != tier && l.Tier != "?" || !matters(session, l)
		})
		return open, err
	}
	open, err := others()
	if err != nil || len(open) == 0 {
		return err
	}
	if watch == 0 {
		watch = defaultWatch
	}
	if watch > 0 {
		dead, err := r.watch(ctx, open, watch)
		if err != nil {
			return err
		}
		for _, session := range dead {
			if err := r.revoke(ctx, session); err != nil {
				return err
			}
			*revoked = append(*revoked, session)
		}
		if open, err = others(); err != nil || len(open) == 0 {
			return err
		}
	}
	var who []string
	for session, l := range open {
		who = append(who, fmt.Sprintf("%s on %s, process %d", session, l.Host, l.PID))
	}
	slices.Sort(who)
	return fmt.Errorf("tier %s: %w by %s", tier, ErrBusy, strings.Join(who, "; "))
}

// still proves, right before a deletion, that packs go this way and that this
// run may move them.
func (m *carrier) still(ctx context.Context) error {
	if err := m.run.failed(); err != nil {
		return err
	}
	if err := m.r.refresh(ctx); err != nil {
		return err
	}
	s := m.r.current()
	if s.Over[m.run.lease] != 0 {
		return ErrRevoked
	}
	switch t := s.Tier(m.tier); {
	case t == nil:
		return fmt.Errorf("%q: %w any more", m.tier, ErrNoTier)
	case t.Back != m.o.Back:
		return fmt.Errorf("tier %s: %w", m.tier, ErrBusy)
	}
	return nil
}

func (m *carrier) move(ctx context.Context) error {
	if m.o.Back {
		tasks, err := m.toCome(ctx)
		if err != nil {
			return err
		}
		m.total = sum(tasks)
		return m.each(ctx, tasks, m.bring)
	}
	s, err := m.r.mirror(ctx, m.tier)
	if err != nil {
		return err
	}
	nodes, chunks, err := m.toGo(ctx, s)
	if err != nil {
		return err
	}
	m.total = sum(nodes) + sum(chunks)
	// A point that moves needs its maps there first.
	if err := m.each(ctx, nodes, m.send); err != nil {
		return err
	}
	return m.each(ctx, chunks, m.send)
}

// plan is Move's dry run.
func (m *carrier) plan(ctx context.Context) (*MoveReport, error) {
	var tasks []task
	var err error
	if m.o.Back {
		tasks, err = m.toCome(ctx)
	} else {
		var nodes, chunks []task
		nodes, chunks, err = m.toGo(ctx, m.r.current())
		tasks = append(nodes, chunks...)
	}
	for _, k := range tasks {
		to := m.there
		if m.o.Back {
			to = m.here
		}
		if to[k.name] != k.size {
			m.report.Copied++
			m.report.CopiedBytes += k.size
		}
		if k.move {
			m.report.Freed++
			m.report.FreedBytes += k.size
		}
	}
	return &m.report, err
}

func (m *carrier) list(ctx context.Context) (err error) {
	if m.far, err = m.r.tierStore(ctx, m.tier); err != nil {
		return err
	}
	if m.there, err = listSizes(ctx, m.far); err != nil {
		return fmt.Errorf("tier %s: %w", m.tier, err)
	}
	m.here, err = listSizes(ctx, m.r.tiers.Own())
	return err
}

// toGo chooses what goes to the tier: map packs, and chunk packs by age, the
// oldest first.
func (m *carrier) toGo(ctx context.Context, s *chain.State) (nodes, chunks []task, err error) {
	if err := m.list(ctx); err != nil {
		return nil, nil, err
	}
	held, err := m.r.held(ctx, s)
	if errors.Is(err, errMoved) {
		return m.toGo(ctx, m.r.current())
	} else if err != nil {
		return nil, nil, err
	}
	for name, k := range held {
		_, here := m.here[name]
		size, there := m.there[name]
		t := task{name: name, heldPack: k}
		switch {
		case k.kind == pack.Nodes:
			if !there || size != k.size {
				nodes = append(nodes, t)
			}
		case !here && there: // perhaps not whole, but nothing better is here
		case time.Unix(k.made, 0).Before(m.o.Before):
			if t.move = here && !m.o.Copy; t.move || !there || size != k.size {
				chunks = append(chunks, t)
			}
		}
	}
	byAge := func(a, b task) int { return cmp.Or(cmp.Compare(a.made, b.made), bytes.Compare(a.name[:], b.name[:])) }
	slices.SortFunc(nodes, byAge)
	slices.SortFunc(chunks, byAge)
	return nodes, chunks, nil
}

// toCome chooses what is brought back from the tier: all that is in the inventory.
func (m *carrier) toCome(ctx context.Context) (tasks []task, err error) {
	if err := m.list(ctx); err != nil {
		return nil, err
	}
	held, err := m.r.held(ctx, m.r.current())
	if errors.Is(err, errMoved) {
		return m.toCome(ctx)
	} else if err != nil {
		return nil, err
	}
	for name := range m.there {
		if k, ok := held[name]; ok {
			tasks = append(tasks, task{name, k, true})
		} else {
			m.report.Garbage++
		}
	}
	slices.SortFunc(tasks, func(a, b task) int { return bytes.Compare(a.name[:], b.name[:]) })
	return tasks, nil
}

func sum(tasks []task) (n int64) {
	for _, k := range tasks {
		n += k.size
	}
	return n
}

func (m *carrier) each(ctx context.Context, tasks []task, do func(context.Context, task) error) error {
	m.o.Report(m.done, m.total)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(moving)
	for _, k := range tasks {
		g.Go(func() error {
			if err := gctx.Err(); err != nil {
				return err
			}
			if err := do(gctx, k); errors.Is(err, ErrDamaged) {
				m.note("%s stays where it is: %v", packName(k.name), err)
			} else if err != nil {
				return err
			}
			m.mu.Lock()
			m.done += k.size
			done := m.done
			m.mu.Unlock()
			m.o.Report(done, m.total)
			return nil
		})
	}
	return g.Wait()
}

func (m *carrier) note(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.report.Notes = append(m.report.Notes, fmt.Sprintf(format, args...))
}

// send brings a pack to the tier.
func (m *carrier) send(ctx context.Context, k task) error {
	p, err := m.r.wholePack(ctx, m.r.store, k.name)
	if errors.Is(err, ErrDamaged) { // the tier's copy may be better
		if there, farErr := m.r.wholePack(ctx, m.far, k.name); farErr == nil {
			p, err = there, nil
		}
	}
	if err != nil {
		return err
	}
	if err := m.store(ctx, m.far, k, p, m.there); err != nil {
		return fmt.Errorf("tier %s: %w", m.tier, err)
	}
	if err := m.lock(ctx, k); err != nil {
		return fmt.Errorf("tier %s: %w", m.tier, err)
	}
	if !k.move {
		return nil
	}
	return m.free(ctx, m.r.tiers.Own(), k)
}

// bring brings a pack back.
func (m *carrier) bring(ctx context.Context, k task) error {
	p, err := m.r.wholePack(ctx, m.far, k.name)
	if errors.Is(err, ErrDamaged) { // then from anywhere else
		p, err = m.r.wholePack(ctx, m.r.store, k.name)
	}
	if err != nil {
		return fmt.Errorf("tier %s: %w", m.tier, err)
	}
	if err := m.store(ctx, m.r.tiers.Own(), k, p, m.here); err != nil {
		return err
	}
	return m.free(ctx, m.far, k)
}

// wholePack reads a pack that is what its name says.
func (r *Repo) wholePack(ctx context.Context, s blob.Store, name [32]byte) ([]byte, error) {
	p, what, err := readTwice(ctx, s, packName(name), name)
	if err == nil && what.second != "" {
		err = fmt.Errorf("%w: %s", ErrDamaged, what.second)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", packName(name), err)
	}
	return p, nil
}

// store makes sure that a store has the pack, whose bytes p are right. A copy
// there that is not stays: another run may have just proved it.
func (m *carrier) store(ctx context.Context, to blob.Store, k task, p []byte, listed map[[32]byte]int64) error {
	name := packName(k.name)
	if size, ok := listed[k.name]; !ok || size != k.size {
		if err := to.Put(ctx, name, p); err == nil {
			m.mu.Lock()
			m.report.Copied++
			m.report.CopiedBytes += k.size
			m.mu.Unlock()
		} else if !errors.Is(err, blob.ErrExist) {
			return err
		}
	}
	err := m.proves(ctx, to, k, p)
	if errors.Is(err, ErrDamaged) {
		err = m.proves(ctx, to, k, p)
	}
	if errors.Is(err, ErrDamaged) {
		err = fmt.Errorf("%w; delete that copy, and it is made anew", err)
	}
	return err
}

// proves reads back what a store has: all of it, or its end and a sixteenth.
func (m *carrier) proves(ctx context.Context, in blob.Store, k task, p []byte) error {
	name, size := packName(k.name), int64(len(p))
	parts := [][2]int64{{0, -1}}
	if m.o.ReadBack == ReadSample {
		n := (size + 15) / 16
		parts = [][2]int64{{rand.Int64N(size - n + 1), n}, {size - min(size, 64), -1}}
	}
	for _, part := range parts {
		got, err := in.Get(ctx, name, part[0], part[1])
		if errors.Is(err, blob.ErrNotExist) || errors.Is(err, blob.ErrTruncated) {
			return fmt.Errorf("%s: %w: %w", name, ErrDamaged, err)
		} else if err != nil {
			return err
		}
		want := p[part[0]:]
		if part[1] >= 0 {
			want = want[:part[1]]
		}
		if !bytes.Equal(got, want) {
			return fmt.Errorf("%s: %w: it does not read back as it was stored", name, ErrDamaged)
		}
	}
	return nil
}

// lock gives the tier's copy the lock of the own one, where both can.
func (m *carrier) lock(ctx context.Context, k task) error {
	own, ok := blob.As[blob.Locker](m.r.tiers.Own())
	far, can := blob.As[blob.Locker](m.far)
	if !ok || !can {
		return nil
	}
	l, err := own.Locked(ctx, packName(k.name))
	if errors.Is(err, blob.ErrNotExist) || errors.Is(err, blob.ErrNoLock) || err == nil && l.Mode == 0 {
		return nil
	} else if err != nil {
		return err
	}
	if err := far.Lock(ctx, packName(k.name), l); err != nil && !errors.Is(err, blob.ErrNoLock) {
		return err
	}
	return nil
}

// free deletes a pack where it comes from. One that is locked stays.
func (m *carrier) free(ctx context.Context, from blob.Store, k task) error {
	if err := m.still(ctx); err != nil {
		return err
	}
	err := from.Delete(ctx, packName(k.name))
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case errors.Is(err, blob.ErrLocked):
		m.report.Locked++
		return nil
	case errors.Is(err, blob.ErrNotExist): // by another run
		return nil
	case err == nil:
		m.report.Freed++
		m.report.FreedBytes += k.size
	}
	return err
}
