//go:build linux

package main

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"
)

// row is one line of the results: a figure, what it is a ratio of, and what it
// should be.
type row struct {
	what string // Markdown
	key  string // in bench.figures
	unit string // "s" when empty
	of   string // key of the figure that the ratio is against; "" for none
	rate bool   // the ratio is of rates: it grows as the figure's time shrinks
	// The aim, of the ratio where there is one, else of the figure; 0 for none.
	most, least float64
}

// section is a table.
type section struct {
	title, text string
	rows        []row
}

// judged is what the aim is about: the ratio of the medians, or the median.
func (b *bench) judged(r row) (v float64, ok bool) {
	_, v, _ = three(b.figures[r.key])
	if r.of == "" {
		return v, v != 0
	}
	_, of, _ := three(b.figures[r.of])
	if r.rate {
		v, of = of, v
	}
	if v == 0 || of == 0 {
		return 0, false
	}
	return v / of, true
}

func (r row) aim() string {
	unit := ""
	if r.of == "" {
		unit = " " + r.units()
	}
	switch {
	case r.most > 0:
		return fmt.Sprintf("≤ %g%s", r.most, unit)
	case r.least > 0:
		return fmt.Sprintf("≥ %g%s", r.least, unit)
	}
	return ""
}

func (r row) units() string {
	if r.unit == "" {
		return "s"
	}
	return r.unit
}

// met says whether a value is what it should be.
func (r row) met(v float64) bool { return (r.most == 0 || v <= r.most) && v >= r.least }

// report is the results as Markdown. plot is the name of the picture's file.
func (b *bench) report(plot string) string {
	var s strings.Builder
	fmt.Fprintf(&s, "# Measured\n\nBy `make bench` on %s, in one run of %d rounds, in %.0f minutes: least / median / greatest.\n",
		time.Now().UTC().Format("2006-01-02"), b.runs, time.Since(b.began).Minutes())
	fmt.Fprintf(&s, "Compare only within one run, as ratios: they are of the medians. Seconds are wall time.\n\n")
	if len(b.absent) > 0 {
		fmt.Fprintf(&s, "Not installed, and left out: %s.\n\n", strings.Join(b.absent, ", "))
	}
	fmt.Fprintf(&s, "![Each figure against its aim](%s)\n\n| | |\n|---|---|\n", plot)
	for _, f := range b.facts() {
		fmt.Fprintf(&s, "| %s | %s |\n", f[0], f[1])
	}
	for _, sec := range sections {
		rows := slices.DeleteFunc(slices.Clone(sec.rows), func(r row) bool { return len(b.figures[r.key]) == 0 })
		if len(rows) == 0 {
			continue
		}
		fmt.Fprintf(&s, "\n## %s\n\n", sec.title)
		if sec.text != "" {
			fmt.Fprintf(&s, "%s\n\n", sec.text)
		}
		fmt.Fprintf(&s, "| | | ratio | aim |\n|---|---|---|---|\n")
		for _, r := range rows {
			b.row(&s, r)
		}
	}
	return s.String()
}

// row writes one line of a table.
func (b *bench) row(s *strings.Builder, r row) {
	v := b.figures[r.key]
	lo, mid, hi := three(v)
	text := number(mid)
	if len(v) > 1 {
		text = number(lo) + " / " + text + " / " + number(hi)
	}
	ratio, aim := "", r.aim()
	j, ok := b.judged(r)
	if ok && r.of != "" {
		ratio = fmt.Sprintf("%.2f", j)
	}
	if ok && aim != "" && !r.met(j) {
		aim += ", **missed**"
	}
	fmt.Fprintf(s, "| %s | %s %s | %s | %s |\n", r.what, text, r.units(), ratio, aim)
}

// number has three digits or more.
func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

// facts are those of the machine and the programs.
func (b *bench) facts() [][2]string {
	facts := [][2]string{
		{"program", fact("", b.bin, "version")},
		{"processor", fmt.Sprintf("%s, %d cores", strings.TrimPrefix(fact("model name", "/proc/cpuinfo"), "model name : "), runtime.NumCPU())},
		{"memory", strings.TrimPrefix(fact("MemTotal", "/proc/meminfo"), "MemTotal: ")},
		{"kernel", fact("", "uname", "-sr")},
		{"filesystem of the data", fact("", "stat", "-f", "-c", "%T", b.data)},
		{"qemu-img, qemu-nbd", fact("version", "qemu-img", "--version")},
	}
	for _, p := range peers {
		if !slices.Contains(b.absent, p.name) {
			facts = append(facts, [2]string{p.name, fact(p.name, p.name, p.version)})
		}
	}
	if b.used == 0 {
		return facts
	}
	return append(facts, [2]string{"disk", fmt.Sprintf("%.1f GiB, of which %.1f GiB data: a copy of this machine's /usr in ext4, databases, a log", gib(b.size), gib(b.used))})
}

func gib(n int64) float64 { return float64(n) / (1 << 30) }
