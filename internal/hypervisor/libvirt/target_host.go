package libvirt

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	virt "github.com/digitalocean/go-libvirt"
)

// facts asks the host what it can run.
func (h *Host) facts(ctx context.Context) (facts, error) {
	s, err := call(ctx, h, "read the host's capabilities", func(l *virt.Libvirt) (string, error) { return l.ConnectGetCapabilities() })
	if err != nil {
		return facts{}, err
	}
	caps, err := parseTree([]byte(s))
	if err != nil {
		return facts{}, fmt.Errorf("host capabilities: %w", err)
	}
	f := facts{taps: !strings.HasSuffix(h.addr.path, "/session"), exists: h.exists}
	f.fit = func(want platform) (platform, []string, error) {
		got, notes, err := fit(caps, h.exists, want)
		if err != nil || got.cpu == nil || got.kind != "kvm" {
			return got, notes, err
		}
		return h.fitCPU(ctx, got, notes)
	}
	return f, nil
}

// exists reports whether a file is on the host; true when that cannot be told.
func (h *Host) exists(path string) bool {
	if !h.Local() {
		return true
	}
	_, err := os.Stat(path)
	return err == nil
}

// fit finds the nearest platform in the host's capabilities.
func fit(caps *element, exists func(string) bool, want platform) (platform, []string, error) {
	var notes []string
	got := want
	arch := archOf(caps, want.arch)
	if arch == nil {
		return got, nil, fmt.Errorf("this host cannot run a machine of architecture %q", want.arch)
	}
	kinds := arch.all("domain")
	if !slices.ContainsFunc(kinds, func(k *element) bool { return k.attr("type") == want.kind }) {
		if !slices.ContainsFunc(kinds, func(k *element) bool { return k.attr("type") == "qemu" }) {
			return got, nil, fmt.Errorf("this host has no QEMU for a domain of type %q", want.kind)
		}
		got.kind = "qemu"
		notes = append(notes, fmt.Sprintf("the host has no %s: the guest is emulated, which is slow", want.kind))
	}
	if got.kind == "qemu" && got.cpu != nil && (got.kind != want.kind || got.cpu.attr("mode") == "host-passthrough") {
		got.cpu = el("cpu", "mode", "maximum") // all that the emulator can do
	}
	if def := arch.at("emulator").text(); got.emulator != "" && !exists(got.emulator) && def != "" {
		notes = append(notes, fmt.Sprintf("emulator %s is not on the host: %s is used", got.emulator, def))
		got.emulator = def
	}
	if m, ok := machine(arch, got.kind, want.machine); !ok {
		return got, nil, fmt.Errorf("this host has nothing like the machine type %q", want.machine)
	} else if m != want.machine {
		notes = append(notes, fmt.Sprintf("machine type %s is not on the host: %s is used; some guests see it as new hardware", want.machine, m))
		got.machine = m
	}
	return got, notes, nil
}

func archOf(caps *element, name string) *element {
	for _, g := range caps.all("guest") {
		if a := g.at("arch"); g.at("os_type").text() == "hvm" && a.attr("name") == name {
			return a
		}
	}
	return nil
}

// machine finds a machine type: the very one, or the host's newest of its
// family. None asked for is the host's default.
func machine(arch *element, kind, want string) (string, bool) {
	if want == "" {
		return "", true
	}
	have := arch.all("machine")
	for _, k := range arch.all("domain") {
		if k.attr("type") == kind {
			have = append(have, k.all("machine")...)
		}
	}
	for _, m := range have {
		if m.text() == want || m.attr("canonical") == want {
			return want, true
		}
	}
	family := ""
	switch {
	case strings.Contains(want, "q35"):
		family = "q35"
	case strings.Contains(want, "i440fx") || want == "pc":
		family = "pc"
	case strings.HasPrefix(want, "virt"):
		family = "virt"
	case strings.HasPrefix(want, "pseries"):
		family = "pseries"
	case strings.HasPrefix(want, "s390-ccw-virtio"):
		family = "s390-ccw-virtio"
	}
	for _, m := range have {
		if m.text() == family {
			return family, true
		}
	}
	return "", false
}

// fitCPU replaces a processor model that the host's own cannot be.
func (h *Host) fitCPU(ctx context.Context, p platform, notes []string) (platform, []string, error) {
	if m := p.cpu.attr("mode"); m != "custom" && m != "" || p.cpu.at("model") == nil {
		return p, notes, nil
	}
	n, err := call(ctx, h, "compare processors", func(l *virt.Libvirt) (int32, error) {
		return l.ConnectCompareHypervisorCPU(optional(p.emulator), optional(p.arch), optional(p.machine), optional(p.kind), p.cpu.String(), 0)
	})
	if err != nil {
		// Old daemons and some architectures cannot tell: the start will.
		return p, notes, ctx.Err()
	}
	if virt.CPUCompareResult(n) == virt.CPUCompareIncompatible {
		notes = append(notes, fmt.Sprintf("processor model %s is not to be had on the host: the host's model is used", p.cpu.at("model").text()))
		p.cpu = el("cpu", "mode", "host-model")
	}
	return p, notes, nil
}

func optional(s string) virt.OptString {
	if s == "" {
		return nil
	}
	return virt.OptString{s}
}
