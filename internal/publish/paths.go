package publish

import (
	"os"
	"path/filepath"
)

// SocketPath is where the Unix socket of a session lies: not in the state
// directory, which is closed to all others, but where the host's QEMU, which
// runs as a user of its own, gets to. Directories on the way can be passed and
// not listed. fallback, a directory, is used where there is no /run to write
// to.
func SocketPath(session, fallback string) string {
	return filepath.Join(runDir(fallback), session, "nbd")
}

// RemoveSocketDir removes what SocketPath and Serve left of a session.
func RemoveSocketDir(session, fallback string) error {
	return os.RemoveAll(filepath.Join(runDir(fallback), session))
}
