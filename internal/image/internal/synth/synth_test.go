package synth

import (
	"context"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// TestFile compares random files, with and without bytes before their blocks,
// of whole disks and of sparse ones, with models made by hand.
func TestFile(t *testing.T) {
	rnd := disktest.Rand(t)
	for range 200 {
		size := int64(512) << rnd.IntN(5)
		d := disk.NewMem(1 + rnd.Int64N(200*size))
		for range rnd.IntN(5) {
			off := rnd.Int64N(d.Size())
			p := make([]byte, 1+rnd.Int64N(min(d.Size()-off, 70*size)))
			disktest.Fill(rnd, p)
			if err := d.WriteAt(t.Context(), p, off); err != nil {
				t.Fatal(err)
			}
		}
		blocks := All(d.Size(), size)
		if rnd.IntN(3) > 0 {
			var err error
			if blocks, err = Allocated(t.Context(), d, size); err != nil {
				t.Fatal(err)
			}
		}
		head, tail := make([]byte, 1+rnd.IntN(3000)), make([]byte, rnd.IntN(600))
		disktest.Fill(rnd, head)
		disktest.Fill(rnd, tail)
		l := Layout{Blocks: blocks, First: 4096, Lead: []int64{0, 0, 512}[rnd.IntN(3)]}
		l.FillLead = func(p []byte, off, block int64) {
			for i := range p {
				p[i] = byte(off + int64(i) + block)
			}
		}
		end := l.First + blocks.Count()*(size+l.Lead)
		l.Parts = []Part{Bytes(512, head), Bytes(end+100, tail)}
		l.Size = end + 100 + int64(len(tail)) + rnd.Int64N(300)

		model := make([]byte, l.Size)
		copy(model[512:], head)
		copy(model[end+100:], tail)
		at := l.First
		for i := range blocks.Len() {
			place, ok := blocks.Place(i)
			if !ok {
				continue
			}
			if want := l.First + place*(size+l.Lead); want != at {
				t.Fatalf("block %d is at %d, not %d", i, at, want)
			}
			l.FillLead(model[at:at+l.Lead], 0, i)
			at += l.Lead
			n := min(size, d.Size()-i*size)
			if err := d.ReadAt(t.Context(), model[at:at+n], i*size); err != nil {
				t.Fatal(err)
			}
			at += size
		}
		if at != end {
			t.Fatalf("blocks end at %d, not %d", at, end)
		}
		disktest.Reader(t, New(d, l), model)
	}
}

// TestBlocksRun: runs are as long as they can be.
func TestBlocksRun(t *testing.T) {
	d := known{size: 1 << 20}
	held := map[int64]bool{}
	for _, r := range [][2]int64{{8, 8}, {64, 200}, {2040, 8}} {
		d.data = append(d.data, disk.Extent{Off: r[0]*512 + 7, Len: r[1]*512 - 14})
		for i := range r[1] {
			held[r[0]+i] = true
		}
	}
	b, err := Allocated(t.Context(), d, 512)
	if err != nil {
		t.Fatal(err)
	}
	if b.Count() != int64(len(held)) || b.Len() != 2048 {
		t.Fatalf("%d of %d blocks, want %d", b.Count(), b.Len(), len(held))
	}
	place := int64(0)
	for i := range b.Len() {
		if !held[i] {
			continue
		}
		n := int64(1)
		for held[i+n] {
			n++
		}
		if block, count := b.Run(place, 1<<40); block != i || count != n {
			t.Errorf("place %d: block %d, %d of them; want %d, %d", place, block, count, i, n)
		}
		if block, count := b.Run(place, 3); block != i || count != min(3, n) {
			t.Errorf("place %d, at most 3: block %d, %d of them", place, block, count)
		}
		place++
	}
}

// known is a disk of which only the extents matter.
type known struct {
	disk.Reader
	size int64
	data []disk.Extent
}

func (k known) Size() int64                                        { return k.size }
func (k known) Extents(context.Context, int64, int64) disk.Extents { return disk.List(k.data...) }
