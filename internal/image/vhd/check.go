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

// checkBlocks looks at what Open has no need to look at. A problem that many
// blocks have is one line.
func (im *Image) checkBlocks(ctx context.Context, say func(string, ...any)) error {
	var count int64
	var empty, behind many
	bitmap := make([]byte, im.block()/sector/8)
	err := im.eachEntry(ctx, 0, im.blocks(), func(i int64, s uint32) error {
		count++
		if im.f.kind == kindDifferencing {
			return nil
		}
		at := int64(s) * sector
		if err := im.file.ReadAt(ctx, bitmap, at); err != nil {
			return fmt.Errorf("read the bitmap of block %d at offset %d: %w", i, at, err)
		}
		if disk.IsZero(bitmap) {
			empty.add(i, at)
		}
		return nil
	})
	if err == nil {
		err = im.eachEntry(ctx, im.blocks(), int64(im.h.entries), func(i int64, s uint32) error {
			behind.add(i, int64(s)*sector)
			return nil
		})
	}
	if err != nil {
		return err
	}
	if empty.n > 0 {
		say("bitmaps: those of %d blocks, first of block %d at offset %d, say that nothing is in them; other programs may take the blocks for zeros",
			empty.n, empty.first, empty.at)
	}
	if behind.n > 0 {
		say("BAT: %d entries behind the disk's end, first entry %d, name blocks, the first at offset %d", behind.n, behind.first, behind.at)
	}
	used := footerLen + headerLen + int64(im.h.entries)*4 + count*im.stride()
	if left := im.end - used; left >= im.stride() {
		say("file: about %d bytes of it belong to nothing", left)
	}
	return nil
}

// many counts blocks and keeps the first.
type many struct{ n, first, at int64 }

func (m *many) add(i, at int64) {
	if m.n == 0 {
		m.first, m.at = i, at
	}
	m.n++
}
