//go:build linux

package e2e

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"holdfast/test/lab"
)

// TestSoak kills for SOAK_HOURS hours: backups, the processes that serve a
// guest, migrations, at moments that come from the seed that each round prints.
// SEED repeats one round. It runs by "make soak" only.
func TestSoak(t *testing.T) {
	hours, err := strconv.ParseFloat(os.Getenv("SOAK_HOURS"), 64)
	if err != nil {
		t.Skip("SKIPPED: runs for hours; \"make soak\" runs it")
	}
	end := time.Now().Add(time.Duration(hours * float64(time.Hour)))
	kills, rounds := 0, 0
	for rounds == 0 || time.Now().Before(end) && os.Getenv("SEED") == "" {
		n := rand.Uint64()
		if s := os.Getenv("SEED"); s != "" {
			if n, err = strconv.ParseUint(s, 10, 64); err != nil {
				t.Fatal(err)
			}
		}
		ok := t.Run(strconv.FormatUint(n, 10), func(t *testing.T) {
			t.Logf("round %d, SEED=%d", rounds, n)
			kills += soak(t, rand.New(rand.NewPCG(n, n)))
		})
		rounds++
		t.Logf("%d rounds, %d kills, %.1f hours left", rounds, kills, time.Until(end).Hours())
		if !ok {
			t.Fatalf("SEED=%d failed", n)
		}
	}
}

// soak is one round; it returns how often it killed.
func soak(t *testing.T, r *rand.Rand) int {
	lab.Need(t)
	w := world0(t)
	w.must("init")
	kills := 1 + r.IntN(5)
	writes := []string{"host", "server"}[r.IntN(2)]
	if r.IntN(2) == 0 {
		g := lab.Start(t, twoDisks())
		w.ok(g.StartWriter(w.ctx, places...))
		w.killBackups(g, r, kills)
		return kills
	}
	t.Logf("writes go to the %s", writes)
	g, s := w.recovered(writes)
	w.ok(g.StartWriter(w.ctx, places...))
	n := 0
	for range kills {
		w.killServing(g, r)
		n++
		if r.IntN(3) == 0 {
			w.powerCycle(g)
			w.ok(g.StartWriter(w.ctx, places...))
		}
	}
	for range 1 + r.IntN(4) {
		if len(w.sessions()) == 0 {
			break
		}
		w.killMigrate(g, s, r)
		n++
	}
	w.finish(g, s)
	return n
}
