//go:build linux

// Bench measures Holdfast beside qemu-img, qemu-nbd, borg, restic and a guest on
// a local disk, in one run on one machine, and writes bench/results.md and
// bench/results.svg. Run it with "make bench": some 25 minutes on two cores, and
// ten more when its data is made, which stays. QUICK=1 takes two minutes and
// writes no file, ONLY=part measures one part, CLEAN=1 removes the data.
//
// The parts, on a disk that holds a copy of this machine's /usr, databases and
// logs:
//
//	disks       reading the file, copying it, full backups, the second one, restore, check
//	peers       full backups by borg and restic; one round
//	extremes    a disk of zeros and one of random bytes
//	publish     reads over NBD: random ones, whose data is in the server's
//	            caches or is not, and one after the other
//	images      conversions of disk images
//	synthetic   opening and pruning a repository of ten million chunks and a
//	            thousand restore points
//	s3          full backups into an S3 server on this machine, and into one
//	            that answers every request 50 ms later
//	changes     increments by a change map, and restores from a spinning disk
//	            before and after many; the disk is simulated, by adding up time
//	growth      opening repositories of 1, 10 and 100 million chunks, and
//	            finding chunks in them; one round
//	guests      from the command "recover" to the guest's first read, with disks
//	            of two sizes; from the guest's start to its login prompt
//
// A timed copy, backup or restore ends when its target's filesystem is synced.
// The kinds alternate, so that a slow minute of the machine hurts all of them.
// What is read is in the page cache, as far as it fits. Peers that are not
// installed are left out, and the results say so.
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
	b := &bench{began: time.Now(), figures: map[string][]float64{}}
	flag.StringVar(&b.bin, "holdfast", "bin/holdfast", "the program")
	flag.StringVar(&b.data, "data", "bench/data", "directory for the data, up to 50 GB")
	flag.StringVar(&b.repoTest, "repotest", "bin/lab/repo.test", "the tests of internal/repo, which make the synthetic repositories")
	flag.StringVar(&b.only, "only", "", "measure only that `part`; prints only")
	flag.BoolVar(&b.quick, "quick", false, "a small disk and one round; prints only")
	flag.IntVar(&b.runs, "runs", 3, "how often everything is measured")
	out := flag.String("out", "bench/results.md", "where the results go; the plot beside it")
	clean := flag.Bool("clean", false, "remove the data and do nothing else")
	changes := flag.String("changes", "", "do the work of the part \"changes\" on this `disk`; started by that part")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	switch {
	case *clean:
		err = os.RemoveAll(b.data)
	case *changes != "":
		err = change(ctx, *changes, b.runs)
	default:
		err = b.run(ctx, *out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// bench is one run of everything.
type bench struct {
	bin, data string
	repoTest  string // tests of internal/repo
	only      string // part to be measured; "" for all
	quick     bool
	runs      int
	size      int64 // of the disk, bytes
	began     time.Time

	used    int64                // bytes of the disk that hold data
	figures map[string][]float64 // what was measured, by the keys of rows; in their units
	absent  []string             // peers that are not installed
	work    string               // scratch, on the same filesystem as the data
	store   string               // the guests' storage
	full    *cli.Tool            // its repository has a point of the disk, which it needs not make
	keep    []*lab.Guest
	tools   []*cli.Tool
}

// part is what can be measured alone.
type part struct {
	name string
	once bool // in one round, however many there are
	do   func(ctx context.Context) error
}

func (b *bench) run(ctx context.Context, out string) (err error) {
	for _, path := range []*string{&b.bin, &b.data, &b.repoTest} {
		if *path, err = filepath.Abs(*path); err != nil {
			return err
		}
	}
	b.size = 10 << 30
	if b.quick {
		b.runs, b.size = 1, 2<<30
	}
	parts := []part{
		{"disks", false, b.disks}, {"publish", false, b.publish}, {"extremes", false, b.extremes},
		{"images", false, b.images}, {"synthetic", false, b.synthetic},
		{"peers", true, b.peers}, {"s3", true, b.s3}, {"changes", true, b.changes}, {"growth", true, b.growth}, {"guests", true, b.guests},
	}
	if b.quick && b.only == "" { // the slowest for what it shows
		parts = slices.DeleteFunc(parts, func(p part) bool { return p.name == "synthetic" })
	}
	if b.only != "" {
		parts = slices.DeleteFunc(parts, func(p part) bool { return p.name != b.only })
		if len(parts) == 0 {
			return fmt.Errorf("there is no part %q", b.only)
		}
	}
	defer func() { err = errors.Join(err, b.clean()) }()
	if err := b.prepare(ctx); err != nil {
		return err
	}
	for i := range b.runs {
		for _, p := range parts {
			if p.once && i < b.runs-1 {
				continue
			}
			b.say("round %d of %d: %s", i+1, b.runs, p.name)
			if err := p.do(ctx); err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
		}
	}
	report := b.report(filepath.Base(plotFile(out)))
	fmt.Print("\n", report)
	if b.quick || b.only != "" {
		return nil
	}
	return errors.Join(os.WriteFile(out, []byte(report), 0o644), os.WriteFile(plotFile(out), b.plot(), 0o644))
}

func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%6.0f s  %s\n", time.Since(b.began).Seconds(), fmt.Sprintf(format, args...))
}

// add notes a figure, in its row's unit.
func (b *bench) add(key string, v float64) {
	b.figures[key] = append(b.figures[key], v)
	b.say("%s: %s", key, number(v))
}

// took notes how long something took.
func (b *bench) took(key string, from time.Time) { b.add(key, time.Since(from).Seconds()) }

// tool makes a Holdfast with a repository of its own.
func (b *bench) tool(ctx context.Context, dir string) (*cli.Tool, error) {
	t := &cli.Tool{Bin: b.bin, Repo: filepath.Join(dir, "repo"), State: filepath.Join(dir, "state"), Passphrase: passphrase}
	b.tools = append(b.tools, t)
	return t, t.Run(ctx, "init").Err()
}

const passphrase = "bench"

// point is a repository with one restore point of the disk.
func (b *bench) point(ctx context.Context) (*cli.Tool, error) {
	if b.full != nil {
		return b.full, nil
	}
	t, err := b.tool(ctx, filepath.Join(b.work, "point"))
	if err != nil {
		return nil, err
	}
	b.full = t
	return t, t.Run(ctx, "backup", b.source()).Err()
}

// calm brings the machine into the state in which everything is measured: what
// will be read is in the page cache, and nothing waits to be written.
func (b *bench) calm(read ...string) error {
	var errs []error
	if !b.quick {
		errs = append(errs, level(filepath.Join(b.work, "fill")))
	}
	for _, path := range read {
		errs = append(errs, warm(path))
	}
	return errors.Join(append(errs, syncAll(b.work))...)
}

// clean removes everything but the data.
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

// three returns the least, the median and the greatest; zeros for none.
func three(v []float64) (lo, mid, hi float64) {
	if len(v) == 0 {
		return 0, 0, 0
	}
	s := slices.Sorted(slices.Values(v))
	return s[0], s[len(s)/2], s[len(s)-1]
}
