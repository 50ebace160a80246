package mover

import (
	"context"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// TestCompare: disks of different lengths, equal but for one byte or none.
func TestCompare(t *testing.T) {
	rnd := disktest.Rand(t)
	rounds := 30
	if testing.Short() {
		rounds = 6
	}
	for range rounds {
		short := 1 + rnd.Int64N(12<<20)
		a, b := disk.NewMem(short), disk.NewMem(short+rnd.Int64N(3)*rnd.Int64N(5<<20))
		for range rnd.IntN(6) {
			off := rnd.Int64N(short)
			p := make([]byte, 1+rnd.Int64N(min(short-off, 3<<20)))
			disktest.Fill(rnd, p)
			write(t, a, p, off)
			write(t, b, p, off)
		}
		want := int64(-1)
		for range rnd.IntN(4) {
			off := rnd.Int64N(b.Size())
			p := make([]byte, 1)
			if err := b.ReadAt(t.Context(), p, off); err != nil {
				t.Fatal(err)
			}
			p[0] ^= 1 + byte(rnd.IntN(255))
			write(t, b, p, off)
		}
		p, q := make([]byte, b.Size()), make([]byte, b.Size())
		if err := a.ReadAt(t.Context(), p[:short], 0); err != nil {
			t.Fatal(err)
		}
		if err := b.ReadAt(t.Context(), q, 0); err != nil {
			t.Fatal(err)
		}
		for i := range p {
			if p[i] != q[i] {
				want = int64(i)
				break
			}
		}
		var m Meter
		if got, err := Compare(t.Context(), a, b, &m); got != want || err != nil {
			t.Errorf("%d, %v; want %d", got, err, want)
		}
		if got, err := Compare(t.Context(), b, a, nil); got != want || err != nil {
			t.Errorf("the other way: %d, %v; want %d", got, err, want)
		}
		if p := m.Progress(); want < 0 && p.Done != p.Total {
			t.Errorf("%d of %d bytes counted", p.Done, p.Total)
		}
	}
	bad := disktest.NewFaulty(disk.NewMem(1<<20), 1)
	full := disk.NewMem(1 << 20)
	write(t, full, []byte{1}, 0)
	if _, err := Compare(t.Context(), full, bad, nil); err == nil {
		t.Error("what cannot be read is equal")
	}
}

func write(t *testing.T, d disk.Writer, p []byte, off int64) {
	t.Helper()
	if err := d.WriteAt(t.Context(), p, off); err != nil {
		t.Fatal(err)
	}
}

// blind is a disk that does not know its zeros.
type blind struct{ *disk.Mem }

func (b blind) Extents(ctx context.Context, off, n int64) disk.Extents {
	return disk.List(disk.Extent{Off: off, Len: n})
}

func TestScan(t *testing.T) {
	rnd := disktest.Rand(t)
	for range 10 {
		size := 1 + rnd.Int64N(10<<20)
		d, model := disk.NewMem(size), make([]byte, size)
		for range 3 {
			off := rnd.Int64N(size)
			p := model[off : off+1+rnd.Int64N(min(size-off, 1<<20))]
			disktest.Fill(rnd, p)
			write(t, d, p, off)
		}
		s, err := Scan(t.Context(), blind{d}, nil)
		if err != nil {
			t.Fatal(err)
		}
		disktest.Reader(t, s, model)
		want := int64(0)
		for off := int64(0); off < size; off += grain {
			if n := min(grain, size-off); !disk.IsZero(model[off : off+n]) {
				want += n
			}
		}
		if data, err := disk.DataBytes(s.Extents(t.Context(), 0, size)); data != want || err != nil {
			t.Errorf("%d bytes of data, %v; want %d", data, err, want)
		}
	}
}
