package recovery

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/hypervisor"
	"holdfast/internal/hypervisor/hypertest"
	"holdfast/internal/publish"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

// world is a host in memory, a repository that is a map, serving "processes"
// that are goroutines, and a clock of steps at which a command can be killed.
type world struct {
	*testing.T
	mem   *hypertest.Mem
	st    *state.Dir
	disks map[string]*disk.Mem
	model map[string][]byte // what a recovered guest should read
	point repo.Point

	mu      sync.Mutex // guards what follows
	pins    map[string]repo.PointID
	exports map[string]*listener // by address
	procs   map[string]*process  // by session
	sockets map[string]bool      // sessions with something outside of their directory
	fail    error                // what Pin, Unpin and Serve answer
	steps   []string
	killAt  int // step at which the command dies; < 0: never
}

type process struct {
	cancel context.CancelFunc
	done   chan error
}

const (
	store  = "/store"
	store2 = "/store2"
	size   = 4 * hypertest.PageSize
)

func newWorld(t *testing.T) *world {
	t.Helper()
	st, err := state.Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	w := &world{T: t, st: st, mem: hypertest.NewMem(), disks: map[string]*disk.Mem{}, model: map[string][]byte{},
		pins: map[string]repo.PointID{}, exports: map[string]*listener{}, procs: map[string]*process{},
		sockets: map[string]bool{}, killAt: -1}
	w.mem.Storage(store, 1<<30)
	w.mem.Storage(store2, 1<<30)
	w.mem.Serve(w.resolve)
	w.point = repo.Point{ID: "0123", History: "4567", VM: "web", Kind: hypertest.Kind}
	for i, name := range []string{"vda", "vdb"} {
		w.disks[name], w.model[name] = disk.NewMem(size), make([]byte, size)
		disktest.Fill(rand.New(rand.NewPCG(uint64(i), 5)), w.model[name])
		w.must(w.disks[name].WriteAt(t.Context(), w.model[name], 0))
		w.point.Disks = append(w.point.Disks, repo.Disk{ID: name, Size: size})
	}
	t.Cleanup(w.killServers)
	return w
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

// killed is what a step panics with: it unwinds the command, whose locks go as
// those of a killed process do, and nothing else is done.
type killed struct{}

// step counts a step of a command.
func (w *world) step(name string) {
	w.mu.Lock()
	w.steps = append(w.steps, name)
	die := len(w.steps)-1 == w.killAt
	w.mu.Unlock()
	if die {
		panic(killed{})
	}
}

// run runs a command that may be killed at a step, counted from here.
func (w *world) run(killAt int, f func() error) (died bool, err error) {
	w.mu.Lock()
	w.steps, w.killAt = nil, killAt
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		w.killAt = -1
		w.mu.Unlock()
		if p := recover(); p != nil {
			if _, ok := p.(killed); !ok {
				panic(p)
			}
			died = true
		}
	}()
	return false, f()
}

func (w *world) deps() Deps {
	return Deps{
		State: w.st,
		Target: func(context.Context, string) (hypervisor.Target, error) {
			return &stepped{w, w.mem.Connect()}, nil
		},
		Pin: func(_ context.Context, _, session string, p repo.PointID) error {
			w.step("pin")
			defer w.step("pinned")
			w.mu.Lock()
			defer w.mu.Unlock()
			w.pins[session] = p
			return w.fail
		},
		Unpin: func(_ context.Context, _, session string) error {
			w.step("unpin")
			defer w.step("unpinned")
			w.mu.Lock()
			defer w.mu.Unlock()
			delete(w.pins, session)
			return w.fail
		},
		Listen: func(_ context.Context, _, session string) ([]string, error) {
			return []string{"mem-" + session}, nil
		},
		Serve: func(ctx context.Context, session string) (publish.Ready, error) {
			w.step("serve")
			defer w.step("serving")
			return w.spawn(session)
		},
		Sockets: func(session string) error {
			w.step("sockets")
			w.mu.Lock()
			defer w.mu.Unlock()
			delete(w.sockets, session)
			return nil
		},
		signal: func(session string, _ int, _ bool) {
			w.step("signal")
			w.mu.Lock()
			p := w.procs[session]
			w.mu.Unlock()
			if p != nil {
				p.cancel()
			}
		},
	}
}

