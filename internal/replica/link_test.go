package replica

import (
	"context"
	"encoding/binary"
	"iter"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo"
	"holdfast/internal/repo/repotest"
	"holdfast/internal/state"
)

// link is a store behind a slow line: each request is under way for half the
// round trip before and after its bytes, which share the line with those of
// the others, in slices. Time is the bubble's.
type link struct {
	blob.Store
	trip     time.Duration
	up, down *lane // one and the same where the line carries one direction at a time
	packs    int   // that are still stored before the line is cut; 0: never
	mu       sync.Mutex
}

type lane struct {
	rate int64 // bytes per second

	mu    sync.Mutex // guards what follows
	free  time.Time  // when what is under way will have passed
	bytes int64
}

const slice = 64 << 10

func (l *lane) pass(n int) {
	for first := true; n > 0 || first; first = false {
		k := min(n, slice)
		l.mu.Lock()
		if now := time.Now(); l.free.Before(now) {
			l.free = now
		}
		l.free = l.free.Add(time.Duration(int64(k) * int64(time.Second) / l.rate))
		until := l.free
		l.bytes += int64(k)
		l.mu.Unlock()
		time.Sleep(time.Until(until))
		n -= k
	}
}

// reset begins to count anew.
func (l *link) reset() {
	for _, a := range []*lane{l.up, l.down} {
		a.mu.Lock()
		a.bytes = 0
		a.mu.Unlock()
	}
}

const overhead = 200 // bytes of a request or an answer without its content

func (l *link) Put(ctx context.Context, name string, data []byte) error {
	l.up.pass(overhead + len(data))
	time.Sleep(l.trip / 2)
	if l.cut(name) {
		return errCut
	}
	err := l.Store.Put(ctx, name, data)
	l.down.pass(overhead)
	time.Sleep(l.trip / 2)
	return err
}

func (l *link) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	l.up.pass(overhead)
	time.Sleep(l.trip / 2)
	if l.cut("") {
		return nil, errCut
	}
	p, err := l.Store.Get(ctx, name, off, n)
	l.down.pass(overhead + len(p))
	time.Sleep(l.trip / 2)
	return p, err
}

func (l *link) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		time.Sleep(l.trip)
		if l.cut("") {
			yield(blob.Info{}, errCut)
			return
		}
		for i, err := range l.Store.List(ctx, prefix) {
			if !yield(i, err) {
				return
			}
		}
	}
}

func (l *link) Delete(ctx context.Context, name string) error {
	time.Sleep(l.trip)
	if l.cut("") {
		return errCut
	}
	return l.Store.Delete(ctx, name)
}

var errCut = context.DeadlineExceeded

// cut counts packs, and says whether the line is cut.
func (l *link) cut(name string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.packs > 0 && strings.HasPrefix(name, "packs/") {
		if l.packs--; l.packs == 0 {
			l.packs = -1
		}
	}
	return l.packs < 0
}

func slow(s blob.Store, kbit int64) *link {
	rate := kbit * 1000 / 8
	return &link{Store: s, trip: 50 * time.Millisecond, up: &lane{rate: rate}, down: &lane{rate: rate}}
}

// sparse makes a point of one disk of so many chunks, with noise in some.
func sparse(t *testing.T, r *repo.Repo, base *repo.Point, size int64, at []int64, salt byte) repo.Point {
	t.Helper()
	run, err := r.Begin(ctx, state.NewID())
	if err != nil {
		t.Fatal(err)
	}
	var b *repo.DiskReader
	p := repo.Point{History: "aa", VM: "web", Time: time.Now().UTC()}
	if base != nil {
		if b, err = r.OpenDisk(ctx, base.Disks[0]); err != nil {
			t.Fatal(err)
		}
	}
	w, err := run.Disk(ctx, b, size*chunk)
	for _, c := range at {
		if err == nil {
			err = w.WriteAt(ctx, noiseOf(c, salt), c*chunk)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	root, err := w.Finish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	p.Disks = []repo.Disk{{ID: "vda", Size: size * chunk, Root: root}}
	if err := run.Commit(ctx, &p); err != nil {
		t.Fatal(err)
	}
	if err := run.Close(); err != nil {
		t.Fatal(err)
	}
	return p
}

// noiseOf is a chunk that does not shrink.
func noiseOf(c int64, salt byte) []byte {
	p := make([]byte, chunk)
	x := uint64(c)<<8 | uint64(salt) | 1<<60
	for i := 0; i < len(p); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p[i:], x)
	}
	return p
}

// bubble runs f in one, with nothing in it that lives on outside, as what
// packages make once and keep, or that would live on, as what lies in pools.
func bubble(t *testing.T, f func(t *testing.T)) {
	w := newWorld(t)
	from, to := repotest.Open(t, w.from), repotest.Open(t, w.to)
	v := w.add("web", 2)
	w.scribble(v, "vda", 0, 1)
	w.backup(from, v)
	w.copy(from, to)
	defer func() {
		runtime.GC()
		runtime.GC() // the first leaves pools their victims
	}()
	synctest.Test(t, f)
}

func every(n, step int64) (at []int64) {
	for i := range n {
		at = append(at, i*step)
	}
	return at
}

