package libvirt

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	virt "github.com/digitalocean/go-libvirt"

	"holdfast/internal/hypervisor"
)

const (
	linkDown    = 2 * time.Second  // how long a link is down: long enough for a guest to notice
	addressWait = 30 * time.Second // how long a guest may take to get an address again
)

// noteNetwork remembers the guest's addresses, to be compared after the
// cut-over. A guest without an agent has none to remember.
func (h *Host) noteNetwork(ctx context.Context, d virt.Domain) {
	before, err := h.addresses(ctx, d)
	if err != nil || len(before) == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.before == nil {
		h.before = make(map[virt.UUID][]string)
	}
	h.before[d.UUID] = before
}

// Network compares the guest's addresses with those that it had before
// Migrate; where these are not known it wants one at least. When addresses are
// gone, its links are taken down and up again, as pulling and plugging the
// cable does, which makes the guest ask for an address anew.
func (h *Host) Network(ctx context.Context, id hypervisor.VMID) (string, error) {
	d, err := h.domain(ctx, id)
	if err != nil {
		return "", err
	}
	links, err := h.links(ctx, d)
	if err != nil {
		return "", err
	}
	if len(links) == 0 {
		return "no network interface is connected", nil
	}
	if state, _, err := h.state(ctx, d); err != nil {
		return "", err
	} else if state != hypervisor.Running {
		return "the guest does not run", nil
	}
	h.mu.Lock()
	before := h.before[d.UUID]
	h.mu.Unlock()
	// A bounce that died half-way left a link down.
	if err := h.setLinks(ctx, d, links, ""); err != nil {
		return "", err
	}
	now, err := h.addresses(ctx, d)
	if err != nil {
		return "", err
	}
	if kept(before, now) {
		return "connected: " + strings.Join(now, ", "), nil
	}
	if err := h.bounce(ctx, d, links); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, addressWait)
	defer cancel()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		if now, err := h.addresses(ctx, d); err == nil && kept(before, now) {
			return "connected after its links were taken down and up: " + strings.Join(now, ", "), nil
		}
		select {
		case <-ctx.Done():
			if len(before) == 0 {
				return "has no address, also after its links were taken down and up", nil
			}
			return "lost " + strings.Join(before, ", ") + ", also after its links were taken down and up", nil
		case <-tick.C:
		}
	}
}

// kept reports whether all addresses are there; when none are known, whether
// there is any.
func kept(before, now []string) bool {
	for _, a := range before {
		if !slices.Contains(now, a) {
			return false
		}
	}
	return len(now) > 0
}

// addresses asks the agent for the guest's addresses, loopback and link-local
// ones left out.
func (h *Host) addresses(ctx context.Context, d virt.Domain) ([]string, error) {
	var nics []struct {
		Name      string `json:"name"`
		Addresses []struct {
			Address string `json:"ip-address"`
		} `json:"ip-addresses"`
	}
	if err := h.agent(ctx, d, 5*time.Second, "guest-network-get-interfaces", nil, &nics); err != nil {
		return nil, err
	}
	var out []string
	for _, n := range nics {
		for _, a := range n.Addresses {
			ip, err := netip.ParseAddr(a.Address)
			if err != nil || ip.IsLoopback() || ip.IsLinkLocalUnicast() {
				continue
			}
			out = append(out, ip.String())
		}
	}
	slices.Sort(out)
	return out, nil
}

// links gives the running domain's interfaces whose link is up by its lasting
// configuration: an isolated guest has none.
func (h *Host) links(ctx context.Context, d virt.Domain) ([]*element, error) {
	lasting, err := h.domainXML(ctx, d, true)
	if err != nil {
		return nil, err
	}
	down := make(map[string]bool)
	for _, nic := range lasting.at("devices").all("interface") {
		down[nic.at("mac").attr("address")] = nic.at("link").attr("state") == "down"
	}
	live, err := h.domainXML(ctx, d, false)
	if err != nil {
		return nil, err
	}
	var out []*element
	for _, nic := range live.at("devices").all("interface") {
		if !down[nic.at("mac").attr("address")] {
			out = append(out, nic)
		}
	}
	return out, nil
}

// setLinks sets the links of the running domain, where they are otherwise;
// "" is up.
func (h *Host) setLinks(ctx context.Context, d virt.Domain, links []*element, state string) error {
	for _, nic := range links {
		if nic.at("link").attr("state") == state || state == "" && nic.at("link").attr("state") == "up" {
			continue
		}
		nic.dropAll("link")
		// Named, since libvirt 9.0 leaves a link down when none is given.
		nic.add(el("link", "state", map[bool]string{true: "up", false: state}[state == ""]))
		err := h.do(ctx, fmt.Sprintf("set the link of %s", nic.at("mac").attr("address")), func(l *virt.Libvirt) error {
			return l.DomainUpdateDeviceFlags(d, nic.String(), virt.DomainDeviceModifyLive)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// bounce takes the links down and up. Once down they come up, whatever
// becomes of ctx.
func (h *Host) bounce(ctx context.Context, d virt.Domain, links []*element) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	ctx, cancel := detached(ctx)
	defer cancel()
	down := h.setLinks(ctx, d, links, "down")
	if down == nil {
		time.Sleep(linkDown)
	}
	if err := h.setLinks(ctx, d, links, ""); err != nil {
		return err
	}
	return down
}
