// Package nbd serves disks over the Network Block Device protocol, and reads
// and writes the disks that others serve with it. QEMU is the peer that counts
// most: it runs guests from our exports, and we pull backups from its own.
//
// "proto" in comments is the protocol document (NetworkBlockDevice/nbd,
// doc/proto.md) with its section, "uri" its companion doc/uri.md. Only the
// fixed newstyle handshake is spoken, with structured replies, metadata
// contexts, TLS and size constraints; extended (64-bit) headers and resize are
// not.
//
// # Server
//
//	listener ─ Serve ─ conn ─ handshake ─ transmit ─┬ handle ─┐
//	                                       (reader)  ├ handle ─┼─ outbox ─ socket
//	                                                 └ handle ─┘
//
// One goroutine per connection reads requests, and answers short reads of what
// the disk has in memory (disk.Cached) itself. Each other request is handled in a
// goroutine of its own, so a slow read delays nobody. Replies leave through an
// outbox: the first goroutine with a reply writes it together with all that
// others add meanwhile, in one system call; the reader writes when it would have
// to wait. A reply's header and payload lie in one pooled buffer.
//
// What a peer can make us hold is bounded: requests per connection, bytes of
// payload per connection and per server, connections per server. When a bound
// is reached the reader waits, which the peer feels as a full socket. A peer
// that stalls in mid-message or does not take its replies is dropped.
//
// All connections to one export share one open disk. That is what makes
// NBD_FLAG_CAN_MULTI_CONN true: a flush on any of them is a flush of the disk.
// Flushes that wait at the same time are answered by one.
//
// A client whose connection broke connects again and repeats the requests that
// were not answered. Were the first copy of a write still under way then, it
// could land after, and over, a later write. So a new connection is let into
// an export only after all requests of its broken connections are finished.
//
// Lock order: Server.mu, then export.mu. outbox.mu and Client locks nest in
// nothing. No lock is held during I/O on a disk; the one exception is
// export.opening, which exists to serialise opening and closing.
//
// # Client
//
// Client is a disk.Device over one or several connections. Any number of
// requests may be under way; a sender goroutine per connection writes them, a
// receiver goroutine matches replies by cookie and reads payload straight into
// the caller's slice. A request that is cancelled leaves the stream intact: it
// is taken back if it was not yet sent, else its reply is read and dropped.
// When the connection breaks, every waiting request fails with ErrLost; the
// Client does not connect again, since only its owner knows whether writes
// that were not flushed may be forgotten.
package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"syscall"

	"holdfast/internal/disk"
)

var (
	// ErrLost is returned by every request of a Client whose connection broke.
	ErrLost = errors.New("connection to the NBD server was lost")
	// ErrProtocol is returned when the peer breaks the protocol.
	ErrProtocol = errors.New("peer broke the NBD protocol")
	// ErrUnknownExport is returned by Dial when the server has no such export.
	ErrUnknownExport = errors.New("no such NBD export")
	// ErrTLSRequired is returned by Dial when the server wants TLS and none was asked for.
	ErrTLSRequired = errors.New("NBD server requires TLS")
	// ErrNoContext is returned by Client.Status and Client.Dirty for a
	// metadata context that the server did not grant.
	ErrNoContext = errors.New("NBD server does not offer this metadata context")
)

// Errno is an error that an NBD server answered a request with (proto, "Error
// values"). Matched with errors.Is it equals its nearest kin in Go.
type Errno uint32

// The errors of the protocol.
const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

var errnoText = map[Errno]string{
	EPERM:     "operation not permitted",
	EIO:       "input/output error",
	ENOMEM:    "out of memory",
	EINVAL:    "invalid request",
	ENOSPC:    "no space left",
	EOVERFLOW: "request too large",
	ENOTSUP:   "not supported",
	ESHUTDOWN: "server is shutting down",
}

func (e Errno) Error() string {
	if s := errnoText[e]; s != "" {
		return "NBD server answers: " + s
	}
	return fmt.Sprintf("NBD server answers: error %d", uint32(e))
}

// Is makes EPERM fs.ErrPermission and disk.ErrReadOnly, ENOSPC
// syscall.ENOSPC, ENOTSUP errors.ErrUnsupported.
func (e Errno) Is(target error) bool {
	switch e {
	case EPERM:
		return target == fs.ErrPermission || target == disk.ErrReadOnly
	case ENOSPC:
		return target == syscall.ENOSPC
	case ENOTSUP:
		return target == errors.ErrUnsupported
	}
	return false
}
