package node

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"time"

	"holdfast/internal/hypervisor/libvirt"
)

const (
	// thawTries bounds how long the guard goes on trying to thaw a guest.
	thawTries = 30 * time.Minute
	// guardStart bounds how long a guard may take to come up.
	guardStart = 10 * time.Second

	guardReady    = "ready\n"
	guardReleased = "released\n"
)

// guard starts a process that thaws a guest when limit has passed, or when this
// process dies, unless release was called: libvirt.Options.Guard. It listens
// on its stdin, which ends with this process however that ends.
func (n *Node) guard(ctx context.Context, uri, uuid string, limit time.Duration) (release func() error, err error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(exe, "thaw", uri, uuid, limit.String())
	cmd.SysProcAttr = detached()
	cmd.Env = withoutSecrets(os.Environ())
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ready := make(chan error, 1)
	go func() {
		line, err := bufio.NewReader(out).ReadString('\n')
		if err == nil && line != guardReady {
			err = fmt.Errorf("it says %q", line)
		}
		ready <- err
	}()
	end := func(last string) error {
		_, err := io.WriteString(in, last)
		return errors.Join(err, in.Close(), cmd.Wait())
	}
	select {
	case err = <-ready:
	case <-time.After(guardStart):
		err = fmt.Errorf("it did not come up within %s", guardStart)
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, cmd.Process.Kill(), end(""))
	}
	return func() error { return end(guardReleased) }, nil
}

// Thaw is the process that guard starts: in tells whether the guest still
// needs it.
func Thaw(ctx context.Context, in io.Reader, out io.Writer, uri, uuid string, limit time.Duration) error {
	released := make(chan bool, 1)
	go func() { // ends with the pipe, or with the process
		line, _ := bufio.NewReader(in).ReadString('\n')
		released <- line == guardReleased
	}()
	if _, err := io.WriteString(out, guardReady); err != nil {
		return err
	}
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case ok := <-released:
		if ok {
			return nil
		}
	case <-t.C:
	case <-ctx.Done(): // told to end: not before the guest is thawed
	}
	// It is thawed too often rather than too seldom: a thaw of a guest that is
	// not frozen does nothing. A release that comes now ends it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), thawTries)
	defer cancel()
	go func() {
		if <-released {
			cancel()
		}
	}()
	err := libvirt.Thaw(ctx, uri, uuid)
	if errors.Is(context.Cause(ctx), context.Canceled) {
		return nil
	}
	return err
}
