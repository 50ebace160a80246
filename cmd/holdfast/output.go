package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// result writes a command's result: v as JSON, or what human writes.
func (a *app) result(v any, human func() string) error {
	a.settle()
	if a.json {
		b, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return err
		}
		_, err = a.stdout.Write(append(b, '\n'))
		return err
	}
	_, err := fmt.Fprint(a.stdout, human())
	return err
}

// jsonLine writes v as JSON on one line.
func (a *app) jsonLine(v any) error {
	a.settle()
	return json.NewEncoder(a.stdout).Encode(v)
}

// list is v, or an empty list for a nil one: JSON knows the difference.
func list[T any](v []T) []T {
	if v == nil {
		return []T{}
	}
	return v
}

// table lines columns up. A heading that begins with ">" is a column of
// numbers, aligned to the right.
type table struct {
	rows  [][]string
	right []bool
}

func newTable(headings ...string) *table {
	t := &table{}
	for i, h := range headings {
		t.right = append(t.right, strings.HasPrefix(h, ">"))
		headings[i] = strings.TrimPrefix(h, ">")
	}
	t.rows = append(t.rows, headings)
	return t
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

func (t *table) String() string {
	width := make([]int, len(t.right))
	for _, row := range t.rows {
		for i, c := range row {
			width[i] = max(width[i], utf8.RuneCountInString(c))
		}
	}
	var b strings.Builder
	for _, row := range t.rows {
		var line strings.Builder
		for i, c := range row {
			pad := strings.Repeat(" ", width[i]-utf8.RuneCountInString(c))
			if i > 0 {
				line.WriteString("  ")
			}
			if t.right[i] {
				c, pad = pad, c
			}
			line.WriteString(c + pad)
		}
		b.WriteString(strings.TrimRight(line.String(), " ") + "\n")
	}
	return b.String()
}

// size is a number of bytes for reading.
func size(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d B", n)
	}
	v, units := float64(n), "KMGTPE"
	for v /= 1 << 10; v >= 1<<10-0.5 && len(units) > 1; v /= 1 << 10 {
		units = units[1:]
	}
	if v < 10 {
		return fmt.Sprintf("%.1f %ciB", v, units[0])
	}
	return fmt.Sprintf("%.0f %ciB", v, units[0])
}

// clock is a time of day here.
func clock(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05") }

// took is a duration for reading.
func took(d time.Duration) string {
	switch {
	case d < 10*time.Second && d%time.Second != 0:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < 2*time.Minute:
		return fmt.Sprintf("%.0f s", d.Seconds())
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min %02d s", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%d h %02d min", int(d.Hours()), int(d.Minutes())%60)
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// short is the beginning of an id, enough for people.
func short[T ~string](id T) string { return string(id[:min(len(id), 8)]) }

// count is a number of things, in words.
func count[N int | int64 | uint64](n N, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}
