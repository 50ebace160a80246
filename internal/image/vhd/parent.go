package vhd

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/url"
	"path"
	"slices"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// maxName bounds a locator's text, in bytes: Windows' longest path.
const maxName = 64 << 10

// readNames gathers what the parent may be called. The best is the path that
// is relative to this file; the others count with their last element only,
// since they are of another machine, or of a place that this one had there.
func (im *Image) readNames(ctx context.Context) error {
	found := map[string][]string{} // texts by kind of locator
	for i := range 8 {
		b := im.h.locators[i*24:][:24]
		code := string(b[:4])
		if code == "\x00\x00\x00\x00" {
			continue
		}
		text, err := im.readLocator(ctx, code, uint64(binary.BigEndian.Uint32(b[8:])), binary.BigEndian.Uint64(b[16:]))
		if err != nil {
			return err
		}
		if text != "" {
			found[code] = append(found[code], text)
		}
	}
	relative := slices.Concat(found["W2ru"], found["Wi2r"])
	for _, name := range relative {
		im.addRelative(name)
	}
	stored := utf16Text(im.h.parentName, binary.BigEndian)
	for _, name := range slices.Concat(relative, found["W2ku"], []string{stored}, found["MacX"], found["Wi2k"]) {
		im.addName(path.Base("/" + slashes(name)))
	}
	return nil
}

// readLocator reads the text of a locator; "" and a warning when there is
// none. Its length in bytes counts: the other length, of its space, is in
// bytes or in sectors, as the writer took it.
func (im *Image) readLocator(ctx context.Context, code string, n, at uint64) (string, error) {
	if n == 0 || n > maxName || at > uint64(im.end) || n > uint64(im.end)-at {
		im.warn("the parent locator %q of %d bytes at offset %d is not used: it does not lie in the file", code, n, at)
		return "", nil
	}
	b := make([]byte, n)
	if err := im.file.ReadAt(ctx, b, int64(at)); err != nil {
		return "", fmt.Errorf("read the parent locator %q at offset %d: %w", code, at, err)
	}
	text := ""
	switch code {
	case "W2ru", "W2ku":
		text = utf16Text(b, binary.LittleEndian)
	case "Wi2r", "Wi2k": // before Unicode
		text = upToNUL(string(b))
	case "MacX": // a URL
		if u, err := url.Parse(upToNUL(string(b))); err == nil && (u.Scheme == "" || u.Scheme == "file") {
			text = u.Path
		}
	case "Mac ": // an alias record, which holds no path
		return "", nil
	default:
		im.warn("the parent locator %q at offset %d is not used: it is of an unknown kind", code, at)
		return "", nil
	}
	if text == "" || !utf8.ValidString(text) {
		im.warn("the parent locator %q at offset %d is not used: it holds no name", code, at)
		return "", nil
	}
	return text, nil
}

// utf16Text decodes text up to its first NUL; "" when it is not valid.
func utf16Text(b []byte, order binary.ByteOrder) string {
	var u []uint16
	for ; len(b) >= 2; b = b[2:] {
		c := order.Uint16(b)
		if c == 0 {
			break
		}
		u = append(u, c)
	}
	s := string(utf16.Decode(u))
	if strings.ContainsRune(s, utf8.RuneError) {
		return ""
	}
	return s
}

func upToNUL(s string) string {
	s, _, _ = strings.Cut(s, "\x00")
	return s
}

// slashes makes a Windows path one with slashes.
func slashes(name string) string { return strings.ReplaceAll(name, `\`, "/") }

// addRelative adds a path that is relative to this file. An absolute one, or
// one with a drive, only counts with its last element.
func (im *Image) addRelative(name string) {
	name = slashes(name)
	if strings.HasPrefix(name, "/") || len(name) > 1 && name[1] == ':' {
		return
	}
	im.addName(path.Clean(name))
}

func (im *Image) addName(name string) {
	if strings.LastIndexByte(name, ':') == 1 {
		name = name[2:] // "C:x.vhd": relative to the folder in which that drive was
	}
	switch {
	case name == "", name == ".", name == "..", name == "/", strings.Contains(name, "\x00"), slices.Contains(im.names, name):
	default:
		im.names = append(im.names, name)
	}
}
