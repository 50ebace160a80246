package backup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/hypervisor"
	"holdfast/internal/hypervisor/hypertest"
	"holdfast/internal/repo"
	"holdfast/internal/repo/repotest"
	"holdfast/internal/state"
)

var ctx = context.Background()

const page = hypertest.PageSize

// world is a host, a repository and a state directory that outlive the
// processes that use them.
type world struct {
	t     *testing.T
	rng   *rand.Rand
	host  *hypertest.Mem
	store *blob.Mem
	state *state.Dir
	r     *repo.Repo
	conn  *hypertest.Conn
	vm    hypervisor.VMID
}

func newWorld(t *testing.T) *world {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	w := &world{t: t, rng: rand.New(rand.NewPCG(seed, 1)), host: hypertest.NewMem(), store: repotest.Store(t)}
	var err error
	if w.state, err = state.Open(t.TempDir()); err != nil {
		t.Fatal(err)
	}
	w.r = repotest.Open(t, w.store)
	w.vm = w.host.AddVM("web")
	w.host.AddDisk(w.vm, "vda", 60*page, true)
	w.host.AddDisk(w.vm, "vdb", 10*page, true)
	w.scribble("vda", 0, 40)
	w.scribble("vdb", 0, 5)
	w.connect()
	return w
}

// connect is a new process.
func (w *world) connect() { w.conn = w.host.Connect() }

// scribble writes pages as the guest.
func (w *world) scribble(d hypervisor.DiskID, from, n int64) {
	p := make([]byte, n*page)
	for i := range p {
		p[i] = byte(w.rng.Uint32())
	}
	if err := w.host.Write(ctx, w.vm, d, p, from*page); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) job() Job {
	vms, err := w.host.Connect().VMs(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	return Job{Repo: w.r, Source: w.conn, State: w.state, Host: "mem://", VMs: vms}
}

// backup runs one and wants it to succeed, and the point to be the guest's disks.
func (w *world) backup() Result {
	w.t.Helper()
	r := Run(ctx, w.job())[0]
	if r.Err != nil {
		w.t.Fatal(r.Err)
	}
	w.right(r.Point)
	return r
}

func (w *world) point(id repo.PointID) repo.Point {
	w.t.Helper()
	points, err := w.r.Points(ctx)
	if err != nil {
		w.t.Fatal(err)
	}
	i := slices.IndexFunc(points, func(p repo.Point) bool { return p.ID == id })
	if i < 0 {
		w.t.Fatalf("no point %s", id)
	}
	return points[i]
}

// right wants a point to be what the guest's disks are now.
func (w *world) right(id repo.PointID) {
	w.t.Helper()
	p := w.point(id)
	for _, d := range p.Disks {
		want, got := make([]byte, d.Size), make([]byte, d.Size)
		if err := w.host.Read(ctx, hypervisor.VMID(p.VMID), hypervisor.DiskID(d.ID), want, 0); err != nil {
			w.t.Fatal(err)
		}
		r, err := w.r.OpenDisk(ctx, d)
		if err != nil {
			w.t.Fatal(err)
		}
		if err := r.ReadAt(ctx, got, 0); err != nil {
			w.t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			w.t.Fatalf("disk %s of point %s is not the guest's", d.ID, id)
		}
	}
}

// tidy wants nothing on the host but the newest point's reference, and an
// empty journal.
func (w *world) tidy(id repo.PointID) {
	w.t.Helper()
	want := []string{"reference web " + w.point(id).Reference}
	if got := w.host.Things(); !slices.Equal(got, want) {
		w.t.Errorf("on the host: %q, want %q", got, want)
	}
	if runs, err := w.state.Runs(); err != nil || len(runs) > 0 {
		w.t.Errorf("in the journal: %+v, %v", runs, err)
	}
	for i := range w.store.List(ctx, "leases/") {
		w.t.Errorf("left in the store: %s", i.Name)
	}
}

func TestIncrement(t *testing.T) {
	w := newWorld(t)
	first := w.backup()
	if first.FullReason != "vda: first backup; vdb: first backup" || first.ReadBytes != 45*page {
		t.Errorf("first: %+v", first)
	}
	w.tidy(first.Point)
	w.scribble("vda", 7, 2)
	w.scribble("vdb", 1, 1)
	second := w.backup()
	if second.FullReason != "" || second.NewBytes != 3*page || second.ReadBytes > 3*page+2*samples*page {
		t.Errorf("second: %+v", second)
	}
	w.tidy(second.Point)
	third := w.backup()
	if third.NewBytes != 0 || third.FullReason != "" {
		t.Errorf("third: %+v", third)
	}
	p := w.point(third.Point)
	if p.Consistency != "filesystem" || p.History != w.point(first.Point).History || len(p.Files) != 1 {
		t.Errorf("point: %+v", p)
	}
}

func TestReasons(t *testing.T) {
	for _, c := range []struct {
		name string
		harm func(w *world)
		want string
	}{
		{"tracking lost", func(w *world) { w.host.LoseTracking(w.vm, "vda"); w.scribble("vda", 3, 1) }, "vda: change tracking is inconsistent"},
		{"map lies", func(w *world) { w.host.Lie(w.vm, "vda", true); w.scribble("vda", 0, 55) }, "vda: the host's change map is wrong"},
		{"disk added", func(w *world) { w.host.AddDisk(w.vm, "vdc", 3*page, true); w.scribble("vdc", 1, 1) }, "vdc: new disk"},
		{"reference gone", func(w *world) {
			p := w.point(w.lastPoint())
			if err := w.conn.Forget(ctx, w.vm, hypervisor.ReferencePoint(p.Reference)); err != nil {
				w.t.Fatal(err)
			}
			w.scribble("vdb", 1, 1)
		}, "gone from the host; vdb: reference point"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.backup()
			c.harm(w)
			r := w.backup()
			if !strings.Contains(r.FullReason, c.want) {
				t.Errorf("reason %q, want %q", r.FullReason, c.want)
			}
			w.host.Lie(w.vm, "vda", false)
			w.scribble("vda", 11, 1)
			if r = w.backup(); r.FullReason != "" {
				t.Errorf("the run after: %q", r.FullReason)
			}
			w.tidy(r.Point)
		})
	}
}

