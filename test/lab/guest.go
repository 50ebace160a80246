package lab

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/template"
	"time"
)

// Options of a guest. The zero value is one with a single qcow2 disk.
type Options struct {
	Name   string // "" makes one up
	Format string // of the system disk: "qcow2" (the default) or "raw"
	Disks  []Disk // data disks: vdb, vdc, ...
	// Blank gives an empty system disk of 1 GiB: nothing boots, and the agent's
	// channel has nobody behind it.
	Blank bool
	// NoAgent leaves out the agent's channel.
	NoAgent bool
	// Keep lets the guest outlive this process, until it is removed by name.
	Keep bool
	// Stopped defines the guest and does not start it (Start, labctl).
	Stopped bool
}

// Disk is a data disk.
type Disk struct {
	Format string // "qcow2" (the default) or "raw"
	Size   int64  // bytes; 0 means 64 MiB
	// Data makes an ext4 filesystem on it that the guest mounts at /data on
	// first use. One disk of a guest may have it.
	Data bool
}

// Guest is a libvirt domain on this machine. Its methods may run in parallel.
type Guest struct {
	Name  string
	UUID  string
	Dir   string   // holds its disks; "" for a guest that was not made here
	Disks []string // paths: vda, vdb, ...
}

// New makes a guest and does not start it.
func New(ctx context.Context, o Options) (*Guest, error) {
	owner := os.Getpid()
	if o.Keep {
		owner = 0
	}
	dir, err := newStorage(owner)
	if err != nil {
		return nil, err
	}
	g := &Guest{Name: o.Name, Dir: dir}
	if g.Name == "" {
		g.Name = filepath.Base(dir)
	}
	if err := g.make(ctx, o); err != nil {
		return nil, errors.Join(err, g.Remove(ctx))
	}
	return g, nil
}

func (g *Guest) make(ctx context.Context, o Options) error {
	if o.Format == "" {
		o.Format = "qcow2"
	}
	vda := filepath.Join(g.Dir, "vda."+o.Format)
	if o.Blank {
		if err := run(ctx, "qemu-img", "create", "-q", "-f", o.Format, vda, "1G"); err != nil {
			return err
		}
	} else {
		image, err := Image(o.Format)
		if err != nil {
			return err
		}
		if err := run(ctx, "cp", "--reflink=auto", "--sparse=always", image, vda); err != nil {
			return err
		}
	}
	g.Disks = append(g.Disks, vda)
	formats := []string{o.Format}
	for i, d := range o.Disks {
		if d.Format == "" {
			d.Format = "qcow2"
		}
		if d.Size == 0 {
			d.Size = 64 << 20
		}
		path := filepath.Join(g.Dir, fmt.Sprintf("vd%c.%s", 'b'+i, d.Format))
		if err := d.create(ctx, path); err != nil {
			return err
		}
		g.Disks, formats = append(g.Disks, path), append(formats, d.Format)
	}
	type disk struct{ Path, Format, Target string }
	var disks []disk
	for i, path := range g.Disks {
		disks = append(disks, disk{path, formats[i], fmt.Sprintf("vd%c", 'a'+i)})
	}
	var b strings.Builder
	if err := domainXML.Execute(&b, map[string]any{"Name": g.Name, "Disks": disks, "Agent": !o.NoAgent}); err != nil {
		return err
	}
	file := filepath.Join(g.Dir, "domain.xml")
	if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
		return err
	}
	if _, err := Virsh(ctx, "define", file); err != nil {
		return err
	}
	id, err := Virsh(ctx, "domuuid", g.Name)
	g.UUID = strings.TrimSpace(id)
	return err
}

func (d Disk) create(ctx context.Context, path string) error {
	size := strconv.FormatInt(d.Size, 10)
	if !d.Data {
		return run(ctx, "qemu-img", "create", "-q", "-f", d.Format, path, size)
	}
	raw := path + ".tmp"
	defer os.Remove(raw)
	if err := run(ctx, "qemu-img", "create", "-q", "-f", "raw", raw, size); err != nil {
		return err
	}
	if err := run(ctx, "mke2fs", "-q", "-t", "ext4", "-F", "-L", "labdata", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", raw); err != nil {
		return err
	}
	return run(ctx, "qemu-img", "convert", "-f", "raw", "-O", d.Format, raw, path)
}

