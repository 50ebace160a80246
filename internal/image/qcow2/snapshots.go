package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"io/fs"
	"strings"
	"time"
)

// Limits of the snapshot table; QEMU's are the same or smaller.
const (
	maxSnapshots     = 65536
	maxSnapshotExtra = 1024
	maxSnapshotTable = 64 << 20 // bytes
	// maxNamed is how many snapshots a warning names.
	maxNamed = 8
)

// Snapshot is an internal snapshot, as the image lists it.
type Snapshot struct {
	ID, Name string
	Time     time.Time // when it was taken
	Size     int64     // of the disk then, bytes
	VMState  int64     // bytes of saved memory; 0 for a disk only

	l1Off, l1Len int64 // its L1 table: bytes, entries
}

// Snapshots lists the image's internal snapshots; none for a snapshot.
func (im *Image) Snapshots(ctx context.Context) ([]Snapshot, error) {
	list, _, err := im.list(ctx, int64(im.h.snapshots))
	return list, err
}

// list returns the first n snapshots, and the bytes that they take in the
// table.
func (im *Image) list(ctx context.Context, n int64) ([]Snapshot, int64, error) {
	if n > maxSnapshots {
		return nil, 0, bad("header: %d snapshots", n)
	}
	var list []Snapshot
	at := im.h.snapsOff
	for i := range n {
		s, n, err := im.snapshot(ctx, at)
		if err == nil && at+n-im.h.snapsOff > maxSnapshotTable {
			err = bad("the table takes more than %d bytes", maxSnapshotTable)
		}
		if err != nil {
			return list, at - im.h.snapsOff, fmt.Errorf("snapshot table, entry %d at offset %d: %w", i, at, err)
		}
		list = append(list, s)
		at += n
	}
	return list, at - im.h.snapsOff, nil
}

// warnSnapshots says that there are snapshots: whoever copies the disk may not
// know that they stay behind. A table that is damaged does no harm to the disk.
func (im *Image) warnSnapshots(ctx context.Context) (string, error) {
	n := int64(im.h.snapshots)
	if n == 0 {
		return "", nil
	}
	list, _, err := im.list(ctx, min(n, maxNamed))
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if err != nil {
		return fmt.Sprintf("the image has %d internal snapshots that cannot be listed: %v", n, err), nil
	}
	var names []string
	for _, s := range list {
		names = append(names, fmt.Sprintf("%.100q", s.Name))
	}
	if n > maxNamed {
		names = append(names, fmt.Sprintf("and %d more", n-maxNamed))
	}
	return fmt.Sprintf("the image has internal snapshots that are not part of its disk: %s", strings.Join(names, ", ")), nil
}

// OpenSnapshot opens the disk as it was when an internal snapshot was taken,
// without the memory that may have been saved with it: a layer of its own,
// above the same parent as the image. which is an id, or a name that only one
// snapshot has. The error wraps fs.ErrNotExist when there is none. It shares
// the image's file and caches; each is closed for itself, in any order.
func (im *Image) OpenSnapshot(ctx context.Context, which string) (*Image, error) {
	list, err := im.Snapshots(ctx)
	if err != nil {
		return nil, err
	}
	s, err := pick(list, which)
	if err != nil {
		return nil, err
	}
	if im.external {
		// Its clusters are where the disk has other bytes by now.
		return nil, bad("snapshot %q: an image with an external data file has no snapshots", which)
	}
	h := *im.h
	h.size, h.l1Off, h.l1Len = s.Size, s.l1Off, s.l1Len
	h.snapshots, h.bitmaps = 0, nil
	if err := im.checkL1(s); err != nil {
		return nil, fmt.Errorf("snapshot %q: %w", which, err)
	}
	if need := h.l1Need(); h.l1Len < need {
		return nil, bad("snapshot %q: the L1 table has %d entries, the disk needs %d", which, h.l1Len, need)
	}
	h.places = append([]place{{"the snapshot's L1 table", h.l1Off, h.l1Len * 8}}, h.places...)
	sn := &Image{files: im.files, h: &h, of: im}
	if err := sn.describe(ctx); err != nil {
		return nil, err
	}
	sn.info.Variant += fmt.Sprintf(", snapshot %q", s.Name)
	im.users.Add(1)
	return sn, nil
}

