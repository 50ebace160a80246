package libvirt

import (
	"crypto/rand"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"

	"holdfast/internal/hypervisor"
)

// metadataURI is the XML namespace of what Holdfast keeps in a domain's
// metadata: whose it is, and what the disks' drivers were like before they
// were made to read from a restore point.
const metadataURI = "urn:holdfast:1"

// platform is what a configuration needs of a host.
type platform struct {
	arch     string
	machine  string
	kind     string // "kvm", "qemu"
	emulator string
	cpu      *element // nil when none is asked for
}

// facts is what is known of the host while a configuration is made fit for it.
type facts struct {
	// fit gives the nearest platform that the host has, with notes about each
	// difference, or an error with what it lacks.
	fit func(platform) (platform, []string, error)
	// exists says whether a file is on the host; true when it cannot be told.
	exists func(path string) bool
	// taps: the daemon may make tap devices (it runs as root).
	taps bool
}

// parseDomain reads a domain's XML.
func parseDomain(data []byte) (*element, error) {
	dom, err := parseTree(data)
	if err != nil {
		return nil, fmt.Errorf("domain.xml: %w", err)
	}
	if dom.name != "domain" {
		return nil, fmt.Errorf("domain.xml: root is <%s>, not <domain>", dom.name)
	}
	return dom, nil
}

// recovered makes of a restore point's configuration the domain of vm: its
// name and identity, its disks where vm says, everything else as it was, but
// for what belonged to the one running domain it was read from and for what
// the host lacks. The notes are for the operator.
func recovered(config []byte, vm hypervisor.NewVM, host facts) (dom *element, notes []string, err error) {
	dom, err = parseDomain(config)
	if err != nil {
		return nil, nil, err
	}
	strip(dom)
	notes, err = settle(dom, host)
	if err != nil {
		return nil, nil, err
	}
	dom.need("name").setText(vm.Name)
	identify(dom, vm.NewIdentity)
	if err := firmware(dom, vm, host, &notes); err != nil {
		return nil, nil, err
	}
	originals, err := redirect(dom, vm, host, &notes)
	if err != nil {
		return nil, nil, err
	}
	if vm.NewIdentity || vm.Isolated {
		unshare(dom, vm.Isolated, &notes)
	}
	if vm.Isolated {
		isolate(dom, host.taps, &notes)
	}
	claim(dom, vm.Owner, originals)
	dom.pretty()
	return dom, notes, nil
}

// strip removes what libvirt put in for the run of the domain that the
// configuration was read from.
func strip(dom *element) {
	dom.set("id", "")
	dom.drop(func(c *element) bool {
		return c.name == "seclabel" && (c.attr("type") == "dynamic" || c.attr("type") == "") && c.attr("model") != "none"
	})
	if m := dom.at("metadata"); m != nil {
		m.drop(func(c *element) bool { return isOurs(c) })
	}
	dom.walk(func(e *element) {
		// Names that the operator gave begin with "ua-".
		e.drop(func(c *element) bool {
			return c.name == "alias" && c.attr("name") != "" && !strings.HasPrefix(c.attr("name"), "ua-")
		})
	})
	for _, dev := range dom.at("devices").elements() {
		switch dev.name {
		case "interface":
			if t := dev.at("target"); t != nil && strings.HasPrefix(t.attr("dev"), "vnet") {
				dev.dropAll("target")
			}
			if src := dev.at("source"); src != nil && dev.attr("type") == "network" {
				src.set("portid", "")
				src.set("bridge", "")
			}
		case "console", "serial", "parallel":
			if dev.attr("type") == "pty" {
				dev.dropAll("source")
				dev.set("tty", "")
			}
		case "channel":
			// libvirt makes the path of the domain's name.
			socket := dev.at("source").attr("path")
			if dev.attr("type") == "unix" && (strings.HasPrefix(socket, "/var/lib/libvirt/") || strings.HasPrefix(socket, "/run/libvirt/")) {
				dev.dropAll("source")
			}
			if t := dev.at("target"); t != nil {
				t.set("state", "")
			}
		case "graphics":
			if dev.attr("autoport") == "yes" {
				dev.set("port", "")
				dev.set("tlsPort", "")
				dev.set("websocket", "")
			}
		}
	}
}