var domainXML = template.Must(template.New("domain").Parse(`<domain type='qemu'>
  <name>{{.Name}}</name>
  <memory unit='MiB'>512</memory>
  <vcpu>2</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
  <devices>
{{- range .Disks}}
    <disk type='file' device='disk'>
      <driver name='qemu' type='{{.Format}}' discard='unmap'/>
      <source file='{{.Path}}'/><target dev='{{.Target}}' bus='virtio'/>
    </disk>
{{- end}}
    <interface type='user'><model type='virtio'/><rom enabled='no'/></interface>
    <serial type='pty'/><console type='pty'/>
{{- if .Agent}}
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
{{- end}}
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <video><model type='vga'/></video>
    <memballoon model='none'/>
  </devices>
</domain>
`))

// Open returns the guest of that name, made by whomever.
func Open(name string) *Guest { return &Guest{Name: name} }

// Dir returns the lab's directory in which a guest has a disk.
func Dir(ctx context.Context, name string) (string, error) {
	out, err := Virsh(ctx, "domblklist", "--details", name)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) != 4 || f[1] != "disk" {
			continue
		}
		if rest, ok := strings.CutPrefix(f[3], base()+"/"); ok {
			dir, _, _ := strings.Cut(rest, "/")
			return filepath.Join(base(), dir), nil
		}
	}
	return "", fmt.Errorf("guest %s has no disk in %s", name, base())
}

// bootLimit is for a guest that does not boot; beside others it takes minutes.
const bootLimit = 10 * time.Minute

// Boot starts the guest and waits until its agent answers.
func (g *Guest) Boot(ctx context.Context) error {
	if _, err := Virsh(ctx, "start", g.Name); err != nil {
		return err
	}
	return g.WaitAgent(ctx, bootLimit)
}

// WaitAgent waits until the guest's agent answers.
func (g *Guest) WaitAgent(ctx context.Context, limit time.Duration) error {
	return Poll(ctx, limit, "the agent of "+g.Name+" answers", func() (bool, error) {
		_, err := Virsh(ctx, "qemu-agent-command", "--timeout", "2", g.Name, `{"execute":"guest-ping"}`)
		if err != nil && strings.Contains(err.Error(), "domain is not running") {
			return false, err
		}
		return err == nil, nil
	})
}

// State is what virsh calls it: "running", "paused", "shut off".
func (g *Guest) State(ctx context.Context) (string, error) {
	out, err := Virsh(ctx, "domstate", g.Name)
	return strings.TrimSpace(out), err
}

// PowerOff stops the guest as pulling its plug would.
func (g *Guest) PowerOff(ctx context.Context) error {
	_, err := Virsh(ctx, "destroy", g.Name)
	return err
}

// Shutdown stops the guest in good order. (Nobody in it listens to a power
// button: that service is off, to boot faster.)
func (g *Guest) Shutdown(ctx context.Context) error {
	if _, err := g.Exec(ctx, "systemctl start --no-block poweroff.target"); err != nil && !strings.Contains(err.Error(), "not running") {
		return err
	}
	return Poll(ctx, 2*time.Minute, g.Name+" is off", func() (bool, error) {
		s, err := g.State(ctx)
		return s == "shut off", err
	})
}

// Remove stops and removes the guest with its directory. One already gone is
// no error.
func (g *Guest) Remove(ctx context.Context) error {
	err := undefine(ctx, g.Name)
	if g.Dir != "" {
		err = errors.Join(err, os.RemoveAll(g.Dir))
	}
	return err
}

// undefine removes a domain with all that libvirt keeps of it.
func undefine(ctx context.Context, name string) error {
	if _, err := Virsh(ctx, "destroy", name); err != nil && !strings.Contains(err.Error(), "is not running") && !missing(err) {
		return err
	}
	if _, err := Virsh(ctx, "undefine", "--nvram", "--managed-save", "--snapshots-metadata", "--checkpoints-metadata", name); err != nil && !missing(err) {
		return err
	}
	return nil
}

func missing(err error) bool { return strings.Contains(err.Error(), "failed to get domain") }

