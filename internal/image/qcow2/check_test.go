package qcow2

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// verdict is what a check says of an image.
type verdict struct {
	damaged, leaks bool
	text           string
}

// ours is Check's verdict; an image that does not open is damaged.
func ours(t testing.TB, dir, name string) verdict {
	t.Helper()
	f, err := in(dir)(t.Context(), "x", name)
	if err != nil {
		t.Fatal(err)
	}
	im, err := OpenDamaged(t.Context(), f, in(dir))
	if err != nil {
		f.Disk.Close()
		return verdict{damaged: true, text: err.Error()}
	}
	defer im.Close()
	return verdictOf(t, im)
}

func verdictOf(t testing.TB, im *Image) (v verdict) {
	t.Helper()
	err := im.Check(t.Context(), func(s string) {
		if strings.HasPrefix(s, "leak:") {
			v.leaks = true
		} else {
			v.damaged = true
		}
		v.text += s + "\n"
	})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// theirs is the verdict of qemu-img check.
func theirs(t testing.TB, path string) verdict {
	t.Helper()
	cmd := exec.Command("qemu-img", "check", "-f", "qcow2", "--output=json", path)
	cmd.Dir = filepath.Dir(path)
	out, err := cmd.Output()
	var r struct {
		Corruptions, Leaks int
		CheckErrors        int `json:"check-errors"`
	}
	v := verdict{text: string(out)}
	if x, ok := err.(*exec.ExitError); ok {
		v.text += string(x.Stderr)
	} else if err != nil {
		t.Fatal(err)
	}
	if json.Unmarshal(out, &r) != nil { // it did not open
		v.damaged = true
		return v
	}
	v.damaged, v.leaks = r.Corruptions > 0 || r.CheckErrors > 0, r.Leaks > 0
	return v
}

// agree checks that both find nothing wrong.
func agree(t testing.TB, path string) {
	t.Helper()
	if v := ours(t, filepath.Dir(path), filepath.Base(path)); v.damaged || v.leaks {
		t.Errorf("our check of %s:\n%s", path, v.text)
	}
	if v := theirs(t, path); v.damaged || v.leaks {
		t.Errorf("qemu-img check of %s:\n%s", path, v.text)
	}
}

// rich makes an image with all kinds of clusters, snapshots and bitmaps.
func rich(t testing.TB, dir, o string, rnd *rand.Rand) string {
	t.Helper()
	const size = 4 << 20
	path := filepath.Join(dir, "a.qcow2")
	create := func(o string) {
		cmd := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", "-o", o, path, fmt.Sprint(size))
		cmd.Dir = dir
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v %s", err, out)
		}
	}
	if c, ok := strings.CutPrefix(o, "compressed "); ok {
		noise(t, filepath.Join(dir, "raw"), size, rnd)
		run(t, "qemu-img", "convert", "-c", "-t", "unsafe", "-f", "raw", "-O", "qcow2", "-o", c, filepath.Join(dir, "raw"), path)
	} else {
		create(o)
	}
	scribble(t, path, size, 10, rnd)
	if strings.Contains(o, "data_file") {
		return path
	}
	if !strings.Contains(o, "refcount_bits=1,") {
		run(t, "qemu-img", "snapshot", "-c", "first", path)
		scribble(t, path, size, 5, rnd)
		run(t, "qemu-img", "snapshot", "-c", "second", path)
	}
	if !strings.Contains(o, "compat=0.10") {
		run(t, "qemu-img", "bitmap", "--add", "-g", "512", path, "fine")
		run(t, "qemu-img", "bitmap", "--add", path, "usual")
	}
	scribble(t, path, size, 5, rnd)
	return path
}

var richOptions = []string{
	"compat=1.1", "compat=0.10", "cluster_size=512", "cluster_size=2097152", "extended_l2=on", "extended_l2=on,cluster_size=16384",
	"refcount_bits=1,cluster_size=4096", "refcount_bits=2,cluster_size=4096", "refcount_bits=4", "refcount_bits=8", "refcount_bits=32", "refcount_bits=64,cluster_size=512",
	"preallocation=metadata", "preallocation=falloc", "compressed compression_type=zstd,cluster_size=4096", "compressed compression_type=zlib",
	"data_file=data.raw", "data_file=data.raw,extended_l2=on", "data_file=data.raw,data_file_raw=on",
}

func TestCheckOfGoodImages(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	for i, o := range richOptions {
		if testing.Short() && i%3 != 0 {
			continue
		}
		t.Run(o, func(t *testing.T) {
			dir := t.TempDir()
			path := rich(t, dir, o, disktest.Rand(t))
			agree(t, path)
			if im := openImage(t, dir, "a.qcow2"); im.h.snapshots > 0 {
				if v := verdictOf(t, openSnapshot(t, im, "first")); v.damaged || v.leaks {
					t.Errorf("check of a snapshot:\n%s", v.text)
				}
			}
		})
	}
}

