package nbd

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// TestLimits: who does not get in, and who does not stay.
func TestLimits(t *testing.T) {
	t.Run("number", func(t *testing.T) {
		r := serve(t, shelf{"d": disk.NewMem(512)}, ServerOptions{MaxConns: 1}, "unix")
		c := dialTest(t, r.at("d"), DialOptions{})
		if _, err := Dial(t.Context(), r.at("d"), DialOptions{}); err == nil {
			t.Error("a second connection was let in")
		}
		c.Close()
		eventually(t, "the place is free", func() bool { return r.Stats().Conns == 0 })
		dialTest(t, r.at("d"), DialOptions{}).Close()
		if s := r.Stats(); s.Refused != 1 || s.Accepted != 2 {
			t.Errorf("stats %+v", s)
		}
	})
	t.Run("address", func(t *testing.T) {
		for list, ok := range map[string]bool{"10.0.0.0/8": false, "127.0.0.0/8": true, "::1/128": false} {
			r := serve(t, shelf{"d": disk.NewMem(512)}, ServerOptions{Allow: []netip.Prefix{netip.MustParsePrefix(list)}}, "tcp")
			c, err := Dial(t.Context(), r.at("d"), DialOptions{})
			if (err == nil) != ok {
				t.Errorf("allowed %s: %v", list, err)
			}
			if c != nil {
				c.Close()
			}
		}
	})
	t.Run("silence", func(t *testing.T) {
		r := serve(t, shelf{"d": disk.NewMem(512)}, ServerOptions{HandshakeTimeout: 300 * time.Millisecond}, "unix")
		dialRaw(t, r.addr).closed()
	})
	t.Run("idleness", func(t *testing.T) {
		r := serve(t, shelf{"d": disk.NewMem(512)}, ServerOptions{IdleTimeout: 30 * time.Millisecond}, "unix")
		c := dialTest(t, r.at("d"), DialOptions{})
		defer c.Close()
		<-c.links[0].gone
	})
	t.Run("half a write", func(t *testing.T) {
		r := serve(t, shelf{"d": disk.NewMem(512)}, ServerOptions{StallTimeout: 30 * time.Millisecond}, "unix")
		k := dialRaw(t, r.addr)
		k.must(k.choose(optGo, "d"))
		k.write(rawRequest(request{cmd: cmdWrite, n: 100}))
		k.closed()
	})
	t.Run("replies not taken", func(t *testing.T) {
		r := serve(t, shelf{"d": patterned(t, 64<<20)}, ServerOptions{StallTimeout: 30 * time.Millisecond}, "unix")
		k := dialRaw(t, r.addr)
		k.must(k.choose(optGo, "d"))
		k.write(rawRequest(request{cmd: cmdRead, n: 32 << 20}))
		eventually(t, "the server hangs up", func() bool { return r.Stats().Conns == 0 })
	})
}

// shop counts how often its disk is opened and closed.
type shop struct {
	d              disk.Device
	opened, closed atomic.Int64
}

func (s *shop) Names(context.Context) ([]string, error) { return []string{"d"}, nil }
func (s *shop) Open(context.Context, string) (disk.Device, error) {
	s.opened.Add(1)
	return &loan{kept{s.d}, s}, nil
}

type loan struct {
	kept
	s *shop
}

func (l *loan) Close() error {
	l.s.closed.Add(1)
	return nil
}

// TestShared: connections share one open disk, which is closed after the last.
func TestShared(t *testing.T) {
	s := &shop{d: disk.NewMem(1 << 20)}
	r := serve(t, s, ServerOptions{}, "unix")
	for round := range int64(3) {
		var wg sync.WaitGroup
		first := dialTest(t, r.at("d"), DialOptions{Conns: 3})
		for range 8 {
			wg.Go(func() {
				c, err := Dial(t.Context(), r.at("d"), DialOptions{})
				if err != nil {
					t.Error(err)
					return
				}
				c.Close()
			})
		}
		wg.Wait()
		if s.opened.Load() != round+1 || s.closed.Load() != round {
			t.Errorf("round %d: opened %d times, closed %d times", round, s.opened.Load(), s.closed.Load())
		}
		first.Close()
		eventually(t, "the disk is closed", func() bool { return s.closed.Load() == round+1 })
	}
}

// ticking is a disk whose flushes are numbered.
type ticking struct {
	kept
	begun, ended atomic.Int64
}

func (d *ticking) Flush(context.Context) error {
	n := d.begun.Add(1)
	<-time.After(time.Millisecond)
	d.ended.Store(n)
	if n%7 == 0 {
		return disktest.ErrInjected
	}
	return nil
}

