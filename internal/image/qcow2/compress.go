package qcow2

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"holdfast/internal/image"
)

const (
	// maxBatch is how much of the file is read at once for compressed clusters
	// that lie near each other, in bytes; one alone may take more.
	maxBatch = 1 << 20
	// room behind a cluster lets the zstd decoder write a few bytes too many,
	// and so copy in larger pieces: that saves a third of its time.
	room = 64
	// maxWindow is the largest zstd window: larger than any cluster is hostile.
	maxWindow = 8 << 20
)

// extent is where a compressed cluster lies in the file.
type extent struct{ off, n int64 }

func (e extent) end() int64 { return e.off + e.n }

// place reads a descriptor: the L2 entry of a compressed cluster without its
// flags. Its length is known to the sector, and may reach beyond the file.
func (x *files) place(desc int64) (extent, error) {
	e := compressedExtent(desc, x.cluster)
	if e.off < x.cluster || e.off >= x.file.Size() {
		return e, bad("compressed cluster: its offset %d does not lie in the file of %d bytes", e.off, x.file.Size())
	}
	e.n = min(e.n, x.file.Size()-e.off)
	return e, nil
}

func compressedExtent(desc, cluster int64) extent {
	x := offsetBits(cluster)
	off := desc & (1<<x - 1)
	return extent{off, (desc>>x+1)*512 - off&511}
}

// offsetBits is how many bits of a descriptor are the offset.
func offsetBits(cluster int64) uint {
	x := uint(62)
	for ; cluster > 256; cluster >>= 1 {
		x--
	}
	return x
}

// readCompressed fills the beginning of p from the compressed cluster that m
// tells of and, if it is wanted whole, from those behind it that are wanted
// whole too and lie near it in the file. It returns how many bytes that were.
// Only what is wanted in part goes through the cache: whoever reads whole
// clusters does not come back for them.
func (im *Image) readCompressed(ctx context.Context, p []byte, off int64, m mapping) (int64, error) {
	if m.n < im.cluster {
		c, err := im.clusters.Get(ctx, m.host)
		if err == nil {
			copy(p[:m.n], c[off&(im.cluster-1):])
		}
		return m.n, err
	}
	first, err := im.place(m.host)
	if err != nil {
		return 0, err
	}
	batch, all := append(make([]extent, 0, 16), first), first
	for n := im.cluster; n+im.cluster <= int64(len(p)); n += im.cluster {
		m, err := im.lookup(ctx, off+n, im.cluster)
		if err != nil || !m.compressed {
			break // what came before is good; the error comes when it is asked for
		}
		e, err := im.place(m.host)
		if err != nil || e.off < first.off || e.end() > first.off+maxBatch {
			break
		}
		batch = append(batch, e)
		all.n = max(all.n, e.end()-all.off)
	}
	buf := im.inflater.buffer(all.n)
	defer im.inflater.buffers.Put(buf)
	src := (*buf)[:all.n]
	if err := im.file.ReadAt(ctx, src, all.off); err != nil {
		return 0, err
	}
	for i, e := range batch {
		// What is behind a cluster in p is yet to be filled, and so is room.
		dst := p[int64(i)*im.cluster:]
		dst = dst[:im.cluster:min(len(dst), int(im.cluster)+room)]
		if err := im.inflater.inflate(dst, src[e.off-all.off:e.end()-all.off]); err != nil {
			return 0, fmt.Errorf("%d bytes at offset %d: %w", e.n, e.off, err)
		}
	}
	return int64(len(batch)) * im.cluster, nil
}

// loadCompressed reads and decompresses the cluster of a descriptor.
func (x *files) loadCompressed(ctx context.Context, desc int64) ([]byte, error) {
	e, err := x.place(desc)
	if err != nil {
		return nil, err
	}
	buf := x.inflater.buffer(e.n)
	defer x.inflater.buffers.Put(buf)
	src := (*buf)[:e.n]
	if err := x.file.ReadAt(ctx, src, e.off); err != nil {
		return nil, err
	}
	dst := make([]byte, x.cluster, x.cluster+room)
	if err := x.inflater.inflate(dst, src); err != nil {
		return nil, fmt.Errorf("%d bytes at offset %d: %w", e.n, e.off, err)
	}
	return dst, nil
}

