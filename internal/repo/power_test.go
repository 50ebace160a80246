package repo

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
)

// tried is what a scenario has brought about.
type tried struct {
	mu        sync.Mutex
	committed map[PointID][]byte // acknowledged
	perhaps   map[string][]byte  // by VM: points that may be there without that
	forgets   bool               // it tried to forget those that are to go
}

// backup backs a VM up with packs so small that several are under way at once.
func (w *tried) backup(r *Repo, vm string, content []byte) {
	w.mu.Lock()
	w.perhaps[vm] = content
	w.mu.Unlock()
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		return
	}
	if p, err := saveSmall(run, vm, content); err == nil {
		w.mu.Lock()
		w.committed[p.ID] = content
		w.mu.Unlock()
	}
	run.Close()
}

func saveSmall(run *Run, vm string, content []byte) (*Point, error) {
	run.nodes.target, run.files.target = 100, 100
	d, err := run.Disk(ctx, nil, int64(len(content)))
	if err != nil {
		return nil, err
	}
	d.packer.target = 2 * ChunkSize
	if err := d.WriteAt(ctx, content, 0); err != nil {
		return nil, err
	}
	root, err := d.Finish(ctx)
	if err != nil {
		return nil, err
	}
	f, err := run.PutFile(ctx, "domain.xml", []byte("<domain>"+vm+"</domain>"))
	if err != nil {
		return nil, err
	}
	p := &Point{VM: vm, History: "aa", Time: time.Now().UTC(), Disks: []Disk{{ID: "vda", Size: int64(len(content)), Root: root}}, Files: []File{f}}
	return p, run.Commit(ctx, p)
}

// A power loss at every change that a scenario makes to the store: what was
// under way then, several packs at once among it, happened or not, each by
// itself. Afterwards everything that was acknowledged is there bit by bit, a
// check is clean, and a backup and a prune work.
func TestPowerLossInFlight(t *testing.T) {
	rng := rng(t)
	made := newCrashWorld(t)
	step := 1
	if testing.Short() {
		step = 6
	}
	type scenario func(w *tried, open func() *Repo)
	stays, dead := made.contents[made.stays], made.dead
	fresh := random(7, 9)
	for what, do := range map[string]scenario{
		"backup": func(w *tried, open func() *Repo) {
			w.backup(open(), "e", slices.Concat(stays, fresh))
		},
		"two backups": func(w *tried, open func() *Repo) {
			var wg sync.WaitGroup
			a, b := open(), open()
			wg.Go(func() { w.backup(a, "e", slices.Concat(stays, fresh)) })
			wg.Go(func() { w.backup(b, "f", slices.Concat(fresh[:4*ChunkSize], random(8, 3))) })
			wg.Wait()
		},
		"forget and prune beside a backup": func(w *tried, open func() *Repo) {
			var wg sync.WaitGroup
			a, b := open(), open()
			wg.Go(func() { w.backup(a, "e", slices.Concat(made.contents[dead[0]], fresh)) })
			wg.Go(func() {
				w.forgets = true
				b.Forget(ctx, dead, time.Now())
				b.Prune(ctx, unwatched)
			})
			wg.Wait()
			open().Prune(ctx, unwatched)
		},
		"two prunes": func(w *tried, open func() *Repo) {
			a, b := open(), open()
			w.forgets = true
			a.Forget(ctx, dead, time.Now())
			var wg sync.WaitGroup
			wg.Go(func() { a.Prune(ctx, unwatched) })
			wg.Go(func() { b.Prune(ctx, unwatched) })
			wg.Wait()
		},
		"keep": func(w *tried, open func() *Repo) {
			if r := open(); r.Keep(ctx, dead[:1], Forever) == nil {
				if err := r.Forget(ctx, dead, time.Now()); err == nil {
					panic("what is kept is forgotten")
				}
			}
		},
		"pin and forget": func(w *tried, open func() *Repo) {
			r := open()
			if w.forgets = true; r.Pin(ctx, "cd", dead[0]) == nil {
				r.Forget(ctx, dead, time.Now())
			}
			r.Prune(ctx, unwatched)
			r.Unpin(ctx, "cd")
		},
		"check": func(w *tried, open func() *Repo) { open().Check(ctx, CheckOptions{ReadData: true}) },
		"change of keys beside a backup": func(w *tried, open func() *Repo) {
			var wg sync.WaitGroup
			a, b := open(), open()
			b.slotKDF = cheap
			wg.Go(func() { w.backup(a, "e", slices.Concat(stays, fresh)) })
			wg.Go(func() {
				b.AddPassphrase(ctx, "two", second)
				b.Rotate(ctx)
				b.RotateRoot(ctx, nil)
			})
			wg.Wait()
		},
	} {
		seed := rng.Uint64()
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			try := func(at int) (*tried, *blob.Mem, int) {
				store := made.store.Clone()
				power := &blobtest.Power{Inner: store, At: at, Seed: seed + uint64(at), Delay: 200 * time.Microsecond}
				w := &tried{committed: map[PointID][]byte{}, perhaps: map[string][]byte{}}
				var opened []*Repo
				func() {
					defer func() {
						if p := recover(); p != nil && p != errCut {
							panic(p)
						}
					}()
					do(w, func() *Repo {
						r, err := Open(ctx, power, secret, Options{Cache: cacheDir(t)})
						if err != nil {
							panic(errCut)
						}
						opened = append(opened, r)
						return r
					})
				}()
				power.Wait()
				for _, r := range opened {
					r.Close()
				}
				if at == 0 && power.Lost() {
					t.Fatal("the power went")
				}
				return w, store, power.Changes()
			}
			_, _, most := try(0)
			for at := 1; at <= most+2; at += step {
				w, store, _ := try(at)
				ids := slices.Collect(maps.Keys(w.committed))
				ids = append(ids, made.stays)
				if !w.forgets {
					ids = append(ids, dead...)
				}
				all := maps.Clone(w.committed)
				for vm, content := range w.perhaps {
					all[PointID(vm)] = content
				}
				made.proves(t, fmt.Sprintf("power lost at change %d of about %d", at, most), store, all, ids...)
			}
			t.Logf("%d changes", most)
		})
	}
}

