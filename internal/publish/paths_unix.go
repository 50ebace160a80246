//go:build unix

package publish

import (
	"os"
	"path/filepath"
)

func runDir(fallback string) string {
	if os.Geteuid() == 0 {
		return "/run/holdfast"
	}
	if d := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(d) {
		return filepath.Join(d, "holdfast")
	}
	return filepath.Join(fallback, "run")
}
