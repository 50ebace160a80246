package libvirt

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/hypervisor"
)

var updateXML = flag.Bool("update-xml", false, "write the expected domains anew")

// testFacts is a host with the platforms of testdata/capabilities.xml.
func testFacts(t *testing.T, without ...string) facts {
	t.Helper()
	data, err := os.ReadFile("testdata/capabilities.xml")
	if err != nil {
		t.Fatal(err)
	}
	caps, err := parseTree(data)
	if err != nil {
		t.Fatal(err)
	}
	exists := func(p string) bool { return p != "/iso/gone.iso" && !slices.Contains(without, p) }
	return facts{taps: true, exists: exists, fit: func(p platform) (platform, []string, error) { return fit(caps, exists, p) }}
}

var testOwner = hypervisor.Owner{Repository: "00112233", History: "44556677", Session: "8899aabbccddeeff"}

const (
	nbdUnix = "nbd+unix:///vda?socket=/run/holdfast/s/nbd"
	nbdTCP  = "nbd://192.0.2.1:10809/sda"
)

// variants of the recovery of live.xml.
func variants() map[string]hypervisor.NewVM {
	host := []hypervisor.NewDisk{
		{ID: "vda", Size: 1 << 30, Path: "/store/web-vda.qcow2", Format: "qcow2", Served: nbdUnix},
		{ID: "sda", Size: 1 << 30, Path: "/store/web-sda.qcow2", Format: "qcow2", Served: nbdTCP},
	}
	server := []hypervisor.NewDisk{{ID: "vda", Size: 1 << 30, Served: nbdUnix}, {ID: "sda", Size: 1 << 30, Served: "nbds://[2001:db8::1]:99/sda"}}
	local := []hypervisor.NewDisk{{ID: "vda", Size: 1 << 30, Path: "/store/vda.raw", Format: "raw"}, {ID: "sda", Size: 1 << 30, Path: "/store/sda.qcow2", Format: "qcow2"}}
	return map[string]hypervisor.NewVM{
		"host":     {Name: "web", Disks: host, NVRAM: "/store/web-nvram.fd", Owner: testOwner},
		"server":   {Name: "web", Disks: server, NVRAM: "/store/web-nvram.fd", Owner: testOwner},
		"isolated": {Name: "web-lab", Disks: host, NewIdentity: true, Isolated: true, Owner: testOwner},
		"beside":   {Name: "web & co", Disks: host, NewIdentity: true, NVRAM: "/store/n", Owner: testOwner},
		"restored": {Name: "web", Disks: local, NVRAM: "/store/n", Owner: testOwner},
	}
}

