package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"holdfast/internal/hypervisor"
	"holdfast/internal/mover"
	"holdfast/internal/publish"
	"holdfast/internal/recovery"
	"holdfast/internal/repo"
)

// Unfinished is an error of work that another command continues.
type Unfinished struct {
	Err  error
	Next string // the command
}

func (e *Unfinished) Error() string { return e.Err.Error() }
func (e *Unfinished) Unwrap() error { return e.Err }

// deps are what recovery needs of the world.
func (n *Node) deps() (recovery.Deps, error) {
	st, err := n.State()
	if err != nil {
		return recovery.Deps{}, err
	}
	return recovery.Deps{
		State: st,
		Target: func(ctx context.Context, host string) (hypervisor.Target, error) {
			return n.target(ctx, host)
		},
		Pin: func(ctx context.Context, location, session string, point repo.PointID) error {
			return n.at(ctx, location, func(r *repo.Repo) error { return r.Pin(ctx, session, point) })
		},
		Unpin: func(ctx context.Context, location, session string) error {
			return n.at(ctx, location, func(r *repo.Repo) error { return r.Unpin(ctx, session) })
		},
		Listen: func(ctx context.Context, host, session string) ([]string, error) {
			return addresses(ctx, host, session, st.Path())
		},
		Serve:   n.startServing,
		Sockets: func(session string) error { return publish.RemoveSocketDir(session, st.Path()) },
		Report:  func(e recovery.Event) { n.o.Report.note("%s", e.Text) },
	}, nil
}

// at runs f with the repository at a location: usually the Node's own, but a
// session may run from another one.
func (n *Node) at(ctx context.Context, location string, f func(*repo.Repo) error) error {
	mine := n
	if here, err := n.Location(); err != nil || here != location {
		o := n.o
		o.Repo = location
		mine = &Node{o: o, passphrase: n.passphrase, state: n.state, keys: n.keys}
		defer mine.Close() // only read
	}
	r, err := mine.Repo(ctx)
	if err != nil {
		return err
	}
	n.passphrase = mine.passphrase
	return f(r)
}

// addresses says where a session's disks are served for a host: on a Unix
// socket for one on this machine, else on the address of this machine that the
// host sees.
func addresses(ctx context.Context, host, session, fallback string) ([]string, error) {
	remote, err := remoteOf(host)
	if err != nil {
		return nil, err
	}
	if remote == "" {
		return []string{"unix:" + publish.SocketPath(session, fallback)}, nil
	}
	// Nothing is sent: the kernel only looks up the way there.
	var d net.Dialer
	c, err := d.DialContext(ctx, "udp", net.JoinHostPort(remote, "9"))
	if err != nil {
		return nil, fmt.Errorf("find the way to host %s: %w", remote, err)
	}
	local, _, err := net.SplitHostPort(c.LocalAddr().String())
	if err = errors.Join(err, c.Close()); err != nil {
		return nil, err
	}
	return []string{"tcp:" + net.JoinHostPort(local, "0")}, nil
}

// remoteOf is the machine of a libvirt URI, "" for this one.
func remoteOf(host string) (string, error) {
	u, err := url.Parse(host)
	if err != nil {
		return "", usage("host %q: %w", host, err)
	}
	return u.Hostname(), nil
}

// onHost refuses a path that cannot be one on a host.
func onHost(storage string) error {
	if !path.IsAbs(storage) {
		return usage("--storage %q: give the absolute path of a directory on the host", storage)
	}
	return nil
}

// dataLimit bounds the time spent on finding out how much a recovery would
// copy: on huge disks it is not worth the operator's waiting.
const dataLimit = 200 * time.Millisecond

// RecoverRequest asks for a recovery.
type RecoverRequest struct {
	Host        string
	Storage     string
	Name        string
	NewIdentity bool
	Isolated    bool
	Wait        bool
	Writes      recovery.Writes
}

// Recover runs a restore point's VM on a host. It returns when the guest is
// started, or with Wait when its agent answers.
func (n *Node) Recover(ctx context.Context, p repo.Point, q RecoverRequest) (recovery.Record, error) {
	if err := runsVMs(q.Host); err != nil {
		return recovery.Record{}, err
	}
	if err := onHost(q.Storage); err != nil {
		return recovery.Record{}, err
	}
	r, err := n.Repo(ctx)
	if err != nil {
		return recovery.Record{}, err
	}
	location, err := n.Location()
	if err != nil {
		return recovery.Record{}, err
	}
	d, err := n.deps()
	if err != nil {
		return recovery.Record{}, err
	}
	config, err := n.config(ctx, p)
	if err != nil {
		return recovery.Record{}, err
	}
	return recovery.Recover(ctx, d, recovery.Request{
		Location: location, Repository: r.ID(), Point: p, Config: config,
		Data: func(ctx context.Context) int64 { return n.dataOf(ctx, p) },
		Host: q.Host, Storage: q.Storage, Name: q.Name, NewIdentity: q.NewIdentity || q.Name != "" && q.Name != p.VM,
		Writes: q.Writes, Isolated: q.Isolated, Wait: q.Wait,
	})
}

