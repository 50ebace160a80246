package replica

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"holdfast/internal/blob/blobtest"
	"holdfast/internal/repo"
	"holdfast/internal/repo/repotest"
	"holdfast/internal/state"
)

// A random history of many writers: processes on machines of their own back up,
// forget, mark, prune, copy in both directions, pin and read for hours, check
// and rotate keys on two repositories, all at once. Calls take up to seconds;
// a process is stopped for hours, and goes on; or dies, with what it had under
// way done or not, or done later. Time is that of a bubble.
//
// The model is the set of points that were acknowledged, and the hash of each.
// At the end all of it is there bit by bit, prune has left nothing behind, and
// the archives of the two stores prove every moment of the history.
//
// HOLDFAST_SEED repeats a history, as far as goroutines can be repeated;
// HOLDFAST_SOAK=N runs N of them, each six hours long.
func TestManyWriters(t *testing.T) {
	histories, hours := 1, 3
	if testing.Short() {
		hours = 1
	}
	if n, err := strconv.Atoi(os.Getenv("HOLDFAST_SOAK")); err == nil && n > 0 {
		histories, hours = n, 6
	}
	blobtest.Bubble(t, func(t *testing.T) {
		seed := uint64(os.Getpid())<<32 ^ rand.Uint64()
		if v := os.Getenv("HOLDFAST_SEED"); v != "" {
			fmt.Sscan(v, &seed)
		}
		for range histories {
			t.Logf("HOLDFAST_SEED=%d", seed)
			history(t, seed, time.Duration(hours)*time.Hour)
			if t.Failed() {
				return
			}
			seed = rand.Uint64()
		}
	})
}

// model is two repositories and what is known of them.
type model struct {
	t      *testing.T
	stores [2]*archive
	pool   [][]byte // what disks are made of
	end    time.Time
	rush   bool // real time: nobody waits

	mu     sync.Mutex // guards all below
	points [2]map[repo.PointID]*known
	copied [2]map[repo.PointID]bool // to there, or tried
	counts map[string]int
}

// known is a point that was acknowledged.
type known struct {
	vm      string
	content []int // places in the pool; -1 for zeros
	forgets int   // tries to forget it that were not refused
	gone    bool  // one of them was told that it is
	keep    bool  // somebody tried to mark it to stay
}

func (m *model) count(what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.counts[what]++
}

func (m *model) bytes(content []int) []byte {
	p := make([]byte, len(content)*chunk)
	for i, k := range content {
		if k >= 0 {
			copy(p[i*chunk:], m.pool[k])
		}
	}
	return p
}

func hashOf(p []byte) string {
	h := sha256.Sum256(p)
	return hex.EncodeToString(h[:])
}

func newModel(t *testing.T, seed uint64, length time.Duration) *model {
	rng := rand.New(rand.NewPCG(seed, 1))
	m := &model{t: t, end: time.Now().Add(length), counts: map[string]int{},
		stores: [2]*archive{newArchive(t, repotest.Store(t)), newArchive(t, repotest.Other(t))}}
	for i := range m.points {
		m.points[i], m.copied[i] = map[repo.PointID]*known{}, map[repo.PointID]bool{}
	}
	for range 40 {
		p := make([]byte, chunk)
		for i := range p[:600] {
			p[i] = byte(rng.Uint32())
		}
		m.pool = append(m.pool, p)
	}
	return m
}

func history(t *testing.T, seed uint64, length time.Duration) {
	m := newModel(t, seed, length)
	var wg sync.WaitGroup
	for i := range 6 {
		a := &actor{m: m, name: fmt.Sprint("machine ", i), rng: rand.New(rand.NewPCG(seed, uint64(100+i)))}
		wg.Go(a.live)
	}
	wg.Wait()
	m.mu.Lock()
	t.Log(m.counts)
	m.mu.Unlock()
	for side, a := range m.stores {
		m.proves(side, a)
	}
}

