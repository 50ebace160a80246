package vhdx

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

// sample is a differencing image of 5 MiB and 512 bytes with every state.
func sample(t testing.TB) *build {
	t.Helper()
	rnd := disktest.Rand(t)
	parent := newBuild(t, rnd, buildOptions{size: 5<<20 + 512, block: 1 << 20, sector: 512})
	b := newBuild(t, rnd, buildOptions{size: 5<<20 + 512, block: 1 << 20, sector: 512, parent: parent, parentName: "p.vhdx"})
	for n, s := range []uint64{blockPresent, blockPartial, blockZero, blockUnmapped, blockNotPresent, blockPresent} {
		b.block(int64(n), s, false)
	}
	return b
}

// walk opens an image and reads all that it will give.
func walk(ctx context.Context, d disk.Reader) error {
	im, err := Open(ctx, image.File{Name: "x", Disk: d}, nil)
	if err != nil {
		return err
	}
	p := make([]byte, 1<<20)
	errs := im.Check(ctx, func(string) {})
	runs := 0
	for r, err := range im.Runs(ctx, 0, im.g.size) {
		if err != nil {
			return errors.Join(errs, err)
		}
		if runs++; runs > 5000 {
			break
		}
		if r.State == image.Data {
			errs = errors.Join(errs, im.ReadAt(ctx, p[:min(r.Len, int64(len(p)))], r.Off))
		}
	}
	return errs
}

// itemAt is the offset in the file of a metadata item's table entry, and of
// its value.
func (b *build) itemAt(id guid) (entry, value int64) {
	for n := int64(0); ; n++ {
		e := b.get(b.metadata+32+32*n, 32)
		if guid(e[:16]) == id {
			return b.metadata + 32 + 32*n, b.metadata + int64(binary.LittleEndian.Uint32(e[16:]))
		}
	}
}

func (b *build) setItem(id guid, at int64, v uint32) { _, off := b.itemAt(id); b.put32(off+at, v) }

// regions writes to both region tables and mends their checksums.
func (b *build) regions(at int64, p []byte) {
	b.put(regionOff1+at, p)
	b.put(regionOff2+at, p)
	b.seal()
}

func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
func le64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

