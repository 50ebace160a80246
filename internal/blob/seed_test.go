package blob

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"time"
)

// seeded is a source of chance on a seed that it prints, or that HOLDFAST_SEED says.
func seeded(t *testing.T) *rand.Rand {
	s := uint64(time.Now().UnixNano())
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		fmt.Sscan(v, &s)
	}
	t.Logf("HOLDFAST_SEED=%d", s)
	return rand.New(rand.NewPCG(s, 1))
}
