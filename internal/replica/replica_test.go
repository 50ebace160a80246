package replica

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/repo"
	"holdfast/internal/repo/repotest"
)

func TestCopy(t *testing.T) {
	w := newWorld(t)
	from := repotest.Open(t, w.from)
	store := &counting{Store: w.to}
	to := repotest.Open(t, store)
	web, db := w.add("web", 900, 20), w.add("db", 30)
	w.scribble(web, "vda", 0, 60)
	w.scribble(web, "vda", 700, 10)
	w.scribble(web, "vdb", 3, 17)
	w.scribble(db, "vda", 0, 10)
	p1, p2 := w.backup(from, web), w.backup(from, db)
	w.scribble(web, "vda", 50, 3)
	w.scribble(web, "vda", 702, -2)
	p3 := w.backup(from, web)

	plan, err := Plan(ctx, Job{From: from, To: to, State: w.state, Points: []repo.Point{p1, p2, p3}})
	if err != nil || len(plan) != 3 || plan[0].ReadBytes != 87*chunk-1000+int64(len(w.want[p1.ID].file)) || plan[2].Base != p1.ID ||
		plan[2].ReadBytes != 3*chunk+int64(len(w.want[p3.ID].file)) || plan[2].State != Planned {
		t.Errorf("plan: %+v, %v", plan, err)
	}
	store.since()
	results := w.copy(from, to)
	_, sent, got := store.since()
	if len(results) != 3 || results[0].FullReason == "" || results[2].FullReason != "" || results[2].Base != p1.ID {
		t.Errorf("%+v", results)
	}
	// 100 chunks of noise, of which each is sent once and read back once.
	if lo, hi := int64(100*chunk), int64(100*chunk+200<<10); sent < lo || sent > hi || got < lo || got > hi {
		t.Errorf("sent %d bytes and got %d, of %d", sent, got, lo)
	}
	w.right(to, p1.ID, p2.ID, p3.ID)
	w.tidy()
	points, _ := to.Points(ctx)
	c := points[2]
	if c.History != p3.History || c.VM != "web" || c.Host != p3.Host || c.VMID != p3.VMID || !c.Time.Equal(p3.Time) ||
		c.Consistency != p3.Consistency || !slices.Equal(c.Notes, p3.Notes) || c.CopiedFrom != from.ID() || c.Reference != "" || c.ReadBytes != 7 {
		t.Errorf("copied point: %+v", c)
	}

	// A second copy moves nothing; what changes moves alone.
	store.since()
	if results := w.copy(from, to); len(results) != 0 {
		t.Errorf("copied again: %+v", results)
	}
	if again, err := Run(ctx, Job{From: from, To: to, State: w.state, Points: []repo.Point{p1}}); err != nil || again[0].State != There {
		t.Errorf("%+v, %v", again, err)
	}
	// Each look for news of the chain reads the 64 bytes with which its newest entry begins.
	if calls, sent, got := store.since(); calls > 10 || sent > 0 || got > 64*calls/2 {
		t.Errorf("with nothing to do: %d calls, %d bytes sent, %d got", calls, sent, got)
	}
	w.scribble(web, "vda", 705, 1)
	w.scribble(web, "vdb", 19, 1) // the disk's last chunk, in part
	p4 := w.backup(from, web)
	source := &counting{Store: w.from}
	from2 := repotest.Open(t, source)
	source.since()
	results = w.copy(from2, to)
	if r := results[0]; len(results) != 1 || r.NewBytes != 3*chunk || r.ReadBytes > 2*chunk+100 || r.Base != p3.ID {
		t.Errorf("%+v", results)
	}
	_, sent, got = store.since()
	_, _, read := source.since()
	// Besides the two chunks: map nodes, and the samples from the source.
	if sent > 2*chunk+100<<10 || got > 2*chunk+200<<10 || read > int64(2+2*samples)*chunk {
		t.Errorf("sent %d, got %d, read %d", sent, got, read)
	}
	w.right(repotest.Open(t, w.to), p1.ID, p2.ID, p3.ID, p4.ID)
	w.right(from, p1.ID, p2.ID, p3.ID, p4.ID)
	w.tidy()
}

// Points that come back from a copy, out of order, are the same points.
func TestCopyBack(t *testing.T) {
	w := newWorld(t)
	from, to := repotest.Open(t, w.from), repotest.Open(t, w.to)
	v := w.add("web", 300)
	var ids []repo.PointID
	var points []repo.Point
	for i := range 3 {
		w.scribble(v, "vda", i*100, 5)
		points = append(points, w.backup(from, v))
		ids = append(ids, points[i].ID)
	}
	for _, i := range []int{2, 0} {
		r, err := Run(ctx, Job{From: from, To: to, State: w.state, Points: points[i : i+1]})
		if err != nil || r[0].Err != nil {
			t.Fatal(r, err)
		}
		if i == 0 && (r[0].Base != ids[2] || r[0].NewBytes != chunk) { // its file alone is new
			t.Errorf("older than its base: %+v", r)
		}
	}
	if r := w.copy(from, to); len(r) != 1 || r[0].Base != ids[0] || r[0].NewBytes != chunk {
		t.Errorf("between two: %+v", r)
	}
	w.right(to, ids[2], ids[0], ids[1])
	if r := w.copy(to, from); len(r) != 0 {
		t.Errorf("copied back what is there: %+v", r)
	}
	if _, err := Run(ctx, Job{From: from, To: repotest.Open(t, w.from.Clone()), State: w.state}); !errors.Is(err, ErrSame) {
		t.Errorf("to a plain copy of itself: %v", err)
	}
	w.tidy()
}

