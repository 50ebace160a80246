package repo

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/repo/internal/pack"
)

// Many readers of a cache far too small for what they read get what they asked
// for, whatever fails and whoever is cancelled meanwhile; it never grows.
func TestChunkCache(t *testing.T) {
	seed := disktest.Seed(t)
	c := &chunkCache{max: 5}
	var loads atomic.Int64
	var wg sync.WaitGroup
	for w := range uint64(8) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, w))
			p := make([]byte, 100)
			for range 3000 {
				k := byte(1 + rng.IntN(12))
				from := rng.IntN(ChunkSize - len(p))
				ctx, cancel := context.WithCancel(t.Context())
				if rng.IntN(20) == 0 {
					cancel()
				}
				fails := rng.IntN(10) == 0
				err := c.read(ctx, pack.ID{k}, p, from, func(buf []byte) error {
					loads.Add(1)
					if fails {
						return errTest
					}
					for i := range buf {
						buf[i] = k + byte(i)
					}
					return nil
				})
				cancel()
				there := err == nil
				if !there && !errors.Is(err, context.Canceled) && !(fails && errors.Is(err, errTest)) {
					t.Errorf("chunk %d: %v", k, err)
				} else if !there {
					there = c.peek(pack.ID{k}, p, from)
				}
				for i := 0; there && i < len(p); i++ {
					if p[i] != k+byte(from+i) {
						t.Errorf("chunk %d: byte at %d is %d", k, from+i, p[i])
						return
					}
				}
			}
		})
	}
	wg.Wait()
	if n := loads.Load(); n == 8*3000 || len(c.chunks) > 5 || c.recent.Len() > 5 || c.peek(pack.ID{99}, nil, 0) {
		t.Errorf("%d loads; %d chunks in %d places", n, len(c.chunks), c.recent.Len())
	}
}

var errTest = errors.New("injected")

// The chunk that was used longest ago goes.
func TestChunkCacheOrder(t *testing.T) {
	c := &chunkCache{max: 3}
	has := func(k byte) bool {
		loaded := false
		p := []byte{0}
		if err := c.read(t.Context(), pack.ID{k}, p, 7, func(buf []byte) error { loaded = true; copy(buf, bytes.Repeat([]byte{k}, ChunkSize)); return nil }); err != nil || p[0] != k {
			t.Fatalf("chunk %d: %d, %v", k, p[0], err)
		}
		return !loaded
	}
	for i, x := range []struct {
		k    byte
		want bool
	}{{1, false}, {2, false}, {3, false}, {1, true}, {4, false}, {2, false}, {1, true}, {3, false}, {4, false}, {1, true}} {
		if has(x.k) != x.want {
			t.Errorf("step %d: chunk %d: there %v", i, x.k, !x.want)
		}
	}
}

// One reads, the others wait for it; when it fails, the next one reads.
func TestChunkCacheShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &chunkCache{max: 3}
		gate := make(chan error)
		results := make(chan error, 3)
		for range 3 {
			go func() {
				results <- c.read(t.Context(), pack.ID{1}, make([]byte, 1), 0, func([]byte) error { return <-gate })
			}()
		}
		synctest.Wait() // one reads
		gate <- errTest
		if err := <-results; !errors.Is(err, errTest) {
			t.Error(err)
		}
		synctest.Wait() // another one does
		gate <- nil
		for range 2 {
			if err := <-results; err != nil {
				t.Error(err)
			}
		}
	})
}

// away is a store that takes a second to answer.
type away struct{ blob.Store }

func (a away) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	time.Sleep(time.Second)
	return a.Store.Get(ctx, name, off, n)
}

// The chunks of one read come side by side.
func TestReadSideBySide(t *testing.T) {
	blobtest.Bubble(t, func(t *testing.T) {
		s := &blob.Mem{}
		content := make([]byte, 8*ChunkSize)
		disktest.Fill(disktest.Rand(t), content)
		p, err := save(create(t, s), "vm", content, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		d, err := reopen(t, away{s}).OpenDisk(ctx, p.Disks[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := d.ReadAt(ctx, make([]byte, 1), 3*ChunkSize); err != nil { // map and opener
			t.Fatal(err)
		}
		got := make([]byte, cachedRead)
		from := time.Now()
		if err := d.ReadAt(ctx, got, ChunkSize); err != nil || !bytes.Equal(got, content[ChunkSize:][:cachedRead]) {
			t.Fatalf("other content, or %v", err)
		}
		if took := time.Since(from); took > time.Second {
			t.Errorf("a read of %d chunks took %s", cachedRead/ChunkSize, took)
		}
	})
}

// waited is a context that shows who waits for its end: each does so in a
// goroutine of its own.
type waited struct {
	context.Context
	done chan struct{}
}

func (w waited) Done() <-chan struct{} { return w.done }

// Nothing of a read is left in the context of a connection, which lives long.
func TestReadLeavesNothing(t *testing.T) {
	s := &blob.Mem{}
	content := make([]byte, 40*ChunkSize)
	disktest.Fill(disktest.Rand(t), content)
	p, err := save(create(t, s), "vm", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	d, err := reopen(t, s).OpenDisk(ctx, p.Disks[0])
	if err != nil {
		t.Fatal(err)
	}
	long := waited{ctx, make(chan struct{})}
	before := runtime.NumGoroutine()
	for i := range int64(20) {
		for _, n := range []int{512, ChunkSize + 512} {
			if err := d.ReadAt(long, make([]byte, n), 2*i*ChunkSize); err != nil {
				t.Fatal(err)
			}
		}
	}
	for try := 0; runtime.NumGoroutine() > before; try++ { // those of ended contexts end soon
		if try == 1000 {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
		}
		runtime.Gosched()
	}
}
