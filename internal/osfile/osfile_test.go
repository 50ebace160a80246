package osfile

import (
	"bytes"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// Pieces of all kinds, large and small, aligned and not, in parallel, are what
// is read afterwards.
func TestWriter(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewWriter(f)
	rng := rand.New(rand.NewPCG(1, 2))
	want := make([]byte, 16<<20)
	for i := range want {
		want[i] = byte(rng.Uint32())
	}
	var wg sync.WaitGroup
	for off := 0; off < len(want); {
		n := []int{1, block, large - 1, large, large + 1, large + 3*block, 2<<20 + 511}[rng.IntN(7)]
		if rng.IntN(2) == 0 { // where the next one can be a large one
			n += block - (off+n)%block
		}
		p, at := want[off:min(off+n, len(want))], int64(off)
		off += n
		wg.Go(func() {
			own := make([]byte, len(p)) // memory of its own is aligned
			copy(own, p)
			if n, err := w.WriteAt(own, at); n != len(p) || err != nil {
				t.Errorf("%d bytes at %d: %d, %v", len(p), at, n, err)
			}
		})
	}
	wg.Wait()
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes read, not what was written: %v", len(got), err)
	}
}

type refusing struct{ io.Closer }

func (refusing) WriteAt(p []byte, off int64) (int, error) {
	return 0, &os.PathError{Op: "write", Err: errDirect}
}

// A file that was opened for the page cache and whose direct writes are refused
// is written all the same.
func TestRefused(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := NewWriter(f)
	w.open.Do(func() { w.direct = refusing{} })
	p := bytes.Repeat([]byte("holdfast"), large/4)
	if n, err := w.WriteAt(p, 0); n != len(p) || err != nil {
		t.Fatal(n, err)
	}
	if got, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(got, p) {
		t.Error(len(got), err)
	}
}