// isOurs reports whether an element of <metadata> is Holdfast's.
func isOurs(c *element) bool {
	prefix, _, found := strings.Cut(c.name, ":")
	if !found {
		return c.attr("xmlns") == metadataURI
	}
	return c.attr("xmlns:"+prefix) == metadataURI
}

// settle replaces what the host lacks of emulator, machine type and processor.
func settle(dom *element, host facts) ([]string, error) {
	typ := dom.at("os", "type")
	if typ == nil || dom.at("devices") == nil {
		return nil, fmt.Errorf("domain.xml: no <os><type> or no <devices>")
	}
	want := platform{typ.attr("arch"), typ.attr("machine"), dom.attr("type"), dom.at("devices", "emulator").text(), dom.at("cpu")}
	got, notes, err := host.fit(want)
	if err != nil {
		return nil, err
	}
	dom.set("type", got.kind)
	typ.set("machine", got.machine)
	if got.emulator != want.emulator {
		dom.at("devices").need("emulator").setText(got.emulator)
	}
	if got.cpu != want.cpu {
		dom.dropAll("cpu")
		if got.cpu != nil {
			dom.add(got.cpu)
		}
	}
	return notes, nil
}

// identify gives the domain new ids where asked. A guest that goes back in
// time must be told so: its generation id is new in any case.
func identify(dom *element, fresh bool) {
	if g := dom.at("genid"); g != nil {
		g.setText(newUUID())
	}
	if !fresh {
		return
	}
	id := newUUID()
	dom.need("uuid").setText(id)
	for _, s := range dom.all("sysinfo") {
		for _, e := range s.at("system").elements() {
			if e.name == "entry" && e.attr("name") == "uuid" {
				e.setText(id) // libvirt refuses one that differs
			}
		}
	}
	for _, nic := range dom.at("devices").all("interface") {
		nic.need("mac").set("address", newMAC())
	}
}

// firmware points the domain at its variable store.
func firmware(dom *element, vm hypervisor.NewVM, host facts, notes *[]string) error {
	osn := dom.at("os")
	if code := osn.at("loader").text(); code != "" && !host.exists(code) {
		return fmt.Errorf("the VM's firmware %s is not on this host: install it there (Debian: ovmf)", code)
	}
	nv := osn.at("nvram")
	switch {
	case vm.NVRAM != "":
		if nv == nil {
			nv = osn.need("nvram")
		}
		nv.set("type", "")
		nv.setText(vm.NVRAM)
	case nv != nil:
		// libvirt makes the file from the firmware's template.
		nv.set("type", "")
		nv.children = nil
		*notes = append(*notes, "firmware variables are not in the restore point: the guest starts with new ones")
	}
	return nil
}

// redirect points the disks to where vm has them and removes those that it
// does not have. It returns, for each served disk, its driver as it was.
func redirect(dom *element, vm hypervisor.NewVM, host facts, notes *[]string) (map[string]*element, error) {
	originals := make(map[string]*element)
	disks := make(map[string]hypervisor.NewDisk)
	for _, d := range vm.Disks {
		disks[string(d.ID)] = d
	}
	var failure error
	dom.at("devices").drop(func(e *element) bool {
		if e.name != "disk" || failure != nil {
			return false
		}
		dev := e.at("target").attr("dev")
		if d, ok := disks[dev]; ok {
			delete(disks, dev)
			if d.Served != "" {
				originals[dev] = e.need("driver").clone()
			}
			failure = place(e, d, notes)
			return false
		}
		if k := e.attr("device"); k == "cdrom" || k == "floppy" {
			media(e, dev, host, notes)
			return false
		}
		*notes = append(*notes, "disk "+dev+" is not in the restore point: left out")
		return true
	})
	if failure != nil {
		return nil, failure
	}
	for dev := range disks {
		return nil, fmt.Errorf("domain.xml has no disk %s: %w", dev, hypervisor.ErrNotExist)
	}
	return originals, nil
}

