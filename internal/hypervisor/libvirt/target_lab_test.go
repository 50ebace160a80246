package libvirt

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
	"holdfast/internal/nbd"
	"holdfast/internal/overlay"
	"holdfast/test/lab"
)

// These tests recover real guests from an image that a process of its own
// serves over NBD, as a publication does, and kill that process.

const serveEnv = "HOLDFAST_TEST_SERVE"

// TestServeChild is no test: it is the serving process.
func TestServeChild(t *testing.T) {
	args := strings.Split(os.Getenv(serveEnv), "|")
	if len(args) != 3 {
		t.Skip("it is the other tests' serving process")
	}
	if err := serveImage(t.Context(), args[0], args[1], args[2]); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func serveImage(ctx context.Context, socket, image, overlayDir string) error {
	base, err := disk.OpenFile(image, disk.FileOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	dev := disk.ReadOnly(slow{base})
	if overlayDir != "" {
		if err := overlay.Create(overlayDir, "image", base.Size()); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		o, err := overlay.Open(overlayDir, "image", slow{base})
		if err != nil {
			return err
		}
		dev = o
	}
	uid, gid, ok := QEMUUser()
	l, err := nbd.ListenUnix(ctx, socket, nbd.SocketOptions{Chown: ok, UID: uid, GID: gid})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return nbd.NewServer(oneExport{dev}, nbd.ServerOptions{Resumable: true}).Serve(ctx, l)
}

// slow is a restore point on a slow repository: a fill of it can be
// interrupted.
type slow struct{ r disk.Reader }

func (s slow) Size() int64 { return s.r.Size() }
func (s slow) ReadAt(ctx context.Context, p []byte, off int64) error {
	time.Sleep(2 * time.Millisecond)
	return s.r.ReadAt(ctx, p, off)
}
func (s slow) Extents(ctx context.Context, off, n int64) disk.Extents {
	return s.r.Extents(ctx, off, n)
}
func (s slow) Close() error { return s.r.Close() }

type oneExport struct{ d disk.Device }

func (e oneExport) Names(context.Context) ([]string, error) { return []string{"vda"}, nil }
func (e oneExport) Open(context.Context, string) (disk.Device, error) {
	return keptOpen(e), nil
}

// keptOpen is a device that outlives its users.
type keptOpen struct{ d disk.Device }

func (k keptOpen) Size() int64 { return k.d.Size() }
func (k keptOpen) ReadAt(ctx context.Context, p []byte, off int64) error {
	return k.d.ReadAt(ctx, p, off)
}
func (k keptOpen) Extents(ctx context.Context, off, n int64) disk.Extents {
	return k.d.Extents(ctx, off, n)
}
func (k keptOpen) WriteAt(ctx context.Context, p []byte, off int64) error {
	return k.d.WriteAt(ctx, p, off)
}
func (k keptOpen) ZeroAt(ctx context.Context, off, n int64) error { return k.d.ZeroAt(ctx, off, n) }
func (k keptOpen) Flush(ctx context.Context) error                { return k.d.Flush(ctx) }
func (k keptOpen) Close() error                                   { return nil }

// publication runs serving processes, one after another, on one socket.
type publication struct {
	t       *testing.T
	socket  string
	overlay string
	cmd     *exec.Cmd
}

func publish(t *testing.T, overlayDir string) *publication {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "holdfast-test-*")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	p := &publication{t: t, socket: filepath.Join(dir, "s"), overlay: overlayDir}
	t.Cleanup(func() {
		p.kill()
		os.RemoveAll(dir)
	})
	p.start()
	return p
}

func (p *publication) uri() string { return "nbd+unix:///vda?socket=" + p.socket }

func (p *publication) start() {
	p.t.Helper()
	image, err := lab.Image("raw")
	if err != nil {
		p.t.Fatal(err)
	}
	p.cmd = exec.Command(os.Args[0], "-test.run=^TestServeChild$")
	p.cmd.Env = append(os.Environ(), serveEnv+"="+strings.Join([]string{p.socket, image, p.overlay}, "|"))
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		p.t.Fatalf("serving process: %q, %v", line, err)
	}
}

