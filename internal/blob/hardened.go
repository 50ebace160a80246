package blob

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// A Dir locks when it is hardened: when package harden keeps it, on the machine
// that has its filesystem and as root. The two speak through files, so that a
// mount over a network will do:
//
//	.harden/hardened      root's; that it exists says that the directory is hardened
//	.harden/requests/ID   the writer's: a LockRequest. Root removes it when the answer is there
//	.harden/answers/ID    root's: the LockAnswer
//	.harden/canary/…      the writer's objects on which it tries whether locks hold
//
// The writer looks for its request, not for the answer: opening a file that was
// there asks the server of a network filesystem, while the absence of one that
// was looked for before is remembered by the client for up to a minute.
const (
	HardenDir      = ".harden"
	HardenMark     = HardenDir + "/hardened"
	HardenRequests = HardenDir + "/requests"
	HardenAnswers  = HardenDir + "/answers"
	HardenCanaries = HardenDir + "/canary"

	// MaxLockNames and MaxLockFile bound one request, and its answer.
	MaxLockNames = 1000
	MaxLockFile  = 1 << 20 // bytes
)

// LockRequest is what a writer asks for.
type LockRequest struct {
	Version int        `json:"version"` // 1
	Locks   []LockWish `json:"locks"`
}

// LockWish is an object to be locked.
type LockWish struct {
	Name  string `json:"name"`
	Until int64  `json:"until"` // Unix time in seconds; 0 asks how it is locked
}

// LockAnswer answers a LockRequest, in its order.
type LockAnswer struct {
	Version int        `json:"version"` // 1
	Locks   []LockFact `json:"locks"`
}

// LockFact is how an object is locked.
type LockFact struct {
	Name   string `json:"name"`
	Until  int64  `json:"until"`            // Unix time in seconds; 0: it is not locked
	Absent bool   `json:"absent,omitempty"` // there is no such object
	Error  string `json:"error,omitempty"`  // why it was not locked as asked
}

// answerWait is how long a writer waits for root. A variable for tests.
var answerWait = 3 * time.Minute

// asked is one wish on its way.
type asked struct {
	wish LockWish
	fact LockFact
	err  error
	done chan struct{}
	gone bool // nobody waits any more; guarded by Dir.mu
}

func (d *Dir) hardened() error {
	_, err := os.Stat(d.path(HardenMark))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: the directory is not hardened (\"holdfast harden\")", ErrNoLock)
	}
	return err
}

// Lock has root lock the object. Its locks are governance locks: root of the
// machine that has the filesystem can end them. Calls that are made while
// another one waits go together in one request.
func (d *Dir) Lock(ctx context.Context, name string, l Lock) error {
	if err := CheckName(name); err != nil {
		return err
	}
	if err := d.lock(ctx, name, l); err != nil {
		return fmt.Errorf("lock %s: %w", name, err)
	}
	return nil
}

func (d *Dir) lock(ctx context.Context, name string, l Lock) error {
	if l.Mode > Governance {
		return fmt.Errorf("%w in mode %s: root of the machine that has the directory can end every lock", ErrNoLock, l.Mode)
	}
	until := l.Until.Unix()
	if l.Until.Nanosecond() > 0 {
		until++
	}
	fact, err := d.ask(ctx, LockWish{name, until})
	switch {
	case err != nil:
		return err
	case fact.Until < until:
		return fmt.Errorf("%w so: root answers that it is locked until %s", ErrNoLock, time.Unix(fact.Until, 0).UTC().Format(time.RFC3339))
	}
	if set, known := immutable(d.path(name)); known && !set {
		return fmt.Errorf("%w: root answers that it is locked, but it has no immutable attribute", ErrNoLock)
	}
	return nil
}

// Locked asks root how the object is locked, and looks itself where it can.
func (d *Dir) Locked(ctx context.Context, name string) (Lock, error) {
	if err := CheckName(name); err != nil {
		return Lock{}, err
	}
	fact, err := d.ask(ctx, LockWish{Name: name})
	if err != nil {
		return Lock{}, fmt.Errorf("read the lock of %s: %w", name, err)
	}
	if set, known := immutable(d.path(name)); fact.Until == 0 || known && !set {
		return Lock{}, nil
	}
	return Lock{Until: time.Unix(fact.Until, 0), Mode: Governance}, nil
}

