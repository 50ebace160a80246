package nbd

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"net"
	"slices"
	"time"
)

// DialOptions of Dial and List. The zero value is one connection without TLS.
type DialOptions struct {
	// TLS is used when not nil, and then insisted on, whatever the address
	// says: there is no falling back to clear text. It must be set when
	// Address.TLS is. An empty ServerName in it is filled in from the address.
	TLS *tls.Config
	// Contexts are metadata contexts wanted beside base:allocation, such as
	// "qemu:dirty-bitmap:NAME". Which were granted tells Client.Info.
	Contexts []string
	// Conns is how many connections to use if the server says that they share
	// one cache (NBD_FLAG_CAN_MULTI_CONN). 0: 1.
	Conns int
	// InFlight bounds requests under way per connection; more wait. 0: 64.
	InFlight int
	// HandshakeTimeout bounds connecting and negotiating. 0: 30 s.
	HandshakeTimeout time.Duration
	// StallTimeout is how long the server may take over a message that it, or
	// we, have begun. It does not bound how long it works on a request: that
	// is for the request's context. 0: 2 min.
	StallTimeout time.Duration
}

func (o DialOptions) withDefaults() DialOptions {
	set(&o.Conns, 1)
	set(&o.InFlight, 64)
	set(&o.HandshakeTimeout, 30*time.Second)
	set(&o.StallTimeout, 2*time.Minute)
	return o
}

// Info describes an export.
type Info struct {
	Name        string
	Description string
	Size        int64 // bytes
	ReadOnly    bool
	MultiConn   bool     // several connections share one cache
	MinBlock    int      // bytes; requests are aligned to it
	MaxPayload  int      // bytes in one read or write
	Contexts    []string // metadata contexts to be had
	Structured  bool     // structured replies

	flags uint16
}

// talk is the client's side of a handshake.
type talk struct {
	raw      net.Conn
	nc       net.Conn
	br       *bufio.Reader
	noZeroes bool

	info Info
	ids  map[uint32]string // metadata contexts granted, by id
}

// greet connects and negotiates up to the choice of an export.
func greet(ctx context.Context, a Address, o DialOptions) (*talk, error) {
	if a.TLS && o.TLS == nil {
		return nil, errors.New("TLS is asked for but no certificates are given")
	}
	var d net.Dialer
	nc, err := d.DialContext(ctx, a.Network, a.Addr)
	if err != nil {
		return nil, err
	}
	t := newTalk(nc)
	if err := t.guard(ctx, func() error { return t.start(ctx, a, o) }); err != nil {
		nc.Close()
		return nil, err
	}
	return t, nil
}

func newTalk(nc net.Conn) *talk {
	return &talk{raw: nc, nc: nc, br: bufio.NewReaderSize(nc, 64<<10), ids: map[uint32]string{}}
}

// guard runs one step of the handshake, which ends when ctx does.
func (t *talk) guard(ctx context.Context, step func() error) error {
	stop := context.AfterFunc(ctx, func() { t.raw.SetDeadline(past) })
	err := step()
	if !stop() {
		return context.Cause(ctx)
	}
	return err
}

func (t *talk) start(ctx context.Context, a Address, o DialOptions) error {
	var hello [18]byte
	if _, err := io.ReadFull(t.br, hello[:]); err != nil {
		return fmt.Errorf("read server's greeting: %w", err)
	}
	if be.Uint64(hello[:]) != magicInit {
		return fmt.Errorf("%w: no NBD server greets so", ErrProtocol)
	}
	flags := be.Uint16(hello[16:])
	if be.Uint64(hello[8:]) != magicOption || flags&flagFixedNewstyle == 0 {
		return fmt.Errorf("server knows only the old handshake: %w", errors.ErrUnsupported)
	}
	t.noZeroes = flags&flagNoZeroes != 0
	mine := uint32(flagFixedNewstyle)
	if t.noZeroes {
		mine |= flagNoZeroes
	}
	if _, err := t.nc.Write(be.AppendUint32(nil, mine)); err != nil {
		return err
	}
	if o.TLS != nil {
		if err := t.startTLS(ctx, a, o.TLS); err != nil {
			return err
		}
	}
	err := t.ask(optStructuredReply, nil, nil)
	t.info.Structured = err == nil
	return optional(err)
}

