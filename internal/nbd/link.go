package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"
)

// cancelGrace is how long a cancelled request waits for its slice to be out of
// the connection's hands before it breaks the connection.
const cancelGrace = 5 * time.Second

// link is one connection in the transmission phase.
type link struct {
	nc         net.Conn
	raw        net.Conn
	br         *bufio.Reader
	vec        bool
	structured bool
	ids        map[uint32]string // metadata contexts by id
	stall      time.Duration
	lost       func(error) // told when the connection breaks

	slots chan struct{} // full when as many requests are under way as may be
	wake  chan struct{} // there is something to send
	gone  chan struct{} // closed when the connection is broken or closed
	ended chan struct{} // closed when all goroutines have ended

	mu      sync.Mutex // guards what follows, and of calls what says so
	pending map[uint64]*call
	queue   []*call
	cookie  uint64
	err     error // why gone
}

// call is one request. Until it is done the sender may read out and the
// receiver may write dst.
type call struct {
	req  request
	head [requestLen]byte
	out  []byte // payload of a write
	dst  []byte // where a read goes; nil when cancelled
	done chan struct{}

	got    spans                  // what of dst has come
	status map[string][]extentRun // by metadata context
	errno  Errno
	text   string // the server's words with errno
	err    error  // set when the connection broke

	// Guarded by link.mu.
	state     callState
	replied   bool // the whole reply has come
	receiving bool // the receiver writes dst
	idle      chan struct{}
}

type callState int

const (
	queued callState = iota
	sending
	sent
)

// extentRun is one descriptor of a block status.
type extentRun struct{ n, flags uint32 }

// newLink takes over a connection from its handshake. It wants start.
func newLink(t *talk, o DialOptions, lost func(error)) *link {
	_, tcp := t.nc.(*net.TCPConn)
	_, local := t.nc.(*net.UnixConn)
	return &link{
		nc: t.nc, raw: t.raw, br: t.br, vec: tcp || local,
		structured: t.info.Structured,
		ids:        t.ids,
		stall:      o.StallTimeout,
		lost:       lost,
		slots:      make(chan struct{}, o.InFlight),
		wake:       make(chan struct{}, 1),
		gone:       make(chan struct{}),
		ended:      make(chan struct{}),
		pending:    map[uint64]*call{},
	}
}

// start starts the goroutines, which fail ends.
func (l *link) start() {
	var wg sync.WaitGroup
	wg.Go(l.send)
	wg.Go(l.receive)
	go func() {
		wg.Wait()
		l.failPending()
		close(l.ended)
	}()
}

// do carries out one request and returns when it is answered, or cancelled, or
// can never be; then its slices are the caller's again.
func (l *link) do(ctx context.Context, c *call) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case l.slots <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	case <-l.gone:
		return l.cause()
	}
	c.done = make(chan struct{})
	l.mu.Lock()
	if l.err != nil {
		l.mu.Unlock()
		<-l.slots
		return l.cause()
	}
	l.cookie++
	c.req.cookie = l.cookie
	l.pending[c.req.cookie] = c
	l.queue = append(l.queue, c)
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
	select {
	case <-c.done:
		return c.result()
	case <-ctx.Done():
		return l.abandon(ctx, c)
	}
}

func (c *call) result() error {
	switch {
	case c.err != nil:
		return c.err
	case c.errno != 0 && c.text != "":
		return fmt.Errorf("%w (%q)", c.errno, c.text)
	case c.errno != 0:
		return c.errno
	}
	return nil
}

// abandon gives up a request whose context is done. What was not yet sent is
// taken back; else the reply will be read and dropped. It returns when the
// request's slices are not in use any more.
func (l *link) abandon(ctx context.Context, c *call) error {
	l.mu.Lock()
	if c.state == queued && l.err == nil {
		l.queue = slices.DeleteFunc(l.queue, func(q *call) bool { return q == c })
		delete(l.pending, c.req.cookie)
		l.mu.Unlock()
		<-l.slots
		return ctx.Err()
	}
	c.dst = nil
	if c.state != sending && !c.receiving {
		l.mu.Unlock()
		return ctx.Err()
	}
	idle := make(chan struct{})
	c.idle = idle
	l.mu.Unlock()
	t := time.NewTimer(cancelGrace)
	defer t.Stop()
	select {
	case <-idle:
	case <-t.C:
		l.fail(errors.New("server stalled in a request that was cancelled"))
		<-idle
	}
	return ctx.Err()
}

