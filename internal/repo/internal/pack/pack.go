// Package pack builds and reads packs: many sealed items in one object
// (docs/format.md §3).
package pack

import (
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"slices"

	"holdfast/internal/repo/internal/codec"
	"holdfast/internal/repo/internal/seal"
)

const (
	// Chunks and Nodes are the kinds of packs.
	Chunks uint16 = 1
	Nodes  uint16 = 2

	// MaxContent bounds an item's plain length, bytes.
	MaxContent = 1 << 20
	// MaxItems bounds the items of one pack.
	MaxItems = 1 << 20

	// Overhead is what sealing adds to an item's codec byte and payload.
	Overhead = seal.TagLen

	entryLen   = 40
	trailerLen = 16
	trailer    = "HFPE"
)

// ID addresses an item: a keyed hash of its plain bytes.
type ID [32]byte

// Item is one item to be packed.
type Item struct {
	ID    ID
	Plain int    // length of the content, bytes
	Data  []byte // codec byte and payload
}

// Entry is one item's place in a pack.
type Entry struct {
	ID     ID
	Offset uint32 // bytes from the pack's start
	Stored uint32 // sealed length, bytes
	Plain  uint32 // length of the content, bytes
}

// Build seals items into a pack, in their order. At most MaxItems. The pack is
// built in buf's memory, if that is large enough.
func Build(buf []byte, h seal.Header, master *seal.Key, items []Item) ([]byte, []Entry) {
	a := aead(h, master)
	size := seal.HeaderLen + trailerLen + seal.TagLen
	for _, it := range items {
		size += len(it.Data) + seal.TagLen + entryLen
	}
	p := h.Append(slices.Grow(buf[:0], size))
	ad := associated(p)
	entries := make([]Entry, len(items))
	dir := make([]byte, 0, len(items)*entryLen)
	for i, it := range items {
		off := len(p)
		copy(ad[seal.HeaderLen:], it.ID[:])
		p = a.Seal(p, nonce(uint64(i)), it.Data, ad)
		e := Entry{it.ID, uint32(off), uint32(len(p) - off), uint32(it.Plain)}
		entries[i] = e
		dir = append(dir, it.ID[:]...)
		dir = binary.LittleEndian.AppendUint32(dir, e.Stored)
		dir = binary.LittleEndian.AppendUint32(dir, e.Plain)
	}
	off := len(p)
	p = a.Seal(p, nonce(^uint64(0)), dir, dirAssociated(p))
	t := binary.LittleEndian.AppendUint32(nil, uint32(len(items)))
	t = binary.LittleEndian.AppendUint32(t, uint32(len(p)-off))
	t = binary.LittleEndian.AppendUint32(t, seal.Checksum(t))
	return append(append(p, t...), trailer...), entries
}

// Opener opens the items of one pack. It is safe in parallel.
type Opener struct {
	a  cipher.AEAD
	ad [seal.HeaderLen + len(ID{})]byte
}

// NewOpener takes a pack's header, as stored, and the master key it names.
func NewOpener(header []byte, h seal.Header, master *seal.Key) *Opener {
	o := &Opener{a: aead(h, master)}
	copy(o.ad[:], header[:seal.HeaderLen])
	return o
}

// Open authenticates item number i, whose sealed bytes are p, as id, and
// appends its content to dst, at most max bytes. p is overwritten.
func (o *Opener) Open(dst, p []byte, i int, id ID, max int) ([]byte, error) {
	ad := o.ad
	copy(ad[seal.HeaderLen:], id[:])
	plain, err := o.a.Open(p[:0], nonce(uint64(i)), p, ad[:])
	if err != nil {
		return dst, fmt.Errorf("%w: item %d is not %x", seal.ErrDamaged, i, id[:4])
	}
	dst, err = codec.Decode(dst, plain, min(max, MaxContent))
	if err != nil {
		return dst, fmt.Errorf("%w: item %d: %w", seal.ErrDamaged, i, err)
	}
	return dst, nil
}

// Directory reads the entries of a whole pack from its bytes, and checks that
// they fill it.
func Directory(p []byte, h seal.Header, master *seal.Key) ([]Entry, error) {
	if len(p) < seal.HeaderLen+seal.TagLen+trailerLen {
		return nil, fmt.Errorf("%w: pack of %d bytes", seal.ErrDamaged, len(p))
	}
	t := p[len(p)-trailerLen:]
	count, dirLen := binary.LittleEndian.Uint32(t), binary.LittleEndian.Uint32(t[4:])
	if string(t[12:]) != trailer || seal.Checksum(t[:8]) != binary.LittleEndian.Uint32(t[8:]) {
		return nil, fmt.Errorf("%w: pack trailer", seal.ErrDamaged)
	}
	if count > MaxItems || uint64(dirLen) != uint64(count)*entryLen+seal.TagLen ||
		uint64(dirLen) > uint64(len(p)-seal.HeaderLen-trailerLen) {
		return nil, fmt.Errorf("%w: pack of %d items with a directory of %d bytes", seal.ErrDamaged, count, dirLen)
	}
	end := len(p) - trailerLen - int(dirLen)
	dir, err := aead(h, master).Open(nil, nonce(^uint64(0)), p[end:len(p)-trailerLen], dirAssociated(p))
	if err != nil {
		return nil, fmt.Errorf("%w: pack directory", seal.ErrDamaged)
	}
	entries := make([]Entry, count)
	off := uint64(seal.HeaderLen)
	for i := range entries {
		e := &entries[i]
		copy(e.ID[:], dir)
		e.Offset = uint32(off)
		e.Stored = binary.LittleEndian.Uint32(dir[32:])
		e.Plain = binary.LittleEndian.Uint32(dir[36:])
		dir = dir[entryLen:]
		if off += uint64(e.Stored); off > uint64(end) || e.Stored <= seal.TagLen || e.Plain > MaxContent {
			return nil, fmt.Errorf("%w: pack entry %d", seal.ErrDamaged, i)
		}
	}
	if off != uint64(end) {
		return nil, fmt.Errorf("%w: pack items end at %d, directory starts at %d", seal.ErrDamaged, off, end)
	}
	return entries, nil
}

func aead(h seal.Header, master *seal.Key) cipher.AEAD {
	k := master.Derive(h.Salt[:], "pack")
	return k.AEAD()
}

func nonce(i uint64) []byte {
	return binary.LittleEndian.AppendUint64(make([]byte, 0, 12), i)[:12]
}

func associated(header []byte) []byte {
	return append(append(make([]byte, 0, seal.HeaderLen+32), header[:seal.HeaderLen]...), make([]byte, 32)...)
}

func dirAssociated(p []byte) []byte {
	return append(append([]byte(nil), p[:seal.HeaderLen]...), "directory"...)
}
