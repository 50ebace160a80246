package chain

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

// Outline is what a chain says to who has no key.
type Outline struct {
	Head     uint64            // number of the newest entry
	Indexes  map[[32]byte]bool // live index objects
	Tiers    bool              // packs may be in other stores
	Locks    Immutability
	Problems []Problem
}

// chainProblem is something wrong with an entry, or several.
type Problem struct{ Object, What string }

// Outline follows the entries that are in the store: numbers, signatures,
// predecessors. It needs Store, Repo, Verify and Config alone.
func (c *Chain) Outline(ctx context.Context) (*Outline, error) {
	names, err := blob.Names(ctx, c.Store, "chain/")
	if err != nil {
		return nil, err
	}
	o := &Outline{Indexes: map[[32]byte]bool{}}
	var numbers []uint64
	for _, name := range names {
		if n, ok := Number(name); ok {
			numbers = append(numbers, n)
		} else {
			o.problem(name, "not the name of an entry")
		}
	}
	next, previous, start := uint64(1), c.Config[:], uint64(0)
	var gaps []gap // told when it is known where the chain begins
	for e, err := range fetch(ctx, c.Store, numbers) {
		if err != nil {
			return nil, err
		}
		n := e.number
		if n > next {
			previous = nil
			gaps = append(gaps, absent(next, n-1))
		}
		if e.data == nil { // it was listed
			gaps, next, previous = append(gaps, absent(n, n)), n+1, nil
			continue
		}
		clear, k, err := Parse(e.data, n, c.Repo, c.Verify)
		if errors.Is(err, seal.ErrDamaged) || errors.Is(err, seal.ErrForeign) {
			gaps = append(gaps, gap{n, false, err.Error()})
			next, previous, o.Head = n+1, nil, n
			continue
		} else if err != nil {
			return nil, err
		}
		if previous != nil && !bytes.Equal(clear.Previous, previous) {
			o.problem(Name(n), "it does not follow its predecessor; an entry was exchanged or removed")
		}
		o.take(k, &clear)
		sum := sha256.Sum256(e.data)
		next, previous, start = n+1, sum[:], max(start, clear.Start)
		o.Head = n
	}
	for _, g := range gaps {
		switch {
		case g.last < start:
		case g.missing:
			o.problem(g.text, "missing")
		default:
			o.problem(Name(g.last), g.text)
		}
	}
	return o, nil
}

func (o *Outline) problem(object, what string) {
	o.Problems = append(o.Problems, Problem{Object: object, What: what})
}

// take changes the outline as an entry's clear part says.
func (o *Outline) take(k Kind, clear *Clear) {
	if k == Checkpoint {
		o.Indexes = map[[32]byte]bool{}
	}
	if k == Tiers || k == Checkpoint {
		o.Tiers = clear.Tiers > 0
	}
	if clear.Locks != nil {
		if err := o.Locks.take(clear.Locks); err != nil {
			o.problem(Name(clear.Number), err.Error())
		}
	}
	for _, d := range clear.Adds {
		if len(d) == 32 {
			o.Indexes[[32]byte(d)] = true
		}
	}
	for _, d := range clear.Drops {
		if len(d) == 32 {
			delete(o.Indexes, [32]byte(d))
		}
	}
}

// absent names entries that are not there.
func absent(first, last uint64) gap {
	text := Name(first)
	if last > first {
		text += " to " + Name(last)
	}
	return gap{last, true, text}
}