// TestHostileImages names bug classes of other readers where a case is one.
func TestHostileImages(t *testing.T) {
	long(t)
	for name, c := range map[string]struct {
		do   func(b *build)
		want string // part of the error
		is   error
	}{
		"another mark":         {func(b *build) { b.put(0, []byte("V")) }, "not a VHDX", image.ErrFormat},
		"no header":            {func(b *build) { b.put(headerOff1, []byte("x")); b.put(headerOff2+9, []byte("x")) }, "neither header", image.ErrFormat},
		"version 2":            {func(b *build) { b.both(66, []byte{2}) }, "version 2", image.ErrUnsupported},
		"log version 1":        {func(b *build) { b.both(48, []byte{1}); b.both(64, []byte{1}) }, "log version", image.ErrUnsupported},
		"log beyond the end":   {func(b *build) { b.both(72, le64(1<<40)) }, "beyond the file's end", image.ErrFormat},
		"log at 2^63":          {func(b *build) { b.both(72, le64(1<<63)) }, "beyond the file's end", image.ErrFormat},
		"log unaligned":        {func(b *build) { b.both(72, le64(uint64(b.log)+4096)) }, "the log has", image.ErrFormat},
		"log of 2 GiB":         {func(b *build) { b.both(68, le32(2<<30)) }, "the log has", image.ErrUnsupported},
		"dirty log of nothing": {func(b *build) { b.both(48, []byte{1}); b.both(68, le32(0)) }, "the log has", image.ErrFormat},
		"log on the BAT":       {func(b *build) { b.both(72, le64(uint64(b.bat))) }, "overlaps", image.ErrFormat},
		"no region table":      {func(b *build) { b.put(regionOff1+5, []byte("x")); b.put(regionOff2+5, []byte("x")) }, "neither region table", image.ErrFormat},
		"2048 regions":         {func(b *build) { b.regions(8, le32(2048)) }, "2048 entries", image.ErrFormat},
		"region twice":         {func(b *build) { b.regions(48, regionMetadata[:]) }, "a second region", image.ErrFormat},
		"unknown required region": {func(b *build) {
			b.regions(8, le32(3))
			b.regions(80, append(make([]byte, 19), 0x10, 0, 0, 0, 0, 0, 0, 0x10, 0, 1))
		}, "region", image.ErrFormat},
		"region beyond the end":     {func(b *build) { b.regions(64, le64(1<<40)) }, "truncated", image.ErrFormat},
		"region unaligned":          {func(b *build) { b.regions(64, le64(uint64(b.bat)+8)) }, "at offset", image.ErrFormat},
		"region in the header area": {func(b *build) { b.regions(64, le64(0)) }, "at offset 0", image.ErrFormat},
		"regions overlap":           {func(b *build) { b.regions(64, le64(uint64(b.metadata))) }, "overlaps", image.ErrFormat},
		"no BAT":                    {func(b *build) { b.regions(8, le32(1)) }, "lacks", image.ErrFormat},
		"metadata signature":        {func(b *build) { b.put(b.metadata, []byte("M")) }, "metadata table", image.ErrFormat},
		"2048 items":                {func(b *build) { b.put(b.metadata+10, []byte{0, 8}) }, "2048 entries", image.ErrFormat},
		"item without id":           {func(b *build) { b.put(b.metadata+10, []byte{8}) }, "without an id", image.ErrFormat},
		"item beyond the region":    {func(b *build) { e, _ := b.itemAt(itemSize); b.put32(e+16, mib-4) }, "virtual disk size", image.ErrFormat},
		"items overlap": {func(b *build) {
			e, _ := b.itemAt(itemSize)
			_, v := b.itemAt(itemParams)
			b.put32(e+16, uint32(v-b.metadata-4))
		}, "overlaps", image.ErrFormat},
		"item of another length":            {func(b *build) { e, _ := b.itemAt(itemSize); b.put32(e+20, 4) }, "has 4 bytes", image.ErrFormat},
		"item twice":                        {func(b *build) { e, _ := b.itemAt(itemPhysical); b.put(e, itemLogical[:]) }, "second time", image.ErrFormat},
		"unknown required item":             {func(b *build) { e, _ := b.itemAt(itemCHS); b.put(e, []byte{1}); b.put32(e+24, flagRequired) }, "unknown here and required", image.ErrUnsupported},
		"incomplete file":                   {func(b *build) { e, _ := b.itemAt(itemCHS); b.put(e, itemIncomplete[:]) }, "incomplete", image.ErrUnsupported},
		"no disk ID":                        {func(b *build) { e, _ := b.itemAt(itemDiskID); b.put(e, []byte{1}); b.put32(e+24, 0) }, "lacks", image.ErrFormat},
		"no locator":                        {func(b *build) { e, _ := b.itemAt(itemLocator); b.put(e, []byte{1}); b.put32(e+24, 0) }, "no parent locator", image.ErrFormat},
		"bug 11: block size 0":              {func(b *build) { b.setItem(itemParams, 0, 0) }, "block size", image.ErrFormat},
		"bug 11: block size 2^31":           {func(b *build) { b.setItem(itemParams, 0, 1<<31) }, "block size", image.ErrFormat},
		"bug 11: block size no power of 2":  {func(b *build) { b.setItem(itemParams, 0, 3<<20) }, "block size", image.ErrFormat},
		"bug 11: logical sector 0":          {func(b *build) { b.setItem(itemLogical, 0, 0) }, "logical sector", image.ErrFormat},
		"bug 11: logical sector 1024":       {func(b *build) { b.setItem(itemLogical, 0, 1024) }, "logical sector", image.ErrFormat},
		"physical sector 0":                 {func(b *build) { b.setItem(itemPhysical, 0, 0) }, "physical sector", image.ErrFormat},
		"bug 20: size 0":                    {func(b *build) { b.setItem(itemSize, 0, 0) }, "virtual disk size", image.ErrFormat},
		"size of half a sector":             {func(b *build) { b.setItem(itemSize, 0, 256) }, "virtual disk size", image.ErrFormat},
		"size above 64 TiB":                 {func(b *build) { b.setItem(itemSize, 4, 1<<14) }, "virtual disk size", image.ErrFormat},
		"size beyond the BAT":               {func(b *build) { b.setItem(itemSize, 4, 1<<9) }, "the disk needs", image.ErrFormat},
		"unknown file parameter":            {func(b *build) { b.setItem(itemParams, 4, 6) }, "flags", image.ErrUnsupported},
		"bug 7: partial without parent":     {func(b *build) { b.setItem(itemParams, 4, 0) }, "there is no parent", image.ErrFormat},
		"bug 4: state 4":                    {func(b *build) { b.setBlock(3, 4) }, "state 4", image.ErrFormat},
		"bug 5: present at offset 0":        {func(b *build) { b.setBlock(0, blockPresent) }, "offset is 0", image.ErrFormat},
		"bug 7: partial without bitmap":     {func(b *build) { b.setEntry(b.g.bitmapIndex(0), 0) }, "no sector bitmap", image.ErrFormat},
		"bug 12: block beyond the end":      {func(b *build) { b.setBlock(0, uint64(b.next)|blockPresent) }, "truncated", image.ErrFormat},
		"bug 12: last block beyond the end": {func(b *build) { b.setBlock(5, uint64(b.next)|blockPresent) }, "truncated", image.ErrFormat},
		"block at 2^63":                     {func(b *build) { b.setBlock(0, 1<<63|blockPresent) }, "truncated", image.ErrFormat},
		"bitmap beyond the end":             {func(b *build) { b.setEntry(b.g.bitmapIndex(0), uint64(b.next)|blockPresent) }, "truncated", image.ErrFormat},
		"bitmap of state 2":                 {func(b *build) { b.setEntry(b.g.bitmapIndex(0), 2) }, "state 2", image.ErrFormat},
		"bug 20: blocks overlap":            {func(b *build) { b.setBlock(2, b.entryOf(0)) }, "overlap another block", image.ErrFormat},
		"bug 20: block is the bitmap":       {func(b *build) { b.setBlock(0, b.entryAt(b.g.bitmapIndex(0))) }, "overlap another block", image.ErrFormat},
		"bug 20: block is the BAT":          {func(b *build) { b.setBlock(2, uint64(b.bat)|blockPresent) }, "overlap the BAT", image.ErrFormat},
		"bug 20: block is the metadata":     {func(b *build) { b.setBlock(2, uint64(b.metadata)|blockPresent) }, "overlap the metadata", image.ErrFormat},
		"bug 20: block is the log":          {func(b *build) { b.setBlock(2, uint64(b.log)|blockPresent) }, "overlap the log", image.ErrFormat},
		"locator of another type":           {func(b *build) { b.setItem(itemLocator, 0, 0) }, "parent locator of type", image.ErrUnsupported},
		"locator without entries":           {func(b *build) { b.setItem(itemLocator, 16, 0) }, "0 entries", image.ErrFormat},
		"locator of 257 entries":            {func(b *build) { b.setItem(itemLocator, 16, 257<<16) }, "257 entries", image.ErrFormat},
		"locator key beyond its end":        {func(b *build) { b.setItem(itemLocator, 20, 1<<31) }, "entry 0", image.ErrFormat},
		"locator key in the table":          {func(b *build) { b.setItem(itemLocator, 20, 20) }, "entry 0", image.ErrFormat},
		"locator key at an odd offset":      {func(b *build) { b.setItem(itemLocator, 20, 101) }, "entry 0", image.ErrFormat},
	} {
		t.Run(name, func(t *testing.T) {
			b := sample(t)
			c.do(b)
			if err := walk(t.Context(), b.file()); !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

// TestOddImages: what is read all the same, with a warning.
func TestOddImages(t *testing.T) {
	long(t)
	for name, c := range map[string]struct {
		do   func(b *build)
		want string // part of the only warning, "" for none
	}{
		"nothing":                       {func(b *build) {}, ""},
		"bug 9: headers of one number":  {func(b *build) { b.put(headerOff2, b.get(headerOff1, headerLen)) }, ""},
		"headers of one number, unlike": {func(b *build) { b.both(8, []byte{7}); b.put(headerOff2+100, []byte{1}); b.seal() }, "they differ"},
		"bug 10: header 1 broken":       {func(b *build) { b.put(headerOff1+20, []byte("xxx")) }, "header 1"},
		"bug 10: header 2 broken":       {func(b *build) { b.put(headerOff2, make([]byte, headerLen)) }, "header 2"},
		"bug 10: region table 1 broken": {func(b *build) { b.put(regionOff1+60000, []byte("x")) }, "region table 1"},
		"bug 10: region table 2 broken": {func(b *build) { b.put(regionOff2, []byte("x")) }, "region table 2"},
		"optional region": {func(b *build) {
			b.alloc(mib)
			b.regions(8, le32(3))
			b.regions(80, slices.Concat([]byte("unknown region.."), le64(uint64(b.next-mib)), le32(mib)))
		}, ""},
		"reserved bits":                  {func(b *build) { b.setBlock(0, b.entryOf(0)|1<<7); b.setBlock(2, 1<<19|2) }, "reserved bits"},
		"bug 4: state 5":                 {func(b *build) { b.setBlock(3, 5) }, "state 5"},
		"bug 13: zeros with an offset":   {func(b *build) { b.setBlock(2, 5*mib|2) }, ""},
		"bug 5: offset of absent block":  {func(b *build) { b.setBlock(4, 1<<60) }, ""},
		"bug 12: last block ends early":  {func(b *build) { b.next -= mib - 512 }, "ends within it"},
		"bug 15: file of no whole MiB":   {func(b *build) { b.next += 512 }, ""},
		"flags of an item":               {func(b *build) { e, _ := b.itemAt(itemSize); b.put32(e+24, flagRequired) }, "has the flags"},
		"known item, said to be unknown": {func(b *build) { e, _ := b.itemAt(itemCHS); b.put32(e+24, flagRequired) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := sample(t)
			c.do(b)
			f := b.file()
			im := openMem(t, f)
			w := im.Info().Warnings
			if c.want == "" && len(w) > 0 || c.want != "" && (len(w) != 1 || !strings.Contains(w[0], c.want)) {
				t.Errorf("warnings %q, want %q", w, c.want)
			}
			if p := problems(t, im); c.want != "" && len(p) == 0 {
				t.Error("Check says nothing")
			}
			if err := walk(t.Context(), f); err != nil {
				t.Fatal(err)
			}
			// The layer's data and zeros are the model's; what is absent was zeros.
			compare(t, layerDisk{im}, bytesOf(t, b.model, b.g.size), b.rnd)
		})
	}
}

// layerDisk is a layer alone, as a disk.
type layerDisk struct{ im *Image }

func (l layerDisk) Size() int64  { return l.im.g.size }
func (l layerDisk) Close() error { return nil }
func (l layerDisk) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return l.im.ReadAt(ctx, p, off)
}
func (l layerDisk) Extents(ctx context.Context, off, n int64) disk.Extents {
	return disk.Merge(func(yield func(disk.Extent, error) bool) {
		for r, err := range l.im.Runs(ctx, off, n) {
			if !yield(disk.Extent{Off: r.Off, Len: r.Len, Zero: r.State != image.Data}, err) {
				return
			}
		}
	})
}

// TestBug04States: what each state reads as, without a parent and with one.
func TestBug04States(t *testing.T) {
	for _, diff := range []bool{false, true} {
		g := newGeometry(&metadata{size: 1 << 20, block: 1 << 20, logical: 512, hasParent: diff})
		for e, want := range []int{blockNotPresent, blockZero, blockZero, blockZero, -1, blockZero, blockPresent, blockPartial} {
			if e == blockPartial && !diff {
				want = -1
			}
			s, _, err := g.payload(uint64(e)|3*mib, 0, 4*mib)
			if want < 0 && err == nil || want >= 0 && (err != nil || s != want) {
				t.Errorf("state %d, parent %v: %d, %v", e, diff, s, err)
			}
		}
	}
}

// TestBug08Geometry: the BAT's indexes, with the entries of bitmaps between.
func TestBug08Geometry(t *testing.T) {
	for _, c := range []struct{ size, block, sector, ratio, entries, diff int64 }{
		{10 << 30, 32 << 20, 512, 128, 322, 387}, {4 << 30, 1 << 20, 512, 4096, 4096, 4097}, {4<<30 + 512, 1 << 20, 512, 4096, 4098, 8194},
		{64 << 40, 1 << 20, 512, 4096, 64<<20 + 16383, 64<<20 + 16384}, {1 << 40, 32 << 20, 4096, 1024, 32<<10 + 31, 32<<10 + 32}, {512, 256 << 20, 512, 16, 1, 17},
	} {
		m := &metadata{size: c.size, block: c.block, logical: c.sector}
		g := newGeometry(m)
		m.hasParent = true
		d := newGeometry(m)
		if g.ratio != c.ratio || g.entries() != c.entries || d.entries() != c.diff {
			t.Errorf("%+v: ratio %d, %d entries, %d with a parent", c, g.ratio, g.entries(), d.entries())
		}
		for _, n := range []int64{0, g.blocks / 2, g.blocks - 1} {
			if chunk, block, bitmap := g.split(g.index(n)); chunk != n/g.ratio || block != n || bitmap {
				t.Errorf("%+v: block %d is %d of chunk %d", c, n, block, chunk)
			}
		}
	}
}

// TestTruncated cuts the file at every structure: an error, never zeros.
func TestTruncated(t *testing.T) {
	b := sample(t)
	for _, n := range []int64{0, 7, 8, headerOff1, headerOff2 + 1, regionOff2, mib - 1, mib, b.metadata + metadataTable, b.bat, b.bat + 8, b.log, b.log + mib - 1,
		b.log + mib, b.next - 2*mib, b.next - mib, b.next - mib + 511} {
		if err := walk(t.Context(), b.cut(n)); !errors.Is(err, image.ErrFormat) {
			t.Errorf("%d of %d bytes: %v", n, b.next, err)
		}
	}
}

// TestBitFlips: one bit of a structure with a checksum costs a copy at most;
// one elsewhere is found, or changes only what no structure could tell.
func TestBitFlips(t *testing.T) {
	long(t)
	b := sample(t)
	f := b.file()
	want := bytesOf(t, b.model, b.g.size)
	flip := func(off int64, bit int) error {
		p := b.get(off, 1)
		p[0] ^= 1 << bit
		if err := f.WriteAt(t.Context(), p, off); err != nil {
			t.Fatal(err)
		}
		defer f.WriteAt(t.Context(), b.get(off, 1), off)
		im, err := Open(t.Context(), image.File{Name: "x", Disk: f}, nil)
		if err != nil {
			return err
		}
		got := make([]byte, min(im.g.size, b.g.size))
		if err := im.ReadAt(t.Context(), got, 0); err != nil {
			return err
		}
		if !bytes.Equal(got, want) {
			return errors.New("other data")
		}
		return nil
	}
	for _, at := range []int64{headerOff1, headerOff2, regionOff1, regionOff2} {
		for i := 0; i < 112; i++ {
			if err := flip(at+int64(i), b.rnd.IntN(8)); err != nil {
				t.Fatalf("byte %d of the copy at %d: %v", i, at, err)
			}
		}
	}
	for _, r := range [][2]int64{{b.metadata, 32 + 7*32}, {b.metadata + metadataTable, 700}, {b.bat, b.g.blocks * 8}, {b.bat + b.g.bitmapIndex(0)*8, 8}} {
		for i := int64(0); i < r[1]; i++ {
			_ = flip(r[0]+i, b.rnd.IntN(8)) // no panic, no endless loop
		}
	}
}

func TestRefusesSetsByName(t *testing.T) {
	_, err := Open(t.Context(), image.File{Name: "a/Disk.VHDS", Disk: sample(t).file()}, nil)
	if !errors.Is(err, image.ErrUnsupported) || !strings.Contains(err.Error(), "VHD Set") {
		t.Error(err)
	}
}

// TestBug13ViewZeros: a view's entry of what it does not hold is all zero.
func TestBug13ViewZeros(t *testing.T) {
	d, _ := scatter(t, disktest.Rand(t), 100<<20, 3, 1000)
	im := openMem(t, newView(t, d, ViewOptions{}))
	err := im.eachEntry(t.Context(), 0, im.batLen/8, func(index int64, e uint64) error {
		if e&stateMask != blockPresent || e&reservedMask != 0 {
			return fmt.Errorf("entry %d is %#x", index, e)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
