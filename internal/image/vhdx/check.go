package vhdx

import (
	"context"
	"fmt"
)

// Check reads the whole BAT again and reports all that is odd: what Open put
// up with, what other readers refuse, and room in the file that nothing uses.
func (im *Image) Check(ctx context.Context, report func(string)) error {
	for _, w := range im.info.Warnings {
		if len(w) < 4 || w[:4] != "BAT:" { // those come below, one by one
			report(w)
		}
	}
	if p := im.info.Parent; p != nil {
		if len(p.Names) == 0 {
			report("parent locator: it names no file")
		}
		if im.merge {
			report("parent locator: it has two ids for the parent: a merge did not end")
		}
	}
	u, told := newUsage(im.d.Size(), im.spans), 0
	tell := func(format string, args ...any) {
		if told++; told <= maxTold {
			report(fmt.Sprintf(format, args...))
		}
	}
	err := im.scan(ctx, u, func(kind oddity, index int64, e uint64) {
		tell("BAT at offset %d: entry %d (%#x) %s", im.bat, index, e, oddText[kind])
	})
	if err != nil {
		return err
	}
	if err := im.checkPresent(ctx, tell); err != nil {
		return err
	}
	err = im.eachEntry(ctx, im.g.entries(), im.batLen/8, func(index int64, e uint64) error {
		tell("BAT at offset %d: entry %d (%#x) lies beyond the last one", im.bat, index, e)
		return nil
	})
	if err != nil {
		return err
	}
	if free := (im.d.Size()+mib-1)/mib - u.used(); free > 0 {
		tell("%d MiB of the file are not in use", free)
	}
	if told > maxTold {
		report(fmt.Sprintf("and %d problems more", told-maxTold))
	}
	return nil
}

// maxTold bounds what Check reports of one image.
const maxTold = 1000

// checkPresent tells when blocks of a fixed disk are not in the file.
func (im *Image) checkPresent(ctx context.Context, tell func(string, ...any)) error {
	if !im.fixed || im.g.diff {
		return nil
	}
	present := int64(0)
	err := im.eachEntry(ctx, 0, im.g.entries(), func(index int64, e uint64) error {
		if _, _, bitmap := im.g.split(index); !bitmap && e&stateMask == blockPresent {
			present++
		}
		return nil
	})
	if err == nil && present < im.g.blocks {
		tell("BAT at offset %d: the disk is fixed, but %d of its %d blocks are not in the file", im.bat, im.g.blocks-present, im.g.blocks)
	}
	return err
}
