package nbd

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// shelf serves disks that outlive their connections.
type shelf map[string]disk.Device

func (s shelf) Names(context.Context) ([]string, error) {
	return slices.Sorted(maps.Keys(s)), nil
}

func (s shelf) Open(_ context.Context, name string) (disk.Device, error) {
	d, ok := s[name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return kept{d}, nil
}

// kept is a disk that its user cannot close.
type kept struct{ d disk.Device }

func (k kept) Size() int64 { return k.d.Size() }
func (k kept) ReadAt(ctx context.Context, p []byte, off int64) error {
	return k.d.ReadAt(ctx, p, off)
}
func (k kept) Extents(ctx context.Context, off, n int64) disk.Extents {
	return k.d.Extents(ctx, off, n)
}
func (k kept) WriteAt(ctx context.Context, p []byte, off int64) error {
	return k.d.WriteAt(ctx, p, off)
}
func (k kept) ZeroAt(ctx context.Context, off, n int64) error { return k.d.ZeroAt(ctx, off, n) }
func (k kept) Flush(ctx context.Context) error                { return k.d.Flush(ctx) }
func (k kept) Close() error                                   { return nil }

// running is a server in a test.
type running struct {
	*Server
	addr Address
	stop context.CancelFunc
	done chan error
}

// serve starts a server of exports at a new Unix socket, or on TCP, that ends
// with the test.
func serve(t testing.TB, exports disk.Exports, o ServerOptions, network string) *running {
	t.Helper()
	var l net.Listener
	var err error
	a := Address{Network: network}
	if network == "tcp" {
		l, err = ListenTCP(t.Context(), "127.0.0.1:0")
	} else {
		l, err = ListenUnix(t.Context(), filepath.Join(scratch(t), "s"), SocketOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	a.Addr = l.Addr().String()
	return serveAt(t, l, a, exports, o)
}

func serveAt(t testing.TB, l net.Listener, a Address, exports disk.Exports, o ServerOptions) *running {
	ctx, stop := context.WithCancel(context.Background())
	r := &running{Server: NewServer(exports, o), addr: a, stop: stop, done: make(chan error, 1)}
	go func() { r.done <- r.Serve(ctx, l) }()
	t.Cleanup(func() { r.end(t) })
	return r
}

// end stops the server and waits for it. It may be called again.
func (r *running) end(t testing.TB) {
	t.Helper()
	r.stop()
	select {
	case err, open := <-r.done:
		if open && err != nil {
			t.Errorf("serve: %v", err)
		}
		if open {
			close(r.done)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the server does not end")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.open) != 0 || r.conns != 0 {
		t.Errorf("the server ended with %d connections and exports %v", r.conns, r.open)
	}
}

// at is the server's address with an export.
func (r *running) at(export string) Address {
	a := r.addr
	a.Export = export
	return a
}

// scratch is a directory with a path short enough for sockets.
func scratch(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func dialTest(t testing.TB, a Address, o DialOptions) *Client {
	t.Helper()
	c, err := Dial(t.Context(), a, o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// patterned is a disk in memory with data, zeros and holes.
func patterned(t testing.TB, size int64) *disk.Mem {
	t.Helper()
	m := disk.NewMem(size)
	r := disktest.Rand(t)
	for off := int64(0); off < size; off += 200_000 {
		p := make([]byte, min(70_000, size-off))
		disktest.Fill(r, p)
		if err := m.WriteAt(t.Context(), p, off); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// pki is a certificate authority in a directory, as QEMU and libnbd want it:
// ca-cert.pem, and NAME-cert.pem, NAME-key.pem for server and client.
type pki struct {
	dir            string
	server, client *tls.Config
}

func makePKI(t testing.TB) pki {
	t.Helper()
	dir := scratch(t)
	check := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	write := func(name, kind string, der []byte) {
		check(os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	}
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(err)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	check(err)
	ca, err = x509.ParseCertificate(caDER)
	check(err)
	write("ca-cert.pem", "CERTIFICATE", caDER)
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	issue := func(name string, serial int64, use x509.ExtKeyUsage) tls.Certificate {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		check(err)
		c := &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
			NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{use},
			DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}
		der, err := x509.CreateCertificate(rand.Reader, c, ca, &key.PublicKey, caKey)
		check(err)
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		check(err)
		write(name+"-cert.pem", "CERTIFICATE", der)
		write(name+"-key.pem", "PRIVATE KEY", keyDER)
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	return pki{
		dir: dir,
		server: &tls.Config{
			Certificates: []tls.Certificate{issue("server", 2, x509.ExtKeyUsageServerAuth)},
			ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: pool,
		},
		client: &tls.Config{
			Certificates: []tls.Certificate{issue("client", 3, x509.ExtKeyUsageClientAuth)},
			RootCAs:      pool,
		},
	}
}

// TestConformance runs the suite of disks on our client against our server.
func TestConformance(t *testing.T) {
	keys := makePKI(t)
	for _, x := range []struct {
		name    string
		network string
		server  ServerOptions
		client  DialOptions
	}{
		{name: "unix", network: "unix"},
		{name: "tcp, several connections", network: "tcp", client: DialOptions{Conns: 3, InFlight: 4}},
		{name: "tls", network: "tcp", server: ServerOptions{TLS: keys.server, RequireTLS: true}, client: DialOptions{TLS: keys.client}},
		{name: "one request at a time", network: "unix", server: ServerOptions{InFlight: 1, MaxBytes: 1}},
	} {
		t.Run(x.name, func(t *testing.T) {
			disktest.Device(t, func(t *testing.T) disk.Device {
				r := serve(t, shelf{"d": patterned(t, 3<<20+777)}, x.server, x.network)
				return dialTest(t, r.at("d"), x.client)
			})
		})
	}
}

// TestHistory has a longer history and large requests.
func TestHistory(t *testing.T) {
	m := disk.NewMem(48 << 20)
	r := serve(t, shelf{"d": m}, ServerOptions{}, "unix")
	c := dialTest(t, r.at("d"), DialOptions{Conns: 2})
	defer c.Close()
	steps := 2000
	if testing.Short() {
		steps = 300
	}
	want := disktest.History(t, c, disktest.Rand(t), steps)
	disktest.Reader(t, m, want)
	p := make([]byte, 40<<20) // more than one request may carry
	disktest.Fill(disktest.Rand(t), p)
	if err := c.WriteAt(t.Context(), p, 3); err != nil {
		t.Fatal(err)
	}
	copy(want[3:], p)
	disktest.Reader(t, c, want)
	s := r.Stats()
	if s.Conns != 2 || s.Errors != 0 || s.WriteBytes < 40<<20 || s.ReadBytes < 48<<20 {
		t.Errorf("stats %+v", s)
	}
}

// TestReadOnly: writes fail before they are sent, and after.
func TestReadOnly(t *testing.T) {
	m := patterned(t, 1<<20)
	for name, x := range map[string]struct {
		d disk.Device
		o ServerOptions
	}{
		"disk": {d: disk.ReadOnly(m)}, "server": {d: m, o: ServerOptions{ReadOnly: true}},
	} {
		t.Run(name, func(t *testing.T) {
			r := serve(t, shelf{"d": x.d}, x.o, "unix")
			c := dialTest(t, r.at("d"), DialOptions{})
			defer c.Close()
			if !c.Info().ReadOnly {
				t.Error("not advertised as read-only")
			}
			force := c.links[0]
			for what, err := range map[string]error{
				"write": c.WriteAt(t.Context(), []byte{1}, 0), "zero": c.ZeroAt(t.Context(), 0, 1),
				"write sent":        force.do(t.Context(), &call{req: request{cmd: cmdWrite, n: 1}, out: []byte{1}}),
				"trim sent":         force.do(t.Context(), &call{req: request{cmd: cmdTrim, n: 1}}),
				"write zeroes sent": force.do(t.Context(), &call{req: request{cmd: cmdWriteZeroes, n: 1}}),
			} {
				if !isReadOnly(err) {
					t.Errorf("%s: %v", what, err)
				}
			}
			if err := c.Flush(t.Context()); err != nil {
				t.Errorf("flush: %v", err)
			}
			want := make([]byte, m.Size())
			if err := m.ReadAt(t.Context(), want, 0); err != nil {
				t.Fatal(err)
			}
			disktest.Reader(t, c, want)
		})
	}
}

func TestList(t *testing.T) {
	s := shelf{"b": disk.NewMem(5), "a": disk.ReadOnly(disk.NewMem(1 << 40)), "bad\x00name": disk.NewMem(1)}
	r := serve(t, s, ServerOptions{}, "tcp")
	got, err := List(t.Context(), r.addr, DialOptions{})
	if err != nil {
		t.Fatal(err)
	}
	text := ""
	for _, i := range got {
		text += fmt.Sprintln(i.Name, i.Size, i.ReadOnly, i.MultiConn, i.MinBlock, i.MaxPayload, i.Contexts)
	}
	want := "a 1099511627776 true true 1 33554432 [base:allocation]\nb 5 false true 1 33554432 [base:allocation]\n"
	if text != want {
		t.Errorf("got\n%swant\n%s", text, want)
	}
}

// TestDefaultExport: the empty name is the only export, where there is one.
func TestDefaultExport(t *testing.T) {
	one := serve(t, shelf{"d": disk.NewMem(512)}, ServerOptions{}, "unix")
	c := dialTest(t, one.at(""), DialOptions{})
	if c.Size() != 512 {
		t.Errorf("size %d", c.Size())
	}
	c.Close()
	two := serve(t, shelf{"d": disk.NewMem(512), "e": disk.NewMem(512)}, ServerOptions{}, "unix")
	for _, name := range []string{"", "x"} {
		if c, err := Dial(t.Context(), two.at(name), DialOptions{}); !isUnknown(err) {
			t.Errorf("dial %q: %v, %v", name, c, err)
		}
	}
}

func isReadOnly(err error) bool { return errors.Is(err, disk.ErrReadOnly) }
func isUnknown(err error) bool  { return errors.Is(err, ErrUnknownExport) }
