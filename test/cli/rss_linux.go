package cli

import "syscall"

// maxRSS is in bytes; Linux counts in KiB (getrusage(2)).
func maxRSS(ru *syscall.Rusage) int64 { return ru.Maxrss << 10 }
