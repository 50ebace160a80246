package blob

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

func (osFiles) nameless(dir string) (newFile, error) {
	fd, err := unix.Open(dir, unix.O_WRONLY|unix.O_TMPFILE|unix.O_CLOEXEC, 0o400)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOENT) {
		return nil, errNameless
	} else if err != nil {
		return nil, &os.PathError{Op: "create", Path: dir, Err: err}
	}
	return namelessFile{os.NewFile(uintptr(fd), dir)}, nil
}

type namelessFile struct{ f *os.File }

func (n namelessFile) Write(p []byte) (int, error) { return n.f.Write(p) }
func (n namelessFile) Sync() error                 { return n.f.Sync() }
func (n namelessFile) Close() error                { return n.f.Close() }

// link goes through /proc, which needs no privilege, unlike AT_EMPTY_PATH (open(2)).
func (n namelessFile) link(path string) error {
	err := unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(int(n.f.Fd())), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	if errors.Is(err, unix.ENOENT) { // no /proc
		return errNameless
	} else if err != nil {
		return &os.LinkError{Op: "link", Old: "nameless file", New: path, Err: err}
	}
	return nil
}