// place points one <disk> to its file or export.
func place(e *element, d hypervisor.NewDisk, notes *[]string) error {
	for _, name := range []string{"transient", "shareable"} {
		if e.at(name) != nil {
			*notes = append(*notes, fmt.Sprintf("disk %s is not %s any more", d.ID, name))
		}
	}
	e.dropAll("source", "backingStore", "mirror", "auth", "encryption", "transient", "shareable", "state", "privateData")
	e.set("device", "disk")
	e.set("rawio", "")
	e.set("sgio", "")
	drv := e.need("driver")
	drv.set("name", "qemu")
	if d.Served == "" {
		e.set("type", "file")
		drv.set("type", d.Format)
		lead(e, drv, el("source", "file", d.Path))
		return nil
	}
	// The guest stops, and does not see an error, when the restore point
	// cannot be read: it goes on where it was.
	drv.set("error_policy", "stop")
	drv.set("rerror_policy", "stop")
	drv.set("copy_on_read", "")
	export, err := nbdSource(d.Served)
	if err != nil {
		return fmt.Errorf("disk %s: %w", d.ID, err)
	}
	if d.Path == "" {
		// Nothing of the driver speaks of a file any more.
		drv.set("type", "raw")
		drv.set("io", "")
		drv.set("cache", "")
		drv.dropAll("metadata_cache")
		e.set("type", "network")
		// How long requests wait for a lost server before the guest is stopped.
		export.add(el("reconnect", "delay", "30"))
		lead(e, drv, export)
		return nil
	}
	if d.Format != "qcow2" {
		return fmt.Errorf("disk %s: an overlay has to be qcow2, not %s", d.ID, d.Format)
	}
	drv.set("type", "qcow2")
	e.set("type", "file")
	back := el("backingStore", "type", "network")
	back.add(el("format", "type", "raw"), export, el("backingStore"))
	lead(e, drv, el("source", "file", d.Path), back)
	return nil
}

// lead puts elements first in e, once.
func lead(e *element, first ...*element) {
	e.drop(func(c *element) bool { return slices.Contains(first, c) })
	head := make([]any, 0, len(first)+len(e.children))
	for _, c := range first {
		head = append(head, c)
	}
	e.children = append(head, e.children...)
}

// media empties a drive whose medium is not on this host.
func media(e *element, dev string, host facts, notes *[]string) {
	src := e.at("source")
	e.dropAll("backingStore")
	if src == nil || src.attr("file") != "" && host.exists(src.attr("file")) {
		if src != nil && e.attr("type") == "file" {
			src.set("startupPolicy", "optional") // it may be gone when the guest starts next
		}
		return
	}
	e.dropAll("source")
	e.set("type", "file")
	*notes = append(*notes, "drive "+dev+" is empty: its medium is not on this host")
}

// nbdSource is the <source> of an NBD URI.
func nbdSource(uri string) (*element, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, fmt.Errorf("NBD URI: %w", err)
	}
	src := el("source", "protocol", "nbd", "name", strings.TrimPrefix(u.Path, "/"))
	scheme, transport, _ := strings.Cut(u.Scheme, "+")
	if scheme == "nbds" {
		src.set("tls", "yes")
	} else if scheme != "nbd" {
		return nil, fmt.Errorf("NBD URI: unknown scheme %q", u.Scheme)
	}
	switch transport {
	case "unix":
		socket := u.Query().Get("socket")
		if !path.IsAbs(socket) {
			return nil, fmt.Errorf("NBD URI %q: no socket", uri)
		}
		src.add(el("host", "transport", "unix", "socket", socket))
	case "", "tcp":
		port := u.Port()
		if port == "" {
			port = "10809"
		}
		if u.Hostname() == "" {
			return nil, fmt.Errorf("NBD URI %q: no host", uri)
		}
		src.add(el("host", "name", u.Hostname(), "port", port))
	default:
		return nil, fmt.Errorf("NBD URI: unknown transport %q", transport)
	}
	return src, nil
}

// unshare removes what two guests cannot have at once, and, of an isolated
// guest, what reaches out of it.
func unshare(dom *element, isolated bool, notes *[]string) {
	dom.at("devices").drop(func(e *element) bool {
		switch e.name {
		case "hostdev":
			*notes = append(*notes, "a host device ("+e.attr("type")+") is left out")
			return true
		case "filesystem", "shmem":
			if isolated {
				*notes = append(*notes, "a "+e.name+" shared with the host is left out")
			}
			return isolated
		case "redirdev", "vsock":
			return isolated
		case "channel", "serial", "console", "parallel":
			// A path or port that the original has open.
			if src := e.at("source"); src != nil && e.attr("type") != "file" && e.attr("type") != "pty" {
				if e.name == "channel" && e.attr("type") == "unix" {
					e.dropAll("source")
					return false
				}
				*notes = append(*notes, "a "+e.name+" of type "+e.attr("type")+" is left out")
				return true
			}
		case "graphics":
			if e.attr("port") != "" && e.attr("port") != "-1" {
				e.set("port", "")
				e.set("tlsPort", "")
				e.set("autoport", "yes")
			}
		}
		return false
	})
}

