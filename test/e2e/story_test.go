//go:build linux

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/test/lab"
)

// The guest's writer writes to both disks: vda holds the first, vdb the second.
var places = []string{"/var/lib/guestwriter", "/data/w"}

// twoDisks are the options of a guest with a second disk for data.
func twoDisks() lab.Options {
	return lab.Options{Disks: []lab.Disk{{Size: 256 << 20, Data: true}}}
}

// TestStory is the main job from the beginning to the end.
func TestStory(t *testing.T) {
	w := newWorld(t)
	g := lab.Start(t, twoDisks())
	w.ok(g.StartWriter(w.ctx, places...))
	_, err := g.WaitWriter(w.ctx, 300)
	w.ok(err)

	first := w.backup(host, g.Name)
	if first.FullReason == "" || first.Consistency != "filesystem" || first.ReadBytes < 200<<20 {
		t.Errorf("first backup: %+v", first)
	}
	w.clean(g.Name)
	_, err = g.WaitWriter(w.ctx, 500)
	w.ok(err)
	acked, err := g.Acked(w.ctx)
	w.ok(err)
	second := w.backup(host, g.Name)
	if second.FullReason != "" || second.ReadBytes > 160<<20 || second.ReadBytes == 0 {
		t.Errorf("second backup read %d bytes, full because %q", second.ReadBytes, second.FullReason)
	}
	w.clean(g.Name)
	if _, err := g.WaitWriter(w.ctx, 100); err != nil {
		t.Fatalf("the guest does not go on after its backup: %v", err)
	}

	// Beside the original, without a network, and gone again.
	w.must("recover", first.Point, "--host", host, "--storage", w.store, "--name", g.Name+"-beside", "--isolated")
	w.beside(g)
	s, err := w.Find(w.ctx, g.Name+"-beside")
	w.ok(err)
	w.must("undo", s.Session)
	w.empty()

	// Lost: the guest and its disks.
	w.ok(g.Remove(w.ctx))
	from := time.Now()
	w.must("recover", g.Name+"@latest", "--host", host, "--storage", w.store, "--wait")
	w.logf("guest answering %.1f s after the command", time.Since(from).Seconds())
	r := lab.Open(g.Name)
	w.ok(r.WaitAgent(w.ctx, time.Second))
	w.ok(r.Verify(w.ctx, acked, places...))
	w.ok(r.StartWriter(w.ctx, places...))
	before, err := r.WaitWriter(w.ctx, 100)
	w.ok(err)
	s, err = w.Find(w.ctx, g.Name)
	w.ok(err)
	w.must("migrate", s.Session)
	after, err := r.Acked(w.ctx)
	w.ok(err)
	if after <= before {
		t.Errorf("the guest did not write during the migration: %d, then %d", before, after)
	}
	w.local(g.Name)
	w.ok(r.StopWriter(w.ctx))
	acked, err = r.Acked(w.ctx)
	w.ok(err)
	w.ok(r.Verify(w.ctx, acked, places...))

	// It needs nothing of the repository any more: not to run, not to boot.
	if s := w.sessions(); len(s) > 0 {
		t.Errorf("sessions are left: %+v", s)
	}
	if pids, err := w.Processes(); err != nil || len(pids) > 0 {
		t.Errorf("processes are left: %v %v", pids, err)
	}
	w.ok(os.Rename(w.Repo, w.Repo+".away"))
	w.ok(r.PowerOff(w.ctx))
	w.ok(r.Boot(w.ctx))
	w.ok(r.Verify(w.ctx, acked, places...))
	w.ok(os.Rename(w.Repo+".away", w.Repo))

	w.ok(r.Remove(w.ctx))
	if names, _ := filepath.Glob(filepath.Join(w.store, "*")); len(names) != 2 {
		t.Errorf("storage holds %v, not two disks", names)
	} else {
		for _, name := range names {
			w.ok(os.Remove(name))
		}
	}
	w.must("check", "--read-data")
	w.empty()
}

// beside checks the guest that runs beside g.
func (w *world) beside(g *lab.Guest) {
	w.t.Helper()
	xml, err := lab.Virsh(w.ctx, "dumpxml", g.Name+"-beside")
	w.ok(err)
	old, err := lab.Virsh(w.ctx, "dumpxml", g.Name)
	w.ok(err)
	if strings.Contains(xml, g.UUID) {
		w.t.Error("the guest beside the original has its UUID")
	}
	for line := range strings.Lines(old) {
		if line = strings.TrimSpace(line); strings.HasPrefix(line, "<mac address") && strings.Contains(xml, line) {
			w.t.Errorf("the guest beside the original has its address: %s", line)
		}
	}
	if strings.Contains(xml, "<interface type='user'") && !strings.Contains(xml, "<link state='down'/>") {
		w.t.Errorf("the isolated guest has a network:\n%s", xml)
	}
	for disk := range strings.SplitSeq(xml, "<source file='") {
		for _, path := range g.Disks {
			if strings.HasPrefix(disk, path+"'") {
				w.t.Errorf("the guest beside the original uses its disk %s", path)
			}
		}
	}
	if state, err := lab.Open(g.Name + "-beside").State(w.ctx); err != nil || state != "running" {
		w.t.Errorf("the guest beside the original is %s: %v", state, err)
	}
}
