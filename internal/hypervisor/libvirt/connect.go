package libvirt

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	virt "github.com/digitalocean/go-libvirt"

	"holdfast/internal/hypervisor"
)

// Kind is what a VM of this package has in hypervisor.VM.Kind.
const Kind = "libvirt"

var (
	// ErrLost means that the connection to the libvirt daemon broke. What was
	// under way there may or may not have happened.
	ErrLost = errors.New("connection to libvirt lost")
	// ErrAgent means that the guest agent is absent or did not answer in time.
	ErrAgent = errors.New("guest agent does not answer")
)

// Options of Open. The zero value works.
type Options struct {
	// Guard is called before a guest is frozen. It arranges, in another
	// process, for Thaw(uri, uuid) to be run when limit has passed or when
	// this process dies, whichever is first, unless release was called. Nil:
	// only this process watches over the limit.
	Guard func(ctx context.Context, uri, uuid string, limit time.Duration) (release func() error, err error)
}

// Host is a connection to one libvirt daemon. It is a hypervisor.Source and a
// hypervisor.Target. Methods may run in parallel; Close may not run beside
// any. A connection that broke stays broken: every call answers ErrLost.
type Host struct {
	uri  string // as the operator gave it
	addr address
	o    Options
	l    *virt.Libvirt
	wire *wire
	// calls counts RPCs under way, those whose caller gave up included.
	calls sync.WaitGroup

	mu     sync.Mutex             // guards what follows
	before map[virt.UUID][]string // addresses of guests before their migration
}

// Open connects to the daemon of a libvirt URI: qemu:///system,
// qemu:///session, qemu+unix:///system?socket=PATH, qemu+tcp://, qemu+tls://
// and qemu+ssh://[USER@]HOST[:PORT]/system, with libvirt's own parameters
// socket, keyfile, pkipath and no_verify.
func Open(ctx context.Context, uri string, o Options) (*Host, error) {
	u, err := url.Parse(uri)
	if err != nil {
		return nil, fmt.Errorf("libvirt URI: %w", err)
	}
	a, err := parseAddress(u)
	if err != nil {
		return nil, err
	}
	c, err := a.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", uri, err)
	}
	h := &Host{uri: uri, addr: a, o: o, wire: newWire(c)}
	h.l = virt.NewWithDialer(h.wire)
	err = h.do(ctx, "connect to "+uri, func(l *virt.Libvirt) error { return l.ConnectToURI(virt.RemoteURI(u)) })
	if err != nil {
		return nil, errors.Join(err, h.Close())
	}
	return h, nil
}

// URI is what Open was given.
func (h *Host) URI() string { return h.uri }

// Local reports whether the host's files are this machine's files.
func (h *Host) Local() bool { return h.addr.transport == "unix" }

// Close ends the connection; calls under way return ErrLost.
func (h *Host) Close() error {
	// Not (*virt.Libvirt).Disconnect: it sends a last request and waits for
	// its answer, for ever when the daemon hangs. Closing the socket does the
	// same to the daemon.
	err := h.wire.Close()
	h.calls.Wait()
	return err
}

// call runs one RPC, f, and waits for it or for the end of ctx. The RPC itself
// cannot be withdrawn: when ctx ends first it may still take place. So calls
// that change something which must be undone run under a context of their own.
func call[T any](ctx context.Context, h *Host, what string, f func(*virt.Libvirt) (T, error)) (T, error) {
	type result struct {
		v   T
		err error
	}
	var none T
	if err := ctx.Err(); err != nil {
		return none, fmt.Errorf("%s: %w", what, err)
	}
	done := make(chan result, 1)
	h.calls.Go(func() {
		v, err := f(h.l)
		done <- result{v, err}
	})
	select {
	case r := <-done:
		if r.err != nil {
			return none, fmt.Errorf("%s: %w", what, h.explain(r.err))
		}
		return r.v, nil
	case <-ctx.Done():
		return none, fmt.Errorf("%s: %w", what, context.Cause(ctx))
	}
}

// do is call for an RPC without a result.
func (h *Host) do(ctx context.Context, what string, f func(*virt.Libvirt) error) error {
	_, err := call(ctx, h, what, func(l *virt.Libvirt) (struct{}, error) { return struct{}{}, f(l) })
	return err
}