// spawn starts a serving "process".
func (w *world) spawn(session string) (publish.Ready, error) {
	ctx, cancel := context.WithCancel(context.Background())
	p := &process{cancel, make(chan error, 1)}
	ready := make(chan publish.Ready, 1)
	deps := func(context.Context, Record) (publish.Deps, error) { return w.publishing(session), nil }
	go func() {
		err := Serve(ctx, w.st, session, deps, func(r publish.Ready) error { ready <- r; return nil })
		p.done <- err
		close(p.done)
	}()
	w.mu.Lock()
	w.procs[session] = p
	w.mu.Unlock()
	select {
	case r := <-ready:
		return r, nil
	case err := <-p.done:
		return publish.Ready{}, fmt.Errorf("the serving process ended: %w", err)
	}
}

func (w *world) publishing(session string) publish.Deps {
	return publish.Deps{
		Pin: func(context.Context) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.pins[session] = w.point.ID
			return w.fail
		},
		Open: func(_ context.Context, d publish.Disk) (disk.Reader, error) {
			return kept{w.disks[d.Name]}, nil
		},
		Listen: func(_ context.Context, addr string) (net.Listener, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			l := &listener{w: w, addr: addr, serving: make(chan struct{})}
			w.exports[addr], w.sockets[session] = l, true
			return l, nil
		},
		Serve: func(ctx context.Context, e disk.Exports, nl net.Listener) error {
			l := nl.(*listener)
			l.exports = e
			close(l.serving)
			<-ctx.Done()
			return l.Close()
		},
		Permanent: func(error) bool { return true },
	}
}

// kept is a disk of the repository, which outlives its readers.
type kept struct{ r disk.Reader }

func (k kept) Size() int64 { return k.r.Size() }
func (k kept) ReadAt(ctx context.Context, p []byte, off int64) error {
	return k.r.ReadAt(ctx, p, off)
}
func (k kept) Extents(ctx context.Context, off, n int64) disk.Extents {
	return k.r.Extents(ctx, off, n)
}
func (k kept) Close() error { return nil }

// listener is an address that a host can reach; who connects before it is
// served waits.
type listener struct {
	net.Listener // none of its methods is called
	w            *world
	addr         string
	serving      chan struct{} // closed when exports is set
	exports      disk.Exports
}

func (l *listener) Close() error {
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	delete(l.w.exports, l.addr)
	return nil
}

// resolve is how the host reaches what is served: the address is the URI's
// host.
func (w *world) resolve(ctx context.Context, uri string) (disk.Device, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	l := w.exports[u.Host]
	w.mu.Unlock()
	if l == nil {
		return nil, errors.New("connection refused")
	}
	<-l.serving
	return l.exports.Open(ctx, u.Path[1:])
}

// killServers ends all serving processes.
func (w *world) killServers() {
	w.mu.Lock()
	procs := w.procs
	w.procs = map[string]*process{}
	w.mu.Unlock()
	for _, p := range procs {
		p.cancel()
		<-p.done
	}
}

func (w *world) request(writes Writes) Request {
	return Request{Location: "/repo", Repository: "89ab", Point: w.point, Host: "mem", Storage: store, Writes: writes, Wait: true, Data: func(context.Context) int64 { return size },
		Config: []hypervisor.File{{Name: "mem.conf"}, {Name: "nvram", Data: []byte("vars")}}}
}

// recover brings the VM up and lets its guest write on one disk.
func (w *world) recover(writes Writes) Record {
	w.Helper()
	r, err := Recover(w.Context(), w.deps(), w.request(writes))
	w.must(err)
	return r
}

// write is a guest's write.
func (w *world) write(r Record, name string, off int64, text string) {
	w.Helper()
	w.must(w.mem.Write(w.Context(), r.VMID, hypervisor.DiskID(name), []byte(text), off))
	copy(w.model[name][off:], text)
}

// checkGuest reads the guest's disks.
func (w *world) checkGuest(r Record) {
	w.Helper()
	for name, want := range w.model {
		got := make([]byte, size)
		if err := w.mem.Read(w.Context(), r.VMID, hypervisor.DiskID(name), got, 0); err != nil || !bytes.Equal(got, want) {
			w.Errorf("the guest reads other things on %s: %v", name, err)
		}
	}
}

// checkClean makes sure that nothing is left anywhere.
func (w *world) checkClean() {
	w.Helper()
	if left := w.mem.Things(); len(left) > 0 {
		w.Errorf("left on the host: %q", left)
	}
	if infos, err := List(w.st); err != nil || len(infos) > 0 {
		w.Errorf("sessions left: %+v, %v", infos, err)
	}
	w.checkUnpublished()
}

