package recovery

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/hypervisor"
	"holdfast/internal/publish"
	"holdfast/internal/state"
)

func both(t *testing.T, f func(t *testing.T, writes Writes)) {
	t.Parallel() // they wait for syncs, mostly
	for _, writes := range []Writes{HostOverlay, ServerOverlay} {
		t.Run(string(writes), func(t *testing.T) {
			t.Parallel()
			f(t, writes)
		})
	}
}

// The whole life of a session: recovered, its server lost and brought back,
// migrated in two goes, done.
func TestStory(t *testing.T) {
	both(t, func(t *testing.T, writes Writes) {
		w := newWorld(t)
		r := w.recover(writes)
		if r.State != Running || r.Times.Published == nil || r.Times.Started == nil || r.Times.Answering == nil {
			t.Errorf("record %+v", r)
		}
		w.checkGuest(r)
		w.write(r, "vda", 100, "written while served")
		w.until("the first read is noted", func() bool { return w.get(r.ID).Times.FirstRead != nil })
		if i := w.get(r.ID); !i.Serving || !strings.Contains(i.Safe, "refused until local") {
			t.Errorf("info %+v", i)
		}
		if w.pins[r.ID] != w.point.ID {
			t.Errorf("pins %v", w.pins)
		}

		w.killServers()
		if err := w.mem.Read(t.Context(), r.VMID, "vdb", make([]byte, 512), 0); err == nil {
			t.Fatal("read what is not served")
		}
		if rs := w.resume(); len(rs) != 1 || !strings.HasPrefix(rs[0].Did, "served again, guest goes on") {
			t.Errorf("resumed %+v", rs)
		}
		if rs := w.resume(); len(rs) != 1 || rs[0].Did != "" {
			t.Errorf("resumed again %+v", rs)
		}
		w.checkGuest(r)

		ctx, cancel := context.WithCancel(t.Context())
		_, err := Migrate(ctx, w.deps(), r.ID, "", func(done, total int64) {
			if total != 2*size {
				t.Errorf("progress of %d bytes", total)
			}
			if done > size {
				cancel()
			}
		})
		if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "continue with") {
			t.Fatalf("interrupted: %v", err)
		}
		if i := w.get(r.ID); i.State != Migrating || !i.Serving {
			t.Errorf("interrupted: %+v", i)
		}
		w.write(r, "vdb", 5000, "written between")
		if _, err := Migrate(t.Context(), w.deps(), r.ID, store2, nil); !errors.Is(err, ErrState) {
			t.Errorf("another storage in between: %v", err)
		}
		w.killServers() // migrate brings it back by itself
		m, err := Migrate(t.Context(), w.deps(), r.ID, "", nil)
		if err != nil || m.State != Done {
			t.Fatalf("%+v, %v", m, err)
		}
		w.checkDone(r)
		if _, err := Undo(t.Context(), w.deps(), r.ID); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), "is not touched") {
			t.Errorf("undo of what is done: %v", err)
		}
		w.checkDone(r)
		if err := Forget(w.deps(), r.ID); err != nil {
			t.Error(err)
		}
		if infos, err := List(w.st); err != nil || len(infos) > 0 {
			t.Errorf("%v, %v", infos, err)
		}
	})
}

// checkDone makes sure that a session is over and its VM the operator's.
func (w *world) checkDone(r Record) {
	w.Helper()
	i := w.get(r.ID)
	if i.State != Done || i.Serving || i.Times.Migrated == nil || i.Times.Done == nil {
		w.Errorf("record %+v", i)
	}
	w.checkUnpublished()
	w.checkGuest(r)
	local, paths := w.mem.Local(r.VMID)
	if !local || len(paths) != 2 {
		w.Errorf("local %v, files %q", local, paths)
	}
	var want []string
	for _, p := range paths {
		want = append(want, "file "+p)
	}
	want = append(want, "vm web", "nvram "+r.NVRAM)
	slices.Sort(want)
	if left := w.mem.Things(); !slices.Equal(left, want) {
		w.Errorf("on the host: %q, want %q", left, want)
	}
	s, err := w.st.Session(r.ID)
	w.must(err)
	if _, err := os.Stat(s.Path(overlays)); err == nil {
		w.Error("overlays are left in the session")
	}
}

