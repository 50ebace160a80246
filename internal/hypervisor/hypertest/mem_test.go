package hypertest

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
)

func memFixture(t *testing.T, tracked bool) (*Mem, Fixture) {
	m := NewMem()
	id := m.AddVM("web")
	m.AddVM("other")
	m.AddDisk(id, "vda", 4<<20, tracked)
	m.AddDisk(id, "vdb", 8<<20, false)
	m.AddDisk(id, "sda", 1<<20, false)
	m.Exclude(id, "sda", "cdrom drive")
	c := m.Connect()
	f := Fixture{
		Source: c, VM: id, Data: []hypervisor.DiskID{"vda", "vdb"}, Level: hypervisor.Filesystem, Shared: true,
		Write: func(t *testing.T, d hypervisor.DiskID, p []byte, off int64) {
			if err := m.Write(t.Context(), id, d, p, off); err != nil {
				t.Fatal(err)
			}
		},
		Things: func(*testing.T) []string { return m.Things() },
		Abandon: func(*testing.T) hypervisor.Source {
			c.Crash()
			c = m.Connect()
			return c
		},
		LoseTracking: func(_ *testing.T, d hypervisor.DiskID) { m.LoseTracking(id, d) },
		AddDisk: func(t *testing.T) hypervisor.DiskID {
			m.AddDisk(id, "vdz", 1<<20, true)
			t.Cleanup(func() { m.RemoveDisk(id, "vdz") })
			return "vdz"
		},
		Stop: func(t *testing.T) {
			m.SetState(id, hypervisor.Stopped)
			t.Cleanup(func() { m.SetState(id, hypervisor.Running) })
		},
	}
	if tracked {
		f.Tracked = []hypervisor.DiskID{"vda"}
	}
	return m, f
}

func TestSource(t *testing.T) {
	_, f := memFixture(t, true)
	Source(t, f)
}

func TestSourceUntracked(t *testing.T) {
	_, f := memFixture(t, false)
	Source(t, f)
}

// TestCrash lets the process die before every step of a backup: a new process
// finds the host in order after Clean.
func TestCrash(t *testing.T) {
	for n := 0; ; n++ {
		m, f := memFixture(t, true)
		c := m.Connect()
		run := func() error {
			req := hypervisor.Request{VM: f.VM, Owner: hypervisor.Owner{Repository: "00", History: "01", Session: "02"}}
			out := c.Snapshot(t.Context(), []hypervisor.Request{req}, hypervisor.SnapshotOptions{})
			if out[0].Err != nil {
				return out[0].Err
			}
			r, err := out[0].Snapshot.Open(t.Context(), "vda")
			if err != nil {
				return err
			}
			if err := r.ReadAt(t.Context(), make([]byte, 10), 0); err != nil {
				return err
			}
			if _, err := out[0].Snapshot.Commit(t.Context()); err != nil {
				return err
			}
			return out[0].Snapshot.Close()
		}
		c.CrashAt(n)
		err := run()
		if err == nil {
			if n < 4 {
				t.Fatalf("only %d steps", n)
			}
			return
		}
		if !errors.Is(err, ErrCrashed) {
			t.Fatalf("step %d: %v", n, err)
		}
		if _, err := c.VMs(t.Context()); !errors.Is(err, ErrCrashed) {
			t.Errorf("step %d: the dead process goes on", n)
		}
		if _, err := m.Connect().Clean(t.Context(), f.VM, "00", func(string) bool { return true }, nil); err != nil {
			t.Errorf("step %d: %v", n, err)
		}
		if left := m.Things(); len(left) > 0 {
			t.Errorf("step %d: left %q", n, left)
		}
	}
}

func TestFaults(t *testing.T) {
	m, f := memFixture(t, true)
	bad := errors.New("bad")
	m.OnStep(func(step string) error {
		if step == "commit vm-1" {
			return bad
		}
		return nil
	})
	req := hypervisor.Request{VM: f.VM, Owner: hypervisor.Owner{Repository: "00", History: "01", Session: "02"}}
	snap := f.Source.Snapshot(t.Context(), []hypervisor.Request{req}, hypervisor.SnapshotOptions{})[0].Snapshot
	if _, err := snap.Commit(t.Context()); !errors.Is(err, bad) {
		t.Errorf("commit: %v", err)
	}
	if err := snap.Close(); err != nil {
		t.Error(err)
	}
	if !slices.Contains(m.Steps(), "close vm-1") {
		t.Errorf("steps: %q", m.Steps())
	}
	m.SetAgent(f.VM, false)
	if out := f.Source.Snapshot(t.Context(), []hypervisor.Request{req}, hypervisor.SnapshotOptions{}); out[0].Err == nil {
		t.Error("quiesced without an agent")
	}
}

