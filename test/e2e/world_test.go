//go:build linux

// Package e2e tests the built program on real guests and images, by its command
// line alone. HOLDFAST_LAB=1 runs it; HOLDFAST_BIN is the program, by default
// bin/holdfast of this checkout. See package lab for the guests.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"holdfast/test/cli"
	"holdfast/test/lab"
)

const host = "qemu:///system"

// world is one test's program, repository, storage and guests.
type world struct {
	*cli.Tool
	t     *testing.T
	ctx   context.Context
	store string // storage directory for recovered guests
	dir   string // everything else
}

// newWorld makes an empty repository. When the test ends nothing may be left
// that the test did not remove.
func newWorld(t *testing.T) *world {
	t.Helper()
	lab.Beside(t)
	w := world0(t)
	w.must("init")
	return w
}

// world0 is newWorld without a repository.
func world0(t *testing.T) *world {
	t.Helper()
	bin := os.Getenv("HOLDFAST_BIN")
	if bin == "" {
		bin = "../../bin/holdfast"
	}
	bin, err := filepath.Abs(bin)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(bin); err != nil {
		t.Fatalf("no program to test (make build): %v", err)
	}
	w := &world{t: t, ctx: t.Context(), store: lab.Storage(t), dir: lab.Storage(t)}
	w.Tool = &cli.Tool{Bin: bin, Repo: filepath.Join(w.dir, "repo"), State: filepath.Join(w.dir, "state"), Passphrase: "e2e"}
	t.Cleanup(w.end)
	return w
}

// end removes what a failed test left, and fails a good one that left any.
func (w *world) end() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	pids, err := w.Processes()
	if err != nil {
		w.t.Error(err)
	}
	if len(pids) > 0 && !w.t.Failed() {
		w.t.Errorf("processes %v are left", pids)
	}
	for _, pid := range pids {
		if p, err := os.FindProcess(pid); err == nil {
			_ = p.Kill()
		}
	}
	for _, name := range w.guests(ctx) {
		if !w.t.Failed() {
			w.t.Errorf("guest %s is left", name)
		}
		if err := lab.Open(name).Remove(ctx); err != nil {
			w.t.Error(err)
		}
	}
	if w.t.Failed() {
		w.logs()
	}
}

// logs shows what the program's processes wrote into its state directory.
func (w *world) logs() {
	filepath.WalkDir(w.State, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "log") {
			return nil
		}
		if b, err := os.ReadFile(path); err == nil {
			w.t.Logf("%s:\n%s", path, b[max(0, len(b)-4000):])
		}
		return nil
	})
}

// guests lists the domains that have a disk in the test's storage.
func (w *world) guests(ctx context.Context) []string {
	out, err := lab.Virsh(ctx, "list", "--all", "--name")
	if err != nil {
		w.t.Error(err)
	}
	var mine []string
	for name := range strings.FieldsSeq(out) {
		if dir, err := lab.Dir(ctx, name); err == nil && dir == w.store {
			mine = append(mine, name)
		}
	}
	return mine
}

// ok fails the test on an error.
func (w *world) ok(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// logf logs with the time, so that a slow step is seen.
func (w *world) logf(format string, args ...any) {
	w.t.Helper()
	w.t.Logf("%s  %s", time.Now().Format("15:04:05.0"), fmt.Sprintf(format, args...))
}

// must runs the program, which must succeed.
func (w *world) must(args ...string) cli.Result {
	w.t.Helper()
	r := w.Run(w.ctx, args...)
	w.logf("holdfast %s: %.1f s", strings.Join(args, " "), r.Took.Seconds())
	w.ok(r.Err())
	return r
}

// json runs the program, which must succeed, and decodes its result.
func (w *world) json(result any, args ...string) {
	w.t.Helper()
	r, err := w.JSON(w.ctx, result, args...)
	w.logf("holdfast %s: %.1f s", strings.Join(args, " "), r.Took.Seconds())
	w.ok(err)
}

// backup backs one VM up.
func (w *world) backup(host, vm string, more ...string) cli.Backup {
	w.t.Helper()
	var all []cli.Backup
	w.json(&all, append([]string{"backup", host, vm}, more...)...)
	if len(all) != 1 || all[0].VM != vm || all[0].Point == "" || all[0].Error != "" {
		w.t.Fatalf("backup of %s: %+v", vm, all)
	}
	w.logf("point %s: read %d, new %d, stored %d, full because %q", all[0].Point, all[0].ReadBytes, all[0].NewBytes, all[0].StoredBytes, all[0].FullReason)
	return all[0]
}

// points are a VM's restore points. That it has none yet is an error of the
// command for one VM, not of that for all.
func (w *world) points(vm string) []cli.Point {
	w.t.Helper()
	return slices.DeleteFunc(w.all(), func(p cli.Point) bool { return p.VM != vm })
}

func (w *world) all() []cli.Point {
	w.t.Helper()
	var all []cli.Point
	w.json(&all, "points")
	return all
}

func (w *world) sessions() []cli.Session {
	w.t.Helper()
	var all []cli.Session
	w.json(&all, "sessions")
	return all
}

// refused checks that the program failed in the way of a good program: the exit
// status, one short line that names the trouble and what to do, no stack.
func (w *world) refused(r cli.Result, code int, words ...string) {
	w.t.Helper()
	line := errorLine(r.Stderr)
	w.t.Logf("exit status %d: %s", r.Code, line)
	if r.Code != code {
		w.t.Errorf("holdfast %s: exit status %d, not %d: %s", strings.Join(r.Args, " "), r.Code, code, r.Stderr)
	}
	if !strings.HasPrefix(line, "holdfast: ") || len(line) > 600 || strings.Count(r.Stderr, "holdfast: ") != 1 {
		w.t.Errorf("the error is not one short line: %q", r.Stderr)
	}
	for _, word := range words {
		if !strings.Contains(strings.ToLower(line), strings.ToLower(word)) {
			w.t.Errorf("the error does not say %q: %s", word, line)
		}
	}
	for _, bad := range []string{"panic", "goroutine ", "runtime error", "%!"} {
		if strings.Contains(r.Stderr, bad) {
			w.t.Errorf("stderr has %q: %s", bad, r.Stderr)
		}
	}
}

// errorLine is the last line of stderr: those before it may be progress.
func errorLine(stderr string) string {
	lines := strings.Split(strings.TrimSpace(stderr), "\n")
	return lines[len(lines)-1]
}

// empty checks that nothing is left in the storage directory and no session.
func (w *world) empty() {
	w.t.Helper()
	if names, err := os.ReadDir(w.store); err != nil || len(names) > 0 {
		w.t.Errorf("storage is not empty: %v %v", names, err)
	}
	if s := w.sessions(); len(s) > 0 {
		w.t.Errorf("sessions are left: %+v", s)
	}
	if g := w.guests(w.ctx); len(g) > 0 {
		w.t.Errorf("guests are left: %v", g)
	}
	if pids, err := w.Processes(); err != nil || len(pids) > 0 {
		w.t.Errorf("processes are left: %v %v", pids, err)
	}
}

// kill ends every process of the program as a crash would, and returns how many
// there were.
func (w *world) kill() int {
	w.t.Helper()
	pids, err := w.Processes()
	w.ok(err)
	for _, pid := range pids {
		p, err := os.FindProcess(pid)
		w.ok(err)
		if err := p.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			w.t.Fatal(err)
		}
	}
	w.ok(lab.Poll(w.ctx, 10*time.Second, "the killed are gone", func() (bool, error) {
		return !slices.ContainsFunc(pids, alive), nil
	}))
	return len(pids)
}

