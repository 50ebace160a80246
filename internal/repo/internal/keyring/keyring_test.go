package keyring

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

// Every single mistake in a recovery key is found, and none of the ways to write
// it matters.
func TestRecoveryForm(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for range 200 {
		var key [32]byte
		for i := range key {
			key[i] = byte(rng.Uint32())
		}
		printed := formatRecovery(key)
		if len(printed) != 77 {
			t.Fatalf("%q", printed)
		}
		got, err := parseRecovery(printed)
		if err != nil || !bytes.Equal(got, key[:]) {
			t.Fatalf("%q: %x, %v", printed, got, err)
		}
		for i := range printed {
			if printed[i] == '-' {
				continue
			}
			p := []byte(printed)
			for p[i] == printed[i] {
				p[i] = recoveryAlphabet[rng.IntN(32)]
			}
			if got, err := parseRecovery(string(p)); got != nil || err == nil {
				t.Fatalf("%q for %q goes through", p, printed)
			}
			p = []byte(printed)
			if i+1 < len(p) && p[i+1] != '-' && p[i] != p[i+1] {
				p[i], p[i+1] = p[i+1], p[i]
				if got, err := parseRecovery(string(p)); got != nil || err == nil {
					t.Fatalf("%q for %q goes through", p, printed)
				}
			}
		}
		groups := strings.Split(printed, "-")
		a, b := rng.IntN(13), rng.IntN(13)
		if groups[a] != groups[b] {
			groups[a], groups[b] = groups[b], groups[a]
			if got, err := parseRecovery(strings.Join(groups, "-")); got != nil || err == nil {
				t.Fatalf("groups %d and %d exchanged go through", a, b)
			}
		}
	}
	for _, s := range []string{"", "correct horse battery staple", strings.Repeat("A", 65), strings.Repeat("ab ", 30), strings.Repeat("日", 65)} {
		if got, err := parseRecovery(s); got != nil || err != nil && strings.Contains(s, "horse") {
			t.Errorf("%q: %x, %v", s, got, err)
		}
	}
}

// A slot opens with its passphrase or recovery key and with nothing else, and no
// more when it is removed; the root key opens all that is under it.
func TestUnlock(t *testing.T) {
	ctx, store, repo := t.Context(), new(blob.Mem), [16]byte{1}
	u := New()
	ring, err := Seal(repo, u.Root, u.Generation, u.Ring)
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Put(ctx, Name(repo, u.Number), ring); err != nil {
		t.Fatal(err)
	}
	cheap := seal.RecoveryKDF()
	recovery, printed := NewRecovery()
	paper, err := PutSlot(ctx, store, repo, u.Root, recovery.Secret(cheap.Kind), cheap)
	if err != nil {
		t.Fatal(err)
	}
	cheap.Kind = ""
	words, err := PutSlot(ctx, store, repo, u.Root, []byte("words"), cheap)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		m    Means
		slot string
		want error
	}{
		{Means{Passphrase: []byte("words")}, words, nil},
		{Means{Passphrase: []byte(printed)}, paper, nil},
		{Means{Key: u.Root[:]}, "", nil},
		{Means{Key: make([]byte, 32), Passphrase: []byte("words")}, words, nil},
		{Means{Passphrase: []byte("word")}, "", ErrPassphrase},
		{Means{Passphrase: []byte(printed[1:])}, "", ErrPassphrase},
		{Means{}, "", ErrPassphrase},
		{Means{Passphrase: []byte("words"), Removed: map[string]bool{words: true}}, "", ErrPassphrase},
	} {
		got, err := Unlock(ctx, store, repo, c.m)
		if !errors.Is(err, c.want) || err == nil && (got.Slot != c.slot || *got.Root != *u.Root || got.Number != 1) {
			t.Errorf("%+v: %+v, %v", c.m, got, err)
		}
	}
	for _, name := range []string{Name(repo, 1), SlotName(paper)} {
		p, err := store.Get(ctx, name, 0, -1)
		if err != nil || Check(name, p, repo) != nil || Check(name, p, [16]byte{2}) == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	store.Damage(SlotName(words), func(p []byte) []byte { p[len(p)-1] ^= 1; return p })
	if _, err := Unlock(ctx, store, repo, Means{Passphrase: []byte("words")}); !errors.Is(err, ErrPassphrase) || !errors.Is(err, seal.ErrDamaged) {
		t.Errorf("a damaged slot: %v", err)
	}
}

// A recovery key that is read is the one that is printed.
func FuzzRecovery(f *testing.F) {
	f.Add(formatRecovery([32]byte{1, 2, 3}))
	f.Add("O0-iIlL")
	f.Fuzz(func(t *testing.T, typed string) {
		key, err := parseRecovery(typed)
		if key == nil {
			return
		}
		again, againErr := parseRecovery(formatRecovery([32]byte(key)))
		if err != nil || againErr != nil || !bytes.Equal(again, key) {
			t.Errorf("%q: %v, %v", typed, err, againErr)
		}
	})
}
