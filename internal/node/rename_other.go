//go:build !linux

package node

// rename gives a file its name, never over another.
func rename(from, to string) error { return renameLinked(from, to) }
