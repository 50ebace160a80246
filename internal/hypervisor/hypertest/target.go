package hypertest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
)

// Preflight checks the name and the storage.
func (c *Conn) Preflight(ctx context.Context, vm hypervisor.NewVM, storage string, need int64) ([]string, error) {
	if err := c.step(ctx, "preflight", vm.Name); err != nil {
		return nil, err
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if c.named(vm.Name) {
		return nil, fmt.Errorf("%w: VM %s", hypervisor.ErrExist, vm.Name)
	}
	free, ok := c.m.storage[storage]
	switch {
	case !ok:
		return nil, fmt.Errorf("storage %s does not exist", storage)
	case free < need:
		return nil, fmt.Errorf("storage %s has %d bytes free, %d are needed", storage, free, need)
	case vm.Kind != Kind:
		return []string{"configuration is of " + vm.Kind}, nil
	}
	return nil, nil
}

func (c *Conn) named(name string) bool {
	for _, vm := range c.m.vms {
		if vm.name == name {
			return true
		}
	}
	return false
}

// CreateDisk makes a file.
func (c *Conn) CreateDisk(ctx context.Context, storage, name string, d hypervisor.NewDisk) (hypervisor.NewDisk, hypervisor.WriteCloser, error) {
	p := hypervisor.DiskPath(storage, name, d.Format)
	if err := c.step(ctx, "create disk", p); err != nil {
		return d, nil, err
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if _, ok := c.m.storage[storage]; !ok {
		return d, nil, fmt.Errorf("storage %s does not exist", storage)
	}
	if c.m.files[p] != nil {
		return d, nil, fmt.Errorf("%w: %s", hypervisor.ErrExist, p)
	}
	f := &memFile{d.Size, map[int64][]byte{}}
	c.m.files[p] = f
	d.Path = p
	if d.Format == "" {
		d.Format = "qcow2"
	}
	if d.Served != "" {
		return d, nil, nil
	}
	return d, &memWriter{c, p, f}, nil
}

// memWriter fills a file.
type memWriter struct {
	c    *Conn
	path string
	f    *memFile
}

func (w *memWriter) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := w.c.step(ctx, "write", w.path); err != nil {
		return err
	}
	if err := disk.CheckRange(w.f.size, off, int64(len(p))); err != nil {
		return err
	}
	w.c.m.mu.Lock()
	defer w.c.m.mu.Unlock()
	for len(p) > 0 {
		at := off % PageSize
		n := min(int64(len(p)), PageSize-at)
		buf := make([]byte, PageSize)
		copy(buf, w.f.pages[off/PageSize])
		copy(buf[at:], p[:n])
		w.f.pages[off/PageSize] = buf
		p, off = p[n:], off+n
	}
	return nil
}

func (w *memWriter) ZeroAt(ctx context.Context, off, n int64) error {
	for n > 0 {
		k := min(n, PageSize-off%PageSize)
		if err := w.WriteAt(ctx, make([]byte, k), off); err != nil {
			return err
		}
		w.c.m.mu.Lock()
		if k == PageSize {
			delete(w.f.pages, off/PageSize)
		}
		w.c.m.mu.Unlock()
		off, n = off+k, n-k
	}
	return nil
}

func (w *memWriter) Flush(ctx context.Context) error { return w.c.step(ctx, "flush", w.path) }
func (w *memWriter) Close() error                    { return w.c.step(context.Background(), "close disk", w.path) }

// RemoveDisk removes a file.
func (c *Conn) RemoveDisk(ctx context.Context, p string) error {
	if err := c.step(ctx, "remove disk", p); err != nil {
		return err
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	for _, vm := range c.m.vms {
		for _, d := range vm.disks {
			if d.path == p && vm.state != hypervisor.Stopped {
				return fmt.Errorf("disk %s is in use by %s", p, vm.name)
			}
		}
	}
	delete(c.m.files, p)
	return nil
}

// CreateVM defines a VM, stopped.
func (c *Conn) CreateVM(ctx context.Context, n hypervisor.NewVM) (hypervisor.VMID, error) {
	if err := c.step(ctx, "create vm", n.Name); err != nil {
		return "", err
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if c.named(n.Name) {
		return "", fmt.Errorf("%w: VM %s", hypervisor.ErrExist, n.Name)
	}
	if len(n.Config) == 0 {
		return "", errors.New("no configuration")
	}
	var disks []*memDisk
	for _, d := range n.Disks {
		md := &memDisk{Disk: hypervisor.Disk{ID: d.ID, Size: d.Size, Format: d.Format, Path: d.Path}, tracked: d.Format == "qcow2",
			lost: map[hypervisor.ReferencePoint]bool{}, path: d.Path, served: d.Served, straight: d.Path == ""}
		md.memFile = memFile{d.Size, map[int64][]byte{}}
		if d.Path != "" {
			f := c.m.files[d.Path]
			if f == nil {
				return "", fmt.Errorf("disk %s: no file %s", d.ID, d.Path)
			}
			md.memFile = *f // the map is shared: the VM's writes are the file's
		} else if d.Served == "" {
			return "", fmt.Errorf("disk %s has neither a file nor an export", d.ID)
		}
		disks = append(disks, md)
	}
	vm := c.m.add(n.Name)
	vm.config, vm.owner, vm.disks = slices.Clone(n.Config), n.Owner, disks
	vm.link = !n.Isolated
	if slices.ContainsFunc(n.Config, func(f hypervisor.File) bool { return f.Name == "nvram" }) {
		vm.nvram = n.NVRAM
	}
	return vm.id, nil
}

// Find finds a recovered VM by its session.
func (c *Conn) Find(ctx context.Context, session string) (hypervisor.VMID, error) {
	if err := c.step(ctx, "find", session); err != nil {
		return "", err
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	for id, vm := range c.m.vms {
		if vm.owner.Session == session && session != "" {
			return id, nil
		}
	}
	return "", fmt.Errorf("%w: none of session %s", hypervisor.ErrNotExist, session)
}

// Start turns a VM on. It reads the first page of each served disk, as
// firmware does: if that fails the guest is paused at once.
func (c *Conn) Start(ctx context.Context, id hypervisor.VMID) error {
	if err := c.step(ctx, "start", id); err != nil {
		return err
	}
	c.m.mu.Lock()
	vm, err := c.vm(id)
	if err == nil && vm.state != hypervisor.Stopped {
		err = fmt.Errorf("VM %s is running", vm.name)
	}
	if err != nil {
		c.m.mu.Unlock()
		return err
	}
	vm.state, vm.ioErr = hypervisor.Running, false
	var served []hypervisor.DiskID
	for _, d := range vm.disks {
		if d.served != "" && d.size > 0 {
			served = append(served, d.ID)
		}
	}
	c.m.mu.Unlock()
	for _, d := range served {
		err := c.m.Read(ctx, id, d, make([]byte, 512), 0)
		if err != nil && !errors.Is(err, ErrIO) {
			return err
		}
	}
	return nil
}

// Stop turns a VM off.
func (c *Conn) Stop(ctx context.Context, id hypervisor.VMID) error {
	if err := c.step(ctx, "stop", id); err != nil {
		return err
	}
	c.m.mu.Lock()
	_, err := c.vm(id)
	c.m.mu.Unlock()
	if err != nil {
		return err
	}
	c.m.SetState(id, hypervisor.Stopped)
	return nil
}

// DeleteVM removes a recovered VM's definition.
func (c *Conn) DeleteVM(ctx context.Context, id hypervisor.VMID) error {
	if err := c.step(ctx, "delete vm", id); err != nil {
		return err
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	vm := c.m.vms[id]
	switch {
	case vm == nil:
		return nil
	case vm.owner == hypervisor.Owner{}:
		return fmt.Errorf("VM %s was not made by Holdfast", vm.name)
	case vm.state != hypervisor.Stopped:
		return fmt.Errorf("VM %s is not stopped", vm.name)
	}
	delete(c.m.vms, id)
	return nil
}

// Health tells a VM's state.
func (c *Conn) Health(ctx context.Context, id hypervisor.VMID) (hypervisor.Health, error) {
	if err := c.step(ctx, "health", id); err != nil {
		return hypervisor.Health{}, err
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	vm, err := c.vm(id)
	if err != nil {
		return hypervisor.Health{}, err
	}
	return hypervisor.Health{State: vm.state, IOError: vm.ioErr, Agent: vm.agent && vm.state == hypervisor.Running}, nil
}

// Unpause lets a guest go on if its served disks answer.
func (c *Conn) Unpause(ctx context.Context, id hypervisor.VMID) error {
	if err := c.step(ctx, "unpause", id); err != nil {
		return err
	}
	c.m.mu.Lock()
	vm, err := c.vm(id)
	var served []string
	if err == nil {
		for _, d := range vm.disks {
			if d.served != "" {
				served = append(served, d.served)
			}
		}
	}
	resolve := c.m.resolve
	c.m.mu.Unlock()
	if err != nil {
		return err
	}
	for _, uri := range served {
		dev, err := resolve(ctx, uri)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrIO, err)
		}
		if err := errors.Join(dev.ReadAt(ctx, make([]byte, min(512, dev.Size())), 0), dev.Close()); err != nil {
			return fmt.Errorf("%w: %w", ErrIO, err)
		}
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if vm.state == hypervisor.Paused {
		vm.state, vm.ioErr = hypervisor.Running, false
	}
	return nil
}

// Migrate copies page by page, so that cancelling keeps what is local.
func (c *Conn) Migrate(ctx context.Context, id hypervisor.VMID, storage string, report hypervisor.Progress) error {
	if err := c.step(ctx, "migrate", id); err != nil {
		return err
	}
	c.m.mu.Lock()
	vm, err := c.vm(id)
	if err == nil && vm.state != hypervisor.Running {
		err = fmt.Errorf("VM %s is not running", vm.name)
	}
	var todo []*memDisk
	var total int64
	if err == nil {
		for _, d := range vm.disks {
			if d.served != "" {
				todo, total = append(todo, d), total+d.size
			}
		}
	}
	resolve := c.m.resolve
	c.m.mu.Unlock()
	if err != nil {
		return err
	}
	var done int64
	for _, d := range todo {
		dev, err := resolve(ctx, d.served)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrIO, err)
		}
		err = c.fill(ctx, vm, d, dev, storage, func(n int64) {
			done += n
			if report != nil {
				report(done, total)
			}
		})
		if err = errors.Join(err, dev.Close()); err != nil {
			return fmt.Errorf("migrate disk %s: %w", d.ID, err)
		}
	}
	return nil
}

// fill makes a disk local: in place for an overlay; for one used straight from
// its export into a new file, with the guest held still for the copy.
func (c *Conn) fill(ctx context.Context, vm *memVM, d *memDisk, dev disk.Device, storage string, report func(int64)) error {
	pages := d.pages
	p := d.path
	if d.straight {
		p = hypervisor.DiskPath(storage, vm.owner.DiskName(vm.name, d.ID), "qcow2")
		c.m.mu.Lock()
		_, ok := c.m.storage[storage]
		if f := c.m.files[p]; f != nil {
			pages = f.pages
		} else if ok {
			c.m.files[p] = &memFile{d.size, pages}
		}
		c.m.mu.Unlock()
		if !ok {
			return fmt.Errorf("storage %s does not exist", storage)
		}
	}
	for off := int64(0); off < d.size; off += PageSize {
		if err := c.step(ctx, "copy", d.ID, off); err != nil {
			return err
		}
		n := min(PageSize, d.size-off)
		buf := make([]byte, PageSize)
		if err := dev.ReadAt(ctx, buf[:n], off); err != nil {
			return err
		}
		c.m.mu.Lock()
		if _, local := pages[off/PageSize]; (!local || d.straight) && !disk.IsZero(buf) {
			pages[off/PageSize] = buf
		}
		c.m.mu.Unlock()
		report(n)
	}
	vm.io.Lock()
	defer vm.io.Unlock()
	if d.straight { // what the guest wrote while the copy went by
		for off := int64(0); off < d.size; off += PageSize {
			buf := make([]byte, PageSize)
			if err := dev.ReadAt(ctx, buf[:min(PageSize, d.size-off)], off); err != nil {
				return err
			}
			c.m.mu.Lock()
			pages[off/PageSize] = buf
			c.m.mu.Unlock()
		}
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	d.pages, d.path, d.Path, d.served, d.straight = pages, p, p, "", false
	return nil
}

// Network looks at the guest's link, and bounces it if it is gone.
func (c *Conn) Network(ctx context.Context, id hypervisor.VMID) (string, error) {
	if err := c.step(ctx, "network", id); err != nil {
		return "", err
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	vm, err := c.vm(id)
	switch {
	case err != nil:
		return "", err
	case vm.link:
		return "network is up", nil
	}
	vm.link = true
	return "network was lost: link bounced, network is up", nil
}

// Local reports whether no disk of a VM depends on what is served, and the
// paths of its files.
func (m *Mem) Local(id hypervisor.VMID) (local bool, paths []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	local = true
	for _, d := range m.must(id).disks {
		local = local && d.served == ""
		if d.path != "" {
			paths = append(paths, d.path)
		}
	}
	return local, paths
}

// File returns a copy of a storage file's bytes; nil if there is none.
func (m *Mem) File(p string) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	f := m.files[path.Clean(p)]
	if f == nil {
		return nil
	}
	b := make([]byte, f.size)
	(&memFile{f.size, maps.Clone(f.pages)}).read(b, 0)
	return b
}
