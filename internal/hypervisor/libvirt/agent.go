package libvirt

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	virt "github.com/digitalocean/go-libvirt"

	"holdfast/internal/hypervisor"
)

const (
	// agentLimit bounds the wait for an answer of the agent that needs no work.
	agentLimit = 5 * time.Second
	// defaultFreeze is SnapshotOptions.FreezeLimit when it is 0.
	defaultFreeze = 10 * time.Second
	// thawLimit is how long a thaw is tried before it is left to the guard.
	thawLimit = 15 * time.Second
	// defaultHook is where an agent with the bare option -F looks (QEMU,
	// docs/interop/qemu-ga.rst).
	defaultHook = "/etc/qemu/fsfreeze-hook"
	defaultConf = "/etc/qemu/qemu-ga.conf"
	// crashAdvice ends every error of a snapshot that could not quiesce.
	crashAdvice = "use --consistency crash to back up without quiescing the guest"
)

// guest is what the agent told of a guest before it was frozen. Its commands
// are barred while filesystems are frozen, so all is asked before.
type guest struct {
	os struct {
		ID   string `json:"id"` // "debian"; "mswindows"
		Name string `json:"pretty-name"`
	}
	info []byte // osinfo.json
}

func (g *guest) windows() bool { return g.os.ID == "mswindows" }

// ask collects what the agent tells. An agent that does not answer at all is
// ErrAgent; commands that it does not know are left out.
func (h *Host) ask(ctx context.Context, d virt.Domain) (*guest, error) {
	if err := h.agent(ctx, d, agentLimit, "guest-ping", nil, nil); err != nil {
		return nil, err
	}
	g := &guest{}
	all := map[string]json.RawMessage{}
	for key, cmd := range map[string]string{
		"os": "guest-get-osinfo", "hostname": "guest-get-host-name", "filesystems": "guest-get-fsinfo",
		"interfaces": "guest-network-get-interfaces", "timezone": "guest-get-timezone", "disks": "guest-get-disks",
	} {
		var raw json.RawMessage
		err := h.agent(ctx, d, agentLimit, cmd, nil, &raw)
		if errors.Is(err, ErrAgent) || ctx.Err() != nil {
			return nil, err
		}
		if err == nil && len(raw) > 0 {
			all[key] = raw
		}
	}
	if raw, ok := all["os"]; ok {
		if err := json.Unmarshal(raw, &g.os); err != nil {
			return nil, fmt.Errorf("guest agent: guest-get-osinfo: %w", err)
		}
	}
	var err error
	g.info, err = json.MarshalIndent(all, "", "  ")
	return g, err
}

// freeze is a guest's filesystems being frozen, until thaw. A freeze ends at
// its limit whatever happens here: a timer of this process thaws, and so does
// the guard's process when this one is dead.
type freeze struct {
	h           *Host
	d           virt.Domain
	began       time.Time
	filesystems int
	timer       *time.Timer
	release     func() error // of the guard; may be nil

	once  sync.Once
	took  time.Duration // from the command's sending to the thaw's answer
	err   error
	late  bool          // the limit passed before thaw was called
	ended chan struct{} // closed when the thaw was carried out
}

// freeze quiesces all filesystems of a running guest. The limit counts from
// now: the time that the guest needs to get there is part of it.
func (h *Host) freeze(ctx context.Context, d virt.Domain, limit time.Duration) (*freeze, error) {
	var status string
	if err := h.agent(ctx, d, agentLimit, "guest-fsfreeze-status", nil, &status); err != nil {
		return nil, err
	}
	if status != "thawed" {
		return nil, fmt.Errorf("the guest's filesystems are %s already, by somebody else (to end it: virsh domfsthaw %s)", status, d.Name)
	}
	f := &freeze{h: h, d: d, ended: make(chan struct{})}
	if h.o.Guard != nil {
		release, err := h.o.Guard(ctx, h.uri, formatUUID(d.UUID), limit)
		if err != nil {
			return nil, fmt.Errorf("start the process that guards the freeze: %w", err)
		}
		f.release = release
	}
	f.began = time.Now()
	f.timer = time.AfterFunc(limit, func() { f.end(true) })
	// Not under ctx: when it is cancelled here the guest may be frozen all the
	// same, so the answer is waited for, and then the guest is thawed.
	err := h.agent(context.WithoutCancel(ctx), d, limit, "guest-fsfreeze-freeze", nil, &f.filesystems)
	if err == nil {
		err = context.Cause(ctx)
	}
	if err == nil && f.filesystems == 0 {
		err = errors.New("the guest agent found no filesystem to freeze")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("freeze the guest's filesystems: %w", err), f.thaw())
	}
	return f, nil
}

// thaw ends the freeze and says whether it held until now. It may be called
// more than once.
func (f *freeze) thaw() error {
	f.timer.Stop()
	f.end(false)
	<-f.ended
	return f.err
}

func (f *freeze) end(late bool) {
	f.once.Do(func() {
		defer close(f.ended)
		f.late = late
		ctx, cancel := context.WithTimeout(context.Background(), thawLimit)
		defer cancel()
		err := f.h.thaw(ctx, f.d)
		f.took = time.Since(f.began)
		switch {
		case err != nil:
			// The guard is not released: it goes on trying.
			f.err = fmt.Errorf("the guest may still be frozen: %w", err)
		case f.release != nil:
			f.err = f.release()
		}
		if late && f.err == nil {
			f.err = fmt.Errorf("the guest was thawed at the freeze limit, after %s, before the snapshot was taken", f.took.Round(time.Millisecond))
		}
	})
}

