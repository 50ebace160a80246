//go:build linux

package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"holdfast/test/cli"
	"holdfast/test/lab"
)

// seed returns a random source whose seed is printed and can be given by SEED.
func seed(t *testing.T) *rand.Rand {
	n := rand.Uint64()
	if s := os.Getenv("SEED"); s != "" {
		var err error
		if n, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("SEED: %v", err)
		}
	}
	t.Logf("SEED=%d", n)
	return rand.New(rand.NewPCG(n, n))
}

// killAfter kills a started command after d unless it ended before, and reports
// whether it was killed.
func (w *world) killAfter(d time.Duration, args ...string) bool {
	w.t.Helper()
	p, err := w.Start(args...)
	w.ok(err)
	select {
	case <-p.Done():
		w.logf("holdfast %s: ended by itself before %v", strings.Join(args, " "), d)
		w.ok(p.Wait().Err())
		return false
	case <-time.After(d):
	}
	r := p.Kill()
	w.logf("holdfast %s: killed after %v", strings.Join(args, " "), d)
	return r.Code == -1
}

// TestBackupKilled kills backups of a working guest at random moments. The next
// backup must clean up what they left on the host and be right. At last the
// guest's agent hangs.
func TestBackupKilled(t *testing.T) {
	w := newWorld(t)
	g := lab.Start(t, twoDisks())
	w.ok(g.StartWriter(w.ctx, places...))
	w.killBackups(g, seed(t), 3)
	w.agentHangs(g)
}

// killBackups kills n backups, each followed by one that is verified.
func (w *world) killBackups(g *lab.Guest, r *rand.Rand, n int) {
	w.t.Helper()
	// The first backup, too; some seconds long.
	w.killAfter(after(r, 5*time.Second), "backup", host, g.Name)
	last := 2 * time.Second
	for i := range n {
		before := len(w.points(g.Name))
		killed := w.killAfter(after(r, last), "backup", host, g.Name)
		if after := len(w.points(g.Name)); killed && after > before+1 || !killed && after != before+1 {
			w.t.Errorf("there were %d points before a backup (killed: %v) and %d after", before, killed, after)
		}
		acked := w.goesOn(g)
		from := time.Now()
		b := w.backup(host, g.Name)
		last = time.Since(from)
		w.clean(g.Name)
		w.verifyPoint(b.Point, acked, fmt.Sprintf("kill-%d", i))
	}
	w.must("check", "--read-data")
}

// goesOn waits until the guest writes on: a freeze outlives nobody, and at most
// 10 s. It returns what is flushed by then.
func (w *world) goesOn(g *lab.Guest) uint64 {
	w.t.Helper()
	var from, now uint64
	w.ok(lab.Poll(w.ctx, 30*time.Second, "guest "+g.Name+" writes on", func() (bool, error) {
		n, err := g.Acked(w.ctx)
		if err != nil {
			return false, nil // the agent of a frozen guest runs nothing
		}
		if from == 0 {
			from = n
		}
		now = n
		return now > from, nil
	}))
	return now
}

// agentHangs backs up a guest whose agent is there and does not answer.
func (w *world) agentHangs(g *lab.Guest) {
	w.t.Helper()
	_, err := g.Exec(w.ctx, "(sleep 1; kill -STOP $(pidof qemu-ga)) >/dev/null 2>&1 &")
	w.ok(err)
	w.ok(lab.Poll(w.ctx, time.Minute, "the agent hangs", func() (bool, error) {
		_, err := lab.Virsh(w.ctx, "qemu-agent-command", "--timeout", "2", g.Name, `{"execute":"guest-ping"}`)
		return err != nil, nil
	}))
	from := time.Now()
	w.refused(w.Run(w.ctx, "backup", host, g.Name), 1, "--consistency crash")
	if took := time.Since(from); took > time.Minute {
		w.t.Errorf("it took %v", took)
	}
	w.clean(g.Name)
	w.backup(host, g.Name, "--consistency", "crash")
	w.clean(g.Name)
}

// after is a moment in a run that lasts as long as most: seldom in its first
// half second, in which it only opens the repository.
func after(r *rand.Rand, most time.Duration) time.Duration {
	d := time.Duration(r.Int64N(int64(most)))
	if d < 500*time.Millisecond && r.IntN(4) > 0 {
		d += 500 * time.Millisecond
	}
	return d
}

// verifyPoint restores the data disk of a point and verifies it offline.
func (w *world) verifyPoint(point string, acked uint64, name string) {
	w.t.Helper()
	dir := filepath.Join(w.dir, name)
	w.must("restore", point, "--to", dir, "--disk", "vdb", "--format", "raw")
	w.offline(filepath.Join(dir, "vdb.raw"), "/w", acked)
	w.ok(os.RemoveAll(dir))
}

// recovered makes a point of a guest that was never started, removes the
// guest, and recovers it.
func (w *world) recovered(writes string) (*lab.Guest, cli.Session) {
	w.t.Helper()
	o := twoDisks()
	o.Stopped = true
	g := lab.Start(w.t, o)
	w.backup(host, g.Name)
	w.ok(g.Remove(w.ctx))
	w.must("recover", g.Name+"@latest", "--host", host, "--storage", w.store, "--writes", writes, "--wait")
	s, err := w.Find(w.ctx, g.Name)
	w.ok(err)
	return lab.Open(g.Name), s
}