// config reads the whole configuration of a point.
func (n *Node) config(ctx context.Context, p repo.Point) (files []hypervisor.File, err error) {
	for _, f := range p.Files {
		data, err := n.repo.ReadFile(ctx, f)
		if err != nil {
			return nil, fmt.Errorf("configuration %s: %w", f.Name, err)
		}
		files = append(files, hypervisor.File{Name: f.Name, Data: data})
	}
	return files, nil
}

// dataOf is how many bytes of a point are not zeros; 0 when that takes too
// long to tell.
func (n *Node) dataOf(ctx context.Context, p repo.Point) int64 {
	ctx, cancel := context.WithTimeout(ctx, dataLimit)
	defer cancel()
	var sum int64
	for _, d := range p.Disks {
		data, err := n.dataBytes(ctx, d)
		if err != nil {
			return 0
		}
		sum += data
	}
	return sum
}

// Sessions lists the sessions of this machine.
func (n *Node) Sessions() ([]recovery.Info, error) {
	st, err := n.State()
	if err != nil {
		return nil, err
	}
	return recovery.List(st)
}

// Session looks at one session, by its id or the beginning of it.
func (n *Node) Session(id string) (recovery.Info, error) {
	st, err := n.State()
	if err != nil {
		return recovery.Info{}, err
	}
	return recovery.Get(st, id)
}

// Resume brings every dead session back to life.
func (n *Node) Resume(ctx context.Context) ([]recovery.Resumed, error) {
	d, err := n.deps()
	if err != nil {
		return nil, err
	}
	done, err := recovery.Resume(ctx, d)
	for i, r := range done {
		if info, lookErr := n.Session(r.Session); r.VM == "" && lookErr == nil {
			done[i].VM = info.VM // a publication has no VM of its own
		}
	}
	return done, err
}

// Migrate moves a session's VM to production storage.
func (n *Node) Migrate(ctx context.Context, session, storage string) (recovery.Record, error) {
	if storage != "" {
		if err := onHost(storage); err != nil {
			return recovery.Record{}, err
		}
	}
	d, err := n.deps()
	if err != nil {
		return recovery.Record{}, err
	}
	i, err := n.Session(session)
	if err != nil {
		return recovery.Record{}, err
	}
	m := &mover.Meter{}
	end := n.o.Report.task("migrate "+i.Name, m)
	defer end()
	r, err := recovery.Migrate(ctx, d, i.ID, storage, m.Set)
	if err != nil && ctx.Err() != nil {
		err = &Unfinished{err, "holdfast migrate " + i.ID}
	}
	return r, err
}

// Undo removes a session with all that was made for it.
func (n *Node) Undo(ctx context.Context, session string) (recovery.Record, error) {
	d, err := n.deps()
	if err != nil {
		return recovery.Record{}, err
	}
	r, err := recovery.Undo(ctx, d, session)
	if err != nil && ctx.Err() != nil {
		err = &Unfinished{err, "holdfast undo " + session}
	}
	return r, err
}

// UndoPlan says what Undo would remove.
func UndoPlan(i recovery.Info) []string {
	var plan []string
	if i.Kind == recovery.Recovery {
		plan = append(plan, fmt.Sprintf("VM %s on %s, stopped first", i.Name, i.Host))
		for _, d := range i.Disks {
			for _, f := range d.Files {
				plan = append(plan, "file "+f)
			}
		}
		if i.NVRAM != "" {
			plan = append(plan, "file "+i.NVRAM)
		}
		if i.Writes == recovery.ServerOverlay {
			plan = append(plan, "what the guest has written since")
		}
	}
	for _, addr := range i.Publication.Listen {
		plan = append(plan, "publication at "+addr)
	}
	return append(plan, "pin of restore point "+string(i.Point))
}

// Discard removes a session whose record cannot be read.
func (n *Node) Discard(session string) error {
	st, err := n.State()
	if err != nil {
		return err
	}
	return recovery.Discard(st, session)
}

// Forget removes the record of a session that is done.
func (n *Node) Forget(session string) error {
	d, err := n.deps()
	if err != nil {
		return err
	}
	return recovery.Forget(d, session)
}

