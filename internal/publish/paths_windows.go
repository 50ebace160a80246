package publish

import "path/filepath"

func runDir(fallback string) string { return filepath.Join(fallback, "run") }
