//go:build unix

package libvirt

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
	"holdfast/test/lab"
)

// TestLabLoad backs up a guest that writes all the time: a full copy of its
// system disk and of a data disk, brought up to date by nothing but what is
// listed as changed, is byte for byte what the second snapshot reads.
func TestLabLoad(t *testing.T) {
	lab.Beside(t)
	ctx := t.Context()
	g := lab.Start(t, lab.Options{Disks: []lab.Disk{{Format: "qcow2", Size: 128 << 20}}})
	h := open(t, Options{})
	before := things(t, g)
	if _, err := g.Exec(ctx, "mkfs.ext4 -q /dev/vdb && mkdir -p /mnt/b && mount /dev/vdb /mnt/b"); err != nil {
		t.Fatal(err)
	}
	if err := g.StartWriter(ctx, "/var/lib/guestwriter", "/mnt/b"); err != nil {
		t.Fatal(err)
	}
	disks := []hypervisor.DiskID{"vda", "vdb"}
	dir := t.TempDir()
	copies := map[hypervisor.DiskID]disk.Device{}
	take := func(session string, since hypervisor.ReferencePoint) hypervisor.Snapshot {
		r := labRequest(g, session, since)
		out := h.Snapshot(ctx, []hypervisor.Request{r}, hypervisor.SnapshotOptions{})[0]
		if out.Err != nil {
			t.Fatal(out.Err)
		}
		t.Cleanup(func() { out.Snapshot.Close() })
		return out.Snapshot
	}
	finish := func(s hypervisor.Snapshot) hypervisor.ReferencePoint {
		ref, err := s.Commit(ctx)
		if err = errors.Join(err, s.Close()); err != nil {
			t.Fatal(err)
		}
		return ref
	}
	s := take("01", "")
	t.Logf("first: %q", s.Notes())
	for _, d := range disks {
		r, err := s.Open(ctx, d)
		if err != nil {
			t.Fatal(err)
		}
		f, err := disk.CreateFile(filepath.Join(dir, string(d)), r.Size())
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		copies[d] = f
		n := transfer(t, f, r, r.Extents(ctx, 0, r.Size()))
		t.Logf("%s: copied %d of %d bytes", d, n, r.Size())
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	ref := finish(s)
	if _, err := g.WaitWriter(ctx, 50); err != nil {
		t.Fatal(err)
	}
	s = take("02", ref)
	t.Logf("second: %q", s.Notes())
	for _, d := range disks {
		r, err := s.Open(ctx, d)
		if err != nil {
			t.Fatal(err)
		}
		n := transfer(t, copies[d], r, s.Changed(ctx, d))
		t.Logf("%s: %d of %d bytes are listed as changed", d, n, r.Size())
		if n == 0 || n > r.Size()/2 {
			t.Errorf("%s: %d bytes listed", d, n)
		}
		if at := compare(t, copies[d], r); at >= 0 {
			t.Errorf("%s: full copy and changes differ from the snapshot in the MiB at %d", d, at)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
	next := finish(s)

	// Somebody takes a snapshot of vdb: what was written before it, into a
	// layer that is below now, is listed all the same, or nothing is.
	virsh(t, "snapshot-create-as", g.Name, "theirs", "--disk-only", "--atomic", "--diskspec", "vda,snapshot=no", "--diskspec", "vdb,snapshot=external,file="+filepath.Join(g.Dir, "theirs"))
	if _, err := g.WaitWriter(ctx, 20); err != nil {
		t.Fatal(err)
	}
	s = take("03", next)
	r, err := s.Open(ctx, "vdb")
	if err != nil {
		t.Fatal(err)
	}
	if ex, err := disk.Collect(s.Changed(ctx, "vdb")); errors.Is(err, hypervisor.ErrNoReference) {
		t.Logf("after a foreign snapshot: %v", err)
	} else if err != nil {
		t.Error(err)
	} else {
		t.Logf("after a foreign snapshot: %d bytes are listed", transfer(t, copies["vdb"], r, disk.List(ex...)))
		if at := compare(t, copies["vdb"], r); at >= 0 {
			t.Errorf("after a foreign snapshot: changes differ in the MiB at %d", at)
		}
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	virsh(t, "blockcommit", g.Name, "vdb", "--active", "--pivot")
	virsh(t, "snapshot-delete", g.Name, "theirs", "--metadata")
	if err := os.Remove(filepath.Join(g.Dir, "theirs")); err != nil {
		t.Error(err)
	}
	for _, ref := range []hypervisor.ReferencePoint{ref, next} {
		if err := h.Forget(ctx, hypervisor.VMID(g.UUID), ref); err != nil {
			t.Error(err)
		}
	}
	if after := things(t, g); !slices.Equal(before, after) {
		t.Errorf("host is not as it was:\nbefore %q\nafter  %q", before, after)
	}
}

// transfer copies extents, and returns how many bytes were not zeros.
func transfer(t *testing.T, to disk.Device, from disk.Reader, ex disk.Extents) (n int64) {
	t.Helper()
	buf := make([]byte, 1<<20)
	for e, err := range ex {
		if err != nil {
			t.Fatal(err)
		}
		for off := e.Off; off < e.End() && !e.Zero; off += int64(len(buf)) {
			p := buf[:min(int64(len(buf)), e.End()-off)]
			if err := from.ReadAt(t.Context(), p, off); err != nil {
				t.Fatal(err)
			}
			if err := to.WriteAt(t.Context(), p, off); err != nil {
				t.Fatal(err)
			}
			n += int64(len(p))
		}
	}
	return n
}

// compare returns the first MiB in which two disks differ, -1 if none.
func compare(t *testing.T, a, b disk.Reader) int64 {
	t.Helper()
	p, q := make([]byte, 1<<20), make([]byte, 1<<20)
	for off := int64(0); off < a.Size(); off += 1 << 20 {
		n := min(1<<20, a.Size()-off)
		if err := errors.Join(a.ReadAt(t.Context(), p[:n], off), b.ReadAt(t.Context(), q[:n], off)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p[:n], q[:n]) {
			return off
		}
	}
	return -1
}

// TestLabLost breaks the connection to the daemon during a backup: the commit
// says so, and Close cleans up over a new connection.
func TestLabLost(t *testing.T) {
	g, _ := labFixture(t, lab.Options{Blank: true, Stopped: true})
	for _, running := range []bool{false, true} {
		if running {
			virsh(t, "start", g.Name)
		}
		h := open(t, Options{})
		before := things(t, g)
		r := labRequest(g, "01", "")
		o := h.Snapshot(t.Context(), []hypervisor.Request{r}, hypervisor.SnapshotOptions{Consistency: hypervisor.Crash})[0]
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		if err := h.wire.c.Close(); err != nil {
			t.Fatal(err)
		}
		poll(t, "the loss is seen", func() bool { return h.wire.lost() != nil })
		if _, err := o.Snapshot.Commit(t.Context()); !errors.Is(err, ErrLost) {
			t.Errorf("commit: %v", err)
		} else {
			t.Logf("commit: %v", err)
		}
		if _, err := h.VMs(t.Context()); !errors.Is(err, ErrLost) {
			t.Errorf("list: %v", err)
		}
		if err := o.Snapshot.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if after := things(t, g); !slices.Equal(before, after) {
			t.Errorf("running %v: host is not as it was:\nbefore %q\nafter  %q", running, before, after)
		}
	}
}

// TestLabNVRAM: the firmware's variables are in the snapshot of a stopped
// guest, and the paused QEMU leaves them alone.
func TestLabNVRAM(t *testing.T) {
	g, f := labFixture(t, lab.Options{Blank: true, Stopped: true})
	const code = "/usr/share/OVMF/OVMF_CODE_4M.fd"
	if _, err := os.Stat(code); err != nil {
		t.Skipf("SKIPPED: %v (package ovmf)", err)
	}
	vars := filepath.Join(g.Dir, "nv.fd")
	want := bytes.Repeat([]byte("variables"), 1000)
	if err := os.WriteFile(vars, want, 0o600); err != nil {
		t.Fatal(err)
	}
	x := virsh(t, "dumpxml", "--inactive", g.Name)
	x = strings.Replace(x, "</type>", "</type><loader readonly='yes' type='pflash'>"+code+"</loader><nvram>"+vars+"</nvram>", 1)
	p := filepath.Join(t.TempDir(), "d.xml")
	if err := os.WriteFile(p, []byte(x), 0o644); err != nil {
		t.Fatal(err)
	}
	virsh(t, "define", p)
	t.Cleanup(func() { virsh(t, "undefine", g.Name, "--keep-nvram") })
	before := things(t, g)
	r := labRequest(g, "01", "")
	o := f.Source.Snapshot(t.Context(), []hypervisor.Request{r}, hypervisor.SnapshotOptions{})[0]
	if o.Err != nil {
		t.Fatal(o.Err)
	}
	found := false
	for _, file := range o.Snapshot.VM().Config {
		found = found || file.Name == "nvram" && bytes.Equal(file.Data, want)
	}
	if !found {
		t.Errorf("no NVRAM in the configuration; notes: %q", o.Snapshot.Notes())
	}
	if err := o.Snapshot.Close(); err != nil {
		t.Error(err)
	}
	if now, err := os.ReadFile(vars); err != nil || !bytes.Equal(now, want) {
		t.Errorf("NVRAM was changed (%v)", err)
	}
	if after := things(t, g); !slices.Equal(before, after) {
		t.Errorf("host is not as it was:\nbefore %q\nafter  %q", before, after)
	}
}
