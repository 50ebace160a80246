//go:build unix

package nbd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxSocketPath is the longest path, in bytes, that every Unix can bind and
// connect to.
const maxSocketPath = 103

// ListenUnix listens on a Unix socket at path. The socket file of a dead
// server is replaced; one that answers, or a file that is no socket, is an
// error. The file appears with its mode and owner set, and is removed when the
// listener is closed, if it is still the same. Servers that start at the same
// time do not take each other's place.
func ListenUnix(ctx context.Context, path string, o SocketOptions) (net.Listener, error) {
	l, err := listenUnix(ctx, path, o)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

func listenUnix(ctx context.Context, path string, o SocketOptions) (*socket, error) {
	// The socket is made beside its place and then moved there.
	dir := filepath.Dir(path)
	tmp := filepath.Join(dir, ".nbd"+rand.Text()[:6])
	if len(tmp) > maxSocketPath || len(path) > maxSocketPath {
		return nil, fmt.Errorf("path is too long for a socket (%d bytes at most)", maxSocketPath-len(filepath.Base(tmp)))
	}
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	var lc net.ListenConfig
	nl, err := lc.Listen(ctx, "unix", tmp)
	if err != nil {
		return nil, err
	}
	l := nl.(*net.UnixListener)
	l.SetUnlinkOnClose(false)
	info, err := place(tmp, path, o)
	if err != nil {
		return nil, errors.Join(err, l.Close(), os.Remove(tmp))
	}
	return &socket{l: l, path: path, info: info}, nil
}

// place sets the socket file's mode and owner and moves it to its path.
func place(tmp, path string, o SocketOptions) (fs.FileInfo, error) {
	set(&o.Mode, 0o600)
	if err := os.Chmod(tmp, fs.FileMode(o.Mode).Perm()); err != nil {
		return nil, err
	}
	if o.Chown {
		if err := os.Lchown(tmp, o.UID, o.GID); err != nil {
			return nil, err
		}
	}
	info, err := os.Lstat(tmp)
	if err != nil {
		return nil, err
	}
	return info, os.Rename(tmp, path)
}

// lockDir keeps other servers of ours from looking at the directory's sockets.
func lockDir(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", dir, err), d.Close())
	}
	return func() { d.Close() }, nil // which unlocks
}

// removeStale removes a socket at path that nobody listens on.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return errors.New("the file exists and is no socket")
	}
	var d net.Dialer
	nc, err := d.DialContext(ctx, "unix", path)
	if err == nil {
		nc.Close()
		return errors.New("another server listens there")
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("is the socket alive: %w", err)
	}
	return os.Remove(path)
}

// socket is a Unix listener that removes its file.
type socket struct {
	l    *net.UnixListener
	path string
	info fs.FileInfo
	once sync.Once
}

func (s *socket) Accept() (net.Conn, error) { return s.l.Accept() }
func (s *socket) Addr() net.Addr            { return &net.UnixAddr{Name: s.path, Net: "unix"} }

func (s *socket) Close() error {
	s.once.Do(func() {
		if now, err := os.Lstat(s.path); err == nil && os.SameFile(now, s.info) {
			os.Remove(s.path)
		}
	})
	return s.l.Close()
}
