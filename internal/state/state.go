// Package state keeps what Holdfast must remember on this machine between its
// processes: recovery and publication sessions, and the journal of backup
// runs. It is a directory of small files; there is no database and no daemon.
//
//	<root>/sessions/<id>/session.json   the session's record
//	                     serve.lock     held by the process that serves it
//	                     command.lock   held by the command that changes it
//	                     log            of the serving process
//	                     ...            overlays, and what else the session owns
//	<root>/journal/<id>.json            a backup run's record
//	               <id>.lock            held by the running process
//
// A record is replaced whole: written to a temporary file, synced, renamed,
// directory synced. After a crash at any instant there is the old record or
// the new one. A record carries a checksum; one that is damaged, truncated or
// of a newer version is an error that names the file, never a guess.
//
// Whether a process is alive is told by its lock alone, which the kernel drops
// with the process: no process id, no time and no host name decides anything.
// The ids in lock files are for messages and for sending signals to a holder.
//
// The directory is private (0700) and must lie on a local file system.
package state

import (
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"holdfast/internal/osfile"
)

var (
	// ErrNotExist means that there is no such session or run.
	ErrNotExist = errors.New("no such session")
	// ErrDamaged means that a record on disk is not what was written.
	ErrDamaged = errors.New("damaged record")
	// ErrVersion means that a record was written by a newer Holdfast.
	ErrVersion = errors.New("record needs a newer Holdfast")
	// ErrLocked means that another process holds the lock.
	ErrLocked = errors.New("in use by another process")
	// ErrAmbiguous means that a prefix fits several sessions.
	ErrAmbiguous = errors.New("ambiguous session id")
)

// Env is the environment variable that names the state directory.
const Env = "HOLDFAST_STATE"

// maxRecord bounds what is read of a record, in bytes.
const maxRecord = 16 << 20

// Dir is a state directory. Its methods may be used in parallel, also by
// several processes.
type Dir struct{ path string }

// Open opens the state directory, and makes it if it is missing. An empty path
// means DefaultPath.
func Open(path string) (*Dir, error) {
	if path == "" {
		p, err := DefaultPath()
		if err != nil {
			return nil, err
		}
		path = p
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open state directory: %w", err)
	}
	for _, p := range []string{path, filepath.Join(path, "sessions"), filepath.Join(path, "journal")} {
		if err := os.MkdirAll(p, 0o700); err != nil {
			return nil, fmt.Errorf("open state directory: %w", err)
		}
	}
	if err := private(path); err != nil {
		return nil, fmt.Errorf("open state directory: %w", err)
	}
	return &Dir{path}, nil
}

// DefaultPath is $HOLDFAST_STATE, or /var/lib/holdfast for root, or else
// $XDG_STATE_HOME/holdfast (~/.local/state/holdfast).
func DefaultPath() (string, error) {
	if p := os.Getenv(Env); p != "" {
		return p, nil
	}
	if p := systemPath(); p != "" {
		return p, nil
	}
	if p := os.Getenv("XDG_STATE_HOME"); filepath.IsAbs(p) {
		return filepath.Join(p, "holdfast"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find a state directory (set %s): %w", Env, err)
	}
	return filepath.Join(home, ".local", "state", "holdfast"), nil
}

// Path is the directory itself.
func (d *Dir) Path() string { return d.path }

// NewID returns a random id of 16 lower-case hex digits.
func NewID() string {
	var b [8]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// CheckID returns an error unless id is what NewID gives: it becomes part of
// paths and of names on hosts.
func CheckID(id string) error {
	if len(id) != 16 || strings.Trim(id, "0123456789abcdef") != "" {
		return fmt.Errorf("%w: %q is no session id", ErrNotExist, id)
	}
	return nil
}

// envelope is what a record looks like on disk. Sum covers the bytes of Record
// after json.Compact.
type envelope struct {
	Format  string          `json:"format"` // "holdfast session", "holdfast run"
	Version int             `json:"version"`
	Sum     string          `json:"crc32c"`
	Record  json.RawMessage `json:"record"`
}

const version = 1

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(record []byte) string {
	return fmt.Sprintf("%08x", crc32.Checksum(record, castagnoli))
}

// save replaces the record at path. It is durable when save returns nil.
func save(path, format string, v any) error {
	record, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	data, err := json.Marshal(envelope{format, version, checksum(record), record})
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := replace(path, append(data, '\n')); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// load reads the record at path into v.
func load(path, format string, v any) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %s", ErrNotExist, path)
	} else if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRecord+1))
	if err != nil {
		return err
	}
	if len(data) > maxRecord {
		return fmt.Errorf("%w: %s is too long", ErrDamaged, path)
	}
	var e envelope
	if err := json.Unmarshal(data, &e); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrDamaged, path, err)
	}
	if e.Format != format {
		return fmt.Errorf("%w: %s is not a %s", ErrDamaged, path, format)
	}
	if e.Version != version {
		return fmt.Errorf("%w: %s has version %d", ErrVersion, path, e.Version)
	}
	if e.Sum != checksum(e.Record) {
		return fmt.Errorf("%w: %s: checksum does not match", ErrDamaged, path)
	}
	if err := json.Unmarshal(e.Record, v); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrDamaged, path, err)
	}
	return nil
}

// replace writes data to path: after a crash there is the old file or the new.
func replace(path string, data []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err == nil {
		err = osfile.SyncDir(filepath.Dir(path))
	}
	return err
}
