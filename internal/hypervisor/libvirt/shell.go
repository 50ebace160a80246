package libvirt

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	virt "github.com/digitalocean/go-libvirt"
)

// shellTag marks, in the live configuration only, a QEMU process that we
// started over the disks of a stopped guest.
const (
	shellTag = "holdfast:shell"
	shellURI = "urn:holdfast:shell:1" // its XML namespace
)

// shellXML makes, of a stopped domain's configuration, one that starts a QEMU
// with the same disks and nothing else: no firmware (so that NVRAM is neither
// made nor changed), no network, no devices of the host, no TPM, little memory.
// libvirt takes it as the live configuration of the domain of that UUID and
// goes back to the persistent one when the process ends.
func shellXML(dom *element, owned string) *element {
	out := el("domain", "type", dom.attr("type"))
	for _, a := range dom.attrs { // namespaces
		if a.name != "id" {
			out.set(a.name, a.value)
		}
	}
	copyText := func(name string) {
		if e := dom.at(name); e != nil {
			out.add(e.clone())
		}
	}
	copyText("name")
	copyText("uuid")
	meta := el("metadata")
	meta.add(el(shellTag, "xmlns:holdfast", shellURI, "owned", owned))
	out.add(meta)
	mem := el("memory", "unit", "MiB")
	mem.setText("64")
	cpus := el("vcpu")
	cpus.setText("1")
	out.add(mem, cpus)
	copyText("iothreads")
	copyText("iothreadids")
	os := el("os")
	if t := dom.at("os", "type"); t != nil {
		os.add(t.clone())
	}
	out.add(os)
	devs := el("devices")
	in := dom.at("devices")
	if e := in.at("emulator"); e != nil {
		devs.add(e.clone())
	}
	for _, v := range disks(dom) {
		if v.Excluded == "" {
			c := v.el.clone()
			c.dropAll("boot") // there may be a per-device order beside <os><boot>
			devs.add(c)
		}
	}
	for _, c := range in.all("controller") {
		if slices.Contains([]string{"pci", "ide", "sata", "scsi", "fdc"}, c.attr("type")) {
			devs.add(c.clone())
		}
	}
	devs.add(el("memballoon", "model", "none"))
	out.add(devs)
	return out
}

// shellOf returns the Owner's name of a shell from a domain's live XML, "" if
// it is a guest of its own.
func shellOf(live *element) string { return live.at("metadata", shellTag).attr("owned") }

// startShell starts a QEMU, paused for good, over a stopped domain's disks.
// libvirt ends it when our connection ends.
func (h *Host) startShell(ctx context.Context, d virt.Domain, owned string) error {
	_, dom, err := h.xml(ctx, d, virt.DomainXMLInactive|virt.DomainXMLSecure)
	if err != nil {
		return err
	}
	x := shellXML(dom, owned).String()
	// Not under ctx, see call.
	bg, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
	defer cancel()
	_, err = call(bg, h, "start a paused QEMU over the disks of "+d.Name, func(l *virt.Libvirt) (virt.Domain, error) {
		return l.DomainCreateXML(x, virt.DomainStartPaused|virt.DomainStartAutodestroy)
	})
	if err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil {
		return errors.Join(err, h.stopShell(d))
	}
	return nil
}

// stopShell ends a shell in good order, so that QEMU stores the bitmaps.
func (h *Host) stopShell(d virt.Domain) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if _, live, err := h.xml(ctx, d, 0); err != nil {
		return err
	} else if shellOf(live) == "" {
		return nil // it is gone, and perhaps the guest itself runs
	}
	destroy := func(f virt.DomainDestroyFlagsValues) error {
		return h.do(ctx, "end the paused QEMU of "+d.Name, func(l *virt.Libvirt) error { return l.DomainDestroyFlags(d, f) })
	}
	err := destroy(virt.DomainDestroyGraceful)
	if err != nil && !is(err, virt.ErrOperationInvalid) {
		err = destroy(virt.DomainDestroyDefault)
	}
	if is(err, virt.ErrOperationInvalid) {
		return nil // it was gone
	}
	return err
}

// whileActive calls f while a QEMU holds the domain's disks, starting a shell
// for it when the guest is stopped. f may be called again: a guest may stop
// meanwhile, and libvirt has been seen to end a QEMU right after its start, when
// it was late to notice the end of the one before.
func (h *Host) whileActive(ctx context.Context, d virt.Domain, owned string, f func() error) error {
	for try := 1; ; try++ {
		err := h.whileActiveOnce(ctx, d, owned, f)
		if try == 3 || !is(err, virt.ErrOperationInvalid) {
			return err
		}
		if on, lookErr := h.active(ctx, d); on || lookErr != nil {
			return err
		}
	}
}

func (h *Host) whileActiveOnce(ctx context.Context, d virt.Domain, owned string, f func() error) error {
	on, err := h.active(ctx, d)
	if err != nil {
		return err
	}
	if on {
		return f()
	}
	if err := h.startShell(ctx, d, owned); err != nil {
		return fmt.Errorf("to reach the bitmaps of a stopped guest: %w", err)
	}
	return errors.Join(f(), h.stopShell(d))
}
