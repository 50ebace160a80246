package main

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// The program is killed while it fills and empties a tier, at moments that come
// from a seed that is printed. What it was doing goes on when it is called
// again, and nothing is lost, with the repository's own store and without.
func TestTierKilled(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIPPED: takes seconds")
	}
	seed := rand.Uint64()
	if n, err := strconv.ParseUint(os.Getenv("HOLDFAST_SEED"), 10, 64); err == nil {
		seed = n
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	s := newScript(t)
	must := func(args ...string) {
		t.Helper()
		if out, err := s.program(s.env, args).CombinedOutput(); err != nil {
			t.Fatalf("holdfast %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	if err := os.Mkdir(filepath.Join(s.dir, "vms"), 0o755); err != nil {
		t.Fatal(err)
	}
	image := make([]byte, 48<<20)
	rand.NewChaCha8([32]byte{1}).Read(image)
	if err := os.WriteFile(filepath.Join(s.dir, "vms", "web.raw"), image, 0o600); err != nil {
		t.Fatal(err)
	}
	must("init")
	must("backup", "vms", "--quiet")
	must("tier", "add", "far", "far", "--older-than", "0")
	killed := 0
	rounds := 6
	if os.Getenv("HOLDFAST_SOAK") != "" {
		rounds = 300
	}
	for range rounds {
		args := []string{"tier", "move", "far"}
		if rng.IntN(2) == 0 {
			args = append(args, "--back")
		}
		cmd := s.program(s.env, args)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		kill := time.AfterFunc(time.Duration(150+rng.IntN(500))*time.Millisecond, func() { cmd.Process.Kill() })
		if cmd.Wait() != nil {
			killed++
		}
		kill.Stop()
	}
	t.Logf("%d of %d killed", killed, rounds)
	must("tier", "move", "far")
	must("check", "--read-data")
	if err := os.Rename(filepath.Join(s.dir, "repo"), filepath.Join(s.dir, "lost")); err != nil {
		t.Fatal(err)
	}
	must("restore", "web@latest", "--to", "out", "--repo", "far")
	if err := s.builtin([]string{"same", "vms/web.raw", "out/web.raw"}); err != nil {
		t.Fatal(err)
	}
}
