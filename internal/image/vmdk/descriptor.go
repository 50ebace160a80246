package vmdk

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"

	"holdfast/internal/disk"
	"holdfast/internal/image"
)

const (
	signature = "# Disk DescriptorFile"

	maxText    = 1 << 20 // bytes of a descriptor: that of a thousand extents has 60 KiB
	maxExtents = 4096    // each may be an open file: 8 TiB in pieces of 2 GiB
	maxName    = 1024    // bytes of a name in a descriptor
	maxDisk    = 1 << 56 // bytes of a virtual disk or one of its files

	noParent = math.MaxUint32 // the parentCID of a disk without a parent
)

// descriptor is the text that says what a disk consists of.
type descriptor struct {
	createType string
	cid        string // as in image.Info.DataID; "" for none
	parentCID  string // "" for none
	hint       string // the parent's name
	uuid       string // ddb.uuid
	extents    []line
	warnings   []string
}

// line is an extent as the descriptor tells it.
type line struct {
	no      int // of the line, from 1
	sectors int64
	kind    string // in upper case
	name    string // "" where the kind has none
	offset  int64  // in the file, sectors
}

// size of the disk in bytes.
func (d *descriptor) size() int64 {
	n := int64(0)
	for _, l := range d.extents {
		n += l.sectors * sector
	}
	return n
}

// bad makes an error of a damaged or hostile structure.
func bad(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{image.ErrFormat}, args...)...)
}

// unsupported makes an error of what is not readable here.
func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{image.ErrUnsupported}, args...)...)
}

// isDescriptor reports whether text begins as a descriptor does.
func isDescriptor(b []byte) bool {
	return len(b) >= len(signature) && strings.EqualFold(string(b[:len(signature)]), signature)
}

// readText reads a descriptor of n bytes at off. It ends with the first NUL:
// those in sparse files are padded.
func readText(ctx context.Context, f disk.Reader, off, n int64) (*descriptor, error) {
	if n > maxText {
		return nil, bad("descriptor: it has %d bytes, more than %d", n, maxText)
	}
	b := make([]byte, n)
	if err := f.ReadAt(ctx, b, off); err != nil {
		return nil, fmt.Errorf("read descriptor: %w", err)
	}
	b, _, _ = bytes.Cut(b, []byte{0})
	return parseDescriptor(b)
}

// parseDescriptor reads a descriptor and refuses what is encrypted, maps
// devices, or does not hold together.
func parseDescriptor(text []byte) (*descriptor, error) {
	if !isDescriptor(text) {
		return nil, bad("descriptor: it does not begin with %q", signature)
	}
	d := &descriptor{}
	keys := map[string]string{} // in lower case
	lines := strings.Split(string(text), "\n")
	for i, s := range lines {
		s = strings.Trim(s, " \t\r\f\v")
		if s == "" || s[0] == '#' {
			continue
		}
		if access, rest, ok := cutField(s); ok && isAccess(access) {
			if len(d.extents) == maxExtents {
				return nil, unsupported("descriptor: more than %d extents", maxExtents)
			}
			l, err := parseLine(access, rest)
			if err != nil {
				return nil, fmt.Errorf("descriptor line %d: %w", i+1, err)
			}
			l.no = i + 1
			d.extents = append(d.extents, l)
			continue
		}
		// What is neither is not for us: descriptors have grown lines over time.
		if key, value, ok := strings.Cut(s, "="); ok {
			key = strings.ToLower(strings.TrimSpace(key))
			if _, twice := keys[key]; !twice {
				keys[key] = unquote(strings.TrimSpace(value))
			} else if key == "cid" || key == "parentcid" || key == "createtype" || key == "parentfilenamehint" {
				return nil, bad("descriptor line %d: a second %s", i+1, key)
			}
		}
	}
	if err := d.take(keys); err != nil {
		return nil, err
	}
	d.decodeNames(keys["encoding"])
	return d, d.checkExtents()
}

