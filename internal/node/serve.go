package node

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"time"

	"holdfast/internal/blob/s3"
	"holdfast/internal/disk"
	"holdfast/internal/hypervisor/libvirt"
	"holdfast/internal/nbd"
	"holdfast/internal/publish"
	"holdfast/internal/recovery"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

// serveStart bounds how long a serving process may take until clients can
// connect.
const serveStart = 2 * time.Minute

// secret is what a serving process reads from its stdin. The key saves the time
// of deriving it from the passphrase once more. Keys are those of the environment
// for S3; what files and roles give, the process finds itself, so that it has new
// ones when they change.
type secret struct {
	Passphrase []byte   `json:"passphrase"`
	Key        []byte   `json:"key,omitempty"`
	Keys       *s3.Keys `json:"keys,omitempty"`
}

// said is the one line that a serving process says on its stdout.
type said struct {
	Ready *publish.Ready `json:"ready,omitempty"`
	Error string         `json:"error,omitempty"`
}

// startServing starts the process that serves a session and returns when
// clients can connect: recovery.Deps.Serve. The process outlives this one; it
// reads the secret from its stdin and writes its log into the session's
// directory.
func (n *Node) startServing(ctx context.Context, session string) (publish.Ready, error) {
	s, err := n.state.Session(session)
	if err != nil {
		return publish.Ready{}, err
	}
	if err := n.ask(ctx, false); err != nil {
		return publish.Ready{}, err
	}
	keys := secret{Passphrase: n.passphrase, Keys: n.keys}
	if keys.Keys == nil {
		keys.Keys = s3.KeysFrom(os.Getenv)
	}
	if n.repo != nil {
		keys.Key = n.repo.Key()
	}
	input, err := json.Marshal(keys)
	if err != nil {
		return publish.Ready{}, err
	}
	log, err := os.OpenFile(s.Path("log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return publish.Ready{}, err
	}
	defer log.Close() // the process has its own
	exe, err := os.Executable()
	if err != nil {
		return publish.Ready{}, err
	}
	cmd := exec.Command(exe, "serve", s.ID())
	cmd.SysProcAttr = detached()
	cmd.Dir = n.state.Path()
	cmd.Env = append(withoutSecrets(os.Environ()), state.Env+"="+n.state.Path())
	cmd.Stdin = bytes.NewReader(input)
	cmd.Stderr = log
	out, err := cmd.StdoutPipe()
	if err != nil {
		return publish.Ready{}, err
	}
	if err := cmd.Start(); err != nil {
		return publish.Ready{}, err
	}
	answer := make(chan said, 1)
	go func() {
		var a said
		if err := json.NewDecoder(io.LimitReader(out, 1<<20)).Decode(&a); err != nil {
			a.Error = fmt.Sprintf("its process ended without a word (%v); see %s", err, s.Path("log"))
		}
		answer <- a
	}()
	ctx, cancel := context.WithTimeoutCause(ctx, serveStart, fmt.Errorf("its process was not ready within %s; see %s", serveStart, s.Path("log")))
	defer cancel()
	select {
	case a := <-answer:
		if a.Ready == nil {
			_ = cmd.Wait() // it has said why
			return publish.Ready{}, errors.New(a.Error)
		}
		return *a.Ready, errors.Join(out.Close(), cmd.Process.Release())
	case <-ctx.Done():
		return publish.Ready{}, errors.Join(context.Cause(ctx), cmd.Process.Kill(), cmd.Wait())
	}
}

// Serve is the serving process: it reads a secret from in, says on out
// when clients can connect, or why they cannot, and serves until ctx is done.
func (n *Node) Serve(ctx context.Context, session string, in io.Reader, out io.WriteCloser, log *slog.Logger) error {
	log = log.With("session", session, "pid", os.Getpid())
	log.Info("begin to serve")
	err := n.serve(ctx, session, in, out, log)
	if err != nil {
		log.Error("serving ended", "error", err)
		// Nobody may listen any more: the log has it.
		_ = json.NewEncoder(out).Encode(said{Error: strings.ReplaceAll(err.Error(), "\n", "; ")})
		return err
	}
	log.Info("serving ended")
	return nil
}

func (n *Node) serve(ctx context.Context, session string, in io.Reader, out io.WriteCloser, log *slog.Logger) error {
	var keys secret
	if err := json.NewDecoder(io.LimitReader(in, 1<<20)).Decode(&keys); err != nil {
		return fmt.Errorf("read the passphrase: %w", err)
	}
	n.passphrase, n.key, n.keys = keys.Passphrase, keys.Key, keys.Keys
	st, err := n.State()
	if err != nil {
		return err
	}
	report := func(err error) { log.Warn("trouble", "error", err) }
	return recovery.Serve(ctx, st, session, n.publishing(true, report), func(r publish.Ready) error {
		log.Info("ready", "listen", r.Listen)
		// Whoever started this process goes on without it.
		if err := json.NewEncoder(out).Encode(said{Ready: &r}); err != nil {
			log.Warn("nobody waits for this process to be ready", "error", err)
		}
		return out.Close()
	})
}

// servedBytes bounds the payload of requests under way, in a process whose memory
// is to go to the cache.
const servedBytes = 64 << 20

// publishing says what the serving of a session needs of the world. resumable:
// another process takes this one's place when it ends.
func (n *Node) publishing(resumable bool, report func(error)) func(context.Context, recovery.Record) (publish.Deps, error) {
	return func(ctx context.Context, rec recovery.Record) (publish.Deps, error) {
		n.o.Repo = rec.Location
		r, err := n.Repo(ctx)
		if err != nil {
			return publish.Deps{}, err
		}
		o := nbd.ServerOptions{Resumable: resumable, Report: report, MaxBytes: servedBytes}
		if o.Allow, err = allowed(ctx, rec.Host); err != nil {
			return publish.Deps{}, err
		}
		if t := rec.Publication.TLS; t != nil {
			if o.TLS, err = tlsConfig(t); err != nil {
				return publish.Deps{}, err
			}
			o.RequireTLS = true
		}
		return publish.Deps{
			Pin: func(ctx context.Context) error { return r.Pin(ctx, rec.ID, rec.Point) },
			Open: func(ctx context.Context, d publish.Disk) (disk.Reader, error) {
				return r.OpenDisk(ctx, repo.Disk{ID: d.Name, Size: d.Size, Root: repo.Root(d.Root)})
			},
			Listen: func(ctx context.Context, addr string) (net.Listener, error) { return listen(ctx, addr, rec.Kind) },
			Serve: func(ctx context.Context, e disk.Exports, l net.Listener) error {
				return nbd.NewServer(e, o).Serve(ctx, l)
			},
			Permanent: func(err error) bool {
				return errors.Is(err, repo.ErrDamaged) || errors.Is(err, repo.ErrVersion)
			},
			Report: report,
		}, nil
	}
}

// tlsConfig reads a server's certificate and key.
func tlsConfig(t *publish.TLS) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, fmt.Errorf("read the certificate: %w", err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}}, nil
}