// alive reports whether a process may still hold files and locks: it may while
// any of its threads lives, though the first is a zombie already (proc(5),
// /proc/pid/task).
func alive(pid int) bool {
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil || len(tasks) != 1 {
		return err == nil
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	state := strings.TrimSpace(string(b[bytes.LastIndexByte(b, ')')+1:]))
	return !strings.HasPrefix(state, "Z") && !strings.HasPrefix(state, "X")
}

// clean checks that a backup left nothing on the guest's host: no job, no
// snapshot, at most one checkpoint.
func (w *world) clean(vm string) {
	w.t.Helper()
	info, err := lab.Virsh(w.ctx, "domjobinfo", vm)
	w.ok(err)
	if !strings.Contains(info, "None") {
		w.t.Errorf("guest %s still has a job: %s", vm, info)
	}
	for kind, most := range map[string]int{"snapshot-list": 0, "checkpoint-list": 1} {
		out, err := lab.Virsh(w.ctx, kind, "--name", vm)
		w.ok(err)
		if names := strings.Fields(out); len(names) > most {
			w.t.Errorf("%s of %s: %v", kind, vm, names)
		}
	}
}

// local checks that no disk of the guest depends on another file or a server.
func (w *world) local(vm string) []string {
	w.t.Helper()
	var disks []string
	for _, inactive := range []string{"--inactive", ""} {
		args := []string{"dumpxml", vm}
		if inactive != "" {
			args = append(args, inactive)
		}
		xml, err := lab.Virsh(w.ctx, args...)
		w.ok(err)
		if strings.Contains(xml, "nbd") {
			w.t.Errorf("the configuration of %s still names a server:\n%s", vm, xml)
		}
	}
	out, err := lab.Virsh(w.ctx, "domblklist", "--details", vm)
	w.ok(err)
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) != 4 || f[1] != "disk" {
			continue
		}
		disks = append(disks, f[3])
		var info map[string]any
		b, err := exec.CommandContext(w.ctx, "qemu-img", "info", "-U", "--output=json", f[3]).Output()
		w.ok(err)
		w.ok(json.Unmarshal(b, &info))
		if info["backing-filename"] != nil || info["full-backing-filename"] != nil {
			w.t.Errorf("%s still has a backing file: %v", f[3], info)
		}
		if filepath.Dir(f[3]) != w.store {
			w.t.Errorf("%s does not lie in the storage directory", f[3])
		}
	}
	if len(disks) == 0 {
		w.t.Errorf("guest %s has no disk: %s", vm, out)
	}
	return disks
}

// run runs another program, which must succeed.
func (w *world) run(name string, args ...string) string {
	w.t.Helper()
	out, err := exec.CommandContext(w.ctx, name, args...).CombinedOutput()
	if err != nil {
		w.t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// same checks that two images hold the same bytes for a guest.
func (w *world) same(a, b string) {
	w.t.Helper()
	w.run("qemu-img", "compare", "-U", a, b)
}

// offline verifies the writer's records in a raw ext4 file, without a guest.
func (w *world) offline(raw, dir string, acked uint64) {
	w.t.Helper()
	writer := filepath.Join(filepath.Dir(w.Bin), "lab", "guestwriter")
	if _, err := os.Stat(writer); err != nil {
		w.t.Fatalf("no guestwriter (make lab): %v", err)
	}
	// The journal is replayed as the guest's kernel would. 1: errors corrected.
	if err := exec.CommandContext(w.ctx, "e2fsck", "-fp", raw).Run(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() > 1 {
			w.t.Fatalf("e2fsck %s: %v", raw, err)
		}
	}
	to := w.t.TempDir()
	w.run("debugfs", "-R", fmt.Sprintf("rdump %s %s", dir, to), raw)
	w.run(writer, "verify", "-cached", "-acked", fmt.Sprint(acked), filepath.Join(to, filepath.Base(dir)))
}
