package hypertest

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
)

// PageSize is the granularity, in bytes, in which a Mem keeps disks and tracks
// changes. Disks are multiples of it.
const PageSize = 64 << 10

// Kind is what a Mem's VMs have in hypervisor.VM.Kind.
const Kind = "mem"

var (
	// ErrCrashed is what every call answers on a connection after its Crash.
	ErrCrashed = errors.New("the connection's process has crashed")
	// ErrStopped is what reading a snapshot answers when its guest stopped.
	ErrStopped = errors.New("the guest stopped during the backup")
	// ErrIO is what a guest gets when its storage does not answer.
	ErrIO = errors.New("i/o error")
)

// Mem is a hypervisor in memory: VMs with disks that a guest reads and writes,
// change tracking, snapshots, storage for recovered disks. It outlives the
// connections that Connect makes, as a real host outlives the processes that
// use it: what a crashed connection left (jobs, reference points, disks, VMs)
// stays until somebody cleans. All methods may run in parallel.
type Mem struct {
	mu  sync.Mutex // guards everything below
	vms map[hypervisor.VMID]*memVM
	// files are the disks in storage directories, by path.
	files map[string]*memFile
	// storage has the directories and the bytes free in each.
	storage map[string]int64
	nextID  int
	// resolve opens what a recovered VM reads from; see Serve.
	resolve func(ctx context.Context, uri string) (disk.Device, error)
	steps   []string
	hook    func(step string) error
}

type memVM struct {
	// io is held for reading by what the guest reads and writes, and for
	// writing while it is held still. It is taken before Mem.mu.
	io     sync.RWMutex
	id     hypervisor.VMID
	name   string
	state  hypervisor.State
	ioErr  bool
	config []hypervisor.File
	disks  []*memDisk
	// marks are reference points: for each, the disks it covers and what was
	// written since.
	marks map[hypervisor.ReferencePoint]map[hypervisor.DiskID]dirty
	job   *memSnapshot
	owner hypervisor.Owner // of a recovered VM
	agent bool
	link  bool // false: the guest has lost its connectivity
	nvram string
}

type dirty map[int64]bool // by page number

type memDisk struct {
	hypervisor.Disk
	memFile
	tracked  bool
	lies     bool
	lost     map[hypervisor.ReferencePoint]bool // marks whose tracking is lost
	path     string                             // in storage, for a recovered VM
	served   string                             // beneath, or in place of, the file
	straight bool                               // no file: guest's writes go to served
}

// memFile is sparse bytes. Pages are never changed, only replaced, so that a
// shallow copy is a snapshot.
type memFile struct {
	size  int64
	pages map[int64][]byte
}

// NewMem makes an empty host.
func NewMem() *Mem {
	return &Mem{
		vms: map[hypervisor.VMID]*memVM{}, files: map[string]*memFile{}, storage: map[string]int64{},
		resolve: func(context.Context, string) (disk.Device, error) {
			return nil, fmt.Errorf("%w: nothing is served (Mem.Serve)", ErrIO)
		},
	}
}

// AddVM makes a running VM without disks.
func (m *Mem) AddVM(name string) hypervisor.VMID {
	m.mu.Lock()
	defer m.mu.Unlock()
	vm := m.add(name)
	vm.state = hypervisor.Running
	vm.config = []hypervisor.File{{Name: "mem.conf", Data: []byte("name=" + name)}}
	return vm.id
}

func (m *Mem) add(name string) *memVM {
	m.nextID++
	vm := &memVM{
		id: hypervisor.VMID(fmt.Sprintf("vm-%d", m.nextID)), name: name, state: hypervisor.Stopped, agent: true, link: true,
		marks: map[hypervisor.ReferencePoint]map[hypervisor.DiskID]dirty{},
	}
	m.vms[vm.id] = vm
	return vm
}

// AddDisk attaches an empty disk of size bytes, rounded up to PageSize; tracked
// says whether its changes can be listed. It may be done during a backup.
func (m *Mem) AddDisk(id hypervisor.VMID, d hypervisor.DiskID, size int64, tracked bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	size = (size + PageSize - 1) / PageSize * PageSize
	format := "raw"
	if tracked {
		format = "qcow2"
	}
	vm := m.must(id)
	vm.disks = append(vm.disks, &memDisk{
		Disk:    hypervisor.Disk{ID: d, Size: size, Format: format, Path: "/mem/" + vm.name + "/" + string(d)},
		memFile: memFile{size: size, pages: map[int64][]byte{}}, tracked: tracked, lost: map[hypervisor.ReferencePoint]bool{},
	})
}

// Exclude marks a disk as one that is not backed up.
func (m *Mem) Exclude(id hypervisor.VMID, d hypervisor.DiskID, why string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.must(id).disk(d).Excluded = why
}

// must is for the tests' own mistakes.
func (m *Mem) must(id hypervisor.VMID) *memVM {
	vm := m.vms[id]
	if vm == nil {
		panic("hypertest: no VM " + string(id))
	}
	return vm
}

