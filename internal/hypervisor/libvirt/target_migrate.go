package libvirt

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path"
	"strings"
	"time"

	virt "github.com/digitalocean/go-libvirt"

	"holdfast/internal/hypervisor"
)

// errJobOver: the block job ended and the disk is not local.
var errJobOver = errors.New("copying ended early")

const (
	// goes bounds how often one Migrate begins anew after a job that ended early.
	goes = 5
	// pauseBetween lets QEMU connect again before the next one.
	pauseBetween = 500 * time.Millisecond
)

// pollJob is how often a block job is looked at.
const pollJob = 250 * time.Millisecond

// pausedURI marks, in the metadata of the running domain alone, one that
// Migrate started paused, only for QEMU to fill its disks.
const pausedURI = "urn:holdfast:1:filling"

// Migrate makes the disks local, each in three steps that can be repeated:
// a disk that is not on the storage gets an empty overlay there, by a snapshot
// of all such disks at one instant, so that from then on the guest writes
// locally; QEMU fills the overlay from what lies beneath (block pull); the
// configuration loses its link. A pull that was interrupted, also by the death
// of this process, has lost nothing: what is there is not copied again.
//
// A guest that is off is started paused for the time of the copying and
// turned off again, unless somebody let it run meanwhile.
func (h *Host) Migrate(ctx context.Context, id hypervisor.VMID, storage string, report hypervisor.Progress) error {
	d, err := h.domain(ctx, id)
	if err != nil {
		return err
	}
	o, ours, err := h.ownerOf(ctx, d)
	if err != nil {
		return err
	}
	if !ours {
		return fmt.Errorf("VM %s was not recovered by Holdfast", d.Name)
	}
	if report == nil {
		report = func(int64, int64) {}
	}
	h.noteNetwork(ctx, d)
	for n := range goes {
		if err = h.wake(ctx, id, d); err != nil {
			return err
		}
		if err = h.fill(ctx, d, o, cleanPath(storage), report); !errors.Is(err, errJobOver) {
			break
		}
		// The guest was shut down under the job? Then it goes on from where it was.
		state, ioError, serr := h.state(ctx, d)
		if serr != nil {
			return errors.Join(err, serr)
		}
		if ioError {
			return fmt.Errorf("%w: the restore point does not answer: run \"holdfast resume\", then migrate again", err)
		}
		if state == hypervisor.Stopped {
			continue
		}
		// A disk that nobody has read since its server was started again: QEMU
		// notices at the first request, and connects at one of the next.
		if n == goes-1 {
			return fmt.Errorf("%w: %w", err, h.whyOver(ctx, cleanPath(storage)))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pauseBetween):
		}
	}
	if err != nil {
		return err
	}
	// All data is local. What follows is quick, and is finished once begun.
	ctx, cancel := detached(ctx)
	defer cancel()
	if err := h.flush(ctx, d); err != nil {
		return err
	}
	if err := h.settle(ctx, d); err != nil {
		return err
	}
	if err := h.rest(ctx, d); err != nil {
		return err
	}
	return h.verifyLocal(ctx, d)
}

// whyOver guesses why QEMU gave a job up, which it tells nobody who was not
// listening.
func (h *Host) whyOver(ctx context.Context, storage string) error {
	if err := h.storageFits(ctx, storage, 0); err != nil {
		return err
	}
	return errors.New("QEMU could not read the restore point or write the storage: see the log of the domain, then migrate again")
}

// wake starts a guest that is off, paused.
func (h *Host) wake(ctx context.Context, id hypervisor.VMID, d virt.Domain) error {
	state, _, err := h.state(ctx, d)
	if err != nil || state != hypervisor.Stopped {
		return err
	}
	ctx, cancel := detached(ctx)
	defer cancel()
	if err := h.start(ctx, id, virt.DomainStartPaused); err != nil {
		return err
	}
	mark := el("filling")
	return h.do(ctx, "mark VM "+d.Name, func(l *virt.Libvirt) error {
		return l.DomainSetMetadata(d, int32(virt.DomainMetadataElement), virt.OptString{mark.String()}, virt.OptString{"filling"},
			virt.OptString{pausedURI}, virt.DomainAffectLive)
	})
}

