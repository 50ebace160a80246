package qcow2

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"
)

// Limits of the snapshot table; QEMU's are the same or smaller.
const (
	maxSnapshots     = 65536
	maxSnapshotExtra = 1024
)

// Snapshot is an internal snapshot, as the image lists it.
type Snapshot struct {
	ID, Name string
	Time     time.Time // when it was taken
	Size     int64     // of the disk then, bytes; 0 when the image does not say
	VMState  int64     // bytes of saved memory; 0 for a disk only
}

// Snapshots lists the image's internal snapshots. Their content is not read.
func (im *Image) Snapshots(ctx context.Context) ([]Snapshot, error) {
	if im.h.snapshots > maxSnapshots {
		return nil, bad("header: %d snapshots", im.h.snapshots)
	}
	var list []Snapshot
	at := im.h.snapsOff
	for i := range im.h.snapshots {
		s, n, err := im.snapshot(ctx, at)
		if err != nil {
			return nil, fmt.Errorf("snapshot table, entry %d at offset %d: %w", i, at, err)
		}
		list = append(list, s)
		at += n
	}
	return list, nil
}

// snapshot reads the entry at an offset, and its length.
func (im *Image) snapshot(ctx context.Context, at int64) (Snapshot, int64, error) {
	head := make([]byte, 40)
	if err := im.readTable(ctx, head, at); err != nil {
		return Snapshot{}, 0, err
	}
	idLen := int64(binary.BigEndian.Uint16(head[12:]))
	nameLen := int64(binary.BigEndian.Uint16(head[14:]))
	extra := int64(binary.BigEndian.Uint32(head[36:]))
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
		Time:    time.Unix(int64(binary.BigEndian.Uint32(head[16:])), int64(binary.BigEndian.Uint32(head[20:]))),
		VMState: int64(binary.BigEndian.Uint32(head[32:])),
	}
	if extra >= 8 {
		s.VMState = int64(binary.BigEndian.Uint64(tail))
	}
	if extra >= 16 {
		s.Size = int64(binary.BigEndian.Uint64(tail[8:]))
	}
	if s.VMState < 0 || s.Size < 0 || s.Size > maxSize {
		return Snapshot{}, 0, bad("a disk of %d bytes with %d bytes of memory", s.Size, s.VMState)
	}
	return s, (40 + int64(len(tail)) + 7) &^ 7, nil
}

func (im *Image) readTable(ctx context.Context, p []byte, at int64) error {
	if at > im.file.Size()-int64(len(p)) {
		return bad("%d bytes at offset %d lie beyond the file's end at %d", len(p), at, im.file.Size())
	}
	if len(p) == 0 {
		return nil
	}
	return im.file.ReadAt(ctx, p, at)
}
