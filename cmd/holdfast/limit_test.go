package main

import "testing"

func TestRate(t *testing.T) {
	for s, want := range map[string]int64{"": 0, "1": 1, "1000": 1000, "500k": 500 << 10, "1.5MiB": 3 << 19, "20M": 20 << 20, "20MB/s": 20 << 20, "1GiB": 1 << 30} {
		if got, err := rate("--limit-up", s); got != want || err != nil {
			t.Errorf("%q: %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"0", "-1", "k", "fast", "1T", "1kk", "NaN", "inf", "1e30"} {
		if got, err := rate("--limit-up", s); err == nil {
			t.Errorf("%q: %d", s, got)
		}
	}
}
