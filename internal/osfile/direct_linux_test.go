package osfile

import (
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What is written past the page cache is not in it.
func TestNotCached(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 8 << 20
	w := NewWriter(f)
	if _, err := w.WriteAt(make([]byte, size), 0); err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if w.direct == nil {
		t.Skip("this filesystem has a page cache only")
	}
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	resident := make([]byte, size/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, addr(m), size, addr(resident)); errno != 0 {
		t.Fatal(errno)
	}
	n := 0
	for _, r := range resident {
		n += int(r & 1)
	}
	if n > 0 {
		t.Errorf("%d of %d pages are in the page cache", n, len(resident))
	}
}

func addr(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) }