// proves looks at a repository after all has ended.
func (m *model) proves(side int, a *archive) {
	t := m.t
	for try := range 2 {
		r := repotest.Open(t, a)
		points, err := r.Points(ctx)
		if err != nil {
			t.Fatal(err)
		}
		there := map[repo.PointID]bool{}
		for _, p := range points {
			there[p.ID] = true
			d, err := r.OpenDisk(ctx, p.Disks[0])
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, d.Size())
			if err := d.ReadAt(ctx, got, 0); err != nil {
				t.Fatal(err)
			}
			if len(p.Notes) != 1 || hashOf(got) != p.Notes[0] {
				t.Fatalf("repository %d: point %s is not what was backed up", side, p.ID)
			}
			if k := m.points[side][p.ID]; k != nil && (k.gone && !m.copied[side][p.ID] || hashOf(m.bytes(k.content)) != p.Notes[0]) {
				t.Errorf("repository %d: point %s: %+v", side, p.ID, k)
			}
		}
		for id, k := range m.points[side] {
			if !there[id] && k.forgets == 0 {
				t.Errorf("repository %d: point %s of %s was acknowledged and is gone", side, id, k.vm)
			}
		}
		if c, err := r.Check(ctx, repo.CheckOptions{ReadData: true}); err != nil || len(c.Problems)+len(c.Transient) > 0 {
			t.Errorf("repository %d: %+v, %v", side, c, err)
		}
		if c, err := repo.CheckKeyless(ctx, a, "", repo.CheckOptions{ReadData: true}); err != nil || len(c.Problems) > 0 {
			t.Errorf("repository %d without a key: %+v, %v", side, c, err)
		}
		if try > 0 {
			break
		}
		// Everybody is dead now: all that nobody needs goes.
		for i := range a.List(ctx, "pins/") {
			a.Mem.Delete(ctx, i.Name)
		}
		for range 2 { // revoked leases have left what only the next prune can know to be nobody's
			if report, err := r.Prune(ctx, repo.PruneOptions{}); err != nil || report.Waiting > 0 || len(report.Lost) > 0 {
				t.Errorf("repository %d: the last prune: %+v, %v", side, report, err)
			}
		}
		listed := map[string]bool{}
		if err := r.Packs(ctx, func(p repo.PackInfo) error { listed[p.Pack] = true; return nil }); err != nil {
			t.Error(err)
		}
		n := 0
		for range a.List(ctx, "packs/") {
			n++
		}
		if n != len(listed) {
			t.Errorf("repository %d: %d packs in the store, %d in the inventory", side, n, len(listed))
		}
	}
	a.proves(t)
}

// actor is a machine on which one process after the other works.
type actor struct {
	m    *model
	name string
	rng  *rand.Rand

	lives int
	state *state.Dir
	power [2]*blobtest.Power
	repos [2]*repo.Repo
	hurt  bool // stopped for a while, or about to die: anything may fail
}

// wait lets time pass.
func (a *actor) wait(most time.Duration) {
	if a.m.rush {
		runtime.Gosched()
		return
	}
	time.Sleep(time.Duration(a.rng.Int64N(int64(most))))
}

func (a *actor) live() {
	var err error
	if a.state, err = state.Open(tempDir(a.m.t)); err != nil {
		a.m.t.Error(err)
		return
	}
	for time.Now().Before(a.m.end) && !a.m.t.Failed() {
		a.lives++
		a.life()
	}
}

// tempDir is in memory where that is to be had.
func tempDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "holdfast-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// life is that of one process.
func (a *actor) life() {
	a.hurt = false
	cache := tempDir(a.m.t)
	for side, s := range a.m.stores {
		a.power[side] = &blobtest.Power{Inner: view{s, fmt.Sprintf("%s.%d", a.name, a.lives)}, Seed: a.rng.Uint64(), Delay: 2 * time.Second, Late: 20 * time.Minute}
	}
	for side := range a.m.stores {
		r, err := repo.Open(ctx, a.power[side], []byte(repotest.Passphrase), repo.Options{Cache: cache})
		if err != nil {
			a.failed("open", err)
			return
		}
		a.repos[side] = r
	}
	if a.rng.IntN(2) == 0 { // it will die
		a.hurt = true
		a.power[a.rng.IntN(2)].At = 1 + a.rng.IntN(150)
	}
	for time.Now().Before(a.m.end) && !a.power[0].Lost() && !a.power[1].Lost() && !a.m.t.Failed() {
		a.wait(5 * time.Minute)
		if a.rng.IntN(8) == 0 { // it will be stopped in the midst of what it does
			a.hurt = true
			go func(p *blobtest.Power, after, d time.Duration) {
				time.Sleep(after)
				p.Stall(d)
			}(a.power[a.rng.IntN(2)], time.Duration(a.rng.Int64N(int64(time.Minute))), time.Duration(a.rng.Int64N(int64(time.Hour))))
		}
		a.act(a.rng.IntN(2))
	}
	for side, r := range a.repos {
		a.power[side].Wait()
		if err := r.Close(); err != nil {
			a.m.t.Error(err)
		}
	}
	if a.power[0].Lost() || a.power[1].Lost() {
		a.m.count("death")
	}
}

