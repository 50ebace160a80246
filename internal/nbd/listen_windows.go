package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
)

// ListenUnix listens on a Unix socket at path. The socket file of a dead
// server is replaced; one that answers is an error. Mode and owner cannot be
// set on Windows, where the directory's permissions decide.
func ListenUnix(ctx context.Context, path string, o SocketOptions) (net.Listener, error) {
	if o.Chown {
		return nil, fmt.Errorf("listen on %s: owner of a socket: %w", path, errors.ErrUnsupported)
	}
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		nc.Close()
		return nil, fmt.Errorf("listen on %s: another server listens there", path)
	}
	const refused = syscall.Errno(10061) // WSAECONNREFUSED
	if errors.Is(err, refused) {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("listen on %s: %w", path, err)
		}
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}
