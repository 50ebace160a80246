//go:build unix

package nbd

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

func TestListenUnix(t *testing.T) {
	ctx, dir := t.Context(), scratch(t)
	path := filepath.Join(dir, "s")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()

	o := SocketOptions{Mode: 0o660}
	if os.Geteuid() == 0 {
		o.Chown, o.UID, o.GID = true, 12345, -1
	}
	l, err := ListenUnix(ctx, path, o)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != os.ModeSocket|0o660 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if uid, ok := owner(info); o.Chown && ok && uid != 12345 {
		t.Errorf("owner %d", uid)
	}
	if got := l.Addr().String(); got != path {
		t.Errorf("address %s", got)
	}
	if _, err := ListenUnix(ctx, path, SocketOptions{}); err == nil || !strings.Contains(err.Error(), "another server") {
		t.Errorf("a second one: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("socket after close: %v", err)
	}

	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(ctx, path, SocketOptions{}); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("over a file: %v", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Errorf("file now holds %q", b)
	}
	if _, err := ListenUnix(ctx, filepath.Join(dir, strings.Repeat("x", 100)), SocketOptions{}); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("a long path: %v", err)
	}
	if _, err := ListenUnix(ctx, filepath.Join(dir, "none", "s"), SocketOptions{}); !os.IsNotExist(err) && err == nil {
		t.Errorf("no directory: %v", err)
	}
	names, _ := os.ReadDir(dir)
	if len(names) != 1 {
		t.Errorf("left behind: %v", names)
	}
}

// TestListenRace: of servers that start at once over a dead socket one wins,
// and the socket leads to it.
func TestListenRace(t *testing.T) {
	path := filepath.Join(scratch(t), "s")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	var won atomic.Pointer[net.Listener]
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if l, err := ListenUnix(t.Context(), path, SocketOptions{}); err == nil && !won.CompareAndSwap(nil, &l) {
				t.Error("two won")
			}
		})
	}
	wg.Wait()
	l := *won.Load()
	defer l.Close()
	accepted := make(chan error)
	go func() {
		for range 7 { // those that asked whether it lives
			nc, err := l.Accept()
			if err != nil {
				accepted <- err
				return
			}
			nc.Close()
		}
		accepted <- nil
	}()
	if err := <-accepted; err != nil {
		t.Fatal(err)
	}
	// Another that takes the path does not lose it by our end.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	other, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if nc, err := net.Dial("unix", path); err != nil {
		t.Error(err)
	} else {
		nc.Close()
	}
}

func owner(info os.FileInfo) (uint32, bool) {
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, false
	}
	return s.Uid, true
}
