// Package mover is the one loop that moves disk data: copy these extents from
// this reader to that writer. Backup, restore, copy and migration all call it.
//
// One goroutine, the caller's, walks the extents in ascending order, rounds
// them to Options.Align and cuts them into blocks. Workers take the blocks in
// that order; each reads its block, finds the zeros in it, and writes the rest.
// So reads and writes of different blocks run side by side, what is in memory
// is at most a block per worker, and a writer sees the disk nearly in order.
// A source that is a disk.Feeder brings the blocks itself, in the order in which
// it reads them best, as far as Options.Window lets it.
//
// The first error stops everything. Copy returns when all its workers have.
// It never flushes: the caller knows when.
package mover

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"holdfast/internal/disk"
)

const (
	// grain is the granularity, in bytes, at which zeros are looked for.
	grain = 64 << 10
	// zeroStep bounds one call of ZeroAt, in bytes, so that a large one can be
	// cancelled.
	zeroStep = 1 << 30
)

// ErrAlign is returned for an Align and Block that do not fit each other.
var ErrAlign = errors.New("block is not a multiple of the alignment")

// Options of a Copy. The zero value copies what is not zero.
type Options struct {
	// Align rounds extents outward to multiples of it, in bytes; every write
	// and zero then is a multiple too, but at the disk's end. 0 means 1.
	Align int64
	// Block is the length of one read in bytes, a multiple of Align. 0 means
	// 1 MiB (or Align, if that is more): large enough that the cost of a
	// request is small beside that of its bytes, on spinning disks too.
	Block int64
	// Workers is how many blocks are in work at once. 0 means twice the
	// cores, at least 4 and at most 16: waiting for a disk or a network then
	// does not idle a core.
	Workers int
	// Window is how far from their order blocks may come, in bytes, for a
	// source that reads faster then (disk.Feeder); Align must be one that it
	// takes. 0 means not at all.
	Window int64
	// Zeros says what becomes of ranges that are zero in the source.
	Zeros Zeros
	// Rate bounds the bytes read from the source per second. 0 means no bound.
	Rate int64
	// Meter is told of progress. May be nil.
	Meter *Meter
}

// Zeros says what becomes of zeros.
type Zeros int

const (
	// SkipZeros leaves the writer alone where the source is zero: for a
	// writer that is known to be zero there, such as a new file.
	SkipZeros Zeros = iota
	// WriteZeros calls ZeroAt where the source is zero: for a writer with
	// other content.
	WriteZeros
)

// Counts of a Copy, in bytes. Of an interrupted one they tell what was done.
type Counts struct {
	Read    int64 // from the source
	Written int64 // by WriteAt
	Zeroed  int64 // by ZeroAt
	Skipped int64 // zeros left alone
}

// Copy copies the extents from src to dst, where they keep their place. The
// extents must be in order and lie inside src. Ranges that are zero, by their
// extent or by their content, are zeroed or skipped as o.Zeros says. On an
// error what was copied stays; the error names the offset. Nothing is written
// after ctx is cancelled.
func Copy(ctx context.Context, dst disk.Writer, src disk.Reader, extents disk.Extents, o Options) (Counts, error) {
	c, err := newCopier(dst, src, o)
	if err != nil {
		return Counts{}, err
	}
	extents = disk.Align(extents, c.o.Align, src.Size())
	if f, ok := src.(disk.Feeder); ok && o.Window > 0 {
		err = c.feed(ctx, f, extents)
	} else {
		err = c.run(ctx, extents)
	}
	return Counts{
		Read: c.read.Load(), Written: c.written.Load(), Zeroed: c.zeroed.Load(), Skipped: c.skipped.Load(),
	}, err
}

type copier struct {
	dst   disk.Writer
	src   disk.Reader
	o     Options
	grain int64
	limit limiter

	read, written, zeroed, skipped atomic.Int64
}

func newCopier(dst disk.Writer, src disk.Reader, o Options) (*copier, error) {
	if o.Align == 0 {
		o.Align = 1
	}
	if o.Block == 0 {
		o.Block = max(1<<20, o.Align)
	}
	if o.Workers == 0 {
		o.Workers = min(max(2*runtime.GOMAXPROCS(0), 4), 16)
	}
	// Zeros are found in pieces that the writer takes: whole multiples of
	// Align, and at least 64 KiB where Align leaves the choice.
	c := &copier{dst: dst, src: src, o: o, grain: max(grain/max(o.Align, 1), 1) * o.Align, limit: limiter{rate: o.Rate}}
	if o.Align < 0 || o.Workers < 0 || o.Block <= 0 || o.Block%o.Align != 0 {
		return nil, fmt.Errorf("%w: %d and %d", ErrAlign, o.Block, o.Align)
	}
	return c, nil
}

