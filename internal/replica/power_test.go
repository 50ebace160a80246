package replica

import (
	"fmt"
	"testing"
	"time"

	"holdfast/internal/blob/blobtest"
	"holdfast/internal/repo"
)

// The power of the source or of the target goes at each change that a copy
// makes there; what is under way then, several packs among it, happens or not,
// each by itself.
func TestCopyPowerLossInFlight(t *testing.T) {
	made := newWorld(t)
	source := open(t, made.from)
	v := made.add("web", 300, 5) // more than one pack's worth
	made.scribble(v, "vda", 0, 280)
	made.scribble(v, "vdb", 1, 2)
	ids := []repo.PointID{made.backup(source, v).ID}
	seed := made.rng.Uint64()
	for _, side := range []string{"source", "target"} {
		try := func(t *testing.T, at int) int {
			w := *made
			w.t = t
			w.from, w.to = made.from.Clone(), made.to.Clone()
			p := &blobtest.Power{At: at, Seed: seed + uint64(at), Delay: 300 * time.Microsecond}
			var from, to *repo.Repo
			if side == "source" {
				p.Inner = w.from
				from, to = open(t, p), open(t, w.to)
			} else {
				p.Inner = w.to
				from, to = open(t, w.from), open(t, p)
			}
			if from != nil && to != nil {
				w.tryCopy(from, to)
			}
			p.Wait()
			from, to = open(t, w.from), open(t, w.to)
			points, err := to.Points(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range points {
				if err := w.differs(to, p); err != nil {
					t.Fatalf("after the cut: %v", err)
				}
			}
			w.copy(from, to)
			w.right(to, ids...)
			w.tidy()
			return p.Changes()
		}
		most := try(t, 0)
		t.Logf("%s: %d changes", side, most)
		for at := 1; at <= most; at++ {
			if testing.Short() && at%9 > 0 {
				continue
			}
			t.Run(fmt.Sprintf("%s/%d", side, at), func(t *testing.T) { try(t, at) })
		}
	}
}