func TestUndo(t *testing.T) {
	both(t, func(t *testing.T, writes Writes) {
		w := newWorld(t)
		r := w.recover(writes)
		w.write(r, "vda", 0, "lost, and that is meant")
		if _, err := Undo(t.Context(), w.deps(), r.ID[:5]); err != nil {
			t.Fatal(err)
		}
		w.checkClean()
		if _, err := Undo(t.Context(), w.deps(), r.ID); !errors.Is(err, state.ErrNotExist) {
			t.Errorf("undone twice: %v", err)
		}
	})
}

// Recover is killed at every step: undo then leaves nothing, and the VM can be
// recovered again.
func TestRecoverKilled(t *testing.T) {
	both(t, func(t *testing.T, writes Writes) {
		for n := 0; ; n++ {
			w := newWorld(t)
			died, err := w.run(n, func() error {
				_, err := Recover(t.Context(), w.deps(), w.request(writes))
				return err
			})
			if !died {
				w.must(err)
				t.Logf("%d steps", n)
				if n < 10 {
					t.Errorf("only %d steps: %q", n, w.steps)
				}
				return
			}
			at := w.steps[n]
			if id := w.only(); id != "" {
				rs, err := Resume(t.Context(), w.deps())
				w.must(err)
				if s := w.get(id).State; s == Publishing && (rs[0].Err == nil || !strings.Contains(rs[0].Err.Error(), "undo "+id)) {
					t.Errorf("killed at %s: resumed %+v", at, rs)
				} else if s == Running {
					w.must(rs[0].Err)
				}
				if _, err := Undo(t.Context(), w.deps(), id); err != nil {
					t.Errorf("killed at %s: %v", at, err)
				}
			}
			w.checkClean()
			w.checkGuest(w.recover(writes))
			w.killServers()
			if t.Failed() {
				t.Fatalf("killed at %s", at)
			}
		}
	})
}

// Undo is killed at every step: undo again finishes it.
func TestUndoKilled(t *testing.T) {
	both(t, func(t *testing.T, writes Writes) {
		for n := 0; ; n++ {
			w := newWorld(t)
			r := w.recover(writes)
			died, err := w.run(n, func() error {
				_, err := Undo(t.Context(), w.deps(), r.ID)
				return err
			})
			if !died {
				w.must(err)
				t.Logf("%d steps", n)
				return
			}
			at := w.steps[n]
			// Resume does not bring it back.
			if rs, err := Resume(t.Context(), w.deps()); err != nil || len(rs) > 0 && (rs[0].State != Undone || rs[0].Err == nil) {
				t.Errorf("killed at %s: resumed %+v, %v", at, rs, err)
			}
			if id := w.only(); id != "" {
				if _, err := Undo(t.Context(), w.deps(), id); err != nil {
					t.Errorf("killed at %s: %v", at, err)
				}
			}
			w.checkClean()
			if t.Failed() {
				t.Fatalf("killed at %s", at)
			}
		}
	})
}

// Migrate is killed at every step: migrated again it is done; or it is undone,
// unless the VM was local already.
func TestMigrateKilled(t *testing.T) {
	both(t, func(t *testing.T, writes Writes) {
		for _, storage := range []string{store, store2} {
			if storage == store2 && writes == HostOverlay {
				continue // the host in memory fills in place only
			}
			for n := 0; ; n++ {
				w := newWorld(t)
				r := w.recover(writes)
				w.write(r, "vda", 70000, "before")
				died, err := w.run(n, func() error {
					_, err := Migrate(t.Context(), w.deps(), r.ID, storage, nil)
					return err
				})
				if !died {
					w.must(err)
					w.checkDone(r)
					t.Logf("%d steps", n)
					break
				}
				at := w.steps[n]
				w.killServers()
				if n%2 == 0 {
					w.resume()
				}
				if s := w.get(r.ID).State; n%3 == 0 && s != Local && s != Done {
					if _, err := Undo(t.Context(), w.deps(), r.ID); err != nil {
						t.Errorf("killed at %s: %v", at, err)
					}
					w.checkClean()
				} else {
					if _, err := Migrate(t.Context(), w.deps(), r.ID, "", nil); err != nil {
						t.Errorf("killed at %s: %v", at, err)
					}
					w.checkDone(r)
				}
				if t.Failed() {
					t.Fatalf("killed at %s", at)
				}
			}
		}
	})
}

