//go:build unix

package libvirt

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/hypervisor"
	"holdfast/internal/hypervisor/hypertest"
	"holdfast/test/lab"
)

const system = "qemu:///system"

func open(t *testing.T, o Options) *Host {
	t.Helper()
	h, err := Open(t.Context(), system, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	return h
}

// labFixture makes a guest with two data disks, vdb qcow2 and vdc raw.
func labFixture(t *testing.T, o lab.Options) (*lab.Guest, hypertest.Fixture) {
	lab.Beside(t)
	o.Disks = []lab.Disk{{Format: "qcow2", Size: 16 << 20}, {Format: "raw", Size: 8 << 20}}
	g := lab.Start(t, o)
	h := open(t, Options{})
	f := hypertest.Fixture{
		Source: h, VM: hypervisor.VMID(g.UUID), Owner: labOwner(g), Shared: true,
		Data: []hypervisor.DiskID{"vdb", "vdc"}, Tracked: []hypervisor.DiskID{"vdb"},
		Things: func(t *testing.T) []string { return things(t, g) },
		Abandon: func(*testing.T) hypervisor.Source {
			if err := h.Close(); err != nil {
				t.Error(err)
			}
			h = open(t, Options{}) // until the whole suite ends
			return h
		},
	}
	return g, f
}

// labOwner gives ids that no other guest's have.
func labOwner(g *lab.Guest) hypervisor.Owner {
	id := strings.ReplaceAll(g.UUID, "-", "")
	return hypervisor.Owner{Repository: id, History: id}
}

// labRequest asks for a snapshot of a guest in a session.
func labRequest(g *lab.Guest, session string, since hypervisor.ReferencePoint) hypervisor.Request {
	o := labOwner(g)
	o.Session = session
	return hypervisor.Request{VM: hypervisor.VMID(g.UUID), Since: since, Owner: o}
}

func virsh(t *testing.T, args ...string) string {
	t.Helper()
	out, err := lab.Virsh(context.Background(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// things lists what is on the host because of a guest, by virsh and qemu-img
// and not by the code under test.
func things(t *testing.T, g *lab.Guest) []string {
	t.Helper()
	var out []string
	add := func(what string, s string) {
		for line := range strings.Lines(s) {
			if line = strings.TrimSpace(line); line != "" {
				out = append(out, what+" "+line)
			}
		}
	}
	// "destroyed" or "shutdown" is how it stopped: a paused QEMU changes that.
	add("state", virsh(t, "domstate", g.Name))
	add("checkpoint", virsh(t, "checkpoint-list", "--name", g.Name))
	if job, err := lab.Virsh(context.Background(), "backup-dumpxml", g.Name); err == nil {
		add("job", job[:min(len(job), 30)])
	}
	add("definition", virsh(t, "dumpxml", "--inactive", g.Name))
	for _, dir := range []string{g.Dir, "/var/lib/libvirt/qemu"} {
		files, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			// Other backups may be under way on this machine.
			if dir == g.Dir || strings.HasPrefix(f.Name(), "holdfast-"+labOwner(g).Repository[:8]) {
				out = append(out, "file "+filepath.Join(dir, f.Name()))
			}
		}
	}
	if virsh(t, "domstate", g.Name) == "running\n\n" {
		nodes := virsh(t, "qemu-monitor-command", g.Name, `{"execute":"query-named-block-nodes","arguments":{"flat":true}}`)
		out = append(out, fmt.Sprintf("bitmaps %d", strings.Count(nodes, `"name":"holdfast-`)))
	}
	slices.Sort(out)
	return out
}

// guestWrite writes in the guest, past its page cache.
func guestWrite(g *lab.Guest) func(t *testing.T, d hypervisor.DiskID, p []byte, off int64) {
	return func(t *testing.T, d hypervisor.DiskID, p []byte, off int64) {
		t.Helper()
		cmd := fmt.Sprintf("base64 -d >/run/p <<'E'\n%s\nE\ndd if=/run/p of=/dev/%s bs=64k seek=%d oflag=seek_bytes,direct conv=notrunc,fsync status=none",
			base64.StdEncoding.EncodeToString(p), d, off)
		if _, err := g.Exec(t.Context(), cmd); err != nil {
			t.Fatalf("write %d bytes to %s: ...%s", len(p), d, err.Error()[max(0, len(err.Error())-200):])
		}
	}
}

// TestLabSource runs the conformance suite on a running guest.
func TestLabSource(t *testing.T) {
	g, f := labFixture(t, lab.Options{})
	f.Level = hypervisor.Filesystem
	f.Write = guestWrite(g)
	f.AddDisk = func(t *testing.T) hypervisor.DiskID {
		p := filepath.Join(lab.Storage(t), "new.qcow2")
		qemuImg(t, "create", "-q", "-f", "qcow2", p, "8M")
		virsh(t, "attach-disk", g.Name, p, "vdd", "--subdriver", "qcow2", "--targetbus", "virtio", "--live")
		t.Cleanup(func() {
			virsh(t, "detach-disk", g.Name, "vdd", "--live")
			poll(t, "vdd is detached", func() bool { return !strings.Contains(virsh(t, "domblklist", g.Name), "vdd") })
		})
		return "vdd"
	}
	f.Stop = func(t *testing.T) {
		virsh(t, "destroy", g.Name)
		t.Cleanup(func() { boot(t, g) })
	}
	f.LoseTracking = func(t *testing.T, d hypervisor.DiskID) { crash(t, g) }
	hypertest.Source(t, f)
}

func boot(t *testing.T, g *lab.Guest) {
	t.Helper()
	if err := g.Boot(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// crash kills the guest's QEMU, so that its bitmaps are not stored, and boots it
// again.
func crash(t *testing.T, g *lab.Guest) {
	t.Helper()
	pid, err := os.ReadFile("/run/libvirt/qemu/" + g.Name + ".pid")
	if err != nil {
		t.Fatal(err)
	}
	if err := killHard(strings.TrimSpace(string(pid))); err != nil {
		t.Fatal(err)
	}
	poll(t, "libvirt sees the crash", func() bool { return strings.Contains(virsh(t, "domstate", g.Name), "shut off") })
	boot(t, g)
}

// TestLabStopped runs the suite on a guest that is off; qemu-io writes to its
// disks, as an administrator might.
func TestLabStopped(t *testing.T) {
	g, f := labFixture(t, lab.Options{Blank: true, Stopped: true})
	f.Level = hypervisor.Application // a stopped guest satisfies every level
	f.Shared = false                 // QEMU's lock keeps qemu-io out during a snapshot
	abandon := f.Abandon
	f.Abandon = func(t *testing.T) hypervisor.Source {
		s := abandon(t)
		poll(t, "libvirt ends the paused QEMU of the lost connection", func() bool { return strings.Contains(virsh(t, "domstate", g.Name), "shut off") })
		return s
	}
	f.Write = func(t *testing.T, d hypervisor.DiskID, p []byte, off int64) {
		t.Helper()
		src := filepath.Join(t.TempDir(), "p")
		if err := os.WriteFile(src, p, 0o644); err != nil {
			t.Fatal(err)
		}
		file, format := g.Disks[1], "qcow2"
		if d == "vdc" {
			file, format = g.Disks[2], "raw"
		}
		qemuIO(t, "-f", format, "-c", fmt.Sprintf("write -s %s %d %d", src, off, len(p)), file)
	}
	hypertest.Source(t, f)
	if s := virsh(t, "domstate", g.Name); strings.TrimSpace(s) != "shut off" {
		t.Errorf("guest is %s", s)
	}
}

// TestLabConsistency tries every level on guests with an agent, without one,
// with one that hangs, and with and without a freeze hook; and whether a freeze
// ends by itself.
func TestLabConsistency(t *testing.T) {
	lab.Beside(t)
	g := lab.Start(t, lab.Options{})
	t.Run("thaw", func(t *testing.T) { thaws(t, g) })
	ctx := t.Context()
	guarded, released := 0, 0
	h := open(t, Options{Guard: func(ctx context.Context, uri, uuid string, limit time.Duration) (func() error, error) {
		guarded++
		if uri != system || uuid != g.UUID || limit <= 0 {
			t.Errorf("guard of %s %s %s", uri, uuid, limit)
		}
		return func() error { released++; return nil }, nil
	}})
	take := func(c hypervisor.Consistency) (hypervisor.Snapshot, error) {
		r := labRequest(g, "01", "")
		out := h.Snapshot(ctx, []hypervisor.Request{r}, hypervisor.SnapshotOptions{Consistency: c, FreezeLimit: 5 * time.Second})[0]
		if out.Err == nil {
			if err := out.Snapshot.Close(); err != nil {
				t.Error(err)
			}
		}
		return out.Snapshot, out.Err
	}
	frozen := func() string {
		out := virsh(t, "qemu-agent-command", g.Name, `{"execute":"guest-fsfreeze-status"}`)
		return strings.TrimSpace(out)
	}
	before := things(t, g)

	s, err := take(hypervisor.Filesystem)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("notes: %q", s.Notes())
	if guarded != 1 || released != 1 || !strings.Contains(frozen(), "thawed") {
		t.Errorf("guarded %d, released %d, %s", guarded, released, frozen())
	}
	var names []string
	for _, f := range s.VM().Config {
		names = append(names, f.Name)
		if f.Name == "osinfo.json" && !bytes.Contains(f.Data, []byte("Debian")) {
			t.Errorf("osinfo.json: %s", f.Data)
		}
	}
	if !slices.Equal(names, []string{"domain.xml", "domain-live.xml", "osinfo.json"}) {
		t.Errorf("configuration: %q", names)
	}

	if _, err := take(hypervisor.Application); err == nil {
		t.Error("application level without a hook")
	} else {
		t.Logf("without a hook: %v", err)
	}
	// A hook that leaves a trace, and an agent that runs it.
	if _, err := g.Exec(ctx, `mkdir -p /etc/qemu /run/systemd/system/qemu-guest-agent.service.d
printf '#!/bin/sh\necho $1 >>/run/hook\n' >/etc/qemu/fsfreeze-hook && chmod +x /etc/qemu/fsfreeze-hook
printf '[Service]\nExecStart=\nExecStart=/usr/sbin/qemu-ga -F\n' >/run/systemd/system/qemu-guest-agent.service.d/f.conf
systemctl daemon-reload && systemd-run --on-active=1 systemctl restart qemu-guest-agent`); err != nil {
		t.Fatal(err)
	}
	poll(t, "agent runs with -F", func() bool {
		out, err := g.Exec(ctx, "cat /proc/$(pidof qemu-ga)/cmdline | tr '\\0' ' '")
		return err == nil && strings.Contains(out, "-F")
	})
	if s, err := take(hypervisor.Application); err != nil {
		t.Errorf("application level with a hook: %v", err)
	} else {
		t.Logf("notes: %q", s.Notes())
	}
	if out, err := g.Exec(ctx, "cat /run/hook"); err != nil || out != "freeze\nthaw\n" {
		t.Errorf("hook ran: %q, %v", out, err)
	}

	// An agent that hangs.
	if _, err := g.Exec(ctx, "systemd-run --on-active=1 sh -c 'kill -STOP $(pidof qemu-ga); sleep 60; kill -CONT $(pidof qemu-ga)'"); err != nil {
		t.Fatal(err)
	}
	poll(t, "agent hangs", func() bool {
		_, err := lab.Virsh(ctx, "qemu-agent-command", "--timeout", "1", g.Name, `{"execute":"guest-ping"}`)
		return err != nil
	})
	began := time.Now()
	if _, err := take(hypervisor.Filesystem); !errors.Is(err, ErrAgent) || !strings.Contains(err.Error(), "--consistency crash") {
		t.Errorf("hung agent: %v", err)
	} else if took := time.Since(began); took > 20*time.Second {
		t.Errorf("a hung agent was noticed after %s", took)
	} else {
		t.Logf("hung agent, after %s: %v", took.Round(time.Millisecond), err)
	}
	if _, err := take(hypervisor.Crash); err != nil {
		t.Errorf("crash level with a hung agent: %v", err)
	}
	if after := things(t, g); !slices.Equal(before, after) {
		t.Errorf("host is not as it was:\nbefore %q\nafter  %q", before, after)
	}
}

// thaws freezes a guest and leaves it to the freeze's own timer, and to Thaw over
// another connection.
func thaws(t *testing.T, g *lab.Guest) {
	ctx := t.Context()
	h := open(t, Options{})
	d, err := h.domain(ctx, hypervisor.VMID(g.UUID))
	if err != nil {
		t.Fatal(err)
	}
	status := func() (s string) {
		if err := h.agent(ctx, d, agentLimit, "guest-fsfreeze-status", nil, &s); err != nil {
			t.Fatal(err)
		}
		return s
	}
	f, err := h.freeze(ctx, d, 2*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if status() != "frozen" {
		t.Error("not frozen")
	}
	if _, err := h.freeze(ctx, d, time.Second); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("frozen twice: %v", err)
	}
	<-f.ended
	if status() != "thawed" {
		t.Error("the limit passed and the guest is frozen")
	}
	if err := f.thaw(); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("a snapshot after the limit would pass for frozen: %v", err)
	}
	if f, err = h.freeze(ctx, d, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := Thaw(ctx, system, g.UUID); err != nil {
		t.Error(err)
	}
	if status() != "thawed" {
		t.Error("Thaw left the guest frozen")
	}
	if err := f.thaw(); err != nil {
		t.Error(err)
	}
}

// TestLabForeign has checkpoints and jobs of another program on the guest.
func TestLabForeign(t *testing.T) {
	g, f := labFixture(t, lab.Options{Blank: true, Stopped: true})
	virsh(t, "start", g.Name)
	h := f.Source.(*Host)
	dir := t.TempDir()
	write := func(name, s string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
		return p
	}
	virsh(t, "checkpoint-create", g.Name, write("c.xml", `<domaincheckpoint><name>nightly</name><disks><disk name='vda' checkpoint='no'/><disk name='vdb' checkpoint='bitmap'/><disk name='vdc' checkpoint='no'/></disks></domaincheckpoint>`))
	before := things(t, g)
	take := func(session string) hypervisor.Outcome {
		r := labRequest(g, session, "")
		return h.Snapshot(t.Context(), []hypervisor.Request{r}, hypervisor.SnapshotOptions{Consistency: hypervisor.Crash})[0]
	}
	o := take("01")
	if o.Err != nil {
		t.Fatal(o.Err)
	}
	if _, err := o.Snapshot.Commit(t.Context()); err != nil {
		t.Error(err)
	}
	if err := o.Snapshot.Close(); err != nil {
		t.Error(err)
	}
	if _, err := h.Clean(t.Context(), f.VM, labOwner(g).Repository, func(string) bool { return true }, nil); err != nil {
		t.Error(err)
	}
	if after := things(t, g); !slices.Equal(before, after) {
		t.Errorf("beside a foreign checkpoint:\nbefore %q\nafter  %q", before, after)
	}

	virsh(t, "backup-begin", g.Name, write("b.xml", `<domainbackup mode='pull'><server transport='unix' socket='/var/lib/libvirt/qemu/`+g.Name+`.sock'/><disks><disk name='vdb' backup='yes' type='file'><scratch file='`+g.Dir+`/foreign'/></disk></disks></domainbackup>`))
	before = things(t, g)
	if o := take("02"); o.Err == nil || !strings.Contains(o.Err.Error(), "another program") {
		t.Errorf("beside a foreign backup: %v", o.Err)
	} else {
		t.Logf("foreign backup: %v", o.Err)
	}
	if did, err := h.Clean(t.Context(), f.VM, labOwner(g).Repository, func(string) bool { return true }, nil); err != nil || len(did) > 0 {
		t.Errorf("cleaned %q, %v", did, err)
	}
	if after := things(t, g); !slices.Equal(before, after) {
		t.Errorf("beside a foreign backup:\nbefore %q\nafter  %q", before, after)
	}
	virsh(t, "domjobabort", g.Name)

	// A snapshot of somebody's: its new layer has no bitmap of ours.
	virsh(t, "checkpoint-delete", g.Name, "nightly")
	o = take("03")
	if o.Err != nil {
		t.Fatal(o.Err)
	}
	ref, err := o.Snapshot.Commit(t.Context())
	if err = errors.Join(err, o.Snapshot.Close()); err != nil {
		t.Fatal(err)
	}
	if out, err := lab.Virsh(t.Context(), "snapshot-create-as", g.Name, "theirs", "--disk-only", "--atomic", "--diskspec", "vda,snapshot=no", "--diskspec", "vdc,snapshot=no"); err != nil {
		t.Logf("libvirt makes no snapshot beside a checkpoint: %v", err)
	} else {
		t.Log(out)
		r := labRequest(g, "04", ref)
		o := h.Snapshot(t.Context(), []hypervisor.Request{r}, hypervisor.SnapshotOptions{Consistency: hypervisor.Crash})[0]
		if o.Err != nil {
			t.Fatal(o.Err)
		}
		for _, err := range o.Snapshot.Changed(t.Context(), "vdb") {
			t.Logf("after a foreign snapshot: %v", err)
			if err != nil && !errors.Is(err, hypervisor.ErrNoReference) {
				t.Error(err)
			}
		}
		t.Logf("notes: %q", o.Snapshot.Notes())
		if err := o.Snapshot.Close(); err != nil {
			t.Error(err)
		}
		if list := virsh(t, "snapshot-list", "--name", g.Name); !strings.Contains(list, "theirs") {
			t.Error("the foreign snapshot is gone")
		}
	}
}