// failed wants a reason for a failure.
func (a *actor) failed(what string, err error) {
	a.m.count(what + " failed")
	if !a.hurt {
		a.m.t.Errorf("%s: %s: %v", a.name, what, err)
	}
}

func (a *actor) act(side int) {
	r := a.repos[side]
	switch k := a.rng.IntN(20); {
	case k < 7:
		a.backup(side)
	case k < 10:
		a.forget(side)
	case k < 11:
		a.keep(side)
	case k < 14:
		a.m.count("prune")
		report, err := r.Prune(ctx, repo.PruneOptions{})
		if err != nil {
			a.failed("prune", err)
		} else if len(report.Lost) > 0 {
			a.failed("prune", fmt.Errorf("%+v", report))
		}
	case k < 16:
		a.copy(side)
	case k < 18:
		a.read(side)
	case k < 19:
		a.m.count("check")
		o := repo.CheckOptions{ReadData: a.rng.IntN(2) == 0}
		c, err := r.Check(ctx, o)
		if a.rng.IntN(2) == 0 {
			var repaired *repo.RepairReport
			if repaired, err = r.Repair(ctx, repo.RepairOptions{From: a.repos[1-side], Check: o}); err == nil {
				c = repaired.Check
			}
		}
		if err == nil && len(c.Problems) > 0 {
			err = fmt.Errorf("%+v", c.Problems)
			a.hurt = false // nothing is damaged, whoever looks
		}
		if err != nil {
			a.failed("check", err)
		}
	default:
		a.m.count("rotate")
		if _, err := r.Rotate(ctx); err != nil && !errors.Is(err, repo.ErrKeys) {
			a.failed("rotate", err)
		}
	}
}