// places lists the metadata of an image: offsets of words of 8 bytes.
func metadata(t testing.TB, path string) []int64 {
	t.Helper()
	im := openImage(t, filepath.Dir(path), filepath.Base(path))
	var words []int64
	some := func(off, n int64) {
		for i := int64(0); i < min(n, 64); i += 8 { // what is used lies in front
			words = append(words, off+i)
		}
	}
	c := newChecker(im, func(string) {}, 64<<10)
	c.refs, c.uses = make([]uint16, c.window), make([]uint8, c.window)
	if err := c.findTables(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.count(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, u := range c.uses {
		switch u & useMask {
		case useL1, useL2, useRefTable, useRefBlock, useSnapshots, useBitmaps:
			some(int64(i)*im.cluster, im.cluster)
		}
	}
	return words
}

// TestCheckOfDamagedImages changes a word of the tables and compares with what
// qemu-img says. What it calls damaged must be so here. The reverse is not
// wanted: it lets pass what makes reads fail.
func TestCheckOfDamagedImages(t *testing.T) {
	need(t, "qemu-img", "qemu-io")
	rounds := 8
	if testing.Short() {
		rounds = 3
	}
	same, stricter := 0, 0
	for _, o := range []string{"compat=1.1", "cluster_size=4096", "extended_l2=on", "compressed compression_type=zstd", "refcount_bits=2"} {
		t.Run(o, func(t *testing.T) {
			rnd, dir := disktest.Rand(t), t.TempDir()
			path := rich(t, dir, o, rnd)
			good, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			words := metadata(t, path)
			for range rounds {
				b := bytes.Clone(good)
				at := words[rnd.IntN(len(words))]
				old := binary.BigEndian.Uint64(b[at:])
				word := old
				switch rnd.IntN(6) {
				case 0:
					word = 0
				case 1:
					word ^= 1 << rnd.IntN(64)
				case 2:
					word ^= flagCopied
				case 3: // what another word says
					word = binary.BigEndian.Uint64(b[words[rnd.IntN(len(words))]:])
				case 4: // another cluster
					word = word&^offsetMask | uint64(rnd.Int64N(int64(len(b)))&^65535)
				case 5:
					word += 1
				}
				binary.BigEndian.PutUint64(b[at:], word)
				bad := filepath.Join(dir, "bad.qcow2")
				if err := os.WriteFile(bad, b, 0o600); err != nil {
					t.Fatal(err)
				}
				us, them := ours(t, dir, "bad.qcow2"), theirs(t, bad)
				what := fmt.Sprintf("word at %d: %#x, was %#x\nqemu-img: %s\nours: %s", at, word, old, them.text, us.text)
				switch {
				case us.damaged == them.damaged && (us.damaged || us.leaks == them.leaks):
					same++
				case us.damaged:
					stricter++
					t.Logf("stricter: %s", what)
				default:
					t.Errorf("not seen: %s", what)
				}
			}
		})
	}
	t.Logf("%d verdicts are the same, %d stricter", same, stricter)
}

// TestCheckFinds: each kind of damage by its own words.
func TestCheckFinds(t *testing.T) {
	block := func(s *small) int64 { // the first refcount block
		return int64(binary.BigEndian.Uint64(s.b[binary.BigEndian.Uint64(s.b[48:]):]))
	}
	for name, c := range map[string]struct {
		do   func(s *small)
		want string
	}{
		"good":                  {func(s *small) {}, ""},
		"leak":                  {func(s *small) { s.put64(s.l2+8, 0) }, "leak: 1 clusters from offset"},
		"not counted":           {func(s *small) { s.b[block(s)+s.data>>16*2+1] = 0 }, "used 1 times and counted 0"},
		"block not there":       {func(s *small) { s.put64(int64(binary.BigEndian.Uint64(s.b[48:])), 0) }, "counted 0"},
		"block beyond the end":  {func(s *small) { s.put64(int64(binary.BigEndian.Uint64(s.b[48:])), 1<<40) }, "refcount table entry 0"},
		"block unaligned":       {func(s *small) { s.put64(int64(binary.BigEndian.Uint64(s.b[48:])), 512) }, "refcount table entry 0 is"},
		"block is the L2 table": {func(s *small) { s.put64(int64(binary.BigEndian.Uint64(s.b[48:]))+8, uint64(s.l2)) }, "a refcount block and for an L2 table"},
		"two of one cluster":    {func(s *small) { s.put64(s.l2+8, uint64(s.data+64<<10)|flagCopied) }, "used 2 times and counted 1"},
		"data is an L2 table":   {func(s *small) { s.put64(s.l2+8, uint64(s.l2)|flagCopied) }, "overlaps the L2 table"},
		"data is a block":       {func(s *small) { s.put64(s.l2+8, uint64(block(s))|flagCopied) }, "for a refcount block and for data"},
		"copied flag missing":   {func(s *small) { s.put64(s.l2+8, uint64(s.data)) }, "an entry says otherwise"},
		"copied flag too much":  {func(s *small) { s.b[block(s)+s.data>>16*2+1] = 2 }, "an entry says otherwise"},
		"reserved bits":         {func(s *small) { s.put64(s.l2+8, uint64(s.data)|flagCopied|4) }, "entry 1"},
		"marked corrupt":        {func(s *small) { s.b[79] |= bitCorrupt }, "marked corrupt"},
		"snapshot not counted":  {func(s *small) { s.withSnapshot() }, "used 2 times and counted 1"},
		"snapshot with bad L1":  {func(s *small) { s.put64(s.withSnapshot(), 512) }, `snapshot "snap"`},
		"snapshot table":        {func(s *small) { s.put32(s.withSnapshot()+36, 1<<30) }, "snapshot table, entry 0"},
		"bitmap not counted":    {func(s *small) { s.withBitmap(1) }, "used 1 times and counted 0"},
		"bitmap bits are data":  {func(s *small) { _, table, _ := s.withBitmap(1); s.put64(table, uint64(s.data)) }, "for a bitmap and for data"},
		"bitmap entry":          {func(s *small) { _, table, _ := s.withBitmap(1); s.put64(table, 512) }, `bitmap "bit"`},
		"bitmap directory":      {func(s *small) { dir, _, _ := s.withBitmap(1); s.put32(dir+12, 1<<31) }, "bitmap directory"},
		"dirty":                 {func(s *small) { s.b[79] |= bitDirty; s.b[block(s)+1] = 0 }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSmall(t)
			c.do(s)
			im, err := openDamaged(t, s.b)
			if err != nil {
				t.Fatal(err)
			}
			if v := verdictOf(t, im); !strings.Contains(v.text, c.want) || c.want == "" && v.text != "" {
				t.Errorf("want %q, got:\n%s", c.want, v.text)
			}
		})
	}
}

// TestCheckInPasses: a file of more clusters than are counted at once. It is
// sparse; the refcounts say nothing of what lies far behind.
func TestCheckInPasses(t *testing.T) {
	const cluster, window = 512, 1024
	far := int64(5*window+100) * cluster
	s := newImage(t, 1<<20, 400<<10, cluster) // 800 clusters
	m := disk.NewMem(far + 2*cluster)
	if err := m.WriteAt(t.Context(), s.b, 0); err != nil {
		t.Fatal(err)
	}
	entry := binary.BigEndian.AppendUint64(nil, uint64(far)|flagCopied)
	l2 := int64(binary.BigEndian.Uint64(s.b[s.l1+31*8:]) & offsetMask)
	if l2 != 0 {
		t.Fatal("the image has more data than the test thinks")
	}
	last := int64(binary.BigEndian.Uint64(s.b[s.l1+12*8:]) & offsetMask)
	if err := m.WriteAt(t.Context(), entry, last+60*8); err != nil { // beyond the 800 clusters
		t.Fatal(err)
	}
	im, err := Open(t.Context(), fileOf(m), nil)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	if err := newChecker(im, func(s string) { got = append(got, s) }, window).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || !strings.Contains(got[0], fmt.Sprint(far)) || !strings.Contains(got[1], fmt.Sprintf("1 clusters from offset %d on are used 1 times and counted 0", far)) {
		t.Errorf("%q", got)
	}
}

func FuzzCheck(f *testing.F) {
	s := newImage(f, 64<<10, 2048, 512)
	f.Add(bytes.Clone(s.b))
	s.put32(60, 1)
	s.put64(64, uint64(s.data))
	copy(s.b[s.data:], s.b[40:48])
	s.put32(s.data+8, 3)
	f.Add(bytes.Clone(s.b))
	s = newImage(f, 256<<10, 100, 16<<10)
	s.b[79] |= bitExtendedL2
	s.put64(s.l2, uint64(s.data))
	s.put64(s.l2+8, 0xff00ff00)
	f.Add(bytes.Clone(s.b))
	s = newImage(f, 64<<10, 2048, 512)
	s.b[95] |= bitBitmaps
	s.put32(104, extBitmaps)
	s.put32(108, 24)
	s.put32(112, 1)
	s.put64(120, 32)
	s.put64(128, uint64(s.data))
	s.put64(s.data, uint64(s.data+512))
	s.put64(s.data+8, 1<<32)
	copy(s.b[s.data+16:], []byte{1, 9, 0, 3, 0, 0, 0, 0, 'b', 'i', 't'})
	s.put64(s.data+512, uint64(s.data+1024))
	f.Add(bytes.Clone(s.b))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		im, err := openDamaged(t, b)
		if err != nil {
			return
		}
		reports := 0
		_ = im.Check(t.Context(), func(string) { reports++ })
		if reports > 20*maxReports {
			t.Fatalf("%d reports", reports)
		}
	})
}
