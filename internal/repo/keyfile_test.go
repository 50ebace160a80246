package repo

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/repo/internal/seal"
)

func exported(t *testing.T, store blob.Store) []byte {
	t.Helper()
	f, err := mustOpen(t, store, secret).ExportKeys(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range [][]byte{secret, second} {
		if bytes.Contains(f, s) {
			t.Fatal("a passphrase is in the file")
		}
	}
	return f
}

// lose deletes all that begins with one of the prefixes.
func lose(t *testing.T, s *blob.Mem, prefixes ...string) {
	t.Helper()
	for _, prefix := range prefixes {
		names, err := blob.Names(ctx, s, prefix)
		if err != nil || len(names) == 0 {
			t.Fatal(prefix, err)
		}
		for _, name := range names {
			s.Delete(ctx, name)
		}
	}
}

// Whatever of config, slots and keyrings is lost comes back, also when the power
// goes at any call meanwhile.
func TestImport(t *testing.T) {
	long(t)
	base, p, content := keyed(t)
	if _, err := mustOpen(t, base, secret).Rotate(ctx); err != nil {
		t.Fatal(err)
	}
	file := exported(t, base)
	for _, lost := range [][]string{{"keys/"}, {"keyring/"}, {"config"}, {"keys/", "keyring/", "config"}} {
		for at := 0; ; at++ {
			store := base.Clone()
			lose(t, store, lost...)
			faulty := &blobtest.Faulty{Inner: store, At: at, Fault: blobtest.Fault(at % 2), Cut: true}
			_, err := ImportKeys(ctx, faulty, file, false)
			if at > 0 && at <= faulty.Calls() && err == nil {
				t.Fatalf("%v, cut at %d: no error", lost, at)
			}
			done, err := ImportKeys(ctx, store, file, false)
			if err != nil || len(done.Differs)+len(done.Old) > 0 || len(done.Put)+len(done.There) != 5 {
				t.Fatalf("%v, cut at %d: %+v, %v", lost, at, done, err)
			}
			for _, pass := range [][]byte{secret, second} {
				r := mustOpen(t, store, pass)
				equal(t, r, p, content)
				clean(t, r, false)
			}
			if at > faulty.Calls() {
				break
			}
		}
	}
}

func TestImportRefuses(t *testing.T) {
	store, _, _ := keyed(t)
	other, _, _ := keyed(t)
	file := exported(t, store)
	if _, err := ImportKeys(ctx, other, file, false); !errors.Is(err, seal.ErrForeign) {
		t.Errorf("into another repository: %v", err)
	}
	lose(t, other, "config")
	if _, err := ImportKeys(ctx, other, file, false); !errors.Is(err, seal.ErrForeign) {
		t.Errorf("into another repository without config: %v", err)
	}
	if _, err := ImportKeys(ctx, new(blob.Mem), file, false); !errors.Is(err, ErrNotRepository) {
		t.Errorf("into an empty store: %v", err)
	}
	for at := 0; at < len(file); at += len(file)/200 + 1 {
		f := bytes.Clone(file)
		f[at] ^= 2
		s := store.Clone()
		lose(t, s, "keys/")
		done, err := ImportKeys(ctx, s, f, false)
		if err == nil {
			if _, err := openAs(t, s, secret); err != nil && len(done.Put) > 0 {
				t.Errorf("damage at %d of %d goes through: %+v", at, len(file), done)
			}
		}
	}
	for _, name := range []string{"packs/aa/bb", "../config", "chain/000000000001"} {
		f := strings.Replace(string(file), `"config"`, fmt.Sprintf("%q", name), 1)
		if _, err := ImportKeys(ctx, store, []byte(f), false); !errors.Is(err, ErrKeyFile) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A damaged object is not touched, and told.
	names, _ := blob.Names(ctx, store, "keyring/")
	store.Damage(names[0], func(p []byte) []byte { return p[:9] })
	done, err := ImportKeys(ctx, store, file, false)
	if err != nil || len(done.Differs) != 1 || done.Differs[0] != names[0] {
		t.Errorf("%+v, %v", done, err)
	}
}

// An old file brings back neither a passphrase that was removed since nor a root
// key that was replaced.
func TestImportOld(t *testing.T) {
	store, p, content := keyed(t)
	file := exported(t, store)
	r := mustOpen(t, store, secret)
	if err := r.RemoveSlot(ctx, slotOf(t, r, "the second").ID, ""); err != nil {
		t.Fatal(err)
	}
	done, err := ImportKeys(ctx, store, file, true)
	if err != nil || len(done.Put) != 1 {
		t.Fatalf("%+v, %v", done, err)
	}
	if _, err := openAs(t, store, second); !errors.Is(err, ErrPassphrase) {
		t.Fatalf("a dry run did it: %v", err)
	}
	if _, err := ImportKeys(ctx, store, file, false); err != nil {
		t.Fatal(err)
	}
	if err := mustOpen(t, store, secret).Tidy(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := openAs(t, store, second); !errors.Is(err, ErrPassphrase) {
		t.Errorf("a removed passphrase is back: %v", err)
	}
	if _, err := mustOpen(t, store, secret).RotateRoot(ctx, nil); err != nil {
		t.Fatal(err)
	}
	done, err = ImportKeys(ctx, store, file, false)
	if err != nil || len(done.Put) != 0 || len(done.Old) != 3 {
		t.Errorf("%+v, %v", done, err)
	}
	r = mustOpen(t, store, secret)
	equal(t, r, p, content)
	clean(t, r, true)

	// With nothing else left, even what was removed opens, and a new one can be added.
	lost, _, _ := keyed(t)
	file = exported(t, lost)
	r = mustOpen(t, lost, second)
	if _, err := r.AddPassphrase(ctx, "new", third); err != nil {
		t.Fatal(err)
	}
	for _, label := range []string{"", "the second"} {
		s := slotOf(t, r, label)
		if err := r.RemoveSlot(ctx, s.ID, s.ID); err != nil {
			t.Fatal(err)
		}
	}
	lose(t, lost, "keys/")
	if _, err := ImportKeys(ctx, lost, file, false); err != nil {
		t.Fatal(err)
	}
	r = mustOpen(t, lost, secret)
	if err := r.Tidy(ctx); err == nil {
		t.Error("the last keys were deleted")
	}
	if _, err := r.AddPassphrase(ctx, "newer", third); err != nil {
		t.Fatal(err)
	}
	if err := r.Tidy(ctx); err != nil {
		t.Error(err)
	}
	mustOpen(t, lost, third)
}
