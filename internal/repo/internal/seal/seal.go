// Package seal is the repository's cryptography and the outer form of its
// objects: headers, documents, signatures, key derivation (docs/format.md §1
// and §2). It knows nothing of what is inside.
//
// Everything here is safe in parallel once made.
package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"

	"holdfast/internal/repo/internal/codec"
)

// Version is the format's version that this package reads and writes.
const Version = 1

const (
	HeaderLen  = 64
	TagLen     = 16        // AES-GCM's tag, bytes
	maxPart    = 32 << 20  // clear or sealed part of a document, bytes
	maxObject  = 64 << 20  // what a store takes, bytes
	MaxContent = 128 << 20 // decoded content of a document, bytes
	sigLen     = ed25519.SignatureSize
)

// Magics of the objects.
const (
	Config  = "HFCF"
	Slot    = "HFKS"
	Keyring = "HFKR"
	Pack    = "HFPK"
	Index   = "HFIX"
	Entry   = "HFCE"
	Lease   = "HFLS"
	Beat    = "HFBT"
	Pin     = "HFPN"
	Tier    = "HFTR"
)

var (
	// ErrDamaged: wrong checksum, length, signature or key.
	ErrDamaged = errors.New("damaged")
	// ErrVersion: written by a newer version of the format.
	ErrVersion = errors.New("written in a newer format")
	// ErrNoKey: sealed with a master key that the keyring does not have. It is
	// ErrDamaged too, since that is how a lost keyring shows.
	ErrNoKey = errors.New("no key for it")
	// ErrTooLarge: what was to be written is too large for a document.
	ErrTooLarge = errors.New("too large for one document")
	// ErrForeign: belongs to another repository.
	ErrForeign = errors.New("belongs to another repository")
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum is CRC-32C.
func Checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// Header is the first 64 bytes of every object.
type Header struct {
	Magic string // 4 bytes
	Kind  uint16
	Key   uint32 // number of the master key, 0 for none
	Repo  [16]byte
	Salt  [32]byte
}

// NewHeader gives a header with a fresh random salt.
func NewHeader(magic string, kind uint16, key uint32, repo [16]byte) Header {
	h := Header{Magic: magic, Kind: kind, Key: key, Repo: repo}
	rand.Read(h.Salt[:]) // never fails (crypto/rand)
	return h
}

// Append appends the 64 bytes.
func (h *Header) Append(p []byte) []byte {
	n := len(p)
	p = append(p, h.Magic...)
	p = binary.LittleEndian.AppendUint16(p, Version)
	p = binary.LittleEndian.AppendUint16(p, h.Kind)
	p = binary.LittleEndian.AppendUint32(p, h.Key)
	p = append(p, 0, 0, 0, 0)
	p = append(p, h.Repo[:]...)
	p = append(p, h.Salt[:]...)
	binary.LittleEndian.PutUint32(p[n+12:], Checksum(p[n:]))
	return p
}

// ParseHeader reads a header and checks magic, checksum and version.
func ParseHeader(p []byte, magic string) (Header, error) {
	var h Header
	if len(p) < HeaderLen {
		return h, fmt.Errorf("%w: header of %d bytes", ErrDamaged, len(p))
	}
	p = p[:HeaderLen]
	if string(p[:4]) != magic {
		return h, fmt.Errorf("%w: magic %q, want %q", ErrDamaged, p[:4], magic)
	}
	var zeroed [HeaderLen]byte
	copy(zeroed[:], p)
	clear(zeroed[12:16])
	if Checksum(zeroed[:]) != binary.LittleEndian.Uint32(p[12:]) {
		return h, fmt.Errorf("%w: header checksum", ErrDamaged)
	}
	if v := binary.LittleEndian.Uint16(p[4:]); v != Version {
		return h, fmt.Errorf("%w: version %d, this program knows %d", ErrVersion, v, Version)
	}
	h.Magic = magic
	h.Kind = binary.LittleEndian.Uint16(p[6:])
	h.Key = binary.LittleEndian.Uint32(p[8:])
	copy(h.Repo[:], p[16:])
	copy(h.Salt[:], p[32:])
	return h, nil
}

// Key is 32 secret bytes.
type Key [32]byte

// Derive gives the key for a purpose by HKDF-SHA-256.
func (k *Key) Derive(salt []byte, purpose string) Key {
	b, err := hkdf.Key(sha256.New, k[:], salt, "holdfast v1 "+purpose, len(k))
	if err != nil {
		panic(err) // only for lengths that SHA-256 cannot give
	}
	return Key(b)
}

// AEAD is AES-256-GCM under the key.
func (k *Key) AEAD() cipher.AEAD {
	b, err := aes.NewCipher(k[:])
	if err == nil {
		var a cipher.AEAD
		if a, err = cipher.NewGCM(b); err == nil {
			return a
		}
	}
	panic(err) // only for key lengths that AES does not have
}

// Document is every object but a pack.
type Document struct {
	Header Header
	Clear  []byte // JSON
	Sealed []byte // content of the sealed part, opened; nil for none
}

// Signed reports whether documents of this magic carry a signature.
func Signed(magic string) bool { return magic == Config || magic == Index || magic == Entry }

// Marshal seals and, for the magics that want it, signs a document. With a nil
// key there is no sealed part.
func (d *Document) Marshal(key *Key, purpose string, sign ed25519.PrivateKey) ([]byte, error) {
	var plain []byte
	sealedLen := 0
	if key != nil {
		plain = codec.Small.Encode(nil, d.Sealed)
		sealedLen = len(plain) + TagLen
	}
	if len(d.Clear) > maxPart || sealedLen > maxPart || HeaderLen+8+len(d.Clear)+sealedLen+sigLen > maxObject {
		return nil, fmt.Errorf("document of %d + %d bytes: %w", len(d.Clear), sealedLen, ErrTooLarge)
	}
	p := d.Header.Append(make([]byte, 0, HeaderLen+8+len(d.Clear)+sealedLen+sigLen))
	p = binary.LittleEndian.AppendUint32(p, uint32(len(d.Clear)))
	p = binary.LittleEndian.AppendUint32(p, uint32(sealedLen))
	p = append(p, d.Clear...)
	if key != nil {
		k := key.Derive(d.Header.Salt[:], purpose)
		p = k.AEAD().Seal(p, make([]byte, 12), plain, p)
	}
	if Signed(d.Header.Magic) {
		p = append(p, ed25519.Sign(sign, signedMessage(p))...)
	}
	return p, nil
}

// MarshalUnsigned is Marshal for a document without a signature, whose clear part
// is given as what its JSON shows.
func MarshalUnsigned(h Header, clear any, content []byte, key *Key, purpose string) ([]byte, error) {
	c, err := json.Marshal(clear)
	if err != nil {
		return nil, err
	}
	d := Document{Header: h, Clear: c, Sealed: content}
	return d.Marshal(key, purpose, nil)
}

// Raw is a document as stored: checked for form, and for its signature once
// Verify said so, not opened.
type Raw struct {
	Header Header
	Clear  []byte
	ad     []byte // all before the sealed part
	sealed []byte
	signed []byte // all before the signature; nil when there is none
	sig    []byte
}

// Parse checks a document's form. The result points into p.
func Parse(p []byte, magic string) (*Raw, error) {
	h, err := ParseHeader(p, magic)
	if err != nil {
		return nil, err
	}
	if len(p) < HeaderLen+8 {
		return nil, fmt.Errorf("%w: document of %d bytes", ErrDamaged, len(p))
	}
	c, s := uint64(binary.LittleEndian.Uint32(p[HeaderLen:])), uint64(binary.LittleEndian.Uint32(p[HeaderLen+4:]))
	want := HeaderLen + 8 + c + s
	if Signed(magic) {
		want += sigLen
	}
	if c > maxPart || s > maxPart || want != uint64(len(p)) || s > 0 && s < TagLen+1 {
		return nil, fmt.Errorf("%w: parts of %d and %d bytes in a document of %d", ErrDamaged, c, s, len(p))
	}
	end := HeaderLen + 8 + c
	r := &Raw{Header: h, Clear: p[HeaderLen+8 : end], ad: p[:end], sealed: p[end : end+s]}
	if Signed(magic) {
		r.signed, r.sig = p[:end+s], p[end+s:]
	}
	return r, nil
}

// ParseOf is Parse for a document of that repository; ErrForeign for one of
// another.
func ParseOf(p []byte, magic string, repo [16]byte) (*Raw, error) {
	r, err := Parse(p, magic)
	if err == nil && r.Header.Repo != repo {
		err = ErrForeign
	}
	return r, err
}

// Verify checks repository and signature.
func (r *Raw) Verify(repo [16]byte, pub ed25519.PublicKey) error {
	if r.Header.Repo != repo {
		return ErrForeign
	}
	if r.signed == nil || !ed25519.Verify(pub, signedMessage(r.signed), r.sig) {
		return fmt.Errorf("%w: signature", ErrDamaged)
	}
	return nil
}

// Open decrypts the sealed part.
func (r *Raw) Open(key *Key, purpose string) ([]byte, error) { return r.open(nil, key, purpose) }

// OpenOver is Open that needs no more memory: the document's bytes are
// overwritten, and the result lies there. It can be done once.
func (r *Raw) OpenOver(key *Key, purpose string) ([]byte, error) {
	return r.open(r.sealed[:0], key, purpose)
}

func (r *Raw) open(dst []byte, key *Key, purpose string) ([]byte, error) {
	if len(r.sealed) == 0 {
		return nil, fmt.Errorf("%w: nothing sealed", ErrDamaged)
	}
	k := key.Derive(r.Header.Salt[:], purpose)
	plain, err := k.AEAD().Open(dst, make([]byte, 12), r.sealed, r.ad)
	if err != nil {
		return nil, fmt.Errorf("%w: does not open with its key", ErrDamaged)
	}
	content, err := codec.Take(plain, MaxContent)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return content, nil
}

// Unmarshal reads JSON from a document's part.
func Unmarshal(p []byte, v any) error {
	if err := json.Unmarshal(p, v); err != nil {
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return nil
}

func signedMessage(p []byte) []byte {
	sum := sha256.Sum256(p)
	return append([]byte("holdfast v1 signature\x00"), sum[:]...)
}
