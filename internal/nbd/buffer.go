package nbd

import (
	"math/bits"
	"sync"
)

// headroom is kept free before a buffer's payload, so that a reply's header
// lies right before it and both leave in one piece: 28 bytes are the longest
// header (a structured chunk's with the offset).
const headroom = 32

// Buffers come in powers of two between these.
const (
	minClass = 12 // 4 KiB
	maxClass = 25 // 32 MiB, maxPayload
)

// buffer holds one message: a header growing downward from headroom, then the
// payload. It belongs to one goroutine at a time.
type buffer struct {
	mem   []byte
	class int           // 0: header only
	lo    int           // the message starts here
	hi    int           // and ends before here
	slot  chan struct{} // of the request whose last message it is, else nil
}

// payload is the room after the header, n bytes.
func (b *buffer) payload(n int) []byte { return b.mem[headroom : headroom+n] }

// header says that the message has n bytes of payload after a header of h
// bytes, and returns the room for that.
func (b *buffer) header(h, n int) []byte {
	b.lo, b.hi = headroom-h, headroom+n
	return b.mem[b.lo:headroom]
}

func (b *buffer) bytes() []byte { return b.mem[b.lo:b.hi] }

// cost is what the buffer counts against the limits of payload in flight.
func (b *buffer) cost() int64 { return classCost(b.class) }

// classFor is the smallest class that holds n bytes; 0 for none.
func classFor(n int) int {
	if n == 0 {
		return 0
	}
	return max(minClass, bits.Len(uint(n-1)))
}

func classCost(class int) int64 {
	if class == 0 {
		return 0
	}
	return 1 << class
}

// buffers is a pool of buffers by class.
type buffers struct{ class [maxClass + 1]sync.Pool }

// get returns a buffer with room for n bytes of payload, n <= maxPayload.
func (bs *buffers) get(n int) *buffer {
	c := classFor(n)
	if b, ok := bs.class[c].Get().(*buffer); ok {
		return b
	}
	return &buffer{mem: make([]byte, headroom+classCost(c)), class: c}
}

func (bs *buffers) put(b *buffer) {
	b.slot = nil
	bs.class[b.class].Put(b)
}
