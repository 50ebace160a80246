package repo

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
	"holdfast/internal/repo/internal/tree"
)

// unwatched prunes without waiting for anyone, and merges index objects early.
var unwatched = PruneOptions{Watch: -1, mergeLeast: 3}

func prune(t *testing.T, r *Repo, o PruneOptions) *PruneReport {
	t.Helper()
	report, err := r.Prune(ctx, o)
	if err != nil {
		t.Fatalf("prune: %v", err)
	}
	return report
}

func forget(t *testing.T, r *Repo, ids ...PointID) {
	t.Helper()
	if err := r.Forget(ctx, ids, time.Now()); err != nil {
		t.Fatal(err)
	}
}

// stored counts the objects and bytes under a prefix.
func stored(t *testing.T, s blob.Store, prefix string) (n int, size int64) {
	t.Helper()
	for i, err := range s.List(ctx, prefix) {
		if err != nil {
			t.Fatal(err)
		}
		n, size = n+1, size+i.Size
	}
	return n, size
}

func random(seed uint64, chunks int) []byte {
	var s [32]byte
	binary.LittleEndian.PutUint64(s[:], seed)
	p := make([]byte, chunks*ChunkSize)
	rand.NewChaCha8(s).Read(p)
	return p
}

func mustSave(t *testing.T, r *Repo, vm string, content []byte) *Point {
	t.Helper()
	p, err := save(r, vm, content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// With no lease open one prune does both phases, by deletion of dead packs and
// by rewriting of those of which little is needed; a second one finds nothing.
func TestPrune(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	other := reopen(t, store) // reads all the time, with what it knew
	both := random(1, 40)
	dead := mustSave(t, r, "a", both)
	little := mustSave(t, r, "b", both[:3*ChunkSize])
	gone := mustSave(t, r, "c", random(2, 20))
	stays := mustSave(t, r, "d", random(3, 20))
	if _, err := other.Points(ctx); err != nil {
		t.Fatal(err)
	}
	forget(t, r, dead.ID, gone.ID)

	before := store.Clone()
	dry := prune(t, r, PruneOptions{DryRun: true})
	if n, _ := stored(t, before, ""); true {
		if m, _ := stored(t, store, ""); n != m {
			t.Fatalf("a dry run changed the store: %d objects, then %d", n, m)
		}
	}
	report := prune(t, r, unwatched)
	if dry.Removed != report.Removed || dry.RemovedBytes != report.RemovedBytes || dry.Rewritten != report.Rewritten {
		t.Errorf("dry run %+v\nreal %+v", dry, report)
	}
	if report.Rewritten != 1 || report.Removed < 3 || report.Waiting > 0 || report.RemovedBytes < 60*ChunkSize {
		t.Errorf("%+v", report)
	}
	if _, size := stored(t, store, "packs/"); size > 25*ChunkSize {
		t.Errorf("%d bytes are left in packs", size)
	}
	for _, r := range []*Repo{r, other, reopen(t, store)} {
		equal(t, r, little, both[:3*ChunkSize])
		equal(t, r, stays, random(3, 20))
		clean(t, r, true)
	}
	head := r.current().head
	again := prune(t, r, unwatched)
	if again.Removed+again.Quarantined+again.Rewritten > 0 || r.current().head != head {
		t.Errorf("second prune: %+v", again)
	}
	if n, _ := stored(t, store, "leases/"); n > 0 {
		t.Error("leases are left")
	}
	if live, n := len(r.current().indexes), 0; true {
		if n, _ = stored(t, store, "index/"); n != live {
			t.Errorf("%d index objects, %d live", n, live)
		}
	}
}

// A writer beside a prune: what it has announced stays; packs wait for it; and
// it commits although a pack that it reused was rewritten.
func TestPruneBesideRun(t *testing.T) {
	store := new(blob.Mem)
	r, pruner := create(t, store), reopen(t, store)
	both := random(1, 40)
	dead := mustSave(t, r, "a", both)
	mustSave(t, r, "b", both[:3*ChunkSize])
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	defer run.Close()
	w, err := run.Disk(ctx, nil, 23*ChunkSize)
	if err != nil {
		t.Fatal(err)
	}
	content := slices.Concat(both[:3*ChunkSize], random(5, 20))
	if err := w.WriteAt(ctx, content, 0); err != nil {
		t.Fatal(err)
	}
	if err := run.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	if err := run.announce(ctx); err != nil {
		t.Fatal(err)
	}
	forget(t, pruner, dead.ID)
	report := prune(t, pruner, unwatched)
	if report.Removed != 0 || report.Waiting == 0 || report.Rewritten == 0 || len(report.WaitsFor) != 1 || report.WaitsFor[0].Session != run.lease {
		t.Fatalf("%+v", report)
	}
	root, err := w.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	f, err := run.PutFile(ctx, "domain.xml", []byte("<domain>c</domain>"))
	if err != nil {
		t.Fatal(err)
	}
	p := &Point{VM: "c", History: "aa", Time: time.Now(), Files: []File{f}, Disks: []Disk{{ID: "vda", Size: int64(len(content)), Root: root}}}
	if err := run.Commit(ctx, p); err != nil {
		t.Fatal(err)
	}
	if err := run.Close(); err != nil {
		t.Fatal(err)
	}
	if report := prune(t, pruner, unwatched); report.Removed == 0 || report.Waiting > 0 {
		t.Fatalf("%+v", report)
	}
	r = reopen(t, store)
	equal(t, r, p, content)
	clean(t, r, true)
}

// A writer that found present what a prune then took away does not commit.
func TestPrunedUnderRun(t *testing.T) {
	for _, how := range []string{"chunks", "base"} {
		store := new(blob.Mem)
		r, pruner := create(t, store), reopen(t, store)
		content := random(1, 20)
		dead := mustSave(t, r, "a", content)
		keep := mustSave(t, r, "b", random(2, 5))
		run, err := r.Begin(ctx, RandomID())
		if err != nil {
			t.Fatal(err)
		}
		var base *DiskReader
		if how == "base" {
			if base, err = r.OpenDisk(ctx, dead.Disks[0]); err != nil {
				t.Fatal(err)
			}
		}
		w, err := run.Disk(ctx, base, int64(len(content)))
		if err != nil {
			t.Fatal(err)
		}
		if how == "chunks" {
			if err := w.WriteAt(ctx, content, 0); err != nil {
				t.Fatal(err)
			}
		}
		forget(t, pruner, dead.ID)
		if report := prune(t, pruner, unwatched); report.Quarantined == 0 || report.Removed > 0 {
			t.Fatalf("%s: %+v", how, report)
		}
		root, err := w.Finish(ctx)
		if err != nil {
			t.Fatal(err)
		}
		p := &Point{VM: "c", History: "aa", Disks: []Disk{{ID: "vda", Size: int64(len(content)), Root: root}}}
		if err := run.Commit(ctx, p); !errors.Is(err, ErrPruned) {
			t.Fatalf("%s: commit: %v", how, err)
		}
		if err := run.Close(); err != nil {
			t.Fatal(err)
		}
		q := mustSave(t, r, "c", content) // the next run stores it anew
		prune(t, pruner, unwatched)
		r = reopen(t, store)
		equal(t, r, q, content)
		equal(t, r, keep, random(2, 5))
		clean(t, r, true)
	}
}

// A writer that looked again after one quarantine rests on what it found then,
// and looks once more after the next.
func TestPrunedTwiceUnderRun(t *testing.T) {
	store := new(blob.Mem)
	r, pruner := create(t, store), reopen(t, store)
	both := random(1, 40)
	dead := mustSave(t, r, "a", both)
	little := mustSave(t, r, "b", both[:3*ChunkSize])
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	defer run.Close()
	w, err := run.Disk(ctx, nil, 4*ChunkSize) // a map of its own
	if err != nil {
		t.Fatal(err)
	}
	if err := w.WriteAt(ctx, slices.Concat(both[:3*ChunkSize], random(5, 1)), 0); err != nil {
		t.Fatal(err)
	}
	root, err := w.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	forget(t, pruner, dead.ID)
	if report := prune(t, pruner, unwatched); report.Rewritten == 0 {
		t.Fatalf("%+v", report)
	}
	p := &Point{VM: "c", History: "aa", Disks: []Disk{{ID: "vda", Size: 4 * ChunkSize, Root: root}}}
	if err := errors.Join(run.Flush(ctx), r.refresh(ctx), run.verify(ctx, p)); err != nil {
		t.Fatal(err)
	}
	forget(t, pruner, little.ID)
	prune(t, pruner, unwatched)
	if err := run.Commit(ctx, p); !errors.Is(err, ErrPruned) {
		t.Fatalf("commit: %v", err)
	}
}

// A dead lease is watched and revoked, a living one is not; the one revoked
// cannot commit.
func TestPruneWatch(t *testing.T) {
	store := new(blob.Mem)
	r, pruner := create(t, store), reopen(t, store)
	dead := mustSave(t, r, "a", random(1, 20))
	stopped, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	alive, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	stopped.fail(errClosed) // it beats no more
	forget(t, pruner, dead.ID)
	o := PruneOptions{Watch: 200 * time.Millisecond, Report: func(step string, _, _ int64) {
		if step != "watch" {
			return
		}
		number, master := r.ring.Newest()
		err := putSealed(ctx, store, alive.beatName(1), seal.NewHeader(seal.Beat, 0, number, r.id), map[string]int{"beat": 1}, []byte("{}"), master, "lease")
		if err != nil {
			t.Error(err)
		}
	}}
	report := prune(t, pruner, o)
	if !slices.Equal(report.Revoked, []string{stopped.lease}) || report.Removed > 0 || len(report.WaitsFor) != 1 || report.WaitsFor[0].Session != alive.lease {
		t.Fatalf("%+v", report)
	}
	stopped.beats.Wait()
	stopped.ctx = ctx
	if _, err := saveIn(stopped, "b", random(2, 5), nil, nil); !errors.Is(err, ErrRevoked) {
		t.Fatalf("commit after revocation: %v", err)
	}
	p, err := saveIn(alive, "b", random(3, 5), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := alive.Close(); err != nil {
		t.Fatal(err)
	}
	report = prune(t, pruner, PruneOptions{})
	if report.Removed == 0 || report.Waiting > 0 || report.Leftover == 0 {
		t.Fatalf("%+v", report)
	}
	r = reopen(t, store)
	equal(t, r, p, random(3, 5))
	clean(t, r, true)
	if n, _ := stored(t, store, "packs/"); n != len(packNames(r)) {
		t.Errorf("%d packs, %d in the inventory", n, len(packNames(r)))
	}
}

// packNames lists the packs of the inventory.
func packNames(r *Repo) map[[32]byte]bool {
	names := map[[32]byte]bool{}
	for d := range r.current().indexes {
		packs, err := r.readIndex(ctx, d)
		if err != nil {
			panic(err)
		}
		for _, k := range packs {
			names[k.Name] = true
		}
	}
	return names
}

// A pinned point is hidden when it is forgotten, and its data stays until the
// pin goes.
func TestPrunePinned(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	content := random(1, 10)
	p := mustSave(t, r, "a", content)
	session := RandomID()
	if err := r.Pin(ctx, session, p.ID); err != nil {
		t.Fatal(err)
	}
	forget(t, r, p.ID)
	if points, _ := r.Points(ctx); len(points) != 0 {
		t.Fatal("it shows")
	}
	if report := prune(t, r, unwatched); report.Pinned != 1 || report.Quarantined > 0 {
		t.Fatalf("%+v", report)
	}
	equal(t, reopen(t, store), p, content)
	if err := r.Pin(ctx, RandomID(), p.ID); !errors.Is(err, ErrNotExist) {
		t.Fatalf("a second pin: %v", err)
	}
	damaged := store.Clone()
	names, _ := listNames(ctx, damaged, "pins/")
	damaged.Damage(names[0], func(p []byte) []byte { p[len(p)-1] ^= 1; return p })
	if _, err := reopen(t, damaged).Prune(ctx, unwatched); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "unpin "+session) {
		t.Fatalf("unreadable pin: %v", err)
	}
	if err := r.Unpin(ctx, session); err != nil {
		t.Fatal(err)
	}
	if report := prune(t, r, unwatched); report.Removed == 0 {
		t.Fatalf("%+v", report)
	}
	if n, _ := stored(t, store, "packs/"); n > 0 {
		t.Fatalf("%d packs are left", n)
	}
}

func TestKeep(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	p := mustSave(t, r, "a", random(1, 3))
	now := time.Now()
	for _, until := range []Until{Forever, UntilTime(now.Add(time.Hour)), "someday"} {
		if err := r.Keep(ctx, []PointID{p.ID}, until); (err == nil) == (until == "someday") {
			t.Fatalf("%s: %v", until, err)
		}
		if err := r.Forget(ctx, []PointID{p.ID}, now); !errors.Is(err, ErrKept) {
			t.Fatalf("%s: forget: %v", until, err)
		}
	}
	if points, _ := reopen(t, store).Points(ctx); !points[0].Keep.Holds(now) || points[0].Keep.Holds(now.Add(2*time.Hour)) {
		t.Fatalf("%+v", points)
	}
	head := r.current().head
	if err := r.Keep(ctx, []PointID{p.ID}, points(t, r)[0].Keep); err != nil || r.current().head != head {
		t.Fatalf("the same mark once more: %v", err)
	}
	if err := r.Keep(ctx, []PointID{p.ID}, ""); err != nil {
		t.Fatal(err)
	}
	forget(t, r, p.ID)
	forget(t, r, p.ID) // twice is no error
	if err := r.Keep(ctx, []PointID{p.ID}, Forever); !errors.Is(err, ErrNotExist) {
		t.Fatal(err)
	}
	if err := r.Forget(ctx, []PointID{PointID(RandomID())}, now); !errors.Is(err, ErrNotExist) {
		t.Fatal(err)
	}
}

// What was asked for as a date is told as a date, where it was asked.
func TestUntilInWords(t *testing.T) {
	east := time.FixedZone("east", 3600)
	end := UntilTime(time.Date(2027, 3, 2, 0, 0, 0, 0, east))
	for _, c := range []struct {
		u     Until
		place *time.Location
		want  string
	}{
		{"", east, ""}, {Forever, east, "for ever"},
		{end, east, "until the end of 2027-03-01"}, {end, time.UTC, "until 2027-03-01 23:00:00"},
		{"2027-12-31T18:00:00Z", east, "until 2027-12-31 19:00:00"},
	} {
		if got := c.u.In(c.place); got != c.want {
			t.Errorf("%q: %q, want %q", c.u, got, c.want)
		}
	}
}

func points(t *testing.T, r *Repo) []Point {
	t.Helper()
	all, err := r.Points(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// partial is a store whose listings leave things out and say nothing.
type partial struct {
	blob.Store
	hide func(name string) bool
}

func (s partial) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		for i, err := range s.Store.List(ctx, prefix) {
			if err == nil && s.hide(i.Name) {
				continue
			}
			if !yield(i, err) {
				return
			}
		}
	}
}

// An empty or partial listing, a gap, a lost map or pack: nothing is removed.
func TestPruneRefuses(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	dead := mustSave(t, r, "a", random(1, 10))
	p := mustSave(t, r, "b", random(2, 10))
	forget(t, r, dead.ID)
	node := r.nodePack(t, p)
	for what, c := range map[string]func(s *blob.Mem) blob.Store{
		"no packs listed": func(s *blob.Mem) blob.Store {
			return partial{s, func(name string) bool { return strings.HasPrefix(name, "packs/") }}
		},
		"one pack not listed": func(s *blob.Mem) blob.Store { return partial{s, func(name string) bool { return name == node }} },
		"no index listed": func(s *blob.Mem) blob.Store {
			return partial{s, func(name string) bool { return strings.HasPrefix(name, "index/") }}
		},
		"no lease listed": func(s *blob.Mem) blob.Store {
			return partial{s, func(name string) bool { return strings.HasPrefix(name, "leases/") }}
		},
		"entry missing": func(s *blob.Mem) blob.Store { s.Delete(ctx, entryName(2)); return s },
		"map missing":   func(s *blob.Mem) blob.Store { s.Delete(ctx, node); return s },
		"map damaged": func(s *blob.Mem) blob.Store {
			s.Damage(node, func(p []byte) []byte {
				for i := 64; i < len(p); i += 8 {
					p[i] ^= 1
				}
				return p
			})
			return s
		},
	} {
		s := store.Clone()
		view := c(s)
		before, _ := stored(t, s, "packs/")
		r, err := Open(ctx, view, secret, Options{Cache: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range []PruneOptions{unwatched, {DryRun: true}} {
			if _, err := r.Prune(ctx, o); err == nil {
				if !o.DryRun || what != "no lease listed" {
					t.Errorf("%s: pruned (%+v)", what, o)
				}
			} else if !errors.Is(err, ErrRefused) && what != "entry missing" {
				t.Errorf("%s: %v", what, err)
			} else if strings.HasPrefix(what, "map damaged") && !strings.Contains(err.Error(), string(p.ID)) {
				t.Errorf("%s: it does not name the point: %v", what, err)
			}
		}
		r.Close()
		if after, _ := stored(t, s, "packs/"); after != before {
			t.Errorf("%s: %d packs, then %d", what, before, after)
		}
	}
	// Once check has recorded a loss, and the point is forgotten, it goes on.
	store.Delete(ctx, node)
	r = reopen(t, store)
	if _, err := r.Check(ctx, CheckOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Prune(ctx, unwatched); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), string(p.ID)) {
		t.Fatalf("prune: %v", err)
	}
	forget(t, r, p.ID)
	prune(t, r, unwatched)
	if n, _ := stored(t, store, "packs/"); n > 0 {
		t.Errorf("%d packs are left", n)
	}
}

// nodePack is the pack in which the top of the first disk's map lies.
func (r *Repo) nodePack(t *testing.T, p *Point) string {
	t.Helper()
	root, err := tree.ParseRoot(string(p.Disks[0].Root), p.Disks[0].Size)
	if err != nil {
		t.Fatal(err)
	}
	name, there, err := r.presentIn(root.ID)
	if err != nil || !there {
		t.Fatal(err, there)
	}
	return packName(name)
}

// What a prune or a dead run left half done, the next prune finishes.
func TestPruneLeftovers(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	w, _ := run.Disk(ctx, nil, 10*ChunkSize)
	if err := w.WriteAt(ctx, random(1, 10), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	if err := run.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	foreign := "packs/00/" + strings.Repeat("00", 32)
	store.Put(ctx, foreign, []byte("something else"))
	// Its lease is open: whatever it has stored stays.
	other := reopen(t, store)
	if report := prune(t, other, unwatched); report.Quarantined+report.Removed > 0 {
		t.Fatalf("%+v", report)
	}
	run.fail(errClosed)
	if err := other.EndLease(ctx, run.lease); err != nil { // killed, and known to be
		t.Fatal(err)
	}
	report := prune(t, other, unwatched)
	if report.Leftover == 0 || report.Removed != report.Leftover || len(report.Notes) == 0 {
		t.Fatalf("%+v", report)
	}
	left, _ := listNames(ctx, store, "packs/")
	if !slices.Equal(left, []string{foreign}) {
		t.Fatalf("left: %v", left)
	}
	if n, _ := stored(t, store, "index/"); n > 0 {
		t.Errorf("%d index objects are left", n)
	}
}

// With nothing to do on a thousand points.
func BenchmarkPrune(b *testing.B) {
	store, err := blob.CreateDir(b.TempDir() + "/repo")
	if err != nil {
		b.Fatal(err)
	}
	r, err := initialize(ctx, store, secret, Options{Cache: b.TempDir()}, seal.KDF{Name: "argon2id", Time: 1, Memory: 64, Threads: 1, Root: 1})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	content := random(1, 2000)
	var last *Point
	for i := range 1000 {
		var changed []int
		for k := range 20 {
			c := (i*37 + k*97) % 2000
			copy(content[c*ChunkSize:], fmt.Sprintf("point %d chunk %d", i, c))
			changed = append(changed, c)
		}
		if last, err = save(r, "a", content, last, changed); err != nil {
			b.Fatal(err)
		}
	}
	b.ResetTimer()
	for range b.N {
		report, err := r.Prune(ctx, unwatched)
		if err != nil || report.Points != 1000 || report.Quarantined > 0 {
			b.Fatalf("%v, %+v", err, report)
		}
	}
}
