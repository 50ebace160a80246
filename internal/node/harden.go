package node

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"holdfast/internal/blob/harden"
)

// HardenRequest says what to do with a directory on this machine.
type HardenRequest struct {
	Dir string
	// User prepares the directory for this writer, "" leaves it as it is.
	User    string
	Longest time.Duration // that a lock may reach ahead; 0 for the default
	// One of these may be said, and without one the directory is kept until the
	// context ends.
	Once, Release, Status bool
	// DryRun tells what would be prepared or released.
	DryRun bool
}

// Hardened is what was done with a directory.
type Hardened struct {
	Directory string   `json:"directory"`
	DryRun    bool     `json:"dry_run"`
	Prepared  []string `json:"prepared"` // what was changed of the directory
	Locked    int      `json:"locked"`
	Refused   int      `json:"refused"`
	Released  int      `json:"released"`
	Names     []string `json:"released_objects,omitempty"` // of Release
}

// HardenStatus is how a hardened directory stands.
type HardenStatus struct {
	Directory     string     `json:"directory"`
	User          string     `json:"user"`
	Longest       int64      `json:"longest_seconds"`
	Locks         int        `json:"locks"`
	Earliest      *time.Time `json:"earliest,omitempty"`
	Latest        *time.Time `json:"latest,omitempty"`
	Due           int        `json:"due"`
	Missing       []string   `json:"missing"`
	Bare          []string   `json:"bare"`
	Stray         []string   `json:"stray"`
	BehindSeconds int64      `json:"behind_seconds"`
	Seen          time.Time  `json:"seen"`
	Damaged       bool       `json:"damaged"`
}

// neverLocked are prefixes of what a repository must be able to delete
// (docs/format.md §6.3).
var neverLocked = []string{"leases/", "pins/"}

// storePlaces are the directories of a repository's store (docs/format.md §1),
// parents first.
func storePlaces() []string {
	places := []string{"keys", "keyring", "packs", "index", "chain", "leases", "pins"}
	for i := range 256 {
		places = append(places, fmt.Sprintf("packs/%02x", i))
	}
	return places
}

// Harden prepares and keeps a directory on this machine, as root. report is
// told, while it is kept, when something was done.
func (n *Node) Harden(ctx context.Context, q HardenRequest, report func(Hardened)) (h Hardened, err error) {
	if h.Directory, err = filepath.Abs(q.Dir); err != nil {
		return h, err
	}
	h.DryRun = q.DryRun
	if q.User != "" {
		h.Prepared, err = harden.Prepare(harden.Setup{Dir: h.Directory, User: q.User, Longest: q.Longest, Places: storePlaces()}, q.DryRun)
		if err != nil || q.DryRun {
			return h, err
		}
	}
	k, err := harden.Open(h.Directory, harden.Options{Never: neverLocked, Note: func(line string) { n.o.Report.note("%s", line) }})
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, k.Close()) }()
	add := func(d harden.Done) {
		h.Locked, h.Refused, h.Released = h.Locked+d.Locked, h.Refused+d.Refused, h.Released+d.Released
	}
	switch {
	case q.Release:
		h.Names, err = k.Release(q.DryRun)
		h.Released = len(h.Names)
	case q.Once:
		var d harden.Done
		d, err = k.Once(ctx)
		add(d)
	default:
		report(h)
		err = k.Run(ctx, func(d harden.Done) {
			add(d)
			report(Hardened{Directory: h.Directory, Locked: d.Locked, Refused: d.Refused, Released: d.Released})
		})
	}
	return h, err
}

// HardenStatus looks at all of a hardened directory.
func (n *Node) HardenStatus(ctx context.Context, dir string) (HardenStatus, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return HardenStatus{}, err
	}
	s, err := harden.ReadStatus(ctx, abs)
	if err != nil {
		return HardenStatus{}, err
	}
	h := HardenStatus{
		Directory: abs, User: s.Mark.User, Longest: s.Mark.Longest, Locks: s.Locks, Due: len(s.Due),
		Missing: s.Missing, Bare: s.Bare, Stray: s.Stray,
		BehindSeconds: int64(s.Behind.Seconds()), Seen: s.Seen.Round(time.Second), Damaged: s.Damaged,
	}
	if !s.Earliest.IsZero() {
		h.Earliest, h.Latest = &s.Earliest, &s.Latest
	}
	return h, nil
}
