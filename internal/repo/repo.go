package repo

import (
	"context"
	"errors"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/disk"
)

type (
	// PointID and HistoryID are 32 lower-case hex digits, random.
	PointID   string
	HistoryID string
	// Root names a disk's map: the id of its top node with the number of
	// levels, or "zero". Opaque outside this package.
	Root string
)

var (
	ErrNotRepository = errors.New("not a Holdfast repository")
	ErrPassphrase    = errors.New("wrong passphrase")
	ErrVersion       = errors.New("repository needs a newer Holdfast")
	ErrDamaged       = errors.New("damaged") // authenticated decryption failed, wrong length, missing object
	ErrNotExist      = errors.New("no such restore point")
	ErrRevoked       = errors.New("this run's lease was revoked")
	ErrRolledBack    = errors.New("repository is older than this machine has seen it")
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
	Disks         []Disk    `json:"disks"`
	Files         []File    `json:"files"`
	ReadBytes     int64     `json:"read_bytes"`   // read from the host for this point
	NewBytes      int64     `json:"new_bytes"`    // plain bytes of chunks that were new to the repository
	StoredBytes   int64     `json:"stored_bytes"` // bytes those took in packs
}

// Disk is one disk of a Point.
type Disk struct {
	ID         string `json:"id"`
	Size       int64  `json:"size"`   // bytes
	Format     string `json:"format"` // on the host at that time
	Path       string `json:"path"`
	Root       Root   `json:"root"`
	FullReason string `json:"full_reason,omitempty"` // why it was read whole
}

// File is a piece of configuration of a Point.
type File struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
	Root Root   `json:"root"`
}

// Options of Init and Open.
type Options struct {
	// Cache is a directory for the index cache and the newest head seen;
	// machine-local, private, disposable. Required.
	Cache string
}

var errStub = errors.New("not yet")

// Repo is an open repository. Safe for use in parallel.
type Repo struct{}

func Init(ctx context.Context, s blob.Store, passphrase []byte, o Options) (*Repo, error) {
	return nil, errStub
}
func Open(ctx context.Context, s blob.Store, passphrase []byte, o Options) (*Repo, error) {
	return nil, errStub
}
func (r *Repo) ID() string   { return "" } // 32 lower-case hex digits
func (r *Repo) Close() error { return nil }

// ChunkSize is the alignment, in bytes, of writes to a DiskWriter.
const ChunkSize = 64 << 10

// Points reads what was committed until now: all restore points that were not
// forgotten, oldest first.
func (r *Repo) Points(ctx context.Context) ([]Point, error) { return nil, errStub }

// OpenDisk opens a restore point's disk.
func (r *Repo) OpenDisk(ctx context.Context, d Disk) (*DiskReader, error) { return nil, errStub }

// ReadFile returns a piece of a restore point's configuration.
func (r *Repo) ReadFile(ctx context.Context, f File) ([]byte, error) { return nil, errStub }

// DiskReader is a restore point's disk, read-only.
type DiskReader struct{ disk.Reader }

// Matches reports whether p, at off (a multiple of ChunkSize; len(p) a multiple
// too but for the disk's end), is what the disk holds, by comparing chunk ids:
// nothing is fetched but the map.
func (d *DiskReader) Matches(ctx context.Context, p []byte, off int64) (bool, error) {
	return false, errStub
}

// Begin opens a run: a lease under which packs may be written.
func (r *Repo) Begin(ctx context.Context) (*Run, error) { return nil, errStub }

// Run writes one or more disks and commits one restore point.
// Its methods may run in parallel, but for Commit and Close.
type Run struct{}

// Disk starts a disk's new map. With base the new disk begins as a copy of
// it (truncated or zero-extended to size); with nil as zeros.
func (run *Run) Disk(ctx context.Context, base *DiskReader, size int64) (*DiskWriter, error) {
	return nil, errStub
}

// PutFile stores a piece of configuration.
func (run *Run) PutFile(ctx context.Context, name string, data []byte) (File, error) {
	return File{}, errStub
}

// Flush makes durable, and shares with others, all that was written: after it
// only the commit itself can fail for want of space.
func (run *Run) Flush(ctx context.Context) error { return errStub }

// Commit makes the point visible. It sets p.ID.
func (run *Run) Commit(ctx context.Context, p *Point) error { return errStub }

// Close ends the run. Without a Commit before, what was written stays for the
// next run to reuse.
func (run *Run) Close() error { return nil }

// DiskWriter takes a disk's changed chunks. WriteAt and ZeroAt want off to be a
// multiple of ChunkSize, and the length too but at the disk's end. They may
// run in parallel; ascending order keeps packs in disk order.
type DiskWriter struct{ disk.Writer }

// Finish stores the map and returns its root.
func (w *DiskWriter) Finish(ctx context.Context) (Root, error) { return "", errStub }

// Counts tells what was written so far.
func (w *DiskWriter) Counts() Counts { return Counts{} }

// Counts of a DiskWriter, in bytes.
type Counts struct {
	New    int64 // plain bytes of chunks that were new to the repository
	Stored int64 // bytes that those take in packs
}

// Pin keeps a point's data until Unpin, whatever is forgotten or pruned.
func (r *Repo) Pin(ctx context.Context, session string, id PointID) error { return errStub }

// Unpin removes a session's pins. None is no error.
func (r *Repo) Unpin(ctx context.Context, session string) error { return errStub }
