package libvirt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"

	virt "github.com/digitalocean/go-libvirt"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
	"holdfast/internal/image/qcow2"
	"holdfast/internal/osfile"
)

// Files on the host. On this machine they are written directly; libvirt gives
// them to its QEMU user when the guest starts. On another one they go through
// a storage pool of the directory: overlays and variable stores, which are
// small, but no whole disks.

// reserve is left free on a storage, in bytes: a full one stops every guest.
const reserve = 64 << 20

// CreateDisk makes a disk's file.
func (h *Host) CreateDisk(ctx context.Context, storage, name string, d hypervisor.NewDisk) (hypervisor.NewDisk, hypervisor.WriteCloser, error) {
	if d.Format == "" {
		d.Format = "qcow2"
	}
	d.Path = hypervisor.DiskPath(cleanPath(storage), name, d.Format)
	w, err := h.createDisk(ctx, d)
	if errors.Is(err, fs.ErrExist) {
		err = fmt.Errorf("%w: %s", hypervisor.ErrExist, d.Path)
	}
	if err != nil {
		return d, nil, fmt.Errorf("make disk %s: %w", d.ID, err)
	}
	return d, w, nil
}

func (h *Host) createDisk(ctx context.Context, d hypervisor.NewDisk) (hypervisor.WriteCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	switch {
	case d.Served != "" && d.Format != "qcow2":
		return nil, fmt.Errorf("an overlay has to be qcow2, not %s", d.Format)
	case d.Served != "":
		return nil, h.createOverlay(ctx, d.Path, d.Size, d.Served, "raw")
	case !h.Local():
		return nil, fmt.Errorf("whole disks cannot be written to %s from here: run Holdfast on that host with qemu:///system, or restore to a directory", h.uri)
	case d.Format == "raw":
		// The interface shall be nil, not hold a nil pointer.
		if f, err := disk.CreateFile(d.Path, d.Size); err != nil {
			return nil, err
		} else {
			return f, nil
		}
	case d.Format == "qcow2":
		if f, err := qcow2.Create(d.Path, d.Size, qcow2.Options{}); err != nil {
			return nil, err
		} else {
			return f, nil
		}
	}
	return nil, fmt.Errorf("disk format %q is neither raw nor qcow2", d.Format)
}

// createOverlay makes an empty qcow2 file above backing: a path on the host or
// an NBD URI.
func (h *Host) createOverlay(ctx context.Context, file string, size int64, backing, format string) error {
	if h.Local() {
		return qcow2.CreateOverlay(file, size, backing, format, qcow2.Options{})
	}
	dir, err := os.MkdirTemp("", "holdfast-overlay-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	tmp := filepath.Join(dir, "overlay")
	if err := qcow2.CreateOverlay(tmp, size, backing, format, qcow2.Options{}); err != nil {
		return err
	}
	data, err := os.ReadFile(tmp)
	if err != nil {
		return err
	}
	return h.putFile(ctx, file, data)
}

// putFile makes a file on the host, never over an existing one (fs.ErrExist),
// durably when it is this machine.
func (h *Host) putFile(ctx context.Context, file string, data []byte) error {
	if !h.Local() {
		return h.upload(ctx, file, data)
	}
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = osfile.SyncDir(filepath.Dir(file))
	}
	if err != nil {
		return errors.Join(err, os.Remove(file))
	}
	return nil
}

