package nbd

import (
	"context"
	"fmt"
	"net"
)

// DefaultPort is the TCP port of NBD (proto, "Newstyle negotiation").
const DefaultPort = "10809"

// ListenTCP listens on HOST:PORT; the port may be missing.
func ListenTCP(ctx context.Context, addr string) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", withPort(addr))
	if err != nil {
		return nil, fmt.Errorf("listen for NBD clients: %w", err)
	}
	return l, nil
}

// withPort adds the default port to an address without one.
func withPort(addr string) string {
	if _, _, err := net.SplitHostPort(addr); err == nil {
		return addr
	}
	if len(addr) > 1 && addr[0] == '[' && addr[len(addr)-1] == ']' {
		addr = addr[1 : len(addr)-1]
	}
	return net.JoinHostPort(addr, DefaultPort)
}

// SocketOptions of ListenUnix.
type SocketOptions struct {
	// Mode of the socket file; 0: 0600. Connecting needs write permission.
	Mode uint32
	// Chown gives the file to UID and GID, as QEMU runs as another user; -1
	// leaves one as it is.
	Chown    bool
	UID, GID int
}