// TestFlushesJoin: a flush is answered by one of the disk that began after it,
// and many by the same.
func TestFlushesJoin(t *testing.T) {
	d := &ticking{kept: kept{disk.NewMem(512)}}
	e := &export{dev: d}
	var wg sync.WaitGroup
	var failed atomic.Int64
	for range 16 {
		wg.Go(func() {
			for range 20 {
				before := d.begun.Load()
				err := e.flush(t.Context())
				// One of the disk's flushes between the two is the answer.
				after := d.ended.Load()
				if after <= before {
					t.Errorf("answered by flush %d; %d had begun before", after, before)
				}
				if err != nil {
					failed.Add(1)
				}
				if err == nil && before+1 == after && after%7 == 0 {
					t.Errorf("flush %d failed unnoticed", after)
				}
			}
		})
	}
	wg.Wait()
	if n := d.begun.Load(); n > 16*20/2 || failed.Load() == 0 {
		t.Errorf("320 flushes made %d of the disk; %d failed", n, failed.Load())
	}
}

// TestLateWrite: a write of a connection that broke cannot land after one of
// the next connection.
func TestLateWrite(t *testing.T) {
	g := newGated(disk.NewMem(1 << 20))
	r := serve(t, shelf{"d": g}, ServerOptions{}, "unix")
	k := dialRaw(t, r.addr)
	k.must(k.choose(optGo, "d"))
	k.write(append(rawRequest(request{cmd: cmdWrite, n: 4}), "oldx"...))
	<-g.entered
	k.nc.Close()
	got := make(chan *Client)
	go func() {
		c, err := Dial(t.Context(), r.at("d"), DialOptions{})
		if err != nil {
			t.Error(err)
		}
		got <- c
	}()
	eventually(t, "the second connection asks for the export", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		e := r.open["d"]
		e.mu.Lock()
		defer e.mu.Unlock()
		return len(e.conns) == 2
	})
	select {
	case <-got:
		t.Fatal("it was let in while the old write was under way")
	default:
	}
	close(g.gate)
	c := <-got
	defer c.Close()
	if err := c.WriteAt(t.Context(), []byte("new"), 0); err != nil {
		t.Fatal(err)
	}
	if p := content(t, g)[:4]; string(p) != "newx" {
		t.Errorf("disk holds %q", p)
	}
}

// TestEndInOrder: what is under way is finished, what comes later is refused,
// or left to the next server.
func TestEndInOrder(t *testing.T) {
	for _, resumable := range []bool{false, true} {
		t.Run(fmt.Sprint("resumable ", resumable), func(t *testing.T) {
			g := newGated(disk.NewMem(1 << 20))
			r := serve(t, shelf{"d": g}, ServerOptions{Resumable: resumable}, "tcp")
			c := dialTest(t, r.at("d"), DialOptions{})
			defer c.Close()
			first := make(chan error)
			go func() { first <- c.WriteAt(t.Context(), []byte("first"), 0) }()
			<-g.entered
			r.stop()
			want := error(ESHUTDOWN)
			if resumable {
				want = ErrLost
			}
			// Until the server has noticed, requests are served.
			later := make(chan error)
			go func() {
				for {
					if err := c.ReadAt(t.Context(), make([]byte, 5), 0); err != nil {
						later <- err
						return
					}
				}
			}()
			if !resumable {
				if err := <-later; !errors.Is(err, want) {
					t.Errorf("later: %v, want %v", err, want)
				}
			}
			close(g.gate)
			if err := <-first; err != nil {
				t.Errorf("first: %v", err)
			}
			if resumable {
				if err := <-later; !errors.Is(err, want) {
					t.Errorf("later: %v, want %v", err, want)
				}
			}
			r.end(t)
			if err := c.ReadAt(t.Context(), make([]byte, 5), 0); !errors.Is(err, ErrLost) {
				t.Errorf("after the end: %v", err)
			}
			if p := content(t, g)[:5]; string(p) != "first" {
				t.Errorf("disk holds %q", p)
			}
			if _, err := Dial(t.Context(), r.at("d"), DialOptions{}); err == nil {
				t.Error("dialled a server that ended")
			}
		})
	}
}

// TestGrace: a request that never ends is cancelled when the time is over.
func TestGrace(t *testing.T) {
	g := newGated(disk.NewMem(1 << 20))
	r := serve(t, shelf{"d": g}, ServerOptions{GraceTimeout: 30 * time.Millisecond}, "unix")
	c := dialTest(t, r.at("d"), DialOptions{})
	defer c.Close()
	first := make(chan error)
	go func() { first <- c.WriteAt(t.Context(), []byte("first"), 0) }()
	<-g.entered
	r.end(t)
	if err := <-first; !errors.Is(err, ESHUTDOWN) && !errors.Is(err, ErrLost) {
		t.Errorf("first: %v", err)
	}
}
