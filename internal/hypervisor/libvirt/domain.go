package libvirt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	virt "github.com/digitalocean/go-libvirt"

	"holdfast/internal/hypervisor"
)

// vdisk is a disk of a domain as its XML describes it.
type vdisk struct {
	hypervisor.Disk
	el   *element
	file string // its image's path on the host, if it is a plain file
	// node is QEMU's name of the disk's format layer while the guest runs.
	node string
	// bare says why no bitmap can be kept for it, "" if one can; known once
	// the guest's block nodes are.
	bare string
}

// active reports whether a QEMU process holds the domain, paused or not.
func (h *Host) active(ctx context.Context, d virt.Domain) (bool, error) {
	n, err := call(ctx, h, "state of "+d.Name, func(l *virt.Libvirt) (int32, error) { return l.DomainIsActive(d) })
	return n != 0, err
}

// xml reads a domain's configuration.
func (h *Host) xml(ctx context.Context, d virt.Domain, flags virt.DomainXMLFlags) (string, *element, error) {
	s, err := call(ctx, h, "configuration of "+d.Name, func(l *virt.Libvirt) (string, error) { return l.DomainGetXMLDesc(d, flags) })
	if err != nil {
		return "", nil, err
	}
	e, err := parseDomain([]byte(s))
	return s, e, err
}

// disks reads the disks from a domain's XML, live or inactive. Sizes are not
// known yet.
func disks(dom *element) []vdisk {
	var out []vdisk
	for _, e := range dom.at("devices").all("disk") {
		src := e.at("source")
		v := vdisk{el: e, Disk: hypervisor.Disk{
			ID:     hypervisor.DiskID(e.at("target").attr("dev")),
			Format: orDefault(e.at("driver").attr("type"), "raw"),
			Path:   sourcePath(e.attr("type"), src),
		}}
		v.Excluded = excluded(e)
		if e.attr("type") == "file" {
			v.file = src.attr("file")
		}
		if i := src.attr("index"); i != "" {
			v.node = "libvirt-" + i + "-format"
		}
		out = append(out, v)
	}
	return out
}

// sourcePath tells where the host keeps a disk.
func sourcePath(typ string, src *element) string {
	switch typ {
	case "file":
		return src.attr("file")
	case "block":
		return src.attr("dev")
	case "volume":
		return src.attr("pool") + "/" + src.attr("volume")
	case "network":
		return src.attr("protocol") + ":" + src.attr("name")
	}
	return ""
}

// excluded says why a disk is not backed up, "" if it is.
func excluded(e *element) string {
	switch dev, typ := e.attr("device"), e.attr("type"); {
	case dev == "cdrom" || dev == "floppy":
		return dev + " drive"
	case typ == "vhostuser" || typ == "vhostvdpa" || typ == "dir" || typ == "nvme":
		return "type " + typ + ": QEMU cannot give a snapshot of it"
	case sourcePath(typ, e.at("source")) == "":
		return "empty drive"
	case e.at("readonly") != nil:
		return "read-only"
	case e.at("shareable") != nil:
		return "shared with other guests: no snapshot of it alone is of one instant"
	case e.at("transient") != nil:
		return "transient: its changes end with the guest"
	}
	return ""
}

// describe makes the hypervisor.VM of a domain, with sizes and without Config.
func (h *Host) describe(ctx context.Context, d virt.Domain) (hypervisor.VM, error) {
	vm := hypervisor.VM{ID: hypervisor.VMID(formatUUID(d.UUID)), Name: d.Name, Kind: Kind, Host: h.uri}
	var err error
	if vm.State, _, err = h.state(ctx, d); err != nil {
		return vm, err
	}
	_, dom, err := h.xml(ctx, d, 0)
	if err != nil {
		return vm, err
	}
	if shellOf(dom) != "" {
		vm.State = hypervisor.Stopped
		if _, dom, err = h.xml(ctx, d, virt.DomainXMLInactive); err != nil {
			return vm, err
		}
	}
	for _, v := range disks(dom) {
		if v.Excluded == "" {
			// A disk whose size cannot be told (its storage is away) is listed
			// with size 0; the snapshot will say what is wrong with it.
			v.Size, err = h.size(ctx, d, v.ID)
			if errors.Is(err, ErrLost) || ctx.Err() != nil {
				return vm, err
			}
		}
		vm.Disks = append(vm.Disks, v.Disk)
	}
	return vm, nil
}

