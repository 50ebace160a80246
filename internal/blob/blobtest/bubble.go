package blobtest

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"testing/synctest"
)

// Bubble runs a test in a synctest bubble, in which time costs nothing, in a
// process of its own: compressors that a bubble has left in a pool cannot be
// used outside it. What it logs, with a failure, is in the test's log.
func Bubble(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	const mark = "HOLDFAST_TEST_BUBBLE"
	if os.Getenv(mark) == t.Name() {
		synctest.Test(t, f)
		return
	}
	args := []string{"-test.run=^" + t.Name() + "$", "-test.v", "-test.timeout=0"}
	if testing.Short() {
		args = append(args, "-test.short")
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), mark+"="+t.Name())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for l := range strings.Lines(string(out)) {
		if strings.HasPrefix(l, "    ") {
			t.Log(strings.TrimSpace(l))
		}
	}
}