// TestKilledHost: the guest's writes go to an overlay of the hypervisor.
func TestKilledHost(t *testing.T) { testKilled(t, "host") }

// TestKilledServer: the guest's writes go to an overlay of ours.
func TestKilledServer(t *testing.T) { testKilled(t, "server") }

// testKilled kills the processes that serve a working guest, and its
// migration, as a crash would. No flush that the guest saw acknowledged may be
// lost.
func testKilled(t *testing.T, writes string) {
	w := newWorld(t)
	r := seed(t)
	g, s := w.recovered(writes)
	w.ok(g.StartWriter(w.ctx, places...))
	for range 2 {
		w.killServing(g, r)
	}
	w.powerCycle(g)
	w.ok(g.StartWriter(w.ctx, places...))
	w.killMigrate(g, s, r)
	w.finish(g, s)
}

// killServing kills the serving processes under load, resumes, and verifies.
func (w *world) killServing(g *lab.Guest, r *rand.Rand) {
	w.t.Helper()
	// Cold reads, so that the guest feels the loss of what serves it.
	_, err := g.Exec(w.ctx, "(sync; echo 3 >/proc/sys/vm/drop_caches; find /usr -xdev -type f -exec cat {} + >/dev/null) >/dev/null 2>&1 &")
	w.ok(err)
	before, err := g.WaitWriter(w.ctx, 32+r.Uint64N(200))
	w.ok(err)
	if w.kill() == 0 {
		w.t.Fatal("no process serves the guest")
	}
	w.paused(g)
	w.must("resume")
	w.must("resume") // again: nothing to do, no harm
	w.running(g)
	after, err := g.WaitWriter(w.ctx, 100)
	w.ok(err)
	w.logf("killed at record %d or later, now at %d", before, after)
	w.ok(g.StopWriter(w.ctx))
	acked, err := g.Acked(w.ctx)
	w.ok(err)
	w.ok(g.Verify(w.ctx, acked, places...))
	w.noErrors(g)
	w.ok(g.StartWriter(w.ctx, places...))
}

// paused waits until the guest stands still, or has gone on for some seconds
// without needing what was killed.
func (w *world) paused(g *lab.Guest) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.ctx, 5*time.Second)
	defer cancel()
	_ = lab.Poll(ctx, 5*time.Second, "the guest is paused", func() (bool, error) {
		state, err := g.State(w.ctx)
		return state == "paused", err
	})
	state, err := g.State(w.ctx)
	w.ok(err)
	w.logf("guest %s is %s", g.Name, state)
}

func (w *world) running(g *lab.Guest) {
	w.t.Helper()
	w.ok(lab.Poll(w.ctx, time.Minute, "the guest runs", func() (bool, error) {
		state, err := g.State(w.ctx)
		return state == "running", err
	}))
}

// noErrors checks that the guest has not seen its disks fail.
func (w *world) noErrors(g *lab.Guest) {
	w.t.Helper()
	out, err := g.Exec(w.ctx, "dmesg | grep -iE 'i/o error|remounting|ext4-fs error|aborted journal' || true")
	w.ok(err)
	if out != "" {
		w.t.Errorf("the guest's kernel says:\n%s", out)
	}
}

// powerCycle pulls the guest's plug under load and boots it again.
func (w *world) powerCycle(g *lab.Guest) {
	w.t.Helper()
	acked, err := g.WaitWriter(w.ctx, 50)
	w.ok(err)
	w.ok(g.PowerOff(w.ctx))
	w.ok(g.Boot(w.ctx))
	w.ok(g.Verify(w.ctx, acked, places...))
}

// killMigrate kills a migration, and what serves the guest too, and resumes.
func (w *world) killMigrate(g *lab.Guest, s cli.Session, r *rand.Rand) {
	w.t.Helper()
	killed := w.killAfter(500*time.Millisecond+time.Duration(r.Int64N(int64(3*time.Second))), w.migrate(s)...)
	if !killed {
		return
	}
	if r.IntN(2) == 0 {
		w.logf("killing what serves the guest, too")
		w.kill()
		w.paused(g)
	}
	w.must("resume")
	w.running(g)
	_, err := g.WaitWriter(w.ctx, 50)
	w.ok(err)
}

// migrate is the command that brings the session home.
func (w *world) migrate(s cli.Session) []string {
	return []string{"migrate", s.Session, "--storage", w.store}
}

// finish migrates, verifies that the guest is local and right, and removes it.
func (w *world) finish(g *lab.Guest, s cli.Session) {
	w.t.Helper()
	if len(w.sessions()) > 0 {
		w.must(w.migrate(s)...)
	}
	w.local(g.Name)
	_, err := g.WaitWriter(w.ctx, 50)
	w.ok(err)
	w.ok(g.StopWriter(w.ctx))
	acked, err := g.Acked(w.ctx)
	w.ok(err)
	w.ok(g.Verify(w.ctx, acked, places...))
	w.noErrors(g)
	if s := w.sessions(); len(s) > 0 {
		w.t.Errorf("sessions are left: %+v", s)
	}
	disks := w.local(g.Name)
	w.ok(g.Remove(w.ctx))
	for _, disk := range disks {
		w.ok(os.Remove(disk))
	}
	w.empty()
}