// Over 50 ms and 20 Mbit/s, to the target or from the source: what passes is
// about what is new, and the line is busy with it.
func TestSlowLink(t *testing.T) {
	const kbit = 20000
	for _, c := range []struct {
		name string
		pull bool // the source is far, not the target
		back repo.ReadBack
	}{{"far target", false, repo.ReadSample}, {"far target, all read back", false, repo.ReadAll}, {"far source", true, repo.ReadAll}} {
		t.Run(c.name, func(t *testing.T) {
			if testing.Short() && c.back == repo.ReadAll && !c.pull {
				t.Skip("the others go the same ways")
			}
			bubble(t, func(t *testing.T) {
				fromStore, toStore := repotest.Store(t), repotest.Other(t)
				near := repotest.Open(t, fromStore)
				const size = 300 * 256 // chunks: 4.7 GiB
				p1 := sparse(t, near, nil, size, every(1024, 1), 1)
				all := every(300, 256)
				p2 := sparse(t, near, &p1, size, all, 2) // one chunk in each leaf of the map

				var line *link
				var from, to *repo.Repo
				if c.pull {
					line = slow(fromStore, kbit)
					from, to = repotest.Open(t, line), repotest.Open(t, toStore)
				} else {
					line = slow(toStore, kbit)
					if c.back == repo.ReadAll {
						line.down = line.up
					}
					from, to = near, repotest.Open(t, line)
				}
				st, err := state.Open(t.TempDir())
				if err != nil {
					t.Fatal(err)
				}
				for i, p := range []repo.Point{p1, p2} {
					line.reset()
					began := time.Now()
					r, err := Run(ctx, Job{From: from, To: to, State: st, Points: []repo.Point{p}, ReadBack: c.back})
					if err != nil || r[0].Err != nil || len(r[0].Warnings) > 0 {
						t.Fatal(r, err)
					}
					took := time.Since(began)
					fresh := int64([]int{1024, 300}[i] * chunk)
					main, other := line.up, line.down
					if c.pull {
						main, other = other, main
					}
					if main == other {
						fresh *= 2 // first one way, then the other
					}
					busy := float64(main.bytes) / float64(main.rate) / took.Seconds()
					t.Logf("%s: %d MiB new, %d KiB more in its direction, %d KiB in the other; %.1f s, the line %.0f %% busy",
						[]string{"whole", "increment"}[i], fresh>>20, (main.bytes-fresh)>>10, other.bytes>>10, took.Seconds(), busy*100)
					more := int64(1 << 20)
					if c.pull {
						more += samples * chunk // read once more to be compared
					}
					if main.bytes > fresh+fresh/20+more {
						t.Errorf("%d bytes passed for %d that are new", main.bytes, fresh)
					}
					if c.back == repo.ReadSample && other.bytes > fresh/8+1<<20 {
						t.Errorf("%d bytes passed in the other direction", other.bytes)
					}
					if busy < 0.7 {
						t.Errorf("the line was %.0f %% busy", busy*100)
					}
				}
				check, err := to.Check(ctx, repo.CheckOptions{})
				if err != nil || len(check.Problems) > 0 || check.Points != 2 {
					t.Fatal(check, err)
				}
				points, _ := to.Points(ctx)
				d, err := to.OpenDisk(ctx, points[1].Disks[0])
				if err != nil {
					t.Fatal(err)
				}
				for _, at := range append(all, 1, 1000) {
					salt := byte(2)
					if at%256 != 0 {
						salt = 1
					}
					if ok, err := d.Matches(ctx, noiseOf(at, salt), at*chunk); !ok || err != nil {
						t.Fatalf("chunk %d: %v, %v", at, ok, err)
					}
				}
			})
		})
	}
}

// A copy that dies without a word loses ten minutes of sending and what was
// under way, not all.
func TestKilledOverSlowLink(t *testing.T) {
	if testing.Short() {
		t.Skip("it sends 150 MiB")
	}
	bubble(t, func(t *testing.T) {
		fromStore, toStore := repotest.Store(t), repotest.Other(t)
		from := repotest.Open(t, fromStore)
		p := sparse(t, from, nil, 1500, every(1500, 1), 1)
		line := slow(toStore, 200) // 16 MiB pass in 11 minutes
		line.packs = 5
		st, err := state.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		far, err := repo.Open(ctx, line, []byte(repotest.Passphrase), repo.Options{Cache: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		if r, err := Run(ctx, Job{From: from, To: far, State: st, Points: []repo.Point{p}, ReadBack: repo.ReadSample}); err != nil || r[0].Err == nil {
			t.Fatal(r, err)
		}
		far.Close()
		to := repotest.Open(t, toStore)
		if open, err := to.LeaseOpen(ctx, ""); err != nil || !open {
			t.Fatal("nothing was left behind: the test shows nothing", err)
		}
		r, err := Run(ctx, Job{From: from, To: to, State: st, Points: []repo.Point{p}})
		if err != nil || r[0].Err != nil {
			t.Fatal(r, err)
		}
		if sent := r[0].NewBytes >> 20; sent > 1500/16-2*15 {
			t.Errorf("%d MiB were sent again", sent)
		}
		if open, err := to.LeaseOpen(ctx, ""); err != nil || open {
			t.Error("the dead run's lease is still there", err)
		}
	})
}
