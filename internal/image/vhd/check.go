package vhd

import (
	"context"
	"fmt"

	"holdfast/internal/disk"
)

// Check looks at the copies, at all BAT entries, at the blocks' bitmaps and at
// space that belongs to nothing. A geometry that does not say the size is no
// problem and not reported; Info has it.
func (im *Image) Check(ctx context.Context, report func(problem string)) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	say := func(format string, a ...any) { report(fmt.Sprintf(format, a...)) }
	f, _, ok, err := endFooter(ctx, im.file)
	if err != nil {
		return err
	}
	if !ok {
		say("footer: the one at the file's end is missing or damaged")
	}
	if im.f.id == [16]byte{} {
		say("footer: the unique id is zero")
	}
	if im.f.kind == kindFixed {
		if left := im.end - im.size; left > 0 {
			say("footer: %d bytes between the disk's end at %d and the footer at %d belong to nothing", left, im.size, im.end)
		}
		return nil
	}
	head, ok2, err := copyFooter(ctx, im.file)
	if err != nil {
		return err
	}
	switch {
	case !ok2:
		say("footer: the copy at offset 0 is damaged")
	case ok && head != f:
		say("footer: the copy at offset 0 differs from the one at the file's end")
	}
	if im.f.kind == kindDifferencing && len(im.names) == 0 {
		say("dynamic header: it does not name the parent")
	}
	return im.checkBlocks(ctx, say)
}

// checkBlocks looks at what Open has no need to look at.
func (im *Image) checkBlocks(ctx context.Context, say func(string, ...any)) error {
	count := int64(0)
	bitmap := make([]byte, im.block()/sector/8)
	err := im.eachEntry(ctx, 0, im.blocks(), func(i int64, s uint32) error {
		count++
		at := int64(s) * sector
		if table := int64(im.h.tableOffset); at < table+int64(im.h.entries)*4 && table < at+im.length(i) {
			say("BAT entry %d: its block at offset %d overlaps BAT entries behind the disk's end", i, at)
		}
		if im.f.kind == kindDifferencing {
			return nil
		}
		if err := im.file.ReadAt(ctx, bitmap, at); err != nil {
			return fmt.Errorf("read the bitmap of block %d at offset %d: %w", i, at, err)
		}
		if disk.IsZero(bitmap) {
			say("bitmap of block %d at offset %d: it says that the block holds nothing; other programs may take it for zeros", i, at)
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = im.eachEntry(ctx, im.blocks(), int64(im.h.entries), func(i int64, s uint32) error {
		say("BAT entry %d: it names a block at offset %d, behind the disk's end", i, int64(s)*sector)
		return nil
	})
	if err != nil {
		return err
	}
	used := footerLen + headerLen + int64(im.h.entries)*4 + count*im.stride()
	if left := im.end - used; left >= im.stride() {
		say("file: about %d bytes of it belong to nothing", left)
	}
	return nil
}
