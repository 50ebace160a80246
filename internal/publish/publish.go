// Package publish serves a restore point's disks for as long as something runs
// from them: read-only, or each with an overlay that takes the writes.
//
//	repository disk ─ patient ─ [overlay] ─ exports ─ protocol ─ guest
//
// One process serves one publication, and does nothing else, so that it has
// little reason to die. When it dies nevertheless, or the machine does, the
// same Spec is served again by another process, under the same addresses and
// over the same overlays; a client that connects again finds every flush that
// was answered.
//
// The restore point is pinned before it is read for the first time. What a
// client asks for while the repository does not answer waits: the guest stalls
// and goes on. Only damaged data, and a repository that stays away for longer
// than Patience, is answered with an error.
//
// Protocols, repository and listeners come in as functions.
package publish

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/disk"
	"holdfast/internal/overlay"
)

// Patience is how long a read waits for a repository that does not answer.
const Patience = 10 * time.Minute

// Spec says what is published and where. It lies in the session's record.
type Spec struct {
	// Disks are the exports, named as the disks of the restore point.
	Disks []Disk `json:"disks"`
	// Listen are addresses: "unix:/path" or "tcp:host:port". A TCP port of 0 is
	// replaced in Ready.Listen by the one that was got, which has to be asked
	// for by the next process.
	Listen []string `json:"listen"`
	// Overlay is the directory of the overlays; "" serves read-only.
	Overlay string `json:"overlay,omitempty"`
	// TLS lets clients in by TLS only; nil serves in clear.
	TLS *TLS `json:"tls,omitempty"`
}

// TLS names a server's certificate and its key: files in PEM form.
type TLS struct {
	Cert string `json:"cert"`
	Key  string `json:"key"`
}

// URI is where a client finds an export at an address of Listen.
func (s Spec) URI(addr, name string) string {
	uri := URI(addr, name)
	if s.TLS != nil {
		uri = "nbds" + strings.TrimPrefix(uri, "nbd")
	}
	return uri
}

// Disk is one export.
type Disk struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes
	// Root is the disk's map in the repository, so that it can be opened also
	// when its point is not listed any more; opaque here.
	Root string `json:"root"`
	// Identity names the content for good: an overlay is never opened over
	// another one.
	Identity string `json:"identity"`
}

// Deps are what Serve needs of the world.
type Deps struct {
	// Pin keeps the restore point until the session ends. It is idempotent.
	Pin func(ctx context.Context) error
	// Open opens a disk of the restore point.
	Open func(ctx context.Context, d Disk) (disk.Reader, error)
	// Listen listens on one address of Spec.Listen.
	Listen func(ctx context.Context, addr string) (net.Listener, error)
	// Serve serves the exports on l until ctx is done, and closes l.
	Serve func(ctx context.Context, exports disk.Exports, l net.Listener) error
	// Permanent says that reading again is of no use: the data is damaged.
	Permanent func(error) bool
	// Ready is called once, when clients can connect.
	Ready func(Ready) error
	// FirstRead is called once, when a client has read something.
	FirstRead func(time.Time)
	// Report hears of trouble that is being waited out, and of its end. It
	// must not block.
	Report func(error)
}

// Ready says where the exports are.
type Ready struct {
	Listen []string          `json:"listen"` // as in Spec, with real ports
	URIs   map[string]string `json:"uris"`   // by export, at the first address
}

// Serve publishes until ctx is done; then, or when a listener fails, it ends
// in order: requests under way are answered, overlays flushed and closed. It
// returns nil when ctx ended it.
func Serve(ctx context.Context, s Spec, d Deps) (err error) {
	if len(s.Disks) == 0 || len(s.Listen) == 0 {
		return errors.New("publish: nothing to serve, or nowhere")
	}
	if err := d.Pin(ctx); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	p := &publication{disks: make(map[string]disk.Device), deps: d}
	defer func() {
		if cerr := p.close(); err == nil && cerr != nil {
			err = fmt.Errorf("publish: %w", cerr)
		}
	}()
	for _, e := range s.Disks {
		if err := p.open(ctx, s, e); err != nil {
			return fmt.Errorf("publish disk %s: %w", e.Name, err)
		}
	}
	listeners, ready, err := listen(ctx, s, d)
	if err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		g.Go(func() error {
			err := d.Serve(gctx, p, l)
			if err == nil && gctx.Err() == nil {
				err = errors.New("the server ended by itself")
			}
			return err
		})
	}
	if d.Ready != nil {
		g.Go(func() error { return d.Ready(ready) })
	}
	if err := g.Wait(); err != nil && ctx.Err() == nil {
		return fmt.Errorf("publish: %w", err)
	}
	return nil
}

// listen opens all listeners, or none.
func listen(ctx context.Context, s Spec, d Deps) ([]net.Listener, Ready, error) {
	var ls []net.Listener
	r := Ready{URIs: make(map[string]string)}
	for i, addr := range s.Listen {
		if path, ok := strings.CutPrefix(addr, "unix:"); ok {
			if err := socketDir(path); err != nil {
				return nil, r, errors.Join(err, closeAll(ls))
			}
		}
		l, err := d.Listen(ctx, addr)
		if err != nil {
			return nil, r, errors.Join(err, closeAll(ls))
		}
		ls = append(ls, l)
		if strings.HasPrefix(addr, "tcp:") {
			addr = actual(addr, l.Addr())
		}
		r.Listen = append(r.Listen, addr)
		for _, e := range s.Disks {
			if i == 0 {
				r.URIs[e.Name] = s.URI(addr, e.Name)
			}
		}
	}
	return ls, r, nil
}