// startTLS upgrades the connection, or fails.
func (t *talk) startTLS(ctx context.Context, a Address, cfg *tls.Config) error {
	if err := t.ask(optStartTLS, nil, nil); err != nil {
		return fmt.Errorf("server does not start TLS: %w", err)
	}
	if t.br.Buffered() > 0 {
		return fmt.Errorf("%w: data before the TLS handshake", ErrProtocol)
	}
	cfg = cfg.Clone()
	cfg.MinVersion = max(cfg.MinVersion, tls.VersionTLS12)
	cfg.DynamicRecordSizingDisabled = true
	if a.ServerName != "" {
		cfg.ServerName = a.ServerName
	} else if host, _, err := net.SplitHostPort(a.Addr); cfg.ServerName == "" && a.Network != "unix" && err == nil {
		cfg.ServerName = host
	}
	c := tls.Client(t.raw, cfg)
	if err := c.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	t.nc = c
	t.br.Reset(c)
	return nil
}

// optionError is a server's refusal of an option.
type optionError struct {
	opt, code uint32
	text      string
}

func (e *optionError) Error() string {
	s := fmt.Sprintf("server refuses NBD option %d with error %d", e.opt, e.code&^repError)
	if e.text != "" {
		s += fmt.Sprintf(" (%q)", e.text)
	}
	return s
}

func (e *optionError) Is(target error) bool {
	switch e.code {
	case repErrUnknown:
		return target == ErrUnknownExport
	case repErrTLSReqd:
		return target == ErrTLSRequired
	case repErrUnsup:
		return target == errors.ErrUnsupported
	}
	return false
}

// optional drops the error of a server that does not know an option.
func optional(err error) error {
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}

// maxReplies bounds the replies to one option; only lists of exports are long.
const maxReplies = 100_000

