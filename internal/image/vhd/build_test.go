package vhd

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"unicode/utf16"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

var formats = image.Formats{Format()}

// in resolves names within a directory.
func in(dir string) image.Resolver {
	return func(_ context.Context, from, name string) (image.File, error) {
		p, err := image.Join(from, name)
		if err != nil {
			return image.File{}, err
		}
		d, err := disk.OpenFile(filepath.Join(dir, p), disk.FileOptions{ReadOnly: true})
		if err != nil {
			return image.File{}, err
		}
		return image.File{Name: p, Disk: d}, nil
	}
}

// openChain opens dir/name with its parents.
func openChain(t testing.TB, dir, name string) *image.Chain {
	t.Helper()
	f, err := in(dir)(t.Context(), "x", name)
	if err != nil {
		t.Fatal(err)
	}
	c, err := formats.Open(t.Context(), f, Name, in(dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// memOf is a file in memory.
func memOf(t testing.TB, b []byte) *disk.Mem {
	t.Helper()
	m := disk.NewMem(int64(len(b)))
	if err := m.WriteAt(t.Context(), b, 0); err != nil {
		t.Fatal(err)
	}
	return m
}

func openBytes(t testing.TB, b []byte) (*Image, error) {
	t.Helper()
	return Open(t.Context(), image.File{Name: "test.vhd", Disk: memOf(t, b)}, nil)
}

// problems are what Check finds.
func problems(t testing.TB, l image.Layer) (list []string) {
	t.Helper()
	if err := l.Check(t.Context(), func(s string) { list = append(list, s) }); err != nil {
		t.Fatal(err)
	}
	return list
}

// plan is what a test image is to be. Views make no differencing images, and
// none with odd places of blocks.
type plan struct {
	kind       uint32
	size       int64
	block      int64
	id, parent [16]byte
	under      []byte // the parent's content
	name       string // in the header
	locators   []locator
	usual      bool // as other readers want it: the usual places, a BAT of just the disk, bitmaps that mean something
	tight      bool // no gaps
	groups     bool // bitmaps of whole bytes
	full       int  // in percent, the blocks that are there
	cut        bool // the last block ends with the disk, if it is the file's last
}

type locator struct{ code, text string }

// data is a locator's text as files have it.
func (l locator) data() []byte {
	var b []byte
	if l.code != "W2ru" && l.code != "W2ku" {
		return []byte(l.text)
	}
	for _, c := range utf16.Encode([]rune(l.text)) {
		b = binary.LittleEndian.AppendUint16(b, c)
	}
	return b
}

// built is an image, and where its parts are.
type built struct {
	b             []byte
	header, table int64
	disk          []byte // what it must read as
}

// build makes a dynamic or differencing image with blocks in any order, with
// gaps of any sectors between them.
func build(rnd *rand.Rand, p plan) *built {
	blocks := (p.size + p.block - 1) / p.block
	x := &built{header: 512 * (1 + rnd.Int64N(4)), disk: make([]byte, p.size)}
	if p.usual {
		x.header = 512
	}
	copy(x.disk, p.under)
	at := x.header + 1024
	var places [8]int64
	for i, l := range p.locators {
		places[i] = at
		at += (int64(len(l.data()))+511)/512*512 + 512
	}
	x.table = at + 512*rnd.Int64N(3)
	entries := blocks
	if !p.usual {
		entries += rnd.Int64N(200)
	}
	x.b = make([]byte, (x.table+entries*4+511)/512*512)
	for i := range entries {
		binary.BigEndian.PutUint32(x.b[x.table+i*4:], none)
	}
	order := rnd.Perm(int(blocks))
	if p.cut { // last
		for i, n := range order {
			if n == int(blocks-1) {
				order[i], order[blocks-1] = order[blocks-1], order[i]
			}
		}
	}
	for _, i := range order {
		if rnd.IntN(100) < p.full || p.cut && i == int(blocks-1) {
			x.addBlock(rnd, p, int64(i))
		}
	}
	if p.cut {
		x.b = x.b[:int64(len(x.b))-(blocks*p.block-p.size)]
	}
	x.finish(p, uint32(entries), places)
	return x
}

// addBlock appends block i with random content, here and there.
func (x *built) addBlock(rnd *rand.Rand, p plan, i int64) {
	if !p.tight {
		x.b = append(x.b, make([]byte, 512*rnd.Int64N(9))...)
	}
	at := int64(len(x.b))
	binary.BigEndian.PutUint32(x.b[x.table+i*4:], uint32(at/512))
	lead := (p.block/4096 + 511) / 512 * 512
	x.b = append(x.b, make([]byte, lead+p.block)...)
	bitmap, data := x.b[at:at+lead], x.b[at+lead:]
	disktest.Fill(rnd, data) // what is not marked is rubbish
	for s := int64(0); s < p.block/512; {
		n := 1 + rnd.Int64N([]int64{2, 30, 1000}[rnd.IntN(3)])
		if p.groups {
			n = (n + 7) / 8 * 8
		}
		here := p.kind == kindDynamic || rnd.IntN(2) == 0
		for end := min(s+n, p.block/512); s < end; s++ {
			if !here {
				continue
			}
			bitmap[s/8] |= 0x80 >> (s % 8)
			if off := i*p.block + s*512; off < p.size {
				copy(x.disk[off:], data[s*512:][:512])
			}
		}
	}
	if p.kind == kindDynamic && !p.usual && rnd.IntN(2) == 0 {
		disktest.Fill(rnd, bitmap) // means nothing
	}
}

// finish writes footers and header.
func (x *built) finish(p plan, entries uint32, places [8]int64) {
	f := footer{dataOffset: uint64(x.header), timestamp: 1, size: uint64(p.size), geometry: geometryOf(uint64(p.size)), kind: p.kind, id: p.id}
	h := x.b[x.header:]
	copy(h, header{tableOffset: uint64(x.table), entries: entries, block: uint32(p.block)}.encode())
	copy(h[40:], p.parent[:])
	for i, c := range utf16.Encode([]rune(p.name)) {
		binary.BigEndian.PutUint16(h[64+2*i:], c)
	}
	for i, l := range p.locators {
		at := 576 + 24*i
		copy(h[at:], l.code)
		binary.BigEndian.PutUint32(h[at+4:], 512)
		binary.BigEndian.PutUint32(h[at+8:], uint32(len(l.data())))
		binary.BigEndian.PutUint64(h[at+16:], uint64(places[i]))
		copy(x.b[places[i]:], l.data())
	}
	copy(x.b, f.encode())
	x.b = append(x.b, f.encode()...)
	x.seal()
}

// seal makes all checksums right.
func (x *built) seal() {
	binary.BigEndian.PutUint32(x.b[x.header+36:], checksum(x.b[x.header:x.header+1024], 36))
	for _, f := range [][]byte{x.b[:512], x.foot()} {
		binary.BigEndian.PutUint32(f[64:], checksum(f, 64))
	}
}

// foot is the footer.
func (x *built) foot() []byte { return x.b[len(x.b)-512:] }

func (x *built) save(t testing.TB, dir, name string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), x.b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func randomID(rnd *rand.Rand) (id [16]byte) {
	disktest.Fill(rnd, id[:])
	return id
}
