package vmdk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"

	"github.com/klauspost/compress/zlib"
	"golang.org/x/sync/errgroup"

	"holdfast/internal/disk"
)

// blockLen is how much of the disk is read and compressed at once, in bytes: a
// divisor of what one grain table describes.
const blockLen = 1 << 20

// StreamOptions of a stream.
type StreamOptions struct {
	// ID and Name are those of ViewOptions.
	ID   [16]byte
	Name string
	// Workers is how many blocks of 1 MiB are compressed at once. 0 means one
	// for each core. Each takes about 6 MiB of memory.
	Workers int
	// Progress, when set, is told of each so many bytes of the disk that have
	// been read and written out; what the disk knows to be zeros is not
	// counted. It is called by one goroutine at a time, and does not block.
	Progress func(n int64)
}

// WriteStream writes a streamOptimized VMDK of d to w in one pass, and returns
// how many bytes it wrote. This is the form that OVF packages have, and the one
// that VMware's importers take:
//
//	header │ descriptor │ grains, and behind those of each table it │ directory │ footer │ end
//
// The header says that the directory is where the footer tells. Grains of zeros
// are left out, whether d knows them or not. VMDK knows only whole sectors: the
// image's disk is d's size rounded up to 512 bytes. A disk that is empty or
// larger than MaxFlat is refused; a stream may have 2 TiB, and fails where it
// would have more. Memory does not depend on the disk's size but for 128 KiB
// per TiB. On an error, that of ctx too, what was written is not an image. The
// caller closes w and d.
func WriteStream(ctx context.Context, w io.Writer, d disk.Reader, o StreamOptions) (written int64, err error) {
	t, err := newText(d.Size(), MaxFlat, o.ID, o.Name)
	if err == nil {
		e := &exporter{w: w, d: d, o: o, t: t, table: -1}
		err = e.run(ctx)
		written = e.written
	}
	if err != nil {
		return written, fmt.Errorf("write a VMDK stream: %w", err)
	}
	return written, nil
}

// exporter writes a stream. The caller's goroutine walks the disk's extents
// and cuts them into blocks, workers read and compress them, one goroutine
// writes them in the order of the disk. All blocks there are go round through
// free.
type exporter struct {
	w io.Writer
	d disk.Reader
	o StreamOptions
	t text

	// Of the goroutine that writes.
	written int64
	dir     []uint32
	table   int64 // the one that entries are of; -1 for none
	entries [ourPerGT]uint32
}

// block is a part of the disk in work.
type block struct {
	off, n int64
	plain  []byte
	packed bytes.Buffer
	grains []packedGrain
	done   chan error // gets one when it is compressed
}

// packedGrain is where a grain's marker is in block.packed.
type packedGrain struct {
	number int64
	at     int
}

func (e *exporter) run(ctx context.Context) error {
	h := hosted{version: 3, flags: flagNewlines | flagCompressed | flagMarkers, capacity: e.t.sectors * sector, gd: atEnd, overhead: ourOverhead}
	head := make([]byte, ourOverhead)
	putHosted(head, h)
	copy(head[ourDescOff:], e.t.embedded("streamOptimized", "RDONLY"))
	if err := e.write(head); err != nil {
		return err
	}
	e.dir = make([]uint32, up(e.t.sectors, ourPerGT*ourGrain/sector))
	if err := e.grains(ctx); err != nil {
		return err
	}
	return e.end(h)
}

