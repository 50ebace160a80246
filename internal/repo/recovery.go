package repo

import (
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"holdfast/internal/repo/internal/seal"
)

// A recovery key is 256 random bits, for paper: 13 groups of 5 characters of
// Crockford's base 32 (no I, L, O and U), joined by "-". A group is 4 characters
// of 5 bits of the key each, the first bits first, and a check character; the last
// 4 bits are zero. Read back, case, spaces, dashes and line ends do not matter, and O,
// I and L are taken for what they look like.
//
// The check character is, in the field of 32 elements (x⁵ + x² + 1),
//
//	g + a·d₀ + a²·d₁ + a³·d₂ + a⁴·d₃
//
// for the group's number g, counted from 1, its characters d and a = 2. It finds
// any one wrong character in a group, any two that were exchanged, and
// groups in the wrong order.
const (
	recoveryAlphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
	recoveryGroups   = 13
	recoveryGroup    = 5
	recoveryLen      = recoveryGroups * recoveryGroup
)

// gf32Double multiplies by a.
func gf32Double(v byte) byte {
	if v <<= 1; v&32 != 0 {
		v ^= 0b100101
	}
	return v
}

// recoveryCheck is the check character of group g, counted from 0.
func recoveryCheck(g int, d []byte) byte {
	var sum byte
	for i := len(d) - 1; i >= 0; i-- { // Horner's rule
		sum = gf32Double(sum ^ d[i])
	}
	return sum ^ byte(g+1)
}

func formatRecovery(key [32]byte) string {
	var groups []string
	bit := func(i int) byte {
		if i >= 256 {
			return 0
		}
		return key[i/8] >> (7 - i%8) & 1
	}
	at := 0
	for g := range recoveryGroups {
		d := make([]byte, recoveryGroup-1)
		for i := range d {
			for range 5 {
				d[i] = d[i]<<1 | bit(at)
				at++
			}
		}
		d = append(d, recoveryCheck(g, d))
		for i := range d {
			d[i] = recoveryAlphabet[d[i]]
		}
		groups = append(groups, string(d))
	}
	return strings.Join(groups, "-")
}

// parseRecovery gives the 32 bytes of a recovery key as somebody typed it. Both
// results are nil for what is none; for what looks like one and is mistyped
// the error says where.
func parseRecovery(typed string) ([]byte, error) {
	var d []byte
	separators := 0
	for _, c := range strings.ToUpper(typed) {
		switch c {
		case ' ', '-', '\t', '\n', '\r', '\u2013', '\u2014':
			separators++
			continue
		case 'O':
			c = '0'
		case 'I', 'L':
			c = '1'
		}
		v := strings.IndexRune(recoveryAlphabet, c)
		if v < 0 || len(d) > 2*recoveryLen {
			return nil, nil
		}
		d = append(d, byte(v))
	}
	if len(d) != recoveryLen {
		if separators < recoveryGroups-3 || len(d) < recoveryLen*3/4 {
			return nil, nil
		}
		return nil, fmt.Errorf("it has %d characters, not %d", len(d), recoveryLen)
	}
	var wrong []string
	key := make([]byte, 33)
	at := 0
	for g := range recoveryGroups {
		group := d[g*recoveryGroup : (g+1)*recoveryGroup]
		if recoveryCheck(g, group[:recoveryGroup-1]) != group[recoveryGroup-1] {
			wrong = append(wrong, fmt.Sprint(g+1))
		}
		for _, v := range group[:recoveryGroup-1] {
			for b := 4; b >= 0; b-- {
				key[at/8] |= v >> b & 1 << (7 - at%8)
				at++
			}
		}
	}
	if len(wrong) > recoveryGroups/2 && separators < recoveryGroups-3 {
		return nil, nil // 65 letters by chance
	}
	if len(wrong) > 0 {
		return nil, fmt.Errorf("these of its %d groups are mistyped: %s", recoveryGroups, strings.Join(wrong, ", "))
	}
	if key[32] != 0 {
		return nil, errors.New("its last group is mistyped")
	}
	return key[:32], nil
}

// credential is what somebody typed to open a repository.
type credential struct {
	text     []byte
	recovery []byte // the 32 bytes, when the text is a recovery key
	mistyped error  // what is wrong with it, when it looks like one
}

func newCredential(text []byte) *credential {
	c := &credential{text: text}
	c.recovery, c.mistyped = parseRecovery(string(text))
	return c
}

// secret is what opens a slot of that kind; empty when this is no such thing.
func (c *credential) secret(kind string) []byte {
	if kind == seal.KindRecovery {
		return c.recovery
	}
	return c.text
}

// newRecovery makes a recovery key, and gives it as it is printed.
func newRecovery() (*credential, string) {
	var key [32]byte
	rand.Read(key[:])
	return &credential{recovery: key[:]}, formatRecovery(key)
}
