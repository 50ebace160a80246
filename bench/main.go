//go:build linux

// Bench measures Holdfast against qemu-img and against a guest on a local disk,
// in one run on one machine, and writes bench/results.md. Run it with
// "make bench"; QUICK=1 takes about two minutes and writes no file, CLEAN=1
// removes the data.
//
// What is compared, on a disk that holds a copy of this machine's /usr:
//
//	copy        qemu-img convert raw to raw: what everything is a multiple of
//	backup      a full backup of the same file into a new repository
//	unchanged   the second backup of the same file
//	restore     that restore point into a raw file
//	S3          a full backup into an S3 server on this machine, and into one
//	            that answers every request 50 ms later
//	first read  from the command "recover" to the guest's first read, with
//	            disks of two sizes
//	boot        from the guest's start to its login prompt: from the backup,
//	            and from a local raw disk
//
// A timed copy, backup or restore ends when its target's filesystem is synced.
// The kinds alternate, so that a slow minute of the machine hurts all of them.
// The source is in the page cache, as far as it fits.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"holdfast/test/cli"
	"holdfast/test/lab"
)

func main() {
	bin := flag.String("holdfast", "bin/holdfast", "the program")
	data := flag.String("data", "bench/data", "directory for the data, up to 40 GB")
	out := flag.String("out", "bench/results.md", "where the results go")
	quick := flag.Bool("quick", false, "a small disk and one run; prints only")
	clean := flag.Bool("clean", false, "remove the data and do nothing else")
	runs := flag.Int("runs", 3, "how often everything is measured")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *bin, *data, *out, *quick, *clean, *runs); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, bin, data, out string, quick, clean bool, runs int) (err error) {
	if data, err = filepath.Abs(data); err != nil {
		return err
	}
	if clean {
		return os.RemoveAll(data)
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	b := &bench{bin: bin, data: data, runs: runs, size: 10 << 30, began: time.Now(), times: map[string][]time.Duration{}, sizes: map[string]int64{}}
	if quick {
		b.runs, b.size = 1, 2<<30
	}
	defer func() { err = errors.Join(err, b.clean()) }()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	for i := range b.runs {
		b.say("run %d of %d: disks", i+1, b.runs)
		if err := b.disks(ctx, i); err != nil {
			return err
		}
		if err := b.images(ctx); err != nil {
			return err
		}
	}
	if err := b.s3(ctx); err != nil {
		return err
	}
	if err := b.guests(ctx); err != nil {
		return err
	}
	report := b.report()
	fmt.Print("\n", report)
	if quick {
		return nil
	}
	return os.WriteFile(out, []byte(report), 0o644)
}

// bench is one run of everything.
type bench struct {
	bin, data string
	runs      int
	size      int64 // of the disk, bytes
	began     time.Time

	used   int64 // bytes of the disk that hold data
	times  map[string][]time.Duration
	rss    []int64          // peak memory of each full backup, bytes
	sizes  map[string]int64 // bytes stored by full backups
	absent []string         // peers that are not installed
	work   string           // scratch, on the same filesystem as the data
	store  string           // the guests' storage
	keep   []*lab.Guest
	tools  []*cli.Tool
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%6.0f s  %s\n", time.Since(b.began).Seconds(), fmt.Sprintf(format, args...))
}

// source is the folder host with the disk.
func (b *bench) source() string { return filepath.Join(b.data, fmt.Sprintf("vms-%d", b.size>>30)) }
func (b *bench) disk() string   { return filepath.Join(b.source(), "usr.raw") }

// prepare makes the disk once.
func (b *bench) prepare(ctx context.Context) error {
	if err := os.MkdirAll(b.source(), 0o755); err != nil {
		return err
	}
	b.work = filepath.Join(b.data, "work")
	if err := os.RemoveAll(b.work); err != nil {
		return err
	}
	if err := os.Mkdir(b.work, 0o755); err != nil {
		return err
	}
	if _, err := os.Stat(b.disk()); err != nil {
		b.say("making a disk of %d GiB from /usr, once", b.size>>30)
		if err := b.makeDisk(ctx); err != nil {
			return err
		}
	}
	fi, err := os.Stat(b.disk())
	if err != nil {
		return err
	}
	b.used = fi.Sys().(*syscall.Stat_t).Blocks * 512
	return nil
}

// makeDisk fills an ext4 with directories of /usr, up to three quarters.
func (b *bench) makeDisk(ctx context.Context) error {
	tree := filepath.Join(b.work, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	dirs, err := pick("/usr", b.size*6/10)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		to := filepath.Join(tree, dir)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if err := command(ctx, "cp", "-a", dir, to); err != nil {
			return err
		}
	}
	tmp := b.disk() + ".new"
	f, err := os.Create(tmp)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(b.size), f.Close()); err != nil {
		return err
	}
	if err := command(ctx, "mke2fs", "-q", "-t", "ext4", "-F", "-d", tree, "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", tmp); err != nil {
		return err
	}
	if err := os.RemoveAll(tree); err != nil {
		return err
	}
	return os.Rename(tmp, b.disk())
}

