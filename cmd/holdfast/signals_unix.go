//go:build unix

package main

import (
	"os"
	"syscall"
)

var stopSignals = []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP}

// readableByAll reports whether anybody on this machine may read a file.
func readableByAll(fi os.FileInfo) bool { return fi.Mode().Perm()&0o004 != 0 }
