// Package hypertest holds what tests of hypervisors share: Source, the
// conformance suite that every adapter passes, and Mem, a complete hypervisor
// in memory for the tests of what stands above (backup, recovery).
//
// # The suite
//
// Source runs one table of cases against a Fixture: one VM with a tracked and
// an untracked data disk where the adapter has such. The cases share the VM,
// since a real guest takes long to boot; each leaves the host as it found it,
// which is part of what it tests (Fixture.Things).
//
// # The hypervisor in memory
//
//	m := hypertest.NewMem()
//	id := m.AddVM("web")
//	m.AddDisk(id, "vda", 8<<20, true)
//	m.Write(ctx, id, "vda", p, off)           as the guest
//	c := m.Connect()                          a process's connection: Source and Target
//	m.OnStep(func(step string) error { ... })  injects errors
//	c.CrashAt(n)                              the process dies before step n
//	m.LoseTracking, m.Lie, m.SetState, ...    what goes wrong on hosts
//	m.Things()                                what is left on the host
package hypertest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
)

// Fixture is a host with one VM, for the suite. Functions that are nil are
// things the host cannot do; the cases that need them are skipped by name.
type Fixture struct {
	Source hypervisor.Source
	VM     hypervisor.VMID
	// Data are disks that only the suite writes, all zeros at first, at least
	// 4 MiB long. The VM may have others.
	Data []hypervisor.DiskID
	// Tracked are those of Data whose changes can be listed.
	Tracked []hypervisor.DiskID
	// Owner is whose snapshots are; one is made up when it is zero. Its Session
	// is not used.
	Owner hypervisor.Owner
	// Level is what is asked of snapshots. "" means crash.
	Level hypervisor.Consistency
	// Write writes to a data disk as the guest does, and returns when a
	// snapshot taken now must have it.
	Write func(t *testing.T, d hypervisor.DiskID, p []byte, off int64)
	// Things lists everything on the host that anybody made there beside the
	// VM (checkpoints, jobs, files, its definition), to be compared.
	Things func(t *testing.T) []string

	// Shared: what is written during a snapshot does not reach it.
	Shared bool
	// Abandon ends the Source as the death of its process would, and returns
	// a new one.
	Abandon func(t *testing.T) hypervisor.Source
	// LoseTracking makes the changes since all reference points unknown. The
	// guest may lose its power on the way.
	LoseTracking func(t *testing.T, d hypervisor.DiskID)
	// AddDisk attaches an empty disk, and detaches it when the test ends.
	AddDisk func(t *testing.T) hypervisor.DiskID
	// Stop turns the VM off, and on again when the test ends.
	Stop func(t *testing.T)
}

// suite is a run of the cases over one fixture.
type suite struct {
	Fixture
	rnd *rand.Rand
	// model is what the data disks hold.
	model    map[hypervisor.DiskID][]byte
	owner    hypervisor.Owner
	sessions uint64
}

// Source runs the suite.
func Source(t *testing.T, f Fixture) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	if f.Level == "" {
		f.Level = hypervisor.Crash
	}
	s := &suite{
		Fixture: f, rnd: rand.New(rand.NewPCG(seed, 1)), model: map[hypervisor.DiskID][]byte{},
		owner: hypervisor.Owner{Repository: hexID("repository", seed), History: hexID("history", seed)},
	}
	if f.Owner != (hypervisor.Owner{}) {
		s.owner = f.Owner
	}
	for _, d := range s.describe(t).Disks {
		if slices.Contains(f.Data, d.ID) {
			s.model[d.ID] = make([]byte, d.Size)
		}
	}
	for _, c := range []struct {
		name string
		run  func(t *testing.T, s *suite)
		skip bool
	}{
		{"list", list, false},
		{"full", full, false},
		{"instant", instant, !f.Shared},
		{"incremental", incremental, false},
		{"uncommitted", uncommitted, false},
		{"unknown reference", unknownReference, false},
		{"several", several, false},
		{"forget", forget, false},
		{"cancelled", cancelled, false},
		{"abandoned", abandoned, f.Abandon == nil},
		{"foreign", foreign, f.Abandon == nil},
		{"new disk", newDisk, f.AddDisk == nil},
		{"stopped meanwhile", stoppedMeanwhile, f.Stop == nil},
		{"lost tracking", lostTracking, f.LoseTracking == nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.skip {
				t.Skip("this host has no such thing")
			}
			before := s.Things(t)
			c.run(t, s)
			if !t.Failed() {
				s.same(t, before, "host is not as it was")
			}
		})
	}
}

