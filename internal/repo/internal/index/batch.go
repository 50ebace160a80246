package index

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/bits"
	"os"
	"runtime"
	"slices"
	"sync"

	"holdfast/internal/repo/internal/seal"
)

// blockBytes is how much of a bucket is in memory: 17 MB of all.
const blockBytes = (64 << 10) / itemLen * itemLen

// Batch takes many index objects into the index at once. Items are dealt to
// buckets by the first byte of their ids, which are as good as random; what is
// full of a bucket goes to a file. In the end each bucket is sorted by itself,
// some side by side, and written behind the one before. Nothing is found before
// Finish. It is for one goroutine.
type Batch struct {
	x       *Index
	buckets [256]bucket
	file    *os.File // blocks of buckets; nil as long as all is in memory
	size    int64    // of file, bytes
	packs   [][32]byte
	sources [][32]byte
	block   int // bytes
}

// bucket has items as they are in a page.
type bucket struct {
	items  []byte
	blocks []int64 // where in the file blocks begin
}

// NewBatch begins a batch, to be ended by Finish or Abort.
func (x *Index) NewBatch() *Batch { return &Batch{x: x, block: blockBytes} }

// Add takes the items of an index object in, each object once.
func (b *Batch) Add(source [32]byte, packs []Pack) error {
	if b.x.Has(source) {
		return nil
	}
	for _, k := range packs {
		number := uint32(len(b.packs))
		b.packs = append(b.packs, k.Name)
		off := uint32(seal.HeaderLen)
		for j := range k.Items {
			it := item{k.Items[j].ID, number, uint32(j), off, k.Items[j].Stored}
			to := &b.buckets[it.id[0]]
			if to.items = it.append(to.items); len(to.items) >= b.block {
				if err := b.spill(to); err != nil {
					return err
				}
			}
			off += it.stored
		}
	}
	b.sources = append(b.sources, source)
	return nil
}

// spill writes what a bucket has in memory to the file.
func (b *Batch) spill(k *bucket) (err error) {
	if b.file == nil {
		if b.file, err = os.CreateTemp(b.x.dir, "new-*"); err != nil {
			return err
		}
	}
	if _, err := b.file.WriteAt(k.items, b.size); err != nil {
		return err
	}
	k.blocks = append(k.blocks, b.size)
	b.size += int64(len(k.items))
	k.items = k.items[:0]
	return nil
}

// Finish makes the index find what was added.
func (b *Batch) Finish() error {
	if len(b.sources) == 0 {
		return nil
	}
	b.x.adding.Lock()
	defer b.x.adding.Unlock()
	return b.finish()
}

func (b *Batch) finish() error {
	w, err := newSegmentWriter(b.x.dir)
	if err != nil {
		return err
	}
	if err := b.write(w); err != nil {
		return errors.Join(err, w.abort())
	}
	if err := b.Abort(); err != nil { // the file is not needed any more
		return errors.Join(err, w.abort())
	}
	return b.x.install(w, b.packs, b.sources, nil)
}

// write writes all buckets, in their order.
func (b *Batch) write(w *segmentWriter) error {
	type answer struct {
		items []byte
		order []uint64
		low   int
		err   error
	}
	answers := make([]chan answer, len(b.buckets))
	var sorting sync.WaitGroup
	defer sorting.Wait()
	sort := func(i int) {
		if i >= len(b.buckets) {
			return
		}
		to := make(chan answer, 1)
		answers[i] = to
		sorting.Go(func() {
			items, err := b.load(&b.buckets[i])
			order, low := sorted(items)
			to <- answer{items, order, low, err}
		})
	}
	ahead := min(runtime.GOMAXPROCS(0), 4) // 20 MB each with 100 million items
	for i := range ahead {
		sort(i)
	}
	for i := range answers {
		a := <-answers[i]
		if a.err != nil {
			return a.err
		}
		sort(i + ahead)
		for _, key := range a.order {
			at := int(key&(1<<a.low-1)) * itemLen
			w.addBytes(a.items[at : at+itemLen])
		}
	}
	return nil
}

// load gives all items of a bucket, and empties it.
func (b *Batch) load(k *bucket) ([]byte, error) {
	p := k.items
	if n := len(k.blocks); n > 0 {
		p = make([]byte, n*b.block, n*b.block+len(k.items))
		for i, off := range k.blocks {
			if _, err := io.ReadFull(io.NewSectionReader(b.file, off, int64(b.block)), p[i*b.block:][:b.block]); err != nil {
				return nil, err
			}
		}
		p = append(p, k.items...)
	}
	*k = bucket{}
	return p, nil
}

// sorted gives the order of items, whose ids have their first byte in common:
// keys of which the low bits are numbers of items. Moving keys is less work than
// moving items.
func sorted(items []byte) (keys []uint64, low int) {
	keys = make([]uint64, len(items)/itemLen)
	low = bits.Len(uint(len(keys)))
	mask := uint64(1)<<low - 1
	for i := range keys {
		keys[i] = binary.BigEndian.Uint64(items[i*itemLen+1:])&^mask | uint64(i)
	}
	slices.Sort(keys)
	id := func(key uint64) []byte { return items[int(key&mask)*itemLen:][:32] }
	for i := range keys { // the few that begin alike
		for j := i; j > 0 && (keys[j]^keys[j-1])&^mask == 0 && bytes.Compare(id(keys[j]), id(keys[j-1])) < 0; j-- {
			keys[j], keys[j-1] = keys[j-1], keys[j]
		}
	}
	return keys, low
}

// Abort removes what the batch has left in a file.
func (b *Batch) Abort() error {
	if b.file == nil {
		return nil
	}
	f := b.file
	b.file = nil
	return errors.Join(f.Close(), os.Remove(f.Name()))
}
