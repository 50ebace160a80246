//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"holdfast/test/cli"
)

// synthetic measures opening and pruning on a repository of ten million chunks
// and a thousand restore points: the packs of chunks are holes, all else is
// real. It is made once.
func (b *bench) synthetic(ctx context.Context) error {
	repo := filepath.Join(b.data, "synthetic")
	if _, err := os.Stat(repo); err != nil {
		b.say("making a repository of ten million chunks, once")
		tmp := repo + ".new"
		if err := os.RemoveAll(tmp); err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, b.repoTest, "-test.run", "^TestSynthesize$", "-test.timeout", "0")
		cmd.Env = append(os.Environ(), "HOLDFAST_SYNTH="+tmp)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", b.repoTest, err, out)
		}
		if err := os.Rename(tmp, repo); err != nil {
			return err
		}
	}
	tool := &cli.Tool{Bin: b.bin, Repo: repo, State: filepath.Join(b.work, "synthetic"), Passphrase: "bench"}
	if err := os.RemoveAll(tool.State); err != nil {
		return err
	}
	for _, k := range []struct{ name, command string }{{"first opening", "points"}, {"opening", "points"}, {"prune", "prune"}} {
		if err := syncAll(b.work); err != nil {
			return err
		}
		r := tool.Run(ctx, k.command, "--json")
		if err := r.Err(); err != nil {
			return err
		}
		b.add(k.name, r.Took)
		b.peak[k.name] = max(b.peak[k.name], r.MaxRSS)
		b.say("%s: %.1f s, %d MB", k.name, r.Took.Round(time.Millisecond).Seconds(), r.MaxRSS/1e6)
	}
	return nil
}
