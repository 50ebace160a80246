package vhd

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

// makeChain saves 0.vhd, of any kind, and children to depth.vhd above it. It
// returns what the last reads as. Of like usual and groups count.
func makeChain(t testing.TB, rnd *rand.Rand, dir string, depth int, like plan) []byte {
	t.Helper()
	size := func() int64 { return 512 * (1 + rnd.Int64N(9000)) }
	id := randomID(rnd)
	var under []byte
	if n := size(); rnd.IntN(3) == 0 {
		under = make([]byte, n)
		disktest.Fill(rnd, under)
		v, err := NewView(t.Context(), memOf(t, under), ViewOptions{Kind: Fixed, ID: id})
		if err != nil {
			t.Fatal(err)
		}
		save(t, v, filepath.Join(dir, "0.vhd"))
	} else {
		x := build(rnd, plan{kind: kindDynamic, size: n, block: 512 << 10 << (2 * rnd.IntN(2)), id: id, full: 70, usual: like.usual})
		x.save(t, dir, "0.vhd")
		under = x.disk
	}
	for i := 1; i <= depth; i++ {
		parent := fmt.Sprintf("%d.vhd", i-1)
		p := plan{kind: kindDifferencing, size: int64(len(under)), block: 512 << 10 << (2 * rnd.IntN(2)), parent: id, full: 60, usual: like.usual, groups: like.groups, name: parent}
		if !like.usual { // others take all of a chain to have one size
			p.size = size()
			p.cut = rnd.IntN(2) == 0
		}
		p.id, p.under = randomID(rnd), under[:min(int64(len(under)), p.size)]
		p.locators = []locator{{"W2ku", `C:\VMs\` + parent}, {"W2ru", `.\` + parent}}
		x := build(rnd, p)
		x.save(t, dir, fmt.Sprintf("%d.vhd", i))
		id, under = p.id, x.disk
	}
	return under
}

// TestChains: differencing images with blocks of 512 KiB and 2 MiB, above
// parents of other sizes, against a model.
func TestChains(t *testing.T) {
	rnd := disktest.Rand(t)
	rounds := 6
	if testing.Short() {
		rounds = 2
	}
	for range rounds {
		dir, depth := t.TempDir(), 1+rnd.IntN(4)
		want := makeChain(t, rnd, dir, depth, plan{})
		c := openChain(t, dir, fmt.Sprintf("%d.vhd", depth))
		if len(c.Files()) != depth+1 {
			t.Fatalf("files %v", c.Files())
		}
		disktest.Reader(t, c, want)
		for i, l := range c.Layers() {
			for _, p := range problems(t, l) {
				if !strings.Contains(p, "belong to nothing") { // a gap before the first block
					t.Errorf("%s: %s", c.Files()[i], p)
				}
			}
		}
	}
}

// TestBlockSizes: all that are read, and bitmaps of several sectors.
func TestBlockSizes(t *testing.T) {
	rnd := disktest.Rand(t)
	for block := int64(minBlock); block <= 8<<20; block *= 2 {
		p := plan{kind: kindDifferencing, size: 512 * (1 + rnd.Int64N(8000)), block: block, id: randomID(rnd), parent: randomID(rnd), full: 80}
		x := build(rnd, p) // above no parent, so that what is absent reads as zeros
		im, err := openBytes(t, x.b)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, p.size)
		if err := im.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, x.disk) {
			t.Errorf("blocks of %d: %v", block, err)
		}
	}
}

func TestSectors(t *testing.T) {
	rnd := disktest.Rand(t)
	for range 2000 {
		b := make([]byte, 1+rnd.IntN(6))
		for i := range b {
			b[i] = []byte{0, 0xff, 0xff, byte(rnd.Uint32())}[rnd.IntN(4)]
		}
		bit := func(i int) bool { return b[i/8]>>(7-i%8)&1 == 1 }
		i := rnd.IntN(len(b) * 8)
		n := 1
		for i+n < len(b)*8 && bit(i+n) == bit(i) {
			n++
		}
		if here, count := sectors(b, int64(i)); here != bit(i) || count != int64(n) {
			t.Fatalf("%x from %d on: %v for %d, want %v for %d", b, i, here, count, bit(i), n)
		}
	}
}

// TestAbsentIsNotZero: what a differencing image does not hold is the
// parent's, what a dynamic one does not is zeros.
func TestAbsentIsNotZero(t *testing.T) {
	rnd := disktest.Rand(t)
	for kind, want := range map[uint32]image.State{kindDynamic: image.Zero, kindDifferencing: image.Absent} {
		im, err := openBytes(t, build(rnd, plan{kind: kind, size: 9 << 20, block: 2 << 20, parent: [16]byte{1}}).b)
		if err != nil {
			t.Fatal(err)
		}
		for r, err := range im.Runs(t.Context(), 5, 8<<20) {
			if err != nil || r != (image.Run{Off: 5, Len: 8 << 20, State: want}) {
				t.Errorf("%+v, %v", r, err)
			}
		}
	}
}

func TestNames(t *testing.T) {
	rnd := disktest.Rand(t)
	w := func(code, text string) locator { return locator{code, text} }
	for _, c := range []struct {
		name     string
		locators []locator
		want     []string
	}{
		{"", nil, nil},
		{`C:\a\b.vhd`, nil, []string{"b.vhd"}},
		{"b.vhd", nil, []string{"b.vhd"}},
		{`C:\z\other.vhd`, []locator{w("W2ku", `D:\vm\base.vhd`), w("W2ru", `.\base.vhd`)}, []string{"base.vhd", "other.vhd"}},
		{"", []locator{w("MacX", "file://./x%20y.vhd"), w("W2ku", `\\server\share\k.vhd`), w("W2ru", `..\up\r.vhd`)}, []string{"../up/r.vhd", "r.vhd", "k.vhd", "x y.vhd"}},
		{"", []locator{w("W2ru", `C:\abs\r.vhd`)}, []string{"r.vhd"}},
		{"", []locator{w("W2ru", `C:r.vhd`)}, []string{"r.vhd"}},
		{"", []locator{w("W2ru", `\\?\Volume{1}\r.vhd`)}, []string{"r.vhd"}},
		{"", []locator{w("W2ru", `Zoë\日本.vhd`)}, []string{"Zoë/日本.vhd", "日本.vhd"}},
		{"n.vhd", []locator{w("W2ru", `..`), w("W2ku", `C:\`)}, []string{"n.vhd"}},
		{"n.vhd", []locator{w("Wi2r", `.\old.vhd`), w("Wi2k", `C:\x\old2.vhd`), w("Mac ", "\x01\x02"), w("Zzzz", "x.vhd")}, []string{"old.vhd", "n.vhd", "old2.vhd"}},
		{"n.vhd", []locator{w("MacX", "file://%zz"), w("MacX", "http://host/x.vhd"), w("MacX", "file:///a%00b.vhd"), w("Wi2r", "\xff\xfe.vhd")}, []string{"n.vhd"}},
	} {
		x := build(rnd, plan{kind: kindDifferencing, size: 1 << 20, block: 2 << 20, id: [16]byte{1}, parent: [16]byte{2, 0xab}, name: c.name, locators: c.locators})
		im, err := openBytes(t, x.b)
		if err != nil {
			t.Fatal(err)
		}
		i := im.Info()
		if !slices.Equal(i.Parent.Names, c.want) {
			t.Errorf("%q %q: names %q, want %q", c.name, c.locators, i.Parent.Names, c.want)
		}
		if i.DataID != "01000000-0000-0000-0000-000000000000" || !slices.Equal(i.Parent.IDs, []string{"02ab0000-0000-0000-0000-000000000000"}) ||
			i.Parent.Format != Name || i.DiskID != "" || i.Variant != "differencing" || i.Block != 2<<20 || i.LogicalSector != 512 {
			t.Errorf("info %+v", i)
		}
	}
}

func TestParentsThatAreRefused(t *testing.T) {
	rnd, dir := disktest.Rand(t), t.TempDir()
	child := func(name string, parent byte, locators ...locator) {
		build(rnd, plan{kind: kindDifferencing, size: 1 << 20, block: 2 << 20, id: [16]byte{9}, parent: [16]byte{parent}, locators: locators}).save(t, dir, name)
	}
	build(rnd, plan{kind: kindDynamic, size: 1 << 20, block: 2 << 20, id: [16]byte{1}}).save(t, dir, "base.vhd")
	child("good.vhd", 1, locator{"W2ru", `.\base.vhd`})
	child("second.vhd", 1, locator{"W2ru", `.\gone.vhd`}, locator{"W2ku", `C:\x\base.vhd`})
	child("other.vhd", 2, locator{"W2ru", `.\base.vhd`})
	child("self.vhd", 9, locator{"W2ru", `.\self.vhd`})
	child("missing.vhd", 1, locator{"W2ru", `.\gone.vhd`})
	child("nameless.vhd", 1)
	child("outside.vhd", 1, locator{"W2ru", `..\..\etc\base.vhd`}) // is here by its last element
	child("zero.vhd", 0, locator{"W2ru", `.\base.vhd`})
	child("raw.vhd", 1, locator{"W2ru", `.\raw`})
	if err := os.WriteFile(filepath.Join(dir, "raw"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]error{
		"good.vhd": nil, "second.vhd": nil, "outside.vhd": nil,
		"other.vhd": image.ErrParent, "self.vhd": image.ErrFormat, "missing.vhd": os.ErrNotExist, "nameless.vhd": image.ErrParent,
		"zero.vhd": image.ErrUnsupported, "raw.vhd": image.ErrFormat,
	} {
		f, err := in(dir)(t.Context(), "x", name)
		if err != nil {
			t.Fatal(err)
		}
		c, err := formats.Open(t.Context(), f, Name, in(dir))
		if !errors.Is(err, want) || want == nil && err != nil {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
		if err == nil {
			c.Close()
		}
	}
}

// TestMatch: the footer decides, not what a guest wrote at the beginning.
func TestMatch(t *testing.T) {
	rnd := disktest.Rand(t)
	guest := make([]byte, 1<<20)
	copy(guest, "QFI\xfb\x00\x00\x00\x03")
	fixed := viewBytes(t, guest, ViewOptions{Kind: Fixed})
	dynamic := build(rnd, plan{kind: kindDynamic, size: 3 << 20, block: 2 << 20, full: 50}).b
	// A guest's disk that begins, or ends, as a dynamic image would.
	begins, ends := make([]byte, 1<<20), make([]byte, 1<<20)
	copy(begins, dynamic[:2048])
	copy(ends[1<<20-512:], dynamic[:512])
	damaged := bytes.Clone(fixed)
	damaged[len(damaged)-100]++
	for name, c := range map[string]struct {
		b    []byte
		want string
	}{
		"fixed": {fixed, Name}, "fixed, 511 bytes of footer": {fixed[:len(fixed)-1], Name}, "dynamic": {dynamic, Name},
		"begins": {begins, ""}, "ends": {ends, ""}, "damaged": {damaged, ""},
		"empty": {nil, ""}, "one sector": {make([]byte, 512), ""}, "short": {make([]byte, 510), ""},
	} {
		got, err := formats.Probe(t.Context(), memOf(t, c.b))
		if err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, c.want)
		}
	}
	im, err := openBytes(t, fixed[:len(fixed)-1])
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, im.Info().Size)
	if err := im.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, guest) {
		t.Errorf("511 bytes of footer: %v", err)
	}
}

// TestFixedKnowsHoles: of a sparse file.
func TestFixedKnowsHoles(t *testing.T) {
	m := disk.NewMem(64 << 20)
	v, err := NewView(t.Context(), m, ViewOptions{Kind: Fixed})
	if err != nil {
		t.Fatal(err)
	}
	im, err := Open(t.Context(), image.File{Disk: v}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for r, err := range im.Runs(t.Context(), 0, 64<<20) {
		if err != nil || r != (image.Run{Len: 64 << 20, State: image.Zero}) {
			t.Errorf("%+v, %v", r, err)
		}
	}
}
