package state

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"holdfast/internal/osfile"
)

const sessionFormat = "holdfast session"

// Session is the directory of one session. The record itself belongs to the
// package that runs the session; it must be a JSON object.
type Session struct {
	id   string
	path string
}

// NewSession makes a session with its first record, durably and at once: after
// a crash there is all of it or nothing. Its command lock is held and returned,
// since whoever makes a session goes on to change it.
func (d *Dir) NewSession(id string, record any, command string) (*Session, *Lock, error) {
	if err := CheckID(id); err != nil {
		return nil, nil, err
	}
	s := &Session{id, filepath.Join(d.path, "sessions", id)}
	making := &Session{id, filepath.Join(d.path, "sessions", ".new-"+id)}
	lock, err := making.make(s, record, command)
	if err != nil {
		os.RemoveAll(making.path)
		return nil, nil, fmt.Errorf("make session %s: %w", id, err)
	}
	return s, lock, nil
}

// make fills the directory s, and names it as the session at last.
func (s *Session) make(at *Session, record any, command string) (*Lock, error) {
	if err := os.Mkdir(s.path, 0o700); err != nil {
		return nil, err
	}
	lock, err := s.LockCommand(command)
	if err != nil {
		return nil, err
	}
	if err = s.Save(record); err == nil {
		// A directory that has content is never replaced by a rename.
		if err = os.Rename(s.path, at.path); err == nil {
			err = osfile.SyncDir(filepath.Dir(at.path))
		}
	}
	if err != nil {
		lock.Release()
		return nil, err
	}
	return lock, nil
}

// Session finds a session by its id or an unambiguous prefix of it. Its record
// is not read: a damaged one can still be looked at and removed.
func (d *Dir) Session(id string) (*Session, error) {
	if id == "" || strings.Trim(id, "0123456789abcdef") != "" {
		return nil, fmt.Errorf("%w: %q", ErrNotExist, id)
	}
	ids, err := d.ids()
	if err != nil {
		return nil, err
	}
	ids = slices.DeleteFunc(ids, func(s string) bool { return !strings.HasPrefix(s, id) })
	switch len(ids) {
	case 0:
		return nil, fmt.Errorf("%w: %s", ErrNotExist, id)
	case 1:
		return &Session{ids[0], filepath.Join(d.path, "sessions", ids[0])}, nil
	}
	return nil, fmt.Errorf("%w: %s fits %s", ErrAmbiguous, id, strings.Join(ids, ", "))
}

// Sessions lists all sessions in the order of their ids. What crashes left of
// sessions being made or removed is swept away.
func (d *Dir) Sessions() ([]*Session, error) {
	ids, err := d.ids()
	if err != nil {
		return nil, err
	}
	var ss []*Session
	for _, id := range ids {
		ss = append(ss, &Session{id, filepath.Join(d.path, "sessions", id)})
	}
	return ss, nil
}

func (d *Dir) ids() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(d.path, "sessions"))
	if err != nil {
		return nil, fmt.Errorf("list sessions: %w", err)
	}
	var ids []string
	for _, e := range entries {
		path := filepath.Join(d.path, "sessions", e.Name())
		switch id, making := strings.CutPrefix(e.Name(), ".new-"); {
		case !e.IsDir() || CheckID(id) != nil:
		case making:
			// Its maker holds the lock; without a lock file it is empty.
			lock := filepath.Join(path, "command.lock")
			if _, err := os.Lstat(lock); err != nil {
				continue
			}
			if _, alive := holder(lock); !alive {
				os.RemoveAll(path)
			}
		default:
			if _, err := os.Lstat(filepath.Join(path, "session.json")); errors.Is(err, fs.ErrNotExist) {
				os.RemoveAll(path) // the rest of a removal
				continue
			}
			ids = append(ids, id)
		}
	}
	return ids, nil
}

// ID is the session's id.
func (s *Session) ID() string { return s.id }

// Path is a file or directory that the session owns.
func (s *Session) Path(name ...string) string {
	return filepath.Join(append([]string{s.path}, name...)...)
}

// Save replaces the record; it is durable when Save returns nil. Only the
// holder of the command lock may call it.
func (s *Session) Save(record any) error { return save(s.Path("session.json"), sessionFormat, record) }

// Load reads the record.
func (s *Session) Load(record any) error { return load(s.Path("session.json"), sessionFormat, record) }

// SaveNote writes a second small record beside the first, for what the serving
// process has to tell: each file has one writer.
func (s *Session) SaveNote(name string, v any) error {
	return save(s.Path(name+".json"), "holdfast "+name, v)
}

// LoadNote reads what SaveNote wrote; ErrNotExist if nothing was.
func (s *Session) LoadNote(name string, v any) error {
	return load(s.Path(name+".json"), "holdfast "+name, v)
}

// LockServe is taken by the process that serves the session, for its life. Who
// has got it reads the record again: the session may be over by now.
func (s *Session) LockServe() (*Lock, error) { return s.lock("serve.lock", "serve") }

// LockCommand is taken by a command that changes the session or its record.
func (s *Session) LockCommand(name string) (*Lock, error) { return s.lock("command.lock", name) }

func (s *Session) lock(file, name string) (*Lock, error) {
	l, err := acquire(s.Path(file), name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %s", ErrNotExist, s.id)
	} else if err != nil {
		return nil, fmt.Errorf("session %s: %w", s.id, err)
	}
	return l, nil
}

// Serving says who serves the session now; ok is false when nobody does.
func (s *Session) Serving() (h Holder, ok bool) { return holder(s.Path("serve.lock")) }

// Changing says which command holds the session now.
func (s *Session) Changing() (h Holder, ok bool) { return holder(s.Path("command.lock")) }

// Clear removes what the session owns besides its records, locks and log:
// overlays of a session that is over.
func (s *Session) Clear() error {
	entries, err := os.ReadDir(s.path)
	if err != nil {
		return fmt.Errorf("clear session %s: %w", s.id, err)
	}
	for _, e := range entries {
		switch ext := filepath.Ext(e.Name()); {
		case e.Name() == "log", ext == ".json", ext == ".lock":
			continue
		}
		if err := os.RemoveAll(s.Path(e.Name())); err != nil {
			return fmt.Errorf("clear session %s: %w", s.id, err)
		}
	}
	return nil
}

// Remove removes the session and all files it owns, its record first: what a
// crash leaves behind is no session any more. The locks that the caller holds
// on it are released once the record is gone: who gets them then finds no
// record.
func (s *Session) Remove(held ...*Lock) error {
	err := os.Remove(s.Path("session.json"))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err == nil {
		err = osfile.SyncDir(s.path)
	}
	for _, l := range held {
		l.Release()
	}
	if err == nil {
		err = os.RemoveAll(s.path)
	}
	if err == nil {
		err = osfile.SyncDir(filepath.Dir(s.path))
	}
	if err != nil {
		return fmt.Errorf("remove session %s: %w", s.id, err)
	}
	return nil
}
