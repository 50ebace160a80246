package nbd

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"holdfast/internal/disk"
)

// export is a disk that is being served: opened when the first connection asks
// for it, shared by all, closed after the last.
type export struct {
	name string
	refs int // guarded by Server.mu

	opening  sync.Mutex // held while dev is opened and closed
	dev      disk.Device
	size     int64
	readOnly bool

	mu    sync.Mutex // guards what follows
	conns map[*conn]struct{}
	begun uint64 // flushes begun

	flushing sync.Mutex // held during a flush; guards what follows
	failed   uint64     // the last flush that failed
	err      error      // and why
}

// openExport returns the export of that name, opened. The empty name means the
// only export where there is just one (proto, NBD_OPT_EXPORT_NAME: the
// "default" export). Every success wants a closeExport.
func (s *Server) openExport(ctx context.Context, name string) (*export, error) {
	if name == "" {
		names, err := s.exports.Names(ctx)
		if err != nil {
			return nil, fmt.Errorf("list exports: %w", err)
		}
		if len(names) == 1 {
			name = names[0]
		}
	}
	s.mu.Lock()
	e := s.open[name]
	if e == nil {
		e = &export{name: name, conns: map[*conn]struct{}{}}
		s.open[name] = e
	}
	e.refs++
	s.mu.Unlock()

	e.opening.Lock()
	err := e.openLocked(ctx, s)
	e.opening.Unlock()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open export %q: %w", name, err), s.closeExport(e))
	}
	return e, nil
}

func (e *export) openLocked(ctx context.Context, s *Server) error {
	if e.dev != nil {
		return nil
	}
	dev, err := s.exports.Open(ctx, e.name)
	if err != nil {
		return err
	}
	e.dev, e.size = dev, dev.Size()
	// A read-only disk answers every write with ErrReadOnly, so ask with one
	// that changes nothing.
	err = dev.ZeroAt(ctx, 0, 0)
	e.readOnly = s.o.ReadOnly || errors.Is(err, disk.ErrReadOnly)
	if err != nil && !e.readOnly {
		e.dev = nil
		return errors.Join(fmt.Errorf("try a write: %w", err), dev.Close())
	}
	return nil
}

// closeExport gives back what openExport returned. The error is that of
// closing the disk.
func (s *Server) closeExport(e *export) error {
	e.opening.Lock()
	defer e.opening.Unlock()
	s.mu.Lock()
	e.refs--
	last := e.refs == 0
	s.mu.Unlock()
	if !last {
		return nil
	}
	var err error
	if e.dev != nil {
		if err = e.dev.Close(); err != nil {
			err = fmt.Errorf("close export %q: %w", e.name, err)
		}
		e.dev = nil
	}
	s.mu.Lock()
	// Somebody may have come meanwhile and wait to open it again.
	if e.refs == 0 {
		delete(s.open, e.name)
	}
	s.mu.Unlock()
	return err
}

// flags are the transmission flags of the export.
func (e *export) flags(structured bool) uint16 {
	f := uint16(flagHasFlags | flagSendFlush | flagSendFUA | flagCanMultiConn | flagSendCache)
	if structured {
		f |= flagSendDF
	}
	if e.readOnly {
		return f | flagReadOnly
	}
	return f | flagSendTrim | flagSendWriteZeroes | flagSendFastZero
}

// flush makes every write that returned before it was called survive a loss of
// power. A flush of the disk that began after the call serves all that waited
// for it.
func (e *export) flush(ctx context.Context) error {
	if e.readOnly {
		return nil
	}
	e.mu.Lock()
	want := e.begun + 1
	e.mu.Unlock()

	e.flushing.Lock()
	defer e.flushing.Unlock()
	e.mu.Lock()
	covered := e.begun >= want
	if !covered {
		e.begun++
	}
	begun := e.begun
	e.mu.Unlock()
	if !covered {
		// It serves other connections too, so this one's end must not end it.
		if err := e.dev.Flush(context.WithoutCancel(ctx)); err != nil {
			e.failed, e.err = begun, err
		}
	}
	// A later flush that succeeds says nothing about what an earlier one
	// could not write.
	if e.failed >= want {
		return e.err
	}
	return nil
}

// join makes c one of the export's connections once every request of its
// broken connections is finished; see the package comment.
func (e *export) join(ctx context.Context, c *conn) {
	e.mu.Lock()
	var gone []*conn
	for o := range e.conns {
		if o.ended.Load() || hungUp(o.raw) {
			gone = append(gone, o)
		}
	}
	e.conns[c] = struct{}{}
	e.mu.Unlock()
	for _, o := range gone {
		select {
		case <-o.finished:
		case <-ctx.Done():
			o.abort(context.Cause(ctx))
			<-o.finished
		}
	}
}

// leave undoes join, if there was one.
func (e *export) leave(c *conn) {
	e.mu.Lock()
	delete(e.conns, c)
	e.mu.Unlock()
}
