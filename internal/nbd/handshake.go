package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"
	"unicode/utf8"
)

// negotiate runs the handshake. On return the client has hung up or aborted
// (io.EOF), or c.exp is the export it wants to work with.
func (c *conn) negotiate() error {
	ctx, cancel := context.WithTimeoutCause(c.ctx, c.s.o.HandshakeTimeout, errors.New("handshake took too long"))
	defer cancel()
	// The server's end ends a handshake at once: nothing is lost with it.
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-c.stopping:
			c.raw.Close()
		case <-stop:
		}
	}()
	defer func() { close(stop); <-done }()
	if err := c.nc.SetDeadline(time.Now().Add(c.s.o.HandshakeTimeout)); err != nil {
		return err
	}

	var hello [18]byte
	be.PutUint64(hello[:], magicInit)
	be.PutUint64(hello[8:], magicOption)
	be.PutUint16(hello[16:], flagFixedNewstyle|flagNoZeroes)
	if _, err := c.nc.Write(hello[:]); err != nil {
		return io.EOF // a look whether somebody is there; ListenUnix does so
	}
	var flags [4]byte
	if _, err := io.ReadFull(c.br, flags[:]); err != nil {
		return io.EOF
	}
	f := be.Uint32(flags[:])
	if f&^(flagFixedNewstyle|flagNoZeroes) != 0 {
		return fmt.Errorf("%w: client flags %#x", ErrProtocol, f)
	}
	c.fixed, c.noZeroes = f&flagFixedNewstyle != 0, f&flagNoZeroes != 0
	for {
		done, err := c.option(ctx)
		if err != nil {
			return fmt.Errorf("handshake: %w", err)
		}
		if done {
			return c.nc.SetDeadline(time.Time{})
		}
	}
}

// option reads and answers one option; true when the transmission phase begins.
func (c *conn) option(ctx context.Context) (bool, error) {
	var h [optionLen]byte
	if _, err := io.ReadFull(c.br, h[:]); err != nil {
		return false, err
	}
	if be.Uint64(h[:]) != magicOption {
		return false, fmt.Errorf("%w: option magic %#x", ErrProtocol, be.Uint64(h[:]))
	}
	opt, n := be.Uint32(h[8:]), be.Uint32(h[12:])
	if n > maxSkip {
		return false, fmt.Errorf("%w: option %d with %d bytes", ErrProtocol, opt, n)
	}
	if n > maxOptionData {
		if _, err := c.br.Discard(int(n)); err != nil {
			return false, err
		}
		if opt == optExportName {
			return false, fmt.Errorf("%w: export name of %d bytes", ErrProtocol, n)
		}
		return false, c.reply(opt, repErrTooBig, nil)
	}
	data := make([]byte, n)
	if _, err := io.ReadFull(c.br, data); err != nil {
		return false, err
	}
	if c.s.o.RequireTLS && !c.secure && opt != optStartTLS && opt != optAbort {
		if opt == optExportName {
			return false, errors.New("client wants an export without TLS")
		}
		return false, c.reply(opt, repErrTLSReqd, nil)
	}
	if !c.fixed && opt != optExportName {
		return false, fmt.Errorf("%w: option %d without fixed newstyle", ErrProtocol, opt)
	}
	return c.dispatch(ctx, opt, data)
}

func (c *conn) dispatch(ctx context.Context, opt uint32, data []byte) (bool, error) {
	switch opt {
	case optExportName:
		return true, c.exportName(ctx, string(data))
	case optAbort:
		// The client may be gone already, which is as well.
		if err := c.reply(opt, repAck, nil); err != nil {
			return false, io.EOF
		}
		return false, io.EOF
	case optList:
		if len(data) != 0 {
			return false, c.reply(opt, repErrInvalid, nil)
		}
		return false, c.list(ctx)
	case optStartTLS:
		return false, c.startTLS(ctx, data)
	case optInfo, optGo:
		return c.info(ctx, opt, data)
	case optStructuredReply:
		if len(data) != 0 {
			return false, c.reply(opt, repErrInvalid, nil)
		}
		c.structured = true
		return false, c.reply(opt, repAck, nil)
	case optListMeta, optSetMeta:
		return false, c.metaContexts(ctx, opt, data)
	}
	return false, c.reply(opt, repErrUnsup, nil)
}