// Exec runs a shell command in the guest through its agent and returns what it
// wrote. An exit status other than 0 is an error, with what it wrote.
func (g *Guest) Exec(ctx context.Context, command string) (string, error) {
	var started struct{ Pid int }
	err := g.agent(ctx, "guest-exec", map[string]any{
		"path": "/bin/sh", "arg": []string{"-c", command}, "capture-output": true}, &started)
	if err != nil {
		return "", err
	}
	var st struct {
		Exited           bool
		Exitcode, Signal int
		OutData          string `json:"out-data"`
		ErrData          string `json:"err-data"`
	}
	err = Poll(ctx, 5*time.Minute, command+" ends in "+g.Name, func() (bool, error) {
		err := g.agent(ctx, "guest-exec-status", map[string]any{"pid": started.Pid}, &st)
		return st.Exited, err
	})
	if err != nil {
		return "", err
	}
	out, err := base64.StdEncoding.DecodeString(st.OutData)
	if err != nil {
		return "", err
	}
	errs, err := base64.StdEncoding.DecodeString(st.ErrData)
	if err != nil {
		return "", err
	}
	if st.Exitcode != 0 || st.Signal != 0 {
		return string(out), fmt.Errorf("%s: %s: exit status %d, signal %d: %s%s", g.Name, command, st.Exitcode, st.Signal, out, errs)
	}
	return string(out), nil
}

// agent calls a function of the guest agent.
func (g *Guest) agent(ctx context.Context, name string, args any, result any) error {
	b, err := json.Marshal(map[string]any{"execute": name, "arguments": args})
	if err != nil {
		return err
	}
	out, err := Virsh(ctx, "qemu-agent-command", "--timeout", "20", g.Name, string(b))
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), &struct{ Return any }{result})
}

// StartWriter starts the guest's writer in the directories named, in the
// background.
func (g *Guest) StartWriter(ctx context.Context, dirs ...string) error {
	_, err := g.Exec(ctx, fmt.Sprintf("echo 'GUESTWRITER=%s' >/run/guestwriter.env && rm -f /run/guestwriter/acked && systemctl start guestwriter", strings.Join(dirs, " ")))
	if err != nil {
		return err
	}
	return Poll(ctx, time.Minute, "the writer of "+g.Name+" has written", func() (bool, error) {
		n, err := g.Acked(ctx)
		return n > 0, err
	})
}

// StopWriter stops the writer, if it runs. It fails if the writer had failed
// (an I/O error).
func (g *Guest) StopWriter(ctx context.Context) error {
	_, err := g.Exec(ctx, "! systemctl is-failed guestwriter || { journalctl -u guestwriter; exit 1; }; systemctl stop guestwriter")
	return err
}

// Acked returns the number of the last record that the guest knows to be
// flushed; 0 before the first.
func (g *Guest) Acked(ctx context.Context) (uint64, error) {
	out, err := g.Exec(ctx, "cat /run/guestwriter/acked 2>/dev/null || true")
	if err != nil || strings.TrimSpace(out) == "" {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(out), 10, 64)
}

// WaitWriter waits until the writer has flushed n more records than it has
// now, and returns the last one's number.
func (g *Guest) WaitWriter(ctx context.Context, n uint64) (uint64, error) {
	from, err := g.Acked(ctx)
	if err != nil {
		return 0, err
	}
	var now uint64
	err = Poll(ctx, 2*time.Minute, fmt.Sprintf("the writer of %s has flushed %d more records", g.Name, n), func() (bool, error) {
		var err error
		now, err = g.Acked(ctx)
		return now >= from+n, err
	})
	return now, err
}

// Verify checks that all records up to acked are there and that nothing is
// torn. The writer must be stopped.
func (g *Guest) Verify(ctx context.Context, acked uint64, dirs ...string) error {
	_, err := g.Exec(ctx, fmt.Sprintf("guestwriter verify -acked %d %s", acked, strings.Join(dirs, " ")))
	return err
}

// Virsh runs virsh on this machine's libvirt and returns what it wrote.
func Virsh(ctx context.Context, args ...string) (string, error) {
	return output(ctx, "virsh", append([]string{"-c", "qemu:///system", "-q"}, args...)...)
}
