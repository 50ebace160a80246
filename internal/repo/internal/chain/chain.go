// Package chain is the chain of commits: the numbered objects chain/NUMBER, each
// with the digest of the one before it, that order all that happens in a
// repository (docs/format.md §6). A restore point exists when its entry does.
//
// # From entries to a state
//
// An entry has a Kind, a Clear part, which a storage server can read, and a
// Sealed part. Chain.Read folds the entries, in their order, into a State: the
// points that are, the index objects that count, the packs in quarantine, the
// leases that are over. Chain.Next takes in what others have added since. A
// State is replaced, never changed, once it is handed out.
//
// A checkpoint is an entry with the whole State. Reading begins at the one
// before the newest, so that no damaged entry costs a point; those before it
// may be deleted (§6.4). Whoever knows the entries before a checkpoint proves it
// by them.
//
// # Extending it
//
// Chain.Put creates the entry of the next number; of several writers one wins.
// Whether an entry may follow a State is for the caller to say, each time anew.
// An entry is there whole or not at all, and nothing depends on the cache: after
// a crash the chain is what the store says.
//
// # What is wrong
//
// A damaged or missing entry is noted and passed over (State.Damage): all else
// can be read, and nothing can be added. A chain that does not go on from what
// this machine has seen is ErrRolledBack. Without a key, Chain.Outline proves
// signatures and predecessors.
package chain

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

// Chain reads and extends a repository's chain. It is safe in parallel; its
// fields are not changed once it is in use.
type Chain struct {
	Store  blob.Store
	Repo   [16]byte          // id of the repository
	Verify ed25519.PublicKey // of the repository's signatures
	Config [32]byte          // SHA-256 of the object "config", which stands before entry 1
	Made   time.Time         // when the repository was

	// Master gives the master key of a number. An error that is seal.ErrDamaged
	// is one of the entry.
	Master func(ctx context.Context, number uint32) (*seal.Key, error)
	// Newest gives the master key of new entries and its number.
	Newest func() (uint32, *seal.Key)
	Sign   ed25519.PrivateKey // of new entries
	// Memory is the file with the newest head that this machine has seen.
	Memory string
}

// ErrLeftBehind: this process stood still while others went on for so long
// that it cannot be told whether what it added counts.
var ErrLeftBehind = errors.New("this process stood still while the repository's chain went on for thousands of entries; what it was about to do is void")

// Put creates the entry n that follows s, which has no damage, and gives its
// bytes. ours is false when another writer was faster: then nothing was done.
// clear needs neither number nor what follows from s. The entry is durable;
// whether it counts the next reading tells: when that had to begin anew, see
// Counts.
func (c *Chain) Put(ctx context.Context, s *State, k Kind, clear Clear, content []byte) (n uint64, p []byte, ours bool, err error) {
	clear.Number, clear.Previous, clear.Time, clear.Start = s.Head+1, s.Digest[:], time.Now().UTC(), s.Older
	if k == Checkpoint {
		clear.Start = s.Checkpoint
	}
	b, err := json.Marshal(clear)
	if err != nil {
		return 0, nil, false, err
	}
	number, master := c.Newest()
	d := seal.Document{Header: seal.NewHeader(seal.Entry, uint16(k), number, c.Repo), Clear: b, Sealed: content}
	if p, err = d.Marshal(master, "chain", c.Sign); err != nil {
		return 0, nil, false, err
	}
	ours, err = blob.Claim(ctx, c.Store, Name(clear.Number), p)
	return clear.Number, p, ours, err
}

// Counts makes sure that entry n, whose bytes p this process has just stored, is
// in the chain, of which s was read anew after that. Its name may have been free
// because the true entry n was deleted: then entry n-1 is gone as well, which
// shows (docs/format.md §6.4). point is what the entry commits; nil for none. It
// fails with ErrLeftBehind.
func (c *Chain) Counts(ctx context.Context, s *State, n uint64, p []byte, point *Point) error {
	if n >= s.Older {
		if there, err := c.Store.Get(ctx, Name(n), 0, -1); err != nil || bytes.Equal(there, p) {
			return err
		}
		return ErrLeftBehind
	}
	if point != nil {
		_, live := s.Points[point.ID]
		_, gone := s.Forgotten[point.ID]
		if live || gone {
			return nil
		}
	}
	// What is before the chain's start is nothing to anybody.
	if err := c.Store.Delete(ctx, Name(n)); err != nil && !errors.Is(err, blob.ErrNotExist) {
		return errors.Join(ErrLeftBehind, err)
	}
	return ErrLeftBehind
}
