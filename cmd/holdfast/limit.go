package main

import (
	"cmp"
	"math"
	"os"
	"strconv"
	"strings"

	"holdfast/internal/blob"
)

// limited gives the bounds of --limit-up and --limit-down, or of the environment,
// which processes that outlive this one take over.
func (a *app) limited() (r blob.Rates, err error) {
	if r.Up, err = rate("--limit-up", cmp.Or(a.limits.up, os.Getenv("HOLDFAST_LIMIT_UP"))); err != nil {
		return r, err
	}
	r.Down, err = rate("--limit-down", cmp.Or(a.limits.down, os.Getenv("HOLDFAST_LIMIT_DOWN")))
	return r, err
}

// rate reads bytes per second: "500k", "20MiB". "" is no bound.
func rate(flag, s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	digits := strings.TrimRight(s, "KMGkmgiBb/s")
	unit, _ := strings.CutSuffix(strings.ToLower(s[len(digits):]), "/s")
	unit = strings.TrimSuffix(strings.TrimSuffix(unit, "b"), "i")
	shift, ok := map[string]float64{"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}[unit]
	n, err := strconv.ParseFloat(digits, 64)
	if err != nil || !ok || !(n*shift >= 1) || n*shift > math.MaxInt64/2 {
		return 0, usagef("%s %q is not a rate: say bytes per second, as 500KiB or 20MiB", flag, s)
	}
	return int64(n * shift), nil
}
