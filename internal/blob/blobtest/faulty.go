package blobtest

import (
	"context"
	"errors"
	"iter"
	"sync"

	"holdfast/internal/blob"
)

// ErrInjected is what a Faulty store fails with.
var ErrInjected = errors.New("injected fault")

// Fault says what happens at the chosen call.
type Fault int

const (
	Before Fault = iota // the call fails and has done nothing
	After               // the call has done its work, and fails all the same
)

// Faulty passes calls to Inner and fails the one numbered At (from 1) in the
// way of Fault. With Cut, every later call fails as well and does nothing: the
// power is gone. At 0 fails nothing and only counts.
type Faulty struct {
	Inner blob.Store
	At    int
	Fault Fault
	Cut   bool

	mu    sync.Mutex
	calls int // guarded by mu
}

// Calls is how many calls were made so far.
func (f *Faulty) Calls() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls
}

// step counts a call and says whether to do it and with what to fail.
func (f *Faulty) step() (do bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	switch {
	case f.At == 0 || f.calls < f.At || f.calls > f.At && !f.Cut:
		return true, nil
	case f.calls == f.At:
		return f.Fault == After, ErrInjected
	}
	return false, ErrInjected
}

func (f *Faulty) Put(ctx context.Context, name string, data []byte) error {
	do, fault := f.step()
	if do {
		if err := f.Inner.Put(ctx, name, data); err != nil {
			return err
		}
	}
	return fault
}

func (f *Faulty) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	if _, fault := f.step(); fault != nil {
		return nil, fault
	}
	return f.Inner.Get(ctx, name, off, n)
}

func (f *Faulty) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return func(yield func(blob.Info, error) bool) {
		do, fault := f.step()
		if fault != nil && !do {
			yield(blob.Info{}, fault)
			return
		}
		// A fault after its work is a listing that breaks off half-way.
		n := 0
		for i, err := range f.Inner.List(ctx, prefix) {
			if fault != nil && n == 1 {
				break
			}
			n++
			if !yield(i, err) {
				return
			}
		}
		if fault != nil {
			yield(blob.Info{}, fault)
		}
	}
}

func (f *Faulty) Delete(ctx context.Context, name string) error {
	do, fault := f.step()
	if do {
		if err := f.Inner.Delete(ctx, name); err != nil {
			return err
		}
	}
	return fault
}