// checkUnpublished makes sure that nothing is served or pinned.
func (w *world) checkUnpublished() {
	w.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.pins) > 0 {
		w.Errorf("pins left: %v", w.pins)
	}
	if len(w.exports) > 0 {
		w.Errorf("still served: %v", w.exports)
	}
	if len(w.sockets) > 0 {
		w.Errorf("sockets left: %v", w.sockets)
	}
}

func (w *world) get(id string) Info {
	w.Helper()
	i, err := Get(w.st, id)
	w.must(err)
	return i
}

// resume resumes, and fails the test if a session could not be.
func (w *world) resume() []Resumed {
	w.Helper()
	rs, err := Resume(w.Context(), w.deps())
	w.must(err)
	for _, r := range rs {
		w.must(r.Err)
	}
	return rs
}

// only is the id of the one session there is; "" if there is none.
func (w *world) only() string {
	w.Helper()
	infos, err := List(w.st)
	w.must(err)
	switch len(infos) {
	case 0:
		return ""
	case 1:
		return infos[0].ID
	}
	w.Fatalf("%d sessions", len(infos))
	return ""
}

// stepped is a target with a step before and after each of its methods.
type stepped struct {
	w *world
	c *hypertest.Conn
}

func (s *stepped) Preflight(ctx context.Context, vm hypervisor.NewVM, storage string, need int64) ([]string, error) {
	s.w.step("preflight")
	return s.c.Preflight(ctx, vm, storage, need)
}

func (s *stepped) CreateDisk(ctx context.Context, storage, name string, d hypervisor.NewDisk) (hypervisor.NewDisk, hypervisor.WriteCloser, error) {
	s.w.step("create disk")
	defer s.w.step("disk created")
	return s.c.CreateDisk(ctx, storage, name, d)
}

func (s *stepped) RemoveDisk(ctx context.Context, path string) error {
	s.w.step("remove disk")
	defer s.w.step("disk removed")
	return s.c.RemoveDisk(ctx, path)
}

func (s *stepped) CreateVM(ctx context.Context, vm hypervisor.NewVM) (hypervisor.VMID, error) {
	s.w.step("create vm")
	defer s.w.step("vm created")
	return s.c.CreateVM(ctx, vm)
}

func (s *stepped) Find(ctx context.Context, session string) (hypervisor.VMID, error) {
	s.w.step("find")
	return s.c.Find(ctx, session)
}

func (s *stepped) Start(ctx context.Context, id hypervisor.VMID) error {
	s.w.step("start")
	defer s.w.step("started")
	return s.c.Start(ctx, id)
}

func (s *stepped) Stop(ctx context.Context, id hypervisor.VMID) error {
	s.w.step("stop")
	defer s.w.step("stopped")
	return s.c.Stop(ctx, id)
}

func (s *stepped) DeleteVM(ctx context.Context, id hypervisor.VMID) error {
	s.w.step("delete vm")
	defer s.w.step("vm deleted")
	return s.c.DeleteVM(ctx, id)
}

func (s *stepped) Health(ctx context.Context, id hypervisor.VMID) (hypervisor.Health, error) {
	s.w.step("health")
	return s.c.Health(ctx, id)
}

func (s *stepped) Unpause(ctx context.Context, id hypervisor.VMID) error {
	s.w.step("unpause")
	defer s.w.step("unpaused")
	return s.c.Unpause(ctx, id)
}

func (s *stepped) Migrate(ctx context.Context, id hypervisor.VMID, storage string, report hypervisor.Progress) error {
	s.w.step("migrate")
	defer s.w.step("migrated")
	return s.c.Migrate(ctx, id, storage, func(done, total int64) {
		s.w.step(fmt.Sprintf("copied %d of %d", done, total))
		if report != nil {
			report(done, total)
		}
	})
}

func (s *stepped) Network(ctx context.Context, id hypervisor.VMID) (string, error) {
	s.w.step("network")
	return s.c.Network(ctx, id)
}

func (s *stepped) Close() error { return s.c.Close() }

// until polls for what another goroutine does.
func (w *world) until(what string, f func() bool) {
	w.Helper()
	ctx, cancel := context.WithTimeout(w.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !f() {
		select {
		case <-ctx.Done():
			w.Fatalf("waited for a minute until %s", what)
		case <-tick.C:
		}
	}
}
