package disk_test

import (
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// E makes a data extent, Z a zero extent.
func E(off, n int64) disk.Extent { return disk.Extent{Off: off, Len: n} }
func Z(off, n int64) disk.Extent { return disk.Extent{Off: off, Len: n, Zero: true} }

func TestAlign(t *testing.T) {
	for _, c := range []struct {
		in, want []disk.Extent
	}{
		{nil, nil},
		{[]disk.Extent{E(5, 1)}, []disk.Extent{E(0, 64)}},
		{[]disk.Extent{E(5, 1), E(7, 1)}, []disk.Extent{E(0, 64)}},
		{[]disk.Extent{E(5, 60)}, []disk.Extent{E(0, 128)}},
		{[]disk.Extent{E(64, 64), E(128, 1)}, []disk.Extent{E(64, 128)}},
		{[]disk.Extent{Z(0, 64), Z(64, 64)}, []disk.Extent{Z(0, 128)}},
		{[]disk.Extent{Z(0, 40), Z(40, 24)}, []disk.Extent{Z(0, 64)}},
		{[]disk.Extent{Z(0, 40), E(40, 24)}, []disk.Extent{E(0, 64)}},
		{[]disk.Extent{Z(0, 40), Z(50, 14)}, []disk.Extent{E(0, 64)}}, // nothing is known of the gap
		{[]disk.Extent{Z(10, 200)}, []disk.Extent{E(0, 64), Z(64, 128), E(192, 64)}},
		{[]disk.Extent{E(0, 10), Z(10, 290)}, []disk.Extent{E(0, 64), Z(64, 236)}}, // the last piece is short
		{[]disk.Extent{E(299, 1)}, []disk.Extent{E(256, 44)}},
		{[]disk.Extent{Z(256, 44)}, []disk.Extent{Z(256, 44)}},
		{[]disk.Extent{Z(256, 43)}, []disk.Extent{E(256, 44)}},
	} {
		got, err := disk.Collect(disk.Align(disk.List(c.in...), 64, 300))
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%v: got %v, %v, want %v", c.in, got, err, c.want)
		}
	}
}

func TestAlignRefuses(t *testing.T) {
	for _, c := range []struct {
		in   []disk.Extent
		want error
	}{
		{[]disk.Extent{E(0, 301)}, disk.ErrRange},
		{[]disk.Extent{E(0, 10), E(5, 10)}, disk.ErrOrder},
		{[]disk.Extent{E(100, 10), E(5, 10)}, disk.ErrOrder},
		{[]disk.Extent{E(-1, 10)}, disk.ErrOrder},
		{[]disk.Extent{E(0, 0)}, disk.ErrOrder},
		{[]disk.Extent{E(5, -1)}, disk.ErrOrder},
		{[]disk.Extent{E(1<<63-10, 100)}, disk.ErrOrder},
	} {
		if got, err := disk.Collect(disk.Align(disk.List(c.in...), 64, 300)); !errors.Is(err, c.want) {
			t.Errorf("%v: got %v, %v, want %v", c.in, got, err, c.want)
		}
	}
	// An error of the source comes through, after what was before it.
	boom := errors.New("boom")
	got, err := disk.Collect(disk.Align(func(yield func(disk.Extent, error) bool) {
		_ = yield(E(0, 1), nil) && yield(disk.Extent{}, boom)
	}, 64, 300))
	if !errors.Is(err, boom) || !slices.Equal(got, []disk.Extent{E(0, 64)}) {
		t.Errorf("got %v, %v", got, err)
	}
}

// TestAlignRandom compares Align with its definition, piece by piece.
func TestAlignRandom(t *testing.T) {
	r := disktest.Rand(t)
	for range 2000 {
		size := 1 + r.Int64N(400)
		align := 1 + r.Int64N(70)
		list, state := randomExtents(r, size)
		var want []disk.Extent
		for off := int64(0); off < size; off += align {
			piece := state[off:min(off+align, size)]
			touched := slices.ContainsFunc(piece, func(b byte) bool { return b != '.' })
			if touched {
				zero := !slices.ContainsFunc(piece, func(b byte) bool { return b != 'z' })
				want = append(want, disk.Extent{Off: off, Len: int64(len(piece)), Zero: zero})
			}
		}
		want, _ = disk.Collect(disk.Merge(disk.List(want...)))
		got, err := disk.Collect(disk.Align(disk.List(list...), align, size))
		if err != nil || !slices.Equal(got, want) {
			t.Fatalf("align %d of %d: %v:\ngot  %v, %v\nwant %v", align, size, list, got, err, want)
		}
		for n := range got { // stopping early is in order
			for range disk.Align(disk.List(list...), align, size) {
				if n--; n <= 0 {
					break
				}
			}
		}
	}
}

func randomExtents(r *rand.Rand, size int64) ([]disk.Extent, []byte) {
	state := make([]byte, size)
	for i := range state {
		state[i] = '.'
	}
	var list []disk.Extent
	for at := int64(0); at < size; {
		n := 1 + r.Int64N(min(80, size-at))
		if k := r.IntN(3); k > 0 {
			list = append(list, disk.Extent{Off: at, Len: n, Zero: k == 1})
			for i := range n {
				state[at+i] = "xzd"[k]
			}
		}
		at += n
	}
	return list, state
}

func TestClip(t *testing.T) {
	in := disk.List(E(0, 10), Z(20, 10), E(30, 10))
	got, err := disk.Collect(disk.Clip(in, 5, 27))
	if want := []disk.Extent{E(5, 5), Z(20, 10), E(30, 2)}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	if sum, err := disk.DataBytes(in); sum != 20 || err != nil {
		t.Errorf("%d data bytes, %v", sum, err)
	}
}
