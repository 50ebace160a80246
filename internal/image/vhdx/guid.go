package vhdx

import (
	"encoding/hex"
	"fmt"
	"strings"
)

// guid is a GUID as files have it: its first three numbers little-endian, the
// other eight bytes as they are.
type guid [16]byte

// swap turns a guid into the bytes of its text, and back.
func swap(g [16]byte) [16]byte {
	return [16]byte{g[3], g[2], g[1], g[0], g[5], g[4], g[7], g[6], g[8], g[9], g[10], g[11], g[12], g[13], g[14], g[15]}
}

// String is lower-case, with dashes and without braces.
func (g guid) String() string {
	t := swap(g)
	return fmt.Sprintf("%x-%x-%x-%x-%x", t[:4], t[4:6], t[6:8], t[8:10], t[10:])
}

// text is String, but "" for the zero GUID, which names nothing.
func (g guid) text() string {
	if g == (guid{}) {
		return ""
	}
	return g.String()
}

// parseGUID reads the text of a GUID, with or without braces.
func parseGUID(s string) (guid, bool) {
	if in, ok := strings.CutPrefix(s, "{"); ok {
		if s, ok = strings.CutSuffix(in, "}"); !ok {
			return guid{}, false
		}
	}
	if len(s) != 36 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return guid{}, false
	}
	b, err := hex.DecodeString(s[:8] + s[9:13] + s[14:18] + s[19:23] + s[24:])
	if err != nil {
		return guid{}, false
	}
	return swap([16]byte(b)), true
}

// known reads the GUIDs of our own tables.
func known(s string) guid {
	g, ok := parseGUID(s)
	if !ok {
		panic("not a GUID: " + s)
	}
	return g
}
