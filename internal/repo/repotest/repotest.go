// Package repotest has empty repositories for other packages' tests, made
// once with a key derivation so cheap that opening them takes no time. They are
// never to hold anything that matters.
package repotest

import (
	"context"
	"embed"
	"io/fs"
	"path"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/repo"
)

// Passphrase opens them.
const Passphrase = "test"

//go:embed empty other
var fixtures embed.FS

// Store gives a store that holds the empty repository.
func Store(t testing.TB) *blob.Mem {
	t.Helper()
	return load(t, "empty")
}

// Other gives a store that holds another empty repository, with keys of its own.
func Other(t testing.TB) *blob.Mem {
	t.Helper()
	return load(t, "other")
}

func load(t testing.TB, dir string) *blob.Mem {
	t.Helper()
	s := new(blob.Mem)
	err := fs.WalkDir(fixtures, dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		p, err := fixtures.ReadFile(name)
		if err != nil {
			return err
		}
		rel := name[len(dir+"/"):]
		return s.Put(context.Background(), path.Clean(rel), p)
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Open opens the repository on a store that Store or Other gave, until the test ends.
func Open(t testing.TB, s blob.Store) *repo.Repo {
	t.Helper()
	r, err := repo.Open(context.Background(), s, []byte(Passphrase), repo.Options{Cache: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}
