package vhd

import (
	"context"
	"encoding/binary"
	"fmt"
)

const (
	// piece is how much of the BAT is read at once when all of it is, in bytes.
	piece = 256 << 10
	// cellsAtOnce bounds the memory in which overlaps are looked for: 8 MiB,
	// which with blocks of 2 MiB is a file of 4 TiB, more than there can be.
	cellsAtOnce = 2 << 20
)

// place is the offset in the file of block i, whose BAT entry says sector. It
// refuses a block that does not lie inside the file with all that the disk has
// of it: of the last block that may be less than the block.
func (im *Image) place(i int64, sectorNo uint32) (int64, error) {
	at := int64(sectorNo) * sector
	if at+im.length(i) > im.end {
		return 0, bad("BAT entry %d: its block at offset %d lies beyond the end of the blocks at %d: is the file truncated?", i, at, im.end)
	}
	return at, nil
}

// length is how much of the file block i takes at least, bytes.
func (im *Image) length(i int64) int64 {
	return im.lead() + min(im.block(), im.size-i*im.block())
}

// eachEntry calls do for the BAT entries from first to end, but those that
// name no block, until one fails.
func (im *Image) eachEntry(ctx context.Context, first, end int64, do func(i int64, sectorNo uint32) error) error {
	buf := make([]byte, min(piece, (end-first)*4))
	for first < end {
		b := buf[:min(int64(len(buf)), (end-first)*4)]
		at := int64(im.h.tableOffset) + first*4
		if err := im.file.ReadAt(ctx, b, at); err != nil {
			return fmt.Errorf("read the BAT at offset %d: %w", at, err)
		}
		for ; len(b) > 0; b = b[4:] {
			if s := binary.BigEndian.Uint32(b); s != none {
				if err := do(first, s); err != nil {
					return err
				}
			}
			first++
		}
	}
	return nil
}

// checkTable makes sure that every block of the disk lies inside the file and
// overlaps nothing.
func (im *Image) checkTable(ctx context.Context) error {
	last, lastAt := im.blocks()-1, int64(-1)
	note := func(i int64, s uint32) error { lastAt = int64(s) * sector; return nil }
	if err := im.eachEntry(ctx, last, last+1, note); err != nil {
		return err
	}
	reach := min(im.end, 1<<32*sector)                    // where blocks may begin
	used := make([]bool, reach/im.stride()/cellsAtOnce+1) // parts of the file where they do
	err := im.eachEntry(ctx, 0, last+1, func(i int64, s uint32) error {
		at, err := im.place(i, s)
		if err != nil {
			return err
		}
		if i < last && lastAt >= 0 && at < lastAt+im.length(last) && lastAt < at+im.stride() {
			return bad("BAT entry %d: its block at offset %d overlaps the last block, at %d", i, at, lastAt)
		}
		used[at/im.stride()/cellsAtOnce] = true
		return im.checkTables(i, at)
	})
	for part := 0; err == nil && part < len(used); part++ {
		if used[part] {
			err = im.checkOverlaps(ctx, int64(part)*cellsAtOnce)
		}
	}
	return err
}

// checkTables refuses a block that lies where the tables are.
func (im *Image) checkTables(i, at int64) error {
	end := at + im.length(i)
	header, table := int64(im.f.dataOffset), int64(im.h.tableOffset)
	switch {
	case at < footerLen:
		return bad("BAT entry %d: its block at offset %d overlaps the footer's copy", i, at)
	case at < header+headerLen && header < end:
		return bad("BAT entry %d: its block at offset %d overlaps the dynamic header at %d", i, at, header)
	case at < table+im.blocks()*4 && table < end:
		return bad("BAT entry %d: its block at offset %d overlaps the BAT at %d", i, at, table)
	}
	return nil
}

// checkOverlaps looks at the blocks that begin in cellsAtOnce cells of the file from
// cell base on, and in the one before. All blocks but the last of the disk,
// which checkTable compares, are of one length. With cells of that length two
// blocks that overlap begin in one cell or in neighbours, and a cell in which
// two begin has an overlap: so one number for each cell is enough.
func (im *Image) checkOverlaps(ctx context.Context, base int64) error {
	base = max(base-1, 0)
	cell := im.stride() / sector
	starts := make([]uint32, min(cellsAtOnce+1, im.end/im.stride()+1-base)) // within the cell, from 1; 0 for none
	return im.eachEntry(ctx, 0, im.blocks()-1, func(i int64, s uint32) error {
		c, in := int64(s)/cell-base, uint32(int64(s)%cell)+1
		if c < 0 || c >= int64(len(starts)) {
			return nil
		}
		if starts[c] != 0 || c > 0 && starts[c-1] > in || c+1 < int64(len(starts)) && starts[c+1] != 0 && starts[c+1] < in {
			return bad("BAT entry %d: its block at offset %d overlaps another block", i, int64(s)*sector)
		}
		starts[c] = in
		return nil
	})
}
