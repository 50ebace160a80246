package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"runtime"
	"slices"
	"testing"
	"time"

	"holdfast/internal/disk"
)

// script is a connection whose peer says p and then hangs up, and takes
// whatever it is told.
type script struct {
	p    *bytes.Reader
	told int
}

func newScript(parts ...[]byte) *script {
	return &script{p: bytes.NewReader(slices.Concat(parts...))}
}

func (s *script) Read(p []byte) (int, error) { return s.p.Read(p) }
func (s *script) Write(p []byte) (int, error) {
	s.told += len(p)
	return len(p), nil
}
func (s *script) Close() error                     { return nil }
func (s *script) LocalAddr() net.Addr              { return &net.UnixAddr{Name: "fuzz", Net: "unix"} }
func (s *script) RemoteAddr() net.Addr             { return s.LocalAddr() }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

// serveScript lets the server serve what the script says, to its end.
func serveScript(t *testing.T, s *script, m *disk.Mem, o ServerOptions) {
	srv := NewServer(shelf{"d": m, "ro": disk.ReadOnly(m)}, o)
	ended := make(chan struct{})
	srv.admit(s)
	go func() {
		defer close(ended)
		srv.serve(context.Background(), make(chan struct{}), s)
		srv.dismiss()
	}()
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("the connection does not end")
	}
	if len(srv.open) != 0 {
		t.Fatal("an export is left open")
	}
	if !srv.budget.TryAcquire(srv.o.MaxBytes) {
		t.Fatal("payload is left counted")
	}
}

func option(opt uint32, data string) []byte {
	p := be.AppendUint64(nil, magicOption)
	p = be.AppendUint32(p, opt)
	p = be.AppendUint32(p, uint32(len(data)))
	return append(p, data...)
}

// FuzzServerHandshake feeds a server whatever a client may say from the start.
func FuzzServerHandshake(f *testing.F) {
	for _, data := range []string{
		"", string(option(optList, "")), string(option(optExportName, "d")), string(option(optStartTLS, "")),
		string(option(optGo, "\x00\x00\x00\x01d\x00\x01\x00\x03")), string(option(optStructuredReply, "")) +
			string(option(optSetMeta, "\x00\x00\x00\x01d\x00\x00\x00\x01\x00\x00\x00\x0fbase:allocation")) +
			string(option(optGo, "\x00\x00\x00\x01d\x00\x00")) + string(rawRequest(request{cmd: cmdBlockStatus, n: 512})),
		string(option(optListMeta, "\x00\x00\x00\x02ro\x00\x00\x00\x00")) + string(option(optAbort, "")),
	} {
		f.Add([]byte("\x00\x00\x00\x03" + data))
	}
	keys := makePKI(f)
	f.Fuzz(func(t *testing.T, p []byte) {
		m := disk.NewMem(1 << 20)
		serveScript(t, newScript(p), m, ServerOptions{TLS: keys.server})
		serveScript(t, newScript(p), m, ServerOptions{})
	})
}

// FuzzServerRequests feeds a server whatever a client may say in the
// transmission phase.
func FuzzServerRequests(f *testing.F) {
	for _, r := range []request{
		{cmd: cmdRead, n: 100 << 10}, {cmd: cmdRead, flags: cmdFlagDF, n: 4}, {cmd: cmdTrim, n: 1 << 20}, {cmd: cmdFlush},
		{cmd: cmdWriteZeroes, flags: cmdFlagNoHole, n: 1 << 20}, {cmd: cmdCache, n: 1 << 20}, {cmd: cmdBlockStatus, flags: cmdFlagReqOne, n: 1 << 20},
	} {
		f.Add(append(rawRequest(r), rawRequest(request{cmd: cmdDisc})...), true, true)
		f.Add(append(rawRequest(request{cmd: cmdWrite, flags: cmdFlagFUA, n: 3}), "abc"+string(rawRequest(r))...), false, true)
		f.Add(rawRequest(r), false, false)
	}
	f.Fuzz(func(t *testing.T, p []byte, structured, writable bool) {
		m := disk.NewMem(1<<20 + 5)
		hello := []byte{0, 0, 0, flagFixedNewstyle}
		if structured {
			hello = append(hello, option(optStructuredReply, "")...)
			hello = append(hello, option(optSetMeta, "\x00\x00\x00\x01d\x00\x00\x00\x01\x00\x00\x00\x0fbase:allocation")...)
		}
		hello = append(hello, option(optGo, "\x00\x00\x00\x01d\x00\x00")...)
		serveScript(t, newScript(hello, p), m, ServerOptions{ReadOnly: !writable})
	})
}