// grains writes all grains and tables.
func (e *exporter) grains(ctx context.Context) error {
	workers := e.o.Workers
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	count := 2*workers + 1
	free, todo, order := make(chan *block, count), make(chan *block, count), make(chan *block, count)
	for range count {
		free <- &block{done: make(chan error, 1)}
	}
	g, ctx := errgroup.WithContext(ctx)
	for range workers {
		g.Go(func() error {
			z, err := zlib.NewWriterLevel(io.Discard, zlib.BestSpeed)
			for b := range todo {
				if err == nil {
					b.done <- b.compress(ctx, e.d, z)
				} else {
					b.done <- err
				}
			}
			return nil
		})
	}
	g.Go(func() error {
		for b := range order {
			if err := <-b.done; err != nil {
				return err
			}
			if err := e.block(b); err != nil {
				return err
			}
			if e.o.Progress != nil {
				e.o.Progress(b.n)
			}
			free <- b
		}
		return e.endTable()
	})
	// No channel but free can be full, so none of the others is waited for.
	err := e.walk(ctx, func(off, n int64) error {
		select {
		case b := <-free:
			b.off, b.n = off, n
			order <- b
			todo <- b
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	close(todo)
	if err != nil {
		// What is underway must not be taken for all.
		g.Go(func() error { return err })
	}
	close(order)
	return g.Wait()
}

// walk calls do for each block that is not known to be zeros.
func (e *exporter) walk(ctx context.Context, do func(off, n int64) error) error {
	size := e.d.Size()
	for x, err := range disk.Align(e.d.Extents(ctx, 0, size), ourGrain, size) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return fmt.Errorf("list what to write: %w", err)
		}
		for x.Len > 0 && !x.Zero {
			n := min(x.Len, blockLen-x.Off%blockLen)
			if err := do(x.Off, n); err != nil {
				return err
			}
			x.Off, x.Len = x.Off+n, x.Len-n
		}
	}
	return nil
}

// compress reads the block and makes markers and grains of it.
func (b *block) compress(ctx context.Context, d disk.Reader, z *zlib.Writer) error {
	if b.plain == nil {
		b.plain = make([]byte, blockLen)
	}
	whole := b.plain[:up(b.n, ourGrain)*ourGrain]
	clear(whole[b.n:])
	if err := d.ReadAt(ctx, whole[:b.n], b.off); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", b.n, b.off, err)
	}
	b.packed.Reset()
	b.grains = b.grains[:0]
	for i := int64(0); i < int64(len(whole)); i += ourGrain {
		p := whole[i : i+ourGrain]
		if disk.IsZero(p) {
			continue
		}
		at := b.packed.Len()
		b.grains = append(b.grains, packedGrain{(b.off + i) / ourGrain, at})
		var head [grainHead]byte
		b.packed.Write(head[:])
		z.Reset(&b.packed)
		if _, err := z.Write(p); err != nil {
			return err
		}
		if err := z.Close(); err != nil {
			return err
		}
		le := binary.LittleEndian
		le.PutUint64(b.packed.Bytes()[at:], uint64((b.off+i)/sector))
		le.PutUint32(b.packed.Bytes()[at+8:], uint32(b.packed.Len()-at-grainHead))
		b.packed.Write(make([]byte, -b.packed.Len()&(sector-1)))
	}
	return nil
}

// block writes a block's grains and remembers where they are.
func (e *exporter) block(b *block) error {
	if len(b.grains) == 0 {
		return nil
	}
	if table := b.grains[0].number / ourPerGT; table != e.table {
		if err := e.endTable(); err != nil {
			return err
		}
		e.table = table
	}
	if (e.written+int64(b.packed.Len()))/sector > 1<<32-1 {
		return fmt.Errorf("at offset %d of the disk the file gets larger than the format's 2 TiB", b.off)
	}
	for _, g := range b.grains {
		e.entries[g.number%ourPerGT] = uint32((e.written + int64(g.at)) / sector)
	}
	return e.write(b.packed.Bytes())
}

// endTable writes the table of the grains before it.
func (e *exporter) endTable() error {
	if e.table < 0 {
		return nil
	}
	at, err := e.words(markTable, e.entries[:])
	e.dir[e.table] = at
	e.table = -1
	clear(e.entries[:])
	return err
}

// words writes a table or the directory behind a marker and returns its
// sector.
func (e *exporter) words(kind uint32, words []uint32) (uint32, error) {
	b := make([]byte, up(int64(len(words))*4, sector)*sector)
	for i, w := range words {
		binary.LittleEndian.PutUint32(b[4*i:], w)
	}
	at := e.written/sector + 1
	if at+int64(len(b)/sector) > 1<<32-1 {
		return 0, fmt.Errorf("the file gets larger than the format's 2 TiB")
	}
	return uint32(at), errors.Join(e.mark(int64(len(b)/sector), kind), e.write(b))
}

// end writes what is behind the grains.
func (e *exporter) end(h hosted) error {
	at, err := e.words(markDir, e.dir)
	if err != nil {
		return err
	}
	h.gd = uint64(at)
	footer := make([]byte, sector)
	putHosted(footer, h)
	if err := e.mark(1, markFooter); err != nil {
		return err
	}
	if err := e.write(footer); err != nil {
		return err
	}
	return e.mark(0, markEnd)
}

// mark writes a marker that is not a grain's.
func (e *exporter) mark(sectors int64, kind uint32) error {
	b := make([]byte, sector)
	binary.LittleEndian.PutUint64(b, uint64(sectors))
	binary.LittleEndian.PutUint32(b[12:], kind)
	return e.write(b)
}

func (e *exporter) write(p []byte) error {
	n, err := e.w.Write(p)
	e.written += int64(n)
	if err == nil && n < len(p) {
		err = io.ErrShortWrite
	}
	return err
}
