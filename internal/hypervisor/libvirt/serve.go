package libvirt

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"holdfast/internal/nbd"
)

// serving is where QEMU serves a job's disks, and the way there: a Unix socket
// in a directory of QEMU's, reached straight or through ssh; or, for hosts
// reached over TCP or TLS, a port of the host. libvirt does not choose a free
// port itself, so it is a random one.
type serving struct {
	a      address
	socket string
	port   int

	mu     sync.Mutex // guards tunnel
	tunnel *tunnel    // of ssh; nil until it is needed
}

// runDir is a directory on the host in which QEMU may make files.
func (h *Host) runDir() string {
	if h.addr.path == "/session" {
		dir, err := os.UserConfigDir()
		if err != nil {
			dir = os.TempDir()
		}
		return path.Join(filepath.ToSlash(dir), "libvirt/qemu/lib")
	}
	return "/var/lib/libvirt/qemu"
}

// maxSocketPath is what fits into sun_path with its NUL (unix(7)).
const maxSocketPath = 107

func (h *Host) serving(name string) (*serving, error) {
	s := &serving{a: h.addr}
	switch h.addr.transport {
	case "tcp", "tls":
		s.port = 20000 + rand.IntN(12000) // below Linux's ephemeral ports
	default:
		s.socket = path.Join(h.runDir(), name+".sock")
		if len(s.socket) > maxSocketPath {
			return nil, fmt.Errorf("socket path %s is longer than %d bytes", s.socket, maxSocketPath)
		}
	}
	return s, nil
}

// element is the <server> of a backup job.
func (s *serving) element() *element {
	if s.socket != "" {
		return el("server", "transport", "unix", "socket", s.socket)
	}
	e := el("server", "transport", "tcp", "name", s.a.host, "port", strconv.Itoa(s.port))
	if s.a.transport == "tls" {
		e.set("tls", "yes") // with the certificates of backup_tls_x509_cert_dir in qemu.conf
	}
	return e
}

func (s *serving) dial(ctx context.Context, export string, o nbd.DialOptions) (*nbd.Client, error) {
	a := nbd.Address{Export: export}
	switch s.a.transport {
	case "unix":
		a.Network, a.Addr = "unix", s.socket
	case "ssh":
		t, err := s.through(ctx)
		if err != nil {
			return nil, err
		}
		a.Network, a.Addr = "unix", t.socket()
	default:
		a.Network, a.Addr = "tcp", net.JoinHostPort(s.a.host, strconv.Itoa(s.port))
	}
	if s.a.transport == "tls" {
		cfg, err := s.a.tlsConfig()
		if err != nil {
			return nil, err
		}
		a.TLS, o.TLS = true, cfg
	}
	return nbd.Dial(ctx, a, o)
}

// through gives the tunnel, making it the first time.
func (s *serving) through(ctx context.Context) (*tunnel, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tunnel == nil {
		t, err := newTunnel(ctx, s.a, s.socket)
		if err != nil {
			return nil, err
		}
		s.tunnel = t
	}
	return s.tunnel, nil
}

func (s *serving) close() error {
	s.mu.Lock()
	t := s.tunnel
	s.tunnel = nil
	s.mu.Unlock()
	if t == nil {
		return nil
	}
	return t.close()
}

// tlsConfig reads the client's certificates where libvirt's own clients do
// (libvirt, "TLS setup").
func (a address) tlsConfig() (*tls.Config, error) {
	ca, cert, key := "/etc/pki/CA/cacert.pem", "/etc/pki/libvirt/clientcert.pem", "/etc/pki/libvirt/private/clientkey.pem"
	if home, err := os.UserHomeDir(); err == nil && a.pki == "" && os.Getuid() != 0 {
		if dir := filepath.Join(home, ".pki", "libvirt"); dirExists(dir) {
			a.pki = dir
		}
	}
	if a.pki != "" {
		ca, cert, key = filepath.Join(a.pki, "cacert.pem"), filepath.Join(a.pki, "clientcert.pem"), filepath.Join(a.pki, "clientkey.pem")
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		return nil, fmt.Errorf("certificates for %s: %w", a.host, err)
	}
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, fmt.Errorf("certificates for %s: %w", a.host, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("certificates for %s: none in %s", a.host, ca)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, RootCAs: pool, ServerName: a.host, InsecureSkipVerify: a.noVerify, MinVersion: tls.VersionTLS12}, nil
}

func dirExists(p string) bool {
	fi, err := os.Stat(p)
	return err == nil && fi.IsDir()
}

// tunnel is a local socket behind which a remote host's Unix socket is: an ssh
// that forwards it. Only this user can reach it.
type tunnel struct {
	dir string
	cmd *exec.Cmd
}

func newTunnel(ctx context.Context, a address, remote string) (*tunnel, error) {
	dir, err := os.MkdirTemp("", "holdfast-") // mode 0700
	if err != nil {
		return nil, err
	}
	t := &tunnel{dir: dir}
	args := append(a.sshArgs(), "-N", "-o", "ExitOnForwardFailure=yes", "-L", t.socket()+":"+remote, "--", a.host)
	t.cmd = exec.Command("ssh", args...)
	t.cmd.Stderr = os.Stderr
	if err := t.cmd.Start(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	for { // ssh says nothing when it is ready
		if _, err := os.Stat(t.socket()); err == nil {
			return t, nil
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("forward %s of %s by ssh: %w", remote, a.host, context.Cause(ctx)), t.close())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (t *tunnel) socket() string { return filepath.Join(t.dir, "nbd") }

// close ends the ssh. Its exit status is of no interest: it was killed.
func (t *tunnel) close() error {
	err := t.cmd.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	t.cmd.Wait()
	return errors.Join(err, os.RemoveAll(t.dir))
}
