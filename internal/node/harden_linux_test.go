package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/harden"
	"holdfast/internal/repo"
)

// A repository's directory is prepared, locks and lets go; its layout has a
// place for whatever a repository stores.
func TestHarden(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED, AND NOT TESTED: a hardened directory needs root")
	}
	ctx := context.Background()
	// Not t.TempDir: it cannot remove what is locked when this fails.
	dir, err := os.MkdirTemp("", "holdfast-harden-")
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = exec.Command("chattr", "-R", "-i", dir).Run()
		_ = os.RemoveAll(dir)
	}()
	n := New(Options{
		Repo: filepath.Join(dir, "repo"), State: filepath.Join(dir, "state"),
		Passphrase: func(context.Context, bool) ([]byte, error) { return []byte("x"), nil },
		Report:     Report{Note: func(line string) { t.Log(line) }},
	})
	defer n.Close()
	if _, err := n.Init(ctx, repo.Immutability{}); err != nil {
		t.Fatal(err)
	}
	where := n.o.Repo
	store, err := blob.OpenDir(where)
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Canary(ctx, blob.Governance); !errors.Is(err, blob.ErrNoLock) {
		t.Errorf("not hardened yet: %v", err)
	}
	q := HardenRequest{Dir: where, User: "54321:54321", Once: true}
	h, err := n.Harden(ctx, q, nil)
	if errors.Is(err, harden.ErrFilesystem) {
		t.Skipf("SKIPPED, AND NOT TESTED: %v", err)
	} else if err != nil || len(h.Prepared) < 260 {
		t.Fatalf("%+v, %v", h, err)
	}
	if err := store.Delete(ctx, "keys/none"); !errors.Is(err, blob.ErrNotExist) {
		t.Error(err)
	}
	var wishes []blob.LockWish
	until := time.Now().Add(time.Hour).Unix()
	for i, err := range store.List(ctx, "") {
		if err != nil {
			t.Fatal(err)
		}
		wishes = append(wishes, blob.LockWish{Name: i.Name, Until: until})
	}
	text, err := json.Marshal(blob.LockRequest{Version: 1, Locks: wishes})
	if err != nil {
		t.Fatal(err)
	}
	request := filepath.Join(where, blob.HardenRequests, strings.Repeat("a", 32))
	if err := errors.Join(os.WriteFile(request, text, 0o600), os.Chown(request, 54321, 54321)); err != nil {
		t.Fatal(err)
	}
	if h, err = n.Harden(ctx, HardenRequest{Dir: where, Once: true}, nil); err != nil || h.Locked != len(wishes) || len(wishes) < 3 || h.Refused != 0 {
		t.Fatalf("%d wishes: %+v, %v", len(wishes), h, err)
	}
	for _, w := range wishes {
		if err := store.Delete(ctx, w.Name); !errors.Is(err, blob.ErrLocked) {
			t.Errorf("delete %s: %v", w.Name, err)
		}
	}
	if s, err := n.HardenStatus(ctx, where); err != nil || s.Locks != len(wishes) || s.Earliest == nil || s.Earliest.Unix() != until || len(s.Missing)+len(s.Bare)+len(s.Stray) > 0 {
		t.Errorf("%+v, %v", s, err)
	}
	if h, err := n.Harden(ctx, HardenRequest{Dir: where, Release: true, DryRun: true}, nil); err != nil || h.Released != 0 {
		t.Errorf("%+v, %v", h, err)
	}
	if fmt.Sprint(storePlaces()[7:9], len(storePlaces())) != "[packs/00 packs/01] 263" {
		t.Error(storePlaces())
	}
}
