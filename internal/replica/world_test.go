package replica

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo"
	"holdfast/internal/repo/repotest"
	"holdfast/internal/state"
)

var ctx = context.Background()

const chunk = repo.ChunkSize

// world is two repositories and a state directory, with what every point's
// disks and files should be.
type world struct {
	t        testing.TB
	rng      *rand.Rand
	from, to *blob.Mem
	state    *state.Dir
	vms      map[string]*vm
	want     map[repo.PointID]content
}

// vm is a guest: its disks as they are now, and its newest point.
type vm struct {
	name    string
	history repo.HistoryID
	disks   map[string][]byte
	changed map[string]map[int]bool // chunks since the newest point
	newest  *repo.Point
}

// content is what a point holds.
type content struct {
	disks map[string][]byte
	file  []byte
}

func newWorld(t testing.TB) *world {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	w := &world{t: t, rng: rand.New(rand.NewPCG(seed, 1)), from: repotest.Store(t), to: repotest.Other(t),
		vms: map[string]*vm{}, want: map[repo.PointID]content{}}
	var err error
	dir := t.TempDir()
	// In memory where that is to be had: what is synced here need not last.
	if shm, err := os.MkdirTemp("/dev/shm", "holdfast-test-"); err == nil {
		dir = shm
		t.Cleanup(func() { os.RemoveAll(shm) })
	}
	if w.state, err = state.Open(dir); err != nil {
		t.Fatal(err)
	}
	return w
}

// add makes a VM with disks of so many chunks, each but the last of which ends in a part of one.
func (w *world) add(name string, chunks ...int) *vm {
	v := &vm{name: name, history: repo.HistoryID(repo.RandomID()), disks: map[string][]byte{}, changed: map[string]map[int]bool{}}
	for i, n := range chunks {
		id := fmt.Sprintf("vd%c", 'a'+i)
		v.disks[id], v.changed[id] = make([]byte, n*chunk-i*1000), map[int]bool{}
	}
	w.vms[name] = v
	return v
}

// scribble writes noise over n chunks of a disk; with n < 0 zeros over -n.
func (w *world) scribble(v *vm, disk string, first, n int) {
	d := v.disks[disk]
	for c := first; c < first+max(n, -n); c++ {
		p := d[c*chunk : min(len(d), (c+1)*chunk)]
		for i := range p {
			p[i] = 0
			if n > 0 {
				p[i] = byte(w.rng.Uint32())
			}
		}
		v.changed[disk][c] = true
	}
}