// size asks for a disk's virtual size, in bytes.
func (h *Host) size(ctx context.Context, d virt.Domain, id hypervisor.DiskID) (int64, error) {
	n, err := call(ctx, h, fmt.Sprintf("size of disk %s of %s", id, d.Name), func(l *virt.Libvirt) (uint64, error) {
		_, capacity, _, err := l.DomainGetBlockInfo(d, string(id), 0)
		return capacity, err
	})
	return int64(n), err
}

// maxNVRAM bounds the firmware's variables, in bytes; real ones have 128 KiB
// to 64 MiB.
const maxNVRAM = 64 << 20

// config collects a domain's configuration. Notes say what could not be had.
func (h *Host) config(ctx context.Context, d virt.Domain, state hypervisor.State) (files []hypervisor.File, notes []string, err error) {
	inactive, dom, err := h.xml(ctx, d, virt.DomainXMLInactive|virt.DomainXMLSecure)
	if err != nil {
		return nil, nil, err
	}
	files = append(files, hypervisor.File{Name: "domain.xml", Data: []byte(inactive)})
	if state != hypervisor.Stopped {
		live, _, err := h.xml(ctx, d, virt.DomainXMLSecure)
		if err != nil {
			return nil, nil, err
		}
		files = append(files, hypervisor.File{Name: "domain-live.xml", Data: []byte(live)})
	}
	nv := dom.at("os", "nvram")
	p := nv.text()
	if p == "" {
		p = nv.at("source").attr("file")
	}
	switch {
	case nv == nil:
	case p == "":
		notes = append(notes, "NVRAM is not in a file and is not in this point")
	default:
		b, err := h.readFile(ctx, p)
		switch {
		case err == nil:
			files = append(files, hypervisor.File{Name: "nvram", Data: b})
		case errors.Is(err, os.ErrNotExist) && state == hypervisor.Stopped:
			// The guest never ran.
		default:
			notes = append(notes, fmt.Sprintf("NVRAM is not in this point: %v", err))
		}
	}
	return files, notes, nil
}

// readFile reads a small file of the host: straight where the host is this
// machine, else through libvirt's storage API, which knows files in its pools.
func (h *Host) readFile(ctx context.Context, p string) ([]byte, error) {
	if h.Local() {
		f, err := os.Open(p)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		b := limited{max: maxNVRAM}
		_, err = f.WriteTo(&b)
		return b.b, err
	}
	return call(ctx, h, "read "+p, func(l *virt.Libvirt) ([]byte, error) {
		pool, err := l.StoragePoolLookupByTargetPath(path.Dir(p))
		if err != nil {
			return nil, err
		}
		if err := l.StoragePoolRefresh(pool, 0); err != nil {
			return nil, err
		}
		vol, err := l.StorageVolLookupByPath(p)
		if err != nil {
			return nil, err
		}
		b := limited{max: maxNVRAM}
		err = l.StorageVolDownload(vol, &b, 0, 0, 0)
		return b.b, err
	})
}

// limited gathers at most max bytes.
type limited struct {
	b   []byte
	max int
}

func (w *limited) Write(p []byte) (int, error) {
	if len(w.b)+len(p) > w.max {
		return 0, fmt.Errorf("longer than %d bytes", w.max)
	}
	w.b = append(w.b, p...)
	return len(p), nil
}

// parseOwned takes the ids out of a name that Owner.Owned gave, perhaps with
// more behind it.
func parseOwned(name string) (o hypervisor.Owner, ok bool) {
	rest, ok := strings.CutPrefix(name, "holdfast-")
	if !ok {
		return o, false
	}
	p := strings.SplitN(rest, "-", 3)
	if len(p) != 3 {
		return o, false
	}
	session := p[2]
	if i := strings.IndexFunc(session, func(r rune) bool { return !strings.ContainsRune("0123456789abcdef", r) }); i >= 0 {
		session = session[:i]
	}
	o = hypervisor.Owner{Repository: p[0], History: p[1], Session: session}
	return o, session != "" && p[0] != "" && p[1] != ""
}
