package node

import (
	"errors"
	"strings"
	"testing"
	"time"

	"holdfast/internal/hypervisor"
	"holdfast/internal/recovery"
	"holdfast/internal/repo"
)

// points of four histories: web on two hosts, a VM made anew under its old
// name on its old host, and one that was renamed.
func somePoints() []repo.Point {
	at := func(hour int) time.Time { return time.Date(2026, 1, 2, hour, 0, 0, 0, time.UTC) }
	p := func(id, history, host, vm string, hour int) repo.Point {
		return repo.Point{ID: repo.PointID(id), History: repo.HistoryID(history), Host: host, VM: vm, Time: at(hour)}
	}
	return []repo.Point{
		p("aaaa1111", "h1", "qemu:///system", "web", 1),
		p("aaaa2222", "h2", "/images", "web", 2),
		p("bbbb1111", "h3", "qemu:///system", "db", 3),
		p("bbbb2222", "h4", "qemu:///system", "db", 4), // made anew
		p("cccc1111", "h5", "qemu:///system", "old", 5),
		p("dddd1111", "h5", "qemu:///system", "new", 6), // renamed
		p("eeee1111", "h1", "qemu:///system", "web", 7),
		p("1234abcd", "h6", "/images", "cafe", 8), // a name of hex digits
	}
}

func TestFindPoint(t *testing.T) {
	for _, c := range []struct {
		spec, id string
		usage    bool
		says     string
	}{
		{spec: "aaaa1", id: "aaaa1111"},
		{spec: "1234", id: "1234abcd"},
		{spec: "aaaa", usage: true, says: "aaaa1111, aaaa2222"},
		{spec: "123", usage: true, says: "at least 4 digits"},
		{spec: "ffff", says: "no such restore point"},
		{spec: "", says: "no such restore point"},
		{spec: "web", usage: true, says: "web@latest"},
		{spec: "cafe", usage: true, says: "cafe@latest"},
		{spec: "nothing", says: "no such restore point"},
		{spec: "web@latest", usage: true, says: "/images/web, qemu:///system/web"},
		{spec: "qemu:///system/web@latest", id: "eeee1111"},
		{spec: "/images/web@latest", id: "aaaa2222"},
		{spec: "db@latest", id: "bbbb2222"},
		{spec: "new@latest", id: "dddd1111"},
		{spec: "old@latest", id: "dddd1111"}, // its VM has another name now
		{spec: "gone@latest", says: "no such restore point"},
		{spec: "web@yesterday", usage: true, says: "latest"},
	} {
		p, err := findPoint(somePoints(), c.spec)
		if string(p.ID) != c.id || (err == nil) != (c.id != "") {
			t.Errorf("%q: %s, %v, want %s", c.spec, p.ID, err, c.id)
			continue
		}
		if err == nil {
			continue
		}
		if _, usage := errors.AsType[*UsageError](err); usage != c.usage || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q: %v (wrong usage: %v), want %q (%v)", c.spec, err, usage, c.says, c.usage)
		}
	}
}

// A name that some VM has now does not mean one that had it before.
func TestFormerName(t *testing.T) {
	points := append(somePoints(), repo.Point{ID: "ffff1111", History: "h7", Host: "/images", VM: "old"})
	p, err := findPoint(points, "old@latest")
	if err != nil || p.ID != "ffff1111" {
		t.Errorf("%s, %v", p.ID, err)
	}
}

func TestChoose(t *testing.T) {
	all := []hypervisor.VM{{ID: "1", Name: "a", Host: "h"}, {ID: "2", Name: "b", Host: "h"}, {ID: "3", Name: "b", Host: "h"}}
	vms, unknown, err := choose(all, "h", nil)
	if len(vms) != 3 || len(unknown) != 0 || err != nil {
		t.Errorf("all: %v, %v, %v", vms, unknown, err)
	}
	vms, unknown, err = choose(all, "h", []string{"a", "gone", "h/a", "3"})
	if len(vms) != 2 || vms[0].ID != "1" || vms[1].ID != "3" || len(unknown) != 1 || err != nil {
		t.Errorf("some: %v, %v, %v", vms, unknown, err)
	}
	if _, _, err = choose(all, "h", []string{"b"}); err == nil || !strings.Contains(err.Error(), "2, 3") {
		t.Errorf("ambiguous: %v", err)
	}
}

func TestFileName(t *testing.T) {
	for _, c := range []struct{ kind, id, was, asked, name string }{
		{"libvirt", "vda", "qcow2", "", "vda.qcow2"},
		{"libvirt", "vda", "qcow2", "raw", "vda.raw"},
		{"libvirt", "vda", "raw", "", "vda.raw"},
		{"folder", "web.raw", "raw", "", "web.raw"},
		{"folder", "web.raw", "raw", "qcow2", "web.qcow2"},
		{"folder", "web.img", "raw", "raw", "web.img"},
		{"folder", "web.img", "qcow2", "", "web.img"},
		{"folder", "web.img", "qcow2", "raw", "web.raw"},
		{"folder", "disk", "qcow2", "", "disk.qcow2"},
		{"folder", "web.vhdx", "vhdx", "", "web.vhdx"},
		{"folder", "web.vhdx", "vhdx", "vhdx-fixed", "web.vhdx"},
		{"folder", "web.vhdx", "vhdx", "vmdk-stream", "web.vmdk"},
		{"libvirt", "vda", "qcow2", "vhd-fixed", "vda.vhd"},
	} {
		d := repo.Disk{ID: c.id, Format: c.was}
		o, err := outputOf(fileFormat(d, c.asked))
		if got := fileName(repo.Point{Kind: c.kind}, d, o); got != c.name || err != nil {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

func TestUndoPlan(t *testing.T) {
	i := recovery.Info{Record: recovery.Record{
		Kind: recovery.Recovery, Name: "web", Host: "qemu:///system", NVRAM: "/s/nvram", Writes: recovery.ServerOverlay,
		Disks: []recovery.Disk{{Files: []string{"/s/a", "/s/b"}}}, Point: "1234",
	}}
	i.Publication.Listen = []string{"unix:/run/x"}
	plan := strings.Join(UndoPlan(i), "\n")
	for _, want := range []string{"VM web on qemu:///system", "/s/a", "/s/b", "/s/nvram", "unix:/run/x", "1234", "written since"} {
		if !strings.Contains(plan, want) {
			t.Errorf("the plan lacks %q:\n%s", want, plan)
		}
	}
}