func (w *world) lastPoint() repo.PointID {
	points, err := w.r.Points(ctx)
	if err != nil || len(points) == 0 {
		w.t.Fatal(err)
	}
	return points[len(points)-1].ID
}

// One VM's failure does not stop the others.
func TestOneFails(t *testing.T) {
	w := newWorld(t)
	other := w.host.AddVM("broken")
	w.host.AddDisk(other, "vda", page, true)
	w.host.SetAgent(other, false)
	third := w.host.AddVM("third")
	w.host.AddDisk(third, "vda", page, true)
	for _, r := range Run(ctx, w.job()) {
		if (r.Err != nil) != (r.VM == "broken") || (r.Point == "") != (r.VM == "broken") {
			t.Errorf("%+v", r)
		}
	}
	if len(w.host.Things()) != 2 {
		t.Errorf("on the host: %q", w.host.Things())
	}
}

// A history goes on under a new identity, by reading and comparing.
func TestHistoryContinued(t *testing.T) {
	w := newWorld(t)
	first := w.point(w.backup().Point)
	twin := w.host.AddVM("web-recovered")
	w.host.AddDisk(twin, "vda", 60*page, true)
	all := make([]byte, 60*page)
	if err := w.host.Read(ctx, w.vm, "vda", all, 0); err != nil {
		t.Fatal(err)
	}
	if err := w.host.Write(ctx, twin, "vda", all, 0); err != nil {
		t.Fatal(err)
	}
	job := w.job()
	job.VMs = slices.DeleteFunc(job.VMs, func(vm hypervisor.VM) bool { return vm.ID != twin })
	job.History = first.History
	r := Run(ctx, job)[0]
	if r.Err != nil || r.NewBytes > page || r.FullReason != "vda: first backup under this identity" {
		t.Fatalf("%+v", r)
	}
	job.History = ""
	if r = Run(ctx, job)[0]; r.Err != nil || r.FullReason != "" || w.point(r.Point).History != first.History {
		t.Fatalf("the run after: %+v", r)
	}
	w.right(r.Point)
}

