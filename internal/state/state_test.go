package state

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

type record struct {
	Name string `json:"name"`
	N    int    `json:"n"`
}

func open(t *testing.T) *Dir {
	t.Helper()
	d, err := Open(filepath.Join(t.TempDir(), "state"))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func session(t *testing.T, d *Dir, r record) *Session {
	t.Helper()
	s, l, err := d.NewSession(NewID(), r, "test")
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Release(); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSession(t *testing.T) {
	d := open(t)
	id := NewID()
	s, l, err := d.NewSession(id, record{"a", 1}, "recover")
	if err != nil {
		t.Fatal(err)
	}
	if h, ok := s.Changing(); !ok || h.PID != os.Getpid() || h.Name != "recover" {
		t.Errorf("the maker does not hold the command lock: %v %v", h, ok)
	}
	if _, _, err := d.NewSession(id, record{"b", 1}, "recover"); err == nil {
		t.Error("a second session under the same id")
	}
	if err := s.Save(record{"a", 2}); err != nil {
		t.Fatal(err)
	}
	again, err := d.Session(id[:6])
	if err != nil {
		t.Fatal(err)
	}
	var r record
	if err := again.Load(&r); err != nil || r != (record{"a", 2}) {
		t.Fatalf("loaded %v, %v", r, err)
	}
	if _, err := again.LockCommand("undo"); !errors.Is(err, ErrLocked) || !strings.Contains(err.Error(), "recover") {
		t.Errorf("locked twice: %v", err)
	}
	if err := s.SaveNote("served", record{"n", 3}); err != nil {
		t.Fatal(err)
	}
	if err := s.LoadNote("served", &r); err != nil || r.N != 3 {
		t.Errorf("note: %v, %v", r, err)
	}
	if err := s.LoadNote("other", &r); !errors.Is(err, ErrNotExist) {
		t.Errorf("missing note: %v", err)
	}
	if err := os.WriteFile(s.Path("vda.overlay"), make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(l); err != nil {
		t.Fatal(err)
	}
	if err := s.Load(&r); !errors.Is(err, ErrNotExist) {
		t.Errorf("loaded after removal: %v", err)
	}
	if _, err := s.LockServe(); !errors.Is(err, ErrNotExist) {
		t.Errorf("locked after removal: %v", err)
	}
	if ss, err := d.Sessions(); err != nil || len(ss) != 0 {
		t.Errorf("sessions after removal: %v, %v", ss, err)
	}
}

func TestSessionPrefix(t *testing.T) {
	d := open(t)
	for _, id := range []string{"aa00000000000000", "aa11111111111111", "bb00000000000000"} {
		_, l, err := d.NewSession(id, record{}, "test")
		if err != nil {
			t.Fatal(err)
		}
		l.Release()
	}
	for prefix, want := range map[string]error{"aa": ErrAmbiguous, "aa0": nil, "bb": nil, "cc": ErrNotExist,
		"": ErrNotExist, "../": ErrNotExist, "AA": ErrNotExist} {
		if _, err := d.Session(prefix); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", prefix, err, want)
		}
	}
}

// A record that was cut off, changed or written by others is a clear error
// that names the file, at every length and every byte.
func TestDamagedRecord(t *testing.T) {
	d := open(t)
	s := session(t, d, record{"web", 7})
	path := s.Path("session.json")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, data []byte) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		var r record
		err := s.Load(&r)
		if err == nil {
			if r != (record{"web", 7}) {
				t.Errorf("%s: read %v without an error", what, r)
			}
			return // a change outside of any value: case of a key, a space
		}
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrVersion) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for n := range len(good) - 1 {
		check(fmt.Sprintf("cut at %d", n), good[:n])
	}
	for i := range good {
		for _, bit := range []byte{1, 4, 32, 128} {
			bad := append([]byte(nil), good...)
			bad[i] ^= bit
			check(fmt.Sprintf("byte %d ^ %d", i, bit), bad)
		}
	}
	check("empty", nil)
	check("null", []byte("null"))
	check("array", []byte("[]"))
	check("huge", make([]byte, maxRecord+10))
	newer := strings.Replace(string(good), `"version":1`, `"version":2`, 1)
	check("newer", []byte(newer))
	os.WriteFile(path, []byte(newer), 0o600)
	if err := s.Load(&record{}); !errors.Is(err, ErrVersion) {
		t.Errorf("newer version: %v", err)
	}
	// A damaged one can be removed.
	if ss, err := d.Sessions(); err != nil || len(ss) != 1 {
		t.Fatalf("%v, %v", ss, err)
	}
	if err := s.Remove(); err != nil {
		t.Fatal(err)
	}
}

