package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// slow is a disk whose reads wait for the gate.
type slow struct {
	kept
	gate chan struct{}
}

func (s slow) ReadAt(ctx context.Context, p []byte, off int64) error {
	select {
	case <-s.gate:
		return s.kept.ReadAt(ctx, p, off)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// TestCancel: a cancelled request returns at once, leaves its slice alone from
// then on, and leaves the connection in order.
func TestCancel(t *testing.T) {
	m := patterned(t, 4<<20)
	s := slow{kept{m}, make(chan struct{})}
	r := serve(t, shelf{"d": s}, ServerOptions{}, "unix")
	c := dialTest(t, r.at("d"), DialOptions{InFlight: 8})
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	var slices [20][]byte // more than may be under way: some are never sent
	for i := range slices {
		p := make([]byte, 50<<10)
		slices[i] = p
		wg.Go(func() {
			if err := c.ReadAt(ctx, p, int64(i)*1000); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled read: %v", err)
			}
			for j := range p { // the race detector watches
				p[j] = 1
			}
		})
	}
	eventually(t, "the server works on some", func() bool { return r.Stats().Requests == 8 })
	cancel()
	wg.Wait()
	close(s.gate)
	disktest.Reader(t, c, content(t, m))
	eventually(t, "all is answered", func() bool { return len(c.links[0].slots) == 0 })
	for _, p := range slices {
		if bytes.Count(p, []byte{1}) != len(p) {
			t.Fatal("a late reply was written to the slice of a cancelled read")
		}
	}
}

// TestCancelStorm cancels requests at any time, while others must be right.
func TestCancelStorm(t *testing.T) {
	m := disk.NewMem(8 << 20)
	r := serve(t, shelf{"d": m}, ServerOptions{}, "unix")
	c := dialTest(t, r.at("d"), DialOptions{Conns: 2, InFlight: 4})
	defer c.Close()
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() { // each has 2 MiB of its own
			p, q := make([]byte, 300<<10), make([]byte, 300<<10)
			base := int64(w) << 21
			for i := range 60 {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i%13)*20*time.Microsecond)
				for j := range p {
					p[j] = byte(i)
				}
				c.WriteAt(ctx, p, base) // may be done or not, in part
				c.ReadAt(ctx, q, base)
				cancel()
				if err := c.WriteAt(t.Context(), p, base+1<<20); err != nil {
					t.Error(err)
				}
				if err := c.ReadAt(t.Context(), q, base+1<<20); err != nil || !bytes.Equal(p, q) {
					t.Errorf("round %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
}

// TestLost: when the server is gone every request fails, waiting or new.
func TestLost(t *testing.T) {
	s := slow{kept{disk.NewMem(1 << 20)}, make(chan struct{})}
	r := serve(t, shelf{"d": s}, ServerOptions{GraceTimeout: time.Millisecond, Resumable: true}, "unix")
	c := dialTest(t, r.at("d"), DialOptions{Conns: 2, InFlight: 4})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if err := c.ReadAt(t.Context(), make([]byte, 512), 0); !errors.Is(err, ErrLost) && !errors.Is(err, ESHUTDOWN) {
				t.Errorf("waiting: %v", err)
			}
		})
	}
	eventually(t, "requests wait", func() bool { return r.Stats().Requests == 8 })
	r.end(t)
	wg.Wait()
	if err := c.WriteAt(t.Context(), []byte{1}, 0); !errors.Is(err, ErrLost) {
		t.Errorf("after: %v", err)
	}
	if err := c.Flush(t.Context()); !errors.Is(err, ErrLost) {
		t.Errorf("after: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// pipeLink is a link to a server that the test plays.
func pipeLink(t *testing.T, structured bool) (*link, net.Conn) {
	near, far := net.Pipe()
	k := newTalk(near)
	k.info.Structured = structured
	k.ids[1] = BaseAllocation
	l := newLink(k, DialOptions{}.withDefaults(), func(error) {})
	l.start()
	t.Cleanup(func() {
		l.fail(net.ErrClosed)
		<-l.ended
		far.Close()
	})
	return l, far
}

// TestCancelWhileStuck: a request that is cancelled while the server takes no
// more of it waits a little, then gives the connection up.
func TestCancelWhileStuck(t *testing.T) {
	t.Run("sending", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l, _ := pipeLink(t, true)
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			start := time.Now()
			err := l.do(ctx, &call{req: request{cmd: cmdWrite, n: 100}, out: make([]byte, 100)})
			if d := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || d != time.Second+cancelGrace {
				t.Errorf("%v after %v", err, d)
			}
			if err := l.do(t.Context(), &call{req: request{cmd: cmdFlush}}); !errors.Is(err, ErrLost) {
				t.Errorf("after: %v", err)
			}
		})
	})
	t.Run("receiving", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l, far := pipeLink(t, false)
			go func() {
				io.ReadFull(far, make([]byte, requestLen))
				var h [simpleLen]byte
				putSimple(h[:], 0, 1)
				far.Write(append(h[:], 1, 2, 3)) // of 100
			}()
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			start := time.Now()
			err := l.do(ctx, &call{req: request{cmd: cmdRead, n: 100}, dst: make([]byte, 100)})
			if d := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || d != time.Second+cancelGrace {
				t.Errorf("%v after %v", err, d)
			}
		})
	})
	t.Run("a stalled reply, not cancelled", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l, far := pipeLink(t, false)
			go func() {
				io.ReadFull(far, make([]byte, requestLen))
				far.Write([]byte{0x67, 0x44, 0x66, 0x98, 0})
			}()
			start := time.Now()
			err := l.do(t.Context(), &call{req: request{cmd: cmdRead, n: 100}, dst: make([]byte, 100)})
			if d := time.Since(start); !errors.Is(err, ErrLost) || d != 2*time.Minute {
				t.Errorf("%v after %v", err, d)
			}
		})
	})
}

