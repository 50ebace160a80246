//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"holdfast/test/cli"
)

// synthesize makes a repository once: the packs of chunks are holes, all else
// is real. It returns the program with an empty state.
func (b *bench) synthesize(ctx context.Context, name string, vms, points int) (*cli.Tool, error) {
	repo := filepath.Join(b.data, name)
	if _, err := os.Stat(repo); err != nil {
		b.say("making %s, once", repo)
		tmp := repo + ".new"
		if err := os.RemoveAll(tmp); err != nil {
			return nil, err
		}
		_, err := b.test(ctx, "TestSynthesize", "HOLDFAST_SYNTH="+tmp,
			fmt.Sprintf("HOLDFAST_SYNTH_VMS=%d", vms), fmt.Sprintf("HOLDFAST_SYNTH_POINTS=%d", points))
		if err != nil {
			return nil, err
		}
		if err := os.Rename(tmp, repo); err != nil {
			return nil, err
		}
	}
	t := &cli.Tool{Bin: b.bin, Repo: repo, State: filepath.Join(b.work, name), Passphrase: passphrase}
	return t, os.RemoveAll(t.State)
}

// test runs one of the tests of internal/repo, and returns what it writes.
func (b *bench) test(ctx context.Context, name string, env ...string) (string, error) {
	cmd := exec.CommandContext(ctx, b.repoTest, "-test.run", "^"+name+"$", "-test.timeout", "0")
	cmd.Env = append(append(os.Environ(), "TMPDIR="+b.work), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s: %s: %w: %s", b.repoTest, name, err, out)
	}
	return string(out), nil
}

// opens runs a command on a repository, and notes its time and memory.
func (b *bench) opens(ctx context.Context, t *cli.Tool, key, command string) error {
	if err := syncAll(b.work); err != nil {
		return err
	}
	r := t.Run(ctx, command, "--json")
	b.add(key, r.Took.Seconds())
	b.add(key+", memory", float64(r.MaxRSS)/1e6)
	return r.Err()
}

// synthetic measures opening and pruning on a repository of ten million chunks
// and a thousand restore points.
func (b *bench) synthetic(ctx context.Context) error {
	t, err := b.synthesize(ctx, "synthetic", 10, 100)
	if err != nil {
		return err
	}
	return errors.Join(b.opens(ctx, t, "first opening", "points"), b.opens(ctx, t, "opening", "points"), b.opens(ctx, t, "prune", "prune"))
}

// sizes are those that growth compares.
var sizes = []struct {
	name string
	vms  int // of 524,288 chunks each
}{{"1 million", 2}, {"10 million", 19}, {"100 million", 191}}

// growing are the rows of growth: ratios are against a tenth of the chunks.
func growing() (rows []row) {
	of := sizes[0].name
	for i, s := range sizes {
		aim := func(most float64) float64 {
			if i < len(sizes)-1 {
				return 0
			}
			return most
		}
		rows = append(rows,
			row{what: s.name + " chunks: opening for the first time", key: s.name + ", first"},
			row{what: s.name + " chunks: memory of the first opening", key: s.name + ", first, memory", unit: "MB", most: aim(300)},
			row{what: s.name + " chunks: opening", key: s.name, of: of, most: aim(2)},
			row{what: s.name + " chunks: memory of opening", key: s.name + ", memory", unit: "MB", most: aim(300)},
			row{what: s.name + " chunks: finding one", key: s.name + ", found", unit: "µs", of: of + ", found", most: aim(2)},
			row{what: s.name + " chunks: finding that one is not there", key: s.name + ", absent", unit: "µs", of: of + ", absent", most: aim(2)})
		of = s.name
	}
	return rows
}

// growth measures opening repositories of several sizes, and finding chunks.
func (b *bench) growth(ctx context.Context) error {
	for i, s := range sizes {
		if b.quick && i > 0 {
			break
		}
		t, err := b.synthesize(ctx, fmt.Sprintf("growth-%d", s.vms), s.vms, 1)
		if err != nil {
			return err
		}
		if err := b.opens(ctx, t, s.name+", first", "points"); err != nil {
			return err
		}
		for range b.runs {
			if err := b.opens(ctx, t, s.name, "points"); err != nil {
				return err
			}
			if err := warm(t.State); err != nil {
				return err
			}
			out, err := b.test(ctx, "TestFind", "HOLDFAST_FIND="+t.Repo, "HOLDFAST_FIND_CACHE="+filepath.Join(t.State, "cache"))
			if err != nil {
				return err
			}
			var found, absent float64
			if _, err := fmt.Sscanf(out, "found %f absent %f", &found, &absent); err != nil {
				return fmt.Errorf("%q: %w", out, err)
			}
			b.add(s.name+", found", found)
			b.add(s.name+", absent", absent)
		}
		if err := os.RemoveAll(t.State); err != nil {
			return err
		}
	}
	return nil
}
