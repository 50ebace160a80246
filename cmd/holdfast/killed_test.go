package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo"
)

// Backups, a prune, a forget, a check and copies in both directions run side by
// side on two repositories in directories, and most are killed with kill -9 at
// random moments, which the seed says. After each round every point that was
// reported as made and not forgotten is there, bit by bit, whatever else is
// there is a whole point, and check finds nothing wrong.
//
// HOLDFAST_SEED repeats the moments; HOLDFAST_SOAK=N goes on for N rounds.
func TestKilledAtAnyMoment(t *testing.T) {
	t.Parallel()
	rounds := 2
	if testing.Short() {
		rounds = 1
	}
	if n, err := strconv.Atoi(os.Getenv("HOLDFAST_SOAK")); err == nil && n > 0 {
		rounds = n
	}
	seed := rand.Uint64()
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	k := &killing{script: newScript(t), t: t, rng: rand.New(rand.NewPCG(seed, 1)), images: map[string][]byte{},
		known: map[[32]byte]bool{}, made: [2]map[string][32]byte{{}, {}}, forgotten: [2]map[string]bool{{}, {}}}
	k.env["HOLDFAST_TO_PASSPHRASE"] = k.env["HOLDFAST_PASSPHRASE"]
	if err := os.Mkdir(filepath.Join(k.dir, "vms"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, vm := range []string{"web", "db", "own"} {
		k.images[vm] = make([]byte, 3<<20)
	}
	for _, side := range []int{0, 1} {
		if _, err := k.holdfast(side, 0, "init"); err != nil {
			t.Fatal(err)
		}
	}
	for range rounds {
		k.longest = max(k.longest, time.Second)
		k.round()
		if t.Failed() {
			return
		}
	}
	for side := range 2 {
		if _, err := k.holdfast(side, 0, "check", "--read-data"); err != nil {
			t.Error(err)
		}
		if _, err := k.holdfast(side, 0, "check", "--read-data", "--keyless"); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d rounds, %d processes killed, %d points made and %d copied", rounds, k.kills, len(k.made[0]), len(k.made[1]))
}

type killing struct {
	*script
	t      *testing.T
	rng    *rand.Rand
	images map[string][]byte

	mu        sync.Mutex // guards all below
	kills     int
	longest   time.Duration          // that a process lived in the round before
	known     map[[32]byte]bool      // what images ever were
	made      [2]map[string][32]byte // points reported as made, by repository
	forgotten [2]map[string]bool     // or tried to
}

func (k *killing) repo(side int) string {
	return filepath.Join(k.dir, []string{"repo", "second"}[side])
}

// holdfast runs the program, and kills it after a while unless that is 0. It
// gives what it said on stdout, whole or not.
func (k *killing) holdfast(side int, after time.Duration, args ...string) ([]byte, error) {
	env := map[string]string{}
	for name, v := range k.env {
		env[name] = v
	}
	env["HOLDFAST_REPO"] = k.repo(side)
	env["HOLDFAST_STATE"] = filepath.Join(k.dir, "state")
	cmd := k.program(env, args)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	if after > 0 {
		wg.Go(func() {
			select {
			case <-time.After(after):
				if cmd.Process.Kill() == nil {
					k.mu.Lock()
					k.kills++
					k.mu.Unlock()
				}
			case <-ctx.Done():
			}
		})
	}
	err := cmd.Wait()
	cancel()
	wg.Wait()
	k.mu.Lock()
	k.longest = max(k.longest, time.Since(began))
	k.mu.Unlock()
	if _, ok := err.(*exec.ExitError); ok && cmd.ProcessState.ExitCode() < 0 && after > 0 {
		return stdout.Bytes(), errKilled
	} else if err != nil {
		err = fmt.Errorf("holdfast %s: %w: %s%s", strings.Join(args, " "), err, &stderr, &stdout)
	}
	return stdout.Bytes(), err
}

var errKilled = fmt.Errorf("killed")

// result is what backup and copy report of a point.
type result struct {
	VM    string `json:"vm"`
	Point string `json:"point"`
	State string `json:"state"`
}

// round changes the images, and lets everything run side by side.
func (k *killing) round() {
	hashes := map[string][32]byte{}
	for vm, p := range k.images {
		for range 1 + k.rng.IntN(6) {
			c := k.rng.IntN(len(p) / repo.ChunkSize)
			for i := range 4096 {
				p[c*repo.ChunkSize+i] = byte(k.rng.Uint32())
			}
		}
		if err := os.WriteFile(filepath.Join(k.dir, "vms", vm+".raw"), p, 0o600); err != nil {
			k.t.Fatal(err)
		}
		hashes[vm] = sha256.Sum256(p)
		k.known[hashes[vm]] = true
	}
	var wg sync.WaitGroup
	run := func(side int, then func(out []byte, err error), args ...string) {
		after := time.Duration(0)
		if k.rng.IntN(4) > 0 {
			after = time.Duration(k.rng.Int64N(int64(k.longest) * 5 / 4))
		}
		wg.Go(func() {
			out, err := k.holdfast(side, after, args...)
			then(out, err)
		})
	}
	must := func(_ []byte, err error) {
		if err != nil && err != errKilled {
			k.t.Error(err)
		}
	}
	for vm := range k.images {
		run(0, func(out []byte, err error) {
			for _, r := range results(out) {
				if r.Point != "" {
					k.mu.Lock()
					k.made[0][r.Point] = hashes[r.VM]
					k.mu.Unlock()
				}
			}
			if err != nil && strings.Contains(err.Error(), repo.ErrPruned.Error()) {
				return
			}
			must(nil, err)
		}, "backup", "vms", vm, "--json")
	}
	for side := range 2 {
		run(side, func(out []byte, err error) {
			k.mu.Lock()
			for _, r := range results(out) {
				if r.State == "copied" && k.made[side][r.Point] != ([32]byte{}) {
					k.made[1-side][r.Point] = k.made[side][r.Point]
				}
			}
			k.mu.Unlock()
			if err != nil && (strings.Contains(err.Error(), repo.ErrPruned.Error()) || strings.Contains(err.Error(), repo.ErrNotExist.Error())) {
				return
			}
			must(nil, err)
		}, "copy", "--to", k.repo(1-side), "--json")
		run(side, must, "prune")
		run(side, must, "check")
		if id := k.some(side); id != "" {
			run(side, must, "forget", id, "--allow-last")
		}
	}
	wg.Wait()
	for side := range 2 {
		k.proves(side)
	}
}

// results reads what was reported; a process that was killed may have said half
// of it.
func results(out []byte) (all []result) {
	if json.Unmarshal(out, &all) != nil {
		return nil
	}
	return all
}

// some picks a point to be forgotten.
func (k *killing) some(side int) string {
	for id := range k.made[side] {
		if !k.forgotten[side][id] {
			k.forgotten[side][id] = true
			return id
		}
	}
	return ""
}

// proves restores everything.
func (k *killing) proves(side int) {
	ctx := context.Background()
	store, err := blob.OpenDir(k.repo(side))
	if err != nil {
		k.t.Fatal(err)
	}
	r, err := repo.Open(ctx, store, []byte(k.env["HOLDFAST_PASSPHRASE"]), repo.Options{Cache: filepath.Join(k.dir, fmt.Sprint("cache", side))})
	if err != nil {
		k.t.Error(err)
		return
	}
	defer r.Close()
	points, err := r.Points(ctx)
	if err != nil {
		k.t.Fatal(err)
	}
	there := map[string]bool{}
	for _, p := range points {
		there[string(p.ID)] = true
		d, err := r.OpenDisk(ctx, p.Disks[0])
		if err != nil {
			k.t.Error(err)
			continue
		}
		got := make([]byte, d.Size())
		if err := d.ReadAt(ctx, got, 0); err != nil {
			k.t.Error(err)
			continue
		}
		sum := sha256.Sum256(got)
		if want, ok := k.made[side][string(p.ID)]; ok && sum != want || !k.known[sum] {
			k.t.Errorf("%s: point %s of %s is not what was backed up", k.repo(side), p.ID, p.VM)
		}
	}
	for id := range k.made[side] {
		if !there[id] && !k.forgotten[side][id] {
			k.t.Errorf("%s: point %s was reported as made, and is gone", k.repo(side), id)
		}
	}
	if c, err := r.Check(ctx, repo.CheckOptions{ReadData: true}); err != nil || len(c.Problems) > 0 {
		k.t.Errorf("%s: check: %+v, %v", k.repo(side), c, err)
	}
}
