package node

import "strings"

// withoutSecrets is an environment without the passphrase: what a process
// gets, anybody who may look at it can read.
func withoutSecrets(env []string) []string {
	var kept []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if name != "HOLDFAST_PASSPHRASE" && name != "HOLDFAST_PASSPHRASE_FILE" {
			kept = append(kept, e)
		}
	}
	return kept
}