// reply sends one option reply.
func (c *conn) reply(opt, typ uint32, data []byte) error {
	_, err := c.nc.Write(appendOptReply(nil, opt, typ, data))
	return err
}

func appendOptReply(p []byte, opt, typ uint32, data []byte) []byte {
	p = be.AppendUint64(p, magicOptReply)
	p = be.AppendUint32(p, opt)
	p = be.AppendUint32(p, typ)
	p = be.AppendUint32(p, uint32(len(data)))
	return append(p, data...)
}

// list answers NBD_OPT_LIST. Names that no client could ask for are left out.
func (c *conn) list(ctx context.Context) error {
	names, err := c.s.exports.Names(ctx)
	if err != nil {
		c.s.o.Report(fmt.Errorf("list exports: %w", err))
		return c.reply(optList, repErrPlatform, []byte("the list of exports cannot be had"))
	}
	var out []byte
	for _, name := range names {
		if !validName(name) {
			continue
		}
		out = appendOptReply(out, optList, repServer, append(be.AppendUint32(nil, uint32(len(name))), name...))
	}
	_, err = c.nc.Write(appendOptReply(out, optList, repAck, nil))
	return err
}

// validName follows proto, "Conventions": at most 4096 bytes of UTF-8, no NUL.
func validName(s string) bool {
	return len(s) <= maxString && utf8.ValidString(s) && !strings.ContainsRune(s, 0)
}

// startTLS answers NBD_OPT_STARTTLS. What was negotiated before is forgotten.
func (c *conn) startTLS(ctx context.Context, data []byte) error {
	switch {
	case c.secure || len(data) != 0:
		return c.reply(optStartTLS, repErrInvalid, nil)
	case c.s.o.TLS == nil:
		return c.reply(optStartTLS, repErrUnsup, nil)
	}
	// What came in the clear together with the option must not be taken for
	// something said under TLS.
	if c.br.Buffered() > 0 {
		return fmt.Errorf("%w: data before the TLS handshake", ErrProtocol)
	}
	if err := c.reply(optStartTLS, repAck, nil); err != nil {
		return err
	}
	t := tls.Server(c.raw, c.s.o.TLS)
	if err := t.HandshakeContext(ctx); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	c.nc, c.secure = t, true
	c.br.Reset(t)
	c.structured, c.allocation = false, false
	c.releaseExport()
	return nil
}

// use makes name the connection's export. It says false, and has reported why,
// when there is no such export.
func (c *conn) use(ctx context.Context, name string) bool {
	if c.exp != nil && c.asked == name {
		return true
	}
	c.releaseExport()
	e, err := c.s.openExport(ctx, name)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			c.s.o.Report(err)
		}
		return false
	}
	c.exp, c.asked = e, name
	return true
}

func (c *conn) releaseExport() {
	if c.exp == nil {
		return
	}
	if err := c.s.closeExport(c.exp); err != nil {
		c.s.o.Report(err)
	}
	c.exp = nil
}

// exportName answers NBD_OPT_EXPORT_NAME, which knows no error but hanging up.
func (c *conn) exportName(ctx context.Context, name string) error {
	if !validName(name) || !c.use(ctx, name) {
		return fmt.Errorf("%w: %q", ErrUnknownExport, name)
	}
	if c.metaFor != name {
		c.allocation = false
	}
	c.exp.join(ctx, c)
	out := be.AppendUint64(nil, uint64(c.exp.size))
	out = be.AppendUint16(out, c.exp.flags(c.structured))
	if !c.noZeroes {
		out = append(out, make([]byte, 124)...)
	}
	_, err := c.nc.Write(out)
	return err
}