// TestHostileReplies: each breaks the connection, and nothing else.
func TestHostileReplies(t *testing.T) {
	chunk := func(flags, typ uint16, cookie uint64, n int, p ...byte) []byte {
		h := make([]byte, chunkLen)
		putChunk(h, flags, typ, cookie, n)
		return append(h, p...)
	}
	at := func(off uint64, p ...byte) []byte { return append(be.AppendUint64(nil, off), p...) }
	simple := make([]byte, simpleLen)
	putSimple(simple, 0, 1)
	read := request{cmd: cmdRead, off: 1000, n: 4}
	status := request{cmd: cmdBlockStatus, n: 4}
	for name, x := range map[string]struct {
		req   request
		reply []byte
	}{
		"magic":                 {read, make([]byte, 20)},
		"simple":                {read, simple},
		"unknown cookie":        {read, chunk(1, replyNone, 2, 0)},
		"unknown type":          {read, chunk(1, 77, 1, 0)},
		"none with payload":     {read, chunk(1, replyNone, 1, 1, 0)},
		"none, but not done":    {read, chunk(0, replyNone, 1, 0)},
		"nothing read":          {read, chunk(1, replyNone, 1, 0)},
		"too little":            {read, chunk(1, replyData, 1, 11, at(1000, 1, 2, 3)...)},
		"too much":              {read, chunk(1, replyData, 1, 13, at(1000, 1, 2, 3, 4, 5)...)},
		"before":                {read, chunk(1, replyData, 1, 12, at(999, 1, 2, 3, 4)...)},
		"wraps":                 {read, chunk(1, replyData, 1, 12, at(1<<64-2, 1, 2, 3, 4)...)},
		"empty data":            {read, chunk(1, replyData, 1, 8, at(1000)...)},
		"twice":                 {read, append(chunk(0, replyData, 1, 12, at(1000, 1, 2, 3, 4)...), chunk(1, replyData, 1, 9, at(1002, 9)...)...)},
		"empty hole":            {read, chunk(1, replyHole, 1, 12, at(1000, 0, 0, 0, 0)...)},
		"long hole":             {read, chunk(1, replyHole, 1, 12, at(1000, 0xff, 0xff, 0xff, 0xff)...)},
		"endless data":          {read, chunk(1, replyData, 1, 1<<32-1, at(1000)...)},
		"endless error":         {read, chunk(1, replyError, 1, 1<<32-1)},
		"short error":           {read, chunk(1, replyError, 1, 4, 0, 0, 0, 1)},
		"error with long text":  {read, chunk(1, replyError, 1, 6, 0, 0, 0, 1, 0, 1)},
		"status for a read":     {read, chunk(1, replyBlockStatus, 1, 12, make([]byte, 12)...)},
		"data for a status":     {status, chunk(1, replyData, 1, 12, at(0, 1, 2, 3, 4)...)},
		"simple for a status":   {status, simple},
		"no status":             {status, chunk(1, replyNone, 1, 0)},
		"unknown context":       {status, chunk(1, replyBlockStatus, 1, 12, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 0)},
		"status without extent": {status, chunk(1, replyBlockStatus, 1, 4, 0, 0, 0, 1)},
		"status with half one":  {status, chunk(1, replyBlockStatus, 1, 8, 0, 0, 0, 1, 0, 0, 0, 4)},
		"empty extent":          {status, chunk(1, replyBlockStatus, 1, 12, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0)},
		"endless status":        {status, chunk(1, replyBlockStatus, 1, 1<<32-4)},
		"a request":             {read, rawRequest(read)},
	} {
		l, far := pipeLink(t, true)
		go func() {
			io.ReadFull(far, make([]byte, requestLen))
			far.Write(x.reply)
		}()
		err := l.do(t.Context(), &call{req: x.req, dst: make([]byte, 4)})
		if !errors.Is(err, ErrProtocol) || !errors.Is(err, ErrLost) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSpans compares with a plain set.
func TestSpans(t *testing.T) {
	r := disktest.Rand(t)
	for range 2000 {
		var s spans
		var set [40]bool
		for range 12 {
			off, n := r.IntN(36), 1+r.IntN(4)
			free := true
			for i := off; i < off+n; i++ {
				free = free && !set[i]
			}
			if got := s.add(uint64(off), uint64(n)); got != free {
				t.Fatalf("add %d+%d to %v: %v", off, n, s, got)
			}
			if !free {
				break
			}
			for i := off; i < off+n; i++ {
				set[i] = true
			}
			for i, e := range s {
				if e.off >= e.end || i > 0 && s[i-1].end >= e.off {
					t.Fatalf("after %d+%d: %v", off, n, s)
				}
			}
		}
		all := true
		for _, x := range set[:10] {
			all = all && x
		}
		if !all && s.all(0, 10) {
			t.Fatalf("%v is all of 0+10", s)
		}
	}
}

func TestURI(t *testing.T) {
	for uri, want := range map[string]Address{
		"nbd://example.com/disk":                           {Network: "tcp", Addr: "example.com:10809", Export: "disk"},
		"nbd://example.com:99":                             {Network: "tcp", Addr: "example.com:99"},
		"nbd://example.com//disk":                          {Network: "tcp", Addr: "example.com:10809", Export: "/disk"},
		"nbd://example.com/hello%20world":                  {Network: "tcp", Addr: "example.com:10809", Export: "hello world"},
		"nbds://[::1]/d":                                   {Network: "tcp", Addr: "[::1]:10809", Export: "d", TLS: true},
		"nbd://[fe80::1]:5/d":                              {Network: "tcp", Addr: "[fe80::1]:5", Export: "d"},
		"nbd+unix:///name?socket=/tmp/s":                   {Network: "unix", Addr: "/tmp/s", Export: "name"},
		"nbd+unix:///?socket=a%20b+c":                      {Network: "unix", Addr: "a b c"},
		"nbds+unix:///a/b?socket=/s&tls-hostname=x.y":      {Network: "unix", Addr: "/s", Export: "a/b", TLS: true, ServerName: "x.y"},
		"nbds://h/d?tls-type=x509&tls-verify-peer=1":       {Network: "tcp", Addr: "h:10809", Export: "d", TLS: true},
		"nbd+unix:///%D0%B4%D0%B8%D1%81%D0%BA?socket=/%3F": {Network: "unix", Addr: "/?", Export: "диск"},
	} {
		got, err := ParseURI(uri)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v, want %+v", uri, got, err, want)
		}
		again, err := ParseURI(got.String())
		if err != nil || again != got {
			t.Errorf("%s became %s: %+v, %v", uri, got, again, err)
		}
	}
	for _, uri := range []string{
		"", "nbd", "http://x/", "nbd:///x", "nbd:x", "nbd+unix:///x", "nbd+unix://host/x?socket=/s", "nbd://h/?socket=/s",
		"nbd://user@h/", "nbd://h/?x=1", "nbd://h/?tls-verify-peer=0", "nbds://h/?tls-type=psk", "nbd://h/#f", "nbd://h/%00",
		"nbd+unix:///?socket=/a&socket=/b", "nbd://h/%ff", "nbd://h:x/", "nbd://::", "nbd://h:0/", "nbd://h:65536/",
	} {
		if got, err := ParseURI(uri); err == nil {
			t.Errorf("%q is %+v", uri, got)
		}
	}
}
