package libvirt

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"testing"
	"time"

	"holdfast/internal/hypervisor"
)

func TestParseAddress(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", "/run/user/7")
	for _, c := range []struct {
		uri  string
		want address
		err  string
	}{
		{uri: "qemu:///system", want: address{transport: "unix", socket: "/run/libvirt/libvirt-sock", path: "/system"}},
		{uri: "qemu:///session", want: address{transport: "unix", socket: "/run/user/7/libvirt/libvirt-sock", path: "/session"}},
		{uri: "qemu+unix:///system?socket=/x/y", want: address{transport: "unix", socket: "/x/y", path: "/system"}},
		{uri: "qemu+tcp://h:99/system", want: address{transport: "tcp", host: "h", port: "99", path: "/system"}},
		{uri: "qemu+tls://h/system?pkipath=/p&no_verify=1", want: address{transport: "tls", host: "h", path: "/system", pki: "/p", noVerify: true}},
		{uri: "qemu://h/system", want: address{transport: "tls", host: "h", path: "/system"}},
		{uri: "qemu+ssh://u@h:22/system?keyfile=/k", want: address{transport: "ssh", host: "h", port: "22", user: "u", keyfile: "/k", path: "/system"}},
		{uri: "qemu+ssh:///system", err: "host missing"},
		{uri: "qemu+unix://h/system", err: "takes no host"},
		{uri: "qemu+libssh2://h/system", err: "not supported"},
		{uri: "xen:///system", err: "only the qemu driver"},
		{uri: "qemu:///embed", err: "/system or /session"},
		{uri: "qemu+ssh://-oProxyCommand=x/system", err: "hyphen"},
	} {
		u, err := url.Parse(c.uri)
		if err != nil {
			t.Fatal(err)
		}
		got, err := parseAddress(u)
		switch {
		case c.err != "":
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%s: %v, want %q", c.uri, err, c.err)
			}
		case err != nil:
			t.Errorf("%s: %v", c.uri, err)
		case got != c.want && !strings.HasSuffix(got.socket, "virtqemud-sock"):
			t.Errorf("%s: %+v, want %+v", c.uri, got, c.want)
		}
	}
}

func TestAgentOptions(t *testing.T) {
	for line, want := range map[string][2]string{
		"/usr/sbin/qemu-ga":                                                {"", defaultConf},
		"/usr/sbin/qemu-ga -F":                                             {defaultHook, defaultConf},
		"/usr/sbin/qemu-ga -F/h":                                           {"/h", defaultConf},
		"/usr/sbin/qemu-ga -dF/h":                                          {"/h", defaultConf},
		"/usr/sbin/qemu-ga --fsfreeze-hook":                                {defaultHook, defaultConf},
		"/usr/sbin/qemu-ga -p /dev/F --fsfreeze-hook=/h":                   {"/h", defaultConf},
		"/usr/sbin/qemu-ga -m virtio-serial -p -F":                         {"", defaultConf},
		"/usr/bin/qemu-ga --method=virtio-serial --blacklist=a -c /c -F/h": {"/h", "/c"},
		"/usr/bin/qemu-ga --config=/c -l/F":                                {"", "/c"},
		"/usr/bin/qemu-ga --config":                                        {"", ""},
	} {
		hook, conf := agentOptions(strings.Fields(line))
		if hook != want[0] || conf != want[1] {
			t.Errorf("%s: hook %q, conf %q; want %q", line, hook, conf, want)
		}
	}
	conf := "# x\n[general]\ndaemon = true\nfsfreeze-hook = /etc/h\n[other]\nfsfreeze-hook=/no\n"
	if got := confHook(conf); got != "/etc/h" {
		t.Errorf("hook in a configuration file: %q", got)
	}
	if got := confHook("[other]\nfsfreeze-hook=/no\n"); got != "" {
		t.Errorf("hook outside [general]: %q", got)
	}
}