func hexID(what string, n uint64) string {
	h := sha256.Sum256(fmt.Appendf(nil, "%s %d", what, n))
	return hex.EncodeToString(h[:16])
}

// request makes a request of a new session.
func (s *suite) request(since hypervisor.ReferencePoint) hypervisor.Request {
	s.sessions++
	o := s.owner
	o.Session = hexID("session "+s.owner.Repository, s.sessions)[:16]
	return hypervisor.Request{VM: s.VM, Since: since, Owner: o}
}

// same checks that the host's things are what they were.
func (s *suite) same(t *testing.T, before []string, what string) {
	t.Helper()
	after := s.Things(t)
	for _, x := range before {
		if !slices.Contains(after, x) {
			t.Errorf("%s: gone: %s", what, x)
		}
	}
	for _, x := range after {
		if !slices.Contains(before, x) {
			t.Errorf("%s: new: %s", what, x)
		}
	}
}

func (s *suite) describe(t *testing.T) hypervisor.VM {
	t.Helper()
	vms, err := s.Source.VMs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, vm := range vms {
		if vm.ID == s.VM {
			return vm
		}
	}
	t.Fatalf("VM %s is not listed", s.VM)
	return hypervisor.VM{}
}

// take takes a snapshot that must succeed. It is closed with the test.
func (s *suite) take(t *testing.T, since hypervisor.ReferencePoint) hypervisor.Snapshot {
	t.Helper()
	out := s.Source.Snapshot(t.Context(), []hypervisor.Request{s.request(since)}, hypervisor.SnapshotOptions{Consistency: s.Level})
	if len(out) != 1 {
		t.Fatalf("%d outcomes for 1 request", len(out))
	}
	if out[0].Err != nil {
		t.Fatal(out[0].Err)
	}
	t.Cleanup(func() { out[0].Snapshot.Close() }) // again, where the case did not get so far
	return out[0].Snapshot
}

// finish commits and closes.
func (s *suite) finish(t *testing.T, snap hypervisor.Snapshot) hypervisor.ReferencePoint {
	t.Helper()
	ref, err := snap.Commit(t.Context())
	if err != nil {
		t.Errorf("commit: %v", err)
	}
	if (ref == "") != (len(s.Tracked) == 0) {
		t.Errorf("commit gave reference point %q; tracked disks: %q", ref, s.Tracked)
	}
	if _, err := snap.Open(t.Context(), s.Data[0]); err == nil {
		t.Error("a disk can be opened after the commit")
	}
	s.close(t, snap)
	return ref
}

