package seal

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"golang.org/x/crypto/argon2"
)

// KDF is a slot's clear part: how its passphrase becomes a key (RFC 9106).
type KDF struct {
	Name    string    `json:"kdf"`
	Time    uint32    `json:"time"`
	Memory  uint32    `json:"memory_kib"`
	Threads uint8     `json:"threads"`
	Salt    Hex       `json:"salt"`
	Root    int       `json:"root"`              // generation of the root key
	RootID  string    `json:"root_id,omitempty"` // of the root key: Key.RootID
	Kind    string    `json:"kind,omitempty"`    // "" for a passphrase, or KindRecovery
	Label   string    `json:"label"`
	Created time.Time `json:"created"`
}

// KindRecovery is the kind of a slot whose passphrase is the 32 bytes of a
// recovery key.
const KindRecovery = "recovery"

// DefaultKDF is RFC 9106's second recommended option (section 4): 3 passes
// over 64 MiB with 4 lanes, about 0.1 s on one core of 2026.
// The salt is to be set.
func DefaultKDF() KDF {
	return KDF{Name: "argon2id", Time: 3, Memory: 64 << 10, Threads: 4, Root: 1}
}

// RecoveryKDF is as cheap as the function can be: nobody guesses 256 random bits.
// The salt is to be set.
func RecoveryKDF() KDF {
	return KDF{Name: "argon2id", Time: 1, Memory: 8, Threads: 1, Kind: KindRecovery}
}

// RootID tells root keys apart without telling anything of them.
func (k *Key) RootID() string {
	id := k.Derive(nil, "root id")
	return hex.EncodeToString(id[:8])
}

// Key runs the function. Parameters out of bounds are ErrDamaged: they come
// from the store, and must not make the program eat all memory.
func (k *KDF) Key(passphrase []byte) (Key, error) {
	if k.Name != "argon2id" {
		return Key{}, fmt.Errorf("%w: key derivation %q", ErrVersion, k.Name)
	}
	if k.Time < 1 || k.Time > 64 || k.Memory < 8 || k.Memory > 4<<20 || k.Threads < 1 || k.Threads > 64 ||
		len(k.Salt) < 16 || len(k.Salt) > 64 {
		return Key{}, fmt.Errorf("%w: key derivation parameters", ErrDamaged)
	}
	return Key(argon2.IDKey(passphrase, k.Salt, k.Time, k.Memory, k.Threads, 32)), nil
}

// Ring is the keyring's content.
type Ring struct {
	IDs     Hex      `json:"ids"`
	Sign    Hex      `json:"sign"`
	Masters []Master `json:"masters"`
}

// Master is a numbered master key.
type Master struct {
	Number uint32 `json:"number"`
	Key    Hex    `json:"key"`
}

// ParseRing reads and checks a keyring's content.
func ParseRing(p []byte) (*Ring, error) {
	var r Ring
	if err := Unmarshal(p, &r); err != nil {
		return nil, err
	}
	ok := len(r.IDs) == 32 && len(r.Sign) == 32 && len(r.Masters) > 0
	for i, m := range r.Masters {
		ok = ok && m.Number == uint32(i+1) && len(m.Key) == 32
	}
	if !ok {
		return nil, fmt.Errorf("%w: keyring", ErrDamaged)
	}
	return &r, nil
}

// Newest is the master key for new objects.
func (r *Ring) Newest() (uint32, *Key) {
	m := r.Masters[len(r.Masters)-1]
	return m.Number, (*Key)(m.Key)
}

// Master is the master key of that number.
func (r *Ring) Master(n uint32) (*Key, error) {
	if n < 1 || int64(n) > int64(len(r.Masters)) {
		return nil, fmt.Errorf("%w: %w: it is sealed with master key %d, the keyring has %d; use a passphrase that was added since, or put back keyring/",
			ErrDamaged, ErrNoKey, n, len(r.Masters))
	}
	return (*Key)(r.Masters[n-1].Key), nil
}

// Hex is bytes that JSON shows as hex digits.
type Hex []byte

func (h Hex) MarshalJSON() ([]byte, error) { return json.Marshal(hex.EncodeToString(h)) }

func (h *Hex) UnmarshalJSON(p []byte) error {
	var s string
	if err := json.Unmarshal(p, &s); err != nil {
		return err
	}
	b, err := hex.DecodeString(s)
	*h = b
	return err
}

// ParseDigest reads a SHA-256, or an id of that length, in 64 hex digits.
func ParseDigest(s string) (d [32]byte, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != 32 {
		return d, fmt.Errorf("%w: digest %.80q", ErrDamaged, s)
	}
	return [32]byte(b), nil
}