// rest says that c's slices are not in use. The caller holds mu.
func (c *call) rest() {
	if c.idle != nil && c.state != sending && !c.receiving {
		close(c.idle)
		c.idle = nil
	}
}

// complete ends a request. The caller holds mu.
func (l *link) complete(c *call) {
	delete(l.pending, c.req.cookie)
	c.rest()
	close(c.done)
	<-l.slots
}

// fail breaks the connection. The first cause stays.
func (l *link) fail(err error) {
	l.mu.Lock()
	first := l.err == nil
	if first {
		l.err = err
	}
	l.mu.Unlock()
	if first {
		close(l.gone)
		l.raw.Close()
		if !errors.Is(err, net.ErrClosed) {
			l.lost(err)
		}
	}
}

func (l *link) cause() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return fmt.Errorf("%w: %w", ErrLost, l.err)
}

// failPending ends what will never be answered, when nobody uses its slices
// any more.
func (l *link) failPending() {
	err := l.cause()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range l.pending {
		c.err, c.state, c.receiving = err, sent, false
		l.complete(c)
	}
	l.queue = nil
}

// send is the sender goroutine.
func (l *link) send() {
	var bufs net.Buffers
	var flat []byte
	for {
		select {
		case <-l.wake:
		case <-l.gone:
			return
		}
		l.mu.Lock()
		if l.err != nil { // nothing of the queue is touched any more
			l.mu.Unlock()
			return
		}
		batch := l.queue
		l.queue = nil
		for _, c := range batch {
			c.state = sending
		}
		l.mu.Unlock()
		bufs, flat = bufs[:0], flat[:0]
		for _, c := range batch {
			c.req.put(c.head[:])
			bufs = append(bufs, c.head[:])
			if len(c.out) > 0 {
				bufs = append(bufs, c.out)
			}
		}
		err := l.nc.SetWriteDeadline(time.Now().Add(l.stall))
		if err == nil && l.vec {
			b := bufs // WriteTo eats the slice that it is called on
			_, err = b.WriteTo(l.nc)
		} else if err == nil {
			flat, err = writeFlat(l.nc, flat, bufs)
		}
		clear(bufs)
		if err != nil {
			l.fail(fmt.Errorf("send request: %w", err))
			return
		}
		l.mu.Lock()
		for _, c := range batch {
			c.state = sent
			c.rest()
			if c.replied {
				l.complete(c)
			}
		}
		l.mu.Unlock()
	}
}

// writeFlat writes bufs with few calls of Write, which for TLS are as many
// records. flat is scratch and is returned for the next time.
func writeFlat(w io.Writer, flat []byte, bufs net.Buffers) ([]byte, error) {
	const most = 64 << 10
	for i, b := range bufs {
		if len(flat)+len(b) <= most {
			flat = append(flat, b...)
			if i < len(bufs)-1 {
				continue
			}
			b = nil
		}
		for _, p := range [][]byte{flat, b} {
			if len(p) == 0 {
				continue
			}
			if _, err := w.Write(p); err != nil {
				return flat, err
			}
		}
		flat = flat[:0]
	}
	return flat, nil
}

// receive is the receiver goroutine.
func (l *link) receive() {
	for {
		p, err := l.br.Peek(4)
		if err == nil {
			switch m := be.Uint32(p); {
			case m == magicSimple:
				err = l.simple()
			case m == magicStructured && l.structured:
				err = l.chunk()
			default:
				err = fmt.Errorf("%w: reply magic %#x", ErrProtocol, m)
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("server closed the connection")
			}
			l.fail(err)
			return
		}
	}
}

// find returns the request that a reply belongs to.
func (l *link) find(cookie uint64) (*call, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.pending[cookie]
	if c == nil || c.state == queued || c.replied {
		return nil, fmt.Errorf("%w: reply to request %d, which waits for none", ErrProtocol, cookie)
	}
	return c, nil
}

