//go:build linux

package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"holdfast/test/lab"
)

// s3Server is versitygw with a bucket "vms".
type s3Server struct {
	w         *world
	exe, addr string
	root      string
	cmd       *exec.Cmd
}

// newS3 starts a server on a port of its own, and puts the world's repository
// on it.
func newS3(w *world) *s3Server {
	w.t.Helper()
	exe := os.Getenv("HOLDFAST_VERSITYGW")
	if exe == "" {
		w.t.Skip("SKIPPED: needs an S3 server, which HOLDFAST_VERSITYGW names; \"make test\" builds it and sets it")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	w.ok(err)
	s := &s3Server{w: w, exe: exe, addr: l.Addr().String(), root: filepath.Join(w.dir, "s3")}
	w.ok(l.Close())
	w.ok(os.MkdirAll(filepath.Join(s.root, "vms"), 0o755))
	s.start()
	w.t.Cleanup(s.stop)
	w.More = []string{"AWS_ACCESS_KEY_ID=e2e", "AWS_SECRET_ACCESS_KEY=e2e-secret"}
	w.Repo = "s3://vms/one?endpoint=http://" + s.addr
	return s
}

func (s *s3Server) start() {
	s.w.t.Helper()
	s.cmd = exec.Command(s.exe, "--port", s.addr, "--quiet", "posix", s.root)
	s.cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID=e2e", "ROOT_SECRET_ACCESS_KEY=e2e-secret")
	s.w.ok(s.cmd.Start())
	s.w.ok(lab.Poll(s.w.ctx, 10*time.Second, "the S3 server listens", func() (bool, error) {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			return false, nil
		}
		return true, c.Close()
	}))
}

func (s *s3Server) stop() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait() // it was killed
}

// TestS3 runs a guest from a repository on S3 whose server hangs, and then dies
// and comes back: the guest stands still and goes on.
func TestS3(t *testing.T) {
	lab.Beside(t)
	w := world0(t)
	server := newS3(w)
	w.must("init")
	g := lab.Start(t, twoDisks())
	w.ok(g.StartWriter(w.ctx, places...))
	_, err := g.WaitWriter(w.ctx, 300)
	w.ok(err)
	w.backup(host, g.Name)
	acked, err := g.Acked(w.ctx)
	w.ok(err)
	if n := w.backup(host, g.Name).ReadBytes; n > 160<<20 {
		t.Errorf("the second backup read %d bytes", n)
	}
	w.clean(g.Name)
	w.ok(g.Remove(w.ctx))

	w.must("recover", g.Name+"@latest", "--host", host, "--storage", w.store, "--wait")
	r := lab.Open(g.Name)
	w.ok(r.WaitAgent(w.ctx, time.Second))
	w.ok(r.Verify(w.ctx, acked, places...))
	w.ok(r.StartWriter(w.ctx, places...))
	for what, disturb := range map[string]func(){
		"hangs": func() {
			w.ok(server.cmd.Process.Signal(syscall.SIGSTOP))
			time.Sleep(8 * time.Second)
			w.ok(server.cmd.Process.Signal(syscall.SIGCONT))
		},
		"dies": func() {
			server.stop()
			time.Sleep(8 * time.Second)
			server.start()
		},
	} {
		// Reads that the guest has in no cache of its own.
		read := make(chan error, 1)
		go func() {
			_, err := r.Exec(w.ctx, "echo 3 > /proc/sys/vm/drop_caches; find /usr -type f -size -512k | head -2000 | xargs cat | wc -c")
			read <- err
		}()
		disturb()
		w.logf("the server %s", what)
		if err := <-read; err != nil {
			t.Errorf("while the server %s: %v", what, err)
		}
	}
	before, err := r.Acked(w.ctx)
	w.ok(err)
	_, err = r.WaitWriter(w.ctx, 100)
	w.ok(err)
	s, err := w.Find(w.ctx, g.Name)
	w.ok(err)
	w.must("migrate", s.Session)
	w.local(g.Name)
	w.ok(r.StopWriter(w.ctx))
	acked, err = r.Acked(w.ctx)
	w.ok(err)
	if acked <= before {
		t.Errorf("the guest wrote nothing after the server had come back: %d, then %d", before, acked)
	}
	w.ok(r.Verify(w.ctx, acked, places...))
	w.ok(r.Remove(w.ctx))
	for _, disk := range must(filepath.Glob(filepath.Join(w.store, "*"))) {
		w.ok(os.Remove(disk))
	}
	w.must("check", "--read-data")
	w.empty()
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(fmt.Sprint(err))
	}
	return v
}