// What a crash leaves at each step of making and removing a session is no
// session, and is swept away; what is being made now is left alone.
func TestSweep(t *testing.T) {
	d := open(t)
	dir := filepath.Join(d.Path(), "sessions")
	mk := func(name string, files ...string) string {
		p := filepath.Join(dir, name)
		if err := os.Mkdir(p, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if err := os.WriteFile(filepath.Join(p, f), []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return p
	}
	gone := []string{
		mk(".new-"+NewID(), "command.lock"),
		mk(".new-"+NewID(), "command.lock", "session.json"),
		mk(NewID(), "command.lock", "serve.lock", "vda.overlay"),
		mk(NewID()),
	}
	alive := mk(".new-" + NewID())
	l, err := acquire(filepath.Join(alive, "command.lock"), "recover")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Release()
	foreign := mk("lost+found")
	if ss, err := d.Sessions(); err != nil || len(ss) != 0 {
		t.Errorf("%v, %v", ss, err)
	}
	for _, p := range gone {
		if _, err := os.Lstat(p); err == nil {
			t.Errorf("%s was left", p)
		}
	}
	for _, p := range []string{alive, foreign} {
		if _, err := os.Lstat(p); err != nil {
			t.Error(err)
		}
	}
}

func TestClear(t *testing.T) {
	d := open(t)
	s := session(t, d, record{"a", 1})
	for _, p := range []string{"overlays/vda", "other"} {
		if err := os.MkdirAll(s.Path(p), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{"log", "overlays/vda/data", "other/note.json"} {
		if err := os.WriteFile(s.Path(p), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := s.Clear(); err != nil {
			t.Fatal(err)
		}
	}
	left, err := filepath.Glob(s.Path("*"))
	if err != nil || len(left) != 3 { // session.json, command.lock, log
		t.Errorf("left %v, %v", left, err)
	}
	var r record
	if err := s.Load(&r); err != nil || r.N != 1 {
		t.Errorf("%v, %v", r, err)
	}
}

func TestFirstRecordFails(t *testing.T) {
	d := open(t)
	if _, _, err := d.NewSession(NewID(), make(chan int), "x"); err == nil {
		t.Fatal("a channel became a record")
	}
	if e, err := os.ReadDir(filepath.Join(d.Path(), "sessions")); err != nil || len(e) != 0 {
		t.Errorf("left %v, %v", e, err)
	}
}

func TestSaveKeepsOld(t *testing.T) {
	d := open(t)
	s := session(t, d, record{"old", 1})
	if err := s.Save(make(chan int)); err == nil {
		t.Fatal("a channel became a record")
	}
	// Renaming onto a directory fails late: nothing may be left of the attempt.
	if err := os.Mkdir(s.Path("note.json"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := s.SaveNote("note", record{}); err == nil {
		t.Fatal("a directory was replaced")
	}
	var r record
	if err := s.Load(&r); err != nil || r.Name != "old" {
		t.Errorf("%v, %v", r, err)
	}
	if left, _ := filepath.Glob(s.Path(".new-*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

func TestDirPrivate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b")
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv(Env, path)
	d, err := Open("")
	if err != nil {
		t.Fatal(err)
	}
	if d.Path() != path {
		t.Errorf("opened %s", d.Path())
	}
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if os.PathSeparator == '/' && fi.Mode().Perm() != 0o700 {
		t.Errorf("mode %v", fi.Mode())
	}
	file := filepath.Join(path, "file")
	os.WriteFile(file, nil, 0o600)
	if _, err := Open(file); err == nil {
		t.Error("opened a file")
	}
}

func TestJournal(t *testing.T) {
	d := open(t)
	r, err := d.NewRun(RunRecord{ID: NewID(), Started: time.Now().UTC(), Repository: "r1"})
	if err != nil {
		t.Fatal(err)
	}
	id := r.record.ID
	if _, err := d.NewRun(RunRecord{ID: id}); err == nil {
		t.Error("a second run under the same id")
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			err := r.Update(func(rr *RunRecord) {
				rr.Tasks = append(rr.Tasks, Task{Host: "h", VM: fmt.Sprint(i), Step: "snapshot"})
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	runs, err := d.Runs()
	if err != nil || len(runs) != 1 || !runs[0].Alive || len(runs[0].Tasks) != 8 || runs[0].Repository != "r1" {
		t.Fatalf("%+v, %v", runs, err)
	}
	if d.RunDead(id) {
		t.Error("a living run is called dead")
	}
	if err := d.EndRun(id); !errors.Is(err, ErrLocked) {
		t.Errorf("ended a living run: %v", err)
	}
	if err := r.Abandon(); err != nil {
		t.Fatal(err)
	}
	if !d.RunDead(id) {
		t.Error("an abandoned run is called alive")
	}
	if runs, err := d.Runs(); err != nil || len(runs) != 1 || runs[0].Alive {
		t.Fatalf("%+v, %v", runs, err)
	}
	if err := d.EndRun(id); err != nil {
		t.Fatal(err)
	}
	if err := d.EndRun(id); err != nil {
		t.Errorf("ending it again: %v", err)
	}
	if e, err := os.ReadDir(filepath.Join(d.Path(), "journal")); err != nil || len(e) != 0 {
		t.Errorf("left %v, %v", e, err)
	}
}

func TestJournalDamaged(t *testing.T) {
	d := open(t)
	a, err := d.NewRun(RunRecord{ID: "aaaaaaaaaaaaaaaa"})
	if err != nil {
		t.Fatal(err)
	}
	defer a.End()
	if err := os.WriteFile(filepath.Join(d.Path(), "journal", "bbbbbbbbbbbbbbbb.json"), []byte(`{"form`), 0o600); err != nil {
		t.Fatal(err)
	}
	runs, err := d.Runs()
	if err != nil || len(runs) != 2 || runs[0].Err != nil || !errors.Is(runs[1].Err, ErrDamaged) || runs[1].ID != "bbbbbbbbbbbbbbbb" {
		t.Fatalf("%+v, %v", runs, err)
	}
	if err := d.EndRun("bbbbbbbbbbbbbbbb"); err != nil {
		t.Fatal(err)
	}
}

// A killed process gives its locks up and leaves its records.
func TestKilledProcess(t *testing.T) {
	if dir := os.Getenv("STATE_TEST_CHILD"); dir != "" {
		child(dir)
		return
	}
	d := open(t)
	cmd := exec.Command(os.Args[0], "-test.run=^TestKilledProcess$")
	cmd.Env = append(os.Environ(), "STATE_TEST_CHILD="+d.Path())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "ready\n" {
		t.Fatalf("child said %q, %v", line, err)
	}
	ss, err := d.Sessions()
	if err != nil || len(ss) != 1 {
		t.Fatalf("%v, %v", ss, err)
	}
	if h, ok := ss[0].Serving(); !ok || h.PID != cmd.Process.Pid || h.Name != "serve" {
		t.Errorf("holder %v, %v", h, ok)
	}
	if runs, err := d.Runs(); err != nil || len(runs) != 1 || !runs[0].Alive {
		t.Errorf("%+v, %v", runs, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// Asked at once, while it may still be ending.
	if h, ok := ss[0].Serving(); ok {
		t.Errorf("still held by %v", h)
	}
	cmd.Wait()
	l, err := ss[0].LockServe()
	if err != nil {
		t.Fatal(err)
	}
	l.Release()
	if runs, err := d.Runs(); err != nil || len(runs) != 1 || runs[0].Alive || runs[0].Tasks[0].VM != "web" {
		t.Errorf("%+v, %v", runs, err)
	}
}

func child(dir string) {
	d, err := Open(dir)
	var command, serve *Lock
	var s *Session
	var r *Run
	if err == nil {
		s, command, err = d.NewSession(NewID(), record{}, "recover")
	}
	if err == nil {
		serve, err = s.LockServe()
	}
	if err == nil {
		r, err = d.NewRun(RunRecord{ID: NewID()})
	}
	if err == nil {
		err = r.Update(func(r *RunRecord) { r.Tasks = []Task{{VM: "web"}} })
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready")
	<-make(chan int)
	runtime.KeepAlive([]any{command, serve, r}) // a lock ends with its file
}
