package nbd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// need skips the test unless all programs are installed.
func need(t *testing.T, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("SKIPPED, NOT TESTED: %s is not installed", tool)
		}
	}
}

// run runs a program to its end and returns what it said.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// background runs a server program until the test ends. It listens on a Unix
// socket at path.
func background(t *testing.T, path, name string, args ...string) {
	t.Helper()
	var out bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s said: %s", name, &out)
		}
	})
	awaitSocket(t, path)
}

// awaitSocket waits until another process listens.
func awaitSocket(t *testing.T, path string) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; {
		nc, err := net.Dial("unix", path)
		if err == nil {
			nc.Close()
			return
		}
		if time.Now().After(end) {
			t.Fatalf("nobody listens on %s: %v", path, err)
		}
		<-time.After(20 * time.Millisecond)
	}
}

func content(t *testing.T, d disk.Reader) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	if err := d.ReadAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	return p
}

func same(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Fatalf("%s: byte %d is %#x, want %#x", what, i, got[i], want[i])
		}
	}
	t.Fatalf("%s: %d bytes, want %d", what, len(got), len(want))
}

func TestNbdinfo(t *testing.T) {
	need(t, "nbdinfo")
	m := disk.NewMem(6 << 30) // more than one block status request covers
	for _, off := range []int64{0, 1 << 20, 5 << 30} {
		if err := m.WriteAt(t.Context(), bytes.Repeat([]byte{1}, 128<<10), off); err != nil {
			t.Fatal(err)
		}
	}
	r := serve(t, shelf{"a b": m, "ro": disk.ReadOnly(disk.NewMem(1 << 20))}, ServerOptions{}, "unix")

	var list struct {
		Exports []struct {
			Name     string `json:"export-name"`
			Size     int64  `json:"export-size"`
			ReadOnly bool   `json:"is_read_only"`
			Multi    bool   `json:"can_multi_conn"`
			Zero     bool   `json:"can_zero"`
			FUA      bool   `json:"can_fua"`
			Max      int64  `json:"block_size_maximum"`
		}
	}
	if err := json.Unmarshal([]byte(run(t, "nbdinfo", "--list", "--json", r.addr.String())), &list); err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(list.Exports), "[{a b 6442450944 false true true true 33554432} {ro 1048576 true true false true 33554432}]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	got := strings.Join(strings.Fields(run(t, "nbdinfo", "--map", r.at("a b").String())), " ")
	want := "0 131072 0 data 131072 917504 3 hole,zero 1048576 131072 0 data 1179648 5367529472 3 hole,zero" +
		" 5368709120 131072 0 data 5368840192 1073610752 3 hole,zero"
	if got != want {
		t.Errorf("map:\n got %s\nwant %s", got, want)
	}
}

func TestNbdcopy(t *testing.T) {
	need(t, "nbdcopy")
	dir := scratch(t)
	m, to := patterned(t, 40<<20), disk.NewMem(40<<20)
	r := serve(t, shelf{"from": m, "to": to}, ServerOptions{}, "unix")
	want := content(t, m)

	file := filepath.Join(dir, "out")
	run(t, "nbdcopy", "--connections=4", "--requests=32", r.at("from").String(), file)
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	same(t, "copy to a file", got, want)
	run(t, "nbdcopy", "--connections=4", "--flush", file, r.at("to").String())
	same(t, "copy from a file", content(t, to), want)
	// From us to us, over what is there: zeros must be written too.
	m2 := patterned(t, 40<<20)
	r2 := serve(t, shelf{"d": m2}, ServerOptions{}, "tcp")
	run(t, "nbdcopy", "--connections=4", r2.at("d").String(), r.at("to").String())
	same(t, "copy over", content(t, to), content(t, m2))
}

func TestQemuImg(t *testing.T) {
	need(t, "qemu-img")
	dir := scratch(t)
	m, to := patterned(t, 24<<20), patterned(t, 24<<20)
	r := serve(t, shelf{"from": m, "to": to}, ServerOptions{}, "unix")
	from, raw := r.at("from").String(), filepath.Join(dir, "raw")

	var info struct {
		Size int64 `json:"virtual-size"`
	}
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "info", "--output=json", from)), &info); err != nil || info.Size != 24<<20 {
		t.Errorf("info: %+v, %v", info, err)
	}
	var extents []struct {
		Start, Length int64
		Zero          bool
	}
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "map", "--output=json", from)), &extents); err != nil {
		t.Fatal(err)
	}
	own, err := disk.Collect(m.Extents(t.Context(), 0, m.Size()))
	if err != nil || len(own) != len(extents) {
		t.Fatalf("map: %d extents, %v; want %d", len(extents), err, len(own))
	}
	for i, e := range own {
		if g := extents[i]; g.Start != e.Off || g.Length != e.Len || g.Zero != e.Zero {
			t.Errorf("map: got %+v, want %+v", g, e)
		}
	}
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "raw", "-W", "-m", "16", from, raw)
	got, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	same(t, "convert from us", got, content(t, m))
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", raw, r.at("to").String())
	same(t, "convert to us", content(t, to), got)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", raw, r.at("to").String())
}

