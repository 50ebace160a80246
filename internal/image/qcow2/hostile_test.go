package qcow2

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"holdfast/internal/disk"
	"holdfast/internal/image"
)

func fileOf(d disk.Reader) image.File { return image.File{Name: "test.qcow2", Disk: d} }

// small is an image of 8 MiB with some data, and the place of its tables.
type small struct {
	b      []byte
	l1, l2 int64
	data   int64 // the cluster of the disk's offset 64 KiB
}

func newSmall(t testing.TB) *small {
	t.Helper()
	return newImage(t, 8<<20, 300<<10, 64<<10)
}

// newImage is an image with n bytes of data from its second cluster on.
func newImage(t testing.TB, size, n, cluster int64) *small {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.qcow2")
	w, err := Create(path, size, Options{ClusterSize: cluster})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.WriteAt(t.Context(), bytes.Repeat([]byte{7}, int(n)), cluster); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	s := &small{b: b}
	s.l1 = int64(binary.BigEndian.Uint64(b[40:]))
	s.l2 = int64(binary.BigEndian.Uint64(b[s.l1:]) & offsetMask)
	s.data = int64(binary.BigEndian.Uint64(b[s.l2+8:]) & offsetMask)
	return s
}

func (s *small) put32(at int64, v uint32) { binary.BigEndian.PutUint32(s.b[at:], v) }
func (s *small) put64(at int64, v uint64) { binary.BigEndian.PutUint64(s.b[at:], v) }

// noData gives any data file as an empty one of 1 MiB.
func noData(_ context.Context, _, name string) (image.File, error) {
	return image.File{Name: "data", Disk: disk.NewMem(1 << 20)}, nil
}

// walk opens an image and reads all that it will give, and the snapshots.
func walk(ctx context.Context, b []byte) error {
	m := disk.NewMem(int64(len(b)))
	if err := m.WriteAt(ctx, b, 0); err != nil {
		return err
	}
	im, err := Open(ctx, fileOf(m), noData)
	if err != nil {
		return err
	}
	defer im.Close()
	_, errs := im.Snapshots(ctx)
	p := make([]byte, 256<<10)
	runs := 0
	for r, err := range im.Runs(ctx, 0, im.Info().Size) {
		if err != nil {
			errs = errors.Join(errs, err)
			break
		}
		if runs++; runs > 1000 {
			break
		}
		if r.State == image.Data {
			errs = errors.Join(errs, im.ReadAt(ctx, p[:min(r.Len, int64(len(p)))], r.Off))
		}
	}
	return errs
}

