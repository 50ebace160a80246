package retention

import (
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func berlin(t *testing.T) *time.Location {
	l, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Skip(err)
	}
	return l
}

func at(l *time.Location, s string) time.Time {
	t, err := time.ParseInLocation("2006-01-02 15:04", s, l)
	if err != nil {
		panic(err)
	}
	return t
}

// kept lists what stays, as "time: reasons".
func kept(decisions []Decision, l *time.Location) (lines []string) {
	for _, d := range decisions {
		if d.Keep {
			lines = append(lines, d.Time.In(l).Format("01-02 15:04")+": "+strings.Join(d.Reasons, ", "))
		}
	}
	return lines
}

func TestApply(t *testing.T) {
	l := berlin(t)
	now := at(l, "2026-03-31 12:00")
	var items []Item
	for _, s := range []string{
		"2025-12-31 23:30", "2026-01-15 01:00", "2026-02-28 01:00", "2026-03-01 00:30", "2026-03-22 01:00",
		"2026-03-29 01:00", "2026-03-30 01:00", "2026-03-30 23:30", "2026-03-31 01:00", "2026-03-31 01:20",
	} {
		items = append(items, Item{ID: s, Time: at(l, s).UTC()})
	}
	for _, c := range []struct {
		rules Rules
		want  []string
	}{
		{Rules{Last: 2}, []string{"03-31 01:00: last 2 of 2", "03-31 01:20: last 1 of 2"}},
		{Rules{Hourly: 2}, []string{"03-30 23:30: hourly 2 of 2 (2026-03-30 23h +0200)", "03-31 01:20: hourly 1 of 2 (2026-03-31 01h +0200)"}},
		{Rules{Daily: 2}, []string{"03-30 23:30: daily 2 of 2 (2026-03-30)", "03-31 01:20: daily 1 of 2 (2026-03-31)"}},
		{Rules{Weekly: 3}, []string{"03-22 01:00: weekly 3 of 3 (2026 week 12)", "03-29 01:00: weekly 2 of 3 (2026 week 13)", "03-31 01:20: weekly 1 of 3 (2026 week 14)"}},
		{Rules{Monthly: 2}, []string{"02-28 01:00: monthly 2 of 2 (2026-02)", "03-31 01:20: monthly 1 of 2 (2026-03)"}},
		{Rules{Yearly: 5}, []string{"12-31 23:30: yearly 2 of 5 (2025)", "03-31 01:20: yearly 1 of 5 (2026)"}},
		{Rules{Within: Period{Days: 1}}, []string{"03-30 23:30: within 1d", "03-31 01:00: within 1d", "03-31 01:20: within 1d"}},
		{Rules{Within: Period{Hours: 1}}, []string{"03-31 01:20: the VM's last restore point"}},
		{Rules{Within: Period{Hours: 1}, AllowLast: true}, nil},
		{Rules{Last: 1, Daily: 1}, []string{"03-31 01:20: last 1 of 1, daily 1 of 1 (2026-03-31)"}},
	} {
		if got := kept(Apply(c.rules, items, now), l); !slices.Equal(got, c.want) {
			t.Errorf("%+v:\n%s\nwant\n%s", c.rules, strings.Join(got, "\n"), strings.Join(c.want, "\n"))
		}
	}
	marked := slices.Clone(items)
	marked[1].Mark = "marked to stay for ever"
	if got := kept(Apply(Rules{Last: 1}, marked, now), l); len(got) != 2 || !strings.Contains(got[0], "for ever") {
		t.Errorf("marked: %q", got)
	}
	// The time zone decides what a day is.
	utc := Apply(Rules{Monthly: 3}, items, now.UTC())
	if got := kept(utc, time.UTC); !strings.HasPrefix(got[1], "02-28 23:30") {
		t.Errorf("in UTC: %q", got)
	}
}

// An hour that comes twice, when clocks go back, is two.
func TestClocksBack(t *testing.T) {
	l := berlin(t)
	first := time.Date(2026, 10, 25, 0, 30, 0, 0, time.UTC) // 02:30 summer time
	items := []Item{{ID: "a", Time: first}, {ID: "b", Time: first.Add(time.Hour)}}
	if got := kept(Apply(Rules{Hourly: 2}, items, first.Add(5*time.Hour).In(l)), l); len(got) != 2 {
		t.Errorf("%q", got)
	}
}