func TestLie(t *testing.T) {
	m, f := memFixture(t, true)
	ctx := t.Context()
	req := hypervisor.Request{VM: f.VM, Owner: hypervisor.Owner{Repository: "00", History: "01", Session: "02"}}
	snap := f.Source.Snapshot(ctx, []hypervisor.Request{req}, hypervisor.SnapshotOptions{})[0].Snapshot
	ref, err := snap.Commit(ctx)
	if err = errors.Join(err, snap.Close()); err != nil {
		t.Fatal(err)
	}
	if err := m.Write(ctx, f.VM, "vda", []byte{1}, 100); err != nil {
		t.Fatal(err)
	}
	m.Lie(f.VM, "vda", true)
	req.Since, req.Owner.Session = ref, "03"
	snap = f.Source.Snapshot(ctx, []hypervisor.Request{req}, hypervisor.SnapshotOptions{})[0].Snapshot
	if ex, err := disk.Collect(snap.Changed(ctx, "vda")); err != nil || len(ex) > 0 {
		t.Errorf("changes: %v, %v", ex, err)
	}
}

// TestTarget recovers a VM both ways, loses and regains what it runs from, and
// migrates it.
func TestTarget(t *testing.T) {
	for _, writes := range []string{"host", "server"} {
		t.Run(writes, func(t *testing.T) {
			ctx := t.Context()
			m := NewMem()
			m.Storage("/store", 1<<30)
			served := disk.NewMem(1<<20 + 512)
			down := false
			m.Serve(func(context.Context, string) (disk.Device, error) {
				if down {
					return nil, errors.New("connection refused")
				}
				return open{served}, nil
			})
			must(t, served.WriteAt(ctx, bytes.Repeat([]byte{7}, 1000), 1<<20-500))
			c := m.Connect()
			vm := hypervisor.NewVM{Name: "back", Kind: Kind, Config: []hypervisor.File{{Name: "mem.conf"}}, Owner: hypervisor.Owner{Session: "05"}}
			d := hypervisor.NewDisk{ID: "vda", Size: served.Size(), Served: "nbd://x"}
			if _, err := c.Preflight(ctx, vm, "/nowhere", 1); err == nil {
				t.Error("storage that is not there is accepted")
			}
			if _, err := c.Preflight(ctx, vm, "/store", 2<<30); err == nil {
				t.Error("storage that is too small is accepted")
			}
			var err error
			if writes == "host" {
				d, _, err = c.CreateDisk(ctx, "/store", "back-vda", d)
				must(t, err)
				if _, _, err := c.CreateDisk(ctx, "/store", "back-vda", d); !errors.Is(err, hypervisor.ErrExist) {
					t.Errorf("made twice: %v", err)
				}
			}
			vm.Disks = []hypervisor.NewDisk{d}
			id, err := c.CreateVM(ctx, vm)
			must(t, err)
			if found, err := c.Find(ctx, "05"); found != id || err != nil {
				t.Errorf("found %s, %v", found, err)
			}
			must(t, c.Start(ctx, id))
			must(t, m.Write(ctx, id, "vda", []byte("guest"), 3))
			down = true
			if err := m.Read(ctx, id, "vda", make([]byte, 10), 900<<10); !errors.Is(err, ErrIO) {
				t.Errorf("reading while nothing is served: %v", err)
			}
			if h, _ := c.Health(ctx, id); h.State != hypervisor.Paused || !h.IOError {
				t.Errorf("health: %+v", h)
			}
			down = false
			must(t, c.Unpause(ctx, id))
			var done int64
			must(t, c.Migrate(ctx, id, "/store", func(n, total int64) { done = n }))
			if done != served.Size() {
				t.Errorf("%d of %d bytes reported", done, served.Size())
			}
			down = true
			got := make([]byte, 1000)
			must(t, m.Read(ctx, id, "vda", got, 1<<20-500))
			if !bytes.Equal(got[:1000], bytes.Repeat([]byte{7}, 1000)) {
				t.Error("migrated disk lost what was served")
			}
			must(t, m.Read(ctx, id, "vda", got[:8], 0))
			if string(got[:8]) != "\x00\x00\x00guest" {
				t.Errorf("migrated disk lost what the guest wrote: %q", got[:8])
			}
			local, paths := m.Local(id)
			if !local || len(paths) != 1 || m.File(paths[0]) == nil {
				t.Errorf("local %v, %q", local, paths)
			}
			must(t, c.Stop(ctx, id))
			must(t, c.DeleteVM(ctx, id))
			must(t, c.RemoveDisk(ctx, paths[0]))
			if left := m.Things(); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// open is a device whose Close leaves the disk.
type open struct{ d disk.Device }

func (o open) Size() int64 { return o.d.Size() }
func (o open) ReadAt(ctx context.Context, p []byte, off int64) error {
	return o.d.ReadAt(ctx, p, off)
}
func (o open) Extents(ctx context.Context, off, n int64) disk.Extents {
	return o.d.Extents(ctx, off, n)
}
func (o open) WriteAt(ctx context.Context, p []byte, off int64) error {
	return o.d.WriteAt(ctx, p, off)
}
func (o open) ZeroAt(ctx context.Context, off, n int64) error { return o.d.ZeroAt(ctx, off, n) }
func (o open) Flush(ctx context.Context) error                { return o.d.Flush(ctx) }
func (o open) Close() error                                   { return nil }