// listen opens an address of publish.Spec. A socket for a guest belongs to the
// user that QEMU runs as.
func listen(ctx context.Context, addr string, kind recovery.Kind) (net.Listener, error) {
	path, ok := strings.CutPrefix(addr, "unix:")
	if !ok {
		return nbd.ListenTCP(ctx, strings.TrimPrefix(addr, "tcp:"))
	}
	var o nbd.SocketOptions
	if uid, gid, ok := libvirt.QEMUUser(); ok && kind == recovery.Recovery && os.Geteuid() == 0 {
		o = nbd.SocketOptions{Chown: true, UID: uid, GID: gid}
	}
	return nbd.ListenUnix(ctx, path, o)
}

// allowed are the addresses of a remote host, which alone may connect; nobody
// is kept out when there is none.
func allowed(ctx context.Context, host string) ([]netip.Prefix, error) {
	if host == "" {
		return nil, nil
	}
	remote, err := remoteOf(host)
	if err != nil || remote == "" {
		return nil, err
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", remote)
	if err != nil {
		return nil, fmt.Errorf("look up host %s: %w", remote, err)
	}
	var list []netip.Prefix
	for _, a := range addrs {
		a = a.Unmap()
		list = append(list, netip.PrefixFrom(a, a.BitLen()))
	}
	return list, nil
}
