//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
)

// The disk that most is measured on has three parts: an ext4 with a copy of
// /usr, in its first 85 %; then 10 % of database pages; then 5 % for a log, half
// of it written.
type layout struct{ size int64 }

func (l layout) system() int64    { return l.size / 100 * 85 &^ (1<<20 - 1) }
func (l layout) log() int64       { return l.size / 100 * 95 &^ (1<<20 - 1) }
func (l layout) pages() int64     { return (l.log() - l.system()) / pageSize }
func (l layout) logLength() int64 { return (l.size - l.log()) / 2 }

const pageSize = 8192 // of databases, bytes

// source is the folder host with the disk.
func (b *bench) source() string { return filepath.Join(b.data, fmt.Sprintf("host-%d", b.size>>30)) }
func (b *bench) disk() string   { return filepath.Join(b.source(), vm+".raw") }

const vm = "server" // the disk's, in its host

// extreme is the folder host with a disk of zeros, or of random bytes.
func (b *bench) extreme(kind string) string {
	return filepath.Join(b.data, fmt.Sprintf("%s-%d", kind, b.size>>30))
}

// prepare makes the disks once.
func (b *bench) prepare(ctx context.Context) error {
	b.work = filepath.Join(b.data, "work")
	if err := os.RemoveAll(b.work); err != nil {
		return err
	}
	if err := os.MkdirAll(b.work, 0o755); err != nil {
		return err
	}
	if b.only == "synthetic" || b.only == "growth" {
		return nil
	}
	for _, d := range []struct {
		path string
		fill func(ctx context.Context, path string) error
	}{
		{b.disk(), b.makeDisk},
		{filepath.Join(b.extreme("zeros"), vm+".raw"), b.fill(zeros{})},
		{filepath.Join(b.extreme("random"), vm+".raw"), b.fill(rand.NewChaCha8([32]byte{1}))},
	} {
		if _, err := os.Stat(d.path); err == nil {
			continue
		}
		b.say("making %s, once", d.path)
		if err := os.MkdirAll(filepath.Dir(d.path), 0o755); err != nil {
			return err
		}
		tmp := filepath.Join(b.work, "new")
		if err := d.fill(ctx, tmp); err != nil {
			return err
		}
		if err := os.Rename(tmp, d.path); err != nil {
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

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// fill gives the maker of a disk of a fifth of the size.
func (b *bench) fill(from io.Reader) func(context.Context, string) error {
	return func(_ context.Context, path string) error {
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		_, err = io.CopyN(f, from, b.size/5)
		return errors.Join(err, f.Close())
	}
}

// makeDisk fills the disk's three parts.
func (b *bench) makeDisk(ctx context.Context, path string) error {
	l := layout{b.size}
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
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(b.size), f.Close()); err != nil {
		return err
	}
	if err := command(ctx, "mke2fs", "-q", "-t", "ext4", "-F", "-d", tree, "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard",
		path, fmt.Sprintf("%dk", l.system()>>10)); err != nil {
		return err
	}
	if err := os.RemoveAll(tree); err != nil {
		return err
	}
	if f, err = os.OpenFile(path, os.O_WRONLY, 0); err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(1, 0))
	w := bufio.NewWriterSize(io.NewOffsetWriter(f, l.system()), 1<<20)
	for i := range l.pages() {
		if _, err := w.Write(page(rng, i)); err != nil {
			return errors.Join(err, f.Close())
		}
	}
	_, err = w.Write(make([]byte, l.log()-l.system()-l.pages()*pageSize))
	return errors.Join(err, w.Flush(), writeLog(f, rng, l.log(), l.logLength()), f.Close())
}

// page is a page of a database: rows of numbers and words behind a header.
func page(rng *rand.Rand, number int64) []byte {
	p := binary.LittleEndian.AppendUint64(make([]byte, 0, pageSize), uint64(number))
	p = binary.LittleEndian.AppendUint64(p, rng.Uint64()) // sum, time of the change
	for len(p) < pageSize*9/10 {
		p = binary.LittleEndian.AppendUint64(p, rng.Uint64N(1e9))
		p = binary.LittleEndian.AppendUint32(p, rng.Uint32())
		p = append(p, words[rng.IntN(len(words))]...)
		p = append(p, ' ')
		p = append(p, words[rng.IntN(len(words))]...)
		p = append(p, 0)
	}
	return p[:pageSize]
}

var words = []string{"invoice", "Hamburg", "delivered", "customer", "pending", "Łódź", "warehouse", "2026-03-01", "credit", "article",
	"paid", "order", "Müller", "returned", "shipping", "EUR", "discount", "quantity", "Antwerpen", "cancelled"}

// writeLog writes n bytes of lines at off.
func writeLog(f io.WriterAt, rng *rand.Rand, off, n int64) error {
	w := bufio.NewWriterSize(io.NewOffsetWriter(f, off), 1<<20)
	for n > 0 {
		line := fmt.Sprintf("2026-03-%02dT%02d:%02d:%02d.%06dZ app[%d]: %s %s id=%d took=%dus\n", rng.IntN(28)+1, rng.IntN(24), rng.IntN(60), rng.IntN(60),
			rng.IntN(1e6), rng.IntN(30000), words[rng.IntN(len(words))], words[rng.IntN(len(words))], rng.IntN(1e8), rng.IntN(1e5))
		line = line[:min(int64(len(line)), n)]
		if _, err := w.WriteString(line); err != nil {
			return err
		}
		n -= int64(len(line))
	}
	return w.Flush()
}