// ask gets the answer to one wish. One of those that wait takes the wishes of
// all to root.
func (d *Dir) ask(ctx context.Context, w LockWish) (LockFact, error) {
	if err := d.hardened(); err != nil {
		return LockFact{}, err
	}
	a := &asked{wish: w, done: make(chan struct{})}
	d.mu.Lock()
	d.queue = append(d.queue, a)
	d.mu.Unlock()
	for {
		select {
		case <-a.done:
			return a.fact, a.err
		case <-ctx.Done():
			d.mu.Lock()
			a.gone = true
			d.mu.Unlock()
			return LockFact{}, ctx.Err()
		case d.turn <- struct{}{}:
			d.askAll(ctx)
			<-d.turn
		}
	}
}

// askAll takes the waiting wishes to root. When ctx ends they wait on, for
// another one to take them there.
func (d *Dir) askAll(ctx context.Context) {
	batch := d.takeQueue()
	if len(batch) == 0 {
		return
	}
	facts, err := d.exchange(ctx, batch)
	if ctx.Err() != nil {
		d.mu.Lock()
		d.queue = append(batch, d.queue...)
		d.mu.Unlock()
		return
	}
	for i, a := range batch {
		switch a.err = err; {
		case err != nil:
		case facts[i].Absent:
			a.err = ErrNotExist
		case facts[i].Error != "":
			a.err = fmt.Errorf("%w: %s", ErrNoLock, facts[i].Error)
		default:
			a.fact = facts[i]
		}
		close(a.done)
	}
}

func (d *Dir) takeQueue() []*asked {
	d.mu.Lock()
	defer d.mu.Unlock()
	var batch []*asked
	for len(d.queue) > 0 && len(batch) < MaxLockNames {
		if a := d.queue[0]; !a.gone {
			batch = append(batch, a)
		}
		d.queue = d.queue[1:]
	}
	return batch
}

// exchange writes a request and waits for its answer.
func (d *Dir) exchange(ctx context.Context, batch []*asked) ([]LockFact, error) {
	q := LockRequest{Version: 1}
	for _, a := range batch {
		q.Locks = append(q.Locks, a.wish)
	}
	text, err := json.Marshal(q)
	if err != nil {
		return nil, err
	}
	var b [16]byte
	rand.Read(b[:])
	id := hex.EncodeToString(b[:])
	request := filepath.Join(d.path(HardenRequests), id)
	// Not written elsewhere and renamed: Linux's client of SMB may be unable to
	// open what it has renamed. What is not whole yet is no JSON.
	if err := os.WriteFile(request, text, 0o600); err != nil {
		_ = os.Remove(request)
		return nil, fmt.Errorf("ask for locks: %w", err)
	}
	if err := d.taken(ctx, request); err != nil {
		_ = os.Remove(request)
		return nil, err
	}
	var answer LockAnswer
	if err := readLockFile(filepath.Join(d.path(HardenAnswers), id), &answer); err != nil {
		return nil, fmt.Errorf("root took the request away without a good answer; is this the user that the directory was hardened for? %w", err)
	}
	good := answer.Version == 1 && len(answer.Locks) == len(batch)
	for i := 0; good && i < len(batch); i++ {
		good = answer.Locks[i].Name == batch[i].wish.Name
	}
	if !good {
		return nil, errors.New("root's answer is not of what was asked")
	}
	return answer.Locks, nil
}

// taken waits until a request is gone. The pauses become longer than a second
// soon: Linux's client of SMB keeps a file open for that long after it was
// closed, and answers the next open from there, without asking its server.
func (d *Dir) taken(ctx context.Context, request string) error {
	end := time.NewTimer(answerWait)
	defer end.Stop()
	pause := time.Millisecond
	for {
		f, err := os.OpenFile(request, os.O_RDWR, 0)
		switch {
		case err == nil:
			_ = f.Close()
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ESTALE):
			return nil
		case !errors.Is(err, syscall.EINVAL): // which that client says of what is gone while it keeps it open
			return fmt.Errorf("ask for locks: %w", err)
		}
		next := time.NewTimer(pause)
		if pause = min(pause*3/2, 10*time.Second); pause > 100*time.Millisecond {
			pause = max(pause, 1500*time.Millisecond)
		}
		select {
		case <-next.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-end.C:
			return fmt.Errorf("nobody answers the request for locks within %s: see that \"holdfast harden\" runs as root on the machine that has the directory", answerWait)
		}
	}
}

// readLockFile reads JSON of a bounded length.
func readLockFile(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, MaxLockFile+1))
	if err != nil {
		return err
	}
	if len(text) > MaxLockFile {
		return errors.New("it is too long")
	}
	return json.Unmarshal(text, v)
}
