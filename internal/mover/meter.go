package mover

import (
	"math"
	"sync"
	"time"
)

// Meter counts bytes and tells how fast they pass and how long the rest will
// take. Its methods may run in parallel, and on a nil Meter do nothing. The
// zero value is ready.
//
// A Copy counts the bytes that it reads; ranges known to be zero cost nothing
// and are not counted. So the total to set is disk.DataBytes of the extents.
type Meter struct {
	mu          sync.Mutex // guards all below
	done, total int64
	last        time.Time // of the last sample; zero before the first
	lastDone    int64
	rate        float64 // bytes per second, smoothed
	weight      float64 // of the samples in rate, up to 1
}

// Progress is a Meter's reading.
type Progress struct {
	Done  int64         // bytes
	Total int64         // bytes; 0 when unknown
	Rate  float64       // bytes per second, over the last 10 seconds or so
	Left  time.Duration // until Done is Total at that rate; negative when unknown
}

// smooth is how fast older samples lose their weight.
const smooth = 10 * time.Second

// Add counts n more bytes.
func (m *Meter) Add(n int64) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.start()
	m.done += n
}

// AddTotal adds n bytes to what is to be done.
func (m *Meter) AddTotal(n int64) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.start()
	m.total += n
}

// Set sets both figures, as somebody else counts them. Its type is that of a
// hypervisor's progress.
func (m *Meter) Set(done, total int64) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.start()
	m.done, m.total = done, total
}

// start sets the first sample's beginning. The caller holds mu.
func (m *Meter) start() {
	if m.last.IsZero() {
		m.last, m.lastDone = time.Now(), m.done
	}
}

// Progress takes a sample, at most five a second, and tells where things stand.
func (m *Meter) Progress() Progress {
	if m == nil {
		return Progress{Left: -1}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.start()
	now := time.Now()
	if dt := now.Sub(m.last); dt >= 200*time.Millisecond {
		// An exponential mean over time, freed of the zero that it began with.
		keep := math.Exp(-float64(dt) / float64(smooth))
		m.rate = m.rate*keep + float64(m.done-m.lastDone)/dt.Seconds()*(1-keep)
		m.weight = m.weight*keep + (1 - keep)
		m.last, m.lastDone = now, m.done
	}
	p := Progress{Done: m.done, Total: m.total, Left: -1}
	if m.weight > 0 {
		p.Rate = max(m.rate/m.weight, 0)
	}
	switch {
	case m.total > 0 && m.done >= m.total:
		p.Left = 0
	case m.total > 0 && p.Rate > 0:
		if s := float64(m.total-m.done) / p.Rate; s < (10000 * time.Hour).Seconds() {
			p.Left = time.Duration(s * float64(time.Second))
		}
	}
	return p
}
