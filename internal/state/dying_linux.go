package state

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// dying reports whether a process was killed and is on its way out: SIGKILL is
// pending for it (proc_pid_status(5): ShdPnd, a mask of signals), or its main
// thread has ended already.
func dying(pid int) bool {
	p, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true // gone
	}
	const sigkill = 1 << (9 - 1)
	for line := range strings.Lines(string(p)) {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch name {
		case "State":
			if strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X") {
				return true
			}
		case "SigPnd", "ShdPnd":
			if mask, err := strconv.ParseUint(value, 16, 64); err == nil && mask&sigkill != 0 {
				return true
			}
		}
	}
	return false
}
