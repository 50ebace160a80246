//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/nbd"
	"holdfast/test/cli"
)

const (
	randomReads = 40_000
	readSize    = 4096
	readDepth   = 16
)

// publish measures random reads of 4 KiB, 16 at a time, at places that hold
// data: of the disk published from the repository, of the raw disk and of the
// zstd qcow2 by qemu-nbd. What is read is in the page cache.
func (b *bench) publish(ctx context.Context, tool *cli.Tool, dir string) error {
	qcow2, err := b.image(ctx, "qcow2")
	if err != nil {
		return err
	}
	sock := filepath.Join(dir, "nbd.sock")
	for _, s := range []struct {
		name, export, warm string
		args               []string
	}{
		{"random reads, qemu-nbd raw", "", b.disk(), []string{"qemu-nbd", "-r", "-f", "raw", "-k", sock, "-t", b.disk()}},
		{"random reads, qemu-nbd qcow2", "", qcow2, []string{"qemu-nbd", "-r", "-f", "qcow2", "-k", sock, "-t", qcow2}},
		{"random reads, holdfast", filepath.Base(b.disk()), "", []string{b.bin, "publish", "usr@latest", "--nbd", "unix:" + sock, "-q"}},
	} {
		if s.warm != "" {
			if err := warm(s.warm); err != nil {
				return err
			}
		} else if err := warmAll(filepath.Join(tool.Repo, "packs")); err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, s.args[0], s.args[1:]...)
		cmd.Env, cmd.Stderr = tool.Env(), os.Stderr
		if err := cmd.Start(); err != nil {
			return err
		}
		took, err := b.randomly(ctx, nbd.Address{Network: "unix", Addr: sock, Export: s.export})
		stop := errors.Join(cmd.Process.Signal(os.Interrupt), ignoreExit(cmd.Wait()))
		if err := errors.Join(err, stop); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		b.add(s.name, took)
		if err := os.Remove(sock); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// ignoreExit leaves out that a server was ended.
func ignoreExit(err error) error {
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return nil
	}
	return err
}

// randomly reads from a server, once it answers.
func (b *bench) randomly(ctx context.Context, a nbd.Address) (time.Duration, error) {
	var c *nbd.Client
	var err error
	for range 200 {
		if c, err = nbd.Dial(ctx, a, nbd.DialOptions{Conns: 4, InFlight: readDepth}); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		return 0, err
	}
	var extents [][2]int64
	var data int64
	for e, err := range c.Extents(ctx, 0, c.Size()) {
		if err != nil {
			return 0, errors.Join(err, c.Close())
		}
		if !e.Zero && e.Len >= 64<<10 {
			extents = append(extents, [2]int64{data, e.Off})
			data += e.Len &^ (readSize - 1)
		}
	}
	rng := rand.New(rand.NewPCG(1, 2)) // the same places for all
	offs := make([]int64, randomReads)
	for i := range offs {
		at := rng.Int64N(data/readSize) * readSize
		lo, hi := 0, len(extents)
		for hi-lo > 1 {
			if mid := (lo + hi) / 2; extents[mid][0] <= at {
				lo = mid
			} else {
				hi = mid
			}
		}
		offs[i] = extents[lo][1] + at - extents[lo][0]
	}
	from := time.Now()
	g, gctx := errgroup.WithContext(ctx)
	for w := range readDepth {
		g.Go(func() error {
			buf := make([]byte, readSize)
			for i := w; i < len(offs); i += readDepth {
				if err := c.ReadAt(gctx, buf, offs[i]); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err = g.Wait()
	took := time.Since(from)
	return took, errors.Join(err, c.Close())
}

// warmAll reads all files below a directory.
func warmAll(dir string) error {
	return filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		return warm(path)
	})
}
