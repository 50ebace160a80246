package vhdx

import (
	"encoding/binary"
	"path"
	"slices"
	"strings"
	"unicode/utf16"

	"holdfast/internal/image"
)

const (
	locatorHeader = 20
	locatorEntry  = 12
	maxLocator    = 256 // entries

	keyLinkage  = "parent_linkage"
	keyLinkage2 = "parent_linkage2"
	keyRelative = "relative_path"
	keyVolume   = "volume_path"
	keyAbsolute = "absolute_win32_path"
)

var locatorVHDX = known("B04AEFB7-D19E-4A81-B789-25B8E9445913")

// locator is what a differencing file says of its parent.
type locator struct {
	ids    []guid // those that the parent's data may have, none of them zero
	second bool   // there are two: a merge was under way
	names  []string
}

// parseLocator reads a parent locator: keys and values, each a text.
func parseLocator(b []byte) (*locator, error) {
	if len(b) < locatorHeader {
		return nil, bad("it has %d bytes", len(b))
	}
	if kind := guid(b[:16]); kind != locatorVHDX {
		return nil, unsupported("a parent locator of type %s", kind)
	}
	count := int(binary.LittleEndian.Uint16(b[18:]))
	if count == 0 || count > maxLocator || locatorHeader+count*locatorEntry > len(b) {
		return nil, bad("it has %d entries in %d bytes", count, len(b))
	}
	values := map[string]string{}
	for i := range count {
		e := b[locatorHeader+i*locatorEntry:][:locatorEntry]
		le := binary.LittleEndian
		key, ok := locatorText(b, count, le.Uint32(e), le.Uint16(e[8:]))
		value, ok2 := locatorText(b, count, le.Uint32(e[4:]), le.Uint16(e[10:]))
		if !ok || !ok2 || key == "" {
			return nil, bad("entry %d is %x", i, e)
		}
		if _, dup := values[key]; dup {
			return nil, bad("entry %d: a second %.100q", i, key)
		}
		values[key] = value
	}
	l := &locator{}
	for _, key := range []string{keyLinkage, keyLinkage2} {
		v, ok := values[key]
		if !ok {
			continue
		}
		id, ok := parseGUID(v)
		if !ok {
			return nil, bad("%s is %.100q", key, v)
		}
		if id != (guid{}) && !slices.Contains(l.ids, id) {
			l.ids = append(l.ids, id)
			l.second = key == keyLinkage2
		}
	}
	if len(l.ids) == 0 {
		return nil, bad("it does not tell the id of the parent's data")
	}
	l.names = parentNames(values)
	return l, nil
}

// locatorText is the text at [off, off+n) of a locator with count entries.
func locatorText(b []byte, count int, off uint32, n uint16) (string, bool) {
	if off%2 != 0 || n%2 != 0 || int64(off) < int64(locatorHeader+count*locatorEntry) || int64(off)+int64(n) > int64(len(b)) {
		return "", false
	}
	u := make([]uint16, n/2)
	for i := range u {
		u[i] = binary.LittleEndian.Uint16(b[int(off)+2*i:])
	}
	r := utf16.Decode(u)
	// Decode puts U+FFFD for a lone surrogate; a text that has it already
	// encodes to itself.
	if slices.Contains(u, 0) || !slices.Equal(utf16.Encode(r), u) {
		return "", false
	}
	return string(r), true
}

// parentNames are the names to try: the path relative to the child, then only
// the last part of each path, since files are copied together to other places.
func parentNames(values map[string]string) []string {
	var names []string
	add := func(name string) {
		if name != "" && name != "." && name != ".." && name != "/" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	slashes := func(key string) string { return strings.ReplaceAll(values[key], `\`, "/") }
	if rel := slashes(keyRelative); rel != "" && !strings.HasPrefix(rel, "/") && !hasDrive(rel) {
		add(path.Clean(rel))
	}
	for _, key := range []string{keyRelative, keyVolume, keyAbsolute} {
		if p := slashes(key); p != "" && !strings.HasSuffix(p, "/") {
			base := path.Base(p)
			if hasDrive(base) {
				base = base[2:]
			}
			add(base)
		}
	}
	return names
}

// hasDrive reports whether a path begins with a drive letter.
func hasDrive(p string) bool { return len(p) >= 2 && p[1] == ':' }

// parent is how the chain is told.
func (l *locator) parent() *image.Parent {
	p := &image.Parent{Names: l.names, Format: Name}
	for _, id := range l.ids {
		p.IDs = append(p.IDs, id.String())
	}
	return p
}