// The process dies before every step on the host in turn. What was committed
// is whole, the next run cleans up and is right, and nothing is left.
func TestCrashOnHost(t *testing.T) {
	step := 1
	if testing.Short() {
		step = 5
	}
	for n := 0; ; n += step {
		w := newWorld(t)
		w.backup()
		w.scribble("vda", 5, 3)
		w.conn.CrashAt(n)
		r := Run(ctx, w.job())[0]
		if r.Err == nil {
			w.right(r.Point)
		}
		crashed := w.conn.Crashed()
		w.connect()
		w.scribble("vda", 20, 2)
		next := w.backup()
		w.tidy(next.Point)
		if report, err := w.r.Check(ctx, repo.CheckOptions{}); err != nil || len(report.Problems) > 0 {
			t.Fatalf("check: %v, %+v", err, report)
		}
		if !crashed {
			t.Logf("%d steps", n)
			return
		}
	}
}

// The store fails for good at every call in turn, and the process with it.
func TestCrashInStore(t *testing.T) {
	step := 1
	if testing.Short() {
		step = 9 // odd: each call has two ways to fail
	}
	for n := 1; ; n += step {
		w := newWorld(t)
		w.backup()
		w.scribble("vda", 5, 3)
		sound := w.r
		faulty := &blobtest.Faulty{Inner: w.store, Cut: true, Fault: blobtest.Fault(n % 2)}
		w.r = repotest.Open(t, faulty)
		faulty.At = faulty.Calls() + (n+1)/2
		result := Run(ctx, w.job())[0]
		done := faulty.Calls() < faulty.At
		w.r = sound
		if result.Err == nil {
			w.right(result.Point)
		}
		w.connect()
		w.scribble("vda", 20, 2)
		w.tidy(w.backup().Point)
		if done {
			t.Logf("%d calls", n/2)
			return
		}
	}
}

// A cancelled run leaves nothing, and the rest of the VMs fail.
func TestCancel(t *testing.T) {
	w := newWorld(t)
	first := w.backup()
	ctx, cancel := context.WithCancel(ctx)
	w.scribble("vda", 5, 3)
	job := w.job()
	job.Watch.Step = func(vm, what string) {
		if what == "committing" {
			cancel()
		}
	}
	if r := Run(ctx, job)[0]; !errors.Is(r.Err, context.Canceled) {
		t.Fatalf("%+v", r)
	}
	w.tidy(first.Point)
}

// A lost node of the newest point's map does not keep the VM from being backed
// up: the disk is read whole.
func TestLostMapNode(t *testing.T) {
	w := newWorld(t)
	w.host.AddDisk(w.vm, "vdc", 600*page, true)
	w.scribble("vdc", 0, 3)
	w.scribble("vdc", 300, 3)
	w.backup()
	packs := w.packs()
	w.scribble("vdc", 301, 1) // its node and those above are stored elsewhere
	w.backup()
	for _, name := range packs { // all of the first point's nodes
		if p, err := w.store.Get(ctx, name, 0, 8); err == nil && p[6] == 2 {
			if err := w.store.Delete(ctx, name); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.r = repotest.Open(t, w.store)
	if c, err := w.r.Check(ctx, repo.CheckOptions{}); err != nil || len(c.Problems) == 0 {
		t.Fatal(c, err)
	}
	w.scribble("vdc", 1, 1)
	third := w.backup()
	if !strings.Contains(third.FullReason, "vdc: the newest point's map is damaged") {
		t.Errorf("full reason %q", third.FullReason)
	}
	w.tidy(third.Point)
	c, err := w.r.Check(ctx, repo.CheckOptions{})
	if err != nil || slices.ContainsFunc(c.Problems, func(p repo.Problem) bool { return p.Point == third.Point }) {
		t.Errorf("after it: %+v, %v", c.Problems, err)
	}
	if again := w.backup(); again.FullReason != "" {
		t.Errorf("the next one: %+v", again)
	}
}

func (w *world) packs() (names []string) {
	for i, err := range w.store.List(ctx, "packs/") {
		if err != nil {
			w.t.Fatal(err)
		}
		names = append(names, i.Name)
	}
	return names
}