// take reads the keys.
func (d *descriptor) take(keys map[string]string) error {
	for key := range keys {
		if strings.Contains(key, "encrypt") {
			return unsupported("descriptor: %.50q: the disk is encrypted, and can only be read through the hypervisor that has the key", key)
		}
	}
	if strings.Contains(strings.ToLower(keys["ddb.iofilters"]), "crypt") {
		return unsupported("descriptor: ddb.iofilters is %.50q: the disk is encrypted, and can only be read through the hypervisor that has the key", keys["ddb.iofilters"])
	}
	if v := keys["version"]; v != "" && v != "1" && v != "2" && v != "3" && v != "4" {
		return unsupported("descriptor: version %.20q", v)
	}
	if d.createType = keys["createtype"]; d.createType == "" {
		return bad("descriptor: no createType")
	}
	var err error
	if d.cid, err = parseCID("CID", keys["cid"]); err != nil {
		return err
	}
	if d.parentCID, err = parseCID("parentCID", keys["parentcid"]); err != nil {
		return err
	}
	if d.parentCID == cidText(noParent) {
		d.parentCID = ""
	}
	d.hint, d.uuid = keys["parentfilenamehint"], keys["ddb.uuid"]
	if len(d.hint) > maxName {
		return bad("descriptor: parentFileNameHint has %d bytes", len(d.hint))
	}
	if d.hint != "" && d.parentCID == "" {
		d.warn("descriptor: a parentFileNameHint without a parentCID: read as a disk without a parent")
	}
	return nil
}

func (d *descriptor) warn(format string, args ...any) {
	d.warnings = append(d.warnings, fmt.Sprintf(format, args...))
}

// checkExtents sees to it that their sizes add up.
func (d *descriptor) checkExtents() error {
	if len(d.extents) == 0 {
		return bad("descriptor: no extents")
	}
	if isDevice(d.createType) {
		return unsupported("descriptor: createType %.50q maps a device of the host: there is no file to read", d.createType)
	}
	total := int64(0)
	for _, l := range d.extents {
		if total += l.sectors; total > maxDisk/sector {
			return bad("descriptor line %d: the extents have more than %d bytes", l.no, int64(maxDisk))
		}
	}
	return nil
}

func isDevice(createType string) bool {
	switch strings.ToLower(createType) {
	case "fulldevice", "partitioneddevice", "vmfsraw", "vmfsrdm", "vmfsrdmp", "vmfsrawdevicemap", "vmfspassthroughrawdevicemap":
		return true
	}
	return false
}

// parseCID returns a content id as Info shows it.
func parseCID(key, s string) (string, error) {
	if s == "" {
		return "", nil
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(s), "0x"), 16, 32)
	if err != nil {
		return "", bad("descriptor: %s is %.20q", key, s)
	}
	return cidText(uint32(n)), nil
}

func cidText(cid uint32) string { return fmt.Sprintf("%08x", cid) }

func isAccess(s string) bool {
	return strings.EqualFold(s, "RW") || strings.EqualFold(s, "RDONLY") || strings.EqualFold(s, "NOACCESS")
}

// cutField takes the first of the words of s. ok is false when it is the only
// one.
func cutField(s string) (word, rest string, ok bool) {
	i := strings.IndexAny(s, " \t")
	if i < 0 {
		return s, "", false
	}
	return s[:i], strings.TrimLeft(s[i:], " \t"), true
}

