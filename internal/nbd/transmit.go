package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

const (
	// wholeRead is the longest read that is answered in one chunk without
	// asking the disk for its extents first; asking costs as much as reading.
	// Every DF read of this length must be (proto, NBD_CMD_READ).
	wholeRead = 64 << 10
	// piece is the longest data chunk, and the unit in which zeros are
	// written and data is read ahead.
	piece = 1 << 20
	// maxCache bounds what one NBD_CMD_CACHE reads.
	maxCache = 32 << 20
	// maxDescriptors bounds a block status reply to 512 KiB.
	maxDescriptors = 64 << 10
	// allocationID is the id of base:allocation on every connection.
	allocationID = 1
	// lingerTime is how long a server that ends waits for the client to close.
	lingerTime = 300 * time.Millisecond
)

var zeros [piece]byte

// past is a deadline that wakes whoever reads.
var past = time.Unix(1, 0)

// conn is one client's connection. The fields of the second group are fixed
// when the transmission phase begins.
type conn struct {
	s        *Server
	raw      net.Conn // what was accepted
	nc       net.Conn // raw, or TLS over it
	br       *bufio.Reader
	stopping <-chan struct{} // closed when the server is to end
	ctx      context.Context // of requests
	cancel   context.CancelCauseFunc

	fixed, noZeroes, secure bool
	structured              bool    // structured replies were negotiated
	allocation              bool    // base:allocation was selected, for metaFor
	metaFor                 string  // export name
	asked                   string  // export name as the client wrote it
	exp                     *export // export in use

	out      outbox
	budget   *semaphore.Weighted // bytes of payload held
	slots    chan struct{}       // full when as many requests are under way as may be
	refusals chan struct{}       // likewise of requests that come too late
	work     chan job            // to workers that wait for more
	wg       sync.WaitGroup      // workers
	stopped  atomic.Bool         // the server is to end
	quiet    chan struct{}       // closed when it has nothing more to do here
	ended    atomic.Bool         // no further request will be read
	finished chan struct{}       // closed when every request is finished
}

// commandFlags are the flags that each command knows. FUA must be accepted
// with every one (proto, NBD_CMD_FLAG_FUA).
var commandFlags = map[uint16]uint16{
	cmdRead:        cmdFlagFUA | cmdFlagDF,
	cmdWrite:       cmdFlagFUA,
	cmdFlush:       cmdFlagFUA,
	cmdTrim:        cmdFlagFUA,
	cmdCache:       cmdFlagFUA,
	cmdWriteZeroes: cmdFlagFUA | cmdFlagNoHole | cmdFlagFastZero,
	cmdBlockStatus: cmdFlagFUA | cmdFlagReqOne,
}

// transmit runs the transmission phase.
func (c *conn) transmit() error {
	_, tcp := c.nc.(*net.TCPConn)
	_, local := c.nc.(*net.UnixConn)
	c.out = outbox{nc: c.nc, vec: tcp || local, stall: c.s.o.StallTimeout, sent: c.sent, fail: c.abort}
	c.quiet = make(chan struct{})
	c.work = make(chan job)
	over := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		select {
		case <-c.stopping:
			c.windDown(over)
		case <-over:
		}
	})
	err := c.readRequests()
	c.ended.Store(true)
	close(c.work)
	c.wg.Wait()
	close(over)
	watch.Wait()
	if c.stopped.Load() && (err == nil || errors.Is(err, io.EOF)) {
		c.linger()
	} else if c.secure && c.ctx.Err() == nil {
		c.nc.Close() // says goodbye in TLS too
	}
	return err
}

// windDown ends the reading of requests: at once when clients are to come back,
// else when all that were under way are answered.
func (c *conn) windDown(over <-chan struct{}) {
	c.stopped.Store(true)
	if !c.s.o.Resumable {
		for range cap(c.slots) {
			select {
			case c.slots <- struct{}{}:
			case <-over:
				return
			}
		}
	}
	close(c.quiet)
	c.nc.SetReadDeadline(past) // fails only when the connection is closed
}