const someDomain = `<domain type='kvm' id='3' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>web</name><uuid>6c3f3c49-9e32-4d9b-8a4c-3a8f1f1b1a11</uuid><memory unit='GiB'>8</memory><vcpu>8</vcpu>
<os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type><loader readonly='yes'>/code.fd</loader><nvram template='/t'>/nv.fd</nvram></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/i/a.qcow2' index='4'/><target dev='vda' bus='virtio'/><boot order='1'/></disk>
<disk type='block' device='disk'><source dev='/dev/vg/b'/><target dev='vdb' bus='virtio'/></disk>
<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='rbd' name='pool/c'/><target dev='vdc'/></disk>
<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/><source pool='p' volume='d'/><target dev='vdd'/></disk>
<disk type='file' device='cdrom'><source file='/i/x.iso'/><target dev='sda' bus='sata'/><readonly/></disk>
<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>
<disk type='file' device='disk'><source file='/i/ro'/><target dev='sdc'/><readonly/></disk>
<disk type='file' device='disk'><source file='/i/sh'/><target dev='sdd'/><shareable/></disk>
<disk type='file' device='disk'><source file='/i/tr'/><target dev='sde'/><transient/></disk>
<disk type='vhostuser' device='disk'><source type='unix' path='/s'/><target dev='sdf'/></disk>
<disk type='file' device='lun'><target dev='sdg'/></disk>
<controller type='scsi' index='0' model='virtio-scsi'/><controller type='usb' index='0'/>
<interface type='network'><source network='default'/></interface><hostdev mode='subsystem' type='pci'/><tpm model='tpm-crb'/>
</devices><qemu:commandline><qemu:arg value='-x'/></qemu:commandline></domain>`

func TestDisks(t *testing.T) {
	dom, err := parseDomain([]byte(someDomain))
	if err != nil {
		t.Fatal(err)
	}
	want := []struct {
		id, format, path, excluded string
	}{
		{"vda", "qcow2", "/i/a.qcow2", ""}, {"vdb", "raw", "/dev/vg/b", ""}, {"vdc", "raw", "rbd:pool/c", ""}, {"vdd", "qcow2", "p/d", ""},
		{"sda", "raw", "/i/x.iso", "cdrom"}, {"sdb", "raw", "", "cdrom"}, {"sdc", "raw", "/i/ro", "read-only"},
		{"sdd", "raw", "/i/sh", "shared"}, {"sde", "raw", "/i/tr", "transient"}, {"sdf", "raw", "", "type vhostuser"}, {"sdg", "raw", "", "empty"},
	}
	got := disks(dom)
	if len(got) != len(want) {
		t.Fatalf("%d disks", len(got))
	}
	for i, w := range want {
		g := got[i]
		if string(g.ID) != w.id || g.Format != w.format || g.Path != w.path || (w.excluded == "") != (g.Excluded == "") || !strings.HasPrefix(g.Excluded, w.excluded) {
			t.Errorf("disk %d: %+v, want %+v", i, g.Disk, w)
		}
	}
	if got[0].node != "libvirt-4-format" || got[0].file != "/i/a.qcow2" || got[1].file != "" {
		t.Errorf("nodes and files: %+v", got[:2])
	}
}

// TestShell: what is started over a stopped guest's disks has nothing else of
// the guest.
func TestShell(t *testing.T) {
	dom, err := parseDomain([]byte(someDomain))
	if err != nil {
		t.Fatal(err)
	}
	s := shellXML(dom, "holdfast-a-b-c")
	x := s.String()
	for _, no := range []string{"nvram", "loader", "firmware", "interface", "hostdev", "tpm", "usb", "cdrom", "commandline", "GiB", "boot", "/i/sh", "id="} {
		if strings.Contains(x, no) {
			t.Errorf("%q is in %s", no, x)
		}
	}
	if n := len(s.at("devices").all("disk")); n != 4 {
		t.Errorf("%d disks", n)
	}
	again, err := parseDomain([]byte(x))
	if err != nil || shellOf(again) != "holdfast-a-b-c" {
		t.Errorf("owner %q, %v", shellOf(again), err)
	}
	if shellOf(dom) != "" {
		t.Error("a guest is taken for a shell")
	}
}