// Every step of a recovery fails once: what was made is removed at once.
func TestRecoverFails(t *testing.T) {
	both(t, func(t *testing.T, writes Writes) {
		boom := errors.New("boom")
		for _, step := range []string{"preflight", "create disk", "create vm", "start"} {
			w := newWorld(t)
			w.mem.OnStep(func(s string) error {
				if strings.HasPrefix(s, step) {
					return boom
				}
				return nil
			})
			q := w.request(writes)
			_, err := Recover(t.Context(), w.deps(), q)
			if step == "create disk" && writes == ServerOverlay {
				w.must(err)
				continue
			}
			if !errors.Is(err, boom) {
				t.Errorf("%s: %v", step, err)
			}
			w.mem.OnStep(nil)
			w.checkClean()
		}
	})
}

func TestRecoverServeFails(t *testing.T) {
	w := newWorld(t)
	d := w.deps()
	d.Serve = func(context.Context, string) (publish.Ready, error) {
		return publish.Ready{}, errors.New("no passphrase")
	}
	if _, err := Recover(t.Context(), d, w.request(HostOverlay)); err == nil || !strings.Contains(err.Error(), "no passphrase") {
		t.Errorf("%v", err)
	}
	w.checkClean()
}

// A host that does not answer while a recovery is being undone: the session
// stays and says so.
func TestUndoLater(t *testing.T) {
	w := newWorld(t)
	r := w.recover(HostOverlay)
	gone := errors.New("host is gone")
	w.mem.OnStep(func(s string) error { return gone })
	if _, err := Undo(t.Context(), w.deps(), r.ID); !errors.Is(err, gone) {
		t.Errorf("%v", err)
	}
	if i := w.get(r.ID); i.State != Undone {
		t.Errorf("%+v", i)
	}
	w.mem.OnStep(nil)
	if _, err := Undo(t.Context(), w.deps(), r.ID); err != nil {
		t.Fatal(err)
	}
	w.checkClean()
}

func TestRefusals(t *testing.T) {
	w := newWorld(t)
	r := w.recover(HostOverlay)
	if _, err := Recover(t.Context(), w.deps(), w.request(HostOverlay)); !errors.Is(err, hypervisor.ErrExist) {
		t.Errorf("name taken: %v", err)
	}
	q := w.request(HostOverlay)
	q.Name = "other"
	q.Storage = "relative"
	if _, err := Recover(t.Context(), w.deps(), q); err == nil {
		t.Error("relative storage")
	}
	q.Storage = "/nowhere"
	if _, err := Recover(t.Context(), w.deps(), q); err == nil {
		t.Error("storage that is not there")
	}
	q.Storage, q.Point.Disks = store, nil
	if _, err := Recover(t.Context(), w.deps(), q); err == nil {
		t.Error("no disks")
	}
	w.mem.Storage("/small", size/2)
	if _, err := Migrate(t.Context(), w.deps(), r.ID, "/small", nil); err == nil || w.get(r.ID).State != Running {
		t.Errorf("storage too small: %v, %s", err, w.get(r.ID).State)
	}
	if err := Forget(w.deps(), r.ID); !errors.Is(err, ErrState) {
		t.Errorf("forgot a running session: %v", err)
	}
	if err := Discard(w.st, r.ID); !errors.Is(err, ErrState) {
		t.Errorf("discarded a running session: %v", err)
	}
	s, err := w.st.Session(r.ID)
	w.must(err)
	lock, err := s.LockCommand("migrate")
	w.must(err)
	for name, f := range map[string]func() error{
		"undo":    func() error { _, err := Undo(t.Context(), w.deps(), r.ID); return err },
		"migrate": func() error { _, err := Migrate(t.Context(), w.deps(), r.ID, "", nil); return err },
	} {
		if err := f(); !errors.Is(err, state.ErrLocked) {
			t.Errorf("%s beside another command: %v", name, err)
		}
	}
	w.killServers()
	w.resume() // works beside a migration
	lock.Release()
	w.checkGuest(r)
	if err := Serve(t.Context(), w.st, r.ID, nil, nil); !errors.Is(err, state.ErrLocked) {
		t.Errorf("served twice: %v", err)
	}
	if infos, err := List(w.st); err != nil || len(infos) != 1 {
		t.Errorf("%v, %v", infos, err)
	}
}

