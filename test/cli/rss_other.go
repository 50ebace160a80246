//go:build !linux

package cli

import "syscall"

// maxRSS is not measured here.
func maxRSS(*syscall.Rusage) int64 { return 0 }
