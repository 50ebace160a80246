package blob

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

func invalid(err error) bool { return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) }

// dropCache makes the next read of a file come from its disk or server, as far
// as the filesystem follows the hint.
func dropCache(path string) {
	f, err := os.Open(path)
	if err != nil {
		return // the read that follows says so
	}
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	_ = f.Close()
}

// pretends are mount options with which a sync returns before anything is
// durable: ext4(5), mount.cifs(8), and the kernel's overlayfs documentation.
var pretends = []struct{ types, option, instead string }{
	{"ext2 ext3 ext4 xfs btrfs reiserfs", "nobarrier", "barrier"},
	{"ext3 ext4", "barrier=0", "barrier=1"},
	{"cifs smb3", "nostrictsync", "strictsync"},
	{"overlay", "volatile", "no such option"},
}

// pretending refuses a directory that is mounted so that a sync is pretended.
func pretending(dir string) error {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil // nothing can be learned
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	return pretendedBy(string(text), dir)
}

// pretendedBy looks for the last of the mounts with the longest path to dir in
// the text of mountinfo (proc_pid_mountinfo(5)).
func pretendedBy(text, dir string) error {
	var at, fsType, options string
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	for line := range strings.Lines(text) {
		mount, super, ok := strings.Cut(line, " - ")
		m, s := strings.Fields(mount), strings.Fields(super)
		if !ok || len(m) < 6 || len(s) < 3 {
			continue
		}
		point := unescape.Replace(m[4])
		if len(point) >= len(at) && (dir == point || strings.HasPrefix(dir, strings.TrimSuffix(point, "/")+"/")) {
			at, fsType, options = point, s[0], m[5]+","+s[2]
		}
	}
	for _, p := range pretends {
		for _, t := range strings.Fields(p.types) {
			if t == fsType && strings.Contains(","+options+",", ","+p.option+",") {
				return fmt.Errorf("%w: %s is mounted with the option %s, with which nothing is safe that was synced; mount it with %s", ErrUnfit, at, p.option, p.instead)
			}
		}
	}
	return nil
}
