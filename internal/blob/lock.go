package blob

import (
	"context"
	"errors"
	"iter"
	"time"
)

var (
	// ErrLocked is returned by Delete for an object that is locked.
	ErrLocked = errors.New("object is locked")
	// ErrNoLock is returned by Locker's methods when the store, as it is set up,
	// does not lock, or does not keep what it says.
	ErrNoLock = errors.New("the store does not lock objects")
)

// LockMode says who may end a lock before its time.
type LockMode int

const (
	// Governance can be ended by whoever has a special right on the store.
	Governance LockMode = iota + 1
	// Compliance can be ended by nobody, not even the store's owner.
	Compliance
)

func (m LockMode) String() string {
	switch m {
	case Governance:
		return "governance"
	case Compliance:
		return "compliance"
	}
	return "none"
}

// ParseLockMode is the mode of that name; 0 for none.
func ParseLockMode(name string) LockMode {
	for _, m := range []LockMode{Governance, Compliance} {
		if m.String() == name {
			return m
		}
	}
	return 0
}

// Lock is how an object is locked. The zero value is "not at all".
type Lock struct {
	Until time.Time // by the store's clock
	Mode  LockMode
}

// Holds reports whether this lock is at least as good as the other.
func (l Lock) Holds(other Lock) bool { return l.Mode >= other.Mode && !l.Until.Before(other.Until) }

// Locker is a Store that can refuse to lose an object until a time; a second
// ability, found by As.
//
// It is for what docs/format.md §6.3 says: a run locks config, keys, packs,
// index objects and chain entries until its point's time before it creates the
// chain entry, and extends them for a point that is kept longer. Leases, beats
// and pins are never locked.
type Locker interface {
	// Lock makes sure that the object cannot be deleted or lose its content
	// before that time, and never shortens a lock. When it returns nil, the
	// lock was read back from the store. A store may refuse to turn governance
	// into compliance.
	Lock(ctx context.Context, name string, l Lock) error
	// Locked reads an object's lock.
	Locked(ctx context.Context, name string) (Lock, error)
	// Canary proves that the store keeps its locks: it locks an object of its
	// own in that way, tries in earnest to delete it, and returns nil only when
	// it was refused and the object is still there. ErrNoLock is the proof of
	// the contrary; other errors prove nothing.
	Canary(ctx context.Context, mode LockMode) error
}

// Hidden is a version of an object that the store holds, but does not show:
// something was written over it, or a delete marker.
type Hidden struct {
	Name    string
	Version string // the store's name for it
	Size    int64  // bytes
	Deleted bool   // what hides it is a delete marker: the object seems not to exist
}

// Versions is a Store that keeps what was deleted or overwritten; a second
// ability, found by As. Objects are never overwritten by a repository, and what
// it deletes it deletes for good: what is hidden was hidden by someone else, or
// is the rest of a Delete that was cut off.
type Versions interface {
	// Hidden yields the hidden versions of objects whose name starts with
	// prefix, those of one name newest first. A failed or partial listing ends
	// with an error.
	Hidden(ctx context.Context, prefix string) iter.Seq2[Hidden, error]
	// GetHidden reads a hidden version whole, so that it can be proved to be
	// the right one.
	GetHidden(ctx context.Context, h Hidden) ([]byte, error)
	// Restore makes a hidden version the one that Get reads. It destroys no
	// content: delete markers are removed, what was written over it is hidden
	// in turn. It does not lock.
	Restore(ctx context.Context, h Hidden) error
}
