package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// gated is a disk whose writes wait for the gate.
type gated struct {
	kept
	entered chan struct{}
	gate    chan struct{}
}

func newGated(d disk.Device) *gated {
	return &gated{kept: kept{d}, entered: make(chan struct{}, 100), gate: make(chan struct{})}
}

func (g *gated) WriteAt(ctx context.Context, p []byte, off int64) error {
	g.entered <- struct{}{}
	select {
	case <-g.gate:
		return g.kept.WriteAt(ctx, p, off)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// eventually polls until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); <-time.After(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// TestRefusals: what breaks a rule of one command is answered, and the
// connection lives on.
func TestRefusals(t *testing.T) {
	r := serve(t, shelf{"d": patterned(t, 64<<20)}, ServerOptions{}, "unix")
	c := dialTest(t, r.at("d"), DialOptions{})
	defer c.Close()
	const size = 64 << 20
	four := []byte{1, 2, 3, 4}
	for _, x := range []struct {
		name string
		call call
		want Errno
	}{
		{"unknown command", call{req: request{cmd: 99}}, EINVAL},
		{"unknown flag", call{req: request{cmd: cmdRead, flags: 1 << 9, n: 4}, dst: make([]byte, 4)}, EINVAL},
		{"flag of another command", call{req: request{cmd: cmdWrite, flags: cmdFlagDF, n: 4}, out: four}, EINVAL},
		{"read beyond", call{req: request{cmd: cmdRead, off: size - 3, n: 4}, dst: make([]byte, 4)}, EINVAL},
		{"read far beyond", call{req: request{cmd: cmdRead, off: 1<<64 - 2, n: 4}, dst: make([]byte, 4)}, EINVAL},
		{"trim beyond", call{req: request{cmd: cmdTrim, off: size, n: 1}}, EINVAL},
		{"cache beyond", call{req: request{cmd: cmdCache, off: size, n: 1}}, EINVAL},
		{"write beyond", call{req: request{cmd: cmdWrite, off: size - 3, n: 4}, out: four}, ENOSPC},
		{"zero beyond", call{req: request{cmd: cmdWriteZeroes, off: 1 << 63, n: 1}}, ENOSPC},
		{"long DF", call{req: request{cmd: cmdRead, flags: cmdFlagDF, n: maxPayload + 1}, dst: make([]byte, maxPayload+1)}, EOVERFLOW},
		{"fast but no hole", call{req: request{cmd: cmdWriteZeroes, flags: cmdFlagFastZero | cmdFlagNoHole, n: 512}}, ENOTSUP},
		{"status of nothing", call{req: request{cmd: cmdBlockStatus}}, EINVAL},
	} {
		if err := c.links[0].do(t.Context(), &x.call); !errors.Is(err, x.want) {
			t.Errorf("%s: %v, want %v", x.name, err, x.want)
		}
	}
	for _, x := range []call{ // odd, but in order
		{req: request{cmd: cmdRead, n: 0}},
		{req: request{cmd: cmdRead, flags: cmdFlagFUA, n: 4}, dst: make([]byte, 4)},
		{req: request{cmd: cmdRead, n: 50 << 20}, dst: make([]byte, 50<<20)},
		{req: request{cmd: cmdFlush, flags: cmdFlagFUA, off: 1, n: 1}},
		{req: request{cmd: cmdWriteZeroes, flags: cmdFlagNoHole | cmdFlagFUA, n: 3 << 20}},
		{req: request{cmd: cmdWriteZeroes, flags: cmdFlagFastZero, n: 3 << 20}},
		{req: request{cmd: cmdTrim, off: size, n: 0}},
		{req: request{cmd: cmdCache, n: size}},
	} {
		if err := c.links[0].do(t.Context(), &x); err != nil {
			t.Errorf("%+v: %v", x.req, err)
		}
	}
}

// TestErrnos: how a disk's errors reach the client.
func TestErrnos(t *testing.T) {
	for _, x := range []struct {
		err  error
		want Errno
	}{
		{fmt.Errorf("overlay: %w", &os.PathError{Op: "write", Err: syscall.ENOSPC}), ENOSPC},
		{disk.ErrReadOnly, EPERM},
		{disk.ErrRange, EINVAL},
		{disktest.ErrInjected, EIO},
		{errors.ErrUnsupported, EIO},
	} {
		var reported atomic.Int64
		f := disktest.NewFaulty(disk.NewMem(1<<20), 2).With(x.err).Stuck() // the first call is the server's
		r := serve(t, shelf{"d": f}, ServerOptions{Report: func(error) { reported.Add(1) }}, "unix")
		c := dialTest(t, r.at("d"), DialOptions{})
		for what, err := range map[string]error{
			"read": c.ReadAt(t.Context(), make([]byte, 10), 0), "long read": c.ReadAt(t.Context(), make([]byte, 100<<10), 0),
			"write": c.WriteAt(t.Context(), make([]byte, 10), 0), "zero": c.ZeroAt(t.Context(), 0, 10),
			"flush": c.Flush(t.Context()), "extents": second(disk.Collect(c.Extents(t.Context(), 0, 10))),
		} {
			if !errors.Is(err, x.want) {
				t.Errorf("%v: %s: %v, want %v", x.err, what, err, x.want)
			}
		}
		if got := reported.Load(); (x.want != EPERM) != (got == 6) {
			t.Errorf("%v: %d reports", x.err, got)
		}
		c.Close()
	}
}

func second[A any](_ A, err error) error { return err }

// TestFailingCalls lets each call of the disk fail in turn: one request fails,
// those before and after it do not.
func TestFailingCalls(t *testing.T) {
	for n := int64(2); ; n++ {
		f := disktest.NewFaulty(disk.NewMem(1<<20), n)
		r := serve(t, shelf{"d": f}, ServerOptions{}, "unix")
		c := dialTest(t, r.at("d"), DialOptions{})
		p := make([]byte, 200<<10)
		failed := 0
		for _, err := range []error{
			c.WriteAt(t.Context(), p, 5), c.ZeroAt(t.Context(), 7, 512), c.ReadAt(t.Context(), p, 3),
			c.ReadAt(t.Context(), p[:9], 3), c.Flush(t.Context()), second(disk.Collect(c.Extents(t.Context(), 0, 1<<20))),
		} {
			if err != nil {
				failed++
				if !errors.Is(err, EIO) {
					t.Errorf("call %d: %v", n, err)
				}
			}
		}
		c.Close()
		if f.Calls() < n {
			return
		}
		if failed != 1 {
			t.Errorf("call %d: %d requests failed", n, failed)
		}
	}
}

// TestBadExtents: a disk that breaks its promise is not believed.
func TestBadExtents(t *testing.T) {
	for name, list := range map[string][]disk.Extent{
		"gap":     {{Off: 0, Len: 10}, {Off: 20, Len: 100<<10 - 20}},
		"short":   {{Off: 0, Len: 10}},
		"long":    {{Off: 0, Len: 200 << 10, Zero: true}},
		"empty":   {{Off: 0, Len: 0}, {Off: 0, Len: 100 << 10}},
		"nothing": nil,
	} {
		r := serve(t, shelf{"d": told{kept{disk.NewMem(1 << 20)}, list}}, ServerOptions{}, "unix")
		c := dialTest(t, r.at("d"), DialOptions{})
		if err := c.ReadAt(t.Context(), make([]byte, 100<<10), 0); !errors.Is(err, EIO) {
			t.Errorf("%s: read: %v", name, err)
		}
		if _, err := disk.Collect(c.Extents(t.Context(), 0, 100<<10)); !errors.Is(err, EIO) {
			t.Errorf("%s: extents: %v", name, err)
		}
		c.Close()
	}
}

// told is a disk with the extents that it is told to have.
type told struct {
	kept
	list []disk.Extent
}

func (d told) Extents(context.Context, int64, int64) disk.Extents { return disk.List(d.list...) }

// striped has an extent every 4 KiB.
type striped struct{ kept }

func (striped) Extents(_ context.Context, off, n int64) disk.Extents {
	return func(yield func(disk.Extent, error) bool) {
		for end := off + n; off < end; {
			e := disk.Extent{Off: off, Len: min(4096-off%4096, end-off), Zero: off/4096%2 == 1}
			if !yield(e, nil) {
				return
			}
			off = e.End()
		}
	}
}

// TestManyExtents: more of them than one reply takes.
func TestManyExtents(t *testing.T) {
	r := serve(t, shelf{"d": striped{kept{disk.NewMem(1 << 30)}}}, ServerOptions{}, "unix")
	c := dialTest(t, r.at("d"), DialOptions{})
	defer c.Close()
	list, err := disk.Collect(c.Extents(t.Context(), 100, 1<<30-100))
	if err != nil || len(list) != 1<<30/4096 {
		t.Fatalf("%d extents, %v", len(list), err)
	}
	one := &call{req: request{cmd: cmdBlockStatus, flags: cmdFlagReqOne, off: 100, n: 1 << 20}}
	if err := c.links[0].do(t.Context(), one); err != nil || fmt.Sprint(one.status) != "map[base:allocation:[{3996 0}]]" {
		t.Errorf("one extent: %v, %v", one.status, err)
	}
	if err := c.links[0].do(t.Context(), &call{req: request{cmd: cmdBlockStatus, n: 1 << 30}}); err != nil {
		t.Error(err)
	}
}

// TestChunks looks at a read's chunks on the wire.
func TestChunks(t *testing.T) {
	m := disk.NewMem(4 << 20)
	for _, x := range [][2]int64{{0, 64 << 10}, {1 << 20, 2 << 20}} {
		p := make([]byte, x[1])
		disktest.Fill(disktest.Rand(t), p)
		if err := m.WriteAt(t.Context(), p, x[0]); err != nil {
			t.Fatal(err)
		}
	}
	r := serve(t, shelf{"d": m}, ServerOptions{}, "unix")
	for _, x := range []struct {
		name   string
		old    bool
		req    request
		chunks string
	}{
		{"all", false, request{n: 4 << 20}, "data 0+65536, hole 65536+983040, data 1048576+1048576, data 2097152+1048576, hole 3145728+1048576 done"},
		{"one chunk", false, request{n: 4 << 20, flags: cmdFlagDF}, "data 0+4194304 done"},
		{"small hole", false, request{off: 70000, n: 4096}, "hole 70000+4096 done"},
		{"hole in one chunk", false, request{off: 70000, n: 100 << 10, flags: cmdFlagDF}, "hole 70000+102400 done"},
		{"nothing", false, request{off: 5}, "none done"},
		{"old", true, request{off: 3, n: 5}, "simple 0 5"},
		{"old, beyond", true, request{off: 4 << 20, n: 5}, "simple 22"},
	} {
		k := dialRaw(t, r.addr)
		if !x.old {
			k.must(k.ask(optStructuredReply, nil, nil))
		}
		k.must(k.choose(optGo, "d"))
		var h [requestLen]byte
		x.req.cookie = 7
		x.req.put(h[:])
		k.write(h[:])
		if got := k.chunks(int(x.req.n)); got != x.chunks {
			t.Errorf("%s: %s, want %s", x.name, got, x.chunks)
		}
	}
}

// rawTalk is a client that says what a test wants.
type rawTalk struct {
	*talk
	t testing.TB
}

func dialRaw(t testing.TB, a Address) *rawTalk {
	t.Helper()
	nc, err := net.Dial(a.Network, a.Addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	k := &rawTalk{newTalk(nc), t}
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	var hello [18]byte
	_, err = io.ReadFull(k.br, hello[:])
	k.must(err)
	k.write([]byte{0, 0, 0, flagFixedNewstyle | flagNoZeroes})
	k.noZeroes = true
	return k
}

func (k *rawTalk) must(err error) {
	k.t.Helper()
	if err != nil {
		k.t.Fatal(err)
	}
}

func (k *rawTalk) write(p []byte) {
	k.t.Helper()
	_, err := k.nc.Write(p)
	k.must(err)
}

// closed waits for the server to hang up.
func (k *rawTalk) closed() {
	k.t.Helper()
	if _, err := io.Copy(io.Discard, k.br); errors.Is(err, os.ErrDeadlineExceeded) {
		k.t.Fatal("the server does not hang up")
	}
}

// chunks reads a reply to a read of n bytes and names its parts.
func (k *rawTalk) chunks(n int) string {
	var list []string
	for {
		magic, err := k.br.Peek(4)
		k.must(err)
		if be.Uint32(magic) == magicSimple {
			h := k.read(simpleLen)
			if e := be.Uint32(h[4:]); e != 0 {
				return fmt.Sprintf("simple %d", e)
			}
			return fmt.Sprintf("simple 0 %d", len(k.read(n)))
		}
		h := k.read(chunkLen)
		p := k.read(int(be.Uint32(h[16:])))
		s := "none"
		switch be.Uint16(h[6:]) {
		case replyData:
			s = fmt.Sprintf("data %d+%d", be.Uint64(p), len(p)-8)
		case replyHole:
			s = fmt.Sprintf("hole %d+%d", be.Uint64(p), be.Uint32(p[8:]))
		}
		if be.Uint16(h[4:])&replyFlagDone != 0 {
			return strings.Join(append(list, s+" done"), ", ")
		}
		list = append(list, s)
	}
}

func (k *rawTalk) read(n int) []byte {
	p := make([]byte, n)
	_, err := io.ReadFull(k.br, p)
	k.must(err)
	return p
}

// TestOptions: the answers to options, one after another on one connection.
func TestOptions(t *testing.T) {
	r := serve(t, shelf{"d": disk.NewMem(512), "e": disk.NewMem(512)}, ServerOptions{}, "unix")
	name := func(s string) []byte { return append(binary.BigEndian.AppendUint32(nil, uint32(len(s))), s...) }
	meta := func(export string, queries ...string) []byte {
		p := binary.BigEndian.AppendUint32(name(export), uint32(len(queries)))
		for _, q := range queries {
			p = append(p, name(q)...)
		}
		return p
	}
	k := dialRaw(t, r.addr)
	for _, x := range []struct {
		name string
		opt  uint32
		data []byte
		want string
	}{
		{"unknown", 77, []byte("x"), "error 1"},
		{"peek", 4, nil, "error 1"},
		{"extended headers", 11, nil, "error 1"},
		{"list with data", optList, []byte{1}, "error 3"},
		{"list", optList, nil, "2,2,"},
		{"too long", 77, make([]byte, 100<<10), "error 9"},
		{"TLS", optStartTLS, nil, "error 1"},
		{"contexts before structured replies", optSetMeta, meta("d", BaseAllocation), "error 3"},
		{"structured with data", optStructuredReply, []byte{1}, "error 3"},
		{"structured", optStructuredReply, nil, ""},
		{"info of nothing", optInfo, nil, "error 3"},
		{"info cut", optInfo, append(name("d"), 0, 1, 0), "error 3"},
		{"info with more", optInfo, append(name("d"), 0, 0, 0), "error 3"},
		{"info with a long name", optInfo, []byte{255, 255, 255, 255, 0, 0}, "error 3"},
		{"info", optInfo, append(name("d"), 0, 2, 0, infoName, 0, 99), "3,3,3,"},
		{"unknown export", optGo, append(name("x"), 0, 0), "error 6"},
		{"list contexts", optListMeta, meta("d"), "4,"},
		{"list contexts of base", optListMeta, meta("d", "base:"), "4,"},
		{"list contexts of others", optListMeta, meta("d", "x-other:y"), ""},
		{"list contexts of no export", optListMeta, meta("x"), "error 6"},
		{"set none", optSetMeta, meta("d"), ""},
		{"set a wildcard", optSetMeta, meta("d", "base:"), ""},
		{"set", optSetMeta, meta("d", "qemu:dirty-bitmap:b", BaseAllocation), "4,"},
		{"set cut", optSetMeta, meta("d", BaseAllocation)[:12], "error 3"},
		{"set with a false count", optSetMeta, append(name("d"), 255, 255, 255, 255), "error 3"},
		{"set for another export", optSetMeta, meta("e", BaseAllocation), "4,"},
		{"go", optGo, append(name("d"), 0, 0), "3,3,"},
	} {
		got := ""
		err := k.ask(x.opt, x.data, func(typ uint32, _ []byte) error {
			got += fmt.Sprint(typ, ",")
			return nil
		})
		if e, ok := errors.AsType[*optionError](err); ok {
			got = fmt.Sprint("error ", e.code&^repError)
		} else if err != nil {
			t.Fatalf("%s: %v", x.name, err)
		}
		if got != x.want {
			t.Errorf("%s: got %q, want %q", x.name, got, x.want)
		}
	}
	// The contexts were for another export, so they do not hold.
	var h [requestLen]byte
	request{cmd: cmdBlockStatus, n: 1}.put(h[:])
	k.write(h[:])
	if p := k.read(chunkLen + 6); be.Uint16(p[6:]) != replyError || be.Uint32(p[chunkLen:]) != uint32(EINVAL) {
		t.Errorf("block status for another export: % x", p)
	}
}

// TestEnds: what makes the server hang up, or say goodbye.
func TestEnds(t *testing.T) {
	keys := makePKI(t)
	opts := ServerOptions{HandshakeTimeout: 10 * time.Second}
	plain := serve(t, shelf{"d": disk.NewMem(512)}, opts, "unix")
	opts.TLS = keys.server
	offered := serve(t, shelf{"d": disk.NewMem(512)}, opts, "unix")
	opts.RequireTLS = true
	strict := serve(t, shelf{"d": disk.NewMem(512)}, opts, "unix")
	option := func(opt uint32, n int, data string) []byte {
		p := binary.BigEndian.AppendUint64(nil, magicOption)
		p = binary.BigEndian.AppendUint32(p, opt)
		return append(binary.BigEndian.AppendUint32(p, uint32(n)), data...)
	}
	for name, x := range map[string]struct {
		r *running
		p []byte
	}{
		"magic":                  {plain, make([]byte, 16)},
		"an endless option":      {plain, option(99, 1<<32-1, "")},
		"abort":                  {plain, option(optAbort, 0, "")},
		"abort with data":        {plain, option(optAbort, 3, "bye")},
		"unknown name":           {plain, option(optExportName, 1, "x")},
		"name without TLS":       {strict, option(optExportName, 1, "d")},
		"data before TLS":        {offered, option(optStartTLS, 0, "0123456789abcdef")},
		"no TLS after all":       {strict, append(option(optStartTLS, 0, ""), make([]byte, 64)...)},
		"bad request magic":      {plain, option(optExportName, 1, "d"+strings.Repeat("x", requestLen))},
		"an endless write":       {plain, append(option(optExportName, 1, "d"), string(rawRequest(request{cmd: cmdWrite, n: 1<<32 - 1}))...)},
		"disconnect":             {plain, append(option(optExportName, 1, "d"), string(rawRequest(request{cmd: cmdDisc}))...)},
		"disconnect, then noise": {plain, append(option(optExportName, 1, "d"), string(rawRequest(request{cmd: cmdDisc}))+"noise"...)},
	} {
		t.Run(name, func(t *testing.T) {
			k := dialRaw(t, x.r.addr)
			k.write(x.p)
			k.closed()
		})
	}
	k := dialRaw(t, strict.addr)
	for _, opt := range []uint32{optList, optInfo, optGo, optStructuredReply, optSetMeta, 99} {
		if err := k.ask(opt, nil, nil); !errors.Is(err, ErrTLSRequired) {
			t.Errorf("option %d without TLS: %v", opt, err)
		}
	}
	k.must(k.ask(optAbort, nil, nil))

	for _, flags := range []byte{4, 0xff} {
		nc, err := net.Dial("unix", plain.addr.Addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		k := &rawTalk{newTalk(nc), t}
		k.write([]byte{0, 0, 0, flags})
		k.closed()
	}
	if _, err := Dial(t.Context(), strict.at("d"), DialOptions{}); !errors.Is(err, ErrTLSRequired) {
		t.Errorf("dial without TLS: %v", err)
	}
	keys.client.ServerName = "elsewhere"
	if _, err := Dial(t.Context(), strict.at("d"), DialOptions{TLS: keys.client}); err == nil || !strings.Contains(err.Error(), "elsewhere") {
		t.Errorf("dial with another name: %v", err)
	}
	if _, err := Dial(t.Context(), plain.at("d"), DialOptions{TLS: keys.client}); err == nil {
		t.Error("dialled with TLS a server without")
	}
}

func rawRequest(r request) []byte {
	var h [requestLen]byte
	r.put(h[:])
	return h[:]
}

// TestExportName: the old way in, with and without the 124 zeros.
func TestExportName(t *testing.T) {
	r := serve(t, shelf{"d": disk.NewMem(512)}, ServerOptions{}, "unix")
	for flags, want := range map[byte]int{0: 134, flagFixedNewstyle: 134, flagNoZeroes | flagFixedNewstyle: 10} {
		nc, err := net.Dial("unix", r.addr.Addr)
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		k := &rawTalk{newTalk(nc), t}
		k.read(18)
		k.write([]byte{0, 0, 0, flags})
		p := binary.BigEndian.AppendUint64(nil, magicOption)
		p = binary.BigEndian.AppendUint32(p, optExportName)
		p = append(binary.BigEndian.AppendUint32(p, 1), 'd')
		k.write(append(p, rawRequest(request{cmd: cmdDisc})...))
		got, err := io.ReadAll(k.br)
		if err != nil || len(got) != want || be.Uint64(got) != 512 {
			t.Errorf("flags %d: % x, %v", flags, got, err)
		}
	}
}