// What holds of all rules and points.
func TestProperties(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	l := berlin(t)
	for range 500 {
		now := time.Unix(1_700_000_000+rng.Int64N(100_000_000), 0).In(l)
		var items []Item
		for i := range rng.IntN(60) {
			it := Item{ID: fmt.Sprint(i), History: fmt.Sprint(rng.IntN(3)), Time: now.Add(-time.Duration(rng.Int64N(1 << uint(30+rng.IntN(26)))))}
			if rng.IntN(10) == 0 {
				it.Mark = "marked"
			}
			items = append(items, it)
		}
		n := func() int { return rng.IntN(4) * rng.IntN(3) }
		rules := Rules{Last: n(), Hourly: n(), Daily: n(), Weekly: n(), Monthly: n(), Yearly: n()}
		if rng.IntN(3) == 0 {
			rules.Within = Period{Days: 1 + rng.IntN(60)}
		}
		check(t, rng, rules, items, now)
	}
}

func check(t *testing.T, rng *rand.Rand, rules Rules, items []Item, now time.Time) {
	t.Helper()
	got := Apply(rules, items, now)
	var left []Item
	newest := map[string]Item{}
	stays := map[string]bool{}
	for i, d := range got {
		if d.Item != items[i] || len(d.Reasons) == 0 {
			t.Fatalf("decision %d: %+v", i, d)
		}
		if d.Mark != "" && !d.Keep {
			t.Fatalf("a marked point goes: %+v", d)
		}
		if d.Keep {
			left = append(left, d.Item)
			stays[d.History] = true
		}
		if n, ok := newest[d.History]; !ok || !d.Time.Before(n.Time) {
			newest[d.History] = d.Item
		}
	}
	for h, n := range newest {
		if !stays[h] {
			t.Fatalf("%+v: history %s loses its last point", rules, h)
		}
		if (rules.Last > 0 || rules.Daily > 0 || rules.Yearly > 0) && !slices.Contains(left, n) {
			t.Fatalf("%+v: the newest point %+v goes", rules, n)
		}
	}
	for _, d := range Apply(rules, left, now) {
		if !d.Keep {
			t.Fatalf("%+v: applied to what stayed, %+v goes: %q", rules, d.Item, d.Reasons)
		}
	}
	more := rules
	more.Last, more.Daily, more.Monthly = more.Last+1, more.Daily+2, more.Monthly+1
	for i, d := range Apply(more, items, now) {
		if !rules.Empty() && got[i].Keep && !d.Keep && got[i].Reasons[0] != "the VM's last restore point" {
			t.Fatalf("%+v keeps %+v, more does not", rules, d.Item)
		}
	}
	// Another history, and the order of others, change nothing.
	one := fmt.Sprint(rng.IntN(3))
	var alone []Item
	for _, it := range items {
		if it.History == one {
			alone = append(alone, it)
		}
	}
	for _, d := range Apply(rules, alone, now) {
		for _, o := range got {
			if o.ID == d.ID && !slices.Equal(o.Reasons, d.Reasons) {
				t.Fatalf("alone %q, with others %q", d.Reasons, o.Reasons)
			}
		}
	}
}

func TestPeriod(t *testing.T) {
	for s, want := range map[string]Period{
		"12h": {Hours: 12}, "30d": {Days: 30}, "8w": {Days: 56}, "6m": {Months: 6}, "1y": {Years: 1}, "1y6m2d": {Years: 1, Months: 6, Days: 2},
	} {
		got, err := ParsePeriod(s)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", s, got, err)
		}
		if again, err := ParsePeriod(got.String()); err != nil || again != got {
			t.Errorf("%s: %s: %v", s, got, err)
		}
	}
	for _, s := range []string{"", "d", "30", "-1d", "30 d", "1.5d", "0d", "30dd", "30x", "99999999999999999999d", "d30"} {
		if p, err := ParsePeriod(s); err == nil {
			t.Errorf("%q: %+v", s, p)
		}
	}
}