func (s *suite) close(t *testing.T, snap hypervisor.Snapshot) {
	t.Helper()
	if err := snap.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

func (s *suite) forget(t *testing.T, ref hypervisor.ReferencePoint) {
	t.Helper()
	if err := s.Source.Forget(t.Context(), s.VM, ref); err != nil {
		t.Errorf("forget: %v", err)
	}
}

// scribble writes random pieces to every data disk, and to the model.
func (s *suite) scribble(t *testing.T) map[hypervisor.DiskID][]disk.Extent {
	t.Helper()
	wrote := map[hypervisor.DiskID][]disk.Extent{}
	for _, d := range s.Data {
		m := s.model[d]
		for range 3 {
			n := 512 * (1 + s.rnd.Int64N(100))
			off := s.rnd.Int64N((int64(len(m))-n)/512) * 512
			p := make([]byte, n)
			for i := range p {
				p[i] = byte(s.rnd.Uint32())
			}
			s.Write(t, d, p, off)
			copy(m[off:], p)
			wrote[d] = append(wrote[d], disk.Extent{Off: off, Len: n})
		}
	}
	return wrote
}

// compare reads every data disk of a snapshot against want, and its extents
// too.
func (s *suite) compare(t *testing.T, snap hypervisor.Snapshot, want map[hypervisor.DiskID][]byte) {
	t.Helper()
	for _, d := range s.Data {
		r, err := snap.Open(t.Context(), d)
		if err != nil {
			t.Fatalf("open %s: %v", d, err)
		}
		if r.Size() != int64(len(want[d])) {
			t.Errorf("disk %s has %d bytes, want %d", d, r.Size(), len(want[d]))
			continue
		}
		got := make([]byte, r.Size())
		for off := 0; off < len(got); off += 1 << 20 {
			if err := r.ReadAt(t.Context(), got[off:min(len(got), off+1<<20)], int64(off)); err != nil {
				t.Fatalf("read %s: %v", d, err)
			}
		}
		if at := differ(got, want[d]); at >= 0 {
			t.Errorf("disk %s differs from what was written at byte %d", d, at)
		}
		end := int64(0)
		for e, err := range r.Extents(t.Context(), 0, r.Size()) {
			if err != nil {
				t.Fatalf("extents of %s: %v", d, err)
			}
			if e.Off != end || e.Len <= 0 || e.End() > r.Size() {
				t.Fatalf("extents of %s: [%d,+%d) after %d", d, e.Off, e.Len, end)
			}
			if e.Zero && !disk.IsZero(want[d][e.Off:e.End()]) {
				t.Errorf("extent [%d,+%d) of %s is said to be zero and is not", e.Off, e.Len, d)
			}
			end = e.End()
		}
		if end != r.Size() {
			t.Errorf("extents of %s end at %d of %d", d, end, r.Size())
		}
		if err := r.ReadAt(t.Context(), make([]byte, 2), r.Size()-1); !errors.Is(err, disk.ErrRange) {
			t.Errorf("reading beyond the end of %s: %v", d, err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

func differ(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

// untracked checks that a disk's changes are refused, with a reason.
func (s *suite) untracked(t *testing.T, snap hypervisor.Snapshot, d hypervisor.DiskID) {
	t.Helper()
	ex, err := disk.Collect(snap.Changed(t.Context(), d))
	if !errors.Is(err, hypervisor.ErrNoReference) || len(ex) > 0 {
		t.Errorf("changes of %s: %d extents and %v, want ErrNoReference alone", d, len(ex), err)
	} else if strings.TrimSuffix(err.Error(), ": ") == hypervisor.ErrNoReference.Error() {
		t.Errorf("changes of %s: no reason is given", d)
	}
}

// changes checks that the list covers what was written, and is less than all.
func (s *suite) changes(t *testing.T, snap hypervisor.Snapshot, wrote map[hypervisor.DiskID][]disk.Extent) {
	t.Helper()
	for _, d := range s.Data {
		if !slices.Contains(s.Tracked, d) {
			s.untracked(t, snap, d)
			continue
		}
		ex, err := disk.Collect(disk.Merge(snap.Changed(t.Context(), d)))
		if err != nil {
			t.Errorf("changes of %s: %v", d, err)
			continue
		}
		listed := int64(0)
		for _, e := range ex {
			listed += e.Len
		}
		for _, w := range wrote[d] {
			if !slices.ContainsFunc(ex, func(e disk.Extent) bool { return e.Off <= w.Off && w.End() <= e.End() }) {
				t.Errorf("[%d,+%d) was written to %s and is not listed in %v", w.Off, w.Len, d, ex)
			}
		}
		if listed >= int64(len(s.model[d])) {
			t.Errorf("all %d bytes of %s are listed as changed", listed, d)
		}
	}
}

// apply copies what is listed as changed, and nothing else, from the snapshot.
func (s *suite) apply(t *testing.T, snap hypervisor.Snapshot, d hypervisor.DiskID, to []byte) {
	t.Helper()
	r, err := snap.Open(t.Context(), d)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for e, err := range snap.Changed(t.Context(), d) {
		if err != nil {
			t.Fatal(err)
		}
		if err := r.ReadAt(t.Context(), to[e.Off:e.End()], e.Off); err != nil {
			t.Fatal(err)
		}
	}
}

func list(t *testing.T, s *suite) {
	vm := s.describe(t)
	if vm.Name == "" || vm.Kind == "" || vm.Host == "" || vm.State == "" {
		t.Errorf("incomplete: %+v", vm)
	}
	if vm.Config != nil {
		t.Error("a listed VM has Config")
	}
	seen := map[hypervisor.DiskID]bool{}
	for _, d := range vm.Disks {
		if d.ID == "" || seen[d.ID] {
			t.Errorf("disk %q is not named, or named twice", d.ID)
		}
		seen[d.ID] = true
		if d.Excluded == "" && (d.Size <= 0 || d.Format == "" || d.Path == "") {
			t.Errorf("incomplete: %+v", d)
		}
	}
	for _, d := range s.Data {
		if !seen[d] {
			t.Errorf("disk %s is not listed", d)
		}
	}
	groups, err := s.Source.Plan(t.Context(), []hypervisor.VMID{s.VM})
	if err != nil || len(groups) != 1 || !slices.Equal(groups[0], []hypervisor.VMID{s.VM}) {
		t.Errorf("plan of one VM: %v, %v", groups, err)
	}
}

func full(t *testing.T, s *suite) {
	s.scribble(t)
	snap := s.take(t, "")
	vm := snap.VM()
	if vm.ID != s.VM || len(vm.Config) == 0 {
		t.Errorf("snapshot's VM is %s with %d files of configuration", vm.ID, len(vm.Config))
	}
	if snap.Consistency() == "" {
		t.Error("no consistency level")
	}
	for _, d := range vm.Disks {
		if d.Excluded == "" {
			s.untracked(t, snap, d.ID)
		}
	}
	s.compare(t, snap, s.model)
	if _, err := snap.Open(t.Context(), "no-such-disk"); !errors.Is(err, hypervisor.ErrNotExist) {
		t.Errorf("opening a disk that is not there: %v", err)
	}
	s.forget(t, s.finish(t, snap))
}

func instant(t *testing.T, s *suite) {
	s.scribble(t)
	old := map[hypervisor.DiskID][]byte{}
	for d, m := range s.model {
		old[d] = bytes.Clone(m)
	}
	snap := s.take(t, "")
	s.scribble(t)
	s.compare(t, snap, old)
	s.close(t, snap)
}

func incremental(t *testing.T, s *suite) {
	s.scribble(t)
	copies := map[hypervisor.DiskID][]byte{} // as a repository would have them
	for d, m := range s.model {
		copies[d] = bytes.Clone(m)
	}
	ref := s.finish(t, s.take(t, ""))
	for range 3 {
		wrote := s.scribble(t)
		snap := s.take(t, ref)
		s.changes(t, snap, wrote)
		s.compare(t, snap, s.model)
		for _, d := range s.Tracked {
			s.apply(t, snap, d, copies[d])
			if at := differ(copies[d], s.model[d]); at >= 0 {
				t.Errorf("copying the changes of %s gives another disk from byte %d on", d, at)
			}
		}
		next := s.finish(t, snap)
		if next == ref && ref != "" {
			t.Error("the reference point is the old one")
		}
		s.forget(t, ref)
		ref = next
	}
	if snap := s.take(t, ref); len(s.Tracked) > 0 {
		for _, d := range s.Tracked {
			if n, err := disk.DataBytes(snap.Changed(t.Context(), d)); err != nil || n > 4<<20 {
				t.Errorf("nothing was written to %s, and %d bytes are listed (%v)", d, n, err)
			}
		}
		s.close(t, snap)
	} else {
		s.close(t, snap)
	}
	s.forget(t, ref)
}

// uncommitted: a run that fails leaves the reference point of the last one.
func uncommitted(t *testing.T, s *suite) {
	ref := s.finish(t, s.take(t, ""))
	wrote := s.scribble(t)
	before := s.Things(t)
	snap := s.take(t, ref)
	s.changes(t, snap, wrote)
	s.close(t, snap)
	s.close(t, snap) // again: no error
	s.same(t, before, "an uncommitted snapshot left something")
	for d, ex := range s.scribble(t) {
		wrote[d] = append(wrote[d], ex...)
	}
	snap = s.take(t, ref)
	s.changes(t, snap, wrote)
	s.compare(t, snap, s.model)
	s.close(t, snap)
	s.forget(t, ref)
}

func unknownReference(t *testing.T, s *suite) {
	for _, ref := range []hypervisor.ReferencePoint{
		hypervisor.ReferencePoint(s.request("").Owner.Owned()), "somebody-elses", "holdfast-00000000-00000000-0000000000000000",
	} {
		snap := s.take(t, ref)
		for _, d := range s.Data {
			s.untracked(t, snap, d)
		}
		s.compare(t, snap, s.model)
		s.close(t, snap)
	}
}

// several: one VM's refusal does not fail the others.
func several(t *testing.T, s *suite) {
	bad := s.request("")
	bad.VM = "00000000-0000-0000-0000-00000000dead"
	out := s.Source.Snapshot(t.Context(), []hypervisor.Request{bad, s.request("")}, hypervisor.SnapshotOptions{Consistency: s.Level})
	if len(out) != 2 {
		t.Fatalf("%d outcomes for 2 requests", len(out))
	}
	if !errors.Is(out[0].Err, hypervisor.ErrNotExist) || out[0].Snapshot != nil {
		t.Errorf("a VM that is not there: %v", out[0].Err)
	}
	if out[1].Err != nil {
		t.Fatal(out[1].Err)
	}
	s.compare(t, out[1].Snapshot, s.model)
	s.close(t, out[1].Snapshot)
}

func forget(t *testing.T, s *suite) {
	ref := s.finish(t, s.take(t, ""))
	s.forget(t, ref)
	s.forget(t, ref)
	s.forget(t, "holdfast-00000000-00000000-0000000000000000")
	snap := s.take(t, ref)
	for _, d := range s.Data {
		s.untracked(t, snap, d)
	}
	s.close(t, snap)
}

func cancelled(t *testing.T, s *suite) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	out := s.Source.Snapshot(ctx, []hypervisor.Request{s.request("")}, hypervisor.SnapshotOptions{Consistency: s.Level})
	if len(out) != 1 || !errors.Is(out[0].Err, context.Canceled) {
		t.Fatalf("cancelled: %+v", out)
	}
}

// abandoned: what a dead process left is found and cleaned, and not before it
// is known to be dead.
func abandoned(t *testing.T, s *suite) {
	ref := s.finish(t, s.take(t, ""))
	wrote := s.scribble(t)
	req := s.request(ref)
	before := s.Things(t)
	out := s.Source.Snapshot(t.Context(), []hypervisor.Request{req}, hypervisor.SnapshotOptions{Consistency: s.Level})
	if out[0].Err != nil {
		t.Fatal(out[0].Err)
	}
	s.Source = s.Abandon(t)
	left := s.Things(t)
	did, err := s.Source.Clean(t.Context(), s.VM, s.owner.Repository, func(string) bool { return false }, nil)
	if err != nil || len(did) > 0 {
		t.Errorf("cleaning while the session lives: %q, %v", did, err)
	}
	s.same(t, left, "a living session's things were touched")
	did, err = s.Source.Clean(t.Context(), s.VM, s.owner.Repository, func(session string) bool { return session == req.Owner.Session }, nil)
	if err != nil {
		t.Errorf("clean: %v", err)
	}
	t.Logf("cleaned: %q", did)
	s.same(t, before, "not clean")
	// The reference point of the run before is as good as it was.
	snap := s.take(t, ref)
	s.changes(t, snap, wrote)
	s.compare(t, snap, s.model)
	s.close(t, snap)
	s.forget(t, ref)
}

// foreign: things of another repository are not touched.
func foreign(t *testing.T, s *suite) {
	ref := s.finish(t, s.take(t, ""))
	before := s.Things(t)
	did, err := s.Source.Clean(t.Context(), s.VM, hexID("another repository", 0), func(string) bool { return true }, nil)
	if err != nil || len(did) > 0 {
		t.Errorf("cleaned: %q, %v", did, err)
	}
	s.same(t, before, "foreign things were touched")
	s.forget(t, ref)
}

func newDisk(t *testing.T, s *suite) {
	ref := s.finish(t, s.take(t, ""))
	wrote := s.scribble(t)
	t.Run("attached", func(t *testing.T) {
		d := s.AddDisk(t)
		snap := s.take(t, ref)
		s.untracked(t, snap, d)
		s.changes(t, snap, wrote)
		s.compare(t, snap, s.model)
		s.close(t, snap)
	})
	s.forget(t, ref)
}

// stoppedMeanwhile: a guest that is turned off ends the backup with an error,
// and the next one works.
func stoppedMeanwhile(t *testing.T, s *suite) {
	t.Run("stop", func(t *testing.T) {
		snap := s.take(t, "")
		r, err := snap.Open(t.Context(), s.Data[0])
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		s.Stop(t)
		err = r.ReadAt(t.Context(), make([]byte, 64<<10), 0)
		if err == nil {
			t.Error("a disk of a stopped guest can be read")
		} else {
			t.Logf("read: %v", err)
		}
		s.close(t, snap)
	})
	snap := s.take(t, "")
	s.compare(t, snap, s.model)
	s.close(t, snap)
}

func lostTracking(t *testing.T, s *suite) {
	if len(s.Tracked) == 0 {
		t.Skip("no disk is tracked")
	}
	ref := s.finish(t, s.take(t, ""))
	s.scribble(t)
	s.LoseTracking(t, s.Tracked[0])
	snap := s.take(t, ref)
	s.untracked(t, snap, s.Tracked[0])
	s.compare(t, snap, s.model)
	next := s.finish(t, snap)
	s.forget(t, ref)
	wrote := s.scribble(t)
	snap = s.take(t, next) // tracked again
	s.changes(t, snap, wrote)
	s.close(t, snap)
	s.forget(t, next)
}