// thaw thaws the guest until its agent says so, or it no longer runs, or ctx
// ends. An agent that was stopped while it froze carries the freeze out later:
// so one thaw that was sent is not enough.
func (h *Host) thaw(ctx context.Context, d virt.Domain) error {
	for {
		err := h.agent(ctx, d, agentLimit, "guest-fsfreeze-thaw", nil, nil)
		var status string
		if err == nil {
			err = h.agent(ctx, d, agentLimit, "guest-fsfreeze-status", nil, &status)
		}
		if err == nil && status == "thawed" {
			return nil
		}
		if on, aerr := h.active(ctx, d); aerr == nil && !on {
			return nil
		}
		if errors.Is(err, ErrLost) {
			return err
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = context.Cause(ctx)
			}
			return fmt.Errorf("thaw %s: %w", d.Name, err)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// Thaw thaws a guest over a connection of its own, and keeps trying until the
// guest's agent says that it is thawed, the guest is off, or ctx ends. It is
// what the guard's process runs (Options.Guard).
func Thaw(ctx context.Context, uri, uuid string) error {
	for {
		err := thawOnce(ctx, uri, uuid)
		if err == nil || errors.Is(err, hypervisor.ErrNotExist) {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Second): // the daemon may be restarting
		}
	}
}

func thawOnce(ctx context.Context, uri, uuid string) (err error) {
	h, err := Open(ctx, uri, Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	d, err := h.domain(ctx, hypervisor.VMID(uuid))
	if err != nil {
		return err
	}
	return h.thaw(ctx, d)
}

// hook makes sure that the agent of a Linux guest runs a hook at every freeze,
// and returns its path. The agent says with what options it runs, through its
// own /proc/self/cmdline; its configuration file is read too.
func (h *Host) hook(ctx context.Context, d virt.Domain) (string, error) {
	line, err := h.guestFile(ctx, d, "/proc/self/cmdline")
	if err != nil {
		return "", fmt.Errorf("read the guest agent's options: %w", err)
	}
	path, conf := agentOptions(strings.Split(strings.TrimRight(string(line), "\x00"), "\x00"))
	if path == "" {
		b, err := h.guestFile(ctx, d, conf)
		if errors.Is(err, ErrAgent) || ctx.Err() != nil {
			return "", err
		}
		if err == nil {
			path = confHook(string(b))
		}
	}
	if path == "" {
		return "", errors.New("the guest agent runs without a freeze hook (its option --fsfreeze-hook)")
	}
	if _, err := h.guestFile(ctx, d, path); err != nil {
		return "", fmt.Errorf("the guest agent's freeze hook %s: %w", path, err)
	}
	return path, nil
}

// agentOptions reads a qemu-ga command line: the freeze hook ("" for none) and
// the configuration file.
func agentOptions(args []string) (hook, conf string) {
	conf = defaultConf
	for i := 1; i < len(args); i++ {
		a := args[i]
		next := func() string {
			if i++; i < len(args) {
				return args[i]
			}
			return ""
		}
		if name, ok := strings.CutPrefix(a, "--"); ok {
			name, value, has := strings.Cut(name, "=")
			switch {
			case name == "fsfreeze-hook":
				hook = orDefault(value, defaultHook)
			case name == "config" && has:
				conf = value
			case name == "config":
				conf = next()
			}
			continue
		}
		if len(a) < 2 || a[0] != '-' {
			continue
		}
		// A word of one-letter options; one that takes a value ends it.
	word:
		for j := 1; j < len(a); j++ {
			switch a[j] {
			case 'F':
				hook = orDefault(a[j+1:], defaultHook)
				break word
			case 'c':
				if conf = a[j+1:]; conf == "" {
					conf = next()
				}
				break word
			case 'm', 'p', 'l', 'f', 't', 'b', 'a', 's':
				if a[j+1:] == "" {
					next()
				}
				break word
			}
		}
	}
	return hook, conf
}

// confHook finds the hook in a qemu-ga.conf (QEMU, docs/interop/qemu-ga.rst,
// section "general").
func confHook(conf string) string {
	section := ""
	for line := range strings.Lines(conf) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			section = line
			continue
		}
		k, v, ok := strings.Cut(line, "=")
		if ok && section == "[general]" && strings.TrimSpace(k) == "fsfreeze-hook" {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// guestFileMax bounds what is read of a guest's file, in bytes.
const guestFileMax = 64 << 10

// guestFile reads the beginning of a file in the guest.
func (h *Host) guestFile(ctx context.Context, d virt.Domain, path string) ([]byte, error) {
	var handle int64
	if err := h.agent(ctx, d, agentLimit, "guest-file-open", map[string]any{"path": path, "mode": "r"}, &handle); err != nil {
		return nil, err
	}
	arg := map[string]any{"handle": handle}
	var r struct {
		Data string `json:"buf-b64"`
	}
	err := h.agent(ctx, d, agentLimit, "guest-file-read", map[string]any{"handle": handle, "count": guestFileMax}, &r)
	cerr := h.agent(context.WithoutCancel(ctx), d, agentLimit, "guest-file-close", arg, nil)
	if err = errors.Join(err, cerr); err != nil {
		return nil, err
	}
	return base64.StdEncoding.DecodeString(r.Data)
}