// finish ends a request whose reply is complete.
func (l *link) finish(c *call) error {
	if c.req.cmd == cmdRead && c.errno == 0 && !c.got.all(c.req.off, uint64(c.req.n)) {
		return fmt.Errorf("%w: read of %d bytes at %d was answered in part", ErrProtocol, c.req.n, c.req.off)
	}
	if c.req.cmd == cmdBlockStatus && c.errno == 0 && len(c.status) != len(l.ids) {
		return fmt.Errorf("%w: block status misses a metadata context", ErrProtocol)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.state == sending { // the sender still has the payload
		c.replied = true
		return nil
	}
	l.complete(c)
	return nil
}

// full reads p whole, within the time a message may take.
func (l *link) full(p []byte) error {
	if l.br.Buffered() < len(p) {
		if err := l.raw.SetReadDeadline(time.Now().Add(l.stall)); err != nil {
			return err
		}
		defer l.raw.SetReadDeadline(time.Time{}) // fails only once closed
	}
	if _, err := io.ReadFull(l.br, p); err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("server stalled in a reply: %w", err)
		}
		return fmt.Errorf("read reply: %w", err)
	}
	return nil
}

// fill reads n bytes of a read's payload to its place at off.
func (l *link) fill(c *call, off uint64, n int) error {
	at := int(off - c.req.off)
	l.mu.Lock()
	var p []byte
	if c.dst != nil {
		c.receiving = true
		p = c.dst[at : at+n]
	}
	l.mu.Unlock()
	if p == nil {
		return l.skip(n)
	}
	err := l.full(p)
	l.mu.Lock()
	c.receiving = false
	c.rest()
	l.mu.Unlock()
	return err
}

func (l *link) skip(n int) error {
	var scratch [4096]byte
	for n > 0 {
		p := scratch[:min(n, len(scratch))]
		if err := l.full(p); err != nil {
			return err
		}
		n -= len(p)
	}
	return nil
}

// simple takes a simple reply (proto, "Simple reply message").
func (l *link) simple() error {
	var h [simpleLen]byte
	if err := l.full(h[:]); err != nil {
		return err
	}
	c, err := l.find(be.Uint64(h[8:]))
	if err != nil {
		return err
	}
	c.errno = Errno(be.Uint32(h[4:]))
	if c.errno == 0 && (c.req.cmd == cmdRead && l.structured || c.req.cmd == cmdBlockStatus) {
		return fmt.Errorf("%w: simple reply to command %d", ErrProtocol, c.req.cmd)
	}
	if c.errno == 0 && c.req.cmd == cmdRead {
		if err := l.fill(c, c.req.off, int(c.req.n)); err != nil {
			return err
		}
		c.got.add(c.req.off, uint64(c.req.n))
	}
	return l.finish(c)
}

// chunk takes one structured reply chunk (proto, "Structured reply chunk
// message").
func (l *link) chunk() error {
	var h [chunkLen]byte
	if err := l.full(h[:]); err != nil {
		return err
	}
	flags, typ, n := be.Uint16(h[4:]), be.Uint16(h[6:]), be.Uint32(h[16:])
	c, err := l.find(be.Uint64(h[8:]))
	if err != nil {
		return err
	}
	done := flags&replyFlagDone != 0
	switch {
	case typ == replyNone && n == 0 && done:
	case typ == replyData && n > 8 && c.req.cmd == cmdRead:
		err = l.data(c, n)
	case typ == replyHole && n == 12 && c.req.cmd == cmdRead:
		err = l.hole(c)
	case typ == replyBlockStatus && n > 4 && n%8 == 4 && n <= 4+8*maxStatus && c.req.cmd == cmdBlockStatus:
		err = l.blockStatus(c, n)
	case typ&replyIsError != 0 && n >= 6 && n <= maxOptionData:
		err = l.errorChunk(c, n)
	default:
		err = fmt.Errorf("%w: chunk of type %d with %d bytes for command %d", ErrProtocol, typ, n, c.req.cmd)
	}
	if err != nil || !done {
		return err
	}
	return l.finish(c)
}