// rest turns off a guest that wake started, unless it runs now. QEMU is asked
// to end in order, never killed: it has to write its metadata.
func (h *Host) rest(ctx context.Context, d virt.Domain) error {
	state, _, err := h.state(ctx, d)
	if err != nil || state != hypervisor.Paused {
		return err
	}
	_, err = call(ctx, h, "look for the mark of "+d.Name, func(l *virt.Libvirt) (string, error) {
		return l.DomainGetMetadata(d, int32(virt.DomainMetadataElement), virt.OptString{pausedURI}, virt.DomainAffectLive)
	})
	if is(err, virt.ErrNoDomainMetadata, virt.ErrOperationInvalid) {
		return nil
	} else if err != nil {
		return err
	}
	err = h.do(ctx, "turn VM "+d.Name+" off", func(l *virt.Libvirt) error { return l.DomainDestroyFlags(d, virt.DomainDestroyGraceful) })
	if is(err, virt.ErrOperationInvalid) {
		return nil
	}
	return err
}

// fill brings every disk's data to the storage.
func (h *Host) fill(ctx context.Context, d virt.Domain, o hypervisor.Owner, storage string, report hypervisor.Progress) error {
	dom, err := h.domainXML(ctx, d, false)
	if err != nil {
		return err
	}
	if err := h.cover(ctx, d, dom, o, storage); err != nil {
		return err
	}
	if dom, err = h.domainXML(ctx, d, false); err != nil {
		return err
	}
	var devs []string
	var sizes []int64
	var done, total int64
	for _, e := range dom.at("devices").all("disk") {
		dev := e.at("target").attr("dev")
		if isDrive(e) {
			continue
		}
		n, err := h.diskSize(ctx, d, dev)
		if err != nil {
			return err
		}
		total += n
		if e.at("backingStore").attr("type") == "" && e.attr("type") != "network" {
			done += n
			continue
		}
		devs, sizes = append(devs, dev), append(sizes, n)
	}
	report(done, total)
	for i, dev := range devs {
		if err := h.pull(ctx, d, dev, func(n int64) { report(done+min(n, sizes[i]), total) }); err != nil {
			return fmt.Errorf("disk %s: %w", dev, err)
		}
		done += sizes[i]
		report(done, total)
	}
	return nil
}

// isDrive reports whether a <disk> is a drive with a medium.
func isDrive(e *element) bool {
	k := e.attr("device")
	return k == "cdrom" || k == "floppy"
}

func (h *Host) diskSize(ctx context.Context, d virt.Domain, dev string) (int64, error) {
	n, err := call(ctx, h, "size of disk "+dev, func(l *virt.Libvirt) (uint64, error) {
		_, n, _, err := l.DomainGetBlockInfo(d, dev, 0)
		return n, err
	})
	return int64(min(n, 1<<62)), err
}

// cover gives each disk that is not on the storage an empty overlay there, all
// in one snapshot.
func (h *Host) cover(ctx context.Context, d virt.Domain, dom *element, o hypervisor.Owner, storage string) error {
	snap := el("domainsnapshot")
	disks := snap.need("disks")
	var made []string
	undo := func() error {
		ctx, cancel := detached(ctx)
		defer cancel()
		var err error
		for _, p := range made {
			err = errors.Join(err, h.RemoveDisk(ctx, p))
		}
		return err
	}
	for _, e := range dom.at("devices").all("disk") {
		dev := e.at("target").attr("dev")
		src := e.at("source")
		if isDrive(e) || e.attr("type") == "file" && path.Dir(src.attr("file")) == storage {
			if !isDrive(e) {
				disks.add(el("disk", "name", dev, "snapshot", "no"))
			}
			continue
		}
		backing, format := src.attr("file"), e.at("driver").attr("type")
		if e.attr("type") == "network" {
			var err error
			if backing, err = nbdURI(src); err != nil {
				return errors.Join(fmt.Errorf("disk %s: %w", dev, err), undo())
			}
			format = "raw"
		}
		file := hypervisor.DiskPath(storage, o.DiskName(d.Name, hypervisor.DiskID(dev)), "")
		// One that is there belongs to a snapshot that was not taken: the file of
		// one that was taken would be the disk's own.
		err := h.RemoveDisk(ctx, file)
		var n int64
		if err == nil {
			n, err = h.diskSize(ctx, d, dev)
		}
		if err == nil {
			err = h.createOverlay(ctx, file, n, backing, format)
		}
		if err != nil {
			return errors.Join(fmt.Errorf("make an overlay for disk %s: %w", dev, err), undo())
		}
		made = append(made, file)
		s := el("disk", "name", dev, "snapshot", "external", "type", "file")
		s.add(el("driver", "type", "qcow2"), el("source", "file", file))
		disks.add(s)
	}
	if len(made) == 0 {
		return nil
	}
	const flags = virt.DomainSnapshotCreateDiskOnly | virt.DomainSnapshotCreateNoMetadata | virt.DomainSnapshotCreateAtomic | virt.DomainSnapshotCreateReuseExt
	// Not under ctx: an overlay must not be removed while libvirt puts it in use.
	sctx, cancel := detached(ctx)
	defer cancel()
	err := h.do(sctx, "direct the writes of "+d.Name+" to the storage", func(l *virt.Libvirt) error {
		_, err := l.DomainSnapshotCreateXML(d, snap.String(), uint32(flags))
		return err
	})
	var refused virt.Error
	if errors.As(err, &refused) { // it did not happen; else nobody knows
		err = errors.Join(err, undo())
	}
	return err
}

