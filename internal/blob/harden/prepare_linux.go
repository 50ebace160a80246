package harden

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/blob"
)

// fleeting are filesystems that have the attribute, or another machine's, and
// do not keep it (statfs(2)).
var fleeting = map[int64]string{
	unix.TMPFS_MAGIC:           "tmpfs: it is gone with a restart",
	unix.RAMFS_MAGIC:           "ramfs: it is gone with a restart",
	unix.NFS_SUPER_MAGIC:       "NFS: run this on the server",
	unix.SMB_SUPER_MAGIC:       "SMB: run this on the server",
	0xff534d42:                 "SMB: run this on the server",
	0xfe534d42:                 "SMB: run this on the server",
	unix.FUSE_SUPER_MAGIC:      "FUSE: use a filesystem of the kernel's, on the machine that has it",
	unix.OVERLAYFS_SUPER_MAGIC: "overlay: use the filesystem below",
}

// Prepare hardens a directory that has a repository, or tells what it would do.
// Directories become root's, objects the writer's. It may be called again, after
// a crash or with other settings; locks stay.
func Prepare(s Setup, dryRun bool) (done []string, err error) {
	p := preparation{dryRun: dryRun, mark: Mark{Version: 1, Longest: int64((s.Longest) / time.Second)}}
	if s.Longest <= 0 {
		p.mark.Longest = int64(Longest / time.Second)
	}
	if err := p.prepare(s); err != nil {
		return p.done, fmt.Errorf("harden %s: %w", s.Dir, err)
	}
	return p.done, nil
}

type preparation struct {
	dryRun bool
	mark   Mark
	root   *root
	done   []string
}

// will notes what is done, and reports whether to do it.
func (p *preparation) will(format string, args ...any) bool {
	p.done = append(p.done, fmt.Sprintf(format, args...))
	return !p.dryRun
}

func (p *preparation) prepare(s Setup) (err error) {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: run it as root", ErrNotRoot)
	}
	if p.mark.User, p.mark.UID, p.mark.GID, err = writer(s.User); err != nil {
		return err
	}
	dir, err := real(s.Dir)
	if err != nil {
		return err
	}
	if err := safeAbove(dir, p.mark.UID); err != nil {
		return err
	}
	if p.root, err = openRoot(dir); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.root.close()) }()
	if err := p.fits(); err != nil {
		return err
	}
	const shared = unix.S_ISVTX | 0o770 // for the writer to add to
	if err := p.dir(".", p.mark.GID, shared); err != nil {
		return err
	}
	if err := p.dir(blob.HardenDir, 0, 0o755); err != nil {
		return err
	}
	unlock, err := p.guard()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if err := p.attribute(); err != nil {
		return err
	}
	if err := p.dir(blob.HardenAnswers, 0, 0o755); err != nil {
		return err
	}
	for _, name := range slices.Concat(s.Places, []string{blob.HardenRequests, blob.HardenCanaries}) {
		if err := p.dir(name, p.mark.GID, shared); err != nil {
			return err
		}
	}
	for _, name := range append([]string{"."}, s.Places...) {
		if err := p.give(name); err != nil {
			return err
		}
	}
	return p.record()
}

// fits sees that there is a repository on a filesystem that keeps locks.
func (p *preparation) fits() error {
	f, err := p.root.open("config", unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w (\"holdfast init\" makes one)", ErrNotStore)
	} else if err != nil {
		return err
	}
	defer f.Close()
	st, err := statFile(f)
	if err != nil {
		return err
	}
	if !isRegular(&st) {
		return fmt.Errorf("%w: config is not a file", ErrNotStore)
	}
	var sfs unix.Statfs_t
	if err := unix.Fstatfs(p.root.fd, &sfs); err != nil {
		return err
	}
	if why := fleeting[int64(uint32(sfs.Type))]; why != "" {
		return fmt.Errorf("%w: %s", ErrFilesystem, why)
	}
	if _, err := flagsOf(f); err != nil {
		return fmt.Errorf("%w: it has no immutable attribute (%w); ext4, XFS and Btrfs have", ErrFilesystem, err)
	}
	return nil
}

