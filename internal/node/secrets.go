package node

import (
	"slices"
	"strings"

	"holdfast/internal/blob/s3"
)

// withoutSecrets is an environment without passphrases and the keys of S3:
// what a process gets, anybody who may look at it can read. What names a file or
// a profile stays.
func withoutSecrets(env []string) []string {
	var kept []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		passphrase := strings.HasPrefix(name, "HOLDFAST_") && strings.Contains(name, "PASSPHRASE")
		if !passphrase && !slices.Contains(s3.Secrets, name) {
			kept = append(kept, e)
		}
	}
	return kept
}