// ask sends an option and hands its replies, but the last, to each. The last
// is an NBD_REP_ACK, or becomes an *optionError.
func (t *talk) ask(opt uint32, data []byte, each func(typ uint32, p []byte) error) error {
	m := be.AppendUint64(nil, magicOption)
	m = be.AppendUint32(m, opt)
	m = be.AppendUint32(m, uint32(len(data)))
	if _, err := t.nc.Write(append(m, data...)); err != nil {
		return fmt.Errorf("send option %d: %w", opt, err)
	}
	for range maxReplies {
		var h [optReplyLen]byte
		if _, err := io.ReadFull(t.br, h[:]); err != nil {
			return fmt.Errorf("read reply to option %d: %w", opt, err)
		}
		typ, n := be.Uint32(h[12:]), be.Uint32(h[16:])
		if be.Uint64(h[:]) != magicOptReply || be.Uint32(h[8:]) != opt || n > maxOptionData {
			return fmt.Errorf("%w: reply to option %d: % x", ErrProtocol, opt, h)
		}
		p := make([]byte, n)
		if _, err := io.ReadFull(t.br, p); err != nil {
			return fmt.Errorf("read reply to option %d: %w", opt, err)
		}
		switch {
		case typ == repAck:
			return nil
		case typ&repError != 0:
			return &optionError{opt, typ, string(p[:min(len(p), 200)])}
		case each == nil:
			return fmt.Errorf("%w: reply of type %d to option %d", ErrProtocol, typ, opt)
		}
		if err := each(typ, p); err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: no end of replies to option %d", ErrProtocol, opt)
}

// contexts selects (optSetMeta) or lists (optListMeta) metadata contexts.
func (t *talk) contexts(opt uint32, export string, queries []string) error {
	t.info.Contexts = nil
	if !t.info.Structured {
		return nil
	}
	m := be.AppendUint32(nil, uint32(len(export)))
	m = append(m, export...)
	m = be.AppendUint32(m, uint32(len(queries)))
	for _, q := range queries {
		m = be.AppendUint32(m, uint32(len(q)))
		m = append(m, q...)
	}
	return optional(t.ask(opt, m, func(typ uint32, p []byte) error {
		if typ != repMetaContext || len(p) < 4 || !validName(string(p[4:])) || len(t.info.Contexts) >= 1000 {
			return fmt.Errorf("%w: bad metadata context", ErrProtocol)
		}
		name := string(p[4:])
		if opt == optSetMeta {
			if _, dup := t.ids[be.Uint32(p)]; dup || !slices.Contains(queries, name) {
				return fmt.Errorf("%w: metadata context %q was not asked for, or has no id of its own", ErrProtocol, name)
			}
			t.ids[be.Uint32(p)] = name
		}
		t.info.Contexts = append(t.info.Contexts, name)
		return nil
	}))
}

// choose asks about an export (optInfo), or enters the transmission phase with
// it (optGo, or optExportName with servers that do not know that).
func (t *talk) choose(opt uint32, export string) error {
	t.info.Name, t.info.Size = export, -1
	t.info.MinBlock, t.info.MaxPayload = 1, maxPayload
	m := be.AppendUint32(nil, uint32(len(export)))
	m = append(m, export...)
	m = be.AppendUint16(m, 1)
	m = be.AppendUint16(m, infoBlockSize)
	err := t.ask(opt, m, t.takeInfo)
	if opt == optGo && errors.Is(err, errors.ErrUnsupported) {
		err = t.exportName(export)
	}
	if err != nil {
		return err
	}
	if t.info.Size < 0 {
		return fmt.Errorf("%w: no size of the export", ErrProtocol)
	}
	t.info.ReadOnly = t.info.flags&flagReadOnly != 0
	t.info.MultiConn = t.info.flags&flagCanMultiConn != 0
	return nil
}

// takeInfo takes one NBD_REP_INFO; unknown ones are ignored.
func (t *talk) takeInfo(typ uint32, p []byte) error {
	if typ != repInfo || len(p) < 2 {
		return fmt.Errorf("%w: reply of type %d instead of information", ErrProtocol, typ)
	}
	r := fields{p: p[2:]}
	switch be.Uint16(p) {
	case infoExport:
		return t.setSize(r.u64(), r.u16(), r.bad || len(r.p) > 0)
	case infoDescription:
		t.info.Description = string(r.p[:min(len(r.p), maxString)])
	case infoBlockSize:
		least, _, most := r.u32(), r.u32(), r.u32()
		// proto, "Size constraints"; a limit above ours is as good as ours.
		if r.bad || len(r.p) > 0 || least > 64<<10 || bits.OnesCount32(least) != 1 || most < least {
			return fmt.Errorf("%w: block sizes %d to %d", ErrProtocol, least, most)
		}
		most = min(most, maxPayload)
		t.info.MinBlock, t.info.MaxPayload = int(least), int(most&^(least-1))
	}
	return nil
}

func (t *talk) setSize(size uint64, flags uint16, bad bool) error {
	if bad || size > 1<<63-1 || flags&flagHasFlags == 0 {
		return fmt.Errorf("%w: export of %d bytes with flags %#x", ErrProtocol, size, flags)
	}
	t.info.Size, t.info.flags = int64(size), flags
	return nil
}

// exportName enters the transmission phase the old way.
func (t *talk) exportName(name string) error {
	m := be.AppendUint64(nil, magicOption)
	m = be.AppendUint32(m, optExportName)
	m = be.AppendUint32(m, uint32(len(name)))
	if _, err := t.nc.Write(append(m, name...)); err != nil {
		return fmt.Errorf("send export name: %w", err)
	}
	p := make([]byte, 10, 10+124)
	if !t.noZeroes {
		p = p[:cap(p)]
	}
	if _, err := io.ReadFull(t.br, p); err != nil {
		// Hanging up is how a server refuses a name here.
		return fmt.Errorf("%w, or the server is gone: %w", ErrUnknownExport, err)
	}
	return t.setSize(be.Uint64(p), be.Uint16(p[8:]), false)
}

// bye leaves a handshake in good order.
func (t *talk) bye() {
	t.raw.SetDeadline(time.Now().Add(time.Second))
	t.ask(optAbort, nil, nil) // an old server may just hang up
	t.nc.Close()
}

// List returns the exports that a server lists, in its order. Where the server
// tells no more than names, sizes are -1. Address.Export is ignored.
func List(ctx context.Context, a Address, o DialOptions) ([]Info, error) {
	o = o.withDefaults()
	list, err := list(ctx, a, o)
	if err != nil {
		return nil, fmt.Errorf("list NBD exports at %s: %w", a.Addr, err)
	}
	return list, nil
}

func list(ctx context.Context, a Address, o DialOptions) ([]Info, error) {
	ctx, cancel := context.WithTimeout(ctx, o.HandshakeTimeout)
	defer cancel()
	t, err := greet(ctx, a, o)
	if err != nil {
		return nil, err
	}
	defer t.bye()
	var infos []Info
	err = t.guard(ctx, func() error {
		err := t.ask(optList, nil, func(typ uint32, p []byte) error {
			r := fields{p: p}
			name := r.str()
			if typ != repServer || r.bad || !validName(name) {
				return fmt.Errorf("%w: bad entry in the list of exports", ErrProtocol)
			}
			infos = append(infos, Info{Name: name, Description: string(r.p), Size: -1})
			return nil
		})
		if err != nil {
			return err
		}
		for i, e := range infos {
			if infos[i], err = t.describe(e); err != nil {
				return err
			}
		}
		return nil
	})
	return infos, err
}

// describe fills in what the server tells about a listed export. One that
// cannot be had any more keeps its size of -1.
func (t *talk) describe(e Info) (Info, error) {
	t.info = Info{Description: e.Description, Structured: t.info.Structured}
	err := t.contexts(optListMeta, e.Name, nil)
	if err == nil {
		err = t.choose(optInfo, e.Name)
	}
	if _, refused := errors.AsType[*optionError](err); refused {
		return e, nil
	}
	return t.info, err
}
