package qcow2

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/image"
)

func TestInfo(t *testing.T) {
	for name, c := range map[string]struct {
		do                func(s *small)
		variant, warnings string
	}{
		"plain":     {func(s *small) {}, "version 3", ""},
		"version 2": {func(s *small) { s.put32(4, 2) }, "version 2", ""},
		"dirty":     {func(s *small) { s.b[79] |= bitDirty }, "version 3", "was not closed"},
		"corrupt":   {func(s *small) { s.b[79] |= bitCorrupt }, "version 3", "marked corrupt"},
		"zstd":      {func(s *small) { s.setZstd() }, "version 3, zstd", ""},
		"extended":  {func(s *small) { s.b[79] |= bitExtendedL2 }, "version 3, extended L2", ""},
		"data file": {func(s *small) { s.dataFile("d") }, "version 3, external data file", ""},
		"snapshot":  {func(s *small) { s.withSnapshot() }, "version 3", `not part of its disk: "snap"`},
		"bad snapshots": {func(s *small) { s.put32(s.withSnapshot()+36, 1<<30) }, "version 3",
			"1 internal snapshots that cannot be listed: snapshot table, entry 0"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSmall(t)
			c.do(s)
			im, err := openDamaged(t, s.b)
			if err != nil {
				t.Fatal(err)
			}
			i := im.Info()
			w := strings.Join(i.Warnings, "\n")
			if i.Format != Name || i.Variant != c.variant || i.Size != 8<<20 || i.Block != 64<<10 || !strings.Contains(w, c.warnings) || c.warnings == "" && w != "" {
				t.Errorf("%+v", i)
			}
		})
	}
}

// TestMarkedCorrupt: refused, unless its reader knows.
func TestMarkedCorrupt(t *testing.T) {
	s := newSmall(t)
	s.b[79] |= bitCorrupt
	f := fileOf(memOf(t, s.b))
	if _, err := image.Formats([]image.Format{Format()}).Open(t.Context(), f, Name, nil); !errors.Is(err, ErrCorrupt) || !errors.Is(err, image.ErrFormat) {
		t.Errorf("Format: %v", err)
	}
	c, err := image.Formats([]image.Format{Damaged()}).Open(t.Context(), f, Name, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 300<<10)
	if err := c.ReadAt(t.Context(), p, 64<<10); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{7}, len(p))) {
		t.Errorf("read: %v", err)
	}
}

func TestMatch(t *testing.T) {
	for content, want := range map[string]bool{
		"": false, "QFI\xfb": false, "QFI\xfb\x00\x00\x00\x03": true, "QFI\xfb\x00\x00\x00\x02more": true,
		"QFI\xfb\x00\x00\x00\x01": true, "QFI\xfb\x00\x00\x00\x04": true, // refused by Open, and not read as raw
		"QFI\xfb\x00\x00\x00\x00": false, "QFI\xfb\x03\x00\x00\x00": false, "QFI\xfb    ": false, "XFI\xfb\x00\x00\x00\x03": false,
	} {
		d := disk.NewMem(int64(len(content)))
		if err := d.WriteAt(t.Context(), []byte(content), 0); err != nil {
			t.Fatal(err)
		}
		if got, err := match(t.Context(), d); err != nil || got != want {
			t.Errorf("%q: %v %v", content, got, err)
		}
	}
}
