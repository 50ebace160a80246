package libvirt

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/internal/hypervisor"
	"holdfast/test/lab"
)

// A guest that is off is migrated as well, and is off afterwards; one that has
// lost its address gets it back.
func TestMigrateStopped(t *testing.T) {
	r := recoverGuest(t, true)
	ctx := t.Context()
	if err := lab.Poll(ctx, 2*time.Minute, "the guest has an address", func() (bool, error) {
		return r.exec("ip -4 -o addr show dev eth0") != "", nil
	}); err != nil {
		t.Fatal(err)
	}
	before, err := r.h.Network(ctx, r.id)
	if err != nil || !strings.HasPrefix(before, "connected: 10.0.2.") {
		t.Fatalf("network: %q, %v", before, err)
	}
	r.exec("ip addr flush dev eth0 scope global")
	after, err := r.h.Network(ctx, r.id)
	if err != nil || after != "connected after its links were taken down and up: "+strings.TrimPrefix(before, "connected: ") {
		t.Errorf("network: %q, %v", after, err)
	}
	r.exec("echo kept >/root/mark; sync")
	if err := r.h.Stop(ctx, r.id); err != nil {
		t.Fatal(err)
	}
	if err := r.h.Migrate(ctx, r.id, r.storage, nil); err != nil {
		t.Fatal(err)
	}
	if he := r.health(); he.State != hypervisor.Stopped {
		t.Errorf("it was off and is %s", he.State)
	}
	r.p.kill()
	file := hypervisor.DiskPath(r.storage, r.vm.Owner.DiskName(r.vm.Name, "vda"), "")
	if b, err := backingOf(file); err != nil || b != "" {
		t.Errorf("backing %q, %v", b, err)
	}
	if err := r.h.Start(ctx, r.id); err != nil {
		t.Fatal(err)
	}
	if err := r.g.WaitAgent(ctx, 5*time.Minute); err != nil {
		t.Fatal(err)
	}
	if got := r.exec("cat /root/mark"); got != "kept\n" {
		t.Errorf("read %q", got)
	}
}