// RemoveDisk removes a file; one that is gone is no error.
func (h *Host) RemoveDisk(ctx context.Context, file string) error {
	if h.Local() {
		if err := os.Remove(file); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	return h.withPool(ctx, path.Dir(file), func(ctx context.Context, pool virt.StoragePool) error {
		vol, err := h.volume(ctx, pool, file)
		if err != nil {
			return err
		}
		if vol == nil {
			return nil
		}
		return h.do(ctx, "remove "+file, func(l *virt.Libvirt) error { return l.StorageVolDelete(*vol, 0) })
	})
}

// volume looks a file up in its pool; nil if there is none.
func (h *Host) volume(ctx context.Context, pool virt.StoragePool, file string) (*virt.StorageVol, error) {
	vol, err := call(ctx, h, "look up "+file, func(l *virt.Libvirt) (virt.StorageVol, error) {
		return l.StorageVolLookupByName(pool, path.Base(file))
	})
	if is(err, virt.ErrNoStorageVol) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	return &vol, nil
}

// upload makes a file of a remote host through a pool. The volume is declared
// raw: libvirt shall keep the bytes as they are.
func (h *Host) upload(ctx context.Context, file string, data []byte) error {
	return h.withPool(ctx, path.Dir(file), func(ctx context.Context, pool virt.StoragePool) error {
		if vol, err := h.volume(ctx, pool, file); err != nil {
			return err
		} else if vol != nil {
			return fmt.Errorf("%s: %w", file, fs.ErrExist)
		}
		v := el("volume")
		v.need("name").setText(path.Base(file))
		v.need("capacity").setText(strconv.Itoa(len(data)))
		v.need("allocation").setText(strconv.Itoa(len(data)))
		target := v.need("target")
		target.add(el("format", "type", "raw"))
		target.need("permissions").need("mode").setText("0600")
		vol, err := call(ctx, h, "make "+file, func(l *virt.Libvirt) (virt.StorageVol, error) {
			return l.StorageVolCreateXML(pool, v.String(), 0)
		})
		if err != nil {
			return err
		}
		err = h.do(ctx, "write "+file, func(l *virt.Libvirt) error {
			return l.StorageVolUpload(vol, bytes.NewReader(data), 0, uint64(len(data)), 0)
		})
		if err != nil {
			ctx, cancel := detached(ctx)
			defer cancel()
			return errors.Join(err, h.do(ctx, "remove "+file, func(l *virt.Libvirt) error { return l.StorageVolDelete(vol, 0) }))
		}
		return nil
	})
}

// withPool runs f with the active pool whose directory is dir. If there is
// none, one is made for the time being; it is not defined on the host.
func (h *Host) withPool(ctx context.Context, dir string, f func(context.Context, virt.StoragePool) error) (err error) {
	dir = cleanPath(dir)
	pool, err := call(ctx, h, "look up the storage pool of "+dir, func(l *virt.Libvirt) (virt.StoragePool, error) {
		return l.StoragePoolLookupByTargetPath(dir)
	})
	if is(err, virt.ErrNoStoragePool) {
		x := el("pool", "type", "dir")
		x.need("name").setText("holdfast-" + newUUID())
		x.need("target").need("path").setText(dir)
		pool, err = call(ctx, h, "open directory "+dir, func(l *virt.Libvirt) (virt.StoragePool, error) {
			return l.StoragePoolCreateXML(x.String(), 0)
		})
		defer func() {
			if pool.Name == "" {
				return
			}
			ctx, cancel := detached(ctx)
			defer cancel()
			derr := h.do(ctx, "close directory "+dir, func(l *virt.Libvirt) error { return l.StoragePoolDestroy(pool) })
			err = errors.Join(err, derr)
		}()
	}
	if err != nil {
		return err
	}
	if err := h.do(ctx, "read directory "+dir, func(l *virt.Libvirt) error { return l.StoragePoolRefresh(pool, 0) }); err != nil {
		return err
	}
	return f(ctx, pool)
}

// storageFits makes sure that a storage directory is there and has room for
// need bytes.
func (h *Host) storageFits(ctx context.Context, storage string, need int64) error {
	if !path.IsAbs(storage) {
		return fmt.Errorf("storage %q is not an absolute path", storage)
	}
	var free int64
	if h.Local() {
		fi, err := os.Stat(storage)
		if err != nil {
			return fmt.Errorf("storage: %w", err)
		}
		if !fi.IsDir() {
			return fmt.Errorf("storage %s is not a directory", storage)
		}
		if err := reachable(storage); err != nil {
			return err
		}
		if free, err = freeSpace(storage); err != nil {
			return fmt.Errorf("free space of storage %s: %w", storage, err)
		}
	} else {
		err := h.withPool(ctx, storage, func(ctx context.Context, pool virt.StoragePool) error {
			n, err := call(ctx, h, "free space of "+storage, func(l *virt.Libvirt) (uint64, error) {
				_, _, _, free, err := l.StoragePoolGetInfo(pool)
				return free, err
			})
			free = int64(min(n, 1<<62))
			return err
		})
		if err != nil {
			return fmt.Errorf("storage: %w", err)
		}
	}
	if free-reserve < need {
		return fmt.Errorf("storage %s is too small: %d MiB needed, %d MiB free", storage, (need+reserve)>>20, free>>20)
	}
	return nil
}
