package harden

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/blob"
)

// writingWait is how long the files of a request may still be open for writing,
// and how long they are waited for: a server for network mounts closes a little
// later than its client. A variable for tests.
var writingWait = 5 * time.Second

// errUnfinished is a request that is being written, so long after its last change.
var errUnfinished = errors.New("it is not whole yet")

const unfinishedRest = 10 * time.Second

// serve answers the requests that are there.
func (k *Keeper) serve(ctx context.Context) (d Done, err error) {
	names, err := k.list(blob.HardenRequests, 10_000)
	if err != nil {
		return d, err
	}
	for _, id := range names {
		if ctx.Err() != nil {
			return d, nil
		}
		if !isHex(id, 32) {
			continue // being written, or rubbish: clear sees to it
		}
		one, err := k.answer(id)
		d = d.plus(one)
		if err != nil {
			return d, err
		}
	}
	return d, nil
}

// answer handles one request. Its error is root's; what is wrong with the
// request goes into the answer, or nowhere when it is none.
func (k *Keeper) answer(id string) (d Done, err error) {
	k.root.patient = time.Now().Add(writingWait)
	q, err := k.request(id)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EAGAIN) || errors.Is(err, errUnfinished) {
		return d, nil // taken back, or its writer's mount has not let go of it
	} else if err != nil {
		if k.thrown++; k.thrown <= 10 {
			k.note("a request was thrown away: %v", err)
		}
		k.removeRequest(id)
		return d, nil
	}
	a := blob.LockAnswer{Version: 1}
	if a.Locks, d, err = k.lock(q.Locks); err != nil {
		return d, err
	}
	text, err := json.Marshal(a)
	if err != nil {
		return d, err
	}
	if err := k.step("answer"); err != nil {
		return d, err
	}
	tmp := k.own("answer.new")
	if err := errors.Join(os.WriteFile(tmp, text, 0o644), os.Chmod(tmp, 0o644)); err != nil { // whatever the umask
		return d, err
	}
	if err := os.Rename(tmp, k.own(filepath.Join(filepath.Base(blob.HardenAnswers), id))); err != nil {
		return d, err
	}
	if err := k.step("take the request away"); err != nil {
		return d, err
	}
	k.removeRequest(id)
	return d, nil
}

// request reads a request: a regular file of the writer's under one name, of a
// bounded length.
func (k *Keeper) request(id string) (q blob.LockRequest, err error) {
	f, err := k.root.open(blob.HardenRequests+"/"+id, unix.O_RDONLY)
	if err != nil {
		return q, err
	}
	defer f.Close()
	st, err := statFile(f)
	switch {
	case err != nil:
		return q, err
	case !isRegular(&st), int(st.Uid) != k.mark.UID, st.Nlink > 1:
		return q, fmt.Errorf("%s is not a file of the writer's", id)
	}
	text, err := io.ReadAll(io.LimitReader(f, blob.MaxLockFile+1))
	switch {
	case err != nil:
		return q, err
	case len(text) > blob.MaxLockFile:
		return q, fmt.Errorf("%s is too long", id)
	}
	err = json.Unmarshal(text, &q)
	if err != nil && time.Since(time.Unix(st.Mtim.Unix())).Abs() < unfinishedRest {
		return q, errUnfinished
	} else if err != nil {
		return q, fmt.Errorf("%s: %w", id, err)
	}
	if q.Version != 1 || len(q.Locks) > blob.MaxLockNames {
		return q, fmt.Errorf("%s has version %d and %d names", id, q.Version, len(q.Locks))
	}
	return q, nil
}

// wish is one object on its way to be locked.
type wish struct {
	blob.LockWish
	fact *blob.LockFact
	f    *os.File
	new  bool // it had no lock
}

func (w *wish) refuse(format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	w.fact.Error = s[:min(len(s), 200)]
}