func (l *link) data(c *call, n uint32) error {
	var h [8]byte
	if err := l.full(h[:]); err != nil {
		return err
	}
	off := be.Uint64(h[:])
	n -= 8
	if err := c.cover(off, n); err != nil {
		return err
	}
	return l.fill(c, off, int(n))
}

func (l *link) hole(c *call) error {
	var h [12]byte
	if err := l.full(h[:]); err != nil {
		return err
	}
	off, n := be.Uint64(h[:]), be.Uint32(h[8:])
	if err := c.cover(off, n); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.dst != nil {
		at := off - c.req.off
		clear(c.dst[at : at+uint64(n)])
	}
	return nil
}

// cover notes that a chunk brings a part of a read, which it must lie in and
// must not have come before.
func (c *call) cover(off uint64, n uint32) error {
	in := off >= c.req.off && off-c.req.off <= uint64(c.req.n) && uint64(n) <= uint64(c.req.n)-(off-c.req.off)
	if n == 0 || !in || !c.got.add(off, uint64(n)) {
		return fmt.Errorf("%w: %d bytes at %d in answer to a read of %d at %d", ErrProtocol, n, off, c.req.n, c.req.off)
	}
	return nil
}

func (l *link) blockStatus(c *call, n uint32) error {
	p := make([]byte, n)
	if err := l.full(p); err != nil {
		return err
	}
	name, ok := l.ids[be.Uint32(p)]
	if _, dup := c.status[name]; !ok || dup {
		return fmt.Errorf("%w: block status of metadata context %d", ErrProtocol, be.Uint32(p))
	}
	runs := make([]extentRun, 0, n/8)
	for p = p[4:]; len(p) > 0; p = p[8:] {
		r := extentRun{be.Uint32(p), be.Uint32(p[4:])}
		if r.n == 0 {
			return fmt.Errorf("%w: block status with an empty extent", ErrProtocol)
		}
		runs = append(runs, r)
	}
	if c.status == nil {
		c.status = map[string][]extentRun{}
	}
	c.status[name] = runs
	return nil
}

// errorChunk takes NBD_REPLY_TYPE_ERROR, NBD_REPLY_TYPE_ERROR_OFFSET, and
// whatever other errors there may be. The first of a reply stays.
func (l *link) errorChunk(c *call, n uint32) error {
	p := make([]byte, n)
	if err := l.full(p); err != nil {
		return err
	}
	e, text := Errno(be.Uint32(p)), int(be.Uint16(p[4:]))
	if text > len(p)-6 {
		return fmt.Errorf("%w: error message of %d bytes in %d", ErrProtocol, text, n)
	}
	if e == 0 {
		e = EINVAL // must not be
	}
	if c.errno == 0 {
		c.errno, c.text = e, string(p[6:6+min(text, 200)])
	}
	return nil
}

// spans is a set of ranges, ascending, disjoint, not adjacent.
type spans []span

type span struct{ off, end uint64 }

// maxSpans bounds the disorder in which a reply may come.
const maxSpans = 4096

// add adds a range; false when it overlaps what is there, or too many pieces
// would lie about.
func (s *spans) add(off, n uint64) bool {
	end := off + n
	i, _ := slices.BinarySearchFunc(*s, off, func(e span, off uint64) int {
		if e.end < off {
			return -1
		}
		return 1
	}) // the first that ends at off or after
	if i == len(*s) {
		*s = append(*s, span{off, end})
		return len(*s) <= maxSpans
	}
	e := &(*s)[i]
	switch {
	case e.end == off:
		if i+1 < len(*s) {
			next := (*s)[i+1]
			if next.off < end {
				return false
			}
			if next.off == end {
				e.end = next.end
				*s = slices.Delete(*s, i+1, i+2)
				return true
			}
		}
		e.end = end
	case e.off < end:
		return false
	case e.off == end:
		e.off = off
	default:
		*s = slices.Insert(*s, i, span{off, end})
	}
	return len(*s) <= maxSpans
}

// all reports whether the set is just [off, off+n).
func (s spans) all(off, n uint64) bool {
	return n == 0 || len(s) == 1 && s[0] == span{off, off + n}
}
