package recovery

import (
	"context"
	"errors"
	"fmt"
	"time"

	"holdfast/internal/hypervisor"
	"holdfast/internal/state"
)

// Info is a session as it is listed.
type Info struct {
	Record
	Serving  bool   `json:"serving"`            // a process serves it
	Changing string `json:"changing,omitempty"` // the command at work on it
	Safe     string `json:"safe"`               // what may be done in its state
	Err      error  `json:"-"`                  // the record cannot be read; then only ID is set
}

// List lists all sessions. It changes nothing and does not talk to hosts.
func List(st *state.Dir) ([]Info, error) {
	ss, err := st.Sessions()
	if err != nil {
		return nil, err
	}
	var out []Info
	for _, s := range ss {
		i, err := look(s)
		if errors.Is(err, state.ErrNotExist) {
			continue // removed meanwhile
		}
		out = append(out, i)
	}
	return out, nil
}

// Get looks at one session.
func Get(st *state.Dir, id string) (Info, error) {
	s, err := st.Session(id)
	if err != nil {
		return Info{}, err
	}
	return look(s)
}

func look(s *state.Session) (Info, error) {
	var i Info
	if err := s.Load(&i.Record); err != nil {
		return Info{Record: Record{ID: s.ID()}, Err: err}, err
	}
	_, i.Serving = s.Serving()
	if h, ok := s.Changing(); ok {
		i.Changing = h.Name
	}
	if r, ok := row(i.State); ok {
		i.Safe = r.Safe
	}
	var note served
	if s.LoadNote(servedNote, &note) == nil { // it is for the operator's eyes
		i.Times.FirstRead = note.FirstRead
	}
	return i, nil
}

// Resumed is what resume did for one session.
type Resumed struct {
	Session string `json:"session"`
	VM      string `json:"vm,omitempty"`
	State   State  `json:"state"`
	Did     string `json:"did"` // for the operator
	Err     error  `json:"-"`
}

// Resume brings every session back to life whose serving process died, lets
// guests go on that were paused for it, and finishes migrations that were
// local already. A guest that is off stays off: its disks are served and it
// can be started. One session's failure does not keep the others; it is in
// its Resumed. Calling it again does nothing more.
func Resume(ctx context.Context, d Deps) ([]Resumed, error) {
	ss, err := d.State.Sessions()
	if err != nil {
		return nil, err
	}
	var out []Resumed
	for _, s := range ss {
		if ctx.Err() != nil {
			return out, context.Cause(ctx)
		}
		r := Resumed{Session: s.ID()}
		var rec Record
		if r.Err = s.Load(&rec); errors.Is(r.Err, state.ErrNotExist) {
			continue
		} else if r.Err == nil {
			r.VM, r.State = rec.Name, rec.State
			r.Did, r.Err = resume(ctx, d, s, rec)
		}
		out = append(out, r)
	}
	return out, nil
}

// resume does not take the command lock: a migration at work holds it, and
// needs its publication back.
func resume(ctx context.Context, d Deps, s *state.Session, r Record) (string, error) {
	holder, busy := s.Changing()
	switch r.State {
	case Done:
		if busy {
			return "", nil
		}
		return "", s.Clear()
	case Undone:
		if busy {
			return "is being removed", nil
		}
		return "", fmt.Errorf("its removal was interrupted: finish it with \"holdfast undo %s\"", r.ID)
	case Local:
		if busy {
			return "is being finished", nil
		}
		return finishLocal(ctx, d, r.ID)
	case Publishing:
		if busy {
			return "is being made by " + holder.Name, nil
		}
		return "", fmt.Errorf("its recovery was interrupted: remove what was made with \"holdfast undo %s\", then recover again", r.ID)
	}
	did := ""
	if _, alive := s.Serving(); !alive {
		if _, err := d.Serve(ctx, r.ID); err != nil {
			if _, alive := s.Serving(); !alive { // else another resume was faster
				return "", fmt.Errorf("serve the restore point: %w", err)
			}
		}
		did = "served again"
	}
	if r.Kind != Recovery {
		return did, nil
	}
	went, err := unpause(ctx, d, r)
	if did != "" && went != "" {
		did += ", "
	}
	return did + went, err
}

// unpause lets a session's guest go on.
func unpause(ctx context.Context, d Deps, r Record) (string, error) {
	t, err := d.Target(ctx, r.Host)
	if err != nil {
		return "", err
	}
	defer t.Close()
	id, err := t.Find(ctx, r.ID)
	if errors.Is(err, hypervisor.ErrNotExist) {
		return "", fmt.Errorf("VM %s is gone from %s: remove the rest with \"holdfast undo %s\"", r.Name, r.Host, r.ID)
	} else if err != nil {
		return "", err
	}
	he, err := t.Health(ctx, id)
	switch {
	case err != nil:
		return "", err
	case he.State == hypervisor.Stopped:
		return "guest is off and can be started", nil
	case !he.IOError:
		return "", nil
	}
	begun := time.Now()
	if err := t.Unpause(ctx, id); err != nil {
		return "", err
	}
	return fmt.Sprintf("guest goes on (%.1f s)", time.Since(begun).Seconds()), nil
}

// finishLocal finishes a migration whose VM is local already.
func finishLocal(ctx context.Context, d Deps, id string) (string, error) {
	c, err := take(d, id, "resume")
	if err != nil {
		return "", err
	}
	defer c.close()
	if c.r.State != Local {
		return "", nil
	}
	return "migration finished", c.finish(ctx)
}