// feed lets the source bring the blocks.
func (c *copier) feed(ctx context.Context, src disk.Feeder, extents disk.Extents) error {
	data := func(yield func(disk.Extent, error) bool) {
		for e, err := range extents {
			for err == nil && e.Zero && e.Len > 0 {
				n := min(e.Len, c.zeroStep())
				err = c.zero(ctx, e.Off, n)
				e.Off, e.Len = e.Off+n, e.Len-n
			}
			if (err != nil || e.Len > 0) && !yield(e, err) {
				return
			}
		}
	}
	err := src.Feed(ctx, data, c.o.Window, c.o.Workers, func(ctx context.Context, p []byte, off int64) error {
		if err := c.limit.wait(ctx, int64(len(p))); err != nil {
			return err
		}
		return c.put(ctx, p, off)
	})
	if err != nil {
		return fmt.Errorf("copy: %w", err)
	}
	return nil
}

func (c *copier) run(ctx context.Context, extents disk.Extents) error {
	g, ctx := errgroup.WithContext(ctx)
	blocks := make(chan disk.Extent)
	for range c.o.Workers {
		g.Go(func() error {
			var buf []byte // made with the first block that needs it
			for e := range blocks {
				var err error
				if e.Zero {
					err = c.zero(ctx, e.Off, e.Len)
				} else {
					if buf == nil {
						buf = make([]byte, c.o.Block)
					}
					err = c.block(ctx, buf[:e.Len], e.Off)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := c.walk(ctx, extents, blocks)
	close(blocks)
	// A worker's error is the cause; the walk then failed for its context.
	if werr := g.Wait(); werr != nil {
		return werr
	}
	return err
}

// walk hands out blocks. It does so in the caller's goroutine, since an
// iterator may hold what belongs to it.
func (c *copier) walk(ctx context.Context, extents disk.Extents, blocks chan<- disk.Extent) error {
	for e, err := range extents {
		if err != nil {
			return fmt.Errorf("list what to copy: %w", err)
		}
		for e.Len > 0 {
			step := c.o.Block
			if e.Zero {
				step = c.zeroStep()
			}
			// Blocks end on multiples of their length, wherever they begin.
			b := disk.Extent{Off: e.Off, Len: min(e.Len, step-e.Off%step), Zero: e.Zero}
			select {
			case blocks <- b:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			e.Off, e.Len = b.End(), e.Len-b.Len
		}
	}
	return nil
}

// block copies one block through p.
func (c *copier) block(ctx context.Context, p []byte, off int64) error {
	n := int64(len(p))
	if err := c.limit.wait(ctx, n); err != nil {
		return err
	}
	if err := c.src.ReadAt(ctx, p, off); err != nil {
		return fmt.Errorf("copy: read %d bytes at %d: %w", n, off, err)
	}
	return c.put(ctx, p, off)
}

// put takes a block that was read to where it belongs.
func (c *copier) put(ctx context.Context, p []byte, off int64) error {
	n := int64(len(p))
	c.read.Add(n)
	for len(p) > 0 {
		run, zero := c.sameKind(p, off)
		if zero {
			if err := c.zero(ctx, off, run); err != nil {
				return err
			}
		} else {
			if err := c.dst.WriteAt(ctx, p[:run], off); err != nil {
				return fmt.Errorf("copy: write %d bytes at %d: %w", run, off, err)
			}
			c.written.Add(run)
		}
		p, off = p[run:], off+run
	}
	c.o.Meter.Add(n)
	return nil
}

// sameKind tells how far p is all zeros, or all not, in grains.
func (c *copier) sameKind(p []byte, off int64) (run int64, zero bool) {
	n := int64(len(p))
	for run < n {
		end := min(n, run+c.grain-(off+run)%c.grain)
		z := disk.IsZero(p[run:end])
		if run > 0 && z != zero {
			break
		}
		run, zero = end, z
	}
	return run, zero
}

// zeroStep is how much is zeroed at once.
func (c *copier) zeroStep() int64 { return max(zeroStep-zeroStep%c.o.Align, c.o.Align) }

func (c *copier) zero(ctx context.Context, off, n int64) error {
	if c.o.Zeros == SkipZeros {
		c.skipped.Add(n)
		return ctx.Err()
	}
	if err := c.dst.ZeroAt(ctx, off, n); err != nil {
		return fmt.Errorf("copy: zero %d bytes at %d: %w", n, off, err)
	}
	c.zeroed.Add(n)
	return nil
}

// limiter lets n bytes pass at its rate, with a tenth of a second in hand.
type limiter struct {
	rate int64 // bytes per second; 0 no limit

	mu   sync.Mutex // guards next
	next time.Time  // when the bytes granted so far will have passed
}

func (l *limiter) wait(ctx context.Context, n int64) error {
	if l.rate <= 0 {
		return ctx.Err()
	}
	now := time.Now()
	l.mu.Lock()
	if floor := now.Add(-100 * time.Millisecond); l.next.Before(floor) {
		l.next = floor
	}
	l.next = l.next.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	wait := l.next.Sub(now)
	l.mu.Unlock()
	if wait <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
