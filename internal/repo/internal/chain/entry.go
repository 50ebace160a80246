package chain

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"strconv"
	"strings"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

// Kind is what an entry does (docs/format.md §6).
type Kind uint16

const (
	Add        Kind = iota + 1 // index objects come in; others may go
	Commit                     // a point is there
	Forget                     // points are no more
	Keep                       // points are marked to stay, or the mark is taken off
	Revoke                     // a dead run's lease is over
	Quarantine                 // packs are in quarantine
	Sweep                      // index objects take the place of others, without packs that go
	Keys                       // a keyring is new, key slots are removed
	Checkpoint                 // the whole State
	Distrust                   // copies of items cannot be read
	Locks                      // the rule on immutability
	Tiers                      // which other stores hold packs
)

// String names the kind as docs/format.md does; "" for one that is not known.
func (k Kind) String() string {
	names := []string{Add: "add", Commit: "commit", Forget: "forget", Keep: "keep", Revoke: "revoke",
		Quarantine: "quarantine", Sweep: "sweep", Keys: "keys", Checkpoint: "checkpoint", Distrust: "distrust",
		Locks: "locks", Tiers: "tiers"}
	if int(k) >= len(names) {
		return ""
	}
	return names[k]
}

// Clear is an entry's clear part. Put sets Number, Previous, Time and Start.
type Clear struct {
	Number   uint64     `json:"number"`
	Previous seal.Hex   `json:"previous"`
	Time     time.Time  `json:"time"`
	Adds     []seal.Hex `json:"adds,omitempty"`  // index objects that count from now on
	Drops    []seal.Hex `json:"drops,omitempty"` // index objects that count no more
	Lease    string     `json:"lease,omitempty"` // of the run that a commit or a revocation ends, or that adds
	Start    uint64     `json:"start,omitempty"` // State.Older after this entry
	Tiers    int        `json:"tiers,omitempty"` // how many, where an entry tells them

	Locks *Immutability `json:"locks,omitempty"`
}

// Sealed is the union of all kinds' sealed parts.
type Sealed struct {
	Point  *Point    `json:"point,omitempty"`
	Points []PointID `json:"points,omitempty"`
	Packs  []string  `json:"packs,omitempty"`
	Items  []BadItem `json:"items,omitempty"`

	Keyring string   `json:"keyring,omitempty"` // 8 digits: the newest one
	Removed []string `json:"removed,omitempty"` // key slots
	Until   *Until   `json:"until,omitempty"`

	Tiers []Tier `json:"tiers,omitempty"`
}

// BadItem is, in an entry, a Copy that cannot be read.
type BadItem struct {
	Pack seal.Hex `json:"pack"`
	ID   seal.Hex `json:"id"`
}

// Name is the name of entry n.
func Name(n uint64) string { return fmt.Sprintf("chain/%012d", n) }

// Numbers lists the entries that are in the store, ascending.
func Numbers(ctx context.Context, s blob.Store) ([]uint64, error) {
	names, err := blob.Names(ctx, s, "chain/")
	if err != nil {
		return nil, err
	}
	var numbers []uint64
	for _, name := range names {
		if n, ok := Number(name); ok {
			numbers = append(numbers, n)
		}
	}
	return numbers, nil
}

// Last is the number of the newest entry that is in the store; 0 when
// there is none.
func Last(ctx context.Context, s blob.Store) (uint64, error) {
	numbers, err := Numbers(ctx, s)
	if len(numbers) == 0 {
		return 0, err
	}
	return numbers[len(numbers)-1], nil
}

// Number is the number of the entry of that name; false for no entry's name.
func Number(name string) (uint64, bool) {
	n, err := strconv.ParseUint(strings.TrimPrefix(name, "chain/"), 10, 64)
	return n, err == nil && n > 0 && Name(n) == name
}

// Parse reads entry n of the repository id as far as that can be done without a
// key. It fails with seal.ErrDamaged, seal.ErrForeign or seal.ErrVersion.
func Parse(p []byte, n uint64, id [16]byte, verify ed25519.PublicKey) (c Clear, k Kind, err error) {
	raw, err := seal.Parse(p, seal.Entry)
	if err == nil {
		err = raw.Verify(id, verify)
	}
	if err == nil {
		err = seal.Unmarshal(raw.Clear, &c)
	}
	if err == nil && c.Number != n {
		err = fmt.Errorf("%w: it is entry %d", seal.ErrDamaged, c.Number)
	}
	if err != nil {
		return c, 0, err
	}
	return c, Kind(raw.Header.Kind), nil
}