// backup makes a point of the VM in a repository.
func (w *world) backup(r *repo.Repo, v *vm) repo.Point {
	w.t.Helper()
	p, err := w.tryBackup(r, v)
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

func (w *world) tryBackup(r *repo.Repo, v *vm) (p repo.Point, err error) {
	run, err := r.Begin(ctx, state.NewID())
	if err != nil {
		return p, err
	}
	defer func() { err = errors.Join(err, run.Close()) }()
	p = repo.Point{History: v.history, VM: v.name, Kind: "test", Host: "mem://", VMID: v.name, Time: time.Now().UTC(),
		Consistency: "filesystem", Notes: []string{"a note"}, Session: "s", Reference: "ref", ReadBytes: 7}
	holds := content{disks: map[string][]byte{}, file: fmt.Appendf(nil, "<domain>%s %d</domain>", v.name, len(w.want))}
	for _, id := range slices.Sorted(mapKeys(v.disks)) {
		d := v.disks[id]
		var base *repo.DiskReader
		if i := diskOf(v.newest, id); i >= 0 {
			if base, err = r.OpenDisk(ctx, v.newest.Disks[i]); err != nil {
				return p, err
			}
		}
		dw, err := run.Disk(ctx, base, int64(len(d)))
		if err != nil {
			return p, err
		}
		for _, c := range slices.Sorted(mapKeys(v.changed[id])) {
			off := c * chunk
			if off < len(d) {
				if err := dw.WriteAt(ctx, d[off:min(len(d), off+chunk)], int64(off)); err != nil {
					return p, err
				}
			}
		}
		root, err := dw.Finish(ctx)
		if err != nil {
			return p, err
		}
		p.Disks = append(p.Disks, repo.Disk{ID: id, Size: int64(len(d)), Format: "raw", Path: "/" + id, Root: root})
		holds.disks[id] = bytes.Clone(d)
	}
	f, err := run.PutFile(ctx, "domain.xml", holds.file)
	if err != nil {
		return p, err
	}
	p.Files = []repo.File{f}
	if err := run.Commit(ctx, &p); err != nil {
		return p, err
	}
	v.newest, w.want[p.ID] = &p, holds
	for id := range v.changed {
		v.changed[id] = map[int]bool{}
	}
	return p, nil
}

func mapKeys[K comparable, V any](m map[K]V) iter.Seq[K] {
	return func(yield func(K) bool) {
		for k := range m {
			if !yield(k) {
				return
			}
		}
	}
}

// right wants a repository to hold exactly these points, bit for bit, and to
// pass a check of every byte.
func (w *world) right(r *repo.Repo, ids ...repo.PointID) {
	w.t.Helper()
	points, err := r.Points(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	var have []repo.PointID
	for _, p := range points {
		have = append(have, p.ID)
		if err := w.differs(r, p); err != nil {
			w.t.Fatalf("point %s: %v", p.ID, err)
		}
	}
	if !slices.Equal(have, ids) {
		w.t.Fatalf("the repository has %v, want %v", have, ids)
	}
	c, err := r.Check(ctx, repo.CheckOptions{ReadData: true})
	if err != nil || len(c.Problems) > 0 {
		w.t.Fatalf("check: %v, %v", c, err)
	}
}

// differs says how a point is not what it should be.
func (w *world) differs(r *repo.Repo, p repo.Point) error {
	want := w.want[p.ID]
	if len(p.Disks) != len(want.disks) || len(p.Files) != 1 {
		return fmt.Errorf("%d disks, %d files", len(p.Disks), len(p.Files))
	}
	for _, d := range p.Disks {
		src, err := r.OpenDisk(ctx, d)
		if err != nil {
			return err
		}
		got := make([]byte, d.Size)
		if err := src.ReadAt(ctx, got, 0); err != nil {
			return err
		}
		if !bytes.Equal(got, want.disks[d.ID]) {
			return fmt.Errorf("disk %s has other bytes", d.ID)
		}
	}
	f, err := r.ReadFile(ctx, p.Files[0])
	if err == nil && !bytes.Equal(f, want.file) {
		err = errors.New("its file has other bytes")
	}
	return err
}

// tidy wants no lease, no pin and no journal left.
func (w *world) tidy() {
	w.t.Helper()
	for _, s := range []*blob.Mem{w.from, w.to} {
		for i := range s.List(ctx, "") {
			if strings.HasPrefix(i.Name, "leases/") || strings.HasPrefix(i.Name, "pins/") {
				w.t.Errorf("left in a store: %s", i.Name)
			}
		}
	}
	if runs, err := w.state.Runs(); err != nil || len(runs) > 0 {
		w.t.Errorf("in the journal: %+v, %v", runs, err)
	}
}

// copy copies what is missing and wants all of it to succeed.
func (w *world) copy(from, to *repo.Repo) []Result {
	w.t.Helper()
	results, err := w.tryCopy(from, to)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, r := range results {
		if r.Err != nil || len(r.Warnings) > 0 {
			w.t.Fatalf("%+v", r)
		}
	}
	return results
}

func (w *world) tryCopy(from, to *repo.Repo) ([]Result, error) {
	missing, _, err := Missing(ctx, from, to)
	if err != nil {
		return nil, err
	}
	return Run(ctx, Job{From: from, To: to, State: w.state, Points: missing})
}

// counting counts what passes to and from a store.
type counting struct {
	blob.Store
	calls, sent, got atomic.Int64
}

func (c *counting) Put(ctx context.Context, name string, data []byte) error {
	c.calls.Add(1)
	c.sent.Add(int64(len(data)))
	return c.Store.Put(ctx, name, data)
}

func (c *counting) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	p, err := c.Store.Get(ctx, name, off, n)
	c.calls.Add(1)
	c.got.Add(int64(len(p)))
	return p, err
}

func (c *counting) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	c.calls.Add(1)
	return c.Store.List(ctx, prefix)
}

// since gives the counts and begins anew.
func (c *counting) since() (calls, sent, got int64) {
	return c.calls.Swap(0), c.sent.Swap(0), c.got.Swap(0)
}
