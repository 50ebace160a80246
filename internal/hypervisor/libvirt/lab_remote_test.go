//go:build unix

package libvirt

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"holdfast/internal/hypervisor"
	"holdfast/test/lab"
)

// TestLabRemote reaches this machine's daemon as a remote one, over TCP and
// over ssh, and backs up a guest both ways.
func TestLabRemote(t *testing.T) {
	lab.Beside(t)
	g := lab.Start(t, lab.Options{Blank: true, Stopped: true})
	want := bytes.Repeat([]byte("holdfast"), 1<<13)
	src := filepath.Join(t.TempDir(), "p")
	if err := os.WriteFile(src, want, 0o644); err != nil {
		t.Fatal(err)
	}
	qemuIO(t, "-f", "qcow2", "-c", fmt.Sprintf("write -s %s 1M %d", src, len(want)), g.Disks[0])
	virsh(t, "start", g.Name)
	for name, uri := range map[string]func(*testing.T) string{"tcp": tcpURI, "ssh": sshURI} {
		t.Run(name, func(t *testing.T) {
			h, err := Open(t.Context(), uri(t), Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			before := things(t, g)
			var refs []hypervisor.ReferencePoint
			for _, session := range []string{"01", "02"} {
				r := labRequest(g, session, "")
				if len(refs) > 0 {
					r.Since = refs[0]
				}
				o := h.Snapshot(t.Context(), []hypervisor.Request{r}, hypervisor.SnapshotOptions{Consistency: hypervisor.Crash})[0]
				if o.Err != nil {
					t.Fatal(o.Err)
				}
				rd, err := o.Snapshot.Open(t.Context(), "vda")
				if err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(want))
				if err := rd.ReadAt(t.Context(), got, 1<<20); err != nil || !bytes.Equal(got, want) {
					t.Errorf("read other bytes than were written: %v", err)
				}
				if err := rd.Close(); err != nil {
					t.Error(err)
				}
				for e, err := range o.Snapshot.Changed(t.Context(), "vda") {
					if r.Since == "" && !errors.Is(err, hypervisor.ErrNoReference) || r.Since != "" {
						t.Errorf("changed: %v, %v", e, err)
					}
				}
				ref, err := o.Snapshot.Commit(t.Context())
				if err = errors.Join(err, o.Snapshot.Close()); err != nil {
					t.Error(err)
				}
				refs = append(refs, ref)
			}
			for _, ref := range refs {
				if err := h.Forget(t.Context(), hypervisor.VMID(g.UUID), ref); err != nil {
					t.Error(err)
				}
			}
			if after := things(t, g); !slices.Equal(before, after) {
				t.Errorf("host is not as it was:\nbefore %q\nafter  %q", before, after)
			}
		})
	}
}

// tcpURI puts a TCP port before the daemon's socket.
func tcpURI(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	wg.Go(func() {
		for {
			a, err := l.Accept()
			if err != nil {
				return
			}
			b, err := net.Dial("unix", address{path: "/system"}.defaultSocket())
			if err != nil {
				t.Error(err)
				a.Close()
				return
			}
			both := func() { a.Close(); b.Close() }
			wg.Go(func() { io.Copy(a, b); both() })
			wg.Go(func() { io.Copy(b, a); both() })
		}
	})
	return "qemu+tcp://" + l.Addr().String() + "/system"
}

// sshURI starts an sshd of its own.
func sshURI(t *testing.T) string {
	sshd := "/usr/sbin/sshd"
	if _, err := os.Stat(sshd); err != nil {
		t.Skipf("SKIPPED: %v (package openssh-server)", err)
	}
	dir := t.TempDir()
	key := filepath.Join(dir, "key")
	tool(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	l.Close()
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // of the package, made by systemd
		t.Fatal(err)
	}
	cmd := exec.Command(sshd, "-D", "-f", "/dev/null", "-o", fmt.Sprintf("ListenAddress=127.0.0.1:%d", port), "-o", "HostKey="+key,
		"-o", "AuthorizedKeysFile="+key+".pub", "-o", "StrictModes=no", "-o", "PidFile=none", "-o", "PermitRootLogin=yes")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	poll(t, "sshd listens", func() bool {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return fmt.Sprintf("qemu+ssh://root@127.0.0.1:%d/system?keyfile=%s&no_verify=1", port, key)
}
