package blob

import (
	"errors"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

func (osFiles) nameless(dir string) (newFile, error) {
	fd, err := unix.Open(dir, unix.O_WRONLY|unix.O_TMPFILE|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOENT) {
		return nil, errNameless
	} else if err != nil {
		return nil, &os.PathError{Op: "create", Path: dir, Err: err}
	}
	return namelessFile{os.NewFile(uintptr(fd), dir)}, nil
}

type namelessFile struct{ f *os.File }

func (n namelessFile) Write(p []byte) (int, error) { return write(n.f, p) }
func (n namelessFile) Close() error                { return n.f.Close() }

// Sync makes the content durable, and with it that the file is read-only.
func (n namelessFile) Sync() error {
	if err := n.f.Chmod(0o400); err != nil {
		return err
	}
	return n.f.Sync()
}

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

// linked reports whether a file has a second name: a link over a network may be
// made and its answer be lost, and then the retry says that the name is taken
// (open(2), on O_EXCL).
func linked(path string) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && st.Nlink == 2
}

// noLinks reports whether a filesystem has no hard links, by what link(2) said.
func noLinks(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS)
}

// renameNew moves a file to a name that nothing has yet.
func renameNew(from, to string) error {
	if err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE); err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// flagImmutable is FS_IMMUTABLE_FL of linux/fs.h.
const flagImmutable = 0x10

// immutable reads a file's immutable attribute, where the filesystem shows it:
// a client of SMB answers the question, and knows nothing of it.
func immutable(path string) (set, known bool) {
	f, err := os.Open(path)
	if err != nil {
		return false, false
	}
	defer f.Close()
	var s unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &s); err != nil {
		return false, false
	}
	switch int64(uint32(s.Type)) {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC, unix.F2FS_SUPER_MAGIC, unix.TMPFS_MAGIC:
	default:
		return false, false
	}
	flags, err := unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	return err == nil && flags&flagImmutable != 0, err == nil
}
