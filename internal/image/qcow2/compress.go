package qcow2

import (
	"bytes"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"
)

// inflater decompresses clusters, each to exactly one cluster of bytes.
// Safe in parallel.
type inflater struct {
	kind uint8
	pool sync.Pool // of io.Reader: flate readers or *zstd.Decoder
}

// inflate fills dst from a cluster's compressed bytes, which may be followed
// by anything: their exact length is not stored.
func (d *inflater) inflate(dst, src []byte) error {
	r, err := d.reader(src)
	if err != nil {
		return err
	}
	defer d.pool.Put(r)
	// The stream ends itself; what it would give beyond the cluster is not
	// asked for, so that nothing can grow.
	if n, err := io.ReadFull(r, dst); err != nil {
		return bad("compressed cluster: only %d of %d bytes could be decompressed: %v", n, len(dst), err)
	}
	return nil
}

func (d *inflater) reader(src []byte) (io.Reader, error) {
	in := bytes.NewReader(src)
	switch r := d.pool.Get().(type) {
	case *zstd.Decoder:
		return r, r.Reset(in)
	case io.Reader:
		return r, r.(flate.Resetter).Reset(in, nil)
	}
	if d.kind == compressZlib {
		// Deflate without the zlib frame; a window of 4 KiB is a special case
		// of the usual one.
		return flate.NewReader(in), nil
	}
	// One goroutine-free decoder for each read in flight. A window larger than
	// any cluster is hostile.
	z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, fmt.Errorf("make a zstd decoder: %w", err)
	}
	return z, nil
}