// counted counts flushes.
type counted struct {
	kept
	flushes atomic.Int64
}

func (c *counted) Flush(ctx context.Context) error {
	c.flushes.Add(1)
	return c.kept.Flush(ctx)
}

func TestQemuIO(t *testing.T) {
	need(t, "qemu-io")
	d := &counted{kept: kept{disk.NewMem(8 << 20)}}
	r := serve(t, shelf{"d": d}, ServerOptions{}, "unix")
	io := func(commands ...string) {
		t.Helper()
		args := []string{"-f", "raw", "-d", "unmap", r.at("d").String()}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		if out := run(t, "qemu-io", args...); strings.Contains(out, "fail") || strings.Contains(out, "rror") {
			t.Errorf("qemu-io %q: %s", commands, out)
		}
	}
	io("write -P 0x11 0 4M", "write -P 0x22 64k 64k", "write -P 0x33 1M 512", "flush",
		"write -z 2M 256k", "write -zu 2560k 256k", "discard 3M 128k",
		"read -P 0x11 0 64k", "read -P 0x22 64k 64k", "read -P 0x33 1M 512", "read -P 0 2M 256k", "read -P 0 2560k 256k")
	want := bytes.Repeat([]byte{0x11}, 8<<20)
	fill := func(off, n int, b byte) { copy(want[off:], bytes.Repeat([]byte{b}, n)) }
	fill(4<<20, 4<<20, 0)
	fill(64<<10, 64<<10, 0x22)
	fill(1<<20, 512, 0x33)
	fill(2<<20, 256<<10, 0)
	fill(2560<<10, 256<<10, 0)
	fill(3<<20, 128<<10, 0)
	same(t, "disk", content(t, d), want)
	before := d.flushes.Load()
	io("write -f -P 0x44 5M 4k", "write -zf 6M 4k")
	if n := d.flushes.Load() - before; n < 2 {
		t.Errorf("two writes with FUA made %d flushes", n)
	}
	io("aio_write -P 0x55 7M 64k", "aio_write -P 0x66 7232k 64k", "aio_flush", "aio_read -P 0x55 7M 64k", "aio_flush")
}

func TestFio(t *testing.T) {
	need(t, "fio")
	if out, _ := exec.Command("fio", "--enghelp").Output(); !bytes.Contains(out, []byte("nbd")) {
		t.Skip("SKIPPED, NOT TESTED: fio has no nbd engine")
	}
	m := disk.NewMem(16 << 20)
	r := serve(t, shelf{"d": m}, ServerOptions{}, "unix")
	job := filepath.Join(scratch(t), "job")
	text := fmt.Sprintf("[v]\nioengine=nbd\nuri=%s\nrw=randrw\nbsrange=512-256k\niodepth=16\nsize=16m\nio_size=24m\nverify=crc32c\nfsync=32\n", r.at("d"))
	if err := os.WriteFile(job, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "fio", job)
	cmd.Dir = filepath.Dir(job) // it leaves a state file
	if out, err := cmd.CombinedOutput(); err != nil || !bytes.Contains(out, []byte("err= 0")) {
		t.Errorf("fio: %v\n%s", err, out)
	}
	if s := r.Stats(); s.Errors != 0 || s.WriteBytes == 0 {
		t.Errorf("stats %+v", s)
	}
}

// TestTLSInterop: QEMU and libnbd as clients, QEMU as the server, each side
// proving itself with a certificate.
func TestTLSInterop(t *testing.T) {
	need(t, "qemu-img", "qemu-nbd", "nbdinfo")
	keys := makePKI(t)
	m := patterned(t, 4<<20)
	r := serve(t, shelf{"d": m}, ServerOptions{TLS: keys.server, RequireTLS: true}, "tcp")
	_, port, err := net.SplitHostPort(r.addr.Addr)
	if err != nil {
		t.Fatal(err)
	}
	raw := filepath.Join(scratch(t), "raw")
	run(t, "qemu-img", "convert", "--object", "tls-creds-x509,id=t,endpoint=client,dir="+keys.dir, "--image-opts",
		"driver=nbd,server.type=inet,server.host=localhost,server.port="+port+",export=d,tls-creds=t", "-O", "raw", raw)
	got, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	same(t, "qemu-img over TLS", got, content(t, m))
	if out := run(t, "nbdinfo", "nbds://localhost:"+port+"/d?tls-certificates="+keys.dir); !strings.Contains(out, "with TLS") {
		t.Errorf("nbdinfo: %s", out)
	}
	if out, err := exec.Command("nbdinfo", "nbd://localhost:"+port+"/d?tls-certificates=/nonexistent").CombinedOutput(); err == nil {
		t.Errorf("nbdinfo without TLS got in: %s", out)
	}

	sock := filepath.Join(scratch(t), "q")
	background(t, sock, "qemu-nbd", "--object", "tls-creds-x509,id=t,endpoint=server,verify-peer=on,dir="+keys.dir,
		"--tls-creds", "t", "-k", sock, "-f", "raw", "-x", "d", "-t", "-e", "4", raw)
	a := Address{Network: "unix", Addr: sock, Export: "d", TLS: true, ServerName: "localhost"}
	c := dialTest(t, a, DialOptions{TLS: keys.client})
	disktest.Reader(t, c, got)
	c.Close()
	if c, err := Dial(t.Context(), Address{Network: "unix", Addr: sock, Export: "d"}, DialOptions{}); err == nil || c != nil {
		t.Errorf("dial without TLS: %v", err)
	}
}