// linger ends a connection from our side without losing replies on their way:
// closing with unread requests would reset it.
func (c *conn) linger() {
	if h, ok := c.nc.(interface{ CloseWrite() error }); ok && h.CloseWrite() == nil {
		c.raw.SetReadDeadline(time.Now().Add(lingerTime))
		io.Copy(io.Discard, c.raw) // until it closes too
	}
}

// readDeadline sets by when the client must have sent what is read next.
func (c *conn) readDeadline(d time.Duration) error {
	t := time.Time{}
	if d > 0 {
		t = time.Now().Add(d)
	}
	err := c.nc.SetReadDeadline(t)
	select {
	case <-c.quiet: // windDown may have set its own just before
		return c.nc.SetReadDeadline(past)
	default:
		return err
	}
}

// readRequests reads requests and starts their handling. The error is nil or
// io.EOF when the connection ends in good order.
func (c *conn) readRequests() error {
	defer c.out.flush()
	for {
		if c.br.Buffered() < requestLen {
			c.out.flush()
		}
		if c.s.o.IdleTimeout > 0 {
			if err := c.readDeadline(c.s.o.IdleTimeout); err != nil {
				return err
			}
		}
		h, err := c.br.Peek(requestLen)
		if err != nil {
			return c.readError(err, len(h) > 0)
		}
		r, ok := parseRequest(h)
		if !ok {
			return fmt.Errorf("%w: request magic %#x", ErrProtocol, be.Uint32(h))
		}
		c.br.Discard(requestLen)
		if r.cmd == cmdDisc {
			return io.EOF
		}
		slot := c.takeSlot()
		if slot == nil {
			return nil
		}
		c.s.stats.requests.Add(1)
		e := c.check(r)
		var b *buffer
		if r.cmd == cmdWrite {
			if b, err = c.readPayload(r, e == 0); err != nil {
				<-slot
				return c.readError(err, true)
			}
		}
		if e != 0 {
			c.refuse(r, e, c.s.bufs.get(0), slot)
			continue
		}
		if b == nil {
			var ok bool
			if b, ok = c.readCached(r); ok {
				continue
			}
		}
		c.hand(job{r, b})
	}
}

// job is a request for handle.
type job struct {
	r request
	b *buffer
}

// hand gives a request to a worker: to one that waits for more, whose stack has
// grown to what is needed, or to a new one.
func (c *conn) hand(j job) {
	select {
	case c.work <- j:
	default:
		c.wg.Go(func() {
			for ok := true; ok; j, ok = <-c.work {
				c.handle(j.r, j.b)
			}
		})
	}
}

// readError is the end that a failed read makes of the connection.
func (c *conn) readError(err error, midway bool) error {
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx)
	}
	if c.stopped.Load() {
		return nil
	}
	if midway && errors.Is(err, io.EOF) {
		return fmt.Errorf("read request: %w", io.ErrUnexpectedEOF)
	}
	if errors.Is(err, io.EOF) {
		return io.EOF
	}
	return fmt.Errorf("read request: %w", err)
}

// takeSlot waits until one more request may be under way and returns what is
// free again with its reply; nil when the server is to end.
func (c *conn) takeSlot() chan struct{} {
	if !c.stopped.Load() {
		select {
		case c.slots <- struct{}{}:
			return c.slots
		default:
		}
		c.out.flush()
		select {
		case c.slots <- struct{}{}:
			return c.slots
		case <-c.stopping:
			c.stopped.Store(true)
		}
	}
	if c.s.o.Resumable {
		return nil
	}
	select {
	case c.refusals <- struct{}{}:
		return c.refusals
	case <-c.quiet:
		return nil
	}
}

