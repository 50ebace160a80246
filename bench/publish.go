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
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/disk"
	"holdfast/internal/nbd"
)

const (
	randomReads = 40_000 // of readSize, depth at a time
	readSize    = 4 << 10
	streamSize  = 256 << 10 // of sequential reads, streams at a time
	streamed    = 1 << 30   // bytes read so
	workingSet  = 64 << 20  // where warm reads are, bytes
	depth       = 16
	streams     = 4
)

// publish measures reads over one NBD connection: of the disk published from
// the repository, and by qemu-nbd of the raw file and of a qcow2 with zstd. Each
// server is new, and the files that it reads are in the page cache.
//
//	cold    random reads over all of the disk's data
//	stream  one after the other, from the disk's beginning
//	warm    random reads in a part of the disk that was read so before
func (b *bench) publish(ctx context.Context) error {
	t, err := b.point(ctx)
	if err != nil {
		return err
	}
	qcow2, err := b.image(ctx, "qcow2")
	if err != nil {
		return err
	}
	sock := filepath.Join(b.work, "nbd.sock")
	var where data // of the first, which knows zeros best, for all
	for _, s := range []struct {
		name, export, read string
		args               []string
	}{
		{"holdfast", filepath.Base(b.disk()), filepath.Join(t.Repo, "packs"), []string{b.bin, "publish", vm + "@latest", "--nbd", "unix:" + sock, "-q"}},
		{"raw", "", b.disk(), []string{"qemu-nbd", "-r", "-f", "raw", "-k", sock, "-t", b.disk()}},
		{"qcow2", "", qcow2, []string{"qemu-nbd", "-r", "-f", "qcow2", "-k", sock, "-t", qcow2}},
	} {
		if err := b.calm(s.read); err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, s.args[0], s.args[1:]...)
		cmd.Env, cmd.Stderr = t.Env(), os.Stderr
		if err := cmd.Start(); err != nil {
			return err
		}
		err := b.reads(ctx, s.name, nbd.Address{Network: "unix", Addr: sock, Export: s.export}, &where)
		err = errors.Join(err, cmd.Process.Signal(os.Interrupt))
		_ = cmd.Wait() // it was interrupted
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if ru, ok := cmd.ProcessState.SysUsage().(*syscall.Rusage); ok {
			b.add(s.name+", memory", float64(ru.Maxrss)*1024/1e6)
		}
		if err := os.Remove(sock); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// reads measures all kinds of reads from a server, once it answers.
func (b *bench) reads(ctx context.Context, name string, a nbd.Address, where *data) (err error) {
	var c *nbd.Client
	for range 200 {
		if c, err = nbd.Dial(ctx, a, nbd.DialOptions{}); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if where.size == 0 {
		if *where, err = dataOf(ctx, c); err != nil {
			return err
		}
	}
	rng := rand.New(rand.NewPCG(1, 2)) // the same places for all
	set := where.part(where.size/2, workingSet)
	for _, k := range []struct {
		name    string
		offs    []int64
		size, n int
	}{
		{"cold", where.random(rng, randomReads), readSize, depth},
		{"stream", where.part(0, streamed).all(streamSize), streamSize, streams},
		{"", set.random(rng, randomReads), readSize, depth},
		{"warm", set.random(rng, randomReads), readSize, depth},
	} {
		from := time.Now()
		if err := read(ctx, c, k.offs, k.size, k.n); err != nil {
			return err
		}
		if k.name != "" {
			b.took(k.name+", "+name, from)
		}
	}
	return nil
}

// read reads size bytes at each place, n places at a time.
func read(ctx context.Context, c disk.Reader, offs []int64, size, n int) error {
	g, ctx := errgroup.WithContext(ctx)
	for w := range n {
		g.Go(func() error {
			p := make([]byte, size)
			for i := w; i < len(offs); i += n {
				if err := c.ReadAt(ctx, p, offs[i]); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// data is where a disk holds data: extents of multiples of streamSize bytes.
type data struct {
	extents []disk.Extent
	size    int64
}

func (d *data) add(off, n int64) {
	if n > 0 {
		d.extents = append(d.extents, disk.Extent{Off: off, Len: n})
		d.size += n
	}
}

func dataOf(ctx context.Context, r disk.Reader) (d data, err error) {
	for e, err := range disk.Merge(r.Extents(ctx, 0, r.Size())) {
		if err != nil {
			return d, err
		}
		if !e.Zero {
			d.add(e.Off, e.Len/streamSize*streamSize)
		}
	}
	if d.size < workingSet {
		return d, fmt.Errorf("the disk has only %d bytes of data", d.size)
	}
	return d, nil
}

// part is the n bytes of data that follow the first skip ones, or what there
// is of them; both are rounded down to streamSize.
func (d data) part(skip, n int64) (p data) {
	skip, n = skip/streamSize*streamSize, n/streamSize*streamSize
	for _, e := range d.extents {
		from := min(skip, e.Len)
		take := min(n, e.Len-from)
		p.add(e.Off+from, take)
		skip, n = skip-from, n-take
	}
	return p
}

// all lists the places of pieces of size bytes.
func (d data) all(size int64) (offs []int64) {
	for _, e := range d.extents {
		for off := e.Off; off < e.End(); off += size {
			offs = append(offs, off)
		}
	}
	return offs
}

// random lists n places of readSize bytes.
func (d data) random(rng *rand.Rand, n int) []int64 {
	places := d.all(readSize)
	offs := make([]int64, n)
	for i := range offs {
		offs[i] = places[rng.IntN(len(places))]
	}
	return offs
}