// TestAgainstQemuNbd runs the suite of disks on our client against qemu-nbd.
func TestAgainstQemuNbd(t *testing.T) {
	need(t, "qemu-nbd", "qemu-img")
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			disktest.Device(t, func(t *testing.T) disk.Device {
				dir := scratch(t)
				img, sock := filepath.Join(dir, "img"), filepath.Join(dir, "s")
				run(t, "qemu-img", "create", "-q", "-f", format, img, "3M")
				background(t, sock, "qemu-nbd", "-f", format, "-k", sock, "-x", "d", "-t", "-e", "8", "--discard=unmap", img)
				return dialTest(t, Address{Network: "unix", Addr: sock, Export: "d"}, DialOptions{Conns: 2})
			})
		})
	}
}

// TestDirtyBitmap reads a bitmap as it is read in a pull-mode backup.
func TestDirtyBitmap(t *testing.T) {
	need(t, "qemu-nbd", "qemu-img", "qemu-io")
	dir := scratch(t)
	img, sock := filepath.Join(dir, "img"), filepath.Join(dir, "s")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", img, "4G")
	run(t, "qemu-io", "-c", "write 0 1M", img)
	run(t, "qemu-img", "bitmap", "--add", "-g", "64k", img, "b0")
	run(t, "qemu-io", "-c", "write 512k 64k", "-c", "write 3G 128k", "-c", "write -z 10M 64k", img)
	background(t, sock, "qemu-nbd", "-r", "-f", "qcow2", "-k", sock, "-x", "d", "-t", "-e", "4", "-B", "b0", img)
	a := Address{Network: "unix", Addr: sock, Export: "d"}
	c := dialTest(t, a, DialOptions{Contexts: []string{DirtyBitmap("b0"), DirtyBitmap("none")}})
	defer c.Close()
	got, err := disk.Collect(c.Dirty(t.Context(), "b0", 0, c.Size()))
	want := []disk.Extent{{Off: 512 << 10, Len: 64 << 10}, {Off: 10 << 20, Len: 64 << 10}, {Off: 3 << 30, Len: 128 << 10}}
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("dirty: %v, %v; want %v", got, err, want)
	}
	got, err = disk.Collect(c.Dirty(t.Context(), "b0", 520<<10, 1))
	if err != nil || len(got) != 1 || got[0] != (disk.Extent{Off: 520 << 10, Len: 1}) {
		t.Errorf("dirty in part: %v, %v", got, err)
	}
	if _, err := disk.Collect(c.Dirty(t.Context(), "none", 0, c.Size())); !errors.Is(err, ErrNoContext) {
		t.Errorf("a bitmap that is not there: %v", err)
	}
	n, err := disk.DataBytes(c.Extents(t.Context(), 0, c.Size()))
	if err != nil || n != 1<<20+128<<10 {
		t.Errorf("data: %d bytes, %v", n, err)
	}
}

// TestAgainstNbdkit runs the suite on our client against nbdkit, made strict
// about blocks, and made old.
func TestAgainstNbdkit(t *testing.T) {
	need(t, "nbdkit")
	for name, args := range map[string][]string{
		"plain":  {"memory", "3M"},
		"blocks": {"--filter=blocksize-policy", "memory", "3M", "blocksize-minimum=4096", "blocksize-maximum=64k", "blocksize-error-policy=error"},
		"old":    {"--no-sr", "--filter=nozero", "memory", "3M"},
	} {
		t.Run(name, func(t *testing.T) {
			if testing.Short() && name != "blocks" {
				t.Skip("it is left out of short runs")
			}
			disktest.Device(t, func(t *testing.T) disk.Device {
				sock := filepath.Join(scratch(t), "s")
				background(t, sock, "nbdkit", append([]string{"-f", "-U", sock}, args...)...)
				c := dialTest(t, Address{Network: "unix", Addr: sock}, DialOptions{Conns: 2})
				if name == "blocks" && (c.info.MinBlock != 4096 || c.info.MaxPayload != 64<<10) {
					t.Errorf("block sizes %+v", c.info)
				}
				return c
			})
		})
	}
}