// check is the answer to a request that is refused as it stands.
func (c *conn) check(r request) Errno {
	known, ok := commandFlags[r.cmd]
	if !c.structured {
		known &^= cmdFlagDF
	}
	if !ok || r.flags&^known != 0 || r.cmd == cmdBlockStatus && (!c.allocation || r.n == 0) {
		return EINVAL
	}
	beyond := EINVAL
	switch r.cmd {
	case cmdFlush:
		r.off, r.n = 0, 0 // reserved
	case cmdWrite, cmdWriteZeroes:
		beyond = ENOSPC
		fallthrough
	case cmdTrim:
		if c.exp.readOnly {
			return EPERM
		}
	}
	size := uint64(c.exp.size)
	if r.off > size || uint64(r.n) > size-r.off {
		return beyond
	}
	if r.cmd == cmdRead && r.n > maxPayload {
		if r.flags&cmdFlagDF != 0 {
			return EOVERFLOW
		}
		if !c.structured {
			return EINVAL
		}
	}
	if c.stopped.Load() {
		return ESHUTDOWN
	}
	return 0
}

// readPayload reads the payload of a write, or reads over it when it is not
// wanted; then the buffer is nil.
func (c *conn) readPayload(r request, wanted bool) (*buffer, error) {
	n := int(r.n)
	if n > maxPayload {
		return nil, fmt.Errorf("%w: write of %d bytes", ErrProtocol, n)
	}
	var b *buffer
	c.out.flush()
	if wanted {
		var err error
		if b, err = c.take(n); err != nil {
			return nil, err
		}
	}
	waits := c.br.Buffered() < n
	if waits {
		if err := c.readDeadline(c.s.o.StallTimeout); err != nil {
			return nil, err
		}
	}
	var err error
	if wanted {
		_, err = io.ReadFull(c.br, b.payload(n))
	} else {
		_, err = c.br.Discard(n)
	}
	if err == nil && waits && c.s.o.IdleTimeout == 0 {
		err = c.readDeadline(0)
	}
	if err != nil && b != nil {
		c.giveBack(b)
		b = nil
	}
	return b, err
}

// take returns a buffer for n bytes of payload when the limits allow it.
func (c *conn) take(n int) (*buffer, error) {
	if cost := classCost(classFor(n)); cost > 0 {
		if err := c.budget.Acquire(c.ctx, cost); err != nil {
			return nil, context.Cause(c.ctx)
		}
		if err := c.s.budget.Acquire(c.ctx, cost); err != nil {
			c.budget.Release(cost)
			return nil, context.Cause(c.ctx)
		}
	}
	return c.s.bufs.get(n), nil
}

// tryTake is take where that needs no waiting, else nil.
func (c *conn) tryTake(n int) *buffer {
	if cost := classCost(classFor(n)); cost > 0 {
		if !c.budget.TryAcquire(cost) {
			return nil
		}
		if !c.s.budget.TryAcquire(cost) {
			c.budget.Release(cost)
			return nil
		}
	}
	return c.s.bufs.get(n)
}

func (c *conn) giveBack(b *buffer) {
	if cost := b.cost(); cost > 0 {
		c.s.budget.Release(cost)
		c.budget.Release(cost)
	}
	c.s.bufs.put(b)
}

// sent is the end of a message; the last of a request frees its slot.
func (c *conn) sent(b *buffer) {
	slot := b.slot
	c.giveBack(b)
	if slot != nil {
		<-slot
	}
}

// refuse answers a request with an error, in b.
func (c *conn) refuse(r request, e Errno, b *buffer, slot chan struct{}) {
	c.s.stats.errors.Add(1)
	if c.structured {
		h := b.header(chunkLen+6, 0)
		putChunk(h, replyFlagDone, replyError, r.cookie, 6)
		be.PutUint32(h[chunkLen:], uint32(e))
		be.PutUint16(h[chunkLen+4:], 0) // no message
	} else {
		putSimple(b.header(simpleLen, 0), e, r.cookie)
	}
	b.slot = slot
	c.out.send(b)
}

// done answers a request without payload that ended with err, in b.
func (c *conn) done(r request, err error, b *buffer) {
	if err != nil {
		e := errnoOf(err)
		if e != EPERM && e != ESHUTDOWN && e != ENOTSUP {
			c.s.o.Report(fmt.Errorf("export %q: command %d, %d bytes at %d: %w", c.exp.name, r.cmd, r.n, r.off, err))
		}
		c.refuse(r, e, b, c.slots)
		return
	}
	putSimple(b.header(simpleLen, 0), 0, r.cookie)
	b.slot = c.slots
	c.out.send(b)
}
