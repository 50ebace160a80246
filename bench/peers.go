//go:build linux

package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// peer is another backup program, as Debian has it. One that is not installed
// is left out.
type peer struct {
	name string
	env  []string
	init []string // command lines; {repo} and {disk} are filled in
	run  []string
}

var peers = []peer{
	{"borg", []string{"BORG_PASSPHRASE=bench", "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes"},
		[]string{"borg", "init", "--encryption=repokey", "{repo}"},
		[]string{"borg", "create", "--compression", "zstd,1", "{repo}::full", "{disk}"}},
	{"restic", []string{"RESTIC_PASSWORD=bench"},
		[]string{"restic", "init", "--quiet", "--repo", "{repo}"},
		[]string{"restic", "backup", "--quiet", "--no-cache", "--repo", "{repo}", "{disk}"}},
}

// peer backs the disk up by another program into a new repository.
func (b *bench) peer(ctx context.Context, p peer, run int) (err error) {
	if _, err := exec.LookPath(p.name); err != nil {
		if run == 0 {
			b.say("%s is not installed, and left out", p.name)
			b.absent = append(b.absent, p.name)
		}
		return nil
	}
	repo := filepath.Join(b.work, p.name)
	defer func() { err = errors.Join(err, os.RemoveAll(repo)) }()
	do := func(line []string) error {
		args := make([]string, len(line))
		for i, a := range line {
			args[i] = strings.NewReplacer("{repo}", repo, "{disk}", b.disk()).Replace(a)
		}
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		// Nothing of it stays in the home directory.
		cmd.Env = append(os.Environ(), append(p.env, "BORG_BASE_DIR="+b.work, "XDG_CACHE_HOME="+b.work)...)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return errors.Join(err, errors.New(string(out)))
		}
		return nil
	}
	if err := do(p.init); err != nil {
		return err
	}
	if err := b.calm(b.disk()); err != nil {
		return err
	}
	from := time.Now()
	if err := errors.Join(do(p.run), syncAll(b.work)); err != nil {
		return err
	}
	b.add(p.name, time.Since(from))
	n, err := usage(repo)
	b.sizes[p.name] = n
	return err
}

// calm brings the machine into the state in which everything is measured.
func (b *bench) calm(read string) error {
	return errors.Join(level(filepath.Join(b.work, "fill")), warm(read), syncAll(b.work))
}
