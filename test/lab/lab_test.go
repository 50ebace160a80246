package lab

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestGuest tests the lab itself: a guest boots, its writer writes, and its
// verifier finds what is missing.
func TestGuest(t *testing.T) {
	Need(t)
	ctx := t.Context()
	g := Start(t, Options{Disks: []Disk{{}, {Format: "raw"}}})
	if out, err := g.Exec(ctx, "lsblk -nd -o NAME | grep -c ^vd"); err != nil || strings.TrimSpace(out) != "3" {
		t.Errorf("the guest sees %q disks: %v", out, err)
	}
	if _, err := g.Exec(ctx, "echo no; exit 3"); err == nil || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("a command that fails: %v", err)
	}
	if err := g.StartWriter(ctx, "/var/lib/guestwriter"); err != nil {
		t.Fatal(err)
	}
	if _, err := g.WaitWriter(ctx, 500); err != nil {
		t.Fatal(err)
	}
	if err := g.StopWriter(ctx); err != nil {
		t.Fatal(err)
	}
	n, err := g.Acked(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Verify(ctx, n, "/var/lib/guestwriter"); err != nil {
		t.Error(err)
	}
	if err := g.Verify(ctx, n+100, "/var/lib/guestwriter"); err == nil {
		t.Error("missing records were not found")
	}
	// Record 1 is in slot 0.
	if _, err := g.Exec(ctx, "printf x | dd of=/var/lib/guestwriter/slots bs=1 seek=100 conv=notrunc"); err != nil {
		t.Fatal(err)
	}
	if err := g.Verify(ctx, n, "/var/lib/guestwriter"); err == nil {
		t.Error("a damaged record was not found")
	}
}

func TestOrphan(t *testing.T) {
	for name, want := range map[string]bool{
		"lab-0-5": false, "lab-x": false, "other": false, "lab-999999999-1": true,
		"lab-" + strconv.Itoa(os.Getpid()) + "-1": false,
	} {
		if orphan(name) != want {
			t.Errorf("orphan(%q) is %v", name, !want)
		}
	}
}

func TestImageIsNamedByItsRecipe(t *testing.T) {
	t.Setenv("HOLDFAST_LAB_CACHE", t.TempDir())
	dir, err := imageDir()
	if err != nil || filepath.Dir(dir) != Cache() || len(filepath.Base(dir)) != 16 {
		t.Errorf("%s: %v", dir, err)
	}
	if _, err := Image("raw"); err == nil || !strings.Contains(err.Error(), "labctl setup") {
		t.Errorf("without an image: %v", err)
	}
}
