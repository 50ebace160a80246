package harden

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
)

// The writer of these tests: nobody's ids.
const (
	writerUID = 54321
	writerGID = 54322
)

// asked makes the test binary run one of children, as another user.
const (
	childTask = "HARDEN_TEST_CHILD"
	childDirs = "HARDEN_TEST_DIRS"
)

var children = map[string]func(t *testing.T, dirs []string){
	"conformance": childConformance, "attacks": childAttacks, "refused": childRefused, "keeper": childKeeper, "writing": childWriting,
}

func TestChild(t *testing.T) {
	task := children[os.Getenv(childTask)]
	if task == nil {
		t.Skip("this is for other tests")
	}
	task(t, strings.Split(os.Getenv(childDirs), ":"))
}

// ground is a directory on a filesystem that keeps the attribute, which
// everybody may enter; without one, or without root, the test is skipped.
func ground(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, AND NOT TESTED: a hardened directory needs root")
	}
	for _, in := range []string{os.TempDir(), "/var/tmp", "/root"} {
		dir, err := os.MkdirTemp(in, "holdfast-harden-")
		if err != nil {
			continue
		}
		t.Cleanup(func() { raze(dir) })
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		var s unix.Statfs_t
		if err := unix.Statfs(dir, &s); err != nil || fleeting[int64(uint32(s.Type))] != "" || safeAbove(dir, writerUID) != nil {
			continue
		}
		f, err := os.Create(filepath.Join(dir, "try"))
		if err != nil {
			t.Fatal(err)
		}
		err = errors.Join(setImmutable(f, true), setImmutable(f, false), f.Close())
		if err == nil {
			return dir
		}
	}
	t.Skip("SKIPPED, AND NOT TESTED: no filesystem here has the immutable attribute")
	return ""
}

// raze removes a directory with what is locked in it.
func raze(dir string) {
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if f, err := os.Open(path); err == nil {
				_ = setImmutable(f, false)
				_ = f.Close()
			}
		}
		return nil
	})
	_ = os.RemoveAll(dir)
}

var places = []string{"a", "a/b", "race", "packs", "packs/00", "leases"}

// hardened makes a hardened directory with a configuration.
func hardened(t *testing.T, in string) string {
	t.Helper()
	dir, err := os.MkdirTemp(in, "store-")
	if err != nil {
		t.Fatal(err)
	}
	store(t, dir, "config")
	if _, err := Prepare(setup(dir), false); err != nil {
		t.Fatal(err)
	}
	return dir
}

func setup(dir string) Setup {
	return Setup{Dir: dir, User: fmt.Sprintf("%d:%d", writerUID, writerGID), Places: places}
}

// store puts an object there, as the writer would.
func store(t *testing.T, dir, name string) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := errors.Join(os.WriteFile(path, []byte(name), 0o400), os.Chown(path, writerUID, writerGID)); err != nil {
		t.Fatal(err)
	}
}

func keeper(t *testing.T, dir string) *Keeper {
	t.Helper()
	k, err := Open(dir, Options{Never: []string{"leases/"}, Note: func(s string) { t.Log(s) }})
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// keep runs a keeper until the test is over.
func keep(t *testing.T, dir string) {
	t.Helper()
	k := keeper(t, dir)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- k.Run(ctx, func(Done) {}) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, k.Close()); err != nil {
			t.Error(err)
		}
	})
}

