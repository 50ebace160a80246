package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"time"
)

// S3 is versitygw, an S3 server that was not written here. The fields but Addr
// are set before Start; its methods may not run in parallel.
type S3 struct {
	Program string // "make test" builds bin/lab/versitygw
	Root    string // directory whose directories are the buckets
	// Versions is a directory for what objects were before, in buckets that
	// keep versions; "" for none.
	Versions       string
	Access, Secret string // the keys that open it
	Addr           string // host:port; Start chooses a free one when it is empty

	cmd  *exec.Cmd
	said bytes.Buffer
}

// Start starts the server, also after Stop, and returns when it listens. It
// runs until Stop.
func (s *S3) Start(ctx context.Context) error {
	if s.Addr == "" {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		s.Addr = l.Addr().String()
		if err := l.Close(); err != nil {
			return err
		}
	}
	// Without --keep-alive, with which it takes the rest of a body that it has
	// refused for the next request.
	args := []string{"--port", s.Addr, "--quiet", "posix"}
	if s.Versions != "" {
		args = append(args, "--versioning-dir", s.Versions)
	}
	s.cmd = exec.Command(s.Program, append(args, s.Root)...)
	s.cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID="+s.Access, "ROOT_SECRET_ACCESS_KEY="+s.Secret)
	s.cmd.Stdout, s.cmd.Stderr = &s.said, &s.said
	if err := s.cmd.Start(); err != nil {
		return err
	}
	err := Poll(ctx, 10*time.Second, "the S3 server listens", func() (bool, error) {
		c, err := net.Dial("tcp", s.Addr)
		if err != nil {
			return false, nil
		}
		return true, c.Close()
	})
	if err != nil {
		s.Stop()
		return errors.Join(err, fmt.Errorf("the S3 server said: %s", s.Said()))
	}
	return nil
}

// Stop ends the server as a crash would.
func (s *S3) Stop() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait() // it was killed
}

// Signal sends the server a signal.
func (s *S3) Signal(sig os.Signal) error { return s.cmd.Process.Signal(sig) }

// Said is the end of what a stopped server has written: at most 4,000 bytes.
func (s *S3) Said() string {
	b := s.said.Bytes()
	return string(b[max(0, len(b)-4000):])
}
