package index

import (
	"crypto/ed25519"
	"errors"
	"math/rand/v2"
	"reflect"
	"testing"

	"holdfast/internal/repo/internal/seal"
)

// What is stored is read back; with any byte another it is damaged, and it is
// nobody else's.
func TestObject(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	_, packs, _ := object(rng, nil)
	repo, master := [16]byte{1}, &seal.Key{1}
	sign := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	verify := sign.Public().(ed25519.PublicKey)
	d, p, err := Marshal(packs, nil, repo, 7, master, sign)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse(p, d, [16]byte{2}, verify); !errors.Is(err, seal.ErrForeign) {
		t.Errorf("in another repository: %v", err)
	}
	for i := range p {
		p[i] ^= 1
		if _, err := Parse(p, d, repo, verify); !errors.Is(err, seal.ErrDamaged) {
			t.Fatalf("byte %d: %v", i, err)
		}
		p[i] ^= 1
	}
	o, err := Parse(p, d, repo, verify)
	if err != nil || o.Key != 7 || len(o.Packs) != len(packs) {
		t.Fatalf("%+v, %v", o, err)
	}
	if back, err := o.Open(master); err != nil || !reflect.DeepEqual(back, packs) {
		t.Errorf("%v, %v", back, err)
	}
}

// Whatever is in an index object, reading it gives an error or packs that can be
// written again.
func FuzzObject(f *testing.F) {
	f.Add([]byte(`{"packs":[["00",1,1]]}`), []byte{})
	f.Add([]byte(`{"packs":[["0000000000000000000000000000000000000000000000000000000000000001",1000,1]],"made":[5]}`), []byte{0, 0, 0, 0})
	sign := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	f.Fuzz(func(t *testing.T, clear, content []byte) {
		packs, err := Unmarshal(clear, content)
		if err != nil {
			return
		}
		if _, _, err := Marshal(packs, nil, [16]byte{}, 1, &seal.Key{}, sign); err != nil {
			t.Error(err)
		}
	})
}