// pick finds a snapshot by its id or else its name.
func pick(list []Snapshot, which string) (Snapshot, error) {
	var found []Snapshot
	for _, s := range list {
		if s.ID == which {
			return s, nil
		}
		if s.Name == which {
			found = append(found, s)
		}
	}
	switch len(found) {
	case 0:
		return Snapshot{}, fmt.Errorf("snapshot %q: %w", which, fs.ErrNotExist)
	case 1:
		return found[0], nil
	}
	return Snapshot{}, fmt.Errorf("snapshot %q: %d snapshots have that name: say which by its id (%s, %s, ...)", which, len(found), found[0].ID, found[1].ID)
}

// checkL1 checks the place of a snapshot's L1 table.
func (im *Image) checkL1(s Snapshot) error {
	if s.l1Len*8 > maxL1 {
		return bad("the L1 table has %d entries", s.l1Len)
	}
	if s.l1Off%im.cluster != 0 {
		return bad("the L1 table is at offset %d, not that of a cluster", s.l1Off)
	}
	if s.l1Len == 0 {
		return nil
	}
	if err := im.checkPlace(s.l1Off, s.l1Len*8, im.file.Size()); err != nil {
		return fmt.Errorf("the L1 table: %w", err)
	}
	return nil
}

// snapshot reads the entry at an offset, and its length.
func (im *Image) snapshot(ctx context.Context, at int64) (Snapshot, int64, error) {
	head := make([]byte, 40)
	if err := im.readTable(ctx, head, at); err != nil {
		return Snapshot{}, 0, err
	}
	be := binary.BigEndian
	idLen := int64(be.Uint16(head[12:]))
	nameLen := int64(be.Uint16(head[14:]))
	extra := int64(be.Uint32(head[36:]))
	if extra > maxSnapshotExtra {
		return Snapshot{}, 0, bad("%d bytes of extra data", extra)
	}
	tail := make([]byte, extra+idLen+nameLen)
	if err := im.readTable(ctx, tail, at+40); err != nil {
		return Snapshot{}, 0, err
	}
	s := Snapshot{
		ID:      string(tail[extra : extra+idLen]),
		Name:    string(tail[extra+idLen:]),
		Time:    time.Unix(int64(be.Uint32(head[16:])), int64(be.Uint32(head[20:]))),
		VMState: int64(be.Uint32(head[32:])),
		Size:    im.h.size, // what an entry of version 2 does not say has not changed
		l1Off:   int64(be.Uint64(head)),
		l1Len:   int64(be.Uint32(head[8:])),
	}
	if extra >= 8 {
		s.VMState = int64(be.Uint64(tail))
	}
	if extra >= 16 {
		s.Size = int64(be.Uint64(tail[8:]))
	}
	if s.VMState < 0 || s.Size < 0 || s.Size > maxSize {
		return Snapshot{}, 0, bad("a disk of %d bytes with %d bytes of memory", s.Size, s.VMState)
	}
	if s.l1Off < 0 {
		return Snapshot{}, 0, bad("its L1 table is at offset %#x", uint64(s.l1Off))
	}
	return s, (40 + int64(len(tail)) + 7) &^ 7, nil
}

// readTable reads bytes of the image's own file, which must have them.
func (im *Image) readTable(ctx context.Context, p []byte, at int64) error {
	if at > im.file.Size()-int64(len(p)) {
		return bad("%d bytes at offset %d lie beyond the file's end at %d", len(p), at, im.file.Size())
	}
	if len(p) == 0 {
		return nil
	}
	return im.file.ReadAt(ctx, p, at)
}
