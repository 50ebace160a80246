package vhdx

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"

	"holdfast/internal/disk"
)

const (
	metadataTable = 64 * kib
	maxItems      = 2047
	maxUserItems  = 1024
	maxItem       = 1 << 20   // bytes of an item
	maxMetadata   = 128 << 20 // bytes of the region

	flagUser     = 1 << 0
	flagVirtual  = 1 << 1
	flagRequired = 1 << 2

	paramFixed  = 1 << 0 // LeaveBlockAllocated
	paramParent = 1 << 1 // HasParent

	minBlock = 1 << 20
	maxBlock = 256 << 20
	maxSize  = 64 << 40 // bytes of a disk
)

var (
	itemParams   = known("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
	itemSize     = known("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
	itemDiskID   = known("BECA12AB-B2E6-4523-93EF-C309E000C746")
	itemLogical  = known("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
	itemPhysical = known("CDA348C7-445D-4471-9CC9-E9885251C556")
	itemLocator  = known("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
	// Not in the public document; written by Windows.
	itemCHS        = known("DA02D7BC-3D3A-423C-AC88-2A36AB21479B")
	itemIncomplete = known("71CC85F0-1B69-4E28-9558-C3BF83AE75D3")
	itemLabels     = known("10E1AE8A-4B7E-4169-A40F-CD70DE928393")
)

// items are the metadata items that are known here. Without a length they are
// not read with the others.
var items = map[guid]struct {
	name  string
	len   uint32
	flags uint32
}{
	itemParams:     {"file parameters", 8, flagRequired},
	itemSize:       {"virtual disk size", 8, flagVirtual | flagRequired},
	itemDiskID:     {"virtual disk ID", 16, flagVirtual | flagRequired},
	itemLogical:    {"logical sector size", 4, flagVirtual | flagRequired},
	itemPhysical:   {"physical sector size", 4, flagVirtual | flagRequired},
	itemLocator:    {"parent locator", 0, flagRequired},
	itemCHS:        {"CHS parameters", 0, 0},
	itemIncomplete: {"mark of an incomplete file", 0, flagRequired},
	itemLabels:     {"label area of persistent memory", 0, 0},
}

// metadata is what the items say.
type metadata struct {
	block, size       int64
	fixed, hasParent  bool
	logical, physical int64
	diskID            guid
	parent            *locator
}

// item is an entry of the metadata table.
type item struct {
	id       guid
	off, len uint32 // off from the region's beginning
	flags    uint32
}

func (it item) String() string {
	if k, ok := items[it.id]; ok && it.flags&flagUser == 0 {
		return "the " + k.name
	}
	return "item " + it.id.String()
}

func readMetadata(ctx context.Context, d disk.Reader, region span, warn func(string, ...any)) (*metadata, error) {
	if region.n > maxMetadata {
		return nil, unsupported("the metadata region has %d bytes", region.n)
	}
	table := make([]byte, metadataTable) // a region has 1 MiB at least
	if err := d.ReadAt(ctx, table, region.off); err != nil {
		return nil, fmt.Errorf("read metadata table: %w", err)
	}
	found, err := parseTable(table, region, warn)
	if err != nil {
		return nil, fmt.Errorf("metadata table at offset %d: %w", region.off, err)
	}
	read := func(it item) ([]byte, error) {
		b := make([]byte, it.len)
		if err := d.ReadAt(ctx, b, region.off+int64(it.off)); err != nil {
			return nil, fmt.Errorf("read %s: %w", it, err)
		}
		return b, nil
	}
	values := map[guid][]byte{}
	for _, id := range []guid{itemParams, itemSize, itemDiskID, itemLogical, itemPhysical} {
		it, ok := found[id]
		if !ok {
			return nil, bad("metadata: it lacks the %s", items[id].name)
		}
		if values[id], err = read(it); err != nil {
			return nil, err
		}
	}
	m, err := parseItems(values, warn)
	if err != nil {
		return nil, fmt.Errorf("metadata: %w", err)
	}
	it, ok := found[itemLocator]
	switch {
	case !m.hasParent && ok:
		warn("metadata: there is a parent locator, but no parent")
		return m, nil
	case !m.hasParent:
		return m, nil
	case !ok:
		return nil, bad("metadata: it has a parent, but no parent locator")
	}
	b, err := read(it)
	if err != nil {
		return nil, err
	}
	if m.parent, err = parseLocator(b); err != nil {
		return nil, fmt.Errorf("parent locator at offset %d: %w", region.off+int64(it.off), err)
	}
	return m, nil
}

// parseTable reads and checks the table, and returns the items that are known
// here.
func parseTable(b []byte, region span, warn func(string, ...any)) (map[guid]item, error) {
	le := binary.LittleEndian
	if string(b[:8]) != "metadata" {
		return nil, bad("it begins with %x", b[:8])
	}
	count := int(le.Uint16(b[10:]))
	if count > maxItems {
		return nil, bad("it has %d entries", count)
	}
	type key struct {
		id   guid
		user bool
	}
	seen, found, user := map[key]bool{}, map[guid]item{}, 0
	var list []item
	for i := range count {
		e := b[32+32*i:][:32]
		it := item{id: guid(e[:16]), off: le.Uint32(e[16:]), len: le.Uint32(e[20:]), flags: le.Uint32(e[24:])}
		k := key{it.id, it.flags&flagUser != 0}
		if err := it.check(region); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		if seen[k] {
			return nil, bad("entry %d: %s is there a second time", i, it)
		}
		seen[k] = true
		if k.user {
			if user++; user > maxUserItems {
				return nil, bad("it has more than %d user items", maxUserItems)
			}
		} else if x, ok := items[it.id]; ok {
			found[it.id] = it
			if it.flags != x.flags && x.len > 0 {
				warn("metadata table, entry %d: %s has the flags %#x, not %#x", i, it, it.flags, x.flags)
			}
		}
		if it.len > 0 {
			list = append(list, it)
		}
	}
	slices.SortFunc(list, func(a, b item) int { return int(int64(a.off) - int64(b.off)) })
	for i := 1; i < len(list); i++ {
		if p := list[i-1]; list[i].off < p.off+p.len {
			return nil, bad("%s at %d of the region overlaps %s at %d", list[i], list[i].off, p, p.off)
		}
	}
	return found, nil
}

// check refuses an item that cannot be, or that must be understood and is not.
func (it item) check(region span) error {
	k, ok := items[it.id]
	ok = ok && it.flags&flagUser == 0
	switch {
	case it.id == guid{}:
		return bad("an item without an id")
	case it.len > maxItem || it.len == 0 && it.off != 0 || it.len > 0 && it.off < metadataTable || int64(it.off)+int64(it.len) > region.n:
		return bad("%s has %d bytes at %d of the region of %d bytes", it, it.len, it.off, region.n)
	case ok && k.len > 0 && it.len != k.len:
		return bad("%s has %d bytes, not %d", it, it.len, k.len)
	case ok && it.id == itemIncomplete:
		return unsupported("the file is incomplete: whoever was creating or converting it did not finish")
	case !ok && it.flags&flagRequired != 0:
		return unsupported("%s is unknown here and required", it)
	}
	return nil
}

// parseItems reads the items that every file has.
func parseItems(v map[guid][]byte, warn func(string, ...any)) (*metadata, error) {
	le := binary.LittleEndian
	flags := le.Uint32(v[itemParams][4:])
	size := le.Uint64(v[itemSize])
	m := &metadata{
		block: int64(le.Uint32(v[itemParams])), fixed: flags&paramFixed != 0, hasParent: flags&paramParent != 0,
		logical: int64(le.Uint32(v[itemLogical])), physical: int64(le.Uint32(v[itemPhysical])), diskID: guid(v[itemDiskID]),
	}
	switch {
	case flags&^(paramFixed|paramParent) != 0:
		return nil, unsupported("the file parameters have the flags %#x", flags)
	case m.block < minBlock || m.block > maxBlock || bits.OnesCount64(uint64(m.block)) != 1:
		return nil, bad("the block size is %d", m.block)
	case m.logical != 512 && m.logical != 4096:
		return nil, bad("the logical sector size is %d", m.logical)
	case m.physical != 512 && m.physical != 4096:
		return nil, bad("the physical sector size is %d", m.physical)
	case size == 0 || size > maxSize || size%uint64(m.logical) != 0:
		return nil, bad("the virtual disk size is %d", size)
	case m.fixed && m.hasParent:
		warn("metadata: a disk with a parent is said to be fixed")
	}
	m.size = int64(size)
	return m, nil
}