// Guests that are off, and VMs that are gone.
func TestResumeOthers(t *testing.T) {
	w := newWorld(t)
	r := w.recover(HostOverlay)
	w.write(r, "vda", 0, "before the host was restarted")
	w.mem.SetState(r.VMID, hypervisor.Stopped)
	w.killServers()
	if rs := w.resume(); rs[0].Did != "served again, guest is off and can be started" {
		t.Errorf("%+v", rs)
	}
	c := w.mem.Connect()
	w.must(c.Start(t.Context(), r.VMID))
	w.checkGuest(r)

	w.must(c.Stop(t.Context(), r.VMID))
	w.must(c.DeleteVM(t.Context(), r.VMID))
	rs, err := Resume(t.Context(), w.deps())
	if err != nil || rs[0].Err == nil || !strings.Contains(rs[0].Err.Error(), "gone") {
		t.Errorf("%+v, %v", rs, err)
	}
	if _, err := Undo(t.Context(), w.deps(), r.ID); err != nil {
		t.Fatal(err)
	}
	w.checkClean()
}

// One damaged record does not hide or hold up the others.
func TestDamagedRecord(t *testing.T) {
	w := newWorld(t)
	r := w.recover(HostOverlay)
	bad := state.NewID()
	s, lock, err := w.st.NewSession(bad, Record{ID: bad}, "test")
	w.must(err)
	lock.Release()
	w.must(os.WriteFile(s.Path("session.json"), []byte(`{"format":"hold`), 0o600))
	w.killServers()
	rs, err := Resume(t.Context(), w.deps())
	if err != nil || len(rs) != 2 {
		t.Fatalf("%+v, %v", rs, err)
	}
	for _, x := range rs {
		if (x.Session == bad) != errors.Is(x.Err, state.ErrDamaged) {
			t.Errorf("%+v", x)
		}
	}
	infos, err := List(w.st)
	if err != nil || len(infos) != 2 {
		t.Fatalf("%+v, %v", infos, err)
	}
	w.checkGuest(r)
	if _, err := Undo(t.Context(), w.deps(), bad); !errors.Is(err, state.ErrDamaged) {
		t.Errorf("undo: %v", err)
	}
	w.must(Discard(w.st, bad))
	if infos, err := List(w.st); err != nil || len(infos) != 1 {
		t.Errorf("%+v, %v", infos, err)
	}
}

func TestPublication(t *testing.T) {
	w := newWorld(t)
	r, err := NewPublication(w.deps(), PublicationRequest{Location: "/repo", Point: w.point, Disk: "vdb", Listen: []string{"mem-1"}})
	w.must(err)
	ready, err := w.spawn(r.ID)
	w.must(err)
	if len(ready.URIs) != 1 || ready.URIs["vdb"] == "" {
		t.Errorf("%+v", ready)
	}
	w.killServers()
	if rs := w.resume(); len(rs) != 1 || rs[0].Did != "served again" {
		t.Errorf("%+v", rs)
	}
	if _, err := Migrate(t.Context(), w.deps(), r.ID, "", nil); !errors.Is(err, ErrState) {
		t.Errorf("migrated a publication: %v", err)
	}
	if _, err := Undo(t.Context(), w.deps(), r.ID); err != nil {
		t.Fatal(err)
	}
	w.checkClean()
	if _, err := NewPublication(w.deps(), PublicationRequest{Point: w.point, Disk: "vdz"}); err == nil {
		t.Error("published a disk that is not there")
	}
}

// The table is closed: every state that may follow is in it, and none leads
// back from local.
func TestTable(t *testing.T) {
	for _, r := range Table() {
		for _, next := range r.Next {
			n, ok := row(next)
			if !ok {
				t.Errorf("%s is followed by %q, which is not in the table", r.State, next)
			}
			if !r.serving && n.serving {
				t.Errorf("%s leads back to %s", r.State, next)
			}
		}
		if r.serving != slices.Contains(r.Next, Undone) {
			t.Errorf("%s: what is served can be undone, what is local cannot", r.State)
		}
		if r.Means == "" || r.Safe == "" {
			t.Errorf("%s says nothing", r.State)
		}
	}
	r := Record{State: "from the future"}
	if err := r.enter(Running, r.Times.Created); err == nil {
		t.Error("left an unknown state")
	}
}
