package blob

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// create makes path with data, durable but for its directory entry; it fails
// with fs.ErrExist when path exists.
func create(path string, data []byte) error {
	fd, err := unix.Open(filepath.Dir(path), unix.O_WRONLY|unix.O_TMPFILE|unix.O_CLOEXEC, 0o400)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOENT) {
		return createNamed(path, data)
	} else if err != nil {
		return &os.PathError{Op: "create", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return err
	}
	// An error of fsync is final for this file: it is never tried again.
	if err := f.Sync(); err != nil {
		return err
	}
	// Linking through /proc needs no privilege, unlike AT_EMPTY_PATH (open(2)).
	err = unix.Linkat(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(fd), unix.AT_FDCWD, path, unix.AT_SYMLINK_FOLLOW)
	if errors.Is(err, unix.ENOENT) { // no /proc
		return createNamed(path, data)
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
