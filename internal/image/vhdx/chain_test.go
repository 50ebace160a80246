package vhdx

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

// TestChains builds chains with all states of blocks, parents of other sizes
// and block sizes, and sector bitmaps, and compares them with the model and
// with 7-Zip. (Bug classes 4 to 8, 17, 22.)
func TestChains(t *testing.T) {
	long(t)
	rnd := disktest.Rand(t)
	for i := range 6 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			dir, sector := t.TempDir(), []int64{512, 4096}[i%2]
			anchored, same := i >= 4, i < 4 // other readers know the plain cases
			var parent *build
			name, size := "", int64(0)
			for level := range 3 {
				if size == 0 || !same {
					size = 3<<20 + 8*sector*rnd.Int64N(1500)
				}
				o := buildOptions{size: size, block: 1 << 20 << rnd.IntN(3), sector: sector, parent: parent, parentName: name}
				b := newBuild(t, rnd, o)
				b.coarse = i%3 == 0
				for n := range b.g.blocks {
					states := []uint64{blockNotPresent, blockNotPresent, blockZero, blockUnmapped, blockUndefined, blockPresent}
					if !anchored {
						states = []uint64{blockNotPresent, blockNotPresent, blockZero, blockPresent}
					}
					if parent != nil {
						states = append(states, blockPartial, blockPartial)
					}
					b.block(n, states[rnd.IntN(len(states))], anchored)
				}
				name = fmt.Sprintf("l%d.avhdx", level)
				save(t, b.file(), filepath.Join(dir, name))
				c := openChain(t, dir, name)
				if len(c.Files()) != level+1 {
					t.Fatalf("files %v", c.Files())
				}
				compare(t, c, bytesOf(t, b.model, size), rnd)
				for _, p := range problems(t, c.Layers()[0]) {
					t.Errorf("check: %s", p)
				}
				parent = b
			}
			if anchored {
				return
			}
			t.Run("7z", func(t *testing.T) {
				if !bytes.Equal(sevenZip(t, filepath.Join(dir, name)), bytesOf(t, parent.model, size)) {
					t.Error("it reads something else")
				}
			})
		})
	}
}

// TestOverOneChunk: the BAT's entries of sector bitmaps lie between those of
// blocks. (Bug class 8.)
func TestOverOneChunk(t *testing.T) {
	rnd, dir := disktest.Rand(t), t.TempDir()
	size := int64(8<<30 + 5<<20 + 512)
	base := newBuild(t, rnd, buildOptions{size: size, block: 2 << 20, sector: 512})
	for _, n := range []int64{0, 2046, 2047, 2048, 2049, 4095, 4096, 4098} {
		base.block(n, blockPresent, false)
	}
	child := newBuild(t, rnd, buildOptions{size: size, block: 1 << 20, sector: 512, parent: base, parentName: "base.vhdx"})
	child.coarse = true
	for _, n := range []int64{4094, 4095, 4096, 4097, 8191, 8192, 8196, 8197} {
		child.block(n, []uint64{blockPartial, blockPartial, blockPresent}[n%3], false)
	}
	save(t, base.file(), filepath.Join(dir, "base.vhdx"))
	save(t, child.file(), filepath.Join(dir, "child.avhdx"))
	for name, b := range map[string]*build{"base.vhdx": base, "child.avhdx": child} {
		parts := []disk.Extent{{Off: 0, Len: 3 << 20}, {Off: 4<<30 - 6<<20, Len: 12 << 20}, {Off: 8<<30 - 3<<20, Len: 8 << 20}}
		checkParts(t, openChain(t, dir, name), b.model, parts)
	}
}

// TestParents: which file is taken for the parent. (Bug class 21: both ids
// count, a zero one never does.)
func TestParents(t *testing.T) {
	rnd, dir := disktest.Rand(t), t.TempDir()
	o := buildOptions{size: 4 << 20, block: 1 << 20, sector: 512}
	base, other := newBuild(t, rnd, o), newBuild(t, rnd, o)
	base.block(1, blockPresent, false)
	other.id = guid{}
	other.both(32, make([]byte, 16))
	o4 := o
	o4.sector = 4096
	base4 := newBuild(t, rnd, o4)
	save(t, base.file(), filepath.Join(dir, "base.vhdx"))
	save(t, other.file(), filepath.Join(dir, "zero.vhdx"))
	save(t, base4.file(), filepath.Join(dir, "4k.vhdx"))
	id, zero, wrong := base.id.String(), guid{}.String(), "01234567-89ab-cdef-0123-456789abcdef"
	for i, c := range []struct {
		pairs [][2]string
		want  error
	}{
		{[][2]string{{keyLinkage, "{" + id + "}"}, {keyRelative, `.\base.vhdx`}}, nil},
		{[][2]string{{keyLinkage, strings.ToUpper(id)}, {keyRelative, `base.vhdx`}}, nil},
		{[][2]string{{keyLinkage, wrong}, {keyLinkage2, id}, {keyRelative, `base.vhdx`}}, nil},
		{[][2]string{{keyLinkage, id}, {keyLinkage2, wrong}, {keyRelative, `base.vhdx`}}, nil},
		{[][2]string{{keyLinkage, id}, {keyRelative, `..\elsewhere\base.vhdx`}}, nil},
		{[][2]string{{keyLinkage, id}, {keyAbsolute, `D:\x\base.vhdx`}}, nil},
		{[][2]string{{keyLinkage, id}, {keyVolume, `\\?\Volume{x}\base.vhdx`}, {keyRelative, `C:\zero.vhdx`}}, nil},
		{[][2]string{{keyLinkage, wrong}, {keyRelative, `base.vhdx`}}, image.ErrParent},
		{[][2]string{{keyLinkage, id}, {keyRelative, `zero.vhdx`}}, image.ErrParent},
		{[][2]string{{keyLinkage, wrong}, {keyLinkage2, zero}, {keyRelative, `zero.vhdx`}}, image.ErrParent},
		{[][2]string{{keyLinkage, zero}, {keyRelative, `zero.vhdx`}}, image.ErrFormat},
		{[][2]string{{keyLinkage, id}, {keyRelative, `nowhere.vhdx`}}, os.ErrNotExist},
		{[][2]string{{keyLinkage, id}, {keyRelative, `..\..\`}}, image.ErrOutside},
		{[][2]string{{keyLinkage, id}}, image.ErrParent},
		{[][2]string{{keyLinkage, base4.id.String()}, {keyRelative, `4k.vhdx`}}, image.ErrFormat},
	} {
		o.parent, o.locator = base, c.pairs
		name := fmt.Sprintf("child%d.avhdx", i)
		save(t, newBuild(t, rnd, o).file(), filepath.Join(dir, name))
		if c.want == nil {
			compare(t, openChain(t, dir, name), bytesOf(t, base.model, o.size), rnd)
			continue
		}
		f, err := in(dir)(t.Context(), "x", name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := formats.Open(t.Context(), f, Name, in(dir)); !errors.Is(err, c.want) {
			t.Errorf("%v: %v, want %v", c.pairs, err, c.want)
		}
	}
}
