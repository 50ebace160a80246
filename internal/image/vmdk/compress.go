package vmdk

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zlib"

	"holdfast/internal/disk"
)

// grainHead is what is before a compressed grain: the sector of the disk, u64,
// and the number of compressed bytes, u32.
const grainHead = 12

// mostPacked bounds the compressed bytes of a grain: what does not shrink grows
// by less.
func mostPacked(grain int64) int64 { return 2*grain + sector }

// packed says what is known of a compressed grain before it is read.
type packed struct {
	number   int64 // on its extent
	grain    int64 // bytes
	need     int64 // of them, those that lie on the disk
	marker   bool  // its bytes follow a grainHead
	inflater *inflater
}

// readGrain reads and decompresses the grain at a place of the file. The
// result is one grain long.
func readGrain(ctx context.Context, f disk.Reader, at int64, p packed) ([]byte, error) {
	where := fmt.Sprintf("compressed grain at offset %d", at)
	n := min(mostPacked(p.grain), f.Size()-at)
	if p.marker {
		var head [grainHead]byte
		if err := inside(where, at, grainHead, f.Size()); err != nil {
			return nil, err
		}
		if err := f.ReadAt(ctx, head[:], at); err != nil {
			return nil, err
		}
		if lba := binary.LittleEndian.Uint64(head[:]); lba != uint64(p.number*p.grain/sector) {
			return nil, bad("%s: it is that of sector %d of the disk, not of %d", where, lba, p.number*p.grain/sector)
		}
		n = int64(binary.LittleEndian.Uint32(head[8:]))
		if n == 0 || n > mostPacked(p.grain) {
			return nil, bad("%s: it has %d bytes", where, n)
		}
		at += grainHead
		if err := inside(where, at, n, f.Size()); err != nil {
			return nil, err
		}
	}
	src := make([]byte, n)
	if err := f.ReadAt(ctx, src, at); err != nil {
		return nil, err
	}
	dst := make([]byte, p.grain)
	if err := p.inflater.inflate(dst, src, p.need); err != nil {
		return nil, fmt.Errorf("%s: %w", where, err)
	}
	return dst, nil
}

// inflater decompresses grains. Safe in parallel.
type inflater struct {
	pool sync.Pool // of io.ReadCloser, a zlib.Resetter too
}

// inflate fills dst with what src, a zlib stream and perhaps bytes behind it,
// holds: need bytes at least, and no more than dst has room for. Nothing
// larger is ever decompressed.
func (z *inflater) inflate(dst, src []byte, need int64) error {
	r, err := z.reader(src)
	if err != nil {
		return bad("%v", err)
	}
	defer z.pool.Put(r)
	n := 0
	for n < len(dst) && err == nil {
		var k int
		k, err = r.Read(dst[n:])
		n += k
	}
	if err == nil { // its end, and the checksum behind it
		var more [1]byte
		var k int
		for k == 0 && err == nil {
			k, err = r.Read(more[:])
		}
		if k > 0 {
			return bad("it decompresses to more than one grain of %d bytes", len(dst))
		}
	}
	if err != io.EOF {
		return bad("after %d bytes: %v", n, err)
	}
	if int64(n) < need {
		return bad("it decompresses to %d bytes, not %d", n, need)
	}
	return nil
}

func (z *inflater) reader(src []byte) (io.ReadCloser, error) {
	in := bytes.NewReader(src)
	if r, ok := z.pool.Get().(io.ReadCloser); ok {
		return r, r.(zlib.Resetter).Reset(in, nil)
	}
	return zlib.NewReader(in)
}
