package nbd

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/disk"
)

const (
	// maxEffect is the longest range, in bytes, in one request without
	// payload. The field takes 4 GiB; some servers count in signed numbers.
	maxEffect = 1 << 30
)

// Client is an export of a server as a disk. Its methods, but Close, may run in
// parallel. Requests of any offset and length may be made: where the server
// has a minimum block size, reads are widened and writes of part of a block
// read the block first (one such write at a time, so that disjoint writes keep
// each other's bytes).
type Client struct {
	info  Info
	links []*link
	turn  atomic.Uint32

	partial sync.Mutex // held while part of a block is written
}

var _ disk.Device = (*Client)(nil)

// Dial connects to an export. ctx bounds connecting only. The Client keeps
// goroutines until Close. Errors that are worth telling apart: ErrUnknownExport,
// ErrTLSRequired, ErrProtocol.
func Dial(ctx context.Context, a Address, o DialOptions) (*Client, error) {
	o = o.withDefaults()
	c, err := dial(ctx, a, o)
	if err != nil {
		return nil, fmt.Errorf("connect to NBD export %q at %s: %w", a.Export, a.Addr, err)
	}
	return c, nil
}

func dial(ctx context.Context, a Address, o DialOptions) (*Client, error) {
	queries := append([]string{BaseAllocation}, o.Contexts...)
	for _, s := range append(queries, a.Export) {
		if !validName(s) {
			return nil, fmt.Errorf("name %.50q is not UTF-8 of at most %d bytes", s, maxString)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, o.HandshakeTimeout)
	defer cancel()
	t, err := enter(ctx, a, o, queries)
	if err != nil {
		return nil, err
	}
	c := &Client{info: t.info}
	talks := []*talk{t}
	for len(talks) < o.Conns && t.info.MultiConn {
		more, err := enter(ctx, a, o, queries)
		if err == nil && !c.info.equal(more.info) {
			more.nc.Close()
			err = errors.New("export differs between connections")
		}
		if err != nil {
			for _, t := range talks {
				t.nc.Close()
			}
			return nil, err
		}
		talks = append(talks, more)
	}
	for _, t := range talks {
		c.links = append(c.links, newLink(t, o, c.lost))
	}
	for _, l := range c.links { // each may tell all others that it is broken
		l.start()
	}
	return c, nil
}

// enter makes one connection and brings it to the transmission phase.
func enter(ctx context.Context, a Address, o DialOptions, queries []string) (*talk, error) {
	t, err := greet(ctx, a, o)
	if err != nil {
		return nil, err
	}
	err = t.guard(ctx, func() error {
		if err := t.contexts(optSetMeta, a.Export, queries); err != nil {
			return err
		}
		return t.choose(optGo, a.Export)
	})
	if err == nil {
		err = t.raw.SetDeadline(time.Time{})
	}
	if err != nil {
		t.nc.Close()
		return nil, err
	}
	return t, nil
}

func (a Info) equal(b Info) bool {
	return a.Size == b.Size && a.flags == b.flags && a.MinBlock == b.MinBlock && a.MaxPayload == b.MaxPayload &&
		slices.Equal(a.Contexts, b.Contexts)
}

// lost breaks all connections when one is broken: what was written over it and
// not flushed may be gone.
func (c *Client) lost(err error) {
	for _, l := range c.links {
		l.fail(err)
	}
}

// Info tells what was negotiated; Contexts are those granted.
func (c *Client) Info() Info {
	i := c.info
	i.Contexts = slices.Clone(i.Contexts)
	return i
}

// Size is the export's length in bytes.
func (c *Client) Size() int64 { return c.info.Size }

// Close takes leave of the server and ends the goroutines. It does not flush.
func (c *Client) Close() error {
	for _, l := range c.links {
		var h [requestLen]byte
		request{cmd: cmdDisc}.put(h[:])
		l.raw.SetWriteDeadline(time.Now().Add(time.Second))
		l.nc.Write(h[:]) // a courtesy; the server may be gone
		l.nc.Close()
		l.fail(net.ErrClosed)
	}
	for _, l := range c.links {
		<-l.ended
	}
	return nil
}

// do carries out a request over the next connection in turn.
func (c *Client) do(ctx context.Context, r *call) error {
	return c.links[int(c.turn.Add(1)%uint32(len(c.links)))].do(ctx, r)
}

// ReadAt fills p with the bytes at off.
func (c *Client) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := disk.CheckRange(c.info.Size, off, int64(len(p))); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	err := c.split(off, int64(len(p)), c.info.MaxPayload, func(at, n int64, part bool) error {
		q := p[at-off : at-off+n]
		if !part {
			return c.readBlocks(ctx, q, at)
		}
		b, lo := c.block(at)
		if err := c.readBlocks(ctx, b, lo); err != nil {
			return err
		}
		copy(q, b[at-lo:])
		return nil
	})
	if err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

// WriteAt writes p at off.
func (c *Client) WriteAt(ctx context.Context, p []byte, off int64) error {
	if err := c.checkWrite(ctx, off, int64(len(p))); err != nil {
		return err
	}
	err := c.split(off, int64(len(p)), c.info.MaxPayload, func(at, n int64, part bool) error {
		q := p[at-off : at-off+n]
		if part {
			return c.writePart(ctx, q, at)
		}
		return c.writeBlocks(ctx, q, at)
	})
	if err != nil {
		return fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

// ZeroAt makes a range read as zeros; the server may give its storage back. A
// server without NBD_CMD_WRITE_ZEROES is sent zeros.
func (c *Client) ZeroAt(ctx context.Context, off, n int64) error {
	if err := c.checkWrite(ctx, off, n); err != nil {
		return err
	}
	most := maxEffect
	if c.info.flags&flagSendWriteZeroes == 0 {
		most = c.payload(piece)
	}
	err := c.split(off, n, most, func(at, n int64, part bool) error {
		if part {
			return c.writePart(ctx, zeros[:n], at)
		}
		return c.zeroBlocks(ctx, at, n)
	})
	if err != nil {
		return fmt.Errorf("zero %d bytes at %d: %w", n, off, err)
	}
	return nil
}

// Flush makes every write that returned before survive a loss of power of the
// server. A server that knows no flush cannot promise that: the error is
// errors.ErrUnsupported, unless the export is read-only.
func (c *Client) Flush(ctx context.Context) error {
	if c.info.ReadOnly {
		return ctx.Err()
	}
	if c.info.flags&flagSendFlush == 0 {
		return fmt.Errorf("flush: NBD server does not support it: %w", errors.ErrUnsupported)
	}
	if err := c.do(ctx, &call{req: request{cmd: cmdFlush}}); err != nil {
		return fmt.Errorf("flush: %w", err)
	}
	return nil
}

func (c *Client) checkWrite(ctx context.Context, off, n int64) error {
	if c.info.ReadOnly {
		return disk.ErrReadOnly
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return disk.CheckRange(c.info.Size, off, n)
}

// split cuts a range into requests of at most most bytes that keep to the
// minimum block size, and parts of one block, for which part is true.
func (c *Client) split(off, n int64, most int, do func(off, n int64, part bool) error) error {
	unit := int64(c.info.MinBlock)
	for end := off + n; off < end; off += n {
		n = min(end-off, int64(most))
		part := false
		if r := off % unit; r != 0 {
			n, part = min(n, unit-r), true
		} else if n >= unit {
			n -= n % unit
		} else {
			part = true
		}
		if err := do(off, n, part); err != nil {
			return err
		}
	}
	return nil
}

// block returns room for the block around off, and its offset. The last block
// of an export may be short.
func (c *Client) block(off int64) ([]byte, int64) {
	unit := int64(c.info.MinBlock)
	lo := off - off%unit
	return make([]byte, min(unit, c.info.Size-lo)), lo
}

// payload is n bounded by what the server takes.
func (c *Client) payload(n int) int { return min(n, c.info.MaxPayload) }

func (c *Client) readBlocks(ctx context.Context, p []byte, off int64) error {
	return c.do(ctx, &call{req: request{cmd: cmdRead, off: uint64(off), n: uint32(len(p))}, dst: p})
}

func (c *Client) writeBlocks(ctx context.Context, p []byte, off int64) error {
	return c.do(ctx, &call{req: request{cmd: cmdWrite, off: uint64(off), n: uint32(len(p))}, out: p})
}

// writePart writes a part of one block.
func (c *Client) writePart(ctx context.Context, p []byte, off int64) error {
	c.partial.Lock()
	defer c.partial.Unlock()
	b, lo := c.block(off)
	if err := c.readBlocks(ctx, b, lo); err != nil {
		return err
	}
	copy(b[off-lo:], p)
	return c.writeBlocks(ctx, b, lo)
}

func (c *Client) zeroBlocks(ctx context.Context, off, n int64) error {
	if c.info.flags&flagSendWriteZeroes == 0 {
		return c.writeBlocks(ctx, zeros[:n], off)
	}
	err := c.do(ctx, &call{req: request{cmd: cmdWriteZeroes, off: uint64(off), n: uint32(n)}})
	// A server may refuse what is longer than its largest payload (proto,
	// "Size constraints").
	if n > int64(c.info.MaxPayload) && (errors.Is(err, EOVERFLOW) || errors.Is(err, EINVAL)) {
		return c.split(off, n, c.info.MaxPayload, func(off, n int64, _ bool) error {
			return c.zeroBlocks(ctx, off, n)
		})
	}
	return err
}

// Status is a range and what a metadata context says of it.
type Status struct {
	Off, Len int64 // bytes; Len > 0
	Flags    uint32
}

// Status yields what a metadata context says of [off, off+n): ascending,
// without gaps, neighbours with the same flags joined. The error is
// ErrNoContext when the server did not grant the context; an error is the last
// thing yielded.
func (c *Client) Status(ctx context.Context, name string, off, n int64) iter.Seq2[Status, error] {
	return func(yield func(Status, error) bool) {
		if err := disk.CheckRange(c.info.Size, off, n); err != nil {
			yield(Status{}, err)
			return
		}
		if !slices.Contains(c.info.Contexts, name) {
			yield(Status{}, fmt.Errorf("%w: %s", ErrNoContext, name))
			return
		}
		var last Status
		for at, end := off, off+n; at < end; {
			runs, lo, err := c.blockStatus(ctx, name, at, end)
			if err != nil {
				yield(Status{}, fmt.Errorf("block status at %d: %w", at, err))
				return
			}
			for _, r := range runs {
				// What is told beyond the range, or before it, is not asked for.
				lo += int64(r.n)
				s := Status{Off: at, Len: min(lo, end) - at, Flags: r.flags}
				if s.Len <= 0 {
					continue
				}
				at = s.Off + s.Len
				if last.Len > 0 && last.Flags == s.Flags {
					last.Len += s.Len
					continue
				}
				if last.Len > 0 && !yield(last, nil) {
					return
				}
				last = s
			}
		}
		if last.Len > 0 {
			yield(last, nil)
		}
	}
}

// blockStatus asks about a range from at, but not beyond end. The answer
// begins at lo <= at, and reaches beyond at.
func (c *Client) blockStatus(ctx context.Context, name string, at, end int64) (runs []extentRun, lo int64, err error) {
	unit := int64(c.info.MinBlock)
	lo = at - at%unit
	hi := min(c.info.Size, end+(unit-end%unit)%unit, lo+maxEffect)
	r := &call{req: request{cmd: cmdBlockStatus, off: uint64(lo), n: uint32(hi - lo)}}
	if err := c.do(ctx, r); err != nil {
		return nil, 0, err
	}
	runs, told := r.status[name], lo
	for _, e := range runs {
		told += int64(e.n)
	}
	if told <= at {
		return nil, 0, fmt.Errorf("%w: block status of [%d, %d) ends at %d", ErrProtocol, lo, hi, told)
	}
	return runs, lo, nil
}

// Extents tells zeros by base:allocation; without that all is data.
func (c *Client) Extents(ctx context.Context, off, n int64) disk.Extents {
	if !slices.Contains(c.info.Contexts, BaseAllocation) {
		if err := disk.CheckRange(c.info.Size, off, n); err != nil {
			return disk.Fail(err)
		}
		if n == 0 {
			return disk.List()
		}
		return disk.List(disk.Extent{Off: off, Len: n})
	}
	return disk.Merge(func(yield func(disk.Extent, error) bool) {
		for s, err := range c.Status(ctx, BaseAllocation, off, n) {
			if !yield(disk.Extent{Off: s.Off, Len: s.Len, Zero: s.Flags&StateZero != 0}, err) {
				return
			}
		}
	})
}

// Dirty yields the parts of [off, off+n) that QEMU's dirty bitmap of that name
// marks as changed, and nothing else: so it has gaps. The client must have
// been dialled with the context "qemu:dirty-bitmap:"+bitmap, or the error is
// ErrNoContext.
func (c *Client) Dirty(ctx context.Context, bitmap string, off, n int64) disk.Extents {
	return func(yield func(disk.Extent, error) bool) {
		for s, err := range c.Status(ctx, DirtyBitmap(bitmap), off, n) {
			if err != nil {
				yield(disk.Extent{}, err)
				return
			}
			if s.Flags&StateDirty != 0 && !yield(disk.Extent{Off: s.Off, Len: s.Len}, nil) {
				return
			}
		}
	}
}

// DirtyBitmap is the metadata context of a dirty bitmap that QEMU exports
// (QEMU, docs/interop/nbd.txt).
func DirtyBitmap(name string) string { return "qemu:dirty-bitmap:" + name }