// TestMain is also the server that TestQemuReconnects kills.
func TestMain(m *testing.M) {
	if path := os.Getenv("NBD_TEST_SOCKET"); path != "" {
		if err := serveFile(path, os.Getenv("NBD_TEST_FILE")); err != nil {
			fmt.Println(err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func serveFile(sock, file string) error {
	d, err := disk.OpenFile(file, disk.FileOptions{})
	if err != nil {
		return err
	}
	l, err := ListenUnix(context.Background(), sock, SocketOptions{})
	if err != nil {
		return err
	}
	return NewServer(shelf{"d": d}, ServerOptions{}).Serve(context.Background(), l)
}

// qemuIO is a qemu-io that lives on.
type qemuIO struct {
	t   *testing.T
	in  io.Writer
	out chan string
}

func startQemuIO(t *testing.T, sock string) *qemuIO {
	t.Helper()
	cmd := exec.Command("qemu-io", "--image-opts",
		"driver=nbd,server.type=unix,server.path="+sock+",export=d,reconnect-delay=30")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	q := &qemuIO{t: t, in: in, out: make(chan string, 1000)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for s := bufio.NewScanner(pipe); s.Scan(); {
			q.out <- s.Text()
		}
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-done
		cmd.Wait()
	})
	return q
}

func (q *qemuIO) say(command string) {
	if _, err := fmt.Fprintln(q.in, command); err != nil {
		q.t.Fatal(err)
	}
}

// hear waits for a line with the text. Commands that came to qemu-io together
// wait in its buffer until there is more input, so it is given empty lines.
func (q *qemuIO) hear(text string) {
	q.t.Helper()
	nudge := time.NewTicker(50 * time.Millisecond)
	defer nudge.Stop()
	for end := time.After(40 * time.Second); ; {
		select {
		case <-nudge.C:
			q.say("")
		case s := <-q.out:
			if strings.Contains(s, text) {
				return
			}
			if strings.Contains(s, "rror") || strings.Contains(s, "fail") {
				q.t.Fatalf("qemu-io: %s", s)
			}
		case <-end:
			q.t.Fatalf("qemu-io never says %q", text)
		}
	}
}

// TestQemuReconnects: a server is killed with a request under way, and another
// takes its place on the same socket; QEMU goes on.
func TestQemuReconnects(t *testing.T) {
	need(t, "qemu-io")
	t.Parallel()
	dir := scratch(t)
	sock, file := filepath.Join(dir, "s"), filepath.Join(dir, "f")
	f, err := disk.CreateFile(file, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	start := func() *exec.Cmd {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "NBD_TEST_SOCKET="+sock, "NBD_TEST_FILE="+file)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		awaitSocket(t, sock)
		return cmd
	}
	server := start()
	q := startQemuIO(t, sock)
	q.say("write -P 0x11 0 1M")
	q.hear("wrote 1048576/1048576")
	for round := range 2 {
		freeze(t, server)
		q.say(fmt.Sprintf("aio_write -P 0x%d 1M 1M", 22+round))
		q.say("aio_read -P 0x11 0 64k")
		server.Process.Kill()
		server.Wait()
		server = start()
		q.say("aio_flush")
		q.hear("read 65536/65536")
		q.say("flush")
		q.say(fmt.Sprintf("read -P 0x%d 1M 1M", 22+round))
		q.hear("read 1048576/1048576")
	}
	want := make([]byte, 8<<20)
	copy(want, bytes.Repeat([]byte{0x11}, 1<<20))
	copy(want[1<<20:], bytes.Repeat([]byte{0x23}, 1<<20))
	same(t, "disk", content(t, f), want)
}

// TestQemuGoesOn: a server ends in good order and another takes its place. A
// client that connects again sees no error.
func TestQemuGoesOn(t *testing.T) {
	need(t, "qemu-io")
	t.Parallel()
	m := disk.NewMem(4 << 20)
	sock := filepath.Join(scratch(t), "s")
	start := func() *running {
		l, err := ListenUnix(t.Context(), sock, SocketOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return serveAt(t, l, Address{Network: "unix", Addr: sock}, shelf{"d": m}, ServerOptions{Resumable: true})
	}
	r := start()
	q := startQemuIO(t, sock)
	for round := range 2 {
		q.say(fmt.Sprintf("write -P 0x%d 0 64k", 10+round))
		q.hear("wrote 65536/65536")
		r.end(t)
		q.say(fmt.Sprintf("read -P 0x%d 0 64k", 10+round))
		r = start()
		q.hear("read 65536/65536")
	}
}
