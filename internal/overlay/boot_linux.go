package overlay

import (
	"encoding/hex"
	"os"
	"strings"
)

// bootID identifies this run of the machine: a random UUID that the kernel
// makes at boot. proc(5), /proc/sys/kernel/random/boot_id.
func bootID() (b boot) {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return boot{}
	}
	id, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(string(text)), "-", ""))
	if err != nil || len(id) != len(b) {
		return boot{}
	}
	return boot(id)
}
