package libvirt

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/digitalocean/go-libvirt/socket/dialers"
)

// dialLimit bounds the making of one connection.
const dialLimit = 20 * time.Second

// address is where a libvirt URI leads.
type address struct {
	transport string // "unix", "tcp", "tls", "ssh"
	host      string // without port; "" for unix
	port      string // "" for the default
	user      string
	socket    string // path of the daemon's socket, for unix and ssh
	path      string // "/system" or "/session"
	keyfile   string // for ssh
	pki       string // directory of certificates, for tls
	noVerify  bool
}

// parseAddress follows libvirt's "Connection URIs" and "Remote support"
// documents for the QEMU driver.
func parseAddress(u *url.URL) (address, error) {
	driver, transport, _ := strings.Cut(u.Scheme, "+")
	if driver != "qemu" {
		return address{}, fmt.Errorf("libvirt URI %s: only the qemu driver is supported", u.Redacted())
	}
	q := u.Query()
	a := address{
		transport: transport, host: u.Hostname(), port: u.Port(), user: u.User.Username(), path: u.Path,
		socket: q.Get("socket"), keyfile: q.Get("keyfile"), pki: q.Get("pkipath"), noVerify: q.Get("no_verify") == "1",
	}
	switch {
	case transport == "" && a.host == "":
		a.transport = "unix"
	case transport == "":
		a.transport = "tls"
	case transport == "unix" && a.host != "":
		return a, fmt.Errorf("libvirt URI %s: the unix transport takes no host", u.Redacted())
	case transport != "unix" && a.host == "":
		return a, fmt.Errorf("libvirt URI %s: host missing", u.Redacted())
	}
	switch a.transport {
	case "unix":
		if a.socket == "" {
			a.socket = a.defaultSocket()
		}
	case "ssh", "tcp", "tls":
	default:
		return a, fmt.Errorf("libvirt URI %s: transport %q is not supported (unix, tcp, tls, ssh are)", u.Redacted(), a.transport)
	}
	if a.path != "/system" && a.path != "/session" {
		return a, fmt.Errorf("libvirt URI %s: must end in /system or /session", u.Redacted())
	}
	if strings.HasPrefix(a.host, "-") || strings.HasPrefix(a.user, "-") {
		return a, fmt.Errorf("libvirt URI %s: host and user may not begin with a hyphen", u.Redacted())
	}
	return a, nil
}

// defaultSocket is where a daemon of this machine listens: libvirtd, or else
// the modular virtqemud.
func (a address) defaultSocket() string {
	dir := "/run/libvirt"
	if a.path == "/session" {
		run := os.Getenv("XDG_RUNTIME_DIR")
		if run == "" {
			if home, err := os.UserCacheDir(); err == nil {
				run = home
			}
		}
		dir = filepath.Join(run, "libvirt")
	}
	for _, n := range []string{"libvirt-sock", "virtqemud-sock"} {
		if _, err := os.Stat(filepath.Join(dir, n)); err == nil {
			return filepath.Join(dir, n)
		}
	}
	return dir + "/libvirt-sock"
}

func (a address) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	// Keep-alive probes find a dead host within half a minute or so.
	d := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 4}}
	switch a.transport {
	case "tcp":
		return d.DialContext(ctx, "tcp", net.JoinHostPort(a.host, orDefault(a.port, "16509")))
	case "tls":
		o := []dialers.TLSOption{dialers.UseTLSPort(orDefault(a.port, "16514"))}
		if a.pki != "" {
			o = append(o, dialers.UsePKIPath(a.pki))
		}
		if a.noVerify {
			o = append(o, dialers.WithInsecureNoVerify())
		}
		return dialers.NewTLS(a.host, o...).Dial()
	case "ssh":
		return a.ssh()
	default:
		c, err := d.DialContext(ctx, "unix", a.socket)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, os.ErrPermission) {
			return nil, fmt.Errorf("%w (is libvirtd running, and may this user use it?)", err)
		}
		return c, err
	}
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// sshArgs are the options with which the system's ssh is run, so that the
// operator's ssh configuration, agent and known hosts hold.
func (a address) sshArgs() []string {
	args := []string{"-T", "-e", "none", "-o", "BatchMode=yes"}
	if a.port != "" {
		args = append(args, "-p", a.port)
	}
	if a.user != "" {
		args = append(args, "-l", a.user)
	}
	if a.keyfile != "" {
		args = append(args, "-i", a.keyfile)
	}
	if a.noVerify {
		args = append(args, "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR")
	}
	return args
}

