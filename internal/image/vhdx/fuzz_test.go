package vhdx

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"holdfast/internal/disk"
)

// bases are the files that FuzzImage patches.
func bases(f testing.TB) []*build {
	rnd := rand.New(rand.NewPCG(1, 2))
	base := newBuild(f, rnd, buildOptions{size: 2<<20 + 512, block: 1 << 20, sector: 512})
	base.block(1, blockPresent, false)
	child := newBuild(f, rnd, buildOptions{size: 2<<20 + 512, block: 1 << 20, sector: 512, parent: base, parentName: "p"})
	child.block(0, blockPartial, false)
	child.block(1, blockUnmapped, false)
	dirty := newBuild(f, rnd, buildOptions{size: 2 << 20, block: 1 << 20, sector: 4096})
	dirty.both(48, dirty.id[:])
	e := logEntry{seq: 5, guid: dirty.id, flushed: mib, last: dirty.next, changes: []logChange{{off: dirty.metadata + 512<<10, zeros: 4096}, {off: dirty.bat, page: make([]byte, logSector)}}}
	dirty.putLog(0, e.bytes())
	return []*build{base, child, dirty}
}

// FuzzImage reads files made of one of a few good ones and a list of patches:
// place, offset, length, bytes. Checksums are mended, so that what lies behind
// them is reached. Errors are fine; panics, endless loops and large
// allocations are not.
func FuzzImage(f *testing.F) {
	list := bases(f)
	var files []*disk.Mem
	var places [][]int64
	for _, b := range list {
		b.put(headerOff2, make([]byte, headerLen)) // the patched copies are to count
		b.put(regionOff2, make([]byte, regionLen))
		files = append(files, b.file())
		bitmap := int64(b.entryAt(b.g.bitmapIndex(0)) & offsetMask)
		places = append(places, []int64{headerOff1, regionOff1, b.metadata, b.metadata + metadataTable, b.bat, b.log, bitmap})
	}
	for i := range list {
		f.Add([]byte{byte(i)})
		for place := range byte(7) {
			f.Add([]byte{byte(i), place, 16, 0, 4, 1, 2, 3, 4})
			f.Add([]byte{byte(i), place, 0, 0, 8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, place, 72, 0, 1, 0x10})
		}
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) == 0 || len(in) > 4096 {
			return
		}
		base := int(in[0]) % len(list)
		m, places := files[base].Clone(), places[base]
		for in = in[1:]; len(in) >= 4; {
			at := places[int(in[0])%len(places)] + int64(binary.LittleEndian.Uint16(in[1:]))
			n := min(int(in[3]), len(in)-4)
			if err := m.WriteAt(t.Context(), in[4:4+n], at); err != nil {
				t.Fatal(err)
			}
			in = in[4+n:]
		}
		for _, x := range [][2]int64{{headerOff1, headerLen}, {regionOff1, regionLen}} {
			p := make([]byte, x[1])
			if err := m.ReadAt(t.Context(), p, x[0]); err != nil {
				t.Fatal(err)
			}
			sign(p)
			if err := m.WriteAt(t.Context(), p, x[0]); err != nil {
				t.Fatal(err)
			}
		}
		_ = walk(t.Context(), m)
	})
}

// FuzzLog replays logs: the input is the beginning of the log; the checksums
// of what looks like entries are mended.
func FuzzLog(f *testing.F) {
	g := guid{1, 2, 3}
	page := make([]byte, logSector)
	for i := range page {
		page[i] = byte(i)
	}
	e := logEntry{seq: 7, guid: g, flushed: 1, last: 9 * mib}
	f.Add(e.bytes())
	e.changes = []logChange{{off: 4 * mib, page: page}, {off: 4*mib - 8192, zeros: 64 << 10}}
	one := e.bytes()
	f.Add(one)
	e.seq, e.tail = 8, int64(len(one))
	f.Add(append(one, e.bytes()...))
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 64<<10 {
			return
		}
		log := make([]byte, mib)
		copy(log, in)
		for at := 0; at < len(in); at += logSector {
			n := int64(binary.LittleEndian.Uint32(log[at+8:]))
			if string(log[at:at+4]) == "loge" && n >= logSector && n%logSector == 0 && int64(at)+n <= mib {
				sign(log[at : int64(at)+n])
			}
		}
		m := disk.NewMem(3 * mib)
		if err := m.WriteAt(t.Context(), log, mib); err != nil {
			t.Fatal(err)
		}
		r, err := replay(t.Context(), m, &header{logGUID: g, logOff: mib, logLen: mib})
		if err != nil {
			return
		}
		end := int64(0)
		for _, c := range r.changes {
			if c.off < end || c.end <= c.off || c.end > r.size {
				t.Fatalf("change of %d to %d after %d, of %d bytes", c.off, c.end, end, r.size)
			}
			end = c.end
			p := make([]byte, min(c.end-c.off, 64<<10))
			if err := r.ReadAt(t.Context(), p, c.off); err != nil {
				t.Fatal(err)
			}
		}
	})
}
