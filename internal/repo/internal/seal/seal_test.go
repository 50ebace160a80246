package seal

import (
	"bytes"
	"crypto/ed25519"
	"errors"
	"testing"
)

func sample(magic string) (*Document, *Key, ed25519.PrivateKey) {
	d := &Document{Header: NewHeader(magic, 2, 1, [16]byte{1, 2, 3}), Clear: []byte(`{"a":1}`), Sealed: []byte(`{"secret":"payroll"}`)}
	return d, &Key{7}, ed25519.NewKeyFromSeed(make([]byte, 32))
}

func TestDocument(t *testing.T) {
	for _, magic := range []string{Entry, Lease} {
		d, key, sign := sample(magic)
		p, err := d.Marshal(key, "chain", sign)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := Parse(p, magic)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := raw.Open(key, "chain"); err != nil || !bytes.Equal(got, d.Sealed) || !bytes.Equal(raw.Clear, d.Clear) || raw.Header != d.Header {
			t.Fatalf("%q, %v", got, err)
		}
		if _, err := raw.Open(key, "index"); !errors.Is(err, ErrDamaged) {
			t.Errorf("another purpose's key opens it: %v", err)
		}
		if magic == Entry {
			if err := raw.Verify(d.Header.Repo, sign.Public().(ed25519.PublicKey)); err != nil {
				t.Error(err)
			}
			if err := raw.Verify([16]byte{9}, sign.Public().(ed25519.PublicKey)); !errors.Is(err, ErrForeign) {
				t.Errorf("another repository: %v", err)
			}
		}
	}
}

// No changed bit gets through: form, signature or seal refuse it.
func TestBits(t *testing.T) {
	for _, magic := range []string{Entry, Lease} {
		d, key, sign := sample(magic)
		p, _ := d.Marshal(key, "chain", sign)
		for i := range len(p) * 8 {
			q := bytes.Clone(p)
			q[i/8] ^= 1 << (i % 8)
			raw, err := Parse(q, magic)
			if err == nil && Signed(magic) {
				err = raw.Verify(d.Header.Repo, sign.Public().(ed25519.PublicKey))
			}
			if err == nil {
				_, err = raw.Open(key, "chain")
			}
			if err == nil {
				t.Fatalf("bit %d gets through", i)
			}
		}
		for n := range p {
			if _, err := Parse(p[:n], magic); err == nil {
				t.Fatalf("cut to %d bytes it is read", n)
			}
		}
	}
}

func TestKDFBounds(t *testing.T) {
	for _, k := range []KDF{
		{Name: "scrypt", Time: 1, Memory: 64, Threads: 1, Salt: make([]byte, 16)},
		{Name: "argon2id", Time: 0, Memory: 64, Threads: 1, Salt: make([]byte, 16)},
		{Name: "argon2id", Time: 1, Memory: 1 << 31, Threads: 1, Salt: make([]byte, 16)},
		{Name: "argon2id", Time: 1 << 30, Memory: 64, Threads: 1, Salt: make([]byte, 16)},
		{Name: "argon2id", Time: 1, Memory: 64, Threads: 1, Salt: make([]byte, 3)},
	} {
		if _, err := k.Key([]byte("p")); err == nil {
			t.Errorf("%+v is taken", k)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, magic := range []string{Entry, Lease} {
		d, key, sign := sample(magic)
		p, _ := d.Marshal(key, "chain", sign)
		f.Add(p, magic)
	}
	key := &Key{7}
	f.Fuzz(func(t *testing.T, p []byte, magic string) {
		raw, err := Parse(p, magic)
		if err != nil {
			return
		}
		raw.Open(key, "chain")
		if q := raw.Header.Append(nil); !bytes.Equal(q, p[:HeaderLen]) {
			t.Errorf("header %x is read as %x", p[:HeaderLen], q)
		}
	})
}
