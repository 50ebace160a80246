package repo

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
)

// An entry taken out of the chain, damaged, or put in the place of another, is
// noticed. The points of the others can be read, and nothing is added.
func TestChain(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	contents := map[PointID][]byte{}
	for i := range 4 {
		content := image(rand.New(rand.NewPCG(1, uint64(i))), 3*ChunkSize)
		p, err := save(r, "a", content, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		contents[p.ID] = content
	}
	for what, c := range map[string]func(*blob.Mem) int{
		"missing": func(s *blob.Mem) int { s.Delete(ctx, chain.Name(2)); return 3 },
		"damaged": func(s *blob.Mem) int {
			s.Damage(chain.Name(3), func(p []byte) []byte { p[len(p)-70] ^= 1; return p })
			return 3
		},
		"newest damaged": func(s *blob.Mem) int {
			s.Damage(chain.Name(4), func(p []byte) []byte { return p[:len(p)-1] })
			return 3
		},
		"exchanged": func(s *blob.Mem) int {
			p, _ := s.Get(ctx, chain.Name(3), 0, -1)
			s.Damage(chain.Name(2), func([]byte) []byte { return p })
			return 3
		},
		"renumbered": func(s *blob.Mem) int {
			for n := uint64(2); n < 4; n++ {
				p, _ := s.Get(ctx, chain.Name(n+1), 0, -1)
				s.Damage(chain.Name(n), func([]byte) []byte { return p })
			}
			s.Delete(ctx, chain.Name(4))
			return 1
		},
	} {
		s := store.Clone()
		left := c(s)
		r := reopen(t, s)
		points, err := r.Points(ctx)
		if err != nil || len(points) != left || len(r.Damage()) == 0 {
			t.Errorf("%s: %d points, want %d; damage %q; %v", what, len(points), left, r.Damage(), err)
		}
		for _, p := range points {
			equal(t, r, &p, contents[p.ID])
		}
		if report, err := r.Check(ctx, CheckOptions{}); err != nil || len(report.Problems) == 0 {
			t.Errorf("%s: check: %v, %+v", what, err, report)
		}
		before, _ := blob.Names(ctx, s, "chain/")
		if _, err := save(r, "b", contents[points[0].ID], nil, nil); err == nil {
			t.Errorf("%s: a point was added", what)
		}
		if after, _ := blob.Names(ctx, s, "chain/"); !slices.Equal(before, after) {
			t.Errorf("%s: chain went from %v to %v", what, before, after)
		}
	}
	// The end cut off: a machine that has seen it knows, an empty one cannot.
	cache := t.TempDir()
	if r, err := Open(ctx, store, secret, Options{Cache: cache}); err != nil {
		t.Fatal(err)
	} else {
		r.Close()
	}
	store.Delete(ctx, chain.Name(4))
	if _, err := Open(ctx, store, secret, Options{Cache: cache}); !errors.Is(err, ErrRolledBack) {
		t.Errorf("rolled back: %v", err)
	}
}

// A lost index object is made up for from the packs, and the next run stores
// the result.
func TestLostIndex(t *testing.T) {
	content := image(rng(t), 30*ChunkSize)
	store := new(blob.Mem)
	r := create(t, store)
	p, err := save(r, "a", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := save(r, "b", image(rng(t), 5*ChunkSize), nil, nil); err != nil {
		t.Fatal(err)
	}
	names, _ := blob.Names(ctx, store, "index/")
	for what, lose := range map[string]func(*blob.Mem, string){
		"missing": func(s *blob.Mem, name string) { s.Delete(ctx, name) },
		"damaged": func(s *blob.Mem, name string) { s.Damage(name, func(p []byte) []byte { p[100] ^= 1; return p }) },
	} {
		for _, mend := range []string{"run", "check"} {
			s := store.Clone()
			for _, name := range names {
				lose(s, name)
			}
			r := reopen(t, s)
			if len(r.Damage()) != len(names) {
				t.Errorf("%s: damage %q", what, r.Damage())
			}
			equal(t, r, p, content)
			if mend == "check" {
				report, err := r.Check(ctx, CheckOptions{ReadData: true})
				if err != nil || len(report.Problems) != len(names) {
					t.Errorf("%s: check: %v, %+v", what, err, report)
				}
			} else if q, err := save(r, "c", content, nil, nil); err != nil || q.NewBytes > ChunkSize {
				t.Errorf("%s: next run: %v, %+v", what, err, q)
			}
			if len(r.Damage()) != 0 {
				t.Errorf("%s: damage after %s: %q", what, mend, r.Damage())
			}
			r = reopen(t, s)
			if len(r.Damage()) != 0 {
				t.Errorf("%s: damage on another machine after %s: %q", what, mend, r.Damage())
			}
			equal(t, r, p, content)
			clean(t, r, true)
		}
	}
}

// A single damaged, shortened, exchanged or missing pack is found by check,
// read around where another copy exists, never returned as data, and refilled
// by the next run.
func TestDamagedPack(t *testing.T) {
	rng := rng(t)
	content := image(rng, 20*ChunkSize)
	store := new(blob.Mem)
	p, err := save(create(t, store), "a", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	names, _ := blob.Names(ctx, store, "packs/")
	for _, name := range names {
		other := names[(slices.Index(names, name)+1)%len(names)]
		for what, f := range map[string]func(s *blob.Mem){
			"bit": func(s *blob.Mem) {
				s.Damage(name, func(p []byte) []byte { p[rng.IntN(len(p))] ^= 1 << rng.IntN(8); return p })
			},
			"short":     func(s *blob.Mem) { s.Damage(name, func(p []byte) []byte { return p[:len(p)/2] }) },
			"empty":     func(s *blob.Mem) { s.Damage(name, func(p []byte) []byte { return nil }) },
			"missing":   func(s *blob.Mem) { s.Delete(ctx, name) },
			"exchanged": func(s *blob.Mem) { q, _ := s.Get(ctx, other, 0, -1); s.Damage(name, func([]byte) []byte { return q }) },
		} {
			s := store.Clone()
			f(s)
			r := reopen(t, s)
			if err := differs(r, p, content); err != nil && !errors.Is(err, ErrDamaged) {
				t.Errorf("%s %s: %v", what, name, err)
			}
			report, err := r.Check(ctx, CheckOptions{ReadData: true})
			if err != nil || len(report.Problems) == 0 {
				t.Fatalf("%s %s: check found nothing; %v", what, name, err)
			}
			// The next run reads the source, and stores what is lost again.
			r = reopen(t, s)
			if _, err := save(r, "a", content, nil, nil); err != nil {
				t.Fatal(err)
			}
			r = reopen(t, s)
			equal(t, r, p, content)
			report, err = r.Check(ctx, CheckOptions{ReadData: true})
			if err != nil {
				t.Fatal(err)
			}
			for _, pr := range report.Problems {
				if pr.Point != "" {
					t.Errorf("%s %s: after the next run: %+v", what, name, pr)
				}
			}
		}
	}
}

// An increment refills what it would otherwise not have read.
func TestMissing(t *testing.T) {
	rng := rng(t)
	content := image(rng, 20*ChunkSize)
	noise(rng, content[:ChunkSize])
	content[0] = 1
	store := new(blob.Mem)
	p, err := save(create(t, store), "a", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	names, _ := blob.Names(ctx, store, "packs/")
	largest := slices.MaxFunc(names, func(a, b string) int {
		pa, _ := store.Get(ctx, a, 0, -1)
		pb, _ := store.Get(ctx, b, 0, -1)
		return len(pa) - len(pb)
	})
	r := reopen(t, store)
	d, _ := r.OpenDisk(ctx, p.Disks[0])
	for e := range d.Missing(ctx) {
		t.Fatalf("missing %v in a sound repository", e)
	}
	store.Delete(ctx, largest)
	r = reopen(t, store)
	if _, err := r.Check(ctx, CheckOptions{}); err != nil {
		t.Fatal(err)
	}
	d, err = r.OpenDisk(ctx, p.Disks[0])
	if err != nil {
		t.Fatal(err)
	}
	var changed []int
	for e, err := range d.Missing(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		changed = append(changed, int(e.Off/ChunkSize))
	}
	if len(changed) == 0 {
		t.Fatal("nothing is missing")
	}
	if _, err := save(r, "a", content, p, changed); err != nil {
		t.Fatal(err)
	}
	equal(t, r, p, content)
}

// TestKey: a key opens in a passphrase's stead, and only its own repository.
func TestKey(t *testing.T) {
	store, other := new(blob.Mem), new(blob.Mem)
	key, strange := create(t, store).Key(), create(t, other).Key()
	for _, c := range []struct {
		what      string
		pass, key []byte
		want      error
	}{
		{"key alone", nil, key, nil},
		{"another's key", nil, strange, ErrPassphrase},
		{"another's key and the passphrase", secret, strange, nil},
		{"half a key", nil, key[:16], ErrPassphrase},
	} {
		r, err := Open(ctx, store, c.pass, Options{Cache: t.TempDir(), Key: c.key})
		if !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.what, err, c.want)
		}
		if err == nil && !bytes.Equal(r.Key(), key) {
			t.Errorf("%s: it has another key now", c.what)
		}
	}
}