func closeAll(ls []net.Listener) error {
	var err error
	for _, l := range ls {
		err = errors.Join(err, l.Close())
	}
	return err
}

// actual puts the port that was got in the place of one of 0.
func actual(addr string, got net.Addr) string {
	host, port, err := net.SplitHostPort(strings.TrimPrefix(addr, "tcp:"))
	_, gotPort, gerr := net.SplitHostPort(got.String())
	if err != nil || gerr != nil || port != "0" {
		return addr
	}
	return "tcp:" + net.JoinHostPort(host, gotPort)
}

// socketDir makes the directory of a Unix socket when it is missing: /run is
// empty after a restart of the machine. Others may pass through it and not
// list it; the socket itself says who may connect.
func socketDir(socket string) error {
	dir := filepath.Dir(socket)
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return err
	}
	return nil
}

// URI is the NBD URI of an export at an address of Spec.Listen (the NBD
// project's document uri.md).
func URI(addr, name string) string {
	u := url.URL{Scheme: "nbd", Path: "/" + name}
	if path, ok := strings.CutPrefix(addr, "unix:"); ok {
		// Spelled as QEMU and libvirt do, with the slashes as they are.
		u.Scheme = "nbd+unix"
		u.RawQuery = "socket=" + strings.NewReplacer("%2F", "/", "+", "%20").Replace(url.QueryEscape(path))
		return u.String()
	}
	host, port, err := net.SplitHostPort(strings.TrimPrefix(addr, "tcp:"))
	if err != nil {
		host, port = strings.TrimPrefix(addr, "tcp:"), ""
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "localhost"
	}
	u.Host = host
	if port != "" {
		u.Host = net.JoinHostPort(host, port)
	}
	return u.String()
}

// publication is the disks while they are served: disk.Exports.
type publication struct {
	names []string
	disks map[string]disk.Device
	deps  Deps
	first sync.Once
	read  atomic.Bool // first is over: spares the Once on every read
}

// open opens one disk, under its overlay if there shall be one.
func (p *publication) open(ctx context.Context, s Spec, e Disk) (err error) {
	if p.disks[e.Name] != nil {
		return errors.New("it is named twice")
	}
	base, err := p.deps.Open(ctx, e)
	if err != nil {
		return err
	}
	var r disk.Reader = &patient{inner: base, permanent: p.deps.Permanent, report: p.deps.Report, limit: Patience}
	dev := disk.ReadOnly(r)
	if s.Overlay != "" {
		if dev, err = openOverlay(filepath.Join(s.Overlay, e.Name), overlay.Identity(e.Identity), r); err != nil {
			return errors.Join(err, r.Close())
		}
	}
	p.names = append(p.names, e.Name)
	p.disks[e.Name] = dev
	return nil
}

// openOverlay opens a disk's overlay, or makes it when this is the first time.
func openOverlay(dir string, id overlay.Identity, base disk.Reader) (disk.Device, error) {
	o, err := overlay.Open(dir, id, base)
	if errors.Is(err, fs.ErrNotExist) {
		if err := overlay.Create(dir, id, base.Size()); err != nil {
			return nil, err
		}
		o, err = overlay.Open(dir, id, base)
	}
	if err != nil {
		return nil, err
	}
	return o, nil
}

func (p *publication) close() error {
	var err error
	for _, name := range p.names {
		d := p.disks[name]
		if ferr := d.Flush(context.Background()); ferr != nil && !errors.Is(ferr, disk.ErrReadOnly) {
			err = errors.Join(err, fmt.Errorf("flush %s: %w", name, ferr))
		}
		err = errors.Join(err, d.Close())
	}
	return err
}

// Names lists the exports.
func (p *publication) Names(context.Context) ([]string, error) { return p.names, nil }

// Open gives a client the disk, which outlives it.
func (p *publication) Open(_ context.Context, name string) (disk.Device, error) {
	d := p.disks[name]
	if d == nil {
		return nil, fmt.Errorf("disk %q: %w", name, fs.ErrNotExist)
	}
	return &handle{p, d}, nil
}

// noteRead tells of the first read.
func (p *publication) noteRead() {
	if p.read.Load() {
		return
	}
	p.first.Do(func() {
		if p.deps.FirstRead != nil {
			p.deps.FirstRead(time.Now())
		}
		p.read.Store(true)
	})
}

// handle is a client's disk.
type handle struct {
	p *publication
	d disk.Device
}

func (h *handle) Size() int64 { return h.d.Size() }

func (h *handle) ReadAt(ctx context.Context, b []byte, off int64) error {
	err := h.d.ReadAt(ctx, b, off)
	if err == nil {
		h.p.noteRead()
	}
	return err
}

func (h *handle) ReadCached(b []byte, off int64) bool {
	ok := disk.ReadCached(h.d, b, off)
	if ok {
		h.p.noteRead()
	}
	return ok
}

func (h *handle) Extents(ctx context.Context, off, n int64) disk.Extents {
	return h.d.Extents(ctx, off, n)
}
func (h *handle) WriteAt(ctx context.Context, b []byte, off int64) error {
	return h.d.WriteAt(ctx, b, off)
}
func (h *handle) ZeroAt(ctx context.Context, off, n int64) error { return h.d.ZeroAt(ctx, off, n) }
func (h *handle) Flush(ctx context.Context) error                { return h.d.Flush(ctx) }

// Close leaves the disk open: it belongs to the publication.
func (h *handle) Close() error { return nil }