// lock locks what can be locked.
func (k *Keeper) lock(wishes []blob.LockWish) (facts []blob.LockFact, d Done, err error) {
	facts = make([]blob.LockFact, len(wishes))
	todo := map[string]*wish{} // a name that is asked for twice counts with its longest time
	defer func() {
		for _, w := range todo {
			err = errors.Join(err, w.f.Close())
		}
	}()
	var same [][2]int // facts, and the ones that they are copies of
	first := map[string]int{}
	for i, lw := range wishes {
		facts[i].Name = lw.Name
		w := k.consider(lw, &facts[i])
		if w == nil {
			continue
		}
		if before := todo[lw.Name]; before != nil {
			before.Until = max(before.Until, w.Until)
			same = append(same, [2]int{i, first[lw.Name]})
			if err := w.f.Close(); err != nil {
				return nil, d, err
			}
			continue
		}
		todo[lw.Name], first[lw.Name] = w, i
	}
	if len(todo) > 0 {
		if err := k.enforce(todo); err != nil {
			return nil, d, err
		}
	}
	for _, c := range same {
		facts[c[0]] = facts[c[1]]
	}
	for i, lw := range wishes {
		switch {
		case facts[i].Error != "", facts[i].Absent:
			d.Refused++
		case lw.Until > 0:
			d.Locked++
		}
	}
	return facts, d, nil
}

// consider looks at one wish: it is refused, granted already, or returned to be
// enforced.
func (k *Keeper) consider(lw blob.LockWish, fact *blob.LockFact) *wish {
	w := &wish{LockWish: lw, fact: fact}
	limit := time.Now().Add(time.Duration(k.mark.Longest) * time.Second)
	switch {
	case !k.lockable(lw.Name):
		w.refuse("no object of that name is locked")
		return nil
	case lw.Until > limit.Unix():
		w.refuse("root allows locks until %s only (--longest)", limit.UTC().Format(time.RFC3339))
		return nil
	}
	f, err := k.hold(lw.Name)
	if errors.Is(err, fs.ErrNotExist) {
		fact.Absent = true
		return nil
	} else if err != nil {
		w.refuse("%v", err)
		return nil
	}
	w.f = f
	if done := k.standing(w); done {
		if err := f.Close(); err != nil {
			w.refuse("%v", err)
		}
		return nil
	}
	return w
}

// standing reports whether nothing is to be done about an object, and tells how
// it is locked.
func (k *Keeper) standing(w *wish) bool {
	set, err := isImmutable(w.f)
	if err != nil {
		w.refuse("%v", err)
		return true
	}
	has := k.locks.until[w.Name]
	first, pending := k.locks.open[w.Name] // by an attempt that failed
	switch {
	case w.Until == 0 && (pending || !set):
		if has != 0 && !pending {
			k.note("warning: %s is locked, and has lost its immutable attribute", w.Name)
		}
		return true
	case w.Until <= has && set && !pending:
		w.fact.Until = has
		return true
	case w.Until <= k.at.Unix() && has == 0: // that time has passed
		w.fact.Until = w.Until
		return true
	}
	w.new, w.Until = has == 0 || first, max(w.Until, has)
	return false
}

