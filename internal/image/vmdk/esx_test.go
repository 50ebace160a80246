package vmdk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/internal/disk/disktest"
	"holdfast/internal/image"
)

// grainState is what a test's builder makes of a grain.
type grainState int

const (
	grainAbsent grainState = iota
	grainZero
	grainUnmapped
	grainData
)

// layer is a snapshot for a builder: random states, and the disk's bytes with
// the layer on top of its parent.
type layer struct {
	states []grainState
	bytes  []byte // whole grains
}

// onTop makes a layer above a parent's bytes.
func onTop(rnd *rand.Rand, parent []byte, grain int64, kinds grainState) layer {
	n := up(int64(len(parent)), grain)
	l := layer{bytes: make([]byte, n*grain)}
	copy(l.bytes, parent)
	for len(l.states) < int(n) {
		s := grainState(rnd.IntN(int(kinds)))
		if s == kinds-1 {
			s = grainData
		}
		for range 1 + rnd.IntN(9) {
			if len(l.states) == int(n) {
				break
			}
			p := l.bytes[int64(len(l.states))*grain:][:grain]
			switch s {
			case grainData:
				disktest.Fill(rnd, p)
			case grainZero, grainUnmapped:
				clear(p)
			}
			l.states = append(l.states, s)
		}
	}
	return l
}

// places gives each grain of data a place in the file, in random order and
// with gaps.
func (l layer) places(rnd *rand.Rand) map[int]int64 {
	var held []int
	for i, s := range l.states {
		if s == grainData {
			held = append(held, i)
		}
	}
	if rnd.IntN(2) == 0 {
		rnd.Shuffle(len(held), func(i, j int) { held[i], held[j] = held[j], held[i] })
	}
	m, at := map[int]int64{}, int64(0)
	for _, i := range held {
		if rnd.IntN(20) == 0 {
			at++
		}
		m[i] = at
		at++
	}
	return m
}

// buildCOWD makes a VMFSSPARSE extent.
func buildCOWD(rnd *rand.Rand, l layer, sectors, grainSectors int64) []byte {
	grain := grainSectors * sector
	tables := up(int64(len(l.states)), cowdPerGT)
	dirLen := up(tables*4, sector) * sector
	first := cowdHeader + dirLen // tables are where they are first needed
	at := first
	le := binary.LittleEndian
	b := make([]byte, first)
	copy(b, cowdMagic)
	for i, v := range []uint32{1, 3, uint32(sectors), uint32(grainSectors), cowdHeader / sector, uint32(tables)} {
		le.PutUint32(b[4+4*i:], v)
	}
	tableAt := map[int64]int64{}
	for i, s := range l.states {
		if t := int64(i) / cowdPerGT; s == grainData && tableAt[t] == 0 {
			tableAt[t] = at
			le.PutUint32(b[cowdHeader+4*t:], uint32(at/sector))
			at += cowdPerGT * 4
		}
	}
	b = append(b, make([]byte, at-int64(len(b)))...)
	for i, place := range l.places(rnd) {
		off := at + place*grain
		if n := off + grain - int64(len(b)); n > 0 {
			b = append(b, make([]byte, n)...)
		}
		copy(b[off:], l.bytes[int64(i)*grain:][:grain])
		le.PutUint32(b[tableAt[int64(i)/cowdPerGT]+int64(i)%cowdPerGT*4:], uint32(off/sector))
	}
	le.PutUint32(b[28:], uint32(len(b)/sector))
	return b
}

