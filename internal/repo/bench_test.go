package repo

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/disk"
	"holdfast/internal/mover"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/seal"
)

// usr gives up to max bytes of this machine's /usr, each file padded to 4 KiB,
// as they would lie on a disk.
func usr(b *testing.B, max int) []byte {
	var data []byte
	filepath.WalkDir("/usr", func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return nil
		}
		p, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		data = append(data, p...)
		data = append(data, make([]byte, -len(p)&4095)...)
		if len(data) >= max {
			return fs.SkipAll
		}
		return nil
	})
	if len(data) < max {
		b.Skip("this machine's /usr is too small")
	}
	return data[:max]
}

// The data path from a disk in memory into a repository in a directory, and back.
func BenchmarkPath(b *testing.B) {
	data := usr(b, 512<<20)
	src := disk.NewMem(int64(len(data)))
	if err := src.WriteAt(ctx, data, 0); err != nil {
		b.Fatal(err)
	}
	store, err := blob.CreateDir(filepath.Join(b.TempDir(), "repo"))
	if err != nil {
		b.Fatal(err)
	}
	cheap := seal.KDF{Name: "argon2id", Time: 1, Memory: 64, Threads: 1, Root: 1}
	r, err := initialize(ctx, store, secret, Options{Cache: b.TempDir()}, cheap)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	var d Disk
	backup := func(b *testing.B, base *DiskReader) {
		run, err := r.Begin(ctx, RandomID())
		if err != nil {
			b.Fatal(err)
		}
		w, err := run.Disk(ctx, base, src.Size())
		if err != nil {
			b.Fatal(err)
		}
		if _, err := mover.Copy(ctx, w, src, src.Extents(ctx, 0, src.Size()), mover.Options{Align: ChunkSize}); err != nil {
			b.Fatal(err)
		}
		root, err := w.Finish(ctx)
		if err != nil {
			b.Fatal(err)
		}
		d = Disk{ID: "vda", Size: src.Size(), Root: root}
		p := &Point{Disks: []Disk{d}}
		if err := run.Commit(ctx, p); err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(p.StoredBytes)/float64(len(data)), "stored/plain")
		if err := run.Close(); err != nil {
			b.Fatal(err)
		}
	}
	b.Run("full", func(b *testing.B) {
		b.SetBytes(src.Size())
		for range b.N {
			backup(b, nil)
			if b.N > 1 {
				b.Fatal("run with -benchtime=1x")
			}
		}
	})
	b.Run("unchanged", func(b *testing.B) {
		b.SetBytes(src.Size())
		for range b.N {
			backup(b, nil)
		}
	})
	b.Run("restore", func(b *testing.B) {
		b.SetBytes(src.Size())
		for range b.N {
			from, err := r.OpenDisk(ctx, d)
			if err != nil {
				b.Fatal(err)
			}
			to := disk.NewMem(src.Size())
			if _, err := mover.Copy(ctx, to, from, from.Extents(ctx, 0, from.Size()), mover.Options{}); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("check", func(b *testing.B) {
		b.SetBytes(src.Size())
		for range b.N {
			if _, err := r.Check(ctx, CheckOptions{ReadData: true}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// far is a store that takes its time for each call.
type far struct{ *blob.Mem }

func (s far) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	time.Sleep(50 * time.Millisecond)
	return s.Mem.Get(ctx, name, off, n)
}

// An empty machine opens a repository of 5,000 entries, 50 ms away, before and
// after prunes have written two checkpoints.
func BenchmarkOpenFar(b *testing.B) {
	store := new(blob.Mem)
	cheap := seal.KDF{Name: "argon2id", Time: 1, Memory: 64, Threads: 1, Root: 1}
	r, err := initialize(ctx, store, secret, Options{Cache: b.TempDir()}, cheap)
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	entries := func(n int) {
		for range n {
			e := chain.Sealed{Point: &Point{ID: PointID(RandomID()), VM: "vm"}}
			if err := r.append(ctx, chain.Commit, chain.Clear{Lease: RandomID()}, e, func(*chain.State) error { return nil }); err != nil {
				b.Fatal(err)
			}
		}
	}
	entries(5000)
	open := func(b *testing.B) {
		for range b.N {
			r, err := Open(ctx, far{store}, secret, Options{Cache: b.TempDir()})
			if err != nil {
				b.Fatal(err)
			}
			r.Close()
		}
	}
	b.Run("all", open)
	for range 2 {
		if _, err := r.Prune(ctx, PruneOptions{Watch: -1}); err != nil {
			b.Fatal(err)
		}
		entries(checkpointEvery)
	}
	b.Run("checkpoints", open)
}