// child runs a task in a process of its own, as that user.
func child(t *testing.T, task string, uid, gid uint32, dirs ...string) *exec.Cmd {
	t.Helper()
	// The test binary lies where only root may go.
	program := filepath.Join(filepath.Dir(dirs[0]), "program")
	if _, err := os.Stat(program); err != nil {
		p, err := os.ReadFile(os.Args[0])
		if err == nil {
			err = os.WriteFile(program, p, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(program, "-test.run=^TestChild$", "-test.v")
	cmd.Dir = "/"
	cmd.Env = []string{childTask + "=" + task, childDirs + "=" + strings.Join(dirs, ":"), "PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	return cmd
}

// asWriter runs a task as the writer.
func asWriter(t *testing.T, task string, dirs ...string) {
	t.Helper()
	out, err := child(t, task, writerUID, writerGID, dirs...).CombinedOutput()
	if err != nil {
		t.Errorf("%s as the writer: %v\n%s", task, err, out)
	} else if !bytes.Contains(out, []byte("--- PASS: TestChild")) {
		t.Errorf("%s as the writer did not run:\n%s", task, out)
	}
}

func TestConformance(t *testing.T) {
	in := ground(t)
	var dirs []string
	for range 10 {
		dir := hardened(t, in)
		if err := os.Remove(filepath.Join(dir, "config")); err != nil { // an empty store
			t.Fatal(err)
		}
		keep(t, dir)
		dirs = append(dirs, dir)
	}
	asWriter(t, "conformance", dirs...)
}

func childConformance(t *testing.T, dirs []string) {
	open := func(t *testing.T) blob.Store {
		if len(dirs) == 0 {
			t.Fatal("too few directories")
		}
		d, err := blob.OpenDir(dirs[0])
		if err != nil {
			t.Fatal(err)
		}
		dirs = dirs[1:]
		return d
	}
	blobtest.Store(t, open)
	blobtest.Locker(t, blob.Governance, open)
	d, err := blob.OpenDir(strings.Split(os.Getenv(childDirs), ":")[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Probe(t.Context()); err != nil {
		t.Error(err)
	}
	if err := d.Canary(t.Context(), blob.Compliance); !errors.Is(err, blob.ErrNoLock) || !strings.Contains(err.Error(), "root") {
		t.Errorf("compliance: %v", err)
	}
}

// ask writes a request, as the writer would.
func ask(t *testing.T, dir, id string, wishes ...blob.LockWish) {
	t.Helper()
	text, err := json.Marshal(blob.LockRequest{Version: 1, Locks: wishes})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, blob.HardenRequests, id)
	if err := errors.Join(os.WriteFile(path+".tmp", text, 0o600), os.Chown(path+".tmp", writerUID, writerGID), os.Rename(path+".tmp", path)); err != nil {
		t.Fatal(err)
	}
}

// answered reads the answer, if there is one.
func answered(t *testing.T, dir, id string) []blob.LockFact {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, blob.HardenAnswers, id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		t.Fatal(err)
	}
	var a blob.LockAnswer
	if err := json.Unmarshal(text, &a); err != nil {
		t.Fatal(err)
	}
	return a.Locks
}

func locked(t *testing.T, dir, name string) bool {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return false
	} else if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	set, err := isImmutable(f)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

func id(n int) string { return fmt.Sprintf("%032x", n) }

func once(t *testing.T, k *Keeper) Done {
	t.Helper()
	d, err := k.Once(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// What a writer may ask for, and what not.
func TestRequests(t *testing.T) {
	in := ground(t)
	dir := hardened(t, in)
	k := keeper(t, dir)
	defer k.Close()
	hour := time.Now().Add(time.Hour).Unix()
	for _, name := range []string{"packs/00/good", "packs/00/two", "packs/00/other", "packs/00/twice", "leases/l", "outside"} {
		store(t, dir, name)
	}
	must(t, os.Chown(filepath.Join(dir, "packs/00/other"), 0, 0))
	must(t, os.Link(filepath.Join(dir, "packs/00/twice"), filepath.Join(dir, "packs/00/twin")))
	must(t, os.Symlink("good", filepath.Join(dir, "packs/00/link")))
	must(t, os.Symlink("/etc", filepath.Join(dir, "packs/01")))
	must(t, unix.Mkfifo(filepath.Join(dir, "packs/00/fifo"), 0o666))
	must(t, os.Mkdir(filepath.Join(dir, "mine"), 0o755))
	store(t, dir, "mine/a")
	must(t, os.Chown(filepath.Join(dir, "mine"), writerUID, writerGID))
	outside := filepath.Join(in, "victim")
	must(t, errors.Join(os.WriteFile(outside, nil, 0o644), os.Chown(outside, writerUID, writerGID)))
	wishes := []blob.LockWish{
		{Name: "packs/00/good", Until: hour}, {Name: "config", Until: hour},
		{Name: "../victim", Until: hour}, {Name: outside, Until: hour}, {Name: "/etc/hostname", Until: hour}, {Name: "", Until: hour}, {Name: ".", Until: hour},
		{Name: "packs/00/link", Until: hour}, {Name: "packs/01/hostname", Until: hour}, {Name: "packs/00/fifo", Until: hour}, {Name: "packs/00", Until: hour},
		{Name: "packs/00/other", Until: hour}, {Name: "packs/00/twice", Until: hour}, {Name: "leases/l", Until: hour}, {Name: "mine/a", Until: hour},
		{Name: ".harden/journal", Until: hour}, {Name: ".harden/canary/../journal", Until: hour},
		{Name: "packs/00/two", Until: time.Now().Add(Longest + time.Hour).Unix()}, {Name: "packs/00/two", Until: 1 << 62},
		{Name: "packs/00/two", Until: -1}, {Name: "packs/00/two"}, {Name: "packs/00/none", Until: hour},
		{Name: "packs/00/good", Until: hour + 60}, {Name: "packs/00/good", Until: hour - 60},
	}
	ask(t, dir, id(1), wishes...)
	once(t, k)
	facts := answered(t, dir, id(1))
	if len(facts) != len(wishes) {
		t.Fatalf("answered %+v", facts)
	}
	for i, f := range facts {
		good := f.Name == "packs/00/good" || f.Name == "config" || wishes[i].Until <= 0
		switch {
		case f.Name != wishes[i].Name, (f.Error == "" && !f.Absent) != good, f.Absent != (f.Name == "packs/00/none"), f.Name == "packs/00/good" && f.Until != hour+60:
			t.Errorf("%+v: %+v", wishes[i], f)
		case f.Error != "":
			t.Logf("%s: %s", f.Name, f.Error)
		}
	}
	for name, want := range map[string]bool{"packs/00/good": true, "config": true, "packs/00/two": false, "packs/00/other": false, "packs/00/twice": false, "leases/l": false, "mine/a": false, "../victim": false, ".harden/journal": false} {
		if locked(t, dir, name) != want {
			t.Errorf("%s is locked: %v", name, !want)
		}
	}

	for _, name := range []string{"packs/01/hostname", "../victim", outside, "packs/00/link", "packs/../../victim"} {
		if f, err := k.root.open(name, unix.O_RDONLY); err == nil {
			t.Errorf("%s is opened: %v", name, f.Close())
		}
	}

	// And what is no request at all.
	requests := filepath.Join(dir, blob.HardenRequests)
	bad := func(n int, text string) {
		path := filepath.Join(requests, id(n))
		must(t, errors.Join(os.WriteFile(path, []byte(text), 0o600), os.Chown(path, writerUID, writerGID)))
	}
	one := `{"name":"packs/00/two","until":` + fmt.Sprint(hour) + `}`
	bad(10, "no JSON")
	old := time.Now().Add(-time.Minute)
	must(t, os.Chtimes(filepath.Join(requests, id(10)), old, old))
	bad(20, `{"version":1,"locks":[`) // being written
	bad(11, `{"version":2,"locks":[`+one+`]}`)
	bad(12, `{"version":1,"locks":[`+one+strings.Repeat(","+one, blob.MaxLockNames)+`]}`)
	bad(13, `{"version":1,"locks":[`+one+`]}`+strings.Repeat(" ", blob.MaxLockFile))
	bad(14, `{"version":1,"locks":[`+one+`]}`)
	must(t, os.Chown(filepath.Join(requests, id(14)), 0, 0)) // not the writer's
	bad(15, `{"version":1,"locks":[`+one+`]}`)
	must(t, os.Link(filepath.Join(requests, id(15)), filepath.Join(requests, "another")))
	must(t, os.Symlink(filepath.Join(requests, "another"), filepath.Join(requests, id(16))))
	must(t, unix.Mkfifo(filepath.Join(requests, id(17)), 0o666))
	must(t, os.MkdirAll(filepath.Join(requests, id(18)), 0o777))
	must(t, os.MkdirAll(filepath.Join(requests, id(19), "full"), 0o777))
	once(t, k)
	for n := 10; n <= 19; n++ {
		if got := answered(t, dir, id(n)); got != nil {
			t.Errorf("request %d is answered with %+v", n, got)
		}
		if _, err := os.Lstat(filepath.Join(requests, id(n))); n < 19 && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("request %d is still there: %v", n, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(requests, id(20))); err != nil {
		t.Errorf("a request that was not whole: %v", err)
	}
	bad(20, `{"version":1,"locks":[]}`)
	once(t, k)
	if got := answered(t, dir, id(20)); got == nil {
		t.Error("a request that became whole is not answered")
	}
	if locked(t, dir, "packs/00/two") {
		t.Error("what was no request has locked something")
	}
	// Root's own word for it.
	s, err := ReadStatus(context.Background(), dir)
	if err != nil || s.Locks != 2 || len(s.Missing)+len(s.Bare)+len(s.Stray)+len(s.Due) > 0 || s.Damaged {
		t.Errorf("%+v, %v", s, err)
	}
}

// What is open for writing could still be changed: it is not locked.
func TestOpenForWriting(t *testing.T) {
	dir := hardened(t, ground(t))
	was := writingWait
	writingWait = 100 * time.Millisecond
	defer func() { writingWait = was }()
	keep(t, dir)
	asWriter(t, "writing", dir)
}

func childWriting(t *testing.T, dirs []string) {
	ctx := context.Background()
	d, err := blob.OpenDir(dirs[0])
	must(t, err)
	path := filepath.Join(dirs[0], "packs/00/pack")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	must(t, err)
	m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	must(t, err)
	lock := blob.Lock{Until: time.Now().Add(time.Hour), Mode: blob.Governance}
	for _, close := range []func() error{f.Close, func() error { return unix.Munmap(m) }} {
		if err := d.Lock(ctx, "packs/00/pack", lock); !errors.Is(err, blob.ErrNoLock) || !strings.Contains(err.Error(), "writing") {
			t.Errorf("locked while it can be written: %v", err)
		}
		if l, err := d.Locked(ctx, "packs/00/pack"); err != nil || l != (blob.Lock{}) {
			t.Errorf("locked: %+v, %v", l, err)
		}
		must(t, close())
	}
	must(t, d.Lock(ctx, "packs/00/pack", lock))

	// Nor can a lease make root wait.
	must(t, d.Put(ctx, "packs/00/leased", nil))
	f, err = os.Open(filepath.Join(dirs[0], "packs/00/leased"))
	must(t, err)
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	must(t, err)
	if err := d.Lock(ctx, "packs/00/leased", lock); !errors.Is(err, blob.ErrNoLock) || !strings.Contains(err.Error(), "lease") {
		t.Errorf("locked with a lease on it: %v", err)
	}
	must(t, f.Close())
	must(t, d.Lock(ctx, "packs/00/leased", lock))
}

func TestAttacks(t *testing.T) {
	in := ground(t)
	dir := hardened(t, in)
	keep(t, dir)
	asWriter(t, "attacks", dir)
	for _, name := range []string{"packs/00/one", "packs/00/two", "config"} {
		if !locked(t, dir, name) {
			t.Errorf("%s is not locked any more", name)
		}
	}
	s, err := ReadStatus(context.Background(), dir)
	if err != nil || len(s.Missing)+len(s.Bare)+len(s.Stray) > 0 || s.Damaged || s.Locks < 3 {
		t.Errorf("%+v, %v", s, err)
	}
}

// childAttacks is a writer that somebody has taken over.
func childAttacks(t *testing.T, dirs []string) {
	dir := dirs[0]
	at := func(name string) string { return filepath.Join(dir, name) }
	d, err := blob.OpenDir(dir)
	must(t, err)
	ctx := context.Background()
	until := time.Now().Add(time.Hour)
	for _, name := range []string{"packs/00/one", "packs/00/two"} {
		must(t, d.Put(ctx, name, []byte(name)))
		must(t, d.Lock(ctx, name, blob.Lock{Until: until, Mode: blob.Governance}))
	}
	must(t, d.Lock(ctx, "config", blob.Lock{Until: until, Mode: blob.Governance}))
	one := at("packs/00/one")
	write := func(path string, flags int) error {
		f, err := os.OpenFile(path, flags, 0o600)
		if err != nil {
			return err
		}
		_, err = f.Write([]byte("x"))
		return errors.Join(err, f.Close())
	}
	ioctl := func() error {
		f, err := os.Open(one)
		if err != nil {
			return err
		}
		defer f.Close()
		return setImmutable(f, false)
	}
	var mark Mark
	text, err := os.ReadFile(at(blob.HardenMark))
	must(t, err)
	must(t, json.Unmarshal(text, &mark))
	for what, attack := range map[string]func() error{
		"unlink": func() error { return os.Remove(one) },
		"rename": func() error { return os.Rename(one, at("packs/00/away")) },
		"rename over": func() error {
			return errors.Join(os.WriteFile(at("packs/00/mine"), nil, 0o600), os.Rename(at("packs/00/mine"), one))
		},
		"truncate":               func() error { return os.Truncate(one, 0) },
		"chmod":                  func() error { return os.Chmod(one, 0o600) },
		"chown":                  func() error { return os.Chown(one, writerUID, writerGID) },
		"write":                  func() error { return write(one, os.O_WRONLY) },
		"append":                 func() error { return write(one, os.O_WRONLY|os.O_APPEND) },
		"create over":            func() error { return write(one, os.O_WRONLY|os.O_CREATE|os.O_TRUNC) },
		"link and unlink":        func() error { return errors.Join(os.Link(one, at("packs/00/link")), os.Remove(one)) },
		"link":                   func() error { return os.Link(one, at("packs/00/link")) },
		"symlink over":           func() error { return errors.Join(os.Remove(one), os.Symlink("/etc/passwd", one)) },
		"chattr -i":              ioctl,
		"utimes":                 func() error { return os.Chtimes(one, until, until) },
		"rename the directory":   func() error { return os.Rename(at("packs/00"), at("packs/away")) },
		"rename packs":           func() error { return os.Rename(at("packs"), at("away")) },
		"remove packs":           func() error { return os.RemoveAll(at("packs/00")) },
		"rename the store":       func() error { return os.Rename(dir, dir+"-away") },
		"chmod the directory":    func() error { return os.Chmod(at("packs/00"), 0o777) },
		"rename .harden":         func() error { return os.Rename(at(".harden"), at("away")) },
		"remove .harden":         func() error { return os.RemoveAll(at(".harden")) },
		"remove the mark":        func() error { return os.Remove(at(blob.HardenMark)) },
		"write the mark":         func() error { return write(at(blob.HardenMark), os.O_WRONLY) },
		"write the journal":      func() error { return write(at(".harden/journal"), os.O_WRONLY|os.O_APPEND) },
		"remove the journal":     func() error { return os.Remove(at(".harden/journal")) },
		"replace the journal":    func() error { return os.WriteFile(at(".harden/journal.new"), nil, 0o666) },
		"set the clock":          func() error { return write(at(".harden/clock"), os.O_WRONLY) },
		"forge an answer":        func() error { return os.WriteFile(at(blob.HardenAnswers+"/"+id(7)), nil, 0o666) },
		"remove the requests":    func() error { return os.Remove(at(blob.HardenRequests)) },
		"rename the requests":    func() error { return os.Rename(at(blob.HardenRequests), at(".harden/r")) },
		"keep other keepers off": func() error { return write(at(".harden/lock"), os.O_RDWR) },
		"delete an object":       func() error { return d.Delete(ctx, "config") },
	} {
		if err := attack(); err == nil {
			t.Errorf("%s is not refused", what)
		}
		for _, name := range []string{"packs/00/one", "packs/00/two", "config"} {
			if got, err := d.Get(ctx, name, 0, -1); err != nil || string(got) != name {
				t.Fatalf("%s: %s is %q, %v", what, name, got, err)
			}
		}
	}
	// What asks for less shortens nothing; what is no lock's can be deleted.
	must(t, d.Lock(ctx, "packs/00/one", blob.Lock{Until: time.Now().Add(time.Second), Mode: blob.Governance}))
	if l, err := d.Locked(ctx, "packs/00/one"); err != nil || l.Until.Before(until) {
		t.Errorf("shortened to %s, %v", l.Until, err)
	}
	must(t, d.Put(ctx, "packs/00/free", nil))
	must(t, d.Delete(ctx, "packs/00/free"))
	if err := d.Lock(ctx, "packs/00/one", blob.Lock{Until: time.Now().Add(20 * 365 * 24 * time.Hour), Mode: blob.Governance}); !errors.Is(err, blob.ErrNoLock) || !strings.Contains(err.Error(), "--longest") {
		t.Errorf("a lock of 20 years: %v", err)
	}
}

// Races of a writer with the keeper: whatever he does while locks are set, what
// is answered is in force under its name.
func TestRaces(t *testing.T) {
	dir := hardened(t, ground(t))
	path := filepath.Join(dir, "packs/00/raced")
	must(t, os.WriteFile(path+".b", []byte("b"), 0o644))
	must(t, os.Chown(path+".b", writerUID, writerGID))
	seed := rand.Uint64()
	rnd := rand.New(rand.NewPCG(seed, 0))
	t.Logf("seed %d", seed)
	held := 0
	for n := range 40 {
		store(t, dir, "packs/00/raced")
		at := map[string]bool{"record locks": true, "sync the record": true, "set the attribute of packs/00/raced": true}
		k, err := open(dir, Options{}, now, func(what string) error {
			if at[what] && rnd.IntN(3) == 0 {
				switch rnd.IntN(3) {
				case 0:
					_ = os.Rename(path, path+".a")
				case 1:
					_ = os.Rename(path+".b", path)
				case 2:
					_ = os.Link(path, path+".c")
				}
			}
			return nil
		})
		must(t, err)
		ask(t, dir, id(n), blob.LockWish{Name: "packs/00/raced", Until: time.Now().Add(time.Hour).Unix()})
		once(t, k)
		fact := answered(t, dir, id(n))[0]
		if ok := fact.Until > 0; ok != locked(t, dir, "packs/00/raced") {
			t.Errorf("round %d: %+v, in force: %v", n, fact, !ok)
		} else if ok {
			held++
		}
		s, err := ReadStatus(context.Background(), dir)
		if err != nil || len(s.Missing)+len(s.Bare)+len(s.Stray) > 0 {
			t.Errorf("round %d: %+v, %v", n, s, err)
		}
		must(t, k.Close())
		// The next round begins anew, by root's hand.
		for _, p := range []string{path, path + ".a", path + ".b", path + ".c"} {
			if f, err := os.Open(p); err == nil {
				must(t, errors.Join(setImmutable(f, false), f.Close(), os.Remove(p)))
			}
		}
		must(t, errors.Join(os.Remove(k.own(journalName)), createJournal(k.own(journalName))))
		store(t, dir, "packs/00/raced.b")
	}
	if held == 0 || held == 40 {
		t.Errorf("%d of 40 rounds ended with a lock", held)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
