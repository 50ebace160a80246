package libvirt

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"sync"

	"holdfast/internal/nbd"
)

// serving is where QEMU serves a job's disks, and the way there: a Unix socket
// in a directory of QEMU's, reached straight or through ssh; or, for hosts
// reached over TCP or TLS, a port of the host. libvirt does not choose a free
// port itself, so it is a random one.
type serving struct {
	a       address
	socket  string
	port    int
	tunnels *tunnel // of ssh; nil until it is needed
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
		if s.tunnels == nil {
			t, err := newTunnel(s.a, s.socket)
			if err != nil {
				return nil, err
			}
			s.tunnels = t
		}
		a.Network, a.Addr = s.tunnels.addr()
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

func (s *serving) close() error {
	if s.tunnels == nil {
		return nil
	}
	return s.tunnels.close()
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

// tunnel is a local socket behind which a remote host's Unix socket is. Only
// this user can reach it.
type tunnel struct {
	dir string
	l   net.Listener
	wg  sync.WaitGroup

	mu     sync.Mutex // guards conns and closed
	conns  map[io.Closer]bool
	closed bool
}

func newTunnel(a address, remote string) (*tunnel, error) {
	dir, err := os.MkdirTemp("", "holdfast-") // mode 0700
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", filepath.Join(dir, "nbd"))
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	t := &tunnel{dir: dir, l: l, conns: map[io.Closer]bool{}}
	t.wg.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := a.dialUnix(context.Background(), remote)
			if err != nil {
				near.Close() // the client sees the end of the connection
				continue
			}
			if !t.add(near, far) {
				return
			}
			t.wg.Go(func() { t.copy(near, far) })
			t.wg.Go(func() { t.copy(far, near) })
		}
	})
	return t, nil
}

func (t *tunnel) addr() (network, addr string) { return "unix", t.l.Addr().String() }

// add registers a pair, or closes it when the tunnel is closed.
func (t *tunnel) add(cs ...io.Closer) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, c := range cs {
		if t.closed {
			c.Close()
			continue
		}
		t.conns[c] = true
	}
	return !t.closed
}

// copy carries bytes one way; the end of either way ends both.
func (t *tunnel) copy(to, from net.Conn) {
	io.Copy(to, from) // whoever reads or writes at an end sees what went wrong
	to.Close()
	from.Close()
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.conns, to)
	delete(t.conns, from)
}

func (t *tunnel) close() error {
	err := t.l.Close()
	t.mu.Lock()
	t.closed = true
	var open []io.Closer
	for c := range t.conns {
		open = append(open, c)
	}
	t.mu.Unlock()
	for _, c := range open {
		c.Close()
	}
	t.wg.Wait()
	return errors.Join(err, os.RemoveAll(t.dir))
}