// isolate leaves every network interface in the guest, without a cable. The
// interface's type that libvirt has for this, "null", makes its daemon (9.0)
// end at start; a tap device that no bridge knows, with the guest's link down
// besides, works everywhere.
func isolate(dom *element, taps bool, notes *[]string) {
	kind := "ethernet"
	if !taps {
		kind = "user"
	}
	dom.drop(func(e *element) bool {
		if e.name != "qemu:commandline" {
			return false
		}
		*notes = append(*notes, "arguments of QEMU's own are left out: they could connect the guest")
		return true
	})
	keep := []string{"mac", "model", "boot", "rom", "address", "alias", "mtu", "acpi"}
	dom.at("devices").drop(func(e *element) bool {
		if e.name != "interface" {
			return false
		}
		if e.attr("type") == "hostdev" {
			*notes = append(*notes, "a network interface passed through from the host is left out")
			return true
		}
		e.set("type", kind)
		e.set("managed", "")
		e.set("trustGuestRxFilters", "")
		e.drop(func(c *element) bool { return !slices.Contains(keep, c.name) })
		e.add(el("link", "state", "down"))
		return false
	})
}

// claim writes whose the domain is into its metadata, with the drivers that
// the disks get back once they are local.
func claim(dom *element, o hypervisor.Owner, originals map[string]*element) {
	owner := el("holdfast:owner", "xmlns:holdfast", metadataURI,
		"repository", o.Repository, "history", o.History, "session", o.Session)
	devs := make([]string, 0, len(originals))
	for dev := range originals {
		devs = append(devs, dev)
	}
	slices.Sort(devs)
	for _, dev := range devs {
		d := el("holdfast:disk", "dev", dev)
		was := originals[dev]
		was.name = "holdfast:driver"
		was.children = nil
		d.add(was)
		owner.add(d)
	}
	dom.need("metadata").add(owner)
}

// owned gives what claim wrote; nil when the domain is not ours.
func owned(dom *element) *element {
	for _, c := range dom.at("metadata").elements() {
		if isOurs(c) && localName(c.name) == "owner" {
			return c
		}
	}
	return nil
}

func localName(name string) string { return name[strings.IndexByte(name, ':')+1:] }

// settleLocal makes a domain's configuration that of local disks: no backing
// store, and each driver what it was before, but for the format. It reports
// whether it changed anything.
func settleLocal(dom *element) bool {
	before := dom.String()
	was := make(map[string]*element)
	if o := owned(dom); o != nil {
		for _, d := range o.elements() {
			if drv := d.elements(); localName(d.name) == "disk" && len(drv) == 1 {
				was[d.attr("dev")] = drv[0]
			}
		}
		o.drop(func(c *element) bool { return localName(c.name) == "disk" })
	}
	for _, e := range dom.at("devices").all("disk") {
		old, ok := was[e.at("target").attr("dev")]
		if !ok {
			continue
		}
		e.dropAll("backingStore")
		drv := e.need("driver")
		format := drv.attr("type")
		drv.attrs = slices.Clone(old.attrs)
		drv.set("name", "qemu")
		drv.set("type", format)
	}
	return dom.String() != before
}

// remote names the disks of a domain that need more than local files, with
// what they need; empty when there is none.
func remote(dom *element) []string {
	var out []string
	for _, e := range dom.at("devices").all("disk") {
		dev := e.at("target").attr("dev")
		if k := e.attr("device"); k == "cdrom" || k == "floppy" {
			continue
		}
		for layer := e; layer != nil; layer = layer.at("backingStore") {
			if layer.attr("type") == "network" {
				out = append(out, fmt.Sprintf("%s: %s", dev, layer.at("source").attr("protocol")))
				break
			}
		}
		if e.at("mirror") != nil {
			out = append(out, dev+": a copy is under way")
		}
	}
	return out
}

// newUUID is a random UUID (RFC 9562, version 4).
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return formatUUID(b)
}

// newMAC is a random address of the range that QEMU's guests have.
func newMAC() string {
	var b [3]byte
	rand.Read(b[:])
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", b[0], b[1], b[2])
}