// buildSESparse makes a SESPARSE extent.
func buildSESparse(rnd *rand.Rand, l layer, sectors int64) []byte {
	const perGT = seTable / 8
	count := up(int64(len(l.states)), perGT)
	dirLen := up(count*8, sector) * sector
	le := binary.LittleEndian
	const volatile, dir = 1 * sector, 4 * sector
	tables := dir + dirLen
	grains := up(tables+count*seTable, seGrain) * seGrain
	b := make([]byte, grains)
	put := func(i int, v int64) { le.PutUint64(b[8*i:], uint64(v)) }
	put(0, seMagic)
	put(1, seVersion)
	put(2, sectors)
	put(3, seGrain/sector)
	put(4, seTable/sector)
	for i, v := range []int64{volatile, sector, 2 * sector, sector, 3 * sector, sector, dir, dirLen, tables, count * seTable, 0, 0, 0, 0, grains, 0} {
		put(10+i, v/sector)
	}
	le.PutUint64(b[volatile:], seVolatileMagic)
	order := rnd.Perm(int(count)) // which table is whose
	places := l.places(rnd)
	for i, s := range l.states {
		t := int64(order[i/perGT])
		if s == grainAbsent {
			continue
		}
		le.PutUint64(b[dir+int64(i)/perGT*8:], 1<<60|uint64(t))
		var e uint64
		switch s {
		case grainZero:
			e = 2 << 60
		case grainUnmapped:
			e = 1 << 60
		case grainData:
			place := places[i]
			off := grains + place*seGrain
			if n := off + seGrain - int64(len(b)); n > 0 {
				b = append(b, make([]byte, n)...)
			}
			copy(b[off:], l.bytes[int64(i)*seGrain:][:seGrain])
			e = 3<<60 | uint64(place)&0xfff<<48 | uint64(place)>>12
		}
		le.PutUint64(b[tables+t*seTable+int64(i)%perGT*8:], e)
	}
	return b
}

// snapshotText is the descriptor of a snapshot in one extent, or of a base when
// it has no parent.
func snapshotText(createType, kind, extent string, sectors int64, cid, parentCID, hint string) []byte {
	s := fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=%s\nparentCID=%s\ncreateType=\"%s\"\n", cid, parentCID, createType)
	if hint != "" {
		s += fmt.Sprintf("parentFileNameHint=\"%s\"\n", hint)
	}
	return []byte(s + fmt.Sprintf("# Extent description\nRW %d %s \"%s\"\n\nddb.adapterType = \"lsilogic\"\n", sectors, kind, extent))
}

// TestSnapshotsOfESX builds chains of both kinds above a flat disk, and reads
// them, also with QEMU.
func TestSnapshotsOfESX(t *testing.T) {
	_, noQEMU := exec.LookPath("qemu-img")
	if noQEMU != nil {
		t.Log("NOT READ BY qemu-img: it is not installed")
	}
	for _, kind := range []string{kindVMFSSparse, kindSESparse} {
		for _, sectors := range []int64{8, 9000, 33000 + 3} { // in one table and in several
			if testing.Short() && sectors > 9000 {
				continue
			}
			t.Run(fmt.Sprintf("%s of %d sectors", kind, sectors), func(t *testing.T) {
				rnd, dir := disktest.Rand(t), t.TempDir()
				model := random(rnd, sectors*sector)
				write(t, filepath.Join(dir, "vm-flat.vmdk"), model)
				write(t, filepath.Join(dir, "vm.vmdk"), snapshotText("vmfs", kindVMFS, "vm-flat.vmdk", sectors, "00000001", "ffffffff", ""))
				for i := 1; i <= 2; i++ {
					hint := "vm.vmdk"
					if i == 2 {
						hint = "/vmfs/volumes/5f0c/vm/vm-000001.vmdk"
					}
					var l layer
					var b []byte
					createType, ext := "vmfsSparse", "delta"
					if kind == kindVMFSSparse {
						grain := []int64{1, 1, 8}[rnd.IntN(3)]
						l = onTop(rnd, model, grain*sector, 2)
						b = buildCOWD(rnd, l, sectors, grain)
					} else {
						createType, ext = "seSparse", "sesparse"
						l = onTop(rnd, model, seGrain, 4)
						b = buildSESparse(rnd, l, sectors)
					}
					name := fmt.Sprintf("vm-%06d", i)
					write(t, filepath.Join(dir, name+"-"+ext+".vmdk"), b)
					write(t, filepath.Join(dir, name+".vmdk"), snapshotText(createType, kind, name+"-"+ext+".vmdk", sectors,
						fmt.Sprintf("%08X", 0xabc0+i), fmt.Sprintf("%08x", map[int]int{1: 1, 2: 0xabc1}[i]), hint))
					model = l.bytes[:sectors*sector]
					c := openChain(t, dir, name+".vmdk")
					compare(t, c, model, rnd)
					sound(t, c)
					if noQEMU == nil && i == 1 { // of the second it follows the absolute path
						if got := rawOf(t, filepath.Join(dir, name+".vmdk")); !bytes.Equal(got, model) {
							t.Errorf("QEMU reads it otherwise")
						}
					}
				}
			})
		}
	}
}