// Disks that come, go, grow and shrink.
func TestCopyResized(t *testing.T) {
	w := newWorld(t)
	from, to := repotest.Open(t, w.from), repotest.Open(t, w.to)
	v := w.add("web", 20, 300)
	var ids []repo.PointID
	for _, size := range []int{300*chunk - 1000, 10*chunk + 5, 10*chunk - 70, 700*chunk + 1, 0, 2 * chunk, 256 * chunk, 257*chunk + 9} {
		d := v.disks["vdb"]
		if size <= len(d) {
			v.disks["vdb"] = d[:size:size]
		} else {
			v.disks["vdb"] = append(d, make([]byte, size-len(d))...)
		}
		if n := (size + chunk - 1) / chunk; n > 0 {
			w.scribble(v, "vdb", n-1, 1)
			w.scribble(v, "vdb", n/2, 1)
		}
		w.scribble(v, "vda", 3, 1)
		ids = append(ids, w.backup(from, v).ID)
		if w.rng.IntN(2) == 0 {
			w.copy(from, to)
		}
	}
	delete(v.disks, "vda")
	v.disks["vdc"], v.changed["vdc"] = make([]byte, 5*chunk), map[int]bool{}
	w.scribble(v, "vdc", 1, 2)
	ids = append(ids, w.backup(from, v).ID)
	r := w.copy(from, to)
	if last := r[len(r)-1]; !strings.HasPrefix(last.FullReason, "vdc: the points copied before") {
		t.Errorf("%+v", last)
	}
	w.right(to, ids...)
}

// A chunk that the target has lost comes back with the next copy that meets it.
func TestCopyRefills(t *testing.T) {
	w := newWorld(t)
	from, to := repotest.Open(t, w.from), repotest.Open(t, w.to)
	v := w.add("web", 40)
	w.scribble(v, "vda", 0, 20)
	p1 := w.backup(from, v)
	w.copy(from, to)
	w.scribble(v, "vda", 30, 1)
	p2 := w.backup(from, v)
	for i := range w.to.Clone().List(ctx, "packs/") {
		if i.Size > 4*chunk { // not the map, which belongs to one point alone
			w.to.Damage(i.Name, func(p []byte) []byte { p[len(p)/2] ^= 1; return p })
		}
	}
	hurt := repotest.Open(t, w.to)
	if c, err := hurt.Check(ctx, repo.CheckOptions{ReadData: true}); err != nil || len(c.Problems) == 0 {
		t.Fatal(c, err)
	}
	r := w.copy(from, hurt)
	if len(r) != 1 || r[0].NewBytes != 3*chunk || r[0].FullReason != "" { // changed, lost, and its file
		t.Errorf("%+v", r)
	}
	healed := repotest.Open(t, w.to)
	points, _ := healed.Points(ctx)
	for _, p := range points {
		if err := w.differs(healed, p); err != nil {
			t.Errorf("%s: %v", p.ID, err)
		}
	}
	if len(points) != 2 || points[0].ID != p1.ID || points[1].ID != p2.ID {
		t.Error(points)
	}
}

// What the source cannot read stops its point alone.
func TestCopyDamagedSource(t *testing.T) {
	w := newWorld(t)
	from, to := repotest.Open(t, w.from), repotest.Open(t, w.to)
	good, bad := w.add("good", 10), w.add("bad", 10)
	w.scribble(good, "vda", 0, 5)
	w.scribble(bad, "vda", 0, 5)
	before := w.from.Clone()
	w.backup(from, bad)
	for i := range w.from.Clone().List(ctx, "packs/") {
		if _, err := before.Get(ctx, i.Name, 0, 1); err != nil && i.Size > 4*chunk {
			w.from.Damage(i.Name, func(p []byte) []byte { p[len(p)/2] ^= 1; return p })
		}
	}
	ok := w.backup(from, good)
	results, err := w.tryCopy(from, to)
	if err != nil || len(results) != 2 || !errors.Is(results[0].Err, repo.ErrDamaged) || results[0].State != Failed || results[1].Err != nil {
		t.Fatalf("%+v, %v", results, err)
	}
	w.right(to, ok.ID)
	w.tidy()
}
