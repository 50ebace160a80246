//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// peer is another backup program, as Debian has it.
type peer struct {
	name    string
	version string // the argument that has it tell its version
	env     []string
	init    []string // command lines; {repo} and {disk} are filled in
	run     []string
}

var peers = []peer{
	{"borg", "--version", []string{"BORG_PASSPHRASE=bench", "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes"},
		[]string{"borg", "init", "--encryption=repokey", "{repo}"},
		[]string{"borg", "create", "--compression", "zstd,1", "{repo}::full", "{disk}"}},
	{"restic", "version", []string{"RESTIC_PASSWORD=bench"},
		[]string{"restic", "init", "--quiet", "--repo", "{repo}"},
		[]string{"restic", "backup", "--quiet", "--no-cache", "--repo", "{repo}", "{disk}"}},
}

// leave notes that a peer is left out.
func (b *bench) leave(name string) {
	if !slices.Contains(b.absent, name) {
		b.absent = append(b.absent, name)
		b.say("%s is not installed, and left out", name)
	}
}

// peers measures full backups by other programs into new repositories.
func (b *bench) peers(ctx context.Context) error {
	for _, p := range peers {
		if _, err := exec.LookPath(p.name); err != nil {
			b.leave(p.name)
			continue
		}
		repo := filepath.Join(b.work, p.name)
		do := func(line []string) error {
			cmd := exec.CommandContext(ctx, line[0])
			for _, a := range line[1:] {
				cmd.Args = append(cmd.Args, strings.NewReplacer("{repo}", repo, "{disk}", b.disk()).Replace(a))
			}
			// Nothing of it stays in the home directory.
			cmd.Env = append(os.Environ(), append(p.env, "BORG_BASE_DIR="+b.work, "XDG_CACHE_HOME="+b.work)...)
			if out, err := cmd.CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, out)
			}
			return nil
		}
		if err := do(p.init); err != nil {
			return err
		}
		err := b.measure([]kind{{p.name, b.disk(), func() error { return do(p.run) }, func() error { return b.stored(p.name, repo) }}})
		if err != nil {
			return err
		}
		if err := os.RemoveAll(repo); err != nil {
			return err
		}
	}
	return nil
}