// esxFiles is a small snapshot in memory.
func esxFiles(rnd *rand.Rand, kind string) files {
	const sectors = 2048
	var b []byte
	if kind == kindVMFSSparse {
		l := onTop(rnd, make([]byte, sectors*sector), sector, 2)
		l.states[0], l.states[1] = grainData, grainData
		b = buildCOWD(rnd, l, sectors, 1)
	} else {
		l := onTop(rnd, make([]byte, sectors*sector), seGrain, 4)
		l.states[0], l.states[1] = grainData, grainData
		b = buildSESparse(rnd, l, sectors)
	}
	return files{"a.vmdk": snapshotText("x", kind, "x", sectors, "1", "2", "p"), "x": b}
}

func TestHostileSnapshotsOfESX(t *testing.T) {
	le := binary.LittleEndian
	const seDir, seTables = 4 * sector, 5 * sector
	cowTable := func(b []byte) []byte { return b[int64(le.Uint32(b[cowdHeader:]))*sector:] }
	for name, x := range map[string]struct {
		kind string
		do   func(b []byte) []byte
		want string
		is   error
	}{
		"COWD cut in the header":     {kindVMFSSparse, func(b []byte) []byte { return b[:2000] }, "too few", image.ErrFormat},
		"COWD of another magic":      {kindVMFSSparse, func(b []byte) []byte { b[0] = 'K'; return b }, "not that of a VMFSSPARSE", image.ErrFormat},
		"COWD version 2":             {kindVMFSSparse, func(b []byte) []byte { b[4] = 2; return b }, "version 2", image.ErrUnsupported},
		"COWD inconsistent":          {kindVMFSSparse, func(b []byte) []byte { b[8] = 7; return b }, "inconsistent", image.ErrFormat},
		"COWD unknown flag":          {kindVMFSSparse, func(b []byte) []byte { b[8] = 0x13; return b }, "unknown flags", image.ErrUnsupported},
		"COWD without a disk":        {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(b[12:], 0); return b }, "capacity", image.ErrFormat},
		"COWD smaller than its line": {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(b[12:], 2047); return b }, "the descriptor says", image.ErrFormat},
		"COWD larger than its dir":   {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(b[12:], 1<<32-1); return b }, "the disk needs", image.ErrFormat},
		"COWD with huge dir":         {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(b[12:], 1<<32-1); le.PutUint32(b[24:], 1<<32-1); return b }, "grain directory", image.ErrFormat},
		"COWD grain of 0":            {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(b[16:], 0); return b }, "a grain has 0 sectors", image.ErrFormat},
		"COWD grain of 3":            {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(b[16:], 3); return b }, "a grain has 3 sectors", image.ErrFormat},
		"COWD dir in the header":     {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(b[20:], 3); return b }, "overlaps the header", image.ErrFormat},
		"COWD dir beyond the end":    {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(b[20:], 1<<31); return b }, "truncated", image.ErrFormat},
		"COWD table beyond the end":  {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(b[cowdHeader:], 1<<32-1); return b }, "truncated", image.ErrFormat},
		"COWD table is the dir":      {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(b[cowdHeader:], 4); return b }, "overlaps the grain directory", image.ErrFormat},
		"COWD grain beyond the end":  {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(cowTable(b), 1<<32-1); return b }, "truncated", image.ErrFormat},
		"COWD grain is the header":   {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(cowTable(b), 1); return b }, "overlaps the header", image.ErrFormat},
		"COWD grain is its table":    {kindVMFSSparse, func(b []byte) []byte { le.PutUint32(cowTable(b), le.Uint32(b[cowdHeader:])+1); return b }, "overlaps the grain table", image.ErrFormat},
		"COWD truncated":             {kindVMFSSparse, func(b []byte) []byte { return b[:len(b)-1] }, "truncated", image.ErrFormat},

		"seSparse cut in the header": {kindSESparse, func(b []byte) []byte { return b[:500] }, "too few", image.ErrFormat},
		"seSparse of another magic":  {kindSESparse, func(b []byte) []byte { b[0]++; return b }, "not that of a SESPARSE", image.ErrFormat},
		"seSparse version":           {kindSESparse, func(b []byte) []byte { b[8]++; return b }, "version", image.ErrUnsupported},
		"seSparse flags":             {kindSESparse, func(b []byte) []byte { b[40] = 1; return b }, "unknown flags", image.ErrUnsupported},
		"seSparse grain of 16":       {kindSESparse, func(b []byte) []byte { b[24] = 16; return b }, "grains of 16", image.ErrUnsupported},
		"seSparse journal":           {kindSESparse, func(b []byte) []byte { b[sector+24] = 1; return b }, "journal", image.ErrUnsupported},
		"seSparse journal, high":     {kindSESparse, func(b []byte) []byte { b[sector+31] = 1; return b }, "journal", image.ErrUnsupported},
		"seSparse volatile header":   {kindSESparse, func(b []byte) []byte { b[sector] = 1; return b }, "volatile header", image.ErrFormat},
		"seSparse volatile at end":   {kindSESparse, func(b []byte) []byte { le.PutUint64(b[80:], uint64(len(b)/sector)); return b }, "volatile header", image.ErrFormat},
		"seSparse volatile beyond":   {kindSESparse, func(b []byte) []byte { le.PutUint64(b[80:], 1<<63); return b }, "volatile header", image.ErrFormat},
		"seSparse capacity of 2^63":  {kindSESparse, func(b []byte) []byte { le.PutUint64(b[16:], 1<<63); return b }, "capacity", image.ErrFormat},
		"seSparse larger than dir":   {kindSESparse, func(b []byte) []byte { le.PutUint64(b[16:], 1<<40); return b }, "the disk needs", image.ErrFormat},
		"seSparse dir beyond":        {kindSESparse, func(b []byte) []byte { le.PutUint64(b[128:], 1<<55); return b }, "grain directory", image.ErrFormat},
		"seSparse tables too long":   {kindSESparse, func(b []byte) []byte { le.PutUint64(b[152:], 1<<62); return b }, "grain tables", image.ErrFormat},
		"seSparse grains beyond":     {kindSESparse, func(b []byte) []byte { le.PutUint64(b[192:], 1<<62); return b }, "grains", image.ErrFormat},
		"seSparse dir entry type":    {kindSESparse, func(b []byte) []byte { b[seDir+7] = 0x20; return b }, "the entry is", image.ErrFormat},
		"seSparse dir entry rest":    {kindSESparse, func(b []byte) []byte { b[seDir+5] = 1; return b }, "the entry is", image.ErrFormat},
		"seSparse table number":      {kindSESparse, func(b []byte) []byte { b[seDir] = 1; return b }, "the entry is", image.ErrFormat},
		"seSparse entry of type 4":   {kindSESparse, func(b []byte) []byte { b[seTables+7] = 0x40; return b }, "the entry is", image.ErrFormat},
		"seSparse absent with rest":  {kindSESparse, func(b []byte) []byte { le.PutUint64(b[seTables:], 5); return b }, "the entry is", image.ErrFormat},
		"seSparse grain beyond":      {kindSESparse, func(b []byte) []byte { le.PutUint64(b[seTables:], 3<<60|1); return b }, "truncated", image.ErrFormat},
		"seSparse grain far beyond":  {kindSESparse, func(b []byte) []byte { le.PutUint64(b[seTables:], 1<<62-1); return b }, "truncated", image.ErrFormat},
		"seSparse truncated":         {kindSESparse, func(b []byte) []byte { return b[:len(b)-1] }, "truncated", image.ErrFormat},
	} {
		t.Run(name, func(t *testing.T) {
			all := esxFiles(rand.New(rand.NewPCG(1, 1)), x.kind)
			if err := all.walk(t.Context(), "a.vmdk"); err != nil {
				t.Fatal(err)
			}
			all["x"] = x.do(all["x"])
			err := all.walk(t.Context(), "a.vmdk")
			if err == nil || !strings.Contains(err.Error(), x.want) || !errors.Is(err, x.is) {
				t.Errorf("error %v, want %q", err, x.want)
			}
		})
	}
	all := esxFiles(rand.New(rand.NewPCG(1, 1)), kindVMFSSparse)
	all["x"][cowdUnclean] = 1
	f, _ := all.file(t.Context(), "a.vmdk")
	im, err := Open(t.Context(), f, all.resolve)
	if err != nil || !warned(im.Info(), "not closed properly") {
		t.Errorf("unclean: %v", err)
	}
}