// PublishRequest asks for disks to be served.
type PublishRequest struct {
	Disk    string // "": all
	Listen  string // "unix:PATH", or a TCP address
	Overlay string // directory for writes; "": read-only
	// TLSCert and TLSKey are files in PEM form; with them clients must use TLS.
	TLSCert, TLSKey string
}

// listenAddress turns an address as the operator gives it into one of
// publish.Spec.
func listenAddress(s string) (string, error) {
	if file, ok := strings.CutPrefix(s, "unix:"); ok {
		if file == "" {
			return "", usage("--nbd unix:PATH needs a path")
		}
		abs, err := filepath.Abs(file)
		if err != nil {
			return "", err
		}
		if fi, err := os.Stat(filepath.Dir(abs)); err != nil {
			return "", fmt.Errorf("--nbd: %w", err)
		} else if !fi.IsDir() {
			return "", fmt.Errorf("--nbd: %s is not a directory", filepath.Dir(abs))
		}
		return "unix:" + abs, nil
	}
	s, _ = strings.CutPrefix(s, "tcp:")
	if s == "" {
		return "", usage("--nbd needs unix:PATH or an address (HOST:PORT, HOST, :PORT)")
	}
	return "tcp:" + s, nil
}

// secured is the TLS of a publication, nil for none. The files are read now so
// that a mistake is told now.
func secured(q PublishRequest) (*publish.TLS, error) {
	if q.TLSCert == "" && q.TLSKey == "" {
		return nil, nil
	}
	cert, certErr := filepath.Abs(q.TLSCert)
	key, keyErr := filepath.Abs(q.TLSKey)
	if err := errors.Join(certErr, keyErr); err != nil {
		return nil, err
	}
	t := &publish.TLS{Cert: cert, Key: key}
	_, err := tlsConfig(t)
	return t, err
}

func (n *Node) newPublication(ctx context.Context, p repo.Point, q PublishRequest) (recovery.Deps, recovery.Record, error) {
	var d recovery.Deps
	listen, err := listenAddress(q.Listen)
	if err != nil {
		return d, recovery.Record{}, err
	}
	if q.Overlay != "" {
		if q.Overlay, err = filepath.Abs(q.Overlay); err != nil {
			return d, recovery.Record{}, err
		}
	}
	if _, err := chooseDisks(p, q.Disk); err != nil {
		return d, recovery.Record{}, err
	}
	secure, err := secured(q)
	if err != nil {
		return d, recovery.Record{}, err
	}
	r, err := n.Repo(ctx)
	if err != nil {
		return d, recovery.Record{}, err
	}
	location, err := n.Location()
	if err != nil {
		return d, recovery.Record{}, err
	}
	if d, err = n.deps(); err != nil {
		return d, recovery.Record{}, err
	}
	rec, err := recovery.NewPublication(d, recovery.PublicationRequest{
		Location: location, Repository: r.ID(), Point: p, Disk: q.Disk, Listen: []string{listen}, Overlay: q.Overlay, TLS: secure,
	})
	return d, rec, err
}

// Publish serves a restore point's disks until ctx is done, and removes the
// session. ready is called when clients can connect.
func (n *Node) Publish(ctx context.Context, p repo.Point, q PublishRequest, ready func(session string, uris []string) error) error {
	d, rec, err := n.newPublication(ctx, p, q)
	if err != nil {
		return err
	}
	serveErr := recovery.Serve(ctx, d.State, rec.ID, n.publishing(false, func(err error) { n.o.Report.note("%v", err) }), func(r publish.Ready) error {
		return ready(rec.ID, urisOf(rec, r))
	})
	// The session goes, whatever ended the serving.
	uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
	defer cancel()
	_, err = recovery.Undo(uctx, d, rec.ID)
	return errors.Join(serveErr, err)
}

// PublishDetached serves a restore point's disks in a process of its own.
func (n *Node) PublishDetached(ctx context.Context, p repo.Point, q PublishRequest) (session string, uris []string, err error) {
	d, rec, err := n.newPublication(ctx, p, q)
	if err != nil {
		return "", nil, err
	}
	ready, err := n.startServing(ctx, rec.ID)
	if err != nil {
		uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoLimit)
		defer cancel()
		_, uerr := recovery.Undo(uctx, d, rec.ID)
		return "", nil, errors.Join(err, uerr)
	}
	return rec.ID, urisOf(rec, ready), nil
}

// urisOf lists where the disks are served, in the order of the disks.
func urisOf(rec recovery.Record, r publish.Ready) []string {
	var uris []string
	for _, d := range rec.Publication.Disks {
		uris = append(uris, r.URIs[d.Name])
	}
	return uris
}
