package harden

import "time"

// budget is how much of a gap is believed at once in one run of the machine: it
// was switched off for a while, its clock was a little wrong.
const budget = 24 * time.Hour

// clock is the time that locks end by: what a clock that nobody has set wrong
// would show, or less. It goes on with the machine's monotonic clock. When the
// machine's clock is ahead of it the difference is believed when it is small
// (budget, once in a run of the machine), else only after it was lived through
// with the machine running. When the machine's clock is behind, both must have
// passed a lock's time.
//
// An attacker who sets the clock ahead by ten years waits for ten years. One
// who can also restart the machine gains budget with each restart.
type clock struct {
	Trusted int64  `json:"trusted"` // Unix time in nanoseconds
	Boot    string `json:"boot"`    // which run of the machine
	Mono    int64  `json:"mono"`    // nanoseconds of that run, when this was written
	Lived   int64  `json:"lived"`   // nanoseconds, of all runs
	Granted int64  `json:"granted"` // of budget, in this run
	// A gap that is not believed yet: its size, and Lived when it appeared.
	Gap   int64 `json:"gap"`
	Since int64 `json:"since"`
	Wall  int64 `json:"wall"` // when this was written; for people
}

// instant is what the machine's clocks show.
type instant struct {
	wall time.Time
	boot string
	mono time.Duration // since the machine has started, also while it slept
}

func newClock(i instant) clock {
	return clock{Trusted: i.wall.UnixNano(), Boot: i.boot, Mono: int64(i.mono), Wall: i.wall.UnixNano()}
}

// tick takes notice of the time, and returns the one that locks end by.
func (c *clock) tick(i instant) time.Time {
	if i.boot != c.Boot {
		c.Boot, c.Mono, c.Granted = i.boot, int64(i.mono), 0
	}
	if e := int64(i.mono) - c.Mono; e > 0 {
		c.Trusted += e
		c.Lived += e
	}
	c.Mono, c.Wall = int64(i.mono), i.wall.UnixNano()
	gap := c.Wall - c.Trusted
	switch {
	case gap <= 0:
		c.Gap = 0
		return i.wall
	case gap <= int64(budget)-c.Granted:
		c.Granted += gap
		c.Trusted, c.Gap = c.Wall, 0
	case c.Gap == 0 || gap > c.Gap+(c.Lived-c.Since)/500+int64(time.Second): // no clock drifts that fast
		c.Gap, c.Since = gap, c.Lived
	case c.Lived-c.Since >= gap:
		c.Trusted, c.Gap = c.Wall, 0
	}
	return time.Unix(0, c.Trusted)
}

// behind is how far the time that locks end by is behind the machine's clock.
func (c *clock) behind() time.Duration { return max(0, time.Duration(c.Wall-c.Trusted)) }
