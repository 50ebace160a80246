package node

import "strings"

// withoutSecrets is an environment without passphrases, of other repositories
// too: what a process
// gets, anybody who may look at it can read.
func withoutSecrets(env []string) []string {
	var kept []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if !strings.HasPrefix(name, "HOLDFAST_") || !strings.Contains(name, "PASSPHRASE") {
			kept = append(kept, e)
		}
	}
	return kept
}