// inflater decompresses clusters, each to exactly one cluster of bytes.
// Safe in parallel.
type inflater struct {
	kind    uint8
	buffers sync.Pool                     // of *[]byte: compressed bytes
	deflate sync.Pool                     // of *deflated
	zstd    func() (*zstd.Decoder, error) // made when first used; itself safe in parallel
}

type deflated struct {
	in bytes.Reader
	r  io.ReadCloser // a flate.Resetter
}

func newInflater(kind uint8) *inflater {
	return &inflater{kind: kind, zstd: sync.OnceValues(func() (*zstd.Decoder, error) {
		// No goroutines: only DecodeAll is used. It never grows what it is given.
		return zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderMaxWindow(maxWindow))
	})}
}

// buffer returns one with n bytes or more.
func (d *inflater) buffer(n int64) *[]byte {
	if b, _ := d.buffers.Get().(*[]byte); b != nil && int64(len(*b)) >= n {
		return b
	}
	b := make([]byte, max(n, 64<<10))
	return &b
}

// inflate fills dst from a cluster's compressed bytes, which may be followed
// by anything: their exact length is not stored. It may write rubbish between
// dst's length and capacity.
func (d *inflater) inflate(dst, src []byte) error {
	var n int
	var err error
	if d.kind == compressZlib {
		n, err = d.inflateDeflate(dst, src)
	} else {
		n, err = d.inflateZstd(dst, src)
	}
	if err != nil || n < len(dst) {
		return bad("compressed cluster: only %d of %d bytes could be decompressed: %v", n, len(dst), err)
	}
	return nil
}

// inflateDeflate reads deflate without the zlib frame; a window of 4 KiB is a
// special case of the usual one. The stream ends itself; what it would give
// beyond the cluster is not asked for.
func (d *inflater) inflateDeflate(dst, src []byte) (int, error) {
	z, _ := d.deflate.Get().(*deflated)
	if z == nil {
		z = &deflated{}
		z.in.Reset(src)
		z.r = flate.NewReader(&z.in)
	} else {
		z.in.Reset(src)
		if err := z.r.(flate.Resetter).Reset(&z.in, nil); err != nil {
			return 0, err
		}
	}
	n, err := io.ReadFull(z.r, dst)
	z.in.Reset(nil)
	d.deflate.Put(z)
	return n, err
}

func (d *inflater) inflateZstd(dst, src []byte) (int, error) {
	z, err := d.zstd()
	if err != nil {
		return 0, fmt.Errorf("make a zstd decoder: %w", err)
	}
	n, err := frameLen(src)
	if err != nil {
		return 0, err
	}
	out, err := z.DecodeAll(src[:n], dst[:0])
	if len(out) > len(dst) {
		return 0, fmt.Errorf("the frame holds %d bytes", len(out))
	}
	if len(out) > 0 && &out[0] != &dst[0] {
		copy(dst, out)
	}
	return len(out), err
}

// frameLen is the length of the zstd frame with which src begins (RFC 8878,
// sections 3.1.1 and 3.1.1.2): the decoder takes what follows for another.
func frameLen(src []byte) (int, error) {
	var h zstd.Header
	if err := h.Decode(src); err != nil {
		return 0, err
	}
	if h.Skippable {
		return 0, fmt.Errorf("%w: a frame without content", image.ErrFormat)
	}
	at := h.HeaderSize
	for last := false; !last; {
		if at+3 > len(src) {
			return 0, io.ErrUnexpectedEOF
		}
		b := int(src[at]) | int(src[at+1])<<8 | int(src[at+2])<<16
		last = b&1 != 0
		at += 3
		if b>>1&3 == 1 { // one byte that is repeated
			at++
		} else {
			at += b >> 3
		}
	}
	if h.HasCheckSum {
		at += 4
	}
	if at > len(src) {
		return 0, io.ErrUnexpectedEOF
	}
	return at, nil
}
