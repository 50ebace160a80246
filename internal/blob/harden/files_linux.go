package harden

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// flagImmutable is FS_IMMUTABLE_FL of linux/fs.h.
const flagImmutable = 0x10

// root is the store's directory. All that the writer has a hand in is opened
// from here, and never through a link, out of the directory or onto another
// filesystem (openat2(2)).
type root struct {
	fd   int
	path string
	// patient is until when a file is waited for that somebody has a lease on: a
	// server for network mounts gives such leases, and takes them back.
	patient time.Time
}

func openRoot(path string) (*root, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &root{fd: fd, path: path}, nil
}

func (r *root) close() error { return unix.Close(r.fd) }

func (r *root) open(name string, flags int) (*os.File, error) {
	if flags&unix.O_PATH == 0 {
		flags |= unix.O_NONBLOCK | unix.O_NOCTTY // who opens a pipe does not wait
	}
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	for tries := 0; ; tries++ {
		fd, err := unix.Openat2(r.fd, name, &how)
		switch {
		case err == nil:
			return os.NewFile(uintptr(fd), name), nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN) && tries < 3: // something was renamed meanwhile
			continue
		case errors.Is(err, unix.EAGAIN) && time.Now().Before(r.patient):
			time.Sleep(5 * time.Millisecond)
			continue
		case errors.Is(err, unix.EAGAIN):
			err = fmt.Errorf("somebody has a lease on it: %w", err)
		case errors.Is(err, unix.ENOSYS):
			err = fmt.Errorf("%w: openat2 needs Linux 5.6", err)
		}
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
}

func statFile(f *os.File) (st unix.Stat_t, err error) {
	err = unix.Fstat(int(f.Fd()), &st)
	return st, err
}

func isRegular(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFREG }

// sound reports whether the writer can neither rename nor remove what others
// have put into a directory, nor the directory's own entries of theirs.
func sound(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Uid == 0 && (st.Mode&0o022 == 0 || st.Mode&unix.S_ISVTX != 0)
}

// soundTo sees that all directories from the store's own to a name are sound.
// They stay so, as they are root's.
func (k *Keeper) soundTo(name string) error {
	for dir := path.Dir(name); ; dir = path.Dir(dir) {
		if k.sound[dir] {
			return nil
		}
		f, err := k.root.open(dir, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		st, err := statFile(f)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
		if !sound(&st) {
			return fmt.Errorf("its directory %s is not root's: run \"holdfast harden\" with --user again", dir)
		}
		if dir == "." {
			break
		}
	}
	for dir := path.Dir(name); ; dir = path.Dir(dir) {
		if k.sound[dir] = true; dir == "." {
			return nil
		}
	}
}

func flagsOf(f *os.File) (uint32, error) {
	return unix.IoctlGetUint32(int(f.Fd()), unix.FS_IOC_GETFLAGS)
}

func isImmutable(f *os.File) (bool, error) {
	flags, err := flagsOf(f)
	return flags&flagImmutable != 0, err
}

// setImmutable sets or removes the attribute.
func setImmutable(f *os.File, on bool) error {
	flags, err := flagsOf(f)
	if err != nil {
		return err
	}
	want := flags &^ flagImmutable
	if on {
		want |= flagImmutable
	}
	if want == flags {
		return nil
	}
	return unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, int(want))
}

// openForWriting reports whether anybody has the file open for writing: the
// attribute only keeps others from opening it so, and not all filesystems ask
// for it at each write. A lease for reading is refused then (fcntl(2)).
func openForWriting(f *os.File) (bool, error) {
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
	if errors.Is(err, unix.EAGAIN) {
		return true, nil
	} else if err != nil {
		return false, err
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK)
	return false, err
}

// now reads the machine's clocks.
func now() (instant, error) {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return instant{}, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return instant{}, err
	}
	return instant{time.Now().Round(0), string(bytes.TrimSpace(boot)), time.Duration(ts.Nano())}, nil
}

// isHex reports whether s is n lower-case hex digits.
func isHex(s string, n int) bool { return len(s) == n && strings.Trim(s, "0123456789abcdef") == "" }
