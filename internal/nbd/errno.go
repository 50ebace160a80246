package nbd

import (
	"context"
	"errors"

	"holdfast/internal/disk"
)

// errShutdown is the cause with which requests are cancelled when the time for
// a graceful end is over.
var errShutdown = errors.New("server is shutting down")

// errnoOf is the answer to a request that ended with err (proto, "Error
// values"). Whatever has no better name is EIO.
func errnoOf(err error) Errno {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errNotFast):
		return ENOTSUP
	case errors.Is(err, disk.ErrReadOnly):
		return EPERM
	case errors.Is(err, disk.ErrRange):
		return EINVAL
	case errors.Is(err, errShutdown), errors.Is(err, context.Canceled):
		return ESHUTDOWN
	case noSpace(err):
		return ENOSPC
	}
	return EIO
}
