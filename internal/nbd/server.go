package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"holdfast/internal/disk"
)

// ServerOptions of NewServer. The zero value serves everybody, without TLS,
// within default limits.
type ServerOptions struct {
	// TLS offers STARTTLS with these certificates; versions below 1.2 are
	// never accepted. Nil: no TLS.
	TLS *tls.Config
	// RequireTLS answers everything but STARTTLS with NBD_REP_ERR_TLS_REQD
	// until TLS is up (proto, "FORCEDTLS mode"). Else TLS is at the client's
	// choice.
	RequireTLS bool
	// Allow lists the networks from which TCP clients may come; empty: all.
	// Others are hung up on before a byte is sent. Unix sockets have file
	// modes instead.
	Allow []netip.Prefix
	// ReadOnly serves every export read-only.
	ReadOnly bool
	// PreferredBlock is the advertised preferred block size: a power of two
	// from 512 to 32 MiB bytes. 0: 4096.
	PreferredBlock uint32

	// MaxConns bounds connections; further ones are hung up on. 0: 256.
	MaxConns int
	// InFlight bounds requests under way per connection; 0: 64.
	InFlight int
	// MaxBytes bounds payload held for requests under way, in all connections
	// together; 0: 256 MiB; at least 32 MiB. One connection gets at most 32 MiB
	// of it.
	MaxBytes int64

	// HandshakeTimeout bounds the time from accepting a connection to its
	// transmission phase. 0: 30 s.
	HandshakeTimeout time.Duration
	// StallTimeout is how long a peer may take over a message it has begun,
	// or over taking a reply. 0: 2 min.
	StallTimeout time.Duration
	// IdleTimeout is how long a peer may send no request at all. 0: for ever,
	// as a guest may well be idle for days.
	IdleTimeout time.Duration
	// GraceTimeout is how long Serve, once told to end, waits for requests
	// under way before it cancels them. 0: 30 s.
	GraceTimeout time.Duration
	// Resumable says that another server will take this one's place. At the
	// end of Serve, requests that were not begun are then left unanswered, so
	// that a client that connects again (QEMU with a reconnect delay) repeats
	// them. Else they are answered with NBD_ESHUTDOWN, which a guest sees as
	// an I/O error.
	Resumable bool

	// Report, if not nil, hears of disks' errors and broken connections. It
	// is called from many goroutines and must not block.
	Report func(error)
}

func (o ServerOptions) withDefaults() ServerOptions {
	set(&o.PreferredBlock, 4096)
	set(&o.MaxConns, 256)
	set(&o.InFlight, 64)
	set(&o.MaxBytes, 256<<20)
	set(&o.HandshakeTimeout, 30*time.Second)
	set(&o.StallTimeout, 2*time.Minute)
	set(&o.GraceTimeout, 30*time.Second)
	o.MaxBytes = max(o.MaxBytes, maxPayload)
	if o.TLS != nil {
		o.TLS = o.TLS.Clone()
		o.TLS.MinVersion = max(o.TLS.MinVersion, tls.VersionTLS12)
		// Records of full size from the start: replies are seldom small and
		// never waited for in part.
		o.TLS.DynamicRecordSizingDisabled = true
	}
	if o.Report == nil {
		o.Report = func(error) {}
	}
	return o
}

func set[T comparable](p *T, value T) {
	var zero T
	if *p == zero {
		*p = value
	}
}

// maxConnBytes bounds the payload held for one connection.
const maxConnBytes = maxPayload

// Server serves disks. Its methods may run in parallel.
type Server struct {
	exports disk.Exports
	o       ServerOptions
	budget  *semaphore.Weighted // bytes of payload held
	bufs    buffers
	stats   counters

	mu    sync.Mutex // guards what follows
	open  map[string]*export
	conns int
}

// NewServer returns a Server of these exports. It starts nothing.
func NewServer(exports disk.Exports, o ServerOptions) *Server {
	o = o.withDefaults()
	return &Server{
		exports: exports,
		o:       o,
		budget:  semaphore.NewWeighted(o.MaxBytes),
		open:    map[string]*export{},
	}
}

// Stats are counts since the server was made, except Conns.
type Stats struct {
	Conns      int64 // connections now
	Accepted   int64 // connections let in
	Refused    int64 // connections refused by address or number
	Requests   int64
	Errors     int64 // requests answered with an error
	ReadBytes  int64 // asked for by reads that succeeded, zeros included
	WriteBytes int64 // payload of writes that succeeded
}

