package overlay

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"holdfast/internal/disk/disktest"
)

// TestFullFilesystem fills a real, small filesystem, makes room by trimming and
// goes on.
func TestFullFilesystem(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount a small tmpfs")
	}
	ctx := t.Context()
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=4m"); err != nil {
		t.Skipf("mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Error(err)
		}
	})
	base := baseDisk(t, 16<<20)
	want := contentOf(t, base)
	dir := filepath.Join(mnt, "overlay")
	if err := Create(dir, testID, base.Size()); err != nil {
		t.Fatal(err)
	}
	o := reopen(t, dir, base)
	r := disktest.Rand(t)
	p := make([]byte, 100<<10)
	var full int64
	for full = 0; ; full += int64(len(p)) {
		disktest.Fill(r, p)
		if err := o.WriteAt(ctx, p, full); errors.Is(err, syscall.ENOSPC) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		copy(want[full:], p)
	}
	if full < 3<<20 {
		t.Errorf("full after %d bytes", full)
	}
	// The write that failed may be there in part only where it is read next.
	if err := o.ReadAt(ctx, want[full:full+int64(len(p))], full); err != nil {
		t.Fatal(err)
	}
	if err := o.ZeroAt(ctx, 0, 1<<20); err != nil { // the guest trims
		t.Fatal(err)
	}
	clear(want[:1<<20])
	disktest.Fill(r, p)
	for _, off := range []int64{8 << 20, full} {
		copy(want[off:], p)
		if err := o.WriteAt(ctx, p, off); err != nil {
			t.Fatalf("with room again: %v", err)
		}
	}
	if err := errors.Join(o.Flush(ctx), o.Close()); err != nil {
		t.Fatal(err)
	}
	o = reopen(t, dir, base)
	disktest.Reader(t, o, want)
	if err := o.Close(); err != nil {
		t.Error(err)
	}
}