// parseLine reads what follows an extent's access:
//
//	SECTORS KIND ["NAME" [OFFSET [more]]]
func parseLine(access, s string) (line, error) {
	var l line
	if strings.EqualFold(access, "NOACCESS") {
		return l, unsupported("an extent that may not be read (NOACCESS)")
	}
	word, s, _ := cutField(s)
	n, err := strconv.ParseUint(word, 10, 64)
	if err != nil || n == 0 || n > maxDisk/sector {
		return l, bad("an extent of %.30q sectors", word)
	}
	l.sectors = int64(n)
	word, s, _ = cutField(s)
	switch l.kind = strings.ToUpper(word); l.kind {
	case kindZero:
		return l, nil
	case kindFlat, kindSparse, kindVMFS, kindVMFSThin, kindVMFSSparse, kindSESparse:
	case "VMFSRDM", "VMFSRDMP", "VMFSRAW":
		return l, unsupported("the extent maps a device of the host (%s): there is no file to read", l.kind)
	default:
		return l, unsupported("an extent of kind %.30q", word)
	}
	if l.name, s, err = cutName(s); err != nil {
		return l, err
	}
	if l.kind == kindSparse || l.kind == kindVMFSSparse || l.kind == kindSESparse || s == "" {
		return l, nil // VMFS lines have no offset, and some others leave it out
	}
	word, _, _ = cutField(s)
	if n, err = strconv.ParseUint(word, 10, 64); err != nil || n > maxDisk/sector {
		return l, bad("the extent begins at sector %.30q of its file", word)
	}
	l.offset = int64(n)
	return l, nil
}

// cutName takes a quoted name, or an unquoted word, from the front of s.
func cutName(s string) (name, rest string, err error) {
	if quoted, ok := strings.CutPrefix(s, `"`); ok {
		if name, rest, ok = strings.Cut(quoted, `"`); !ok {
			return "", "", bad("the name of the extent's file has no end: %.50q", s)
		}
	} else {
		name, rest, _ = cutField(s)
	}
	if name == "" || len(name) > maxName {
		return "", "", bad("the name of the extent's file has %d bytes", len(name))
	}
	return name, strings.TrimLeft(rest, " \t"), nil
}

func unquote(s string) string {
	if len(s) >= 2 && s[0] == '"' && s[len(s)-1] == '"' {
		s = s[1 : len(s)-1]
	}
	return strings.TrimSpace(s)
}

// decodeNames makes UTF-8 of names: by what the descriptor says of itself,
// and where that cannot be.
func (d *descriptor) decodeNames(encoding string) {
	western := strings.EqualFold(encoding, "windows-1252")
	decode := func(s string) string {
		if western || !utf8.ValidString(s) {
			return fromWindows1252(s)
		}
		return s
	}
	d.hint = decode(d.hint)
	for i := range d.extents {
		d.extents[i].name = decode(d.extents[i].name)
	}
}

// windows1252 has the characters of the bytes from 0x80 to 0x9f; all others
// are those of the same number. Unassigned ones stay what they are.
var windows1252 = [32]rune{
	'€', 0x81, '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', 0x8d, 'Ž', 0x8f,
	0x90, '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', 0x9d, 'ž', 'Ÿ',
}

func fromWindows1252(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		if c >= 0x80 && c < 0xa0 {
			b.WriteRune(windows1252[c-0x80])
		} else {
			b.WriteRune(rune(c))
		}
	}
	return b.String()
}

// parent is what Info says of the one beneath, nil for none.
func (d *descriptor) parent() *image.Parent {
	if d.parentCID == "" {
		return nil
	}
	return &image.Parent{Names: parentNames(d.hint), Format: Name, IDs: []string{d.parentCID}}
}

// parentNames are the names under which to look for the parent that a
// descriptor names: a relative name first, then the last part of any.
func parentNames(hint string) []string {
	if hint == "" {
		return nil
	}
	windows := strings.Contains(hint, `\`) || len(hint) > 1 && hint[1] == ':'
	name := hint
	if windows {
		name = strings.ReplaceAll(name, `\`, "/")
	}
	absolute := strings.HasPrefix(name, "/") || windows && len(name) > 1 && name[1] == ':'
	base := name[strings.LastIndexByte(name, '/')+1:]
	if windows {
		base = base[strings.LastIndexByte(base, ':')+1:]
	}
	var names []string
	if !absolute {
		names = append(names, name)
	}
	if base != "" && (absolute || base != name) {
		names = append(names, base)
	}
	return names
}
