package libvirt

import "errors"

// No libvirt host is a Windows machine: its files are always another's.

func freeSpace(string) (int64, error) { return 0, errors.ErrUnsupported }

func reachable(string) error { return nil }

// QEMUUser: there is none here.
func QEMUUser() (uid, gid int, ok bool) { return 0, 0, false }
