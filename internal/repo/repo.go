package repo

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"sync"
	"sync/atomic"
	"time"

	"github.com/zeebo/blake3"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/codec"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
	"holdfast/internal/repo/internal/tree"
)

type (
	// PointID and HistoryID are 32 lower-case hex digits, random.
	PointID   string
	HistoryID string
	// Root names a disk's map, in the form of docs/format.md §4.
	Root string
)

var (
	ErrNotRepository = errors.New("not a Holdfast repository")
	ErrExist         = errors.New("there is a repository already")
	ErrPassphrase    = errors.New("wrong passphrase")
	// ErrVersion: the repository was written in a format this program does not know.
	ErrVersion = seal.ErrVersion
	// ErrDamaged: something stored is missing, shorter, or not what it was.
	ErrDamaged  = seal.ErrDamaged
	ErrNotExist = errors.New("no such restore point")
	// ErrRevoked: the run's lease was declared dead; it cannot commit.
	ErrRevoked = errors.New("this run's lease was revoked")
	// ErrKeys: the keys were changed, and what opened the repository here is
	// not among the new ones.
	ErrKeys = errors.New("the repository's keys were changed")
	// ErrRolledBack: the store does not contain what this machine saw in it.
	ErrRolledBack = errors.New("the repository is older than this machine has seen it")
)

// ChunkSize is the alignment, in bytes, of writes to a DiskWriter.
const ChunkSize = tree.ChunkSize

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

// Options of Init and Open.
type Options struct {
	// Cache is a directory for the index cache and the newest head seen:
	// this machine's own, private. All in it may be deleted but "head", whose
	// loss only costs the detection of a rollback. Required.
	Cache string
	// Key, from Repo.Key, opens the repository at once, where a passphrase costs
	// a tenth of a second or more. When it does not fit, the passphrase counts.
	Key []byte
	// Compression is that of new data. What a repository holds can be read
	// whatever it is.
	Compression Compression
	// OpenTier opens the store at a tier's location. Without it what lies in
	// tiers cannot be read.
	OpenTier func(ctx context.Context, location string) (blob.Store, error)
}

// Compression says how data is compressed.
type Compression string

const (
	// Fast is several times faster than Small, in both directions. "" is Fast.
	Fast Compression = "fast"
	// Small takes about a fifth less space.
	Small Compression = "small"
)

// Repo is an open repository. Safe in parallel, but for Close.
type Repo struct {
	store blob.Store // is tiers
	tiers *blob.Tiers
	id    [16]byte
	pub   ed25519.PublicKey
	sign  ed25519.PrivateKey
	ring  liveRing
	cache string // directory of this repository's cache

	config   [32]byte  // SHA-256 of the object of that name
	created  time.Time // as it says
	openTier func(ctx context.Context, location string) (blob.Store, error)
	mirrorOf string // the tier that the own store is; "" when it is the repository's own
	isMirror error  // why nothing is written then

	compressor codec.Compressor // of new chunks

	chunkIDs, nodeIDs sync.Pool // hash.Hash, keyed

	secret  []byte   // the passphrase, to follow a change of the root key; may be empty
	slotKDF seal.KDF // of new passphrases

	refreshing sync.Mutex // held while the chain's news is read; before learning and mu
	learning   sync.Mutex // held while keyrings are read
	ringNames  []string   // the keyrings that were read last; guarded by learning

	mu    sync.RWMutex // guards state and what was found about lost index objects
	state *state

	lostIndexes []string          // what is wrong with which index object
	found       []index.Pack      // what packs that no index object lists hold; nil before a scan
	drop        map[[32]byte]bool // the lost index objects

	locks   *lockCache
	now     func() time.Time // for locks; time.Now but in tests
	index   *index.Index
	openers openerCache
	nodes   lru[pack.ID, *tree.Node]
	chunks  chunkCache
	single  atomic.Int64 // chunks read one by one
}

// ID is the repository's id: 32 lower-case hex digits.
func (r *Repo) ID() string { return hex.EncodeToString(r.id[:]) }

// Key opens the repository in another process: Options.Key. It is as secret as
// a passphrase, and holds until the root key is changed.
func (r *Repo) Key() []byte { return bytes.Clone(r.ring.now.Load().root[:]) }

// Close releases the index cache. No other call may be under way.
func (r *Repo) Close() error { return r.index.Close() }

// Points reads what was committed until now: all restore points that were not
// forgotten, oldest commit first.
func (r *Repo) Points(ctx context.Context) ([]Point, error) {
	if err := r.refresh(ctx); err != nil {
		return nil, err
	}
	r.mu.RLock()
	defer r.mu.RUnlock()
	points := make([]Point, 0, len(r.state.points))
	for _, id := range r.state.order {
		if p, ok := r.state.points[id]; ok {
			p.Keep = r.state.keep[id]
			points = append(points, p)
		}
	}
	return points, nil
}

// ReadFile returns a piece of a restore point's configuration.
func (r *Repo) ReadFile(ctx context.Context, f File) ([]byte, error) {
	if f.Size < 0 || f.Size > maxFile {
		return nil, fmt.Errorf("%s: %w: %d bytes", f.Name, ErrDamaged, f.Size)
	}
	d, err := r.OpenDisk(ctx, Disk{ID: f.Name, Size: f.Size, Root: f.Root})
	if err != nil {
		return nil, err
	}
	p := make([]byte, f.Size)
	return p, errors.Join(d.ReadAt(ctx, p, 0), d.Close())
}

// chunkID and nodeID name content by its keyed hash.
func (r *Repo) chunkID(p []byte) pack.ID { return keyedHash(&r.chunkIDs, p) }
func (r *Repo) nodeID(p []byte) pack.ID  { return keyedHash(&r.nodeIDs, p) }

func keyedHash(pool *sync.Pool, p []byte) (id pack.ID) {
	h := pool.Get().(hash.Hash)
	h.Reset()
	h.Write(p)
	h.Sum(id[:0])
	pool.Put(h)
	return id
}

func (r *Repo) deriveIDs() {
	ids := (*seal.Key)(r.ring.now.Load().ring.IDs)
	keyed := func(purpose string) func() any {
		key := ids.Derive(nil, purpose)
		return func() any {
			h, err := blake3.NewKeyed(key[:])
			if err != nil {
				panic(err) // only for a key of another length
			}
			return h
		}
	}
	r.chunkIDs.New, r.nodeIDs.New = keyed("chunk id"), keyed("node id")
}
