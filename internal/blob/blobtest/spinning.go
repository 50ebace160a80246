package blobtest

import (
	"context"
	"iter"
	"sync"
	"time"

	"holdfast/internal/blob"
)

// Spinning is a store on a simulated disk with one head. A call that does not
// go on where the one before it ended, in the same object, costs a seek; so
// does the first of all. Every byte costs its time under the head. Calls are
// served one after the other. Listings and deletions are free.
type Spinning struct {
	Inner blob.Store
	// Seek is what a seek takes; 0 is 10 ms.
	Seek time.Duration
	// Rate is how many bytes pass in a second; 0 is 150 million.
	Rate int64
	// Sleep lets each call take its time. Without it time is only added up.
	Sleep bool

	mu   sync.Mutex // guards what follows; held during a call
	name string     // where the head is
	off  int64
	cost Spent
}

// Spent is what a Spinning store was busy with.
type Spent struct {
	Time  time.Duration
	Seeks int
	Bytes int64
}

// Spent gives what was spent since the last call of Spent.
func (s *Spinning) Spent() Spent {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.cost
	s.cost = Spent{}
	return c
}

// Sequential is how long so many bytes take without a seek.
func (s *Spinning) Sequential(n int64) time.Duration {
	rate := s.Rate
	if rate == 0 {
		rate = 150e6
	}
	return time.Duration(float64(n) / float64(rate) * float64(time.Second))
}

// pass moves the head over n bytes. The caller holds mu.
func (s *Spinning) pass(name string, off, n int64) {
	t := s.Sequential(n)
	if s.name != name || s.off != off {
		s.cost.Seeks++
		seek := s.Seek
		if seek == 0 {
			seek = 10 * time.Millisecond
		}
		t += seek
	}
	s.name, s.off = name, off+n
	s.cost.Time += t
	s.cost.Bytes += n
	if s.Sleep {
		time.Sleep(t)
	}
}

func (s *Spinning) Put(ctx context.Context, name string, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pass(name, 0, int64(len(data)))
	return s.Inner.Put(ctx, name, data)
}

func (s *Spinning) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, err := s.Inner.Get(ctx, name, off, n)
	s.pass(name, off, int64(len(p)))
	return p, err
}

// OneHead makes readers come one after the other.
func (s *Spinning) OneHead() {}

func (s *Spinning) List(ctx context.Context, prefix string) iter.Seq2[blob.Info, error] {
	return s.Inner.List(ctx, prefix)
}

func (s *Spinning) Delete(ctx context.Context, name string) error { return s.Inner.Delete(ctx, name) }
