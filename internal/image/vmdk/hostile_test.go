package vmdk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zlib"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

var le = binary.LittleEndian

// smallDisk has 70 grains in three tables' reach.
func smallDisk(t testing.TB) *disk.Mem {
	rnd := rand.New(rand.NewPCG(7, 7))
	d := disk.NewMem(66<<20 + 512)
	for _, g := range []int64{0, 1, 2, 5, 600, 601, 1056} {
		p := make([]byte, min(ourGrain, d.Size()-g*ourGrain))
		disktest.Fill(rnd, p[:len(p)/4])
		if err := d.WriteAt(t.Context(), p, g*ourGrain); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// sparseBytes is a monolithicSparse file of it.
func sparseBytes(t testing.TB, d disk.Reader) []byte {
	v, err := NewView(t.Context(), d, ViewOptions{ID: [16]byte{1}})
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, v.Size())
	if err := v.ReadAt(t.Context(), b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

// streamBytes is a streamOptimized file of it.
func streamBytes(t testing.TB, d disk.Reader) []byte {
	var buf bytes.Buffer
	if _, err := WriteStream(t.Context(), &buf, d, StreamOptions{ID: [16]byte{1}}); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// word is a 32-bit word of a file, to change it.
func word(b []byte, off int64) []byte { return b[off : off+4] }

// dirOf is where a file's directory is, by its header or its footer.
func dirOf(b []byte) int64 {
	gd := le.Uint64(b[56:])
	if gd == atEnd {
		gd = le.Uint64(b[len(b)-2*sector+56:])
	}
	return int64(gd) * sector
}

func tableOf(b []byte) int64 { return int64(le.Uint32(word(b, dirOf(b)))) * sector }
func grainOf(b []byte) int64 { return int64(le.Uint32(word(b, tableOf(b)))) * sector }

// repack replaces the first grain's compressed bytes, in place.
func repack(b []byte, packed []byte) {
	at := grainOf(b)
	le.PutUint32(b[at+8:], uint32(len(packed)))
	copy(b[at+grainHead:], packed)
}

func pack(plain []byte) []byte {
	var buf bytes.Buffer
	z := zlib.NewWriter(&buf)
	_, err := z.Write(plain)
	if err = errors.Join(err, z.Close()); err != nil {
		panic(err) // of a buffer
	}
	return buf.Bytes()
}

func TestHostileSparseFiles(t *testing.T) {
	d := smallDisk(t)
	sparse, compressed := sparseBytes(t, d), streamBytes(t, d)
	put := func(off int64, v uint64) func([]byte) []byte {
		return func(b []byte) []byte { le.PutUint64(b[off:], v); return b }
	}
	set := func(off int64, v byte) func([]byte) []byte {
		return func(b []byte) []byte { b[off] = v; return b }
	}
	entry := func(at func([]byte) int64, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { le.PutUint32(b[at(b):], v); return b }
	}
	for name, x := range map[string]struct {
		of   []byte
		do   func(b []byte) []byte
		want string
		is   error
	}{
		"empty file":                  {sparse, func(b []byte) []byte { return nil }, "not a VMDK", image.ErrFormat},
		"nothing but magic":           {sparse, func(b []byte) []byte { return b[:4] }, "too few", image.ErrFormat},
		"another magic":               {sparse, set(0, 'X'), "not a VMDK", image.ErrFormat},
		"version 0":                   {sparse, set(4, 0), "version 0", image.ErrUnsupported},
		"version 4":                   {sparse, set(4, 4), "version 4", image.ErrUnsupported},
		"unknown flag":                {sparse, set(8, 0x13), "unknown flags 0x10", image.ErrUnsupported},
		"unknown high flag":           {sparse, set(10, 0x10), "unknown flags", image.ErrUnsupported},
		"transfer as text":            {sparse, func(b []byte) []byte { copy(b[73:], "\n \n\n"); return b }, "transfer as text", image.ErrFormat},
		"capacity 0":                  {sparse, put(12, 0), "capacity", image.ErrFormat},
		"capacity of 2^63":            {sparse, put(12, 1<<63), "capacity", image.ErrFormat},
		"capacity beyond the dir":     {sparse, put(12, 1<<40), "grain directory", image.ErrFormat},
		"grain 0":                     {sparse, put(20, 0), "a grain has", image.ErrFormat},
		"grain 100":                   {sparse, put(20, 100), "a grain has", image.ErrFormat},
		"grain 2^40":                  {sparse, put(20, 1<<40), "a grain has", image.ErrFormat},
		"no entries per table":        {sparse, func(b []byte) []byte { le.PutUint32(b[44:], 0); return b }, "0 entries", image.ErrFormat},
		"2^32-1 entries per table":    {sparse, func(b []byte) []byte { le.PutUint32(b[44:], 1<<32-1); return b }, "entries", image.ErrFormat},
		"no descriptor":               {sparse, put(28, 0), "piece of a disk", image.ErrUnsupported},
		"descriptor beyond the end":   {sparse, put(28, 1<<50), "descriptor", image.ErrFormat},
		"descriptor of 2^62":          {sparse, put(36, 1<<62), "descriptor", image.ErrFormat},
		"descriptor of 2 MiB":         {sparse, func(b []byte) []byte { le.PutUint64(b[36:], 4096); return append(b, make([]byte, 2<<20)...) }, "more than", image.ErrFormat},
		"descriptor of zeros":         {sparse, func(b []byte) []byte { clear(b[512:1024]); return b }, "does not begin", image.ErrFormat},
		"descriptor with two extents": {sparse, func(b []byte) []byte { i := bytes.Index(b, []byte("\n# The")); copy(b[i:], "\nRW 1 ZERO\n"); return b }, "2 extents", image.ErrUnsupported},
		"overhead beyond the end":     {sparse, put(64, 1<<40), "overhead", image.ErrFormat},
		"directory at 0":              {sparse, put(56, 0), "grain directory", image.ErrFormat},
		"directory in the descriptor": {sparse, put(56, 5), "overlaps the descriptor", image.ErrFormat},
		"directory beyond the end":    {sparse, put(56, 1<<54), "grain directory", image.ErrFormat},
		"directory at the end":        {sparse, put(56, atEnd), "without markers", image.ErrFormat},
		"second directory beyond":     {sparse, put(48, 1<<54), "redundant", image.ErrFormat},
		"second in the first":         {sparse, func(b []byte) []byte { le.PutUint64(b[48:], le.Uint64(b[28:])); return b }, "overlaps", image.ErrFormat},
		"table beyond the end":        {sparse, entry(dirOf, 1<<32-1), "truncated", image.ErrFormat},
		"table is the header":         {sparse, func(b []byte) []byte { return entry(dirOf, 1)(put(28, 0)(b)) }, "piece of", image.ErrUnsupported},
		"table in the descriptor":     {sparse, entry(dirOf, 1), "overlaps the descriptor", image.ErrFormat},
		"table is the directory":      {sparse, func(b []byte) []byte { return entry(dirOf, uint32(dirOf(b)/sector))(b) }, "overlaps the grain directory", image.ErrFormat},
		"one table twice":             {sparse, func(b []byte) []byte { copy(b[dirOf(b):], b[dirOf(b)+4:][:4]); return b }, "overlap", image.ErrFormat},
		"a table in another":          {sparse, func(b []byte) []byte { b[dirOf(b)]++; return b }, "overlap", image.ErrFormat},
		"grain beyond the end":        {sparse, entry(tableOf, 1<<32-1), "truncated", image.ErrFormat},
		"grain 1 without the flag":    {sparse, entry(tableOf, 1), "overlaps the descriptor", image.ErrFormat},
		"grain in the directory":      {sparse, func(b []byte) []byte { return entry(tableOf, uint32(dirOf(b)/sector))(b) }, "overlaps the grain directory", image.ErrFormat},
		"grain is its own table":      {sparse, func(b []byte) []byte { return entry(tableOf, uint32(tableOf(b)/sector))(b) }, "overlaps the grain table", image.ErrFormat},
		"truncated":                   {sparse, func(b []byte) []byte { return b[:len(b)-ourGrain] }, "truncated", image.ErrFormat},
		"compressed, method unknown":  {sparse, set(10, 1), "compression method 0", image.ErrUnsupported},
		"markers, not compressed":     {sparse, set(10, 2), "not compressed", image.ErrUnsupported},

		"stream, method 2":            {compressed, set(77, 2), "compression method 2", image.ErrUnsupported},
		"stream without an end":       {compressed, func(b []byte) []byte { return b[:len(b)-sector] }, "truncated", image.ErrFormat},
		"stream without a footer":     {compressed, func(b []byte) []byte { return b[:len(b)-3*sector] }, "truncated", image.ErrFormat},
		"stream cut in a grain":       {compressed, func(b []byte) []byte { return b[:ourOverhead+700] }, "truncated", image.ErrFormat},
		"stream cut in the overhead":  {compressed, func(b []byte) []byte { return b[:ourOverhead-700] }, "truncated", image.ErrFormat},
		"stream filled up with zeros": {compressed, func(b []byte) []byte { clear(b[ourOverhead+50<<10:]); return b }, "truncated", image.ErrFormat},
		"footer of another size":      {compressed, func(b []byte) []byte { b[len(b)-2*sector+13]++; return b }, "another disk", image.ErrFormat},
		"footer's directory nowhere":  {compressed, func(b []byte) []byte { le.PutUint64(b[len(b)-2*sector+56:], 0); return b }, "footer", image.ErrFormat},
		"footer's directory beyond":   {compressed, func(b []byte) []byte { le.PutUint64(b[len(b)-2*sector+56:], 1<<60); return b }, "grain directory", image.ErrFormat},
		"grain of another place":      {compressed, func(b []byte) []byte { b[grainOf(b)]++; return b }, "it is that of sector", image.ErrFormat},
		"grain of no bytes":           {compressed, func(b []byte) []byte { le.PutUint32(b[grainOf(b)+8:], 0); return b }, "it has 0 bytes", image.ErrFormat},
		"grain of 4 GiB":              {compressed, func(b []byte) []byte { le.PutUint32(b[grainOf(b)+8:], 1<<32-1); return b }, "it has 4294967295 bytes", image.ErrFormat},
		"grain cut short":             {compressed, func(b []byte) []byte { le.PutUint32(b[grainOf(b)+8:], 100); return b }, "compressed grain", image.ErrFormat},
		"grain of rubbish":            {compressed, func(b []byte) []byte { b[grainOf(b)+grainHead] = 0xff; return b }, "compressed grain", image.ErrFormat},
		"grain's checksum":            {compressed, func(b []byte) []byte { at := grainOf(b); b[at+grainHead+int64(le.Uint32(b[at+8:]))-1]++; return b }, "compressed grain", image.ErrFormat},
		"grain too small":             {compressed, func(b []byte) []byte { repack(b, pack(make([]byte, ourGrain-1))); return b }, "not 65536", image.ErrFormat},
		"grain one byte too large":    {compressed, func(b []byte) []byte { repack(b, pack(make([]byte, ourGrain+1))); return b }, "more than one grain", image.ErrFormat},
		"a bomb":                      {compressed, func(b []byte) []byte { repack(b, pack(make([]byte, 10<<20))); return b }, "more than one grain", image.ErrFormat},
		"grain at the end of file":    {compressed, func(b []byte) []byte { return entry(tableOf, uint32(len(b)/sector))(b) }, "truncated", image.ErrFormat},
		"marker of an unknown kind":   {compressed, func(b []byte) []byte { b = noFooter(b); b[len(b)-sector+12] = 9; return b }, "unknown kind", image.ErrFormat},
		"marker of 2^63 sectors":      {compressed, func(b []byte) []byte { b = noFooter(b); m := b[len(b)-sector:]; m[12] = 1; m[7] = 0x80; return b }, "truncated", image.ErrFormat},
		"marker of a grain beyond":    {compressed, func(b []byte) []byte { b = noFooter(b); b[grainOf0+5] = 1; return b }, "marker at", image.ErrFormat},
		"marker between grains":       {compressed, func(b []byte) []byte { b = noFooter(b); b[grainOf0]++; return b }, "marker at", image.ErrFormat},
		"grains not in order":         {compressed, func(b []byte) []byte { b = noFooter(b); le.PutUint64(b[grainOf0:], 128); return b }, "without a directory", image.ErrFormat},
	} {
		t.Run(name, func(t *testing.T) {
			err := files{"a": x.do(bytes.Clone(x.of))}.walk(t.Context(), "a")
			if err == nil || !strings.Contains(err.Error(), x.want) || !errors.Is(err, x.is) {
				t.Errorf("error %v, want %q", err, x.want)
			}
		})
	}
}

// grainOf0 is where the first grain of a stream of ours is.
const grainOf0 = ourOverhead

// noFooter makes a stream one that ends after its last table.
func noFooter(b []byte) []byte {
	end := dirOf(b) - sector
	return append(b[:end:end], make([]byte, sector)...)
}

// TestStreamsWithoutDirectory are read by their markers, with places to spare
// and with few.
func TestStreamsWithoutDirectory(t *testing.T) {
	rnd := disktest.Rand(t)
	d := disk.NewMem(34<<20 + 512)
	for i := int64(3); i < 540; i += 1 + rnd.Int64N(20) {
		p := make([]byte, 1+rnd.IntN(3000))
		disktest.Fill(rnd, p)
		if err := d.WriteAt(t.Context(), p, i*ourGrain+rnd.Int64N(ourGrain)); err != nil {
			t.Fatal(err)
		}
	}
	model := modelOf(t, d)
	b := noFooter(streamBytes(t, d))
	// A sender's marks of progress are passed over.
	mark := make([]byte, sector)
	mark[0], mark[12] = 77, markProgress
	b = slices.Insert(b, grainOf0, mark...)
	c, err := files{"a": b}.open(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	compare(t, c, model, rnd)
	sound(t, c)
	if !warned(c.Layers()[0].Info(), "no footer") {
		t.Errorf("warnings %q", c.Layers()[0].Info().Warnings)
	}
	for _, most := range []int{2, 8} {
		f, h := memOf(t.Context(), b), (*hosted)(nil)
		if h, err = parseHosted(b[:sector], f.Size()); err != nil {
			t.Fatal(err)
		}
		s := newStream(f, h, most)
		if _, err := s.walk(t.Context(), h); err != nil {
			t.Fatal(err)
		}
		if len(s.places) > most || s.stride == 1 {
			t.Errorf("%d places, every %d", len(s.places), s.stride)
		}
		for g := range int64(545) {
			m, err := s.lookup(t.Context(), g*ourGrain, 1)
			if err != nil {
				t.Fatal(err)
			}
			p := model[g*ourGrain : min((g+1)*ourGrain, int64(len(model)))]
			if (m.state == image.Data) != !disk.IsZero(p) {
				t.Fatalf("grain %d is %v", g, m.state)
			}
			if m.state == image.Data {
				got, err := s.grainBytes(t.Context(), g)
				if err != nil || !bytes.Equal(got[:len(p)], p) {
					t.Fatalf("grain %d: %v", g, err)
				}
			}
		}
	}
	// An empty disk too.
	if err := (files{"a": noFooter(streamBytes(t, disk.NewMem(1<<20)))}).walk(t.Context(), "a"); err != nil {
		t.Error(err)
	}
}

// TestCheckFinds what Open lets pass.
func TestCheckFinds(t *testing.T) {
	d := smallDisk(t)
	sparse, compressed := sparseBytes(t, d), streamBytes(t, d)
	second := func(b []byte) int64 { return int64(le.Uint64(b[48:])) * sector }
	for name, x := range map[string]struct {
		of   []byte
		do   func(b []byte)
		want string
	}{
		"tables differ":        {sparse, func(b []byte) { b[int64(le.Uint32(word(b, second(b))))*sector+9]++ }, "redundant grain table"},
		"second names none":    {sparse, func(b []byte) { le.PutUint32(word(b, second(b)), 0) }, "redundant grain directory"},
		"second names nowhere": {sparse, func(b []byte) { le.PutUint32(word(b, second(b)), 1<<31) }, "beyond the file's end"},
		"one grain twice":      {sparse, func(b []byte) { copy(b[tableOf(b):], b[tableOf(b)+4:][:4]) }, "overlaps something else"},
		"grain beyond the end": {sparse, func(b []byte) { le.PutUint32(word(b, tableOf(b)), 1<<31) }, "beyond the file's end"},
		"stream, marker":       {compressed, func(b []byte) { b[grainOf(b)]++ }, "marker at offset 65536"},
		"stream, overlap":      {compressed, func(b []byte) { le.PutUint32(b[grainOf(b)+8:], 40000) }, "overlaps something else"},
		"no CID":               {sparse, func(b []byte) { b[bytes.Index(b, []byte("\nCID="))+1] = '#' }, "no CID"},
		"parent without name":  {sparse, func(b []byte) { b[bytes.Index(b, []byte("parentCID="))+10] = '0' }, "not named"},
	} {
		t.Run(name, func(t *testing.T) {
			b := bytes.Clone(x.of)
			x.do(b)
			f, _ := files{"a": b}.file(t.Context(), "a")
			im, err := Open(t.Context(), f, nil)
			if err != nil {
				t.Fatal(err)
			}
			var list []string
			if err := im.Check(t.Context(), func(p string) { list = append(list, p) }); err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(list, func(p string) bool { return strings.Contains(p, x.want) }) {
				t.Errorf("check says %q, want %q", list, x.want)
			}
		})
	}
	// What it says is bounded.
	b := bytes.Clone(sparse)
	for i := range int64(3 * ourPerGT) {
		le.PutUint32(word(b, tableOf(b)+4*i), 1<<31)
	}
	f, _ := files{"a": b}.file(t.Context(), "a")
	im, err := Open(t.Context(), f, nil)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	if err := im.Check(t.Context(), func(string) { n++ }); err != nil || n != maxReports {
		t.Errorf("%d reports, %v", n, err)
	}
}

// TestMutations: a file with a changed bit in its structure does no harm, one
// that is cut short is refused, and so is a compressed grain that was damaged.
func TestMutations(t *testing.T) {
	rnd := disktest.Rand(t)
	d := smallDisk(t)
	rounds := 200
	if testing.Short() {
		rounds = 50
	}
	for name, b := range map[string][]byte{"sparse": sparseBytes(t, d), "stream": streamBytes(t, d)} {
		for range rounds {
			m := bytes.Clone(b)
			switch off := rnd.Int64N(sector + 600); rnd.IntN(4) {
			case 0: // header or descriptor
				m[off] ^= 1 << rnd.IntN(8)
			case 1:
				m[dirOf(b)+rnd.Int64N(12)] ^= 1 << rnd.IntN(8)
			case 2:
				m[tableOf(b)+rnd.Int64N(ourTable)] ^= 1 << rnd.IntN(8)
			case 3:
				most := len(m)
				if name == "sparse" {
					most -= ourGrain - sector // its last grain has but a sector of the disk
				}
				m = m[:rnd.IntN(most)]
				if err := (files{"a": m}).walk(t.Context(), "a"); err == nil {
					t.Errorf("%s of %d bytes cut to %d is read", name, len(b), len(m))
				}
			}
			_ = files{"a": m}.walk(t.Context(), "a")
		}
		for range 30 { // and where a stream checks itself
			if name != "stream" {
				break
			}
			m := bytes.Clone(b)
			at := grainOf(b)
			m[at+rnd.Int64N(int64(le.Uint32(b[at+8:]))+grainHead)] ^= 1 << rnd.IntN(8)
			p, want := make([]byte, ourGrain), make([]byte, ourGrain)
			c, err := files{"a": m}.open(t.Context(), "a")
			if err != nil {
				t.Fatal(err)
			}
			if err := d.ReadAt(t.Context(), want, 0); err != nil {
				t.Fatal(err)
			}
			if err := c.ReadAt(t.Context(), p, 0); err == nil && !bytes.Equal(p, want) {
				t.Error("a damaged grain is read")
			}
		}
	}
}

func FuzzDescriptor(f *testing.F) {
	for _, s := range goodDescriptors {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := parseDescriptor(b)
		if err != nil {
			return
		}
		if len(d.extents) == 0 || d.size() <= 0 || d.size() > maxDisk {
			t.Errorf("%d extents, %d bytes", len(d.extents), d.size())
		}
		all := files{"a": b, "x": make([]byte, 4096), "p": b}
		_, _ = all.open(t.Context(), "a")
	})
}

func FuzzSparse(f *testing.F) {
	small := disk.NewMem(200 << 10)
	if err := small.WriteAt(f.Context(), bytes.Repeat([]byte("abcdefgh"), 1000), 100<<10); err != nil {
		f.Fatal(err)
	}
	f.Add(sparseBytes(f, small), byte(0))
	f.Add(streamBytes(f, small), byte(0))
	rnd := rand.New(rand.NewPCG(1, 1))
	l := onTop(rnd, make([]byte, 40<<10), seGrain, 4)
	f.Add(buildSESparse(rnd, l, 80), byte(1))
	l = onTop(rnd, make([]byte, 40<<10), sector, 2)
	f.Add(buildCOWD(rnd, l, 80, 1), byte(2))
	f.Add(sparseBytes(f, small), byte(3))
	f.Fuzz(func(t *testing.T, b []byte, kind byte) {
		if len(b) > 1<<20 {
			return
		}
		all := files{"a": b}
		if k := kind % 4; k > 0 {
			all = files{"a": snapshotText("custom", []string{"", kindSESparse, kindVMFSSparse, kindSparse}[k], "x", 80, "1", "ffffffff", ""), "x": b}
		}
		// Errors are fine; panics, endless loops and huge allocations are not.
		_ = all.walk(t.Context(), "a")
	})
}

func FuzzStream(f *testing.F) {
	small := disk.NewMem(40 << 20)
	for _, off := range []int64{0, 100 << 10, 39 << 20} {
		if err := small.WriteAt(f.Context(), bytes.Repeat([]byte("abcdefgh"), 100), off); err != nil {
			f.Fatal(err)
		}
	}
	whole := streamBytes(f, small)
	head := whole[:ourOverhead]
	f.Add(whole[ourOverhead:])
	f.Add(noFooter(bytes.Clone(whole))[ourOverhead:])
	f.Add(append(bytes.Clone(whole), make([]byte, 1000)...)[ourOverhead:])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		_ = files{"a": append(bytes.Clone(head), b...)}.walk(t.Context(), "a")
	})
}
