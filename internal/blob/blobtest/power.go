package blobtest

import (
	"context"
	"iter"
	"math/rand/v2"
	"sync"
	"time"

	"holdfast/internal/blob"
)

// Power is a store that takes time and can lose power. A call is under way for
// a while before it does its work, and for a while after; so calls that run in
// parallel happen in any order. At the change numbered At (from 1; a Put or
// Delete) the power goes: each change that is under way then happens or not, by
// chance, as all that was not synced may be found in any combination; every
// call fails from then on. At 0 it never goes.
//
// A change whose context ends while it is under way fails, and may happen
// nevertheless, later: nobody can call back what is on a network.
type Power struct {
	Inner blob.Store
	At    int
	Seed  uint64
	// Delay bounds how long a call is under way, each way.
	Delay time.Duration
	// Late bounds how much later an abandoned change happens.
	Late time.Duration

	once    sync.Once
	mu      sync.Mutex // guards all below
	rng     *rand.Rand
	changes int
	lost    bool
	until   time.Time // stalled until then
	calls   sync.WaitGroup
}

func (p *Power) init() { p.once.Do(func() { p.rng = rand.New(rand.NewPCG(p.Seed, 77)) }) }

// Changes is how many changes were begun so far.
func (p *Power) Changes() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.changes
}

// Lost reports whether the power is gone.
func (p *Power) Lost() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lost
}

// Wait returns when no call is under way, late ones included.
func (p *Power) Wait() { p.calls.Wait() }

// Stall keeps all calls under way for so long, as those of a process that is
// stopped, or of a machine whose network is gone.
func (p *Power) Stall(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.until = time.Now().Add(d)
}

func (p *Power) upTo(d time.Duration) time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Duration(p.rng.Int64N(int64(d) + 1))
}

func (p *Power) coin() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.rng.IntN(2) == 0
}

// travel is the way there or back.
func (p *Power) travel(ctx context.Context) error {
	d := p.upTo(p.Delay)
	p.mu.Lock()
	d = max(d, time.Until(p.until))
	p.mu.Unlock()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// change makes a change in all these ways.
func (p *Power) change(ctx context.Context, do func(context.Context) error) error {
	p.init()
	p.calls.Add(1)
	defer p.calls.Done()
	p.mu.Lock()
	if p.lost {
		p.mu.Unlock()
		return ErrInjected
	}
	p.changes++
	p.lost = p.changes == p.At
	p.mu.Unlock()
	whatever := context.WithoutCancel(ctx)
	if err := p.travel(ctx); err != nil {
		if p.coin() {
			p.calls.Go(func() {
				time.Sleep(p.upTo(p.Late))
				do(whatever)
			})
		}
		return err
	}
	if p.Lost() {
		if p.coin() {
			do(whatever)
		}
		return ErrInjected
	}
	err := do(whatever)
	if gone := p.travel(ctx); gone != nil {
		return gone
	}
	if p.Lost() {
		return ErrInjected
	}
	return err
}

// look is for calls that change nothing.
func (p *Power) look(ctx context.Context) error {
	p.init()
	if p.Lost() {
		return ErrInjected
	}
	return p.travel(ctx)
}

func (p *Power) Put(ctx context.Context, name string, data []byte) error {
	data = append([]byte(nil), data...) // the caller's again when a late one happens
	return p.change(ctx, func(ctx context.Context) error { return p.Inner.Put(ctx, name, data) })
}

func (p *Power) Delete(ctx context.Context, name string) error {
	return p.change(ctx, func(ctx context.Context) error { return p.Inner.Delete(ctx, name) })
}

func (p *Power) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	if err := p.look(ctx); err != nil {
		return nil, err
	}
	data, err := p.Inner.Get(ctx, name, off, n)
	if p.Lost() {
		return nil, ErrInjected
	}
	return data, err
}

func (p *Power) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		if err := p.look(ctx); err != nil {
			yield(blob.Info{}, err)
			return
		}
		for i, err := range p.Inner.List(ctx, prefix) {
			if p.Lost() {
				yield(blob.Info{}, ErrInjected)
				return
			}
			if !yield(i, err) {
				return
			}
		}
	}
}
