package state

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"holdfast/internal/osfile"
)

const runFormat = "holdfast run"

// RunRecord is what the journal keeps of a backup's or copy's run while it
// runs: enough to find on the hosts and in the repositories, after a crash, what
// the run made there.
type RunRecord struct {
	ID         string    `json:"id"`
	Started    time.Time `json:"started"`
	Repository string    `json:"repository"` // id
	// Source is, for a copy, the id of the repository that it reads; "" for a backup.
	Source string `json:"source,omitempty"`
	Tasks  []Task `json:"tasks"`
}

// Task is a run's part for one VM. It is written before anything is made on
// the host for it.
type Task struct {
	Host    string `json:"host"`  // as the operator names it
	VM      string `json:"vm"`    // name
	VMID    string `json:"vm_id"` // identity on its host
	History string `json:"history"`
	// Step is how far it came: "snapshot", "reading", "commit", "closing"; "copy".
	Step string `json:"step"`
	// Note is what a cure needs besides: the reference point to forget.
	Note string `json:"note,omitempty"`
}

// Run is a journalled run of this process. Its methods may run in parallel.
type Run struct {
	path string
	lock *Lock

	mu     sync.Mutex // guards record and the file; held while it is written
	record RunRecord
}

// NewRun enters a run into the journal, durably. r.ID must be a NewID.
func (d *Dir) NewRun(r RunRecord) (*Run, error) {
	if err := CheckID(r.ID); err != nil {
		return nil, err
	}
	path := filepath.Join(d.path, "journal", r.ID+".json")
	if _, err := os.Lstat(path); err == nil {
		return nil, fmt.Errorf("journal run %s: %w", r.ID, fs.ErrExist)
	}
	// The lock first: whoever sees the record can tell that its run is alive.
	name := "backup"
	if r.Source != "" {
		name = "copy"
	}
	lock, err := acquire(lockPath(path), name)
	if err != nil {
		return nil, fmt.Errorf("journal run %s: %w", r.ID, err)
	}
	run := &Run{path: path, lock: lock, record: r}
	if err := save(path, runFormat, r); err != nil {
		lock.Release()
		os.Remove(path)
		os.Remove(lockPath(path))
		return nil, err
	}
	return run, nil
}

// Update changes the record, durably when it returns nil. On an error the
// record is as it was before.
func (r *Run) Update(change func(*RunRecord)) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	next := r.record
	next.Tasks = append([]Task(nil), r.record.Tasks...)
	change(&next)
	next.ID = r.record.ID
	if err := save(r.path, runFormat, next); err != nil {
		return err
	}
	r.record = next
	return nil
}

// End takes the run out of the journal: nothing of it is left on any host.
func (r *Run) End() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return drop(r.path, r.lock)
}

// Abandon ends the run but leaves its record, as a crash would: the next run
// cleans up after it.
func (r *Run) Abandon() error { return r.lock.Release() }

// drop removes a run's record and then its lock, which must be held.
func drop(path string, l *Lock) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err == nil {
		err = osfile.SyncDir(filepath.Dir(path))
	}
	if rerr := l.Release(); err == nil {
		err = rerr
	}
	os.Remove(lockPath(path)) // an empty lock file harms nobody
	if err != nil {
		return fmt.Errorf("end run: %w", err)
	}
	return nil
}

// lockPath is a run's lock file, by its record's.
func lockPath(path string) string { return strings.TrimSuffix(path, ".json") + ".lock" }

// RunInfo is a run found in the journal.
type RunInfo struct {
	RunRecord
	Alive bool  // its process runs
	Err   error // the record cannot be read; then only ID is set
}

// Runs lists the journal in the order of ids. A record that cannot be read is
// listed with its error and does not hide the others.
func (d *Dir) Runs() ([]RunInfo, error) {
	entries, err := os.ReadDir(filepath.Join(d.path, "journal"))
	if err != nil {
		return nil, fmt.Errorf("list the journal: %w", err)
	}
	var runs []RunInfo
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || CheckID(id) != nil {
			continue
		}
		path := filepath.Join(d.path, "journal", e.Name())
		var r RunInfo
		_, r.Alive = holder(lockPath(path))
		if err := load(path, runFormat, &r.RunRecord); errors.Is(err, ErrNotExist) {
			continue // ended meanwhile
		} else if err != nil {
			r.RunRecord, r.Err = RunRecord{}, err
		}
		r.ID = id
		runs = append(runs, r)
	}
	return runs, nil
}

// EndRun takes a dead run out of the journal, after what it left on the hosts
// was removed. ErrLocked if it is alive; one already gone is no error.
func (d *Dir) EndRun(id string) error {
	if err := CheckID(id); err != nil {
		return err
	}
	path := filepath.Join(d.path, "journal", id+".json")
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	l, err := acquire(lockPath(path), "clean")
	if err != nil {
		return fmt.Errorf("run %s: %w", id, err)
	}
	return drop(path, l)
}

// RunDead says whether a run is over: its process does not run, whether or not
// its record is still there.
func (d *Dir) RunDead(id string) bool {
	if CheckID(id) != nil {
		return true
	}
	_, alive := holder(filepath.Join(d.path, "journal", id+".lock"))
	return !alive
}
