package state

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"
)

// Lock is held until Release, or until the process ends, however it ends. It
// must be kept: a forgotten one is released with its file by the collector.
type Lock struct{ f *os.File }

// Holder is who holds a lock, as it said itself.
type Holder struct {
	PID  int    // 0 when it cannot be told
	Name string // what it does: "serve", "migrate"
}

// acquire takes the lock file at path, or returns ErrLocked, naming the holder.
func acquire(path, name string) (*Lock, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = tryLock(f)
	for try := 0; try < 10 && errors.Is(err, ErrLocked); try++ {
		// A look by holder has the lock for some microseconds: not a holder.
		time.Sleep(5 * time.Millisecond)
		err = tryLock(f)
	}
	if err != nil {
		f.Close()
		if !errors.Is(err, ErrLocked) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if h, ok := holder(path); ok && h.PID > 0 {
			return nil, fmt.Errorf("%w: %s, process %d", ErrLocked, h.Name, h.PID)
		}
		return nil, ErrLocked
	}
	// Only for messages and signals: a torn line here does no harm.
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt(fmt.Appendf(nil, "%d %s\n", os.Getpid(), name), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", path, err)
	}
	return &Lock{f}, nil
}

// Release gives the lock up. The file stays: removing it would let two
// processes hold "the" lock on two files.
func (l *Lock) Release() error { return l.f.Close() }

// dyingFor bounds how long a killed process is waited for.
const dyingFor = 5 * time.Second

// holder says who holds the lock file at path; ok is false when nobody does. A
// holder that was killed and has not ended yet is waited for: it holds its
// locks until its last thread is gone, and whoever asks just after a kill -9
// means what comes after it.
func holder(path string) (h Holder, ok bool) {
	for until := time.Now().Add(dyingFor); ; time.Sleep(10 * time.Millisecond) {
		h, ok = heldBy(path)
		if !ok || h.PID == 0 || !dying(h.PID) || time.Now().After(until) {
			return h, ok
		}
	}
}

func heldBy(path string) (h Holder, ok bool) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return Holder{}, false
	} else if err != nil {
		return Holder{}, true // cannot be told: better believed alive
	}
	defer f.Close() // gives back the lock that the next line may have taken
	if tryLock(f) == nil {
		return Holder{}, false
	}
	line, err := io.ReadAll(io.LimitReader(f, 200))
	if err != nil {
		return Holder{}, true
	}
	pid, name, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
	n, err := strconv.Atoi(pid)
	if err != nil || n <= 0 {
		return Holder{}, true
	}
	return Holder{n, name}, true
}