func (vm *memVM) disk(id hypervisor.DiskID) *memDisk {
	for _, d := range vm.disks {
		if d.ID == id {
			return d
		}
	}
	return nil
}

// Write writes as the guest does; served disks are reached through Serve. It
// returns ErrIO and pauses the guest when they do not answer.
func (m *Mem) Write(ctx context.Context, id hypervisor.VMID, dID hypervisor.DiskID, p []byte, off int64) error {
	defer m.moving(id)()
	m.mu.Lock()
	d := m.must(id).disk(dID)
	err := disk.CheckRange(d.size, off, int64(len(p)))
	served, straight := d.served, d.straight
	m.mu.Unlock()
	if err != nil {
		return err
	}
	if straight {
		return m.guestIO(ctx, id, served, func(dev disk.Device) error {
			return errors.Join(dev.WriteAt(ctx, p, off), dev.Flush(ctx))
		})
	}
	for len(p) > 0 {
		page := off / PageSize
		at := off % PageSize
		n := min(int64(len(p)), PageSize-at)
		buf := make([]byte, PageSize)
		if n < PageSize {
			if err := m.read(ctx, id, dID, buf[:min(PageSize, d.size-page*PageSize)], page*PageSize); err != nil {
				return err
			}
		}
		copy(buf[at:], p[:n])
		m.put(id, dID, page, buf)
		p, off = p[n:], off+n
	}
	return nil
}

// put replaces a page, as the guest: all marks hear of it.
func (m *Mem) put(id hypervisor.VMID, dID hypervisor.DiskID, page int64, buf []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	vm := m.must(id)
	vm.disk(dID).pages[page] = buf
	for _, mark := range vm.marks {
		if mark[dID] != nil {
			mark[dID][page] = true
		}
	}
}

// moving holds off what wants the guest held still, until the result is called.
func (m *Mem) moving(id hypervisor.VMID) (done func()) {
	m.mu.Lock()
	vm := m.must(id)
	m.mu.Unlock()
	vm.io.RLock()
	return vm.io.RUnlock
}

// Read reads as the guest does.
func (m *Mem) Read(ctx context.Context, id hypervisor.VMID, dID hypervisor.DiskID, p []byte, off int64) error {
	defer m.moving(id)()
	return m.read(ctx, id, dID, p, off)
}

