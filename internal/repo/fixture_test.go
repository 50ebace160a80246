package repo

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

var update = flag.Bool("update", false, "make testdata anew")

// The fixtures of repotest were made by this, those that are there are not made
// anew; they must stay readable.
func TestFixture(t *testing.T) {
	for _, name := range []string{"empty", "other"} {
		t.Run(name, func(t *testing.T) { testFixture(t, filepath.Join("repotest", name)) })
	}
}

func testFixture(t *testing.T, dir string) {
	if _, err := os.Stat(dir); *update && os.IsNotExist(err) {
		store, err := blob.CreateDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		cheap := seal.KDF{Name: "argon2id", Time: 1, Memory: 64, Threads: 1, Root: 1}
		r, err := initialize(ctx, store, []byte("test"), Options{Cache: t.TempDir()}, cheap)
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
	}
	store, err := blob.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(ctx, store, []byte("test"), Options{Cache: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if points, err := r.Points(ctx); err != nil || len(points) > 0 {
		t.Fatalf("%v, %v", points, err)
	}
}

// long is for tests that go through every call or byte in one goroutine: the
// race detector finds nothing in them, and takes minutes.
func long(t *testing.T) {
	t.Helper()
	if testing.Short() {
		t.Skip("it is left out of short runs")
	}
}