// FuzzClientHandshake feeds a client whatever a server may say from the start.
func FuzzClientHandshake(f *testing.F) {
	hello := append(be.AppendUint64(be.AppendUint64(nil, magicInit), magicOption), 0, 3)
	ack := func(opt uint32) []byte { return appendOptReply(nil, opt, repAck, nil) }
	export := append(be.AppendUint64([]byte{0, infoExport}, 1<<20), 0, flagHasFlags)
	sizes := be.AppendUint32(be.AppendUint32(be.AppendUint32([]byte{0, infoBlockSize}, 512), 4096), 1<<20)
	f.Add(slices.Concat(hello, ack(optStructuredReply), appendOptReply(nil, optSetMeta, repMetaContext, []byte("\x00\x00\x00\x01"+BaseAllocation)),
		ack(optSetMeta), appendOptReply(nil, optGo, repInfo, export), appendOptReply(nil, optGo, repInfo, sizes), ack(optGo)))
	f.Add(slices.Concat(hello, appendOptReply(nil, optStructuredReply, repErrUnsup, nil), appendOptReply(nil, optGo, repErrUnsup, nil),
		be.AppendUint64(nil, 1<<40), []byte{0, 1}))
	f.Add(slices.Concat(hello, appendOptReply(nil, optStructuredReply, repErrTLSReqd, []byte("no"))))
	f.Add(slices.Concat(hello, ack(optStructuredReply), appendOptReply(nil, optList, repServer, []byte("\x00\x00\x00\x01dtext")), ack(optList),
		ack(optListMeta), appendOptReply(nil, optInfo, repInfo, export), ack(optInfo)))
	f.Fuzz(func(t *testing.T, p []byte) {
		k := newTalk(newScript(p))
		err := k.start(t.Context(), Address{}, DialOptions{})
		if err == nil && k.contexts(optSetMeta, "d", []string{BaseAllocation}) == nil && k.choose(optGo, "d") == nil {
			if i := k.info; i.Size < 0 || i.MinBlock < 1 || i.MinBlock > 64<<10 || i.MaxPayload < i.MinBlock || i.MaxPayload > maxPayload {
				t.Errorf("accepted %+v", i)
			}
		}
		k = newTalk(newScript(p))
		if k.start(t.Context(), Address{}, DialOptions{}) == nil {
			k.ask(optList, nil, func(uint32, []byte) error { return nil })
			k.describe(Info{Name: "d"})
		}
	})
}

// FuzzClientReplies feeds a client whatever a server may say in answer to
// three requests. No request waits for ever, and none succeeds in part.
func FuzzClientReplies(f *testing.F) {
	data := func(cookie uint64, off uint64, text string) []byte {
		h := make([]byte, chunkLen)
		putChunk(h, replyFlagDone, replyData, cookie, 8+len(text))
		return append(be.AppendUint64(h, off), text...)
	}
	status := make([]byte, chunkLen)
	putChunk(status, replyFlagDone, replyBlockStatus, 2, 12)
	status = append(status, 0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 0, 3)
	done := make([]byte, simpleLen)
	putSimple(done, 0, 3)
	simple := make([]byte, simpleLen)
	putSimple(simple, 0, 1)
	fail := make([]byte, chunkLen)
	putChunk(fail, replyFlagDone, replyErrorOffset, 1, 14)
	f.Add(slices.Concat(data(1, 8, "abcdefgh"), status, done), true)
	f.Add(slices.Concat(status, done, fail, make([]byte, 14)), true)
	f.Add(slices.Concat(simple, []byte("abcdefgh"), done), false)
	f.Fuzz(func(t *testing.T, p []byte, structured bool) {
		near, far := net.Pipe()
		k := newTalk(near)
		k.info.Structured = structured
		k.ids[1] = BaseAllocation
		l := newLink(k, DialOptions{}.withDefaults(), func(error) {})
		l.start()
		calls := []*call{
			{req: request{cmd: cmdRead, off: 8, n: 8}, dst: make([]byte, 8)},
			{req: request{cmd: cmdBlockStatus, n: 512}},
			{req: request{cmd: cmdFlush}},
		}
		errs := make(chan error, len(calls))
		sent := make(chan struct{})
		go func() { // the server: hears all three requests, says p, hangs up
			for range calls {
				sent <- struct{}{}
				io.ReadFull(far, make([]byte, requestLen))
			}
			far.Write(p)
			far.Close()
		}()
		for i, c := range calls { // one after another, so that cookies are 1, 2, 3
			go func() { errs <- l.do(context.Background(), c) }()
			<-sent
			for queued := false; !queued; runtime.Gosched() {
				l.mu.Lock()
				queued = l.cookie == uint64(i+1) || l.err != nil
				l.mu.Unlock()
			}
		}
		for range calls {
			select {
			case <-errs:
			case <-time.After(20 * time.Second):
				t.Fatal("a request waits for ever")
			}
		}
		<-l.ended
		if len(l.slots) != 0 || len(l.pending) != 0 {
			t.Fatal("a request is left")
		}
		if !errors.Is(l.cause(), ErrLost) {
			t.Fatal("the end has no cause")
		}
	})
}

// FuzzURI: what is accepted is written again as what means the same.
func FuzzURI(f *testing.F) {
	for _, s := range []string{"nbd://h/x", "nbds://[::1]:5/", "nbd+unix:///a%20b?socket=/s", "nbds+unix:///?socket=%00x&tls-hostname=h"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		a, err := ParseURI(s)
		if err != nil {
			return
		}
		b, err := ParseURI(a.String())
		if err != nil || a != b {
			t.Errorf("%q is %+v, written %q, which is %+v, %v", s, a, a.String(), b, err)
		}
	})
}
