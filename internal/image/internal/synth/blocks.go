package synth

import (
	"context"
	"math/bits"
	"sort"

	"holdfast/internal/disk"
)

// Blocks says which blocks of a disk a file holds; it holds them in the order
// of the disk. It costs 12 bits of memory for each block of the disk, or
// nothing when all are held. Safe in parallel.
type Blocks struct {
	size  int64    // of a block, bytes
	len   int64    // blocks of the disk, the last one perhaps in part
	words []uint64 // bit i%64 of word i/64 is block i; nil: all are held
	rank  []uint32 // blocks held before the word's
	count int64
}

// All are the blocks of a disk of diskSize bytes.
func All(diskSize, size int64) *Blocks {
	n := (diskSize + size - 1) / size
	return &Blocks{size: size, len: n, count: n}
}

// Allocated are the blocks of d that are not known to be zeros. size is that
// of a block in bytes; there can be at most 2³² blocks.
func Allocated(ctx context.Context, d disk.Reader, size int64) (*Blocks, error) {
	b := All(d.Size(), size)
	b.words = make([]uint64, (b.len+63)/64)
	for e, err := range d.Extents(ctx, 0, d.Size()) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return nil, err
		}
		if !e.Zero {
			b.set(e.Off/size, (e.End()-1)/size)
		}
	}
	b.rank, b.count = make([]uint32, len(b.words)), 0
	for i, w := range b.words {
		b.rank[i] = uint32(b.count)
		b.count += int64(bits.OnesCount64(w))
	}
	return b, nil
}

// set sets the bits from first to last.
func (b *Blocks) set(first, last int64) {
	for i := first; i <= last; {
		n := min(64-i%64, last+1-i)
		b.words[i/64] |= (^uint64(0) >> (64 - n)) << (i % 64)
		i += n
	}
}

// Len is how many blocks the disk has.
func (b *Blocks) Len() int64 { return b.len }

// Count is how many of them the file holds.
func (b *Blocks) Count() int64 { return b.count }

// Place is the place in the file, from 0, of block i of the disk; ok is false
// when the file does not hold it. i is in [0, Len).
func (b *Blocks) Place(i int64) (n int64, ok bool) {
	if b.words == nil {
		return i, true
	}
	w := b.words[i/64]
	below := w & (1<<(i%64) - 1)
	return int64(b.rank[i/64]) + int64(bits.OnesCount64(below)), w>>(i%64)&1 != 0
}

// Run is the block of the disk at place n of the file, and how many of the
// blocks that follow it on the disk, itself included, follow it in the file;
// at most limit. n is in [0, Count), limit at least 1.
func (b *Blocks) Run(n, limit int64) (block, count int64) {
	limit = min(limit, b.count-n)
	if b.words == nil {
		return n, limit
	}
	i := sort.Search(len(b.rank), func(i int) bool { return int64(b.rank[i]) > n }) - 1
	w := b.words[i]
	for range n - int64(b.rank[i]) {
		w &= w - 1 // the lowest bit goes
	}
	block = int64(i)*64 + int64(bits.TrailingZeros64(w))
	for at := block; count < limit; {
		ones := min(int64(bits.TrailingZeros64(^(b.words[at/64] >> (at % 64)))), 64-at%64)
		if ones == 0 {
			break
		}
		count, at = count+ones, at+ones
		if at%64 != 0 || at >= b.len {
			break
		}
	}
	return block, min(count, limit)
}
