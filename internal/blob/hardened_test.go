package blob

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// falseRoot makes a directory that says it is hardened, and answers requests
// with what answer says, until the test is over. It has no rights and sets no
// attribute. asked tells how many requests there were.
func falseRoot(t *testing.T, answer func(LockRequest) string) (d *Dir, asked func() int) {
	t.Helper()
	root := t.TempDir()
	d, err := OpenDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{HardenRequests, HardenAnswers, HardenCanaries} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, HardenMark), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	end, done, n := make(chan struct{}), make(chan struct{}), 0
	var mu sync.Mutex
	go func() {
		defer close(done)
		for {
			requests, _ := filepath.Glob(filepath.Join(root, HardenRequests, "????????????????????????????????"))
			for _, path := range requests {
				var q LockRequest
				if err := readLockFile(path, &q); err != nil {
					continue // taken back
				}
				mu.Lock()
				n++
				mu.Unlock()
				if text := answer(q); text != "" {
					_ = os.WriteFile(filepath.Join(root, HardenAnswers, filepath.Base(path)), []byte(text), 0o600)
				}
				_ = os.Remove(path)
			}
			select {
			case <-end:
				return
			case <-time.After(time.Millisecond):
			}
		}
	}()
	t.Cleanup(func() { close(end); <-done })
	return d, func() int { mu.Lock(); defer mu.Unlock(); return n }
}

// granted answers that all is locked as asked.
func granted(q LockRequest) string {
	a := LockAnswer{Version: 1}
	for _, w := range q.Locks {
		a.Locks = append(a.Locks, LockFact{Name: w.Name, Until: w.Until})
	}
	text, err := json.Marshal(a)
	if err != nil {
		panic(err)
	}
	return string(text)
}

func anHour() Lock { return Lock{Until: time.Now().Add(time.Hour), Mode: Governance} }

// A directory that nobody keeps does not lock, and says so.
func TestNotHardened(t *testing.T) {
	ctx := context.Background()
	d, err := OpenDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Put(ctx, "a", nil); err != nil {
		t.Fatal(err)
	}
	_, lockedErr := d.Locked(ctx, "a")
	for what, err := range map[string]error{"lock": d.Lock(ctx, "a", anHour()), "locked": lockedErr, "canary": d.Canary(ctx, Governance)} {
		if !errors.Is(err, ErrNoLock) || !strings.Contains(err.Error(), "holdfast harden") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if entries, err := os.ReadDir(d.root); err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// A root that does not do what it says is found out, where the attribute can be
// seen; and so are answers that are none.
func TestFalseRoot(t *testing.T) {
	ctx := context.Background()
	for what, answer := range map[string]func(LockRequest) string{
		"says yes":            granted,
		"says nothing":        func(LockRequest) string { return "" },
		"says rubbish":        func(LockRequest) string { return "{" },
		"says it of another":  func(q LockRequest) string { return strings.ReplaceAll(granted(q), `"name":"`, `"name":"x`) },
		"says it for shorter": func(q LockRequest) string { q.Locks[0].Until -= 60; return granted(q) },
		"says no": func(q LockRequest) string {
			return fmt.Sprintf(`{"version":1,"locks":[{"name":%q,"error":"no"}]}`, q.Locks[0].Name)
		},
		"says too much": func(q LockRequest) string { return granted(q) + strings.Repeat(" ", MaxLockFile) },
	} {
		t.Run(what, func(t *testing.T) {
			d, _ := falseRoot(t, answer)
			if err := d.Put(ctx, "a", []byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, known := immutable(d.path("a")); !known && what == "says yes" {
				t.Skip("the attribute cannot be seen here")
			}
			if err := d.Lock(ctx, "a", anHour()); err == nil {
				t.Error("locked")
			} else {
				t.Log(err)
			}
			if err := d.Canary(ctx, Governance); err == nil {
				t.Error("the canary believes it")
			}
			if entries, err := os.ReadDir(d.path(HardenCanaries)); err != nil || len(entries) != 0 {
				t.Errorf("canaries left: %v, %v", entries, err)
			}
			if entries, err := os.ReadDir(d.path(HardenRequests)); err != nil || len(entries) != 0 {
				t.Errorf("requests left: %v, %v", entries, err)
			}
			if err := d.Delete(ctx, "a"); err != nil {
				t.Error(err)
			}
		})
	}
}

// Where the attribute cannot be seen a canary finds out all the same.
func TestCanaryAttacks(t *testing.T) {
	for _, a := range attacks {
		path := filepath.Join(t.TempDir(), "canary")
		if err := os.WriteFile(path, canaryText, 0o400); err != nil {
			t.Fatal(err)
		}
		if err := a.try(path); err != nil {
			t.Errorf("to %s a file that is not locked: %v", a.name, err)
		}
		if got, err := os.ReadFile(path); err == nil && string(got) == string(canaryText) {
			t.Errorf("%s has done nothing", a.name)
		}
	}
}

func TestNobodyAnswers(t *testing.T) {
	ctx := context.Background()
	busy := make(chan struct{})
	defer close(busy)
	d, _ := falseRoot(t, func(LockRequest) string { <-busy; return "" })
	was := answerWait
	answerWait = 20 * time.Millisecond
	defer func() { answerWait = was }()
	err := d.lock(ctx, "a", anHour())
	if err == nil || errors.Is(err, ErrNoLock) {
		t.Errorf("it proves nothing that nobody answers, but: %v", err)
	}
}

// Who waits goes along with the next request, also when the one before him has
// given up.
func TestLocksTogether(t *testing.T) {
	slow := make(chan struct{})
	d, asked := falseRoot(t, func(q LockRequest) string { <-slow; return granted(q) })
	first, cancel := context.WithCancel(context.Background())
	errs := make(chan error)
	go func() {
		_, err := d.ask(first, LockWish{"first", 1})
		errs <- err
	}()
	for asked() == 0 {
		time.Sleep(time.Millisecond)
	}
	const others = 50
	for i := range others {
		go func() {
			f, err := d.ask(context.Background(), LockWish{fmt.Sprint("n", i), int64(i + 1)})
			if err == nil && (f.Name != fmt.Sprint("n", i) || f.Until != int64(i+1)) {
				err = fmt.Errorf("%d was answered with %+v", i, f)
			}
			errs <- err
		}()
	}
	for waiting := 0; waiting < others; time.Sleep(time.Millisecond) {
		d.mu.Lock()
		waiting = len(d.queue)
		d.mu.Unlock()
	}
	cancel()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	close(slow)
	for range others {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if n := asked(); n > 3 {
		t.Errorf("%d requests for %d locks", n, others)
	}
}