// blank recovers a guest that boots nothing, for what needs no operating
// system. change edits the plan.
func blank(t *testing.T, change func(*hypervisor.NewVM)) (*Host, hypervisor.NewVM, hypervisor.VMID) {
	t.Helper()
	lab.Beside(t)
	ctx := t.Context()
	h, storage := openHost(t), lab.Storage(t)
	original := lab.Start(t, lab.Options{Stopped: true, Blank: true})
	config, err := lab.Virsh(ctx, "dumpxml", "--inactive", original.Name)
	if err != nil {
		t.Fatal(err)
	}
	vm := hypervisor.NewVM{
		Name: original.Name + "-back", Kind: Kind, NewIdentity: true,
		Config: []hypervisor.File{{Name: "domain.xml", Data: []byte(config)}},
		Owner:  hypervisor.Owner{Repository: hexID(), History: hexID(), Session: hexID()},
	}
	d, w, err := h.CreateDisk(ctx, storage, "disk", hypervisor.NewDisk{ID: "vda", Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	vm.Disks = []hypervisor.NewDisk{d}
	change(&vm)
	id, err := h.CreateVM(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if err := errors.Join(h.Stop(ctx, id), h.DeleteVM(ctx, id)); err != nil {
			t.Error(err)
		}
	})
	return h, vm, id
}

// An isolated guest has its interface and no connection, by libvirt's and by
// QEMU's own word.
func TestIsolated(t *testing.T) {
	h, vm, id := blank(t, func(vm *hypervisor.NewVM) { vm.Isolated = true })
	ctx := t.Context()
	if err := h.Start(ctx, id); err != nil {
		t.Fatal(err)
	}
	d, err := h.domain(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	dom, err := h.domainXML(ctx, d, false)
	if err != nil {
		t.Fatal(err)
	}
	nics := dom.at("devices").all("interface")
	if len(nics) != 1 || nics[0].attr("type") != "ethernet" || nics[0].at("link").attr("state") != "down" {
		t.Fatalf("interfaces: %v", nics)
	}
	tap := nics[0].at("target").attr("dev")
	if _, err := os.Lstat(filepath.Join("/sys/class/net", tap)); err != nil {
		t.Errorf("tap: %v", err)
	}
	if m, err := os.Readlink(filepath.Join("/sys/class/net", tap, "master")); err == nil {
		t.Errorf("%s is on a bridge: %s", tap, m)
	}
	var nets []struct {
		MAC string `json:"main-mac"`
	}
	if err := h.monitor(ctx, d, "query-rx-filter", nil, &nets); err != nil || len(nets) != 1 || nets[0].MAC != nics[0].at("mac").attr("address") {
		t.Errorf("QEMU's interfaces: %+v, %v", nets, err)
	}
	if note, err := h.Network(ctx, id); err != nil || note != "no network interface is connected" {
		t.Errorf("network: %q, %v", note, err)
	}
	if dom.at("name").text() != vm.Name {
		t.Error("another domain")
	}
}

// Firmware variables come back, and go with the VM.
func TestNVRAM(t *testing.T) {
	code, vars := "/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"
	data, err := os.ReadFile(vars)
	if err != nil {
		t.Skipf("SKIPPED: needs Debian's ovmf: %v", err)
	}
	var nvram string
	h, _, id := blank(t, func(vm *hypervisor.NewVM) {
		nvram = filepath.Join(filepath.Dir(vm.Disks[0].Path), "vars.fd")
		xml := strings.Replace(string(vm.Config[0].Data), "</type>", "</type><loader readonly='yes' type='pflash'>"+code+"</loader><nvram>/nowhere/old.fd</nvram>", 1)
		vm.Config = []hypervisor.File{{Name: "domain.xml", Data: []byte(xml)}, {Name: "nvram", Data: data}}
		vm.NVRAM = nvram
	})
	ctx := t.Context()
	if got, err := os.ReadFile(nvram); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("variables: %v", err)
	}
	if err := h.Start(ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := h.Stop(ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := h.DeleteVM(ctx, id); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(nvram); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("variables are left: %v", err)
	}
}

// Nothing foreign is deleted, and what is refused leaves nothing.
func TestForeign(t *testing.T) {
	lab.Beside(t)
	ctx := t.Context()
	h, storage := openHost(t), lab.Storage(t)
	g := lab.Start(t, lab.Options{Stopped: true, Blank: true})
	if err := h.DeleteVM(ctx, hypervisor.VMID(g.UUID)); err == nil || !strings.Contains(err.Error(), "not made by Holdfast") {
		t.Errorf("deleted a foreign VM: %v", err)
	}
	if err := h.Migrate(ctx, hypervisor.VMID(g.UUID), storage, nil); err == nil {
		t.Error("migrated a foreign VM")
	}
	config, err := lab.Virsh(ctx, "dumpxml", "--inactive", g.Name)
	if err != nil {
		t.Fatal(err)
	}
	vm := hypervisor.NewVM{Name: g.Name, Config: []hypervisor.File{{Name: "domain.xml", Data: []byte(config)}, {Name: "nvram", Data: []byte("x")}},
		Disks: []hypervisor.NewDisk{{ID: "vda", Size: 1 << 20, Path: filepath.Join(storage, "none.qcow2"), Format: "qcow2"}}, Owner: testOwner}
	if _, err := h.Preflight(ctx, vm, storage, 0); !errors.Is(err, hypervisor.ErrExist) {
		t.Errorf("same name: %v", err)
	}
	vm.Name += "-back"
	if _, err := h.Preflight(ctx, vm, storage, 0); !errors.Is(err, hypervisor.ErrExist) {
		t.Errorf("same UUID: %v", err)
	}
	vm.NewIdentity = true
	if _, err := h.Preflight(ctx, vm, storage, 1<<60); err == nil {
		t.Error("an exbibyte fits")
	}
	if _, err := h.Preflight(ctx, vm, storage, 0); err != nil {
		t.Error(err)
	}
	// A domain that libvirt refuses: its variable store goes, too.
	vm.NVRAM = filepath.Join(storage, "vars.fd")
	vm.Config[0].Data = []byte(strings.Replace(config, "<on_crash>destroy", "<on_crash>nonsense", 1))
	if _, err := h.CreateVM(ctx, vm); err == nil {
		t.Error("defined nonsense")
	}
	if left, err := os.ReadDir(storage); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
	none := hypervisor.VMID(newUUID())
	if err := errors.Join(h.Stop(ctx, none), h.DeleteVM(ctx, none), h.RemoveDisk(ctx, filepath.Join(storage, "none"))); err != nil {
		t.Errorf("removing what is not there: %v", err)
	}
	if _, err := h.Health(ctx, none); !errors.Is(err, hypervisor.ErrNotExist) {
		t.Errorf("health of none: %v", err)
	}
}

// Files of a host that is another machine go through a storage pool, which is
// not left behind.
func TestRemoteFiles(t *testing.T) {
	lab.Beside(t)
	ctx := t.Context()
	h, storage := openHost(t), lab.Storage(t)
	h.addr.transport = "remote" // its files are not ours, so to speak
	pools, err := lab.Virsh(ctx, "pool-list", "--all", "--name")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.storageFits(ctx, storage, 1<<20); err != nil {
		t.Error(err)
	}
	if err := h.storageFits(ctx, storage, 1<<60); err == nil {
		t.Error("an exbibyte fits")
	}
	if err := h.storageFits(ctx, storage+"/none", 0); err == nil {
		t.Error("a directory that is not there was taken")
	}
	d, w, err := h.CreateDisk(ctx, storage, "over", hypervisor.NewDisk{ID: "vda", Size: 1 << 40, Served: nbdTCP})
	if err != nil || w != nil {
		t.Fatal(err)
	}
	if b, err := backingOf(d.Path); err != nil || b != nbdTCP {
		t.Errorf("backing %q, %v", b, err)
	}
	if _, _, err := h.CreateDisk(ctx, storage, "over", hypervisor.NewDisk{ID: "vda", Size: 1 << 40, Served: nbdTCP}); !errors.Is(err, hypervisor.ErrExist) {
		t.Errorf("made twice: %v", err)
	}
	if _, _, err := h.CreateDisk(ctx, storage, "whole", hypervisor.NewDisk{ID: "vda", Size: 1 << 20}); err == nil {
		t.Error("wrote a whole disk to another machine")
	}
	for range 2 {
		if err := h.RemoveDisk(ctx, d.Path); err != nil {
			t.Error(err)
		}
	}
	if left, err := os.ReadDir(storage); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
	if now, err := lab.Virsh(ctx, "pool-list", "--all", "--name"); err != nil || now != pools {
		t.Errorf("pools were %q and are %q", pools, now)
	}
}