// explain turns what the RPC library returns on a broken connection (several
// different errors) into ErrLost.
func (h *Host) explain(err error) error {
	var ve virt.Error
	if errors.As(err, &ve) {
		return err
	}
	if cause := h.wire.lost(); cause != nil {
		return fmt.Errorf("%w: %w", ErrLost, cause)
	}
	return err
}

// is reports whether err is libvirt's error of one of these numbers.
func is(err error, codes ...virt.ErrorNumber) bool {
	var ve virt.Error
	if !errors.As(err, &ve) {
		return false
	}
	for _, c := range codes {
		if ve.Code == uint32(c) {
			return true
		}
	}
	return false
}

// domain looks a VM up. It returns hypervisor.ErrNotExist if there is none.
func (h *Host) domain(ctx context.Context, id hypervisor.VMID) (virt.Domain, error) {
	u, err := parseUUID(string(id))
	if err != nil {
		return virt.Domain{}, err
	}
	d, err := call(ctx, h, "look up VM "+string(id), func(l *virt.Libvirt) (virt.Domain, error) { return l.DomainLookupByUUID(u) })
	if is(err, virt.ErrNoDomain) {
		return d, fmt.Errorf("%w: %s on %s", hypervisor.ErrNotExist, id, h.uri)
	}
	return d, err
}

// parseUUID takes the usual form, with or without hyphens.
func parseUUID(s string) (virt.UUID, error) {
	var u virt.UUID
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != len(u) {
		return u, fmt.Errorf("%w: %q is not a UUID", hypervisor.ErrNotExist, s)
	}
	copy(u[:], b)
	return u, nil
}

func formatUUID(u virt.UUID) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16])
}

// agent runs a command of the guest agent and decodes its answer into out,
// which may be nil. limit, at least a second, bounds the wait for the answer;
// no answer, and no agent, is ErrAgent. A command that the agent refuses is
// another error.
func (h *Host) agent(ctx context.Context, d virt.Domain, limit time.Duration, cmd string, args, out any) error {
	q := map[string]any{"execute": cmd}
	if args != nil {
		q["arguments"] = args
	}
	b, err := json.Marshal(q)
	if err != nil {
		return err
	}
	secs := int32(max(1, limit/time.Second))
	// libvirt keeps the limit for the answer, but it first waits for whatever
	// else talks to this agent.
	ctx, cancel := context.WithTimeoutCause(ctx, limit+5*time.Second, fmt.Errorf("%w within %s", ErrAgent, limit))
	defer cancel()
	r, err := call(ctx, h, "guest agent: "+cmd, func(l *virt.Libvirt) (virt.OptString, error) {
		return l.QEMUDomainAgentCommand(d, string(b), secs, 0)
	})
	if is(err, virt.ErrAgentUnresponsive, virt.ErrAgentUnsynced, virt.ErrAgentCommandTimeout, virt.ErrArgumentUnsupported, virt.ErrConfigUnsupported) {
		return fmt.Errorf("%w: %w", ErrAgent, err)
	}
	if err != nil || out == nil {
		return err
	}
	if len(r) == 0 {
		return fmt.Errorf("guest agent: %s: empty answer", cmd)
	}
	return decodeReturn("guest agent: "+cmd, r[0], out)
}

// monitor runs a QMP command of the guest's QEMU and decodes its answer into
// out, which may be nil. The domain must be running.
func (h *Host) monitor(ctx context.Context, d virt.Domain, cmd string, args, out any) error {
	q := map[string]any{"execute": cmd}
	if args != nil {
		q["arguments"] = args
	}
	b, err := json.Marshal(q)
	if err != nil {
		return err
	}
	r, err := call(ctx, h, "QEMU monitor: "+cmd, func(l *virt.Libvirt) (string, error) {
		return l.QEMUDomainMonitorCommand(d, string(b), 0)
	})
	if err != nil {
		return err
	}
	return decodeReturn("QEMU monitor: "+cmd, r, out)
}

// decodeReturn decodes {"return": ...} or {"error": {"desc": ...}}.
func decodeReturn(what, answer string, out any) error {
	var a struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(answer), &a); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if a.Error != nil {
		return fmt.Errorf("%s: %s", what, a.Error.Desc)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(a.Return, out); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}