// errCut: the store failed before anything was done.
var errCut = errors.New("cut")

// A check that finds damage and is cut off while it records it has harmed
// nothing: the next one finds it again, and the next backup stores it anew.
func TestCheckPowerLoss(t *testing.T) {
	made := new(blob.Mem)
	content := random(1, 6)
	r := create(t, made)
	whole := mustSave(t, r, "b", random(2, 6))
	sound, _ := blob.Names(ctx, made, "")
	p := mustSave(t, r, "a", content)
	names, _ := blob.Names(ctx, made, "")
	for _, name := range names {
		if strings.HasPrefix(name, "packs/") && !slices.Contains(sound, name) {
			made.Damage(name, func(b []byte) []byte { return b[:len(b)/2] })
		}
	}
	for _, lost := range []string{"packs", "packs and an index object"} {
		if lost != "packs" { // it is made again from what is left
			indexes, _ := blob.Names(ctx, made, "index/")
			for _, name := range indexes {
				made.Delete(ctx, name)
			}
		}
		for at := 1; ; at++ {
			store := made.Clone()
			power := &blobtest.Power{Inner: store, At: at, Seed: uint64(at), Delay: 100 * time.Microsecond}
			if r, err := Open(ctx, power, secret, Options{Cache: cacheDir(t)}); err == nil {
				r.Check(ctx, CheckOptions{ReadData: true})
				r.Close()
			}
			power.Wait()
			r := reopen(t, store)
			if report, err := r.Check(ctx, CheckOptions{ReadData: true}); err != nil || len(lostPoints(report)) == 0 {
				t.Fatalf("%s: cut at change %d: %+v, %v", lost, at, report, err)
			}
			equal(t, r, whole, random(2, 6))
			again := mustSave(t, r, "a", content)
			for _, r := range []*Repo{r, reopen(t, store)} {
				equal(t, r, p, content)
				equal(t, r, again, content)
				if report, err := r.Check(ctx, CheckOptions{ReadData: true}); err != nil || len(lostPoints(report)) > 0 {
					t.Fatalf("%s: cut at change %d: after the next backup: %+v, %v", lost, at, report, err)
				}
			}
			if !power.Lost() {
				t.Logf("%s: %d changes", lost, at-1)
				break
			}
		}
	}
}

// An init that is cut off anywhere has made a repository or none, and can be
// done again in the same place.
func TestInitPowerLoss(t *testing.T) {
	for at := 1; ; at++ {
		store := new(blob.Mem)
		power := &blobtest.Power{Inner: store, At: at, Seed: uint64(at)}
		r, err := initialize(ctx, power, secret, Options{Cache: cacheDir(t)}, cheap)
		if err == nil {
			r.Close()
		}
		power.Wait()
		cheap := cheap
		cheap.Root = 1
		if r, err := initialize(ctx, store, secret, Options{Cache: cacheDir(t)}, cheap); err == nil {
			r.Close()
		} else if !errors.Is(err, ErrExist) {
			t.Fatalf("cut at change %d: %v", at, err)
		}
		content := random(1, 2)
		r = reopen(t, store)
		equal(t, r, mustSave(t, r, "a", content), content)
		clean(t, r, true)
		if !power.Lost() {
			return
		}
	}
}