var randomID = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}|52:54:00(:[0-9a-f]{2}){3}`)

// steady replaces what is random and not of the source.
func steady(s string, source []byte) string {
	return randomID.ReplaceAllStringFunc(s, func(id string) string {
		if strings.Contains(string(source), id) {
			return id
		}
		if strings.HasPrefix(id, "52:54") && len(id) == 17 {
			return "52:54:00:NEW"
		}
		return "NEW-UUID"
	})
}

func TestRecovered(t *testing.T) {
	source, err := os.ReadFile("testdata/recovered/live.xml")
	if err != nil {
		t.Fatal(err)
	}
	for name, vm := range variants() {
		t.Run(name, func(t *testing.T) {
			dom, notes, err := recovered(source, vm, testFacts(t))
			if err != nil {
				t.Fatal(err)
			}
			got := steady(dom.String(), source) + "\n"
			for _, n := range notes {
				got += "note: " + n + "\n"
			}
			golden(t, filepath.Join("testdata/recovered", name+".out"), got)
			if _, err := parseDomain([]byte(dom.String())); err != nil {
				t.Errorf("it cannot be read again: %v", err)
			}
			served := vm.Disks[0].Served != ""
			if left := remote(dom); served != (len(left) == 2) {
				t.Errorf("remote: %q", left)
			}
		})
	}
}

func golden(t *testing.T, path, got string) {
	t.Helper()
	if *updateXML {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (see -update-xml):\n%s", path, got)
	}
}

// A host without the VM's firmware is told of before anything is made.
func TestNoFirmware(t *testing.T) {
	source, err := os.ReadFile("testdata/recovered/live.xml")
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = recovered(source, variants()["host"], testFacts(t, "/usr/share/OVMF/OVMF_CODE_4M.ms.fd"))
	if err == nil || !strings.Contains(err.Error(), "OVMF_CODE_4M.ms.fd is not on this host") {
		t.Errorf("%v", err)
	}
}

// After the migration the drivers are what they were, and nothing points away.
func TestSettleLocal(t *testing.T) {
	source, err := os.ReadFile("testdata/recovered/live.xml")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"host", "server"} {
		dom, _, err := recovered(source, variants()[name], testFacts(t))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range dom.at("devices").all("disk") { // as libvirt leaves it
			if dev := e.at("target").attr("dev"); dev == "vda" || dev == "sda" {
				e.set("type", "file")
				e.dropAll("source", "backingStore")
				e.at("driver").set("type", "qcow2")
				e.add(el("source", "file", "/store/"+dev+".qcow2"), el("backingStore"))
			}
		}
		if !settleLocal(dom) {
			t.Error("changed nothing")
		}
		dom.pretty()
		golden(t, filepath.Join("testdata/recovered", name+".local.out"), steady(dom.String(), source)+"\n")
		if settleLocal(dom) {
			t.Error("changed something the second time")
		}
		if left := remote(dom); len(left) > 0 {
			t.Errorf("remote: %q", left)
		}
	}
}

// Nothing that the tree does not know is lost.
func TestTreeKeepsAll(t *testing.T) {
	source, err := os.ReadFile("testdata/recovered/live.xml")
	if err != nil {
		t.Fatal(err)
	}
	a, err := parseTree(source)
	if err != nil {
		t.Fatal(err)
	}
	b, err := parseTree([]byte(a.String()))
	if err != nil {
		t.Fatal(err)
	}
	if a.String() != b.String() {
		t.Error("a tree differs from itself when written and read")
	}
	if got := b.at("qemu:commandline", "qemu:env").attr("value"); got != "a\nb" {
		t.Errorf("line end in an attribute became %q", got)
	}
	if !strings.Contains(a.String(), "<!-- the system -->") || !strings.Contains(a.String(), `passwd="a&lt;b"`) {
		t.Error("lost a comment or an escape")
	}
	c := a.clone()
	c.need("name").setText("other")
	if a.at("name").text() != "web" {
		t.Error("a clone shares with its original")
	}
}

func TestBadXML(t *testing.T) {
	for _, s := range []string{"", "<domain>", "<domain></x>", "<a/><b/>", "<domain/>", "<x/>", "<domain><os/></domain>",
		"<domain><os><type/></os></domain>", "<domain><os><type arch='x86_64'/></os><devices/></domain>",
		strings.Repeat("<a>", maxDepth+1), "<domain>&bogus;</domain>", "\x00", "<domain type='kvm'",
		"<domain><os><type arch='x86_64'/></os><devices><disk/></devices></domain>"} {
		_, _, err := recovered([]byte(s), variants()["host"], testFacts(t))
		if err == nil {
			t.Errorf("%.40q was taken", s)
		}
	}
	if _, err := parseTree(make([]byte, maxXML+1)); err == nil {
		t.Error("took a huge document")
	}
}

func FuzzRecovered(f *testing.F) {
	for _, p := range []string{"testdata/recovered/live.xml", "testdata/recovered/host.out", "testdata/recovered/server.out"} {
		data, err := os.ReadFile(p)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	host := facts{exists: func(string) bool { return false }, fit: func(p platform) (platform, []string, error) { return p, nil, nil }}
	vms := variants()
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, name := range slices.Sorted(maps.Keys(vms)) {
			dom, _, err := recovered(data, vms[name], host)
			if err != nil {
				continue
			}
			if _, err := parseDomain([]byte(dom.String())); err != nil {
				t.Fatalf("%s: what was written cannot be read: %v", name, err)
			}
			settleLocal(dom)
		}
	})
}

func TestFit(t *testing.T) {
	passthrough := el("cpu", "mode", "host-passthrough")
	for _, c := range []struct {
		name string
		want platform
		got  string // "kind machine emulator cpu-mode"
		note int
		err  string
	}{
		{"as it is", platform{"x86_64", "pc-q35-7.2", "kvm", "/usr/bin/kvm", passthrough}, "kvm pc-q35-7.2 /usr/bin/kvm host-passthrough", 0, ""},
		{"for kvm alone", platform{"x86_64", "pc-kvm-only-1", "kvm", "", nil}, "kvm pc-kvm-only-1  ", 0, ""},
		{"machine of another version", platform{"x86_64", "pc-q35-9.1", "kvm", "", nil}, "kvm q35  ", 1, ""},
		{"machine of a distribution", platform{"x86_64", "pc-i440fx-rhel7.6.0", "qemu", "", nil}, "qemu pc  ", 1, ""},
		{"no machine named", platform{"x86_64", "", "qemu", "", nil}, "qemu   ", 0, ""},
		{"no kvm", platform{"aarch64", "virt-8.0", "kvm", "/gone", passthrough}, "qemu virt /usr/bin/qemu-system-aarch64 maximum", 3, ""},
		{"no such machine", platform{"x86_64", "microvm", "kvm", "", nil}, "", 0, "microvm"},
		{"no such architecture", platform{"sparc", "", "kvm", "", nil}, "", 0, "sparc"},
		{"xen", platform{"x86_64", "pc", "xen", "", nil}, "qemu pc  ", 1, ""},
	} {
		p, notes, err := testFacts(t, "/gone").fit(c.want)
		if c.err != "" {
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		got := fmt.Sprintf("%s %s %s %s", p.kind, p.machine, p.emulator, p.cpu.attr("mode"))
		if err != nil || got != c.got || len(notes) != c.note {
			t.Errorf("%s: %q, %q, %v", c.name, got, notes, err)
		}
	}
}

func TestNBDSource(t *testing.T) {
	for uri, want := range map[string]string{
		nbdUnix:                         `<source protocol="nbd" name="vda"><host transport="unix" socket="/run/holdfast/s/nbd"/></source>`,
		nbdTCP:                          `<source protocol="nbd" name="sda"><host name="192.0.2.1" port="10809"/></source>`,
		"nbds://[2001:db8::1]:99/a%20b": `<source protocol="nbd" name="a b" tls="yes"><host name="2001:db8::1" port="99"/></source>`,
		"nbd://h/x":                     `<source protocol="nbd" name="x"><host name="h" port="10809"/></source>`,
		"nbd+unix:///x":                 "",
		"nbd+unix:///x?socket=relative": "",
		"http://h/x":                    "",
		"nbd+vsock://1/x":               "",
		"nbd:///x":                      "",
		"%":                             "",
	} {
		src, err := nbdSource(uri)
		if want == "" {
			if err == nil {
				t.Errorf("%s was taken", uri)
			}
			continue
		}
		if err != nil || src.String() != want {
			t.Errorf("%s: %s, %v", uri, src, err)
			continue
		}
		back, err := nbdURI(src)
		if err != nil {
			t.Errorf("%s: %v", uri, err)
		}
		if again, err := nbdSource(back); err != nil || again.String() != want {
			t.Errorf("%s became %s: %s, %v", uri, back, again, err)
		}
	}
	if _, err := nbdURI(el("source", "protocol", "rbd")); err == nil {
		t.Error("took an rbd disk for ours")
	}
}

func TestKept(t *testing.T) {
	for _, c := range []struct {
		before, now string
		want        bool
	}{
		{"", "", false}, {"", "10.0.0.2", true}, {"10.0.0.2", "10.0.0.2 fd00::2", true}, {"10.0.0.2 fd00::2", "10.0.0.2", false}, {"10.0.0.2", "", false},
	} {
		if got := kept(strings.Fields(c.before), strings.Fields(c.now)); got != c.want {
			t.Errorf("%q, %q: %v", c.before, c.now, got)
		}
	}
}

func TestBackingOf(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, data, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	h := &Host{addr: address{transport: "unix"}}
	over := filepath.Join(dir, "over.qcow2")
	if err := h.createOverlay(t.Context(), over, 1<<30, nbdUnix, "raw"); err != nil {
		t.Fatal(err)
	}
	if got, err := backingOf(over); err != nil || got != nbdUnix {
		t.Errorf("%q, %v", got, err)
	}
	d, w, err := h.CreateDisk(t.Context(), dir, "fresh", hypervisor.NewDisk{ID: "vda", Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := backingOf(d.Path); err != nil || got != "" || d.Format != "qcow2" {
		t.Errorf("%q, %v, %+v", got, err, d)
	}
	if _, w, err := h.CreateDisk(t.Context(), dir, "fresh", hypervisor.NewDisk{ID: "vda", Size: 1 << 20}); !errors.Is(err, hypervisor.ErrExist) || w != nil {
		t.Errorf("made over an existing one: %v, %v", w, err)
	}
	if _, w, err := h.CreateDisk(t.Context(), dir, "x", hypervisor.NewDisk{ID: "vda", Size: 1 << 20, Format: "vmdk"}); err == nil || w != nil {
		t.Errorf("made a vmdk: %v, %v", w, err)
	}
	for name, p := range map[string]string{
		"text":  write("text", []byte(strings.Repeat("no qcow2", 10))),
		"short": write("short", []byte("QFI\xfb")),
		"far":   write("far", append([]byte("QFI\xfb\x00\x00\x00\x03\xff"), make([]byte, 20)...)),
		"none":  filepath.Join(dir, "none"),
	} {
		if got, err := backingOf(p); err == nil {
			t.Errorf("%s: %q", name, got)
		}
	}
}

func TestStorageFits(t *testing.T) {
	h := &Host{addr: address{transport: "unix"}}
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for storage, need := range map[string]int64{"relative": 0, dir + "/none": 0, file: 0} {
		if err := h.storageFits(t.Context(), storage, need); err == nil {
			t.Errorf("%s was taken", storage)
		}
	}
	if os.Geteuid() == 0 {
		// QEMU cannot enter a private directory: said before anything is made.
		if _, _, ok := QEMUUser(); ok {
			if err := os.Chmod(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := h.storageFits(t.Context(), dir, 0); err == nil || !strings.Contains(err.Error(), "cannot enter") {
				t.Errorf("private directory: %v", err)
			}
		}
	}
	if err := h.storageFits(t.Context(), "/", 1<<60); err == nil || !strings.Contains(err.Error(), "too small") {
		t.Errorf("an exbibyte fits: %v", err)
	}
}
