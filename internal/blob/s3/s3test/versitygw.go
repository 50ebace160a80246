package s3test

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// Versitygw starts a real S3 server, not written here, until the test ends;
// its credentials are "access" and "secret".
// It has these plain buckets. HOLDFAST_VERSITYGW names its program, which "make test" builds.
func Versitygw(t testing.TB, buckets ...string) (endpoint string) {
	t.Helper()
	exe := os.Getenv("HOLDFAST_VERSITYGW")
	if exe == "" {
		t.Skip("SKIPPED: needs an S3 server, which HOLDFAST_VERSITYGW names; \"make test\" builds it and sets it")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	root, versions := filepath.Join(dir, "root"), filepath.Join(dir, "versions")
	if err := errors.Join(os.Mkdir(root, 0o700), os.Mkdir(versions, 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, name := range buckets {
		if err := os.Mkdir(filepath.Join(root, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	var said bytes.Buffer
	// Without --keep-alive, with which it takes the rest of a body that it has
	// refused for the next request.
	cmd := exec.Command(exe, "--port", addr, "--quiet", "posix", "--versioning-dir", versions, root)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID=access", "ROOT_SECRET_ACCESS_KEY=secret")
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait() // it was killed
		if t.Failed() {
			t.Logf("versitygw said: %s", said.Bytes()[max(0, said.Len()-4000):])
		}
	})
	for range 200 {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			return "http://" + addr
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("versitygw does not listen; it said: %s", said.Bytes())
	return ""
}
