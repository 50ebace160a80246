//go:build linux

package e2e

import (
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"holdfast/test/cli"
	"holdfast/test/lab"
)

func command(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	return string(out), err
}

// TestRefused asks for what a guest or a host cannot give.
func TestRefused(t *testing.T) {
	w := newWorld(t)
	g := lab.Start(t, lab.Options{Stopped: true, Blank: true})
	w.run("qemu-io", "-c", "write -P 7 0 64m", g.Disks[0])
	point := w.backup(host, g.Name).Point
	_, err := lab.Virsh(w.ctx, "start", g.Name)
	w.ok(err)

	// The agent's channel is there, nobody answers.
	from := time.Now()
	w.refused(w.Run(w.ctx, "backup", host, g.Name), 1, "--consistency crash")
	if took := time.Since(from); took > time.Minute {
		t.Errorf("an agent that does not answer was waited for %v", took)
	}
	w.clean(g.Name)
	w.refused(w.Run(w.ctx, "backup", host, g.Name, "--consistency", "application"), 1, "agent")
	w.backup(host, g.Name, "--consistency", "crash")
	w.clean(g.Name)

	mute := lab.Start(t, lab.Options{Stopped: true, Blank: true, NoAgent: true})
	_, err = lab.Virsh(w.ctx, "start", mute.Name)
	w.ok(err)
	w.refused(w.Run(w.ctx, "backup", host, mute.Name), 1, "--consistency crash")
	// One of two fails, the other is done, the exit status tells.
	var all []cli.Backup
	r, err := w.JSON(w.ctx, &all, "backup", host, g.Name, mute.Name, "--consistency", "filesystem")
	if err == nil || r.Code != 1 || len(all) != 2 {
		t.Errorf("backup of two: exit status %d, %+v", r.Code, all)
	}

	// The name is taken.
	for _, verb := range []string{"recover", "restore"} {
		w.refused(w.Run(w.ctx, verb, point, "--host", host, "--storage", w.store, "--name", mute.Name), 1, mute.Name)
		w.empty()
	}
	// The storage is too small, which is said before anything is made.
	small := w.tmpfs("small", "16m")
	w.refused(w.Run(w.ctx, "restore", point, "--host", host, "--storage", small, "--name", g.Name+"-small"), 1, small)
	if names, _ := filepath.Glob(filepath.Join(small, "*")); len(names) > 0 {
		t.Errorf("a refused restore left %v", names)
	}
	w.empty()
}

// midway starts a backup of a guest, stops the program's clock while the
// hypervisor's job is open, lets something happen, and lets it go on.
func (w *world) midway(uri string, g *lab.Guest, what func()) cli.Result {
	w.t.Helper()
	p, err := w.Start("backup", uri, g.Name, "--consistency", "crash")
	w.ok(err)
	w.ok(lab.Poll(w.ctx, 30*time.Second, "the backup's job is open", func() (bool, error) {
		select {
		case <-p.Done():
			w.t.Fatalf("the backup was over before something could happen to it: %s", p.Wait().Stderr)
		default:
		}
		info, err := lab.Virsh(w.ctx, "domjobinfo", g.Name)
		return strings.Contains(info, "Backup"), err
	}))
	w.ok(p.Process.Signal(syscall.SIGSTOP))
	what()
	w.ok(p.Process.Signal(syscall.SIGCONT))
	return p.Wait()
}

// TestMidBackup lets the guest stop, a disk be added, and libvirt go away while
// a backup runs.
func TestMidBackup(t *testing.T) {
	w := newWorld(t)
	g := lab.Start(t, lab.Options{Stopped: true, Blank: true, Disks: []lab.Disk{{}}})
	noise := filepath.Join(w.dir, "noise.raw")
	// start starts the guest with a disk whose backup takes its time: all of it
	// is new, and no list of changes is there.
	start := func() {
		if out, err := lab.Virsh(w.ctx, "domstate", g.Name); err == nil && strings.Contains(out, "running") {
			w.ok(g.PowerOff(w.ctx))
		}
		w.run("dd", "if=/dev/urandom", "of="+noise, "bs=1M", "count=700", "status=none")
		w.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", noise, g.Disks[0])
		_, err := lab.Virsh(w.ctx, "start", g.Name)
		w.ok(err)
	}

	start()
	t.Run("guest stops", func(t *testing.T) {
		s := *w
		s.t = t
		r := s.midway(host, g, func() { s.ok(g.PowerOff(s.ctx)) })
		s.refused(r, 1, g.Name)
		if n := len(s.all()); n != 0 {
			t.Errorf("a backup that failed made %d points", n)
		}
	})
	start()
	t.Run("libvirt goes away", func(t *testing.T) {
		s := *w
		s.t = t
		p := s.proxy()
		r := s.midway(p.uri, g, p.cut)
		// The data takes another way: all of it may have come.
		made := 0
		if r.Code == 0 {
			made = 1
		} else {
			s.refused(r, 1)
		}
		if n := len(s.all()); n != made {
			t.Errorf("exit status %d, and %d points", r.Code, n)
		}
		p.listen(t)
		s.backup(p.uri, g.Name, "--consistency", "crash")
		s.clean(g.Name)
	})
	start()
	t.Run("disk added", func(t *testing.T) {
		s := *w
		s.t = t
		added := filepath.Join(g.Dir, "added.qcow2")
		s.run("qemu-img", "create", "-q", "-f", "qcow2", added, "64M")
		before := len(s.all())
		r := s.midway(host, g, func() {
			// libvirt may refuse it while the job is open; then there is nothing
			// to cope with.
			if _, err := lab.Virsh(s.ctx, "attach-disk", g.Name, added, "vdz", "--subdriver", "qcow2", "--live", "--config"); err != nil {
				t.Logf("libvirt: %v", err)
			}
		})
		if r.Code != 0 {
			s.refused(r, 1)
		} else if len(s.all()) != before+1 {
			t.Errorf("no point was made")
		}
		s.backup(host, g.Name, "--consistency", "crash")
		s.clean(g.Name)
	})
	w.empty()
}

// proxy is a way to libvirt that can be cut.
type proxy struct {
	uri, path string

	mu    sync.Mutex // guards what follows
	l     net.Listener
	conns []net.Conn
}

// proxy passes connections on to libvirt's own socket.
func (w *world) proxy() *proxy {
	w.t.Helper()
	p := &proxy{path: filepath.Join(w.dir, "libvirt.sock")}
	p.uri = "qemu+unix:///system?socket=" + p.path
	p.listen(w.t)
	w.t.Cleanup(p.cut)
	return p
}

func (p *proxy) listen(t *testing.T) {
	t.Helper()
	l, err := net.Listen("unix", p.path)
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	p.l = l
	p.mu.Unlock()
	go func() {
		for {
			from, err := l.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("unix", "/run/libvirt/libvirt-sock")
			if err != nil {
				from.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, from, to)
			p.mu.Unlock()
			go func() { io.Copy(to, from); to.Close() }()
			go func() { io.Copy(from, to); from.Close() }()
		}
	}()
}

// cut closes all connections and takes no new ones.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.l.Close()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}