// kill kills the serving process as kill -9 does.
func (p *publication) kill() {
	if p.cmd != nil {
		p.cmd.Process.Kill()
		p.cmd.Wait()
		p.cmd = nil
	}
}

func hexID() string {
	var b [8]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

func openHost(t *testing.T) *Host {
	t.Helper()
	h, err := Open(t.Context(), "qemu:///system", Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// recovering is a guest being recovered by hand, step by step.
type recovering struct {
	*testing.T
	h       *Host
	p       *publication
	vm      hypervisor.NewVM
	id      hypervisor.VMID
	g       *lab.Guest
	storage string
}

// recoverGuest brings a guest up from the published image.
func recoverGuest(t *testing.T, server bool) *recovering {
	lab.Beside(t)
	ctx := t.Context()
	r := &recovering{T: t, h: openHost(t), storage: lab.Storage(t)}
	original := lab.Start(t, lab.Options{Stopped: true})
	config, err := lab.Virsh(ctx, "dumpxml", "--inactive", original.Name)
	if err != nil {
		t.Fatal(err)
	}
	// What production hosts use, and a network disk must not.
	config = strings.Replace(config, "discard='unmap'", "discard='unmap' cache='none' io='native'", 1)
	overlayDir := ""
	if server {
		overlayDir = filepath.Join(t.TempDir(), "overlay")
	}
	r.p = publish(t, overlayDir)
	image, err := lab.Image("raw")
	if err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(image)
	if err != nil {
		t.Fatal(err)
	}
	r.vm = hypervisor.NewVM{
		Name: original.Name + "-back", Kind: Kind, NewIdentity: true,
		Config: []hypervisor.File{{Name: "domain.xml", Data: []byte(config)}},
		Disks:  []hypervisor.NewDisk{{ID: "vda", Size: fi.Size(), Served: r.p.uri()}},
		Owner:  hypervisor.Owner{Repository: hexID(), History: hexID(), Session: hexID()},
	}
	notes, err := r.h.Preflight(ctx, r.vm, r.storage, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if len(notes) > 0 {
		t.Errorf("notes: %q", notes)
	}
	if !server {
		d, w, err := r.h.CreateDisk(ctx, r.storage, r.vm.Owner.DiskName(r.vm.Name, "vda"), r.vm.Disks[0])
		if err != nil || w != nil {
			t.Fatal(w, err)
		}
		r.vm.Disks[0] = d
	}
	if _, err := r.h.Find(ctx, r.vm.Owner.Session); !errors.Is(err, hypervisor.ErrNotExist) {
		t.Errorf("found before it was made: %v", err)
	}
	if r.id, err = r.h.CreateVM(ctx, r.vm); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.remove)
	if _, err := r.h.CreateVM(ctx, r.vm); !errors.Is(err, hypervisor.ErrExist) {
		t.Errorf("made twice: %v", err)
	}
	if id, err := r.h.Find(ctx, r.vm.Owner.Session); err != nil || id != r.id {
		t.Errorf("found %s, %v", id, err)
	}
	begun := time.Now()
	if err := r.h.Start(ctx, r.id); err != nil {
		t.Fatal(err)
	}
	r.g = lab.Open(r.vm.Name)
	if err := r.g.WaitAgent(ctx, 5*time.Minute); err != nil {
		t.Fatal(err)
	}
	t.Logf("guest answering %.1f s after its start", time.Since(begun).Seconds())
	if he, err := r.h.Health(ctx, r.id); err != nil || he != (hypervisor.Health{State: hypervisor.Running, Agent: true}) {
		t.Errorf("health %+v, %v", he, err)
	}
	return r
}

// remove deletes the VM and its disks, and looks whether anything is left.
func (r *recovering) remove() {
	ctx := context.Background()
	for range 2 { // the second time there is nothing to do
		if err := r.h.Stop(ctx, r.id); err != nil {
			r.Error(err)
		}
		if err := r.h.DeleteVM(ctx, r.id); err != nil {
			r.Error(err)
		}
		if err := r.h.RemoveDisk(ctx, hypervisor.DiskPath(r.storage, r.vm.Owner.DiskName(r.vm.Name, "vda"), "")); err != nil {
			r.Error(err)
		}
	}
	if left, err := os.ReadDir(r.storage); err != nil || len(left) > 0 {
		r.Errorf("left on the storage: %v, %v", left, err)
	}
	if out, err := lab.Virsh(ctx, "list", "--all", "--name"); err != nil || strings.Contains(out, r.vm.Name) {
		r.Errorf("left on the host: %s, %v", out, err)
	}
}

func (r *recovering) exec(command string) string {
	r.Helper()
	out, err := r.g.Exec(r.Context(), command)
	if err != nil {
		r.Fatal(err)
	}
	return out
}

func (r *recovering) health() hypervisor.Health {
	r.Helper()
	he, err := r.h.Health(r.Context(), r.id)
	if err != nil {
		r.Fatal(err)
	}
	return he
}

// stall kills the serving process under load until the guest feels it.
func (r *recovering) stall() {
	r.Helper()
	r.exec("nohup sh -c 'while [ ! -e /run/stop ]; do find /usr/bin -type f | head -100 | xargs cat | md5sum >>/run/sums; echo 3 >/proc/sys/vm/drop_caches; done' >/dev/null 2>&1 &")
	r.p.kill()
	err := lab.Poll(r.Context(), time.Minute, "the guest is paused", func() (bool, error) {
		he, err := r.h.Health(r.Context(), r.id)
		return he.State == hypervisor.Paused && he.IOError, err
	})
	if err != nil {
		r.Fatal(err)
	}
}

func testRecovery(t *testing.T, server bool) {
	r := recoverGuest(t, server)
	ctx := t.Context()
	const dir = "/var/lib/guestwriter"
	r.exec("mkdir -p " + dir)
	if err := r.g.StartWriter(ctx, dir); err != nil {
		t.Fatal(err)
	}
	sum := "find /usr/bin /usr/sbin -type f | sort | xargs cat | md5sum"
	want := r.exec(sum)

	kills := 2
	if server { // reads fail the same way
		kills = 1
	}
	for i := range kills {
		acked, err := r.g.WaitWriter(ctx, 100)
		if err != nil {
			t.Fatal(err)
		}
		r.stall()
		r.p.start()
		begun := time.Now()
		if err := r.h.Unpause(ctx, r.id); err != nil {
			t.Fatal(err)
		}
		t.Logf("kill %d: guest goes on %.1f s after its server was back", i, time.Since(begun).Seconds())
		if he := r.health(); he.State != hypervisor.Running {
			t.Errorf("health after unpause: %+v", he)
		}
		if now, err := r.g.WaitWriter(ctx, 10); err != nil || now < acked {
			t.Fatalf("writer: %d after %d, %v", now, acked, err)
		}
	}
	// Once more does no harm.
	if err := r.h.Unpause(ctx, r.id); err != nil {
		t.Error(err)
	}
	if err := lab.Poll(ctx, 5*time.Minute, "the guest has read twice", func() (bool, error) {
		return r.exec("[ $(wc -l </run/sums) -lt 2 ] || echo yes") != "", nil
	}); err != nil {
		t.Error(err)
	}
	if sums := strings.Fields(r.exec("touch /run/stop; sort -u /run/sums")); len(sums) != 2 {
		t.Errorf("the guest read different things: %q", sums)
	}

	r.migrateInTwo()

	r.p.kill() // for good
	if got := r.exec("echo 3 >/proc/sys/vm/drop_caches; " + sum); got != want {
		t.Errorf("/usr was %s and is %s", want, got)
	}
	if _, err := r.g.WaitWriter(ctx, 20); err != nil {
		t.Fatal(err)
	}
	if out := r.exec("dmesg | grep -i 'i/o error' || true"); out != "" {
		t.Errorf("the guest saw errors: %s", out)
	}
	note, err := r.h.Network(ctx, r.id)
	if err != nil || !strings.HasPrefix(note, "connected: 10.0.2.") {
		t.Errorf("network: %q, %v", note, err)
	}
	r.again(dir)
}

// migrateInTwo interrupts a migration and continues it, while the guest works.
func (r *recovering) migrateInTwo() {
	r.Helper()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	var seen []int64
	err := r.h.Migrate(ctx, r.id, r.storage, func(done, total int64) {
		if total != r.vm.Disks[0].Size {
			r.Errorf("progress of %d bytes", total)
		}
		if seen = append(seen, done); done > 0 {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		r.Fatalf("interrupted migration: %v, progress %d", err, seen)
	}
	dom := r.domain(false)
	if left := remote(dom); len(left) != 1 {
		r.Errorf("after the interruption: remote %q", left)
	}
	if f := dom.at("devices", "disk", "source").attr("file"); filepath.Dir(f) != r.storage {
		r.Errorf("writes go to %q", f)
	}
	// A process that dies does not stop its job: another adopts it.
	if out, err := lab.Virsh(r.Context(), "blockpull", r.vm.Name, "vda"); err != nil {
		r.Fatal(out, err)
	}
	seen = nil
	begun := time.Now()
	if err := r.h.Migrate(r.Context(), r.id, r.storage, func(done, total int64) { seen = append(seen, done) }); err != nil {
		r.Fatal(err)
	}
	r.Logf("migrated in %.1f s more", time.Since(begun).Seconds())
	if !slices.IsSorted(seen) || seen[len(seen)-1] != r.vm.Disks[0].Size {
		r.Errorf("progress %d", seen)
	}
	// Once more changes nothing.
	if err := r.h.Migrate(r.Context(), r.id, r.storage, nil); err != nil {
		r.Error(err)
	}
}

func (r *recovering) domain(inactive bool) *element {
	r.Helper()
	d, err := r.h.domain(r.Context(), r.id)
	if err != nil {
		r.Fatal(err)
	}
	dom, err := r.h.domainXML(r.Context(), d, inactive)
	if err != nil {
		r.Fatal(err)
	}
	return dom
}

// again pulls the plug and boots the guest from its local disks: what the
// writer was told is flushed is there, and the configuration is the old one.
func (r *recovering) again(dir string) {
	r.Helper()
	ctx := r.Context()
	drv := r.domain(true).at("devices", "disk", "driver")
	if drv.attr("error_policy") != "" || drv.attr("rerror_policy") != "" || drv.attr("discard") != "unmap" || drv.attr("cache") != "none" || drv.attr("io") != "native" || drv.attr("type") != "qcow2" {
		r.Errorf("driver %s", drv)
	}
	acked, err := r.g.Acked(ctx)
	if err != nil {
		r.Fatal(err)
	}
	if err := r.h.Stop(ctx, r.id); err != nil {
		r.Fatal(err)
	}
	if err := r.h.Start(ctx, r.id); err != nil {
		r.Fatal(err)
	}
	if err := r.g.WaitAgent(ctx, 5*time.Minute); err != nil {
		r.Fatal(err)
	}
	if err := r.g.Verify(ctx, acked, dir); err != nil {
		r.Error(err)
	}
	r.Logf("all %d flushed records are there", acked)
}

func TestRecoverHostOverlay(t *testing.T)   { testRecovery(t, false) }
func TestRecoverServerOverlay(t *testing.T) { testRecovery(t, true) }