// some gives a point that nobody has tried to forget.
func (a *actor) some(side int, vm string) (id repo.PointID, k *known) {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	var ids []repo.PointID
	for id, k := range a.m.points[side] {
		if k.forgets == 0 && (vm == "" || k.vm == vm) {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return "", nil
	}
	slices.Sort(ids)
	id = ids[a.rng.IntN(len(ids))]
	return id, a.m.points[side][id]
}

func (a *actor) find(r *repo.Repo, id repo.PointID) (*repo.Point, error) {
	points, err := r.Points(ctx)
	for i := range points {
		if points[i].ID == id {
			return &points[i], nil
		}
	}
	return nil, errors.Join(err, fmt.Errorf("%s: %w", id, repo.ErrNotExist))
}

// backup makes a point from one of the VM's, or from nothing.
func (a *actor) backup(side int) {
	vm := fmt.Sprint("vm", a.rng.IntN(4))
	content := make([]int, 2+a.rng.IntN(12))
	for i := range content {
		content[i] = a.rng.IntN(len(a.m.pool)+8) - 8
		content[i] = max(content[i], -1)
	}
	baseID, base := a.some(side, vm)
	if base != nil && a.rng.IntN(3) > 0 {
		content = slices.Clone(base.content)
		for range 1 + a.rng.IntN(3) {
			content[a.rng.IntN(len(content))] = a.rng.IntN(len(a.m.pool))
		}
	} else {
		base = nil
	}
	id, err := a.save(side, vm, content, baseID, base)
	a.m.count("backup")
	if err == nil {
		a.m.mu.Lock()
		a.m.points[side][id] = &known{vm: vm, content: content}
		a.m.mu.Unlock()
	} else if errors.Is(err, repo.ErrPruned) || errors.Is(err, repo.ErrNotExist) {
		a.m.count("backup pruned")
	} else {
		a.failed("backup", err)
	}
}

func (a *actor) save(side int, vm string, content []int, baseID repo.PointID, base *known) (id repo.PointID, err error) {
	r := a.repos[side]
	run, err := r.Begin(ctx, state.NewID())
	if err != nil {
		return "", err
	}
	defer func() {
		if closeErr := run.Close(); err == nil && closeErr != nil && !a.hurt {
			a.m.t.Errorf("%s: close: %v", a.name, closeErr)
		}
	}()
	var from *repo.DiskReader
	if base != nil {
		p, err := a.find(r, baseID)
		if err != nil {
			return "", err
		}
		if from, err = r.OpenDisk(ctx, p.Disks[0]); err != nil {
			return "", a.forgotten(side, baseID, err)
		}
	}
	p := a.m.bytes(content)
	w, err := run.Disk(ctx, from, int64(len(p)))
	if err != nil {
		return "", a.forgotten(side, baseID, err)
	}
	for i, k := range content {
		if base != nil && base.content[i] == k {
			continue
		}
		if a.rng.IntN(4) == 0 {
			a.wait(2 * time.Minute) // a long backup
		}
		if k < 0 {
			err = w.ZeroAt(ctx, int64(i*chunk), chunk)
		} else {
			err = w.WriteAt(ctx, p[i*chunk:(i+1)*chunk], int64(i*chunk))
		}
		if err != nil {
			return "", a.forgotten(side, baseID, err)
		}
	}
	root, err := w.Finish(ctx)
	if err != nil {
		return "", a.forgotten(side, baseID, err)
	}
	f, err := run.PutFile(ctx, "domain.xml", []byte(vm))
	if err != nil {
		return "", err
	}
	if a.rng.IntN(3) == 0 {
		if err := run.Flush(ctx); err != nil {
			return "", err
		}
		a.wait(20 * time.Minute)
	}
	point := &repo.Point{History: repo.HistoryID(hashOf([]byte(vm))[:32]), VM: vm, Kind: "test", Host: "mem://", VMID: vm, Time: time.Now().UTC(),
		Notes: []string{hashOf(p)}, Disks: []repo.Disk{{ID: "vda", Size: int64(len(p)), Format: "raw", Root: root}}, Files: []repo.File{f}}
	return point.ID, errors.Join(run.Commit(ctx, point), setID(&id, point))
}

func setID(id *repo.PointID, p *repo.Point) error { *id = p.ID; return nil }

// forgotten turns damage into the end of a base that was forgotten: whoever has
// no pin must be ready for that.
func (a *actor) forgotten(side int, id repo.PointID, err error) error {
	a.m.mu.Lock()
	defer a.m.mu.Unlock()
	if k := a.m.points[side][id]; errors.Is(err, repo.ErrDamaged) && k != nil && k.forgets > 0 {
		return fmt.Errorf("%w: %w", repo.ErrPruned, err)
	}
	return err
}

func (a *actor) forget(side int) {
	if id, k := a.some(side, ""); k != nil {
		a.forgetPoint(side, id, k)
	}
}

func (a *actor) forgetPoint(side int, id repo.PointID, k *known) {
	a.m.mu.Lock()
	k.forgets++
	a.m.mu.Unlock()
	a.m.count("forget")
	err := a.repos[side].Forget(ctx, []repo.PointID{id}, time.Now())
	a.m.mu.Lock()
	kept := errors.Is(err, repo.ErrKept) && k.keep
	if err == nil {
		k.gone = true
	} else if kept {
		k.forgets--
	}
	a.m.mu.Unlock()
	if err != nil && !kept {
		a.failed("forget", err)
	}
}

func (a *actor) keep(side int) {
	id, k := a.some(side, "")
	if k == nil {
		return
	}
	a.m.mu.Lock()
	k.keep = true
	a.m.mu.Unlock()
	a.m.count("keep")
	until := []repo.Until{repo.Forever, ""}[a.rng.IntN(2)]
	if err := a.repos[side].Keep(ctx, []repo.PointID{id}, until); err != nil && !errors.Is(err, repo.ErrNotExist) {
		a.failed("keep", err)
	}
}

// copy copies what the other repository lacks.
func (a *actor) copy(side int) {
	from, to := a.repos[side], a.repos[1-side]
	missing, _, err := Missing(ctx, from, to)
	if err != nil {
		a.failed("copy", err)
		return
	}
	a.rng.Shuffle(len(missing), func(i, k int) { missing[i], missing[k] = missing[k], missing[i] })
	missing = missing[:min(len(missing), 1+a.rng.IntN(3))]
	a.m.count("copy")
	a.m.mu.Lock()
	for _, p := range missing { // a copy that was planned before a point was forgotten may bring it back
		a.m.copied[1-side][p.ID] = true
	}
	a.m.mu.Unlock()
	results, err := Run(ctx, Job{From: from, To: to, State: a.state, Points: missing})
	if err != nil {
		a.failed("copy", err)
		return
	}
	for _, r := range results {
		switch {
		case r.Err == nil && r.State == Copied:
			a.m.mu.Lock()
			a.m.counts["copied"]++
			if k := a.m.points[side][r.Point]; k != nil && a.m.points[1-side][r.Point] == nil {
				a.m.points[1-side][r.Point] = &known{vm: k.vm, content: k.content}
			}
			a.m.mu.Unlock()
		case r.Err != nil && !errors.Is(r.Err, repo.ErrNotExist) && !errors.Is(r.Err, repo.ErrPruned):
			a.failed("copy", r.Err)
		}
	}
}

// read is a recovery: a point is pinned, and read for hours, whoever forgets it.
func (a *actor) read(side int) {
	id, k := a.some(side, "")
	if k == nil {
		return
	}
	r, session := a.repos[side], state.NewID()
	a.m.count("read")
	defer func() {
		if err := r.Unpin(ctx, session); err != nil {
			a.failed("unpin", err)
		}
	}()
	p, err := a.find(r, id)
	if err == nil {
		err = r.Pin(ctx, session, id)
	}
	if errors.Is(err, repo.ErrNotExist) {
		return
	} else if err != nil {
		a.failed("pin", err)
		return
	}
	want := a.m.bytes(k.content)
	for range 1 + a.rng.IntN(6) {
		d, err := r.OpenDisk(ctx, p.Disks[0])
		got := make([]byte, len(want))
		if err == nil {
			err = d.ReadAt(ctx, got, 0)
		}
		if errors.Is(err, repo.ErrDamaged) || err == nil && !bytes.Equal(got, want) {
			a.m.t.Errorf("%s: what is pinned is lost: %v", a.name, err)
			return
		} else if err != nil {
			a.failed("read", err)
			return
		}
		if a.rng.IntN(2) == 0 {
			a.forgetPoint(side, id, k)
		}
		a.wait(20 * time.Minute)
	}
}

// Prunes of both repositories in a loop, beside writers that forget what they
// wrote, copies in both directions, checks, and recoveries: points that are
// pinned, forgotten, and read on. Nobody waits, and nobody meets an error but a
// run that is told to run again.
func TestPruneBesideEverything(t *testing.T) {
	seed := rand.Uint64()
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	length := 1500 * time.Millisecond
	if testing.Short() {
		length = 500 * time.Millisecond
	}
	m := newModel(t, seed, length)
	m.rush = true
	var wg sync.WaitGroup
	loop := func(i int, pace time.Duration, f func(a *actor, side int)) {
		a := &actor{m: m, name: fmt.Sprint("process ", i), rng: rand.New(rand.NewPCG(seed, uint64(i)))}
		var err error
		if a.state, err = state.Open(tempDir(t)); err != nil {
			t.Fatal(err)
		}
		for side, s := range m.stores {
			a.repos[side] = repotest.Open(t, view{s, a.name})
		}
		wg.Go(func() {
			for side := 0; time.Now().Before(m.end) && !t.Failed(); side = 1 - side {
				f(a, side)
				time.Sleep(pace) // else those with nothing to do take the processor
			}
		})
	}
	write := func(a *actor, side int) {
		a.backup(side)
		if a.rng.IntN(3) > 0 {
			a.forget(side)
		}
	}
	loop(1, 0, write)
	loop(2, 0, write)
	for i := range 2 {
		loop(3+i, 5*time.Millisecond, func(a *actor, _ int) {
			report, err := a.repos[i].Prune(ctx, repo.PruneOptions{Watch: -1})
			if err == nil && len(report.Lost) > 0 {
				err = fmt.Errorf("%+v", report)
			}
			if err != nil {
				a.failed("prune", err)
			}
			a.m.count("prune")
		})
	}
	loop(5, 20*time.Millisecond, (*actor).copy)
	loop(6, 20*time.Millisecond, (*actor).copy)
	loop(7, time.Millisecond, (*actor).read)
	loop(8, 20*time.Millisecond, func(a *actor, side int) {
		c, err := a.repos[side].Check(ctx, repo.CheckOptions{ReadData: true})
		if err == nil && len(c.Problems) > 0 {
			err = fmt.Errorf("%+v", c.Problems)
		}
		if err != nil {
			a.failed("check", err)
		}
		a.m.count("check")
	})
	wg.Wait()
	t.Log(m.counts)
	for side, a := range m.stores {
		m.proves(side, a)
	}
}
