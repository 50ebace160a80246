package vhd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

// small is a dynamic or differencing image of 61 KiB in blocks of 4 KiB, all
// of them there.
func small(kind uint32) *built { return smallOf(kind, 61<<10) }

func smallOf(kind uint32, size int64) *built {
	return build(rand.New(rand.NewPCG(1, 1)), plan{
		kind: kind, size: size, block: 4 << 10, id: [16]byte{1}, parent: [16]byte{2}, full: 100, usual: true, tight: true,
		name: "n.vhd", locators: []locator{{"W2ru", `.\r.vhd`}, {"W2ku", `C:\k.vhd`}, {"MacX", "file:///m.vhd"}},
	})
}

func (x *built) entry(i int64) []byte    { return x.b[x.table+i*4:][:4] }
func (x *built) set(i int64, s uint32)   { binary.BigEndian.PutUint32(x.entry(i), s) }
func (x *built) at(i int64) uint32       { return binary.BigEndian.Uint32(x.entry(i)) }
func (x *built) put32(at int, v uint32)  { binary.BigEndian.PutUint32(x.b[x.header:][at:], v); x.seal() }
func (x *built) put64(at int, v uint64)  { binary.BigEndian.PutUint64(x.b[x.header:][at:], v); x.seal() }
func (x *built) foot32(at int, v uint32) { binary.BigEndian.PutUint32(x.foot()[at:], v); x.seal() }
func (x *built) foot64(at int, v uint64) { binary.BigEndian.PutUint64(x.foot()[at:], v); x.seal() }

// walk opens an image and reads all that it will give, but for what is beyond
// the first two hundred runs.
func walk(ctx context.Context, d disk.Reader) (*Image, error) {
	im, err := Open(ctx, image.File{Name: "test.vhd", Disk: d}, nil)
	if err != nil {
		return nil, err
	}
	if err := im.Check(ctx, func(string) {}); err != nil {
		return im, fmt.Errorf("check: %w", err)
	}
	p := make([]byte, 16<<10)
	at, runs := int64(0), 0
	for r, err := range im.Runs(ctx, 0, im.size) {
		switch {
		case err != nil:
			return im, err
		case r.Off != at || r.Len <= 0 || r.End() > im.size:
			return im, fmt.Errorf("run %+v at %d of %d", r, at, im.size)
		}
		if err := im.ReadAt(ctx, p[:min(r.Len, int64(len(p)))], r.Off); err != nil {
			return im, err
		}
		if at = r.End(); runs > 200 {
			return im, nil
		}
		runs++
	}
	if at != im.size {
		return im, fmt.Errorf("the runs end at %d of %d", at, im.size)
	}
	return im, nil
}

