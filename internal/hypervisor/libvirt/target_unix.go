//go:build unix

package libvirt

import (
	"bufio"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// freeSpace is what an unprivileged process may still write, in bytes.
func freeSpace(dir string) (int64, error) {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(min(uint64(st.Bavail), 1<<62/uint64(st.Bsize)) * uint64(st.Bsize)), nil
}

// reachable makes sure that QEMU, which runs as a user of its own, can get to
// a directory: libvirt gives it the file but not the way there.
func reachable(dir string) error {
	uid, gid, ok := QEMUUser()
	if !ok || uid == 0 || os.Geteuid() != 0 {
		return nil // it is the same user, or cannot be told
	}
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	for ; ; dir = filepath.Dir(dir) {
		fi, err := os.Stat(dir)
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		need := os.FileMode(0o001)
		switch {
		case int(st.Uid) == uid:
			need = 0o100
		case int(st.Gid) == gid:
			need = 0o010
		}
		// An access list may allow what the mode does not: its mask shows as
		// the group's bits.
		if fi.Mode()&need == 0 && fi.Mode()&0o010 == 0 {
			return fmt.Errorf("QEMU (uid %d) cannot enter %s, which is on the way to the storage: choose another directory or chmod o+x it", uid, dir)
		}
		if dir == filepath.Dir(dir) {
			return nil
		}
	}
}

// QEMUUser says as which user this machine's libvirtd runs guests: a socket
// that they shall connect to must be theirs. ok is false when libvirt is not
// installed here.
func QEMUUser() (uid, gid int, ok bool) {
	names := []string{configured("/etc/libvirt/qemu.conf", "user"), "libvirt-qemu", "qemu"}
	for _, name := range names {
		if name == "" {
			continue
		}
		u, err := user.Lookup(name)
		if id, numeric := strings.CutPrefix(name, "+"); numeric {
			u, err = user.LookupId(id)
		}
		if err != nil {
			continue
		}
		uid, err1 := strconv.Atoi(u.Uid)
		gid, err2 := strconv.Atoi(u.Gid)
		if err1 == nil && err2 == nil {
			return uid, gid, true
		}
	}
	return 0, 0, false
}

// configured reads a string setting of libvirt's configuration files.
func configured(file, key string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	value := ""
	for s := bufio.NewScanner(f); s.Scan(); {
		k, v, ok := strings.Cut(s.Text(), "=")
		if ok && strings.TrimSpace(k) == key {
			value = strings.Trim(strings.TrimSpace(v), `"`)
		}
	}
	return value
}
