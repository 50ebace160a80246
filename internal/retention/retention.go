// Package retention says which restore points stay. It is a pure function of
// rules, points and a time: nothing here reads a clock or a repository.
//
// Each history is looked at alone. A point stays when any rule keeps it, or
// its mark does; what no rule keeps goes. Hours, days, weeks (from Monday,
// ISO 8601), months and years are those of the time zone of now. Each of
// these rules keeps the newest point of each of the last N hours, days, …
// that have points: periods without any do not count, so nothing goes only
// because no backups were made for a while.
package retention

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Rules say what stays. The zero value has no rule, and Apply keeps everything.
type Rules struct {
	Last                                   int // the newest
	Hourly, Daily, Weekly, Monthly, Yearly int // the newest of each of so many
	Within                                 Period
	// AllowLast lets a history's last point go. Else the newest stays when no
	// rule keeps any.
	AllowLast bool
}

// Empty reports whether there is no rule.
func (r Rules) Empty() bool {
	return r.Last <= 0 && r.Hourly <= 0 && r.Daily <= 0 && r.Weekly <= 0 && r.Monthly <= 0 && r.Yearly <= 0 && r.Within == Period{}
}

// Item is a restore point.
type Item struct {
	ID      string
	History string
	Time    time.Time // of the snapshot
	Mark    string    // why it is marked to stay, in words; "" when it is not
}

// Decision is what becomes of an Item.
type Decision struct {
	Item
	Keep    bool
	Reasons []string // in words; never empty
}

// Apply decides about each item, in their order. Of items of the same time the
// later one counts as newer.
func Apply(rules Rules, items []Item, now time.Time) []Decision {
	decisions := make([]Decision, len(items))
	histories := map[string][]int{}
	for i, it := range items {
		decisions[i].Item = it
		histories[it.History] = append(histories[it.History], i)
	}
	for _, places := range histories {
		of := make([]*Decision, len(places)) // newest first
		for k, i := range places {
			of[len(places)-1-k] = &decisions[i]
		}
		slices.SortStableFunc(of, func(a, b *Decision) int { return b.Time.Compare(a.Time) })
		rules.history(of, now)
	}
	return decisions
}

// rule keeps the newest point of each of so many periods.
type rule struct {
	name   string
	count  int
	period func(time.Time) string // names the period that a time falls in
}

func (r Rules) periods() []rule {
	return []rule{
		// With the offset from UTC, since an hour comes twice when clocks go back.
		{"hourly", r.Hourly, func(t time.Time) string { return t.Format("2006-01-02 15h -0700") }},
		{"daily", r.Daily, func(t time.Time) string { return t.Format("2006-01-02") }},
		{"weekly", r.Weekly, func(t time.Time) string {
			y, w := t.ISOWeek()
			return fmt.Sprintf("%d week %d", y, w)
		}},
		{"monthly", r.Monthly, func(t time.Time) string { return t.Format("2006-01") }},
		{"yearly", r.Yearly, func(t time.Time) string { return t.Format("2006") }},
	}
}

// history decides about the points of one history, newest first.
func (r Rules) history(of []*Decision, now time.Time) {
	if r.Empty() {
		for _, d := range of {
			d.keep("no rule is given")
		}
		return
	}
	for i, d := range of {
		if d.Mark != "" {
			d.keep(d.Mark)
		}
		if i < r.Last {
			d.keep(fmt.Sprintf("last %d of %d", i+1, r.Last))
		}
		if since := r.Within.Before(now); r.Within != (Period{}) && d.Time.After(since) {
			d.keep("within " + r.Within.String())
		}
	}
	for _, rule := range r.periods() {
		n, last := 0, ""
		for _, d := range of {
			p := rule.period(d.Time.In(now.Location()))
			if n == rule.count {
				break
			}
			if n > 0 && p == last {
				continue
			}
			n, last = n+1, p
			d.keep(fmt.Sprintf("%s %d of %d (%s)", rule.name, n, rule.count, p))
		}
	}
	if !r.AllowLast && len(of) > 0 && !slices.ContainsFunc(of, func(d *Decision) bool { return d.Keep }) {
		of[0].keep("the VM's last restore point")
	}
	for _, d := range of {
		if !d.Keep {
			d.Reasons = []string{"no rule keeps it"}
		}
	}
}

func (d *Decision) keep(why string) {
	d.Keep = true
	d.Reasons = append(d.Reasons, why)
}

// Period is a length of time as people count it.
type Period struct{ Years, Months, Days, Hours int }

// maxCount bounds a number in a Period, so that no date overflows.
const maxCount = 100_000

// ParsePeriod reads 12h, 30d, 8w, 6m (months), 1y, or several of them: 1y6m.
func ParsePeriod(s string) (Period, error) {
	var p Period
	bad := fmt.Errorf("%q is not a period: write 12h, 30d, 8w, 6m (months) or 1y", s)
	for rest := s; ; {
		i := strings.IndexFunc(rest, func(c rune) bool { return c < '0' || c > '9' })
		if i <= 0 {
			return Period{}, bad
		}
		n, err := strconv.Atoi(rest[:i])
		if err != nil || n > maxCount {
			return Period{}, bad
		}
		switch rest[i] {
		case 'h':
			p.Hours += n
		case 'd':
			p.Days += n
		case 'w':
			p.Days += 7 * n
		case 'm':
			p.Months += n
		case 'y':
			p.Years += n
		default:
			return Period{}, bad
		}
		if rest = rest[i+1:]; rest == "" {
			break
		}
	}
	if p == (Period{}) {
		return Period{}, bad
	}
	return p, nil
}

// String writes the period as ParsePeriod reads it; "" for none.
func (p Period) String() string {
	var b strings.Builder
	for _, part := range []struct {
		n    int
		unit string
	}{{p.Years, "y"}, {p.Months, "m"}, {p.Days, "d"}, {p.Hours, "h"}} {
		if part.n != 0 {
			fmt.Fprintf(&b, "%d%s", part.n, part.unit)
		}
	}
	return b.String()
}

// Before is the time that lies so long before t.
func (p Period) Before(t time.Time) time.Time {
	return t.AddDate(-p.Years, -p.Months, -p.Days).Add(-time.Duration(p.Hours) * time.Hour)
}
