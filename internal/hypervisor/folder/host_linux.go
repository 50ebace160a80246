package folder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// noWait keeps an open from hanging on a pipe that took an image's name.
const noWait = unix.O_NONBLOCK

// stampOf reads a file's stamp. The change time cannot be set by anybody.
func stampOf(f *os.File) (stamp, error) {
	info, err := f.Stat()
	if err != nil {
		return stamp{}, err
	}
	st := stamp{size: info.Size(), written: info.ModTime()}
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		st.changed = time.Unix(sys.Ctim.Unix())
		st.id = [2]uint64{uint64(sys.Dev), sys.Ino}
	}
	return st, nil
}

// reflink makes a clone of f in a directory of the root. Its name is removed
// before it holds anything, so that it is gone with the process.
// ioctl_ficlone(2): the clone is atomic against writers.
func reflink(root *os.Root, dir, name string, f *os.File) (*os.File, error) {
	rel := filepath.FromSlash(path.Join(dir, name))
	g, err := root.OpenFile(rel, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("clone %s: %w", f.Name(), err)
	}
	err = root.Remove(rel)
	if err == nil {
		err = unix.IoctlFileClone(int(g.Fd()), int(f.Fd()))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("clone %s: %w", f.Name(), err), g.Close())
	}
	return g, nil
}

// writers tells who has files open for writing, by their indexes: as far as
// QEMU's locks, the open files of the processes that this one may look at, and
// loop devices show it.
func writers(ctx context.Context, files []*os.File) (map[int]string, error) {
	who := map[int]string{}
	index := map[[2]uint64]int{} // of a file's id; hard links give one twice, and one is enough
	same := map[int]int{}
	for i, f := range files {
		st, err := stampOf(f)
		if err != nil {
			return nil, err
		}
		if first, ok := index[st.id]; ok {
			same[i] = first
			continue
		}
		index[st.id] = i
		locked, err := lockedByQEMU(f)
		if err != nil {
			return nil, fmt.Errorf("look for locks of %s: %w", f.Name(), err)
		}
		if locked {
			who[i] = "locked by QEMU for writing"
		}
	}
	if len(files) == 0 {
		return who, nil
	}
	loopWriters(index, who)
	if err := processWriters(ctx, index, who); err != nil {
		return nil, err
	}
	for i, first := range same {
		if w, ok := who[first]; ok {
			who[i] = w
		}
	}
	return who, nil
}

// lockedByQEMU reports whether somebody holds the locks that QEMU holds for the
// permissions to write (byte 101) or resize (byte 103): QEMU's block/file-posix
// takes shared locks at 100 plus the number of each permission it uses.
// fcntl(2), F_OFD_GETLK, which also sees classic locks.
func lockedByQEMU(f *os.File) (bool, error) {
	for _, at := range []int64{101, 103} {
		lk := unix.Flock_t{Type: unix.F_WRLCK, Whence: unix.SEEK_SET, Start: at, Len: 1}
		err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lk)
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOLCK), errors.Is(err, unix.EOPNOTSUPP):
			return false, nil // a filesystem without locks
		case err != nil:
			return false, err
		case lk.Type != unix.F_UNLCK:
			return true, nil
		}
	}
	return false, nil
}

// processWriters looks at the open files of all processes that it may look at.
func processWriters(ctx context.Context, index map[[2]uint64]int, who map[int]string) error {
	pids, err := os.ReadDir("/proc")
	if err != nil {
		return nil // not mounted: the other signs must do
	}
	for _, p := range pids {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		dir := "/proc/" + p.Name()
		fds, err := os.ReadDir(dir + "/fd")
		if err != nil {
			continue // ended, or not ours to look at
		}
		for _, fd := range fds {
			var st unix.Stat_t
			if unix.Stat(dir+"/fd/"+fd.Name(), &st) != nil {
				continue
			}
			i, ok := index[[2]uint64{uint64(st.Dev), st.Ino}]
			if ok && who[i] == "" && opensForWriting(dir+"/fdinfo/"+fd.Name()) {
				comm, _ := os.ReadFile(dir + "/comm")
				who[i] = fmt.Sprintf("process %s, %s, has it open for writing", p.Name(), strings.TrimSpace(string(comm)))
			}
		}
	}
	return nil
}

// opensForWriting reads the flags of an open file: proc_pid_fdinfo(5), octal.
func opensForWriting(fdinfo string) bool {
	b, err := os.ReadFile(fdinfo)
	if err != nil {
		return false // closed meanwhile
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "flags:"); ok {
			flags, err := strconv.ParseUint(strings.TrimSpace(v), 8, 64)
			return err == nil && flags&unix.O_ACCMODE != unix.O_RDONLY && flags&unix.O_PATH == 0
		}
	}
	return false
}

// loopWriters looks at loop devices that are not read-only: the kernel itself
// has their files open.
func loopWriters(index map[[2]uint64]int, who map[int]string) {
	list, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, backing := range list {
		name, err := os.ReadFile(backing)
		if err != nil {
			continue
		}
		dev := filepath.Dir(filepath.Dir(backing))
		ro, err := os.ReadFile(filepath.Join(dev, "ro"))
		var st unix.Stat_t
		if err != nil || strings.TrimSpace(string(ro)) != "0" || unix.Stat(strings.TrimRight(string(name), "\n"), &st) != nil {
			continue
		}
		if i, ok := index[[2]uint64{uint64(st.Dev), st.Ino}]; ok && who[i] == "" {
			who[i] = fmt.Sprintf("attached to /dev/%s", filepath.Base(dev))
		}
	}
}
