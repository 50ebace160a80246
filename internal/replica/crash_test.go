package replica

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/repo"
	"holdfast/internal/repo/repotest"
)

// open opens a store as a new process does; nil when that fails.
func open(t *testing.T, s blob.Store) *repo.Repo {
	r, err := repo.Open(ctx, s, []byte(repotest.Passphrase), repo.Options{Cache: t.TempDir()})
	if err != nil {
		return nil
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// The power goes at each call of the one store or the other, which did or did
// not do its work, or that call alone fails. What is committed is whole
// afterwards, and the next copy finishes the work and cleans up.
func TestCopyCutAnywhere(t *testing.T) {
	made := newWorld(t)
	source := open(t, made.from)
	v := made.add("web", 20, 5)
	made.scribble(v, "vda", 0, 4)
	made.scribble(v, "vdb", 1, 2)
	ids := []repo.PointID{made.backup(source, v).ID}
	made.copy(source, open(t, made.to))
	made.scribble(v, "vda", 3, 2)
	ids = append(ids, made.backup(source, v).ID)
	for _, side := range []string{"source", "target"} {
		probe := &blobtest.Faulty{}
		calls := made.cut(side, probe, ids)
		t.Logf("%s: %d calls", side, calls)
		for at := 1; at <= calls; at++ {
			for way := range 3 {
				if way == 2 && at%3 > 0 || testing.Short() && at%9 > 0 {
					continue
				}
				f := &blobtest.Faulty{At: at, Fault: []blobtest.Fault{blobtest.Before, blobtest.After, blobtest.After}[way], Cut: way < 2}
				t.Run(fmt.Sprintf("%s/%d/%d", side, at, way), func(t *testing.T) {
					made.t = t
					made.cut(side, f, ids)
				})
			}
		}
	}
}

// cut copies through a faulty store, and then again without.
func (made *world) cut(side string, f *blobtest.Faulty, ids []repo.PointID) (calls int) {
	t := made.t.(*testing.T)
	w := *made
	w.from, w.to = made.from.Clone(), made.to.Clone()
	var from, to *repo.Repo
	if side == "source" {
		f.Inner = w.from
		from, to = open(t, f), open(t, w.to)
	} else {
		f.Inner = w.to
		from, to = open(t, w.from), open(t, f)
	}
	if from != nil && to != nil {
		results, err := w.tryCopy(from, to)
		if f.At == 0 && (err != nil || len(results) != 1) {
			t.Fatal(results, err)
		}
		for _, r := range results {
			if f.At == 0 && r.Err != nil {
				t.Fatal(r.Err)
			}
		}
	}
	from, to = open(t, w.from), open(t, w.to)
	points, err := to.Points(ctx)
	if err != nil || len(points) == 0 {
		t.Fatal(points, err)
	}
	for _, p := range points {
		if err := w.differs(to, p); err != nil {
			t.Fatalf("after the cut: %v", err)
		}
	}
	w.copy(from, to) // one with nothing to do cleans up too
	w.right(to, ids...)
	w.tidy()
	return f.Calls()
}

// stopping cancels after so many packs were stored.
type stopping struct {
	blob.Store
	left atomic.Int64
	stop context.CancelFunc
}

func (s *stopping) Put(ctx context.Context, name string, data []byte) error {
	err := s.Store.Put(ctx, name, data)
	if strings.HasPrefix(name, "packs/") && s.left.Add(-1) == 0 {
		s.stop()
	}
	return err
}

// What a copy that was stopped has sent is not sent again.
func TestCopyResumed(t *testing.T) {
	w := newWorld(t)
	from := repotest.Open(t, w.from)
	v := w.add("web", 1000)
	w.scribble(v, "vda", 0, 1000)
	p := w.backup(from, v)
	stopped, stop := context.WithCancel(ctx)
	store := &stopping{Store: w.to, stop: stop}
	store.left.Store(2)
	to := repotest.Open(t, store)
	results, err := Run(stopped, Job{From: from, To: to, State: w.state, Points: []repo.Point{p}})
	if err != nil || !errors.Is(results[0].Err, context.Canceled) {
		t.Fatal(results, err)
	}
	w.tidy()
	if points, err := to.Points(ctx); err != nil || len(points) > 0 {
		t.Fatal(points, err)
	}
	r := w.copy(from, repotest.Open(t, w.to))
	if whole := int64(1000 * chunk); r[0].NewBytes > whole-2*240*chunk {
		t.Errorf("of %d bytes %d were sent again", whole, r[0].NewBytes)
	}
	w.right(repotest.Open(t, w.to), p.ID)
	w.tidy()
}

// Two copies to one target at once, beside a running backup of the source and
// one to the target: every point is there once and whole.
func TestCopiesAtOnce(t *testing.T) {
	w := newWorld(t)
	from, to := repotest.Open(t, w.from), repotest.Open(t, w.to)
	web, db, own := w.add("web", 100), w.add("db", 100), w.add("own", 100)
	for i := range 3 {
		w.scribble(web, "vda", i*10, 15)
		w.scribble(db, "vda", i*20, 15)
		w.backup(from, web)
		w.backup(from, db)
	}
	missing, _, err := Missing(ctx, from, to)
	if err != nil || len(missing) != 6 {
		t.Fatal(missing, err)
	}
	var wg sync.WaitGroup
	var copied, there atomic.Int64
	for range 2 {
		source, target := repotest.Open(t, w.from), repotest.Open(t, w.to)
		wg.Go(func() {
			results, err := Run(ctx, Job{From: source, To: target, State: w.state, Points: missing})
			if err != nil {
				t.Error(err)
			}
			for _, r := range results {
				switch {
				case r.Err != nil:
					t.Error(r.Err)
				case r.State == Copied:
					copied.Add(1)
				case r.State == There:
					there.Add(1)
				}
			}
		})
	}
	wg.Go(func() {
		for i := range 4 {
			w.scribble(web, "vda", 50+i, 3)
			w.scribble(own, "vda", i*7, 9)
			if _, err := w.tryBackup(from, web); err != nil {
				t.Error(err)
			}
			if _, err := w.tryBackup(to, own); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	if copied.Load() != 6 || there.Load() != 6 {
		t.Errorf("%d copied and %d there", copied.Load(), there.Load())
	}
	w.copy(from, to)
	for _, r := range []*repo.Repo{from, to} {
		points, err := r.Points(ctx)
		if err != nil || len(points) < 10 {
			t.Fatal(len(points), err)
		}
		var ids []repo.PointID
		for _, p := range points {
			ids = append(ids, p.ID)
		}
		w.right(r, ids...)
	}
	w.tidy()
}

// A point that went after it was chosen is an error that says so, and stops no
// other.
func TestCopyOfGonePoint(t *testing.T) {
	w := newWorld(t)
	from, to := repotest.Open(t, w.from), repotest.Open(t, w.to)
	v := w.add("web", 5)
	w.scribble(v, "vda", 0, 5)
	p := w.backup(from, v)
	gone := p
	gone.ID = repo.PointID(repo.RandomID())
	results, err := Run(ctx, Job{From: from, To: to, State: w.state, Points: []repo.Point{gone, p}})
	if err != nil || !errors.Is(results[0].Err, repo.ErrNotExist) || results[1].State != Copied {
		t.Fatalf("%+v, %v", results, err)
	}
	w.right(to, p.ID)
	w.tidy()
}