// nbdURI is the URI of an NBD <source>.
func nbdURI(src *element) (string, error) {
	host := src.at("host")
	if src.attr("protocol") != "nbd" || host == nil {
		return "", fmt.Errorf("a network disk of protocol %q is not ours", src.attr("protocol"))
	}
	u := url.URL{Scheme: "nbd", Path: "/" + src.attr("name")}
	if src.attr("tls") == "yes" {
		u.Scheme = "nbds"
	}
	if host.attr("transport") == "unix" {
		u.Scheme += "+unix"
		u.RawQuery = "socket=" + host.attr("socket")
		return u.String(), nil
	}
	u.Host = host.attr("name")
	if strings.Contains(u.Host, ":") {
		u.Host = "[" + u.Host + "]"
	}
	if p := host.attr("port"); p != "" {
		u.Host += ":" + p
	}
	return u.String(), nil
}

// pull fills one disk and returns when it has no backing any more. A job that
// runs already is adopted: a process that died left it.
func (h *Host) pull(ctx context.Context, d virt.Domain, dev string, report func(int64)) error {
	found, _, err := h.job(ctx, d, dev)
	if err != nil {
		return err
	}
	if !found {
		err := h.do(ctx, "fill the disk", func(l *virt.Libvirt) error { return l.DomainBlockPull(d, dev, 0, 0) })
		if is(err, virt.ErrOperationInvalid) {
			return fmt.Errorf("%w: %w", errJobOver, err) // the guest was shut down
		} else if err != nil {
			return err
		}
	}
	tick := time.NewTicker(pollJob)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			actx, cancel := detached(ctx)
			defer cancel()
			err := h.do(actx, "stop filling the disk", func(l *virt.Libvirt) error { return l.DomainBlockJobAbort(d, dev, 0) })
			if is(err, virt.ErrOperationInvalid, virt.ErrInvalidArg) { // it ended by itself
				err = nil
			}
			return errors.Join(context.Cause(ctx), err)
		case <-tick.C:
		}
		found, cur, err := h.job(ctx, d, dev)
		if err != nil {
			if ctx.Err() != nil {
				continue
			}
			return err
		}
		if found {
			report(cur)
			continue
		}
		local, err := h.isLocal(ctx, d, dev)
		if err == nil && !local {
			err = errJobOver
		}
		return err
	}
}

// job looks at a disk's block job. One of a guest that is off is over.
func (h *Host) job(ctx context.Context, d virt.Domain, dev string) (found bool, cur int64, err error) {
	type info struct {
		found int32
		typ   int32
		cur   uint64
	}
	i, err := call(ctx, h, "look at the filling of the disk", func(l *virt.Libvirt) (i info, err error) {
		i.found, i.typ, _, i.cur, _, err = l.DomainGetBlockJobInfo(d, dev, 0)
		return i, err
	})
	if is(err, virt.ErrOperationInvalid, virt.ErrInvalidArg) {
		return false, 0, nil
	}
	if err == nil && i.found != 0 && virt.DomainBlockJobType(i.typ) != virt.DomainBlockJobTypePull {
		return false, 0, errors.New("another block job works on it: wait until it is over, then migrate again")
	}
	return i.found != 0, int64(min(i.cur, 1<<62)), err
}