func TestHostileImages(t *testing.T) {
	for _, kind := range []uint32{kindDynamic, kindDifferencing} {
		if im, err := walk(t.Context(), memOf(t, small(kind).b)); err != nil || len(im.warnings) != 0 {
			t.Fatalf("the image itself is not good: %v %q", err, im.warnings)
		}
	}
	F, U := image.ErrFormat, image.ErrUnsupported
	for name, c := range map[string]struct {
		do   func(x *built)
		want string // part of the error
		is   error
	}{
		"empty file":              {func(x *built) { x.b = nil }, "does not end with one", F},
		"510 bytes":               {func(x *built) { x.b = x.foot()[2:] }, "does not end with one", F},
		"nothing but a footer":    {func(x *built) { x.b = x.foot() }, "truncated", F},
		"both footers damaged":    {func(x *built) { x.b[70]++; x.foot()[70]++ }, "does not end with one", F},
		"copy of a fixed image":   {func(x *built) { binary.BigEndian.PutUint32(x.b[60:], 2); x.seal(); x.foot()[0]++ }, "does not end with one", F},
		"version 2":               {func(x *built) { x.foot32(12, 2<<16) }, "version 0x20000", U},
		"version 1.1":             {func(x *built) { x.foot32(12, 1<<16|1) }, "version 0x10001", U},
		"type 0":                  {func(x *built) { x.foot32(60, 0) }, "disk type 0", U},
		"type 5":                  {func(x *built) { x.foot32(60, 5) }, "disk type 5", U},
		"saved state":             {func(x *built) { x.foot()[84] = 1; x.seal() }, "saved state", U},
		"size 0":                  {func(x *built) { x.foot64(48, 0) }, "current size", F},
		"size of 2^63":            {func(x *built) { x.foot64(48, 1<<63) }, "current size", F},
		"size beyond the BAT":     {func(x *built) { x.foot64(48, 65<<10) }, "do not hold", F},
		"fixed, too large":        {func(x *built) { x.foot64(48, uint64(len(x.b))); x.foot32(60, 2) }, "truncated", F},
		"header at the copy":      {func(x *built) { x.foot64(16, 0) }, "dynamic header", F},
		"header in the copy":      {func(x *built) { x.foot64(16, 511) }, "dynamic header", F},
		"header beyond the end":   {func(x *built) { x.foot64(16, uint64(len(x.b)-512)) }, "truncated", F},
		"header at 2^64":          {func(x *built) { x.foot64(16, ^uint64(0)) }, "dynamic header", F},
		"header elsewhere":        {func(x *built) { x.foot64(16, 1536) }, "is something else", F},
		"header checksum":         {func(x *built) { x.b[x.header+1000]++ }, "its checksum", F},
		"header version":          {func(x *built) { x.put32(24, 2<<16) }, "version 0x20000", U},
		"BAT at 2^64":             {func(x *built) { x.put64(16, ^uint64(0)) }, "BAT", F},
		"BAT beyond the end":      {func(x *built) { x.put64(16, uint64(len(x.b)-512-60)) }, "truncated", F},
		"BAT in the copy":         {func(x *built) { x.put64(16, 500) }, "BAT", F},
		"BAT is the header":       {func(x *built) { x.put64(16, uint64(x.header+1020)) }, "overlaps the dynamic header", F},
		"BAT of 2^32 entries":     {func(x *built) { x.put32(28, 1<<32-1) }, "BAT", F},
		"no BAT entries":          {func(x *built) { x.put32(28, 0) }, "do not hold", F},
		"too few BAT entries":     {func(x *built) { x.put32(28, 15) }, "do not hold", F},
		"block size 0":            {func(x *built) { x.put32(32, 0) }, "not a power of two", F},
		"block size 6 KiB":        {func(x *built) { x.put32(32, 6<<10) }, "not a power of two", F},
		"block size 2 KiB":        {func(x *built) { x.put32(32, 2<<10); x.put32(28, 100) }, "are read", U},
		"block size 2 GiB":        {func(x *built) { x.put32(32, 1<<31) }, "are read", U},
		"too many blocks":         {func(x *built) { x.put32(28, 1<<30); x.foot64(48, 1<<40) }, "blocks of 4096 bytes", U},
		"block at 0":              {func(x *built) { x.set(3, 0) }, "overlaps the footer's copy", F},
		"block at the header":     {func(x *built) { x.set(3, 1) }, "overlaps the dynamic header", F},
		"block at its end":        {func(x *built) { x.set(3, 2) }, "overlaps the dynamic header", F},
		"block at the BAT":        {func(x *built) { x.set(3, uint32(x.table/512)) }, "overlaps the BAT", F},
		"block before the BAT":    {func(x *built) { x.set(3, uint32(x.table/512)-1) }, "overlaps the BAT", F},
		"block at the footer":     {func(x *built) { x.set(3, uint32(len(x.b)/512-1)) }, "truncated", F},
		"block over the footer":   {func(x *built) { x.set(3, uint32(len(x.b)/512-9)) }, "truncated", F},
		"block beyond the end":    {func(x *built) { x.set(3, uint32(len(x.b)/512)) }, "truncated", F},
		"block at 2^31":           {func(x *built) { x.set(3, 1<<31) }, "truncated", F},
		"block at 2^32-2":         {func(x *built) { x.set(3, none-1) }, "truncated", F},
		"a block twice":           {func(x *built) { x.set(3, x.at(4)) }, "overlaps", F},
		"blocks overlap":          {func(x *built) { x.set(3, x.at(4)+8) }, "overlaps", F},
		"blocks overlap, before":  {func(x *built) { x.set(3, x.at(4)-8) }, "overlaps", F},
		"the last block overlaps": {func(x *built) { x.set(15, x.at(4)+8) }, "overlaps the last block", F},
	} {
		t.Run(name, func(t *testing.T) {
			x := small(kindDynamic)
			// Far from everything, so that only the thing itself is wrong.
			x.b = append(x.b[:len(x.b)-512], append(make([]byte, 8<<10), x.foot()...)...)
			c.do(x)
			_, err := walk(t.Context(), memOf(t, x.b))
			if err == nil || !strings.Contains(err.Error(), c.want) || !errors.Is(err, c.is) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// TestLastBlock may be cut where the disk ends, not before.
func TestLastBlock(t *testing.T) {
	p := plan{kind: kindDynamic, size: 5<<10 + 512, block: 4 << 10, full: 100, cut: true}
	for seed := range uint64(20) {
		x := build(rand.New(rand.NewPCG(seed, 0)), p)
		im, err := openBytes(t, x.b)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, p.size)
		if err := im.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, x.disk) {
			t.Fatalf("wrong content: %v", err)
		}
		foot := x.foot()
		if _, err := openBytes(t, append(bytes.Clone(x.b[:len(x.b)-1024]), foot...)); !errors.Is(err, image.ErrFormat) {
			t.Errorf("cut one sector earlier: %v", err)
		}
	}
}

// TestFileThatShrinks behind an open image is an error, not zeros.
func TestFileThatShrinks(t *testing.T) {
	x := small(kindDynamic)
	im, err := openBytes(t, x.b)
	if err != nil {
		t.Fatal(err)
	}
	im.file = memOf(t, x.b[:len(x.b)-2048])
	if err := im.ReadAt(t.Context(), make([]byte, im.size), 0); !errors.Is(err, disk.ErrRange) {
		t.Errorf("error %v", err)
	}
}

// TestReadErrors: whatever read of the file fails, it is told.
func TestReadErrors(t *testing.T) {
	for _, b := range [][]byte{small(kindDynamic).b, small(kindDifferencing).b, viewBytes(t, make([]byte, 1000), ViewOptions{Kind: Fixed})} {
		count := disktest.NewFaulty(memOf(t, b), 0)
		if _, err := walk(t.Context(), count); err != nil {
			t.Fatal(err)
		}
		for n := range count.Calls() {
			if _, err := walk(t.Context(), disktest.NewFaulty(memOf(t, b), n+1)); !errors.Is(err, disktest.ErrInjected) {
				t.Errorf("read %d of %d fails: %v", n+1, count.Calls(), err)
			}
		}
	}
	faulty := disktest.NewFaulty(disk.NewMem(1<<20), 1)
	if _, err := NewView(t.Context(), faulty, ViewOptions{}); !errors.Is(err, disktest.ErrInjected) {
		t.Errorf("a view: %v", err)
	}
	if _, err := match(t.Context(), disktest.NewFaulty(memOf(t, small(kindDynamic).b), 2)); !errors.Is(err, disktest.ErrInjected) {
		t.Errorf("match: %v", err)
	}
}

// TestOverlaps: the search for overlaps in bounded memory finds what comparing
// each block with each other one does, also where one piece of the search
// ends and the next begins.
func TestOverlaps(t *testing.T) {
	rnd := disktest.Rand(t)
	const block, lead, count = 4 << 10, 512, 12
	const edge = cellsAtOnce * (block + lead) / 512 // sector
	file := disk.NewMem(3*edge*512 + 4096)
	found := 0
	for range 150 {
		im := &Image{file: file, size: count*block - 512*rnd.Int64N(8), end: file.Size(), h: &header{tableOffset: 2048, entries: count, block: block}}
		im.f.dataOffset = 512
		table, starts := make([]byte, count*4), make([]int64, count)
		for i := range starts {
			near := []int64{100, edge, edge, 2 * edge}[rnd.IntN(4)]
			starts[i] = near + rnd.Int64N(40*9) - 8
			if rnd.IntN(4) == 0 {
				starts[i] = -1
			}
			binary.BigEndian.PutUint32(table[i*4:], uint32(starts[i]))
		}
		if err := file.WriteAt(t.Context(), table, 2048); err != nil {
			t.Fatal(err)
		}
		want := false
		for i, a := range starts {
			for j, b := range starts {
				if i != j && a >= 0 && b >= 0 && a*512 < b*512+im.length(int64(j)) && b*512 < a*512+im.length(int64(i)) {
					want = true
				}
			}
		}
		err := im.checkTable(t.Context())
		if (err != nil) != want || err != nil && !errors.Is(err, image.ErrFormat) {
			t.Fatalf("blocks at sectors %d of a disk of %d bytes: %v, want %v", starts, im.size, err, want)
		}
		if want {
			found++
		}
	}
	if found < 10 || found > 140 {
		t.Errorf("%d of 150 overlap: nothing is tested", found)
	}
}

// TestBitFlips: of the footer, its copy, the header and the BAT.
func TestBitFlips(t *testing.T) {
	x := smallOf(kindDynamic, 64<<10)
	read := func(b []byte) ([]byte, *Image, error) {
		im, err := openBytes(t, b)
		if err != nil {
			return nil, nil, err
		}
		got := make([]byte, im.size)
		return got, im, im.ReadAt(t.Context(), got, 0)
	}
	flip := func(from, to int64, do func(at int64, got []byte, im *Image, err error)) {
		for at := from; at < to; at++ {
			for bit := range 8 {
				if at < x.table && at%8 != int64(bit) {
					continue // one bit of each byte will do
				}
				x.b[at] ^= 1 << bit
				got, im, err := read(x.b)
				do(at, got, im, err)
				x.b[at] ^= 1 << bit
			}
		}
	}
	spare := func(at int64, got []byte, im *Image, err error) {
		if err != nil || !bytes.Equal(got, x.disk) || len(im.Info().Warnings) == 0 {
			t.Errorf("a bit of byte %d: %v", at, err)
		}
	}
	flip(int64(len(x.b))-512, int64(len(x.b)), spare)
	flip(0, 512, spare)
	flip(x.header, x.header+1024, func(at int64, _ []byte, _ *Image, err error) {
		if !errors.Is(err, image.ErrFormat) {
			t.Errorf("a bit of byte %d of the header: %v", at-x.header, err)
		}
	})
	// All of the file is in use, so that a block cannot be elsewhere.
	flip(x.table, x.table+16*4, func(at int64, got []byte, _ *Image, err error) {
		if !errors.Is(err, image.ErrFormat) {
			t.Errorf("a bit of byte %d of the BAT: %v", at-x.table, err)
		}
	})
}

func TestBitFlipsOfFixed(t *testing.T) {
	b := viewBytes(t, make([]byte, 1000), ViewOptions{Kind: Fixed})
	for at := len(b) - 512; at < len(b); at++ {
		b[at] ^= 4
		if _, err := openBytes(t, b); !errors.Is(err, image.ErrFormat) {
			t.Errorf("a bit of byte %d: %v", at, err)
		}
		b[at] ^= 4
	}
}

// TestTruncation: a file cut anywhere is an error, unless nothing but the
// footer is gone.
func TestTruncation(t *testing.T) {
	x := small(kindDynamic)
	fixed := viewBytes(t, x.disk, ViewOptions{Kind: Fixed})
	for n := len(x.b) - 1; n >= 0; n-- {
		if n < len(x.b)-1100 && n%61 != 0 && n%512 != 0 {
			continue
		}
		im, err := openBytes(t, x.b[:n])
		switch {
		case err != nil && !errors.Is(err, image.ErrFormat):
			t.Errorf("cut to %d bytes: %v", n, err)
		case err == nil && n < len(x.b)-512-4096+512: // a tail may lie beyond the disk's end
			t.Errorf("cut to %d bytes of %d: no error", n, len(x.b))
		case err == nil:
			got := make([]byte, len(x.disk))
			if err := im.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, x.disk) || n < len(x.b)-1 && len(im.Info().Warnings) == 0 {
				t.Errorf("cut to %d bytes: %v", n, err)
			}
		}
		if n < len(fixed)-1 {
			if _, err := openBytes(t, fixed[:n]); !errors.Is(err, image.ErrFormat) {
				t.Errorf("a fixed image cut to %d bytes: %v", n, err)
			}
		}
	}
}

// TestLocatorsThatLie nowhere are told, and harmless.
func TestLocatorsThatLie(t *testing.T) {
	for _, c := range [][2]uint64{{1 << 20, 0}, {14, 1 << 63}, {14, ^uint64(0)}, {0, 0}, {1<<32 - 1, 2048}} {
		x := small(kindDifferencing)
		x.put32(576+8, uint32(c[0]))
		x.put64(576+16, c[1])
		im, err := walk(t.Context(), memOf(t, x.b))
		if err != nil {
			t.Fatal(err)
		}
		if i := im.Info(); len(i.Warnings) != 1 || !strings.Contains(i.Warnings[0], "W2ru") || strings.Join(i.Parent.Names, " ") != "k.vhd n.vhd m.vhd" {
			t.Errorf("%v: %+v, names %q", c, i, i.Parent.Names)
		}
	}
}

// TestGeometryIsNotTheSize: what disagrees with the current size is told.
func TestGeometryIsNotTheSize(t *testing.T) {
	for g, warnings := range map[geometry]int{geometryOf(61 << 10): 0, {1, 2, 61}: 0, {65535, 16, 255}: 1, {0, 0, 0}: 1} {
		x := small(kindDynamic)
		for _, f := range [][]byte{x.b[:512], x.foot()} {
			binary.BigEndian.PutUint16(f[56:], g.cylinders)
			f[58], f[59] = g.heads, g.sectors
		}
		x.seal()
		im, err := openBytes(t, x.b)
		if err != nil {
			t.Fatal(err)
		}
		if i := im.Info(); i.Size != 61<<10 || len(i.Warnings) != warnings {
			t.Errorf("%v: %+v", g, i)
		}
	}
}

func TestCheckFinds(t *testing.T) {
	for name, c := range map[string]struct {
		kind uint32
		do   func(x *built)
		want string
	}{
		"footer":  {kindDynamic, func(x *built) { x.foot()[0]++ }, "the one at the file's end is missing"},
		"copy":    {kindDynamic, func(x *built) { x.b[70]++ }, "the copy at offset 0 is damaged"},
		"copies":  {kindDynamic, func(x *built) { x.foot()[70]++; x.seal() }, "differs"},
		"id":      {kindDynamic, func(x *built) { x.foot()[68], x.b[68] = 0, 0; x.seal() }, "unique id is zero"},
		"bitmap":  {kindDynamic, func(x *built) { clear(x.b[x.at(2)*512:][:512]) }, "first of block 2"},
		"behind":  {kindDynamic, func(x *built) { x.foot64(48, 57<<10); copy(x.b, x.foot()) }, "behind the disk's end"},
		"leak":    {kindDynamic, func(x *built) { x.set(2, none) }, "belong to nothing"},
		"no name": {kindDifferencing, func(x *built) { clear(x.b[x.header+64:][:704]); x.seal() }, "does not name the parent"},
		"fixed":   {kindDynamic, func(x *built) { x.foot32(60, 2) }, "belong to nothing"},
	} {
		x := small(c.kind)
		if list := problems(t, must(openBytes(t, x.b))(t)); len(list) != 0 {
			t.Fatalf("the image itself is not good: %q", list)
		}
		c.do(x)
		if list := problems(t, must(openBytes(t, x.b))(t)); !slices.ContainsFunc(list, func(s string) bool { return strings.Contains(s, c.want) }) {
			t.Errorf("%s: problems %q, want %q", name, list, c.want)
		}
	}
}

func must(im *Image, err error) func(t *testing.T) *Image {
	return func(t *testing.T) *Image {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return im
	}
}

// FuzzImage opens and walks anything. With fix the checksums are made right
// first, so that what is behind them is met.
func FuzzImage(f *testing.F) {
	for _, fix := range []bool{false, true} {
		f.Add(smallOf(kindDynamic, 5<<10).b, fix)
		f.Add(smallOf(kindDifferencing, 5<<10).b, fix)
		tiny := build(rand.New(rand.NewPCG(3, 3)), plan{kind: kindDifferencing, size: 9 << 10, block: 4 << 10, parent: [16]byte{2}, full: 50, cut: true, name: `C:\x`})
		f.Add(tiny.b, fix)
		f.Add(viewBytes(f, make([]byte, 1000), ViewOptions{Kind: Fixed}), fix)
		v, err := NewView(f.Context(), disk.NewMem(3<<20), ViewOptions{}) // has no block
		if err != nil {
			f.Fatal(err)
		}
		f.Add(bytesOf(f, v), fix)
	}
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix {
			repair(b)
		}
		if _, err := match(t.Context(), memOf(t, b)); err != nil {
			t.Fatal(err)
		}
		im, err := walk(t.Context(), memOf(t, b))
		if err != nil && !errors.Is(err, image.ErrFormat) && !errors.Is(err, image.ErrUnsupported) {
			t.Fatal(err)
		}
		if err == nil && im.Info().Parent != nil {
			checkNames(t, im.Info().Parent.Names)
		}
	})
}