func TestParseOwned(t *testing.T) {
	o := hypervisor.Owner{Repository: "0123456789abcdef", History: "fedcba9876543210", Session: "00ff00ff"}
	for _, name := range []string{o.Owned(), o.Owned() + ".sock", o.Owned() + "-vda.scratch"} {
		got, ok := parseOwned(name)
		if !ok || got != (hypervisor.Owner{Repository: "01234567", History: "fedcba98", Session: "00ff00ff"}) {
			t.Errorf("%s: %+v, %v", name, got, ok)
		}
	}
	for _, name := range []string{"", "nightly", "holdfast", "holdfast-a", "holdfast-a-b", "holdfast-a-b-", "holdfast-a-b-xyz", "xholdfast-a-b-c"} {
		if got, ok := parseOwned(name); ok {
			t.Errorf("%q: %+v", name, got)
		}
	}
}

// TestBitmapState: what QEMU says of bitmaps decides between a list of changes
// and reading everything.
func TestBitmapState(t *testing.T) {
	n := blockNode{Name: "libvirt-1-format"}
	n.Bitmaps = append(n.Bitmaps, struct {
		Name         string `json:"name"`
		Inconsistent bool   `json:"inconsistent"`
		Persistent   bool   `json:"persistent"`
	}{Name: "good"}, struct {
		Name         string `json:"name"`
		Inconsistent bool   `json:"inconsistent"`
		Persistent   bool   `json:"persistent"`
	}{Name: "bad", Inconsistent: true})
	nodes := map[string]blockNode{n.Name: n}
	v := vdisk{node: n.Name}
	for bitmap, want := range map[string]string{"good": "", "bad": "inconsistent", "gone": "missing", "": "new since"} {
		if got := bitmapState(v, nodes, bitmap); (got == "") != (want == "") || !strings.Contains(got, want) {
			t.Errorf("bitmap %q: %q, want %q", bitmap, got, want)
		}
	}
	if got := bitmapState(vdisk{node: "other"}, nodes, "good"); got == "" {
		t.Error("a disk that QEMU does not show is tracked")
	}
	n.Image.Specific.Data.Compat = "0.10"
	nodes[n.Name] = n
	v.Format = "qcow2"
	if got := trackable(v, nodes); !strings.Contains(got, "version 2") {
		t.Errorf("qcow2 of version 2: %q", got)
	}
}

// TestLost: a daemon that goes away, or sends nonsense, is ErrLost and no hang.
func TestLost(t *testing.T) {
	for name, serve := range map[string]func(net.Conn){
		"hangs up":       func(c net.Conn) {},
		"sends nonsense": func(c net.Conn) { c.Write(binary.BigEndian.AppendUint32(nil, 1<<31)) },
		"is too short":   func(c net.Conn) { c.Write(binary.BigEndian.AppendUint32(nil, 4)) },
	} {
		t.Run(name, func(t *testing.T) {
			sock := t.TempDir() + "/s"
			l, err := net.Listen("unix", sock)
			if err != nil {
				t.Skipf("no Unix sockets: %v", err)
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				io.ReadFull(c, make([]byte, 28))
				serve(c)
			}()
			_, err = Open(t.Context(), "qemu+unix:///system?socket="+sock, Options{})
			if !errors.Is(err, ErrLost) {
				t.Errorf("open: %v", err)
			}
			l.Close()
			<-done
		})
	}
}

// TestHung: a daemon that does not answer holds nobody beyond the context.
func TestHung(t *testing.T) {
	sock := t.TempDir() + "/s"
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Skipf("no Unix sockets: %v", err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := Open(ctx, "qemu+unix:///system?socket="+sock, Options{}); err == nil {
		t.Error("opened")
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("gave up after %s", took)
	}
}
