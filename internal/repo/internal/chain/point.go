package chain

import (
	"fmt"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

type (
	// PointID and HistoryID are 32 lower-case hex digits, random.
	PointID   string
	HistoryID string
	// Root names a disk's map, in the form of docs/format.md §4.
	Root string
)

// Point is a restore point: one VM at one time, always complete.
type Point struct {
	ID            PointID   `json:"id"`
	History       HistoryID `json:"history"`
	VM            string    `json:"vm"`   // name at that time
	Kind          string    `json:"kind"` // of the hypervisor
	Host          string    `json:"host"`
	VMID          string    `json:"vm_id"` // identity on its host
	Time          time.Time `json:"time"`  // of the snapshot; UTC
	Consistency   string    `json:"consistency"`
	Notes         []string  `json:"notes,omitempty"`
	Session       string    `json:"session"`                  // the run that made it
	Reference     string    `json:"reference,omitempty"`      // reference point; "" when there is none
	ReferenceNote string    `json:"reference_note,omitempty"` // why there is none
	CopiedFrom    string    `json:"copied_from,omitempty"`    // id of the repository that it was copied from; "" for one made here
	Disks         []Disk    `json:"disks"`
	Files         []File    `json:"files"`
	ReadBytes     int64     `json:"read_bytes"`   // read from the host for this point
	NewBytes      int64     `json:"new_bytes"`    // plain bytes of chunks that were new to the repository; set by Commit
	StoredBytes   int64     `json:"stored_bytes"` // bytes that the run added to packs; set by Commit
	Keep          Until     `json:"-"`            // marked to stay; from the chain
}

// Disk is one disk of a Point.
type Disk struct {
	ID         string `json:"id"`
	Size       int64  `json:"size"`             // bytes
	Format     string `json:"format"`           // on the host at that time
	Sector     int64  `json:"sector,omitempty"` // logical, as the guest knew it, bytes; 0 when the host did not say
	Path       string `json:"path"`
	Root       Root   `json:"root"`
	FullReason string `json:"full_reason,omitempty"` // why it was read whole
}

// File is a piece of configuration of a Point.
type File struct {
	Name string `json:"name"`
	Size int64  `json:"size"` // bytes
	Root Root   `json:"root"`
}

// Until says how long a point is marked to stay: Forever, a time in RFC 3339,
// or "" for not at all.
type Until string

// Forever is until the mark is taken off.
const Forever Until = "forever"

// Holds reports whether the mark keeps a point at that time. A mark that
// cannot be read keeps it.
func (u Until) Holds(now time.Time) bool {
	if u == "" {
		return false
	}
	t, err := time.Parse(time.RFC3339, string(u))
	return err != nil || now.Before(t)
}

// In says it in the words of a place: "for ever", "until" a time, or, when a day
// begins there then, "until the end of" the day before; "" for not at all.
func (u Until) In(place *time.Location) string {
	t, err := time.Parse(time.RFC3339, string(u))
	switch t = t.In(place); {
	case u == "":
		return ""
	case err != nil:
		return "for ever"
	case t.Hour()+t.Minute()+t.Second() == 0:
		return "until the end of " + t.AddDate(0, 0, -1).Format(time.DateOnly)
	}
	return "until " + t.Format(time.DateTime)
}

// Tier is a store beside the repository's own one.
type Tier struct {
	Name     string `json:"name"`
	Location string `json:"location"` // for Options.OpenTier
	// OlderThan says how old packs have to be to go there, in the caller's
	// words; Copy that they stay in the own store, too.
	OlderThan string `json:"older_than,omitempty"`
	Copy      bool   `json:"copy,omitempty"`
	// Back: it is being emptied.
	Back bool `json:"back,omitempty"`
	// Turned is the entry that added the tier or changed Back.
	Turned uint64 `json:"turned,omitempty"`
}

// Immutability is the repository's rule on locks (docs/format.md §6.3): all that
// a restore point needs cannot be deleted from the store for so many days after
// it was made.
type Immutability struct {
	Days int `json:"days"` // 0: no rule
	// Mode is "governance" or "compliance"; with Days 0 that of the last rule,
	// "" if there never was one.
	Mode string `json:"mode"`
}

// MaxImmutableDays bounds Immutability.Days.
const MaxImmutableDays = 36500

// LockState is the rule, and what bears on locks besides.
type LockState struct {
	Immutability
	Commit     uint64 `json:"commit"`     // the newest commit entry
	Distrusted uint64 `json:"distrusted"` // the newest entry that made items rest on other copies
}

// take takes over the rule that an entry tells.
func (i *Immutability) take(rule *Immutability) error {
	if rule == nil || rule.Days < 0 || rule.Days > MaxImmutableDays {
		return fmt.Errorf("%w: rule on locks", seal.ErrDamaged)
	}
	if rule.Days > 0 && blob.ParseLockMode(rule.Mode) == 0 {
		return fmt.Errorf("%w: lock mode %.20q", seal.ErrVersion, rule.Mode)
	}
	i.Days = rule.Days
	if blob.ParseLockMode(rule.Mode) != 0 {
		i.Mode = rule.Mode
	}
	return nil
}
