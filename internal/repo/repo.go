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
	"time"

	"github.com/zeebo/blake3"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/codec"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/keyring"
	"holdfast/internal/repo/internal/lease"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/seal"
	"holdfast/internal/repo/internal/tree"
)

// What the chain tells of: internal/chain has the members.
type (
	// Point is a restore point: one VM at one time, always complete.
	Point = chain.Point
	// PointID and HistoryID are 32 lower-case hex digits, random.
	PointID   = chain.PointID
	HistoryID = chain.HistoryID
	Disk      = chain.Disk // of a Point
	File      = chain.File // a piece of configuration of a Point
	// Root names a disk's map, in the form of docs/format.md §4.
	Root = chain.Root
	// Until says how long a point is marked to stay.
	Until = chain.Until
	// Tier is a store beside the repository's own one.
	Tier = chain.Tier
	// Immutability is the repository's rule on locks.
	Immutability = chain.Immutability
)

const (
	// Forever is until the mark is taken off.
	Forever = chain.Forever
	// MaxImmutableDays bounds Immutability.Days.
	MaxImmutableDays = chain.MaxImmutableDays
)

var (
	ErrNotRepository = errors.New("not a Holdfast repository")
	ErrExist         = errors.New("there is a repository already")
	// ErrPassphrase: no key slot opens with it.
	ErrPassphrase = keyring.ErrPassphrase
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
	ErrRolledBack = chain.ErrRolledBack
	// ErrLeftBehind: this process stood still while others went on for so long
	// that it cannot be told whether what it added counts.
	ErrLeftBehind = chain.ErrLeftBehind
)

// ChunkSize is the alignment, in bytes, of writes to a DiskWriter.
const ChunkSize = tree.ChunkSize

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
	store  blob.Store // is tiers
	tiers  *blob.Tiers
	id     [16]byte
	pub    ed25519.PublicKey
	sign   ed25519.PrivateKey
	keys   *keyring.Keys
	leases *lease.Leases
	chain  *chain.Chain
	cache  string // directory of this repository's cache

	openTier func(ctx context.Context, location string) (blob.Store, error)
	mirrorOf string // the tier that the own store is; "" when it is the repository's own
	isMirror error  // why nothing is written then

	compressor codec.Compressor // of new chunks

	chunkIDs, nodeIDs sync.Pool // hash.Hash, keyed

	slotKDF seal.KDF // of new passphrases

	refreshing sync.Mutex // held while the chain's news is read; before mu

	mu    sync.RWMutex // guards state and what was found about lost index objects
	state *chain.State

	lostIndexes []string          // what is wrong with which index object
	found       []index.Pack      // what packs that no index object lists hold; nil before a scan
	drop        map[[32]byte]bool // the lost index objects

	locks   *lockCache
	now     func() time.Time // for locks; time.Now but in tests
	index   *index.Index
	openers openerCache
	nodes   lru[pack.ID, *tree.Node]
	chunks  chunkCache
}

// ID is the repository's id: 32 lower-case hex digits.
func (r *Repo) ID() string { return hex.EncodeToString(r.id[:]) }

// Key opens the repository in another process: Options.Key. It is as secret as
// a passphrase, and holds until the root key is changed.
func (r *Repo) Key() []byte { return bytes.Clone(r.keys.Now().Root[:]) }

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
	points := make([]Point, 0, len(r.state.Points))
	for _, id := range r.state.Order {
		if p, ok := r.state.Points[id]; ok {
			p.Keep = r.state.Keep[id]
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
	ids := (*seal.Key)(r.keys.Now().Ring.IDs)
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
