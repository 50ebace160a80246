//go:build linux

package e2e

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"holdfast/test/lab"
)

// newS3 starts an S3 server with a bucket "vms", and puts the world's
// repository on it.
func newS3(w *world) *lab.S3 {
	w.t.Helper()
	program := os.Getenv("HOLDFAST_VERSITYGW")
	if program == "" {
		w.t.Skip("SKIPPED: needs an S3 server, which HOLDFAST_VERSITYGW names; \"make test\" builds it and sets it")
	}
	s := &lab.S3{Program: program, Root: filepath.Join(w.dir, "s3"), Access: "e2e", Secret: "e2e-secret"}
	w.ok(os.MkdirAll(filepath.Join(s.Root, "vms"), 0o755))
	w.ok(s.Start(w.ctx))
	w.t.Cleanup(s.Stop)
	w.More = []string{"AWS_ACCESS_KEY_ID=" + s.Access, "AWS_SECRET_ACCESS_KEY=" + s.Secret}
	w.Repo = "s3://vms/one?endpoint=http://" + s.Addr
	return s
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
			w.ok(server.Signal(syscall.SIGSTOP))
			time.Sleep(8 * time.Second)
			w.ok(server.Signal(syscall.SIGCONT))
		},
		"dies": func() {
			server.Stop()
			time.Sleep(8 * time.Second)
			w.ok(server.Start(w.ctx))
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
	disks, err := filepath.Glob(filepath.Join(w.store, "*"))
	w.ok(err)
	for _, disk := range disks {
		w.ok(os.Remove(disk))
	}
	w.must("check", "--read-data")
	w.empty()
}
