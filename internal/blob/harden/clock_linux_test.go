package harden

import (
	"testing"
	"time"
)

// machine has clocks that a test sets.
type machine struct {
	i instant
}

func (m *machine) run(d time.Duration)  { m.i.wall = m.i.wall.Add(d); m.i.mono += d }
func (m *machine) step(d time.Duration) { m.i.wall = m.i.wall.Add(d) }
func (m *machine) restart(off time.Duration) {
	m.i.wall = m.i.wall.Add(off)
	m.i.boot += "'"
	m.i.mono = 20 * time.Second
}

func TestClock(t *testing.T) {
	const day = 24 * time.Hour
	start := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	begin := func() (*machine, *clock) {
		m := &machine{instant{wall: start, boot: "b", mono: time.Hour}}
		c := newClock(m.i)
		return m, &c
	}
	ticks := func(m *machine, c *clock, d time.Duration) (now time.Time) {
		for end := m.i.mono + d; m.i.mono < end; now = c.tick(m.i) {
			m.run(min(10*time.Minute, end-m.i.mono))
		}
		return now
	}
	near := func(t *testing.T, got, want time.Time) {
		t.Helper()
		if d := got.Sub(want).Abs(); d > time.Minute {
			t.Errorf("locks end by %s, want %s", got, want)
		}
	}
	t.Run("goes on", func(t *testing.T) {
		m, c := begin()
		near(t, ticks(m, c, 40*day), start.Add(40*day))
	})
	t.Run("a keeper that was not there", func(t *testing.T) {
		m, c := begin()
		m.run(300 * day)
		near(t, c.tick(m.i), m.i.wall)
	})
	t.Run("a jump ahead is lived through", func(t *testing.T) {
		m, c := begin()
		m.step(30 * day)
		near(t, c.tick(m.i), start)
		near(t, ticks(m, c, 29*day), start.Add(29*day))
		near(t, ticks(m, c, 2*day), m.i.wall)
	})
	t.Run("and a second one anew", func(t *testing.T) {
		m, c := begin()
		m.step(30 * day)
		ticks(m, c, 29*day)
		m.step(10 * day)
		near(t, ticks(m, c, 39*day), start.Add(68*day))
		near(t, ticks(m, c, 2*day), m.i.wall)
	})
	t.Run("set back again", func(t *testing.T) {
		m, c := begin()
		m.step(3650 * day)
		c.tick(m.i)
		m.step(-3650 * day)
		near(t, ticks(m, c, day), start.Add(day))
	})
	t.Run("many small jumps are a large one", func(t *testing.T) {
		m, c := begin()
		for range 100 {
			m.step(20 * time.Hour)
			c.tick(m.i)
		}
		if now := c.tick(m.i); now.Sub(start) > day {
			t.Errorf("%s were gained", now.Sub(start))
		}
	})
	t.Run("off for the night, each night", func(t *testing.T) {
		m, c := begin()
		for range 60 {
			ticks(m, c, 8*time.Hour)
			m.restart(16 * time.Hour)
			near(t, c.tick(m.i), m.i.wall)
		}
	})
	t.Run("off for a month", func(t *testing.T) {
		m, c := begin()
		m.restart(30 * day)
		near(t, c.tick(m.i), start)
		near(t, ticks(m, c, 31*day), m.i.wall)
	})
	t.Run("behind", func(t *testing.T) {
		m, c := begin()
		m.step(-300 * day)
		near(t, ticks(m, c, 100*day), start.Add(-200*day))
		m.step(300 * day)
		near(t, ticks(m, c, time.Hour), start.Add(100*day+time.Hour))
	})
	t.Run("creeping ahead", func(t *testing.T) {
		m, c := begin()
		m.step(25 * time.Hour)
		for range 60 * 24 * 10 {
			m.run(time.Minute)
			m.step(50 * time.Second)
			c.tick(m.i)
		}
		near(t, c.tick(m.i), start.Add(10*day))
	})
	t.Run("a battery that is dead", func(t *testing.T) {
		m, c := begin()
		m.restart(time.Hour)
		right := m.i.wall
		m.i.wall = time.Date(1970, 1, 1, 0, 0, 0, 0, time.UTC)
		c.tick(m.i)
		m.i.wall = right
		near(t, c.tick(m.i), right)
	})
}