type counters struct {
	accepted, refused, requests, errors, readBytes, writeBytes atomic.Int64
}

// Stats returns the counts of this moment.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	conns := s.conns
	s.mu.Unlock()
	return Stats{
		Conns:      int64(conns),
		Accepted:   s.stats.accepted.Load(),
		Refused:    s.stats.refused.Load(),
		Requests:   s.stats.requests.Load(),
		Errors:     s.stats.errors.Load(),
		ReadBytes:  s.stats.readBytes.Load(),
		WriteBytes: s.stats.writeBytes.Load(),
	}
}

// Serve accepts connections of l and serves them until ctx is done or l fails.
// It may run for several listeners at once. It closes l, and returns when
// every connection it accepted has ended and every export that none else uses
// is closed.
//
// When ctx is done it ends gracefully: nothing new is accepted, requests under
// way are finished and answered, later ones are answered with NBD_ESHUTDOWN
// (but see Resumable), then the connections are closed. The error is then nil.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	// Requests outlive ctx by the time of grace.
	work, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	var wg sync.WaitGroup
	defer wg.Wait()

	accepting, stop := context.WithCancel(ctx)
	defer stop()
	wg.Go(func() {
		<-accepting.Done()
		l.Close() // wakes Accept; its error can only be that it is closed
	})
	wg.Go(func() {
		<-accepting.Done()
		t := time.AfterFunc(s.o.GraceTimeout, func() { cancel(errShutdown) })
		<-work.Done()
		t.Stop()
	})
	var conns sync.WaitGroup
	defer func() {
		stop()
		conns.Wait()
		cancel(nil)
	}()
	for delay := time.Duration(0); ; {
		nc, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				nc.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept NBD connections: %w", err)
			}
			// Out of descriptors, or the peer went away already: it passes.
			s.o.Report(fmt.Errorf("accept NBD connection: %w", err))
			delay = min(max(2*delay, 5*time.Millisecond), time.Second)
			select {
			case <-time.After(delay):
			case <-ctx.Done():
			}
			continue
		}
		delay = 0
		if !s.admit(nc) {
			nc.Close()
			continue
		}
		conns.Go(func() {
			defer s.dismiss()
			s.serve(work, accepting.Done(), nc)
		})
	}
}

// admit counts a connection in, unless it may not come.
func (s *Server) admit(nc net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !allowed(s.o.Allow, nc.RemoteAddr()) || s.conns >= s.o.MaxConns {
		s.stats.refused.Add(1)
		return false
	}
	s.stats.accepted.Add(1)
	s.conns++
	return true
}

func (s *Server) dismiss() {
	s.mu.Lock()
	s.conns--
	s.mu.Unlock()
}

// allowed reports whether a peer may connect. Only IP addresses are looked at.
func allowed(list []netip.Prefix, a net.Addr) bool {
	t, ok := a.(*net.TCPAddr)
	if !ok || len(list) == 0 {
		return true
	}
	ip := t.AddrPort().Addr().Unmap().WithZone("")
	for _, p := range list {
		if p.Contains(ip) {
			return true
		}
	}
	return false
}

// serve runs one connection to its end and closes it. stopping is closed when
// the server is to end.
func (s *Server) serve(work context.Context, stopping <-chan struct{}, nc net.Conn) {
	ctx, cancel := context.WithCancelCause(work)
	c := &conn{
		s:        s,
		raw:      nc,
		nc:       nc,
		br:       bufio.NewReaderSize(nc, 64<<10),
		stopping: stopping,
		ctx:      ctx,
		cancel:   cancel,
		budget:   semaphore.NewWeighted(maxConnBytes),
		slots:    make(chan struct{}, s.o.InFlight),
		refusals: make(chan struct{}, 1),
		finished: make(chan struct{}),
	}
	err := c.run()
	c.abort(err)
	if err != nil && !errors.Is(err, io.EOF) {
		s.o.Report(fmt.Errorf("NBD client %s: %w", nc.RemoteAddr(), err))
	}
}

// run speaks the protocol with one client. The error is nil or io.EOF when the
// client, or the server, took its leave.
func (c *conn) run() error {
	defer c.releaseExport()
	defer func() {
		if c.exp != nil {
			c.exp.leave(c)
		}
		close(c.finished)
	}()
	if err := c.negotiate(); err != nil {
		return err
	}
	return c.transmit()
}

// abort ends the connection whatever is under way. The first cause stays.
func (c *conn) abort(cause error) {
	c.cancel(cause)
	c.raw.Close() // nothing is owed to the peer any more
}
