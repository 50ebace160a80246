package blob_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
)

func TestMem(t *testing.T) {
	blobtest.Store(t, func(*testing.T) blob.Store { return new(blob.Mem) })
}

func TestDir(t *testing.T) {
	blobtest.Store(t, func(t *testing.T) blob.Store {
		d, err := blob.CreateDir(filepath.Join(t.TempDir(), "store"))
		if err != nil {
			t.Fatal(err)
		}
		return d
	})
}

// A listing of a store whose root was unmounted must not look like an empty one.
func TestDirGone(t *testing.T) {
	root := filepath.Join(t.TempDir(), "store")
	d, err := blob.CreateDir(root)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
	for _, prefix := range []string{"", "packs/"} {
		var failed bool
		for _, err := range d.List(context.Background(), prefix) {
			failed = err != nil
		}
		if !failed {
			t.Errorf("listing %q of a store that is gone succeeded", prefix)
		}
	}
}

// What a crash left under a temporary name is no object.
func TestDirTemporaries(t *testing.T) {
	root := t.TempDir()
	d, err := blob.OpenDir(root)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, ".tmp-123"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for i, err := range d.List(context.Background(), "") {
		t.Fatalf("listed %v, %v", i, err)
	}
}

func TestLocking(t *testing.T) {
	blobtest.Store(t, func(*testing.T) blob.Store { return new(blobtest.Locking) })
}