// ssh reaches the daemon by a process on the far side that connects its
// standard streams to the daemon's socket: libvirt's helper, or nc, as
// libvirt's own clients do.
func (a address) ssh() (net.Conn, error) {
	script := "exec nc -U " + shellQuote(orDefault(a.socket, "/run/libvirt/libvirt-sock"))
	if a.socket == "" {
		script = "if command -v virt-ssh-helper >/dev/null 2>&1; then exec virt-ssh-helper qemu://" + a.path + "; fi; " + script
	}
	return startPipe(exec.Command("ssh", append(a.sshArgs(), "--", a.host, "sh -c "+shellQuote(script))...))
}

func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// pipe is a connection over the standard streams of a process.
type pipe struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  io.ReadCloser
	once sync.Once
	err  error
}

func startPipe(cmd *exec.Cmd) (net.Conn, error) {
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = os.Stderr // ssh's own words are the best advice there is
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &pipe{cmd: cmd, in: in, out: out}, nil
}

func (p *pipe) Read(b []byte) (int, error)  { return p.out.Read(b) }
func (p *pipe) Write(b []byte) (int, error) { return p.in.Write(b) }

// Close ends the process. Its exit status is of no interest: it was killed.
func (p *pipe) Close() error {
	p.once.Do(func() {
		p.in.Close()
		p.err = p.cmd.Process.Kill()
		if errors.Is(p.err, os.ErrProcessDone) {
			p.err = nil
		}
		p.cmd.Wait()
	})
	return p.err
}

func (p *pipe) LocalAddr() net.Addr              { return &net.UnixAddr{Name: "ssh", Net: "unix"} }
func (p *pipe) RemoteAddr() net.Addr             { return &net.UnixAddr{Name: "ssh", Net: "unix"} }
func (p *pipe) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (p *pipe) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (p *pipe) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }

// maxMessage is the largest RPC message of libvirt, in bytes
// (VIR_NET_MESSAGE_MAX in virnetprotocol.x).
const maxMessage = 32 << 20

// wire stands between the RPC library and the connection. It remembers why
// the connection ended, and ends it when the far side sends a message whose
// length no libvirt would send: the library allocates what it is told to.
type wire struct {
	c net.Conn

	// Only the library's one reading goroutine uses these.
	left int64 // bytes left of the present message
	head []byte

	mu  sync.Mutex // guards err
	err error
}

func newWire(c net.Conn) *wire { return &wire{c: c} }

// Dial gives the library its one connection; there is no second.
func (w *wire) Dial() (net.Conn, error) { return w, w.lost() }

func (w *wire) lost() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

func (w *wire) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
}

func (w *wire) Read(p []byte) (int, error) {
	n, err := w.c.Read(p)
	if cerr := w.check(p[:n]); cerr != nil {
		n, err = 0, cerr
	}
	if err != nil {
		w.fail(err)
	}
	return n, err
}

// check follows the messages in p by their length words.
func (w *wire) check(p []byte) error {
	for len(p) > 0 {
		if w.left > 0 {
			k := min(w.left, int64(len(p)))
			w.left -= k
			p = p[k:]
			continue
		}
		k := min(4-len(w.head), len(p))
		w.head = append(w.head, p[:k]...)
		p = p[k:]
		if len(w.head) < 4 {
			return nil
		}
		n := int64(binary.BigEndian.Uint32(w.head))
		if n < 28 || n > maxMessage {
			return fmt.Errorf("libvirt sent a message of %d bytes", n)
		}
		w.head, w.left = w.head[:0], n-4
	}
	return nil
}

func (w *wire) Write(p []byte) (int, error) {
	n, err := w.c.Write(p)
	if err != nil {
		w.fail(err)
	}
	return n, err
}

func (w *wire) Close() error {
	w.fail(net.ErrClosed)
	err := w.c.Close()
	if errors.Is(err, net.ErrClosed) {
		return nil // the library closes it too
	}
	return err
}

func (w *wire) LocalAddr() net.Addr                { return w.c.LocalAddr() }
func (w *wire) RemoteAddr() net.Addr               { return w.c.RemoteAddr() }
func (w *wire) SetDeadline(t time.Time) error      { return w.c.SetDeadline(t) }
func (w *wire) SetReadDeadline(t time.Time) error  { return w.c.SetReadDeadline(t) }
func (w *wire) SetWriteDeadline(t time.Time) error { return w.c.SetWriteDeadline(t) }
