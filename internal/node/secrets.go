package node

import "strings"

// withoutSecrets is an environment without passphrases, of other repositories
// too: what a process
// gets, anybody who may look at it can read.
func withoutSecrets(env []string) []string {
	var kept []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if plain := strings.TrimSuffix(name, "_FILE"); !strings.HasPrefix(plain, "HOLDFAST_") || !strings.HasSuffix(plain, "_PASSPHRASE") {
			kept = append(kept, e)
		}
	}
	return kept
}