// tool makes a Holdfast with a repository of its own.
func (b *bench) tool(ctx context.Context, dir string) (*cli.Tool, error) {
	t := &cli.Tool{Bin: b.bin, Repo: filepath.Join(dir, "repo"), State: filepath.Join(dir, "state"), Passphrase: "bench"}
	b.tools = append(b.tools, t)
	return t, t.Run(ctx, "init").Err()
}

// disks measures copy, backup, unchanged and restore once.
func (b *bench) disks(ctx context.Context, run int) error {
	dir := filepath.Join(b.work, "disks")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	tool, err := b.tool(ctx, dir)
	if err != nil {
		return err
	}
	small := &cli.Tool{Bin: b.bin, Repo: filepath.Join(dir, "small"), State: filepath.Join(dir, "small-state"), Passphrase: "bench"}
	if err := small.Run(ctx, "init").Err(); err != nil {
		return err
	}
	copied := filepath.Join(dir, "copy.raw")
	restored := filepath.Join(dir, "restored")
	kinds := []struct {
		name  string
		do    func() error
		after func() error
	}{
		{"cat", func() error { return warm(b.disk()) }, nil},
		{"copy", func() error {
			return command(ctx, "qemu-img", "convert", "-f", "raw", "-O", "raw", b.disk(), copied)
		}, func() error { return os.Remove(copied) }},
		{"backup", func() error {
			r := tool.Run(ctx, "backup", b.source())
			b.rss = append(b.rss, r.MaxRSS)
			return r.Err()
		}, func() error {
			b.sizes["backup"], err = usage(tool.Repo)
			return err
		}},
		{"backup, small", func() error { return small.Run(ctx, "backup", b.source(), "--compression", "small").Err() }, func() error {
			b.sizes["backup, small"], err = usage(small.Repo)
			return errors.Join(err, os.RemoveAll(small.Repo))
		}},
		{"unchanged", func() error { return tool.Run(ctx, "backup", b.source()).Err() }, nil},
		{"restore", func() error {
			return tool.Run(ctx, "restore", "usr@latest", "--to", restored, "--format", "raw").Err()
		}, func() error {
			if run > 0 {
				return nil
			}
			return same(ctx, b.disk(), restored)
		}},
	}
	for _, k := range kinds {
		if err := b.calm(b.disk()); err != nil {
			return err
		}
		from := time.Now()
		if err := k.do(); err != nil {
			return err
		}
		if err := syncAll(b.work); err != nil {
			return err
		}
		b.add(k.name, time.Since(from))
		if k.after != nil {
			if err := k.after(); err != nil {
				return err
			}
		}
	}
	if err := b.publish(ctx, tool, dir); err != nil {
		return err
	}
	for _, p := range peers {
		if err := b.peer(ctx, p, run); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// clean removes everything but the disk.
func (b *bench) clean() error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var errs []error
	for _, t := range b.tools {
		pids, err := t.Processes()
		errs = append(errs, err)
		for _, pid := range pids {
			if p, err := os.FindProcess(pid); err == nil {
				errs = append(errs, p.Kill())
			}
		}
	}
	for _, g := range b.keep {
		errs = append(errs, g.Remove(ctx))
	}
	for _, dir := range []string{b.work, b.store} {
		if dir != "" {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

// three returns the least, the median and the greatest.
func three(d []time.Duration) (lo, mid, hi time.Duration) {
	if len(d) == 0 {
		return 0, 0, 0
	}
	s := slices.Sorted(slices.Values(d))
	return s[0], s[len(s)/2], s[len(s)-1]
}