// info answers NBD_OPT_INFO and NBD_OPT_GO; true when the transmission phase
// begins. Size constraints are told whether asked for or not: they are the
// defaults but for the preferred size, so no client depends on hearing them.
func (c *conn) info(ctx context.Context, opt uint32, data []byte) (bool, error) {
	r := fields{p: data}
	name := r.str()
	want := r.bytes(2 * int(r.u16()))
	if r.bad || len(r.p) != 0 || !validName(name) {
		return false, c.reply(opt, repErrInvalid, nil)
	}
	if !c.use(ctx, name) {
		return false, c.reply(opt, repErrUnknown, []byte("no such export"))
	}
	if opt == optGo {
		c.exp.join(ctx, c)
	}
	e := be.AppendUint16(nil, infoExport)
	e = be.AppendUint64(e, uint64(c.exp.size))
	e = be.AppendUint16(e, c.exp.flags(c.structured))
	out := appendOptReply(nil, opt, repInfo, e)
	b := be.AppendUint16(nil, infoBlockSize)
	b = be.AppendUint32(b, 1)
	b = be.AppendUint32(b, c.s.o.PreferredBlock)
	b = be.AppendUint32(b, maxPayload)
	out = appendOptReply(out, opt, repInfo, b)
	for ; len(want) > 0; want = want[2:] {
		if be.Uint16(want) == infoName {
			out = appendOptReply(out, opt, repInfo, append(be.AppendUint16(nil, infoName), c.exp.name...))
			break
		}
	}
	out = appendOptReply(out, opt, repAck, nil)
	if opt == optGo && c.metaFor != name {
		c.allocation = false
	}
	_, err := c.nc.Write(out)
	return opt == optGo, err
}

// metaContexts answers NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT
// (proto, "Metadata querying"). There is one context, base:allocation; its id
// is allocationID.
func (c *conn) metaContexts(ctx context.Context, opt uint32, data []byte) error {
	if opt == optSetMeta {
		c.allocation = false // a set that fails also replaces what was set
	}
	r := fields{p: data}
	name := r.str()
	n := r.u32()
	match := opt == optListMeta && n == 0
	for range n {
		q := r.str()
		if r.bad {
			break
		}
		match = match || q == BaseAllocation || opt == optListMeta && q == "base:"
	}
	if r.bad || len(r.p) != 0 || !validName(name) || !c.structured {
		return c.reply(opt, repErrInvalid, nil)
	}
	if !c.use(ctx, name) {
		return c.reply(opt, repErrUnknown, []byte("no such export"))
	}
	var out []byte
	if match {
		id := uint32(0) // reserved in a list
		if opt == optSetMeta {
			id = allocationID
			c.allocation, c.metaFor = true, name
		}
		out = appendOptReply(out, opt, repMetaContext, append(be.AppendUint32(nil, id), BaseAllocation...))
	}
	_, err := c.nc.Write(appendOptReply(out, opt, repAck, nil))
	return err
}

// fields takes a message apart. After a field that is not all there, bad is
// set and everything is zero.
type fields struct {
	p   []byte
	bad bool
}

func (f *fields) bytes(n int) []byte {
	if f.bad || n < 0 || n > len(f.p) {
		f.bad, f.p = true, nil
		return nil
	}
	b := f.p[:n]
	f.p = f.p[n:]
	return b
}

func (f *fields) u16() uint16 {
	if b := f.bytes(2); b != nil {
		return be.Uint16(b)
	}
	return 0
}

func (f *fields) u32() uint32 {
	if b := f.bytes(4); b != nil {
		return be.Uint32(b)
	}
	return 0
}

func (f *fields) u64() uint64 {
	if b := f.bytes(8); b != nil {
		return be.Uint64(b)
	}
	return 0
}

// str is a string after its length in 32 bits.
func (f *fields) str() string {
	n := f.u32()
	if n > uint32(len(f.p)) {
		f.bad = true
	}
	return string(f.bytes(int(n)))
}