func TestHostileImages(t *testing.T) {
	good := newSmall(t)
	if err := walk(t.Context(), good.b); err != nil {
		t.Fatalf("the image itself is not good: %v", err)
	}
	for name, c := range map[string]struct {
		do   func(s *small)
		want string // part of the error
		is   error
	}{
		"empty file":                        {func(s *small) { s.b = nil }, "too few", image.ErrFormat},
		"nothing but magic":                 {func(s *small) { s.b = s.b[:4] }, "too few", image.ErrFormat},
		"v3 header cut":                     {func(s *small) { s.b = s.b[:100] }, "too few", image.ErrFormat},
		"another magic":                     {func(s *small) { s.b[0] = 'X' }, "not a qcow2 image", image.ErrFormat},
		"version 4":                         {func(s *small) { s.put32(4, 4) }, "version 4", image.ErrUnsupported},
		"version 1":                         {func(s *small) { s.put32(4, 1) }, "version 1", image.ErrUnsupported},
		"cluster_bits 8":                    {func(s *small) { s.put32(20, 8) }, "cluster_bits", image.ErrFormat},
		"cluster_bits 63":                   {func(s *small) { s.put32(20, 63) }, "cluster_bits", image.ErrFormat},
		"size beyond the L1 table":          {func(s *small) { s.put64(24, 1<<40) }, "the disk needs", image.ErrFormat},
		"size of 2^63":                      {func(s *small) { s.put64(24, 1<<63) }, "virtual size", image.ErrFormat},
		"L1 table of 2^32 entries":          {func(s *small) { s.put32(36, 1<<32-1) }, "L1 table", image.ErrFormat},
		"L1 table longer than the file":     {func(s *small) { s.put32(36, 1<<20) }, "beyond the file's end", image.ErrFormat},
		"L1 table unaligned":                {func(s *small) { s.put64(40, uint64(s.l1+8)) }, "L1 table", image.ErrFormat},
		"L1 table at 2^63":                  {func(s *small) { s.put64(40, 1<<63) }, "L1 table", image.ErrFormat},
		"L1 table at the header":            {func(s *small) { s.put64(40, 0) }, "L1 table", image.ErrFormat},
		"refcount table too long":           {func(s *small) { s.put32(56, 1<<30) }, "refcount table", image.ErrFormat},
		"refcount table beyond the end":     {func(s *small) { s.put64(48, 1<<40) }, "refcount table", image.ErrFormat},
		"refcount_order 7":                  {func(s *small) { s.put32(96, 7) }, "refcount_order", image.ErrFormat},
		"header_length 80":                  {func(s *small) { s.put32(100, 80) }, "header_length", image.ErrFormat},
		"header_length 2^31":                {func(s *small) { s.put32(100, 1<<31) }, "header_length", image.ErrFormat},
		"many snapshots":                    {func(s *small) { s.put32(60, 1<<31) }, "snapshot table", image.ErrFormat},
		"snapshots in the L2 table":         {func(s *small) { s.put32(60, 2); s.put64(64, uint64(s.l2)) }, "snapshot table, entry 0", image.ErrFormat},
		"corrupt bit":                       {func(s *small) { s.b[79] |= bitCorrupt }, "qemu-img check -r all", image.ErrFormat},
		"AES":                               {func(s *small) { s.put32(32, 1) }, "encrypted (AES)", image.ErrUnsupported},
		"LUKS":                              {func(s *small) { s.put32(32, 2) }, "encrypted (LUKS)", image.ErrUnsupported},
		"crypt_method 3":                    {func(s *small) { s.put32(32, 3) }, "crypt_method", image.ErrFormat},
		"unknown feature":                   {func(s *small) { s.b[74] |= 1 }, "bit 40", image.ErrUnsupported},
		"unknown feature, named":            {func(s *small) { s.b[74] |= 1; s.name(40, "warp drive") }, `bit 40 ("warp drive")`, image.ErrUnsupported},
		"compression bit without type":      {func(s *small) { s.b[79] |= bitCompression }, "compression type", image.ErrFormat},
		"compression type 2":                {func(s *small) { s.b[79] |= bitCompression; s.put32(100, 112); s.b[104] = 2 }, "compression type 2", image.ErrUnsupported},
		"extension beyond the cluster":      {func(s *small) { s.put32(104, 0x1234); s.put32(108, 1<<31) }, "do not fit", image.ErrFormat},
		"endless extensions":                {func(s *small) { s.fill(104, 64<<10, 0, 0, 0, 9, 0, 0, 0, 0) }, "more than 64", image.ErrFormat},
		"backing name beyond the cluster":   {func(s *small) { s.put64(8, 64<<10-2); s.put32(16, 10) }, "backing file's name", image.ErrFormat},
		"backing name of 1024":              {func(s *small) { s.put64(8, 200); s.put32(16, 1024) }, "backing file's name", image.ErrFormat},
		"data file without a name":          {func(s *small) { s.b[79] |= bitDataFile }, "does not name it", image.ErrFormat},
		"L2 table beyond the end":           {func(s *small) { s.put64(s.l1, 1<<40) }, "beyond the file's end", image.ErrFormat},
		"L2 table at the file's end":        {func(s *small) { s.put64(s.l1, uint64(len(s.b))) }, "beyond the file's end", image.ErrFormat},
		"L2 table unaligned":                {func(s *small) { s.put64(s.l1, uint64(s.l2+512)) }, "L1 entry 0", image.ErrFormat},
		"L2 table is the L1 table":          {func(s *small) { s.put64(s.l1, uint64(s.l1)) }, "overlaps the L1 table", image.ErrFormat},
		"L2 table is the refcount table":    {func(s *small) { s.put64(s.l1, binary.BigEndian.Uint64(s.b[48:])) }, "overlaps the refcount table", image.ErrFormat},
		"L1 entry with reserved bits":       {func(s *small) { s.put64(s.l1, uint64(s.l2)|1) }, "L1 entry 0", image.ErrFormat},
		"cluster beyond the end":            {func(s *small) { s.put64(s.l2, 1<<50) }, "truncated", image.ErrFormat},
		"cluster is the header":             {func(s *small) { s.put64(s.l2, 1<<9) }, "entry 0", image.ErrFormat},
		"cluster is the L1 table":           {func(s *small) { s.put64(s.l2, uint64(s.l1)) }, "overlaps the L1 table", image.ErrFormat},
		"cluster is its own L2 table":       {func(s *small) { s.put64(s.l2, uint64(s.l2)) }, "overlaps the L2 table", image.ErrFormat},
		"cluster unaligned":                 {func(s *small) { s.put64(s.l2, uint64(s.data+512)) }, "L2 table at offset", image.ErrFormat},
		"reserved bits":                     {func(s *small) { s.put64(s.l2, uint64(s.data)|2) }, "L2 table at offset", image.ErrFormat},
		"zero flag in version 2":            {func(s *small) { s.put32(4, 2); s.put64(s.l2, 1) }, "L2 table at offset", image.ErrFormat},
		"compressed, beyond the end":        {func(s *small) { s.put64(s.l2, flagCompressed|1<<40) }, "does not lie in the file", image.ErrFormat},
		"compressed, in the header":         {func(s *small) { s.put64(s.l2, flagCompressed|8) }, "does not lie in the file", image.ErrFormat},
		"compressed, rubbish":               {func(s *small) { s.put64(s.l2, flagCompressed|uint64(s.data)) }, "compressed cluster", image.ErrFormat},
		"compressed, too short":             {func(s *small) { s.zstd(t, make([]byte, 1000)) }, "only 1000 of 65536", image.ErrFormat},
		"zstd with a huge window":           {func(s *small) { s.bomb() }, "compressed cluster", image.ErrFormat},
		"extended entries, small cluster":   {func(s *small) { s.b[79] |= bitExtendedL2; s.put32(20, 12) }, "extended L2", image.ErrFormat},
		"subcluster both data and zeros":    {func(s *small) { s.b[79] |= bitExtendedL2; s.put64(s.l2, uint64(s.data)); s.put64(s.l2+8, 1<<32|1) }, "both", image.ErrFormat},
		"subclusters of no cluster":         {func(s *small) { s.b[79] |= bitExtendedL2; s.put64(s.l2, 0); s.put64(s.l2+8, 1) }, "has none", image.ErrFormat},
		"data file, cluster elsewhere":      {func(s *small) { s.dataFile("d") }, "external data file", image.ErrFormat},
		"data file too short":               {func(s *small) { s.dataFile("d"); s.put64(s.l2, 0); s.fillL2(5 << 20) }, "truncated", image.ErrFormat},
		"data file, compressed":             {func(s *small) { s.dataFile("d"); s.put64(s.l2, flagCompressed|1<<20) }, "compressed", image.ErrFormat},
		"raw data file with a backing file": {func(s *small) { s.dataFile("d"); s.b[95] |= bitRawData; s.put64(8, 200); s.put32(16, 1) }, "exclude", image.ErrFormat},
	} {
		t.Run(name, func(t *testing.T) {
			s := *good
			s.b = bytes.Clone(good.b)
			c.do(&s)
			err := walk(t.Context(), s.b)
			if err == nil || !strings.Contains(err.Error(), c.want) || !errors.Is(err, c.is) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// name adds a feature name table for one incompatible feature.
func (s *small) name(bit byte, name string) {
	s.put32(104, extFeatureNames)
	s.put32(108, 48)
	s.b[112], s.b[113] = 0, bit
	copy(s.b[114:], name)
}

func (s *small) dataFile(name string) {
	s.b[79] |= bitDataFile
	s.put32(104, extDataFile)
	s.put32(108, uint32(len(name)))
	copy(s.b[112:], name)
}

// fillL2 maps every cluster up to an offset to itself.
func (s *small) fillL2(end uint64) {
	for off := uint64(0); off < end; off += 64 << 10 {
		s.put64(s.l2+int64(off>>13), off|flagCopied)
	}
}

func (s *small) fill(from, to int64, p ...byte) {
	for ; from < to; from += int64(len(p)) {
		copy(s.b[from:to], p)
	}
}

// setZstd makes the image one with zstd, and its first cluster compressed.
func (s *small) setZstd() {
	s.b[79] |= bitCompression
	s.put32(100, 112)
	s.b[104] = compressZstd
	x := 62 - (16 - 8)
	s.put64(s.l2, flagCompressed|uint64(s.data)|7<<x)
}

func (s *small) zstd(t testing.TB, plain []byte) {
	t.Helper()
	e, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	s.setZstd()
	s.fill(s.data, s.data+4096, 0)
	copy(s.b[s.data:], e.EncodeAll(plain, nil))
}

// bomb is a frame that asks for a window of 1 GiB, and for as much content.
func (s *small) bomb() {
	s.setZstd()
	copy(s.b[s.data:], []byte{0x28, 0xb5, 0x2f, 0xfd, 0x80, 0xa0, 0, 0, 0, 0x40, 0x02, 0xff, 0xff, 0xff})
}

// TestCompressedWithRubbishBehind: a cluster's compressed length is only known
// to the sector, and may end with the file.
func TestCompressedWithRubbishBehind(t *testing.T) {
	s := newSmall(t)
	plain := bytes.Repeat([]byte("0123456789abcdef"), 4096)
	s.zstd(t, plain)
	for i := s.data + 2048; i < s.data+4096; i++ {
		s.b[i] = byte(i) // the sectors behind the frame
	}
	m := disk.NewMem(int64(len(s.b)))
	if err := m.WriteAt(t.Context(), s.b, 0); err != nil {
		t.Fatal(err)
	}
	im, err := Open(t.Context(), fileOf(m), nil)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(plain))
	if err := im.ReadAt(t.Context(), got, 0); err != nil || !bytes.Equal(got, plain) {
		t.Fatalf("wrong content: %v", err)
	}
}

// TestLastEntryOfSlice: reads that begin at the last entry of a piece of a
// table, as it is cached.
func TestLastEntryOfSlice(t *testing.T) {
	dir := t.TempDir()
	w, err := Create(filepath.Join(dir, "a"), 1<<30, Options{})
	if err != nil {
		t.Fatal(err)
	}
	model := map[int64][]byte{}
	for i := int64(1); i < 8; i++ {
		off := i*(sliceLen/8)<<16 - 1<<16
		model[off] = bytes.Repeat([]byte{byte(i)}, 2<<16)
		if err := w.WriteAt(t.Context(), model[off], off); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	c := openChain(t, dir, "a")
	for off, want := range model {
		got := make([]byte, len(want))
		if err := c.ReadAt(t.Context(), got, off); err != nil || !bytes.Equal(got, want) {
			t.Errorf("at %d: %v", off, err)
		}
	}
}

// TestTruncatedFile: an image that an interrupted copy cut short must not read
// as zeros.
func TestTruncatedFile(t *testing.T) {
	s := newSmall(t)
	if err := walk(t.Context(), s.b[:s.data+100]); !errors.Is(err, image.ErrFormat) {
		t.Errorf("error %v", err)
	}
}

func TestBackingChainsThatAreRefused(t *testing.T) {
	dir := t.TempDir()
	overlay := func(name, backing, format string) {
		t.Helper()
		if err := CreateOverlay(filepath.Join(dir, name), 1<<20, backing, format, Options{ClusterSize: 512}); err != nil {
			t.Fatal(err)
		}
	}
	overlay("self", "self", Name)
	overlay("a", "b", Name)
	overlay("b", "./a", Name)
	overlay("absolute", "/etc/shadow", "raw")
	overlay("up", "../../etc/shadow", "raw")
	overlay("json", `json:{"driver":"raw","file":{"filename":"/etc/shadow"}}`, "raw")
	overlay("nbd", "nbd://localhost/x", "raw")
	overlay("missing", "nowhere", "raw")
	overlay("unknown", "raw", "vmdk")
	overlay("notqcow2", "raw", Name)
	if err := os.WriteFile(filepath.Join(dir, "raw"), []byte("raw bytes"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]error{
		"self": image.ErrFormat, "a": image.ErrFormat, "notqcow2": image.ErrFormat,
		"absolute": image.ErrOutside, "up": image.ErrOutside, "json": image.ErrOutside, "nbd": image.ErrOutside,
		"missing": os.ErrNotExist, "unknown": image.ErrUnsupported,
	} {
		f, err := in(dir)(t.Context(), "x", name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err = formats.Open(t.Context(), f, Name, in(dir)); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
}

// TestParentWithoutFormat: QEMU once made overlays that do not say what their
// parent is. A raw parent whose guest wrote a qcow2 header must not be
// followed to where that points.
func TestParentWithoutFormat(t *testing.T) {
	dir := t.TempDir()
	forge := func(name, backing string) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := CreateOverlay(path, 1<<20, backing, "raw", Options{}); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(make([]byte, 4), 104); err != nil { // the extension that says the format
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	secret := filepath.Join(dir, "secret.raw")
	if err := os.WriteFile(secret, bytes.Repeat([]byte("secret"), 1000), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := CreateOverlay(filepath.Join(dir, "evil.raw"), 1<<20, "secret.raw", "raw", Options{}); err != nil {
		t.Fatal(err)
	}
	if err := CreateOverlay(filepath.Join(dir, "mid.qcow2"), 1<<20, "secret.raw", "raw", Options{}); err != nil {
		t.Fatal(err)
	}
	forge("onraw", "secret.raw")  // no mark: can only be raw
	forge("onqcow2", "mid.qcow2") // mark and name agree
	forge("onevil", "evil.raw")
	for _, name := range []string{"onraw", "onqcow2"} {
		p := make([]byte, 6)
		if err := openChain(t, dir, name).ReadAt(t.Context(), p, 0); err != nil || string(p) != "secret" {
			t.Errorf("%s: %q %v", name, p, err)
		}
	}
	f, err := in(dir)(t.Context(), "x", "onevil")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := formats.Open(t.Context(), f, Name, in(dir)); !errors.Is(err, image.ErrFormat) || !strings.Contains(err.Error(), "qemu-img rebase") {
		t.Errorf("onevil: %v", err)
	}
}

func FuzzImage(f *testing.F) {
	// Small images: the fuzzer copies and compares them whole.
	s := newImage(f, 64<<10, 2048, 512)
	f.Add(bytes.Clone(s.b))
	s.b[79] |= bitCompression
	s.put32(100, 112)
	s.b[104] = compressZstd
	s.put64(s.l2, flagCompressed|uint64(s.data))
	f.Add(bytes.Clone(s.b))
	s = newImage(f, 256<<10, 100, 16<<10)
	s.b[79] |= bitExtendedL2
	s.put64(s.l2, uint64(s.data))
	s.put64(s.l2+8, 0xff00ff00)
	f.Add(bytes.Clone(s.b))
	s = newImage(f, 64<<10, 2048, 512)
	s.name(3, "x")
	s.put64(8, 300)
	s.put32(16, 20)
	f.Add(bytes.Clone(s.b))
	s.dataFile("d")
	f.Add(bytes.Clone(s.b))
	s = newImage(f, 64<<10, 2048, 512)
	s.put32(60, 1)
	s.put64(64, uint64(s.data))
	f.Add(bytes.Clone(s.b))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		// Errors are fine; panics, endless loops and huge allocations are not.
		_ = walk(t.Context(), b)
	})
}
