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

// Lesson 4, and once more 5: other programs' cleaners took an error of a listing, or
// what was left of one, for "there is no more", and deleted backups.
// A listing in which a directory could not be read is an error, whatever the reason.
func TestLesson04PartialListing(t *testing.T) {
	ctx := context.Background()
	for what, harm := range map[string]func(dir string) error{
		"unreadable": func(dir string) error { return os.Chmod(dir, 0) },
		// Its directory goes between the moment in which it is seen and the one in
		// which it is read: as on a share that hiccups.
		"gone": func(dir string) error {
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			return os.Symlink("nowhere", dir)
		},
	} {
		root := t.TempDir()
		d, err := blob.OpenDir(root)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"packs/aa/1", "packs/bb/2", "packs/cc/3"} {
			if err := d.Put(ctx, name, nil); err != nil {
				t.Fatal(err)
			}
		}
		bad := filepath.Join(root, "packs", "bb")
		if err := harm(bad); err != nil {
			t.Fatal(err)
		}
		if _, err := os.ReadDir(bad); err == nil {
			continue // root reads everything
		}
		for _, prefix := range []string{"", "packs/"} {
			var failed error
			for _, err := range d.List(ctx, prefix) {
				failed = err
			}
			if failed == nil {
				t.Errorf("%s: listing %q without an error", what, prefix)
			}
		}
		if what == "unreadable" {
			os.Chmod(bad, 0o700)
		}
	}
}

// A directory that was moved elsewhere, with a symbolic link in its place, is
// listed: the whole store, or one below.
func TestDirLinked(t *testing.T) {
	ctx := context.Background()
	disk := t.TempDir()
	link := filepath.Join(t.TempDir(), "repo")
	if err := os.Symlink(disk, link); err != nil {
		t.Skip("SKIPPED: no symbolic links here:", err)
	}
	d, err := blob.OpenDir(link)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"config", "packs/aa/1", "packs/bb/2"} {
		if err := d.Put(ctx, name, nil); err != nil {
			t.Fatal(err)
		}
	}
	other := filepath.Join(t.TempDir(), "packs")
	if err := os.Rename(filepath.Join(disk, "packs"), other); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other, filepath.Join(disk, "packs")); err != nil {
		t.Fatal(err)
	}
	for prefix, want := range map[string]int{"": 3, "packs/": 2, "packs/bb": 1} {
		n := 0
		for _, err := range d.List(ctx, prefix) {
			if err != nil {
				t.Fatal(err)
			}
			n++
		}
		if n != want {
			t.Errorf("listing %q: %d objects, want %d", prefix, n, want)
		}
	}
}

func TestLocking(t *testing.T) {
	blobtest.Store(t, func(*testing.T) blob.Store { return new(blobtest.Locking) })
}
