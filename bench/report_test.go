//go:build linux

package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
)

// Rows that nothing can be written into, or that are against nothing.
func TestRows(t *testing.T) {
	keys := map[string]bool{}
	for _, s := range sections {
		for _, r := range s.rows {
			if keys[r.key] {
				t.Errorf("two rows show %q", r.key)
			}
			keys[r.key] = true
			if r.most > 0 && r.least > 0 {
				t.Errorf("%q has two aims", r.key)
			}
		}
	}
	for _, s := range sections {
		for _, r := range s.rows {
			if r.of != "" && !keys[r.of] {
				t.Errorf("%q is against %q, which no row shows", r.key, r.of)
			}
		}
	}
}

func TestReport(t *testing.T) {
	b := &bench{figures: map[string][]float64{
		"copy": {5, 4, 6}, "backup": {8, 7, 6.5}, "cat": {1}, "unchanged": {2},
		"warm, raw": {2}, "warm, holdfast": {1}, "first read, 4 GiB": {0.7},
	}}
	report := b.report("results.svg")
	for _, want := range []string{
		"| full backup, against the copy | 6.50 / 7.00 / 8.00 s | 1.40 | ≤ 1.4 |",
		"| second backup, nothing changed, read and compared, against `cat` | 2.00 s | 2.00 | ≤ 3 |",
		"| warm: `holdfast publish` | 1.00 s | 2.00 | ≥ 1 |",
		"disk of 4 GiB | 0.70 s |  | ≤ 0.5 s, **missed** |",
	} {
		if !strings.Contains(report, want) {
			t.Errorf("%q is not in\n%s", want, report)
		}
	}
	if strings.Contains(report, "S3") {
		t.Error("what was not measured is in the report")
	}
	plot := b.plot()
	if bars := bytes.Count(plot, []byte("<rect x=")); bars != 4 {
		t.Errorf("%d bars in\n%s", bars, plot)
	}
	for d := xml.NewDecoder(bytes.NewReader(plot)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the plot is no XML: %v", err)
		}
	}
}
