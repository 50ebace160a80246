package harden

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// watcher waits for new files in a directory, also those that come through a
// server for network mounts on this machine (inotify(7)).
type watcher struct{ fd int }

func watch(dir string) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO|unix.IN_ONLYDIR); err != nil {
		return nil, errors.Join(&os.PathError{Op: "watch", Path: dir, Err: err}, unix.Close(fd))
	}
	return &watcher{fd}, nil
}

func (w *watcher) Close() error { return unix.Close(w.fd) }

// wait returns when something came, when the time is over, or soon after ctx
// has ended.
func (w *watcher) wait(ctx context.Context, most time.Duration) error {
	const slice = 200 * time.Millisecond
	for end := time.Now().Add(most); ctx.Err() == nil && time.Now().Before(end); {
		p := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(slice.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return os.NewSyscallError("poll", err)
		case n > 0:
			var events [4096]byte // what came is looked for in the directory
			for {
				if n, err := unix.Read(w.fd, events[:]); n <= 0 || err != nil {
					return nil
				}
			}
		}
	}
	return nil
}