// FuzzNames decodes locators and names of any bytes.
func FuzzNames(f *testing.F) {
	f.Add("W2ru", locator{"W2ru", `..\a b\Zoë.vhd`}.data(), []byte("\x00C\x00:\x00\\\x00x"))
	f.Add("W2ku", locator{"W2ku", `\\?\C:\x.vhd`}.data(), []byte{0xd8, 0})
	f.Add("MacX", []byte("file://./a%20b.vhd\x00"), []byte{0, '/', 0})
	f.Add("Wi2r", []byte(`C:..\x`), []byte{0, ':', 0, '.'})
	f.Fuzz(func(t *testing.T, code string, data, name []byte) {
		h := &header{parentName: name, locators: make([]byte, 8*24)}
		copy(h.locators[:4], code)
		binary.BigEndian.PutUint32(h.locators[8:], uint32(len(data)))
		im := &Image{file: memOf(t, data), end: int64(len(data)), h: h}
		if err := im.readNames(t.Context()); err != nil {
			t.Fatal(err)
		}
		checkNames(t, im.names)
	})
}

// checkNames: all are relative paths with slashes, none twice.
func checkNames(t *testing.T, names []string) {
	t.Helper()
	for i, name := range names {
		if name == "" || strings.ContainsAny(name, "\\\x00") || strings.HasPrefix(name, "/") || slices.Contains(names[:i], name) ||
			path.Clean(name) != name || path.Base(name) == ".." {
			t.Errorf("name %d of %q", i, names)
		}
	}
}

// repair makes the checksums of footer, copy and header right.
func repair(b []byte) {
	if len(b) < 512 {
		return
	}
	for _, f := range [][]byte{b[:512], b[len(b)-512:]} {
		if string(f[:8]) != cookie {
			continue
		}
		binary.BigEndian.PutUint32(f[64:], checksum(f, 64))
		at := binary.BigEndian.Uint64(f[16:])
		if len(b) > 2048 && at <= uint64(len(b)-1024) {
			h := b[at:][:1024]
			binary.BigEndian.PutUint32(h[36:], checksum(h, 36))
		}
	}
}
