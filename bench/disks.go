//go:build linux

package main

import (
	"context"
	"os"
	"path/filepath"
	"time"

	"holdfast/test/cli"
)

// kind is one of several that are measured in turn.
type kind struct {
	name  string // of its row
	read  string // what it reads
	do    func() error
	after func() error // not timed; may be nil
}

// measure takes the time of each kind up to its sync.
func (b *bench) measure(kinds []kind) error {
	for _, k := range kinds {
		if err := b.calm(k.read); err != nil {
			return err
		}
		from := time.Now()
		if err := k.do(); err != nil {
			return err
		}
		if err := syncAll(b.work); err != nil {
			return err
		}
		b.took(k.name, from)
		if k.after != nil {
			if err := k.after(); err != nil {
				return err
			}
		}
	}
	return nil
}

// job runs the program, and notes the peak of its memory.
func (b *bench) job(ctx context.Context, t *cli.Tool, name string, args ...string) error {
	r := t.Run(ctx, args...)
	b.add(name+", memory", float64(r.MaxRSS)/1e6)
	return r.Err()
}

// stored notes how much a repository holds.
func (b *bench) stored(name, repo string) error {
	n, err := usage(repo)
	b.add(name+", stored", gib(n))
	return err
}

// disks measures reading, copying, backup, restore and check.
func (b *bench) disks(ctx context.Context) error {
	dir := filepath.Join(b.work, "disks")
	defer os.RemoveAll(dir)
	fast, err := b.tool(ctx, filepath.Join(dir, "fast"))
	if err != nil {
		return err
	}
	small, err := b.tool(ctx, filepath.Join(dir, "small"))
	if err != nil {
		return err
	}
	copied := filepath.Join(dir, "copy.raw")
	restored := filepath.Join(dir, "restored")
	return b.measure([]kind{
		{"cat", b.disk(), func() error { return command(ctx, "sh", "-c", `cat "$0" >/dev/null`, b.disk()) }, nil},
		{"copy", b.disk(), func() error {
			return command(ctx, "qemu-img", "convert", "-f", "raw", "-O", "raw", b.disk(), copied)
		}, func() error { return os.Remove(copied) }},
		{"backup", b.disk(), func() error { return b.job(ctx, fast, "backup", "backup", b.source()) },
			func() error { return b.stored("backup", fast.Repo) }},
		{"small", b.disk(), func() error { return b.job(ctx, small, "small", "backup", b.source(), "--compression", "small") },
			func() error {
				if err := b.stored("small", small.Repo); err != nil {
					return err
				}
				return os.RemoveAll(small.Repo)
			}},
		{"unchanged", b.disk(), func() error { return fast.Run(ctx, "backup", b.source()).Err() }, nil},
		{"restore", fast.Repo, func() error {
			return b.job(ctx, fast, "restore", "restore", vm+"@latest", "--to", restored, "--format", "raw")
		}, func() error {
			if len(b.figures["restore"]) == 1 {
				if err := command(ctx, "cmp", b.disk(), filepath.Join(restored, filepath.Base(b.disk()))); err != nil {
					return err
				}
			}
			return os.RemoveAll(restored)
		}},
		{"check", fast.Repo, func() error { return b.job(ctx, fast, "check", "check", "--read-data") }, nil},
	})
}

// extremes measures copy and backup of zeros and of random bytes.
func (b *bench) extremes(ctx context.Context) error {
	for _, what := range []string{"zeros", "random"} {
		dir := filepath.Join(b.work, what)
		t, err := b.tool(ctx, dir)
		if err != nil {
			return err
		}
		source := b.extreme(what)
		err = b.measure([]kind{
			{"copy, " + what, source, func() error {
				return command(ctx, "qemu-img", "convert", "-f", "raw", "-O", "raw", filepath.Join(source, vm+".raw"), filepath.Join(dir, "copy.raw"))
			}, func() error { return os.Remove(filepath.Join(dir, "copy.raw")) }},
			{"backup, " + what, source, func() error { return t.Run(ctx, "backup", source).Err() }, nil},
		})
		if err != nil {
			return err
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}
