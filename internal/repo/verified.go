package repo

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"

	"holdfast/internal/repo/internal/seal"
)

// verified remembers in which check this machine last read each pack whole. It
// lies in the repository's cache: what one machine has read proves nothing to
// another, whose way to the store is its own, and its loss costs only that
// everything is read again. It counts checks, not days: no clock is trusted.
//
// A pack that is new waits its turn behind those read before it came, so that
// however much comes, each is read again.
//
// The file: "HFVP", the number of the last check (4), per pack its SHA-256 (32)
// and the number of the check that read it, or with bit 31 the one that first
// listed it (4), CRC-32C of all before (4).
type verified struct {
	path  string // "" remembers nothing
	check uint32 // the one under way
	packs map[[32]byte]uint32
}

const (
	verifiedMagic = "HFVP"
	onlyListed    = 1 << 31
)

// verifiedIn reads the memory in a repository's cache. One that is damaged is
// as good as none.
func verifiedIn(cache string) *verified {
	if cache == "" {
		return &verified{packs: map[[32]byte]uint32{}, check: 1}
	}
	v := &verified{path: filepath.Join(cache, "verified")}
	v.packs, v.check = readVerified(v.path)
	v.check++
	return v
}

func readVerified(path string) (packs map[[32]byte]uint32, check uint32) {
	packs = map[[32]byte]uint32{}
	p, err := os.ReadFile(path)
	if err != nil || len(p) < 12 || (len(p)-12)%36 != 0 || string(p[:4]) != verifiedMagic {
		return packs, 0
	}
	body := p[:len(p)-4]
	if seal.Checksum(body) != binary.LittleEndian.Uint32(p[len(body):]) {
		return packs, 0
	}
	check = binary.LittleEndian.Uint32(body[4:])
	for b := body[8:]; len(b) > 0; b = b[36:] {
		packs[[32]byte(b[:32])] = binary.LittleEndian.Uint32(b[32:])
	}
	return packs, check
}

func (v *verified) note(name [32]byte) { v.packs[name] = v.check }

// unread counts packs that were never read.
func (v *verified) unread(packs map[[32]byte]packInfo) (n int) {
	for name := range packs {
		if at, ok := v.packs[name]; !ok || at&onlyListed != 0 {
			n++
		}
	}
	return n
}

// save remembers what was read now, of the packs that there are. What another
// check beside this one notes may get lost.
func (v *verified) save(live map[[32]byte]packInfo) (err error) {
	if v.path == "" {
		return nil
	}
	packs := map[[32]byte]uint32{}
	for name := range live {
		packs[name] = v.check | onlyListed
		if at, ok := v.packs[name]; ok {
			packs[name] = at
		}
	}
	if err := os.MkdirAll(filepath.Dir(v.path), 0o700); err != nil {
		return err
	}
	p := append(make([]byte, 0, 12+36*len(packs)), verifiedMagic...)
	p = binary.LittleEndian.AppendUint32(p, v.check)
	for name, n := range packs {
		p = binary.LittleEndian.AppendUint32(append(p, name[:]...), n)
	}
	p = binary.LittleEndian.AppendUint32(p, seal.Checksum(p))
	f, err := os.CreateTemp(filepath.Dir(v.path), "verified-*")
	if err != nil {
		return err
	}
	_, err = f.Write(p)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), v.path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// choose picks the packs to read: all, or those read the longest ago until
// they make up the percentage of all bytes.
func (v *verified) choose(packs map[[32]byte]packInfo, o CheckOptions) map[[32]byte]bool {
	read := map[[32]byte]bool{}
	if !o.ReadData {
		return read
	}
	var total int64
	for _, info := range packs {
		total += info.size
	}
	if o.Percent > 0 && o.Percent < 100 {
		total = int64(math.Ceil(float64(total) * o.Percent / 100))
	}
	turn := func(name [32]byte) uint32 {
		if at, ok := v.packs[name]; ok {
			return at &^ onlyListed
		}
		return v.check
	}
	names := slices.SortedFunc(maps.Keys(packs), func(a, b [32]byte) int {
		return cmp.Or(cmp.Compare(turn(a), turn(b)), bytes.Compare(a[:], b[:]))
	})
	for _, name := range names {
		if total <= 0 {
			break
		}
		read[name] = true
		total -= packs[name].size
	}
	return read
}
