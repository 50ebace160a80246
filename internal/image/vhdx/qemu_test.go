package vhdx

import (
	"fmt"
	"path/filepath"
	"testing"

	"holdfast/internal/disk/disktest"
)

// TestReadsWhatQEMUWrites: QEMU puts regions and items in an order of its own,
// does not call them required, and may end the file within the last block.
func TestReadsWhatQEMUWrites(t *testing.T) {
	need(t, "qemu-img")
	for _, o := range []string{"subformat=dynamic", "subformat=dynamic,block_size=1M", "subformat=dynamic,block_size=16M,block_state_zero=off",
		"subformat=fixed", "subformat=fixed,block_size=2M"} {
		t.Run(o, func(t *testing.T) {
			rnd, dir := disktest.Rand(t), t.TempDir()
			size := 9<<20 + 512*(1+rnd.Int64N(2000))
			d, _ := scatter(t, rnd, size, 6, 300<<10)
			raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "a.vhdx")
			save(t, d, raw)
			run(t, "qemu-img", "convert", "-f", "raw", "-O", "vhdx", "-o", o, raw, path)
			c := openChain(t, dir, "a.vhdx")
			compare(t, c, bytesOf(t, d, size), rnd)
			t.Logf("%+v", c.Layers()[0].Info())
			for _, p := range problems(t, c.Layers()[0]) {
				t.Logf("check: %s", p)
			}
			// Back through a view.
			v := filepath.Join(dir, "v.vhdx")
			save(t, newView(t, c, ViewOptions{}), v)
			run(t, "qemu-img", "compare", "-f", "vhdx", "-F", "vhdx", path, v)
		})
	}
}

// TestBug03AfterQEMU writes through QEMU at the edges of pages of the BAT, in
// several openings, and reads what came of it.
func TestBug03AfterQEMU(t *testing.T) {
	need(t, "qemu-img")
	need(t, "qemu-io")
	dir := t.TempDir()
	path := filepath.Join(dir, "a.vhdx")
	run(t, "qemu-img", "create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "1100M")
	for i, block := range []int64{0, 511, 512, 1, 1023, 1024} {
		run(t, "qemu-io", "-f", "vhdx", "-c", fmt.Sprintf("write -P %d %dM 64k", i+1, block), path)
		c := openChain(t, dir, "a.vhdx")
		for j, b := range []int64{0, 511, 512, 1, 1023, 1024} {
			p := make([]byte, 1)
			if err := c.ReadAt(t.Context(), p, b<<20); err != nil || j <= i && p[0] != byte(j+1) || j > i && p[0] != 0 {
				t.Errorf("after %d writes, block %d: %x %v", i+1, b, p, err)
			}
		}
	}
}
