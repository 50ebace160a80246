package qcow2

import (
	"bytes"
	"fmt"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// Compression is how the clusters of a new image are compressed.
type Compression uint8

const (
	Zstd Compression = iota // QEMU 5.1 reads it
	Zlib                    // slower and larger, but every QEMU reads it
)

// kind is the compression as the format counts it.
func (c Compression) kind() uint8 {
	if c == Zlib {
		return compressZlib
	}
	return compressZstd
}

// deflater compresses clusters. Safe in parallel.
type deflater struct {
	zstd    *zstd.Encoder // nil for zlib
	deflate sync.Pool     // of *flate.Writer
	buffers sync.Pool     // of *[]byte: compressed clusters
}

// deflateWindow is how far back deflate may refer: the format says 12 bits.
const deflateWindow = 4 << 10

func newDeflater(kind uint8, cluster int64) *deflater {
	d := &deflater{}
	// Room for what is compressed at once and for one cluster that grows.
	room := max(packStep, cluster) + cluster + cluster/64 + 4096
	d.buffers.New = func() any {
		b := make([]byte, 0, room)
		return &b
	}
	if kind == compressZstd {
		// The options are right, so there is no error. It has no goroutines:
		// only EncodeAll is used, which is safe in parallel.
		d.zstd, _ = zstd.NewWriter(nil, zstd.WithEncoderCRC(false), zstd.WithWindowSize(int(max(cluster, zstd.MinWindowSize))))
	}
	return d
}

func (d *deflater) buffer() *[]byte { return d.buffers.Get().(*[]byte) }

// compress appends what src becomes to dst.
func (d *deflater) compress(dst, src []byte) ([]byte, error) {
	if d.zstd != nil {
		return d.zstd.EncodeAll(src, dst), nil
	}
	out := bytes.NewBuffer(dst)
	z, _ := d.deflate.Get().(*flate.Writer)
	if z == nil {
		var err error
		if z, err = flate.NewWriterWindow(out, deflateWindow); err != nil {
			return dst, fmt.Errorf("compress: %w", err)
		}
	} else {
		z.Reset(out)
	}
	_, err := z.Write(src)
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		return dst, fmt.Errorf("compress: %w", err)
	}
	d.deflate.Put(z)
	return out.Bytes(), nil
}
