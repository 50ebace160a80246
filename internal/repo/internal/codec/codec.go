// Package codec compresses content: one codec byte, then the payload
// (docs/format.md §3.2). Whatever it compresses it decodes again and compares,
// so that an encoder's defect costs space, never data.
//
// All functions are safe in parallel.
package codec

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
)

const (
	plain byte = 0
	zst   byte = 1
	snap  byte = 2
)

// Compressor is a way to compress.
type Compressor int

const (
	// Fast is Snappy: 0.8 GB/s per core and 2 GB/s back (measured on a system
	// disk, chunks of 64 KiB, one core of a cloud machine), to 49 % of the size.
	Fast Compressor = iota
	// Small is Zstandard at its fastest level: 0.3 and 1 GB/s, to 39 %. Higher
	// levels cost two to ten times the time for a few per cent.
	Small
)

// ErrCodec is returned for content that cannot be decoded.
var ErrCodec = errors.New("content cannot be decoded")

// pair is an encoder and a decoder that serve one call at a time.
type pair struct {
	enc *zstd.Encoder
	dec *zstd.Decoder
}

var pairs = sync.Pool{New: func() any { return newPair() }}

// checks are buffers to decode into.
var checks = sync.Pool{New: func() any { return new([]byte) }}

// decoders bounds how many decoders exist, for their memory's sake.
var decoders = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(runtime.GOMAXPROCS(0)), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxMemory(256<<20))
	if err != nil {
		panic(err) // only for bad options
	}
	return d
})

func newPair() *pair {
	// The frame's checksum is left out since GCM's tag is stronger.
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
	if err != nil {
		panic(err) // only for bad options
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
	if err != nil {
		panic(err)
	}
	return &pair{enc: enc, dec: dec}
}

// Encode appends the codec byte and p's payload to dst: compressed when that
// is shorter and decodes to p again, else as it is.
func (c Compressor) Encode(dst, p []byte) []byte {
	n := len(dst)
	check := checks.Get().(*[]byte)
	defer checks.Put(check)
	var err error
	if c == Small {
		w := pairs.Get().(*pair)
		defer pairs.Put(w)
		dst = w.enc.EncodeAll(p, append(dst, zst))
		if len(dst)-n-1 < len(p) {
			*check, err = w.dec.DecodeAll(dst[n+1:], (*check)[:0])
		}
	} else {
		dst = slices.Grow(dst, 1+max(s2.MaxEncodedLen(len(p)), 0))
		payload := s2.EncodeSnappy(dst[n+1:cap(dst)], p)
		dst = dst[:n+1+len(payload)]
		dst[n] = snap
		if len(payload) < len(p) {
			*check, err = s2.Decode((*check)[:cap(*check)], payload)
		}
	}
	return proven(dst, n, p, *check, err)
}

// proven keeps what was encoded behind dst[:n] if it is shorter than p and was
// decoded to p again; else p takes its place as it is.
func proven(dst []byte, n int, p, decoded []byte, err error) []byte {
	if err == nil && len(dst)-n-1 < len(p) && bytes.Equal(decoded, p) {
		return dst
	}
	return EncodePlain(dst[:n], p)
}

// EncodePlain appends the codec byte for plain content and p: for what does
// not shrink.
func EncodePlain(dst, p []byte) []byte {
	return append(append(dst, plain), p...)
}

// Take is Decode for a p that is given away: the result may lie in it.
func Take(p []byte, max int) ([]byte, error) {
	if len(p) > 0 && p[0] == plain && len(p)-1 <= max {
		return p[1:], nil
	}
	return Decode(nil, p, max)
}

// Decode appends the content of p to dst, at most max bytes of it.
func Decode(dst, p []byte, max int) ([]byte, error) {
	if len(p) == 0 {
		return dst, fmt.Errorf("%w: empty", ErrCodec)
	}
	switch p[0] {
	case plain:
		if len(p)-1 > max {
			return dst, fmt.Errorf("%w: %d bytes, at most %d expected", ErrCodec, len(p)-1, max)
		}
		return append(dst, p[1:]...), nil
	case zst:
		var h zstd.Header
		if err := h.Decode(p[1:]); err != nil {
			return dst, fmt.Errorf("%w: %w", ErrCodec, err)
		}
		if !h.HasFCS || h.FrameContentSize > uint64(max) {
			return dst, fmt.Errorf("%w: frame of %d bytes, at most %d expected", ErrCodec, h.FrameContentSize, max)
		}
		n := len(dst)
		out, err := decoders().DecodeAll(p[1:], dst)
		if err != nil {
			return dst, fmt.Errorf("%w: %w", ErrCodec, err)
		}
		if len(out)-n > max { // a second frame behind the first
			return dst, fmt.Errorf("%w: more than one frame", ErrCodec)
		}
		return out, nil
	case snap:
		size, err := s2.DecodedLen(p[1:])
		if err != nil || size > max {
			return dst, fmt.Errorf("%w: block of %d bytes, at most %d expected: %v", ErrCodec, size, max, err)
		}
		n := len(dst)
		dst = slices.Grow(dst, size)
		if _, err := s2.Decode(dst[n:n+size], p[1:]); err != nil {
			return dst[:n], fmt.Errorf("%w: %w", ErrCodec, err)
		}
		return dst[:n+size], nil
	}
	return dst, fmt.Errorf("%w: codec %d", ErrCodec, p[0])
}
