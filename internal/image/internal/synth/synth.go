// Package synth computes image files: a File is what an image of a disk would
// be as a file, byte for byte, of a length known from the start and readable
// anywhere, while nothing of it exists but the disk.
//
//	disk ─▶ File ─▶ copied to a file (an export), or served (a view)
//
// A file consists of parts that are computed (headers, tables), of blocks of
// the disk, one after another from some offset on, each perhaps with a few
// bytes before it, and of zeros between them.
package synth

import (
	"context"
	"fmt"
	"sort"

	"holdfast/internal/disk"
)

// Part is a computed piece of a file.
type Part struct {
	Off, Len int64 // bytes
	// Fill writes the part's bytes from offset off of the part on into p, which
	// is zero and does not reach beyond the part. Called in parallel.
	Fill func(p []byte, off int64)
}

// Bytes is a part that is known.
func Bytes(off int64, b []byte) Part {
	return Part{Off: off, Len: int64(len(b)), Fill: func(p []byte, at int64) { copy(p, b[at:]) }}
}

// Layout is where everything is in a file.
type Layout struct {
	Size  int64  // of the file, bytes
	Parts []Part // disjoint, in ascending order, none among the blocks
	// Blocks are those of the disk that the file holds, from offset First on.
	// Each takes Lead bytes, then its own, the disk's last one too.
	Blocks *Blocks
	First  int64
	Lead   int64
	// FillLead is Part.Fill for the Lead bytes before a block of the disk.
	FillLead func(p []byte, off, block int64)
}

// File is a disk.Reader whose bytes are those of an image file.
type File struct {
	d disk.Reader
	l Layout
}

// New makes the file of disk d. The File owns d.
func New(d disk.Reader, l Layout) *File { return &File{d, l} }

func (f *File) Size() int64  { return f.l.Size }
func (f *File) Close() error { return f.d.Close() }

// piece is a stretch of the file of one kind.
type piece struct {
	off, n int64
	part   *Part // computed,
	lead   bool  // or before a block,
	data   bool  // or of the disk, or else zeros
	block  int64 // of the disk, if lead
	disk   int64 // offset on the disk, if data
}

// pieces calls do for the stretches of [off, off+n) until one fails.
func (f *File) pieces(ctx context.Context, off, n int64, do func(piece) error) error {
	if err := disk.CheckRange(f.l.Size, off, n); err != nil {
		return err
	}
	for end := off + n; off < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := f.at(off, end-off)
		if err := do(p); err != nil {
			return err
		}
		off += p.n
	}
	return nil
}

// at is the piece at off, of at most n bytes.
func (f *File) at(off, n int64) piece {
	p := piece{off: off, n: n}
	next := sort.Search(len(f.l.Parts), func(i int) bool { return f.l.Parts[i].Off > off })
	if next < len(f.l.Parts) {
		p.n = min(n, f.l.Parts[next].Off-off)
	}
	if next > 0 {
		if q := &f.l.Parts[next-1]; off < q.Off+q.Len {
			p.part, p.n = q, min(n, q.Off+q.Len-off)
			return p
		}
	}
	stride := f.l.Lead + f.l.Blocks.size
	last := f.l.First + f.l.Blocks.Count()*stride
	if off < f.l.First {
		p.n = min(p.n, f.l.First-off)
		return p
	}
	if off >= last {
		return p
	}
	p.n = min(p.n, last-off)
	place, in := (off-f.l.First)/stride, (off-f.l.First)%stride
	limit := int64(1)
	if f.l.Lead == 0 {
		limit = (in+p.n-1)/stride + 1
	}
	block, count := f.l.Blocks.Run(place, limit)
	if in < f.l.Lead {
		p.lead, p.block, p.n = true, block, min(p.n, f.l.Lead-in)
		return p
	}
	in -= f.l.Lead
	p.disk = block*f.l.Blocks.size + in
	p.n = min(p.n, count*f.l.Blocks.size-in)
	if left := f.d.Size() - p.disk; left > 0 { // else the last block's rest
		p.data, p.n = true, min(p.n, left)
	}
	return p
}

// ReadAt fills b with the file's bytes at off.
func (f *File) ReadAt(ctx context.Context, b []byte, off int64) error {
	return f.pieces(ctx, off, int64(len(b)), func(p piece) error {
		q := b[p.off-off : p.off-off+p.n]
		if p.data {
			return f.d.ReadAt(ctx, q, p.disk)
		}
		clear(q)
		switch {
		case p.part != nil:
			p.part.Fill(q, p.off-p.part.Off)
		case p.lead:
			f.l.FillLead(q, (p.off-f.l.First)%(f.l.Lead+f.l.Blocks.size), p.block)
		}
		return nil
	})
}

// Extents are those of the disk where its blocks are. Computed parts are
// data.
func (f *File) Extents(ctx context.Context, off, n int64) disk.Extents {
	return disk.Merge(func(yield func(disk.Extent, error) bool) {
		stopped := fmt.Errorf("stopped")
		err := f.pieces(ctx, off, n, func(p piece) error {
			if !p.data {
				if !yield(disk.Extent{Off: p.off, Len: p.n, Zero: p.part == nil && !p.lead}, nil) {
					return stopped
				}
				return nil
			}
			for e, err := range f.d.Extents(ctx, p.disk, p.n) {
				if err != nil {
					return err
				}
				e.Off += p.off - p.disk
				if !yield(e, nil) {
					return stopped
				}
			}
			return nil
		})
		if err != nil && err != stopped {
			yield(disk.Extent{}, err)
		}
	})
}