// isLocal looks whether a disk of the running domain has lost its backing. It
// looks several times: libvirt learns of a job's end before it has finished
// its own part.
func (h *Host) isLocal(ctx context.Context, d virt.Domain, dev string) (bool, error) {
	tick := time.NewTicker(pollJob)
	defer tick.Stop()
	for range 20 {
		dom, err := h.domainXML(ctx, d, false)
		if err != nil {
			return false, err
		}
		if dom.attr("id") == "" {
			return false, nil // off
		}
		for _, e := range dom.at("devices").all("disk") {
			if e.at("target").attr("dev") == dev && e.attr("type") == "file" && e.at("backingStore").attr("type") == "" {
				return true, nil
			}
		}
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-tick.C:
		}
	}
	return false, nil
}

// flush makes the filled disks durable: QEMU keeps part of the map of a qcow2
// file in memory until its guest flushes.
func (h *Host) flush(ctx context.Context, d virt.Domain) error {
	var blocks []struct {
		Inserted *struct {
			Node string `json:"node-name"`
			RO   bool   `json:"ro"`
		} `json:"inserted"`
	}
	if err := h.monitor(ctx, d, "query-block", nil, &blocks); err != nil {
		if is(err, virt.ErrOperationInvalid) {
			return nil // it is off, and so is its memory
		}
		return err
	}
	for _, b := range blocks {
		if b.Inserted == nil || b.Inserted.RO || b.Inserted.Node == "" {
			continue
		}
		var said string
		err := h.monitor(ctx, d, "human-monitor-command", map[string]string{"command-line": `qemu-io "` + b.Inserted.Node + `" "flush"`}, &said)
		if err == nil && strings.TrimSpace(said) != "" {
			err = errors.New(strings.TrimSpace(said))
		}
		if err != nil {
			return fmt.Errorf("flush the disks of %s: %w", d.Name, err)
		}
	}
	return nil
}

// settle takes what was ours out of the configuration that the guest starts
// with next.
func (h *Host) settle(ctx context.Context, d virt.Domain) error {
	dom, err := h.domainXML(ctx, d, true)
	if err != nil {
		return err
	}
	if !settleLocal(dom) {
		return nil
	}
	return h.do(ctx, "redefine VM "+d.Name, func(l *virt.Libvirt) error {
		_, err := l.DomainDefineXMLFlags(dom.String(), 0)
		return err
	})
}

// verifyLocal proves that nothing depends on a restore point: not the running
// domain, not the one that starts next, not the files.
func (h *Host) verifyLocal(ctx context.Context, d virt.Domain) error {
	for _, inactive := range []bool{false, true} {
		dom, err := h.domainXML(ctx, d, inactive)
		if err != nil {
			return err
		}
		if left := remote(dom); len(left) > 0 {
			return fmt.Errorf("VM %s is not local: %s", d.Name, strings.Join(left, ", "))
		}
		for _, e := range dom.at("devices").all("disk") {
			file := e.at("source").attr("file")
			if isDrive(e) || e.at("driver").attr("type") != "qcow2" || !h.Local() {
				continue
			}
			if b, err := backingOf(file); err != nil {
				return fmt.Errorf("verify %s: %w", file, err)
			} else if b != "" {
				return fmt.Errorf("%s still has the backing file %s", file, b)
			}
		}
	}
	return nil
}

// backingOf reads the name of a qcow2 file's backing file from its header; ""
// if it has none (QEMU, docs/interop/qcow2.txt: bytes 8 to 19).
func backingOf(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var head [20]byte
	if _, err := f.ReadAt(head[:], 0); err != nil {
		return "", err
	}
	if !bytes.Equal(head[:4], []byte("QFI\xfb")) {
		return "", errors.New("not a qcow2 file")
	}
	off, n := binary.BigEndian.Uint64(head[8:]), binary.BigEndian.Uint32(head[16:])
	if off == 0 {
		return "", nil
	}
	if n > 1023 || off > 1<<40 {
		return "", errors.New("damaged qcow2 header")
	}
	name := make([]byte, n)
	if _, err := f.ReadAt(name, int64(off)); err != nil && err != io.EOF {
		return "", err
	}
	return string(name), nil
}