// hold opens an object: a file of the writer's under one name, in directories
// that are root's.
func (k *Keeper) hold(name string) (*os.File, error) {
	if err := k.soundTo(name); err != nil {
		return nil, err
	}
	f, err := k.root.open(name, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	st, err := statFile(f)
	switch {
	case err != nil:
	case !isRegular(&st):
		err = errors.New("it is not a regular file")
	case int(st.Uid) != k.mark.UID:
		err = errors.New("it is not the writer's")
	case st.Nlink != 1:
		err = fmt.Errorf("it has %d names", st.Nlink)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// enforce makes the locks durable and puts them in force. Until it returns nil
// nothing was promised.
func (k *Keeper) enforce(todo map[string]*wish) error {
	var lines []string
	for name, w := range todo {
		lines = append(lines, journalLine('+', w.Until, name))
	}
	if err := k.step("record locks"); err != nil {
		return err
	}
	if err := k.locks.add(lines...); err != nil {
		return err
	}
	if err := k.step("sync the record"); err != nil {
		return err
	}
	if err := k.locks.sync(); err != nil {
		return err
	}
	failed, err := k.attribute(todo)
	if err != nil {
		return err
	}
	if err := k.step("complete the record"); err != nil {
		return err
	}
	if err := k.locks.add(append(failed, journalLine('=', 0, "."))...); err != nil {
		return err
	}
	for _, w := range todo {
		if w.fact.Error == "" {
			w.fact.Until = w.Until
		}
	}
	return k.locks.compact()
}

// attribute sets the attributes, durably. Those that cannot be locked are told
// so, and their lines of the journal are returned.
func (k *Keeper) attribute(todo map[string]*wish) (failed []string, err error) {
	dirs := map[string]bool{}
	for name, w := range todo {
		if err := k.step("set the attribute of " + name); err != nil {
			return nil, err
		}
		why := setImmutable(w.f, true)
		if errors.Is(why, unix.EPERM) {
			return nil, fmt.Errorf("%w: CAP_LINUX_IMMUTABLE, to set the immutable attribute: %w", ErrNotRoot, why)
		}
		if err := k.step("sync " + name); err != nil {
			return nil, err
		}
		if why = errors.Join(why, w.f.Sync()); why != nil {
			w.refuse("%v", why)
		}
		dirs[path.Dir(name)] = true
	}
	deadline := time.Now().Add(writingWait)
	for name, w := range todo {
		if why := k.settled(name, w.f, deadline); why != nil {
			w.refuse("%v", why)
		}
		if w.fact.Error == "" {
			continue
		}
		if w.new {
			if err := setImmutable(w.f, false); err != nil {
				return nil, err
			}
			failed = append(failed, journalLine('-', 0, name))
		}
	}
	for dir := range dirs {
		f, err := k.root.open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return nil, err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return nil, err
		}
	}
	return failed, nil
}

// settled sees that a file with the attribute is the one under the name, and
// that nobody can still write to it.
func (k *Keeper) settled(name string, f *os.File, deadline time.Time) error {
	var st, held unix.Stat_t
	again, err := k.root.open(name, unix.O_PATH)
	if err == nil {
		st, err = statFile(again)
		err = errors.Join(err, again.Close())
	}
	if err == nil {
		held, err = statFile(f)
	}
	switch {
	case err != nil:
		return err
	case st.Dev != held.Dev, st.Ino != held.Ino, held.Nlink != 1:
		return errors.New("it was moved meanwhile")
	}
	for {
		writing, err := openForWriting(f)
		if err != nil || !writing {
			return err
		}
		if time.Now().After(deadline) {
			return errors.New("somebody has it open for writing")
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// complete puts in force what the journal names after its last mark of
// completion, when it is there.
func (k *Keeper) complete() error {
	if len(k.locks.open) == 0 {
		return nil
	}
	todo := map[string]*wish{}
	defer func() {
		for _, w := range todo {
			_ = w.f.Close() // only read
		}
	}()
	var drop []string
	for name, first := range k.locks.open {
		f, err := k.hold(name)
		if err == nil {
			todo[name] = &wish{LockWish: blob.LockWish{Name: name, Until: k.locks.until[name]}, fact: &blob.LockFact{Name: name}, f: f, new: first}
			continue
		}
		k.note("the lock of %s, begun before a crash, was not completed: %v", name, err)
		if first { // never answered
			drop = append(drop, journalLine('-', 0, name))
		}
	}
	failed, err := k.attribute(todo)
	if err != nil {
		return err
	}
	if err := k.step("complete the record"); err != nil {
		return err
	}
	drop = append(drop, failed...)
	if err := k.locks.add(append(drop, journalLine('=', 0, "."))...); err != nil {
		return err
	}
	return k.locks.sync()
}