func (m *Mem) read(ctx context.Context, id hypervisor.VMID, dID hypervisor.DiskID, p []byte, off int64) error {
	m.mu.Lock()
	d := m.must(id).disk(dID)
	size, served, pages := d.size, d.served, maps.Clone(d.pages)
	m.mu.Unlock()
	if err := disk.CheckRange(size, off, int64(len(p))); err != nil {
		return err
	}
	f := memFile{size: size, pages: pages}
	if served == "" {
		f.read(p, off)
		return nil
	}
	for len(p) > 0 {
		n := min(int64(len(p)), PageSize-off%PageSize)
		if _, local := pages[off/PageSize]; local {
			f.read(p[:n], off)
		} else if err := m.guestIO(ctx, id, served, func(dev disk.Device) error { return dev.ReadAt(ctx, p[:n], off) }); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// guestIO reaches a served disk for the guest; a failure pauses it.
func (m *Mem) guestIO(ctx context.Context, id hypervisor.VMID, uri string, f func(disk.Device) error) error {
	m.mu.Lock()
	resolve := m.resolve
	m.mu.Unlock()
	dev, err := resolve(ctx, uri)
	if err == nil {
		err = errors.Join(f(dev), dev.Close())
	}
	if err == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if vm := m.vms[id]; vm != nil && vm.state == hypervisor.Running {
		vm.state, vm.ioErr = hypervisor.Paused, true
	}
	return fmt.Errorf("%w: %w", ErrIO, err)
}

func (f *memFile) read(p []byte, off int64) {
	for len(p) > 0 {
		n := min(int64(len(p)), PageSize-off%PageSize)
		if page, ok := f.pages[off/PageSize]; ok {
			copy(p[:n], page[off%PageSize:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

// Serve tells how recovered VMs reach what is served under an NBD URI. The
// device is closed after each use.
func (m *Mem) Serve(resolve func(ctx context.Context, uri string) (disk.Device, error)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.resolve = resolve
}

// Storage makes a directory for recovered disks with that many bytes free.
func (m *Mem) Storage(dir string, free int64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.storage[dir] = free
}

// SetState turns a guest on or off as its operator would. A guest that is
// turned off in the middle of a backup ends the backup.
func (m *Mem) SetState(id hypervisor.VMID, s hypervisor.State) {
	m.mu.Lock()
	defer m.mu.Unlock()
	vm := m.must(id)
	if s == hypervisor.Stopped && vm.state != s && vm.job != nil {
		vm.job.dead = true
		vm.job = nil
	}
	vm.state, vm.ioErr = s, false
}

// SetAgent says whether a VM's guest agent answers.
func (m *Mem) SetAgent(id hypervisor.VMID, answers bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.must(id).agent = answers
}

// LoseLink takes a guest's connectivity, until Network bounces its link.
func (m *Mem) LoseLink(id hypervisor.VMID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.must(id).link = false
}

// LoseTracking makes the changes of a disk since all present reference points
// unknown, as a crash of the hypervisor does.
func (m *Mem) LoseTracking(id hypervisor.VMID, d hypervisor.DiskID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	vm := m.must(id)
	for ref := range vm.marks {
		vm.disk(d).lost[ref] = true
	}
}

// Lie makes a disk's change map leave out the changes.
func (m *Mem) Lie(id hypervisor.VMID, d hypervisor.DiskID, lies bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.must(id).disk(d).lies = lies
}

// Things lists everything on the host that anybody made there beside the
// original VMs: reference points, jobs, recovered VMs, files, NVRAM. Sorted.
func (m *Mem) Things() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []string
	for _, vm := range m.vms {
		for ref := range vm.marks {
			out = append(out, "reference "+vm.name+" "+string(ref))
		}
		if vm.job != nil {
			out = append(out, "job "+vm.name+" "+vm.job.name)
		}
		if vm.owner != (hypervisor.Owner{}) {
			out = append(out, "vm "+vm.name)
		}
		if vm.nvram != "" {
			out = append(out, "nvram "+vm.nvram)
		}
	}
	for p := range m.files {
		out = append(out, "file "+p)
	}
	slices.Sort(out)
	return out
}

// OnStep sets what is called before each step of every connection, with the
// step's name ("snapshot vm-1"). An error becomes the step's; the hook may
// crash a connection. It must not call the Mem, but for Steps.
func (m *Mem) OnStep(hook func(step string) error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hook = hook
}

// Steps lists the steps taken until now.
func (m *Mem) Steps() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.steps)
}

// Connect makes a connection, as one process does.
func (m *Mem) Connect() *Conn { return &Conn{m: m, crashAt: -1} }

// Conn is a process's connection to a Mem: a hypervisor.Source and a
// hypervisor.Target.
type Conn struct {
	m *Mem

	mu      sync.Mutex // guards what follows
	crashed bool
	crashAt int
	count   int
}

// CrashAt makes the connection's process die before its n-th step from now,
// counting from 0: that step and all later calls return ErrCrashed and change
// nothing.
func (c *Conn) CrashAt(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.crashAt, c.count = n, 0
}

// Crash makes the connection's process die now.
func (c *Conn) Crash() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.crashed = true
}

// Crashed reports whether the process has died.
func (c *Conn) Crashed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.crashed
}

// step is called before everything that changes or reads the host.
func (c *Conn) step(ctx context.Context, name string, args ...any) error {
	for _, a := range args {
		name += fmt.Sprintf(" %v", a)
	}
	c.mu.Lock()
	if c.crashAt >= 0 && c.count == c.crashAt {
		c.crashed = true
	}
	c.count++
	crashed := c.crashed
	c.mu.Unlock()
	if crashed {
		return fmt.Errorf("%s: %w", name, ErrCrashed)
	}
	c.m.mu.Lock()
	c.m.steps = append(c.m.steps, name)
	hook := c.m.hook
	c.m.mu.Unlock()
	if hook != nil {
		if err := hook(name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if c.Crashed() {
		return fmt.Errorf("%s: %w", name, ErrCrashed)
	}
	if err := context.Cause(ctx); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// vm finds a VM; c.m.mu is held.
func (c *Conn) vm(id hypervisor.VMID) (*memVM, error) {
	vm := c.m.vms[id]
	if vm == nil {
		return nil, fmt.Errorf("%w: %s", hypervisor.ErrNotExist, id)
	}
	return vm, nil
}

func (vm *memVM) describe() hypervisor.VM {
	out := hypervisor.VM{ID: vm.id, Name: vm.name, Kind: Kind, Host: "mem://", State: vm.state}
	for _, d := range vm.disks {
		out.Disks = append(out.Disks, d.Disk)
	}
	return out
}

// Close ends the connection; what it made on the host stays.
func (c *Conn) Close() error { return nil }

// owned takes the ids out of a name that Owner.Owned gave.
func owned(name string) (repository, session string, ok bool) {
	p := strings.Split(name, "-")
	if len(p) < 4 || p[0] != "holdfast" {
		return "", "", false
	}
	if _, err := hex.DecodeString(p[1]); err != nil {
		return "", "", false
	}
	return p[1], p[3], true
}

// RemoveDisk detaches a disk.
func (m *Mem) RemoveDisk(id hypervisor.VMID, d hypervisor.DiskID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	vm := m.must(id)
	vm.disks = slices.DeleteFunc(vm.disks, func(x *memDisk) bool { return x.ID == d })
}