// guard keeps keepers away meanwhile.
func (p *preparation) guard() (unlock func() error, err error) {
	if p.dryRun {
		return func() error { return nil }, nil
	}
	f, err := os.OpenFile(filepath.Join(p.root.path, blob.HardenDir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: end it first", ErrRuns), f.Close())
	}
	return f.Close, nil
}

// dir makes a directory root's, of that group and mode, and makes it when it is
// missing.
func (p *preparation) dir(name string, gid int, mode uint32) error {
	f, err := p.root.open(name, unix.O_RDONLY|unix.O_DIRECTORY)
	made := errors.Is(err, fs.ErrNotExist)
	if made {
		if !p.will("make %s", name) {
			return nil
		}
		if err := p.mkdir(name); err != nil {
			return err
		}
		f, err = p.root.open(name, unix.O_RDONLY|unix.O_DIRECTORY)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := statFile(f)
	if err != nil {
		return err
	}
	if name == blob.HardenDir && st.Uid != 0 {
		return fmt.Errorf("%w: there is a directory %s that is not root's: remove it", ErrUnsafe, name)
	}
	if st.Uid == 0 && int(st.Gid) == gid && st.Mode&0o7777 == mode {
		return nil
	}
	what := name
	if name == "." {
		what = p.root.path
	}
	if !made && !p.will("give %s to root, mode %o", what, mode) {
		return nil
	}
	if err := errors.Join(unix.Fchown(int(f.Fd()), 0, gid), unix.Fchmod(int(f.Fd()), mode), f.Sync()); err != nil {
		return err
	}
	// Until now its owner could put another one in its place.
	var again unix.Stat_t
	if err := unix.Fstatat(p.root.fd, name, &again, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if again.Dev != st.Dev || again.Ino != st.Ino {
		return fmt.Errorf("%w: somebody moved %s meanwhile: end what works there, and prepare it anew", ErrUnsafe, name)
	}
	return nil
}

func (p *preparation) mkdir(name string) error {
	parent, err := p.root.open(path.Dir(name), unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	err = unix.Mkdirat(int(parent.Fd()), path.Base(name), 0o700)
	return errors.Join(err, parent.Sync(), parent.Close())
}

// give makes the objects in a directory the writer's.
func (p *preparation) give(dir string) error {
	d, err := p.root.open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, fs.ErrNotExist) && p.dryRun {
		return nil
	} else if err != nil {
		return err
	}
	defer d.Close()
	given := 0
	for {
		names, err := d.Readdirnames(1000)
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return err
		}
		for _, name := range names {
			if blob.CheckName(name) != nil {
				continue
			}
			one, err := p.giveOne(path.Join(dir, name))
			if err != nil {
				return err
			}
			given += one
		}
	}
	if given > 0 {
		p.done = append(p.done, fmt.Sprintf("give %d objects in %s to %s", given, dir, p.mark.User))
	}
	return nil
}

func (p *preparation) giveOne(name string) (int, error) {
	f, err := p.root.open(name, unix.O_RDONLY)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) {
		return 0, nil
	} else if err != nil {
		return 0, err
	}
	defer f.Close()
	st, err := statFile(f)
	if err != nil || !isRegular(&st) || st.Nlink != 1 || int(st.Uid) == p.mark.UID {
		return 0, err
	}
	if p.dryRun {
		return 1, nil
	}
	return 1, unix.Fchown(int(f.Fd()), p.mark.UID, p.mark.GID)
}

// attribute tries it in earnest.
func (p *preparation) attribute() (err error) {
	if p.dryRun {
		return nil
	}
	path := filepath.Join(p.root.path, blob.HardenDir, "try")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(path)) }()
	switch err := setImmutable(f, true); {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: CAP_LINUX_IMMUTABLE, to set the immutable attribute (a container may lack it)", ErrNotRoot)
	case err != nil:
		return fmt.Errorf("%w: the immutable attribute: %w", ErrFilesystem, err)
	}
	rmErr := os.Remove(path)
	if err := setImmutable(f, false); err != nil {
		return err
	}
	if rmErr == nil {
		return fmt.Errorf("%w: a file with the immutable attribute could be deleted", ErrFilesystem)
	}
	return nil
}

// record writes what a keeper needs; that the directory is hardened comes last.
func (p *preparation) record() error {
	own := func(name string) string { return filepath.Join(p.root.path, blob.HardenDir, name) }
	mark, err := json.Marshal(p.mark)
	if err != nil {
		return err
	}
	if old, err := os.ReadFile(own("hardened")); err == nil && string(old) == string(mark) {
		if _, err := readClock(own(clockName)); err == nil {
			return nil
		}
	}
	if !p.will("let %s lock objects for up to %s", p.mark.User, days(time.Duration(p.mark.Longest)*time.Second)) {
		return nil
	}
	if err := createJournal(own(journalName)); err != nil {
		return err
	}
	if _, err := readClock(own(clockName)); err != nil {
		i, err := now()
		if err != nil {
			return err
		}
		text, err := json.Marshal(newClock(i))
		if err != nil {
			return err
		}
		if err := writeNew(own(clockName), text, 0o600); err != nil {
			return err
		}
	}
	return writeNew(own("hardened"), mark, 0o644)
}

func days(d time.Duration) string {
	if d%(24*time.Hour) == 0 {
		return fmt.Sprintf("%d days", d/(24*time.Hour))
	}
	return d.String()
}

// writer finds a user by name, or by UID:GID.
func writer(s string) (name string, uid, gid int, err error) {
	if u, g, ok := strings.Cut(s, ":"); ok {
		uid, err = strconv.Atoi(u)
		if err == nil {
			gid, err = strconv.Atoi(g)
		}
	} else {
		var u *user.User
		if u, err = user.Lookup(s); err != nil {
			return "", 0, 0, err
		}
		uid, err = strconv.Atoi(u.Uid)
		if err == nil {
			gid, err = strconv.Atoi(u.Gid)
		}
	}
	if err == nil && (uid <= 0 || gid <= 0) {
		err = errors.New("it must be another user and group than root's")
	}
	if err != nil {
		return "", 0, 0, fmt.Errorf("the writer %q: %w", s, err)
	}
	return s, uid, gid, nil
}

// real is a directory's path without links.
func real(dir string) (string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(abs)
}

// safeAbove sees that the writer cannot move the directory away: none above it
// is his, or writable for others and not sticky.
func safeAbove(dir string, uid int) error {
	for dir != "/" {
		dir = filepath.Dir(dir)
		var st unix.Stat_t
		if err := unix.Lstat(dir, &st); err != nil {
			return &os.PathError{Op: "stat", Path: dir, Err: err}
		}
		if int(st.Uid) == uid || st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0 {
			return fmt.Errorf("%w: who may write to %s could move the directory away: chown root and chmod go-w it", ErrUnsafe, dir)
		}
	}
	return nil
}
