// Package harden is the privileged half of a hardened directory: it runs as
// root on the machine that has the filesystem, and sets the immutable attribute
// (FS_IMMUTABLE_FL, "chattr +i") on the objects of a blob.Dir until a time.
//
// # What it is for
//
// The writer, an unprivileged user who makes backups there, perhaps through a
// mount over a network, can add objects. Whoever has become the writer can
// neither delete nor change what is locked, nor make locks end sooner. Root of
// that machine can: these are governance locks.
//
// # Two halves
//
// The writer's half is in package blob, which also says how the two speak. All
// directories of the store belong to root, are sticky and writable for the
// writer's group: so he cannot move them away from below locked files, nor
// remove what root has put there. What he writes into .harden/requests is
// hostile until proven otherwise.
//
// # A lock
//
//	request read, each object found below the directory without a link on the way
//	 → the journal names objects and times, synced
//	 → attribute set, the object found again under its name, nobody has it open for writing
//	 → object and its directory synced
//	 → answer, request removed
//
// # After a crash
//
// Each step may be the last. A lock that was answered is in the journal and on
// the disk. What the journal names after its last mark of completion is set
// once more at the start, or dropped when the object is not there: it was not
// answered. The writer's request is still there and is answered then.
//
// An attribute is removed when the lock's time has passed by the clock and by
// what was lived through (see the clock), and then its record: a crash in
// between removes it twice. Nothing is ever deleted but requests and answers.
//
// # Damage
//
// A journal with a damaged line in its middle ends no lock any more. An
// attribute without a record is reported and stays. So whatever is lost here
// keeps locks for longer, never for less.
package harden

import (
	"errors"
	"time"
)

var (
	// ErrNotRoot: this needs root, or a part of root's rights that is missing.
	ErrNotRoot = errors.New("root's rights are missing")
	// ErrFilesystem: the directory's filesystem has no immutable attribute that
	// lasts.
	ErrFilesystem = errors.New("the filesystem cannot keep locks")
	// ErrNotStore: there is no store of a repository.
	ErrNotStore = errors.New("no repository is in that directory")
	// ErrNotHardened: the directory was not prepared.
	ErrNotHardened = errors.New("the directory is not hardened")
	// ErrUnsafe: somebody who should not can change what the locks rest on.
	ErrUnsafe = errors.New("it would not be safe")
	// ErrRuns: another process keeps the directory.
	ErrRuns = errors.New("another process keeps this directory")
	// ErrDamaged: root's own record of the locks is damaged.
	ErrDamaged = errors.New("the record of locks is damaged")
)

// Longest is how far ahead a lock may be asked for when nothing else is said: a
// writer who was taken over can lock rubbish for that long.
const Longest = 1100 * 24 * time.Hour

// Setup says how to prepare a directory.
type Setup struct {
	Dir     string
	User    string        // the writer: a name, or UID:GID
	Longest time.Duration // the furthest that a lock may reach ahead; 0 for Longest
	// Places are the directories of the store, parents first, as "packs/00".
	Places []string
}

// Mark is the content of .harden/hardened.
type Mark struct {
	Version int    `json:"version"` // 1
	User    string `json:"user"`
	UID     int    `json:"uid"`
	GID     int    `json:"gid"`
	Longest int64  `json:"longest"` // seconds
}

// Done is what a Keeper did.
type Done struct {
	Locked   int // objects locked, or locked for longer
	Refused  int
	Released int // locks that have ended
}

func (d Done) plus(o Done) Done {
	return Done{d.Locked + o.Locked, d.Refused + o.Refused, d.Released + o.Released}
}

// Status is how a hardened directory stands.
type Status struct {
	Mark  Mark
	Locks int // that have not ended
	// Earliest and Latest are when the first and the last lock ends; zero
	// without locks.
	Earliest, Latest time.Time
	// Due are locks that could be ended now.
	Due []string
	// Missing are locked objects that are not there, Bare those that have lost
	// their attribute: root has done so, or the disk.
	Missing, Bare []string
	// Stray are objects with the attribute and without a record.
	Stray []string
	// Behind is how far the time that was lived through is behind the clock.
	Behind time.Duration
	// Seen is when a Keeper was last at work; Damaged that the journal is.
	Seen    time.Time
	Damaged bool
}
