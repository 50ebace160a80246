package repo

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/repo/internal/seal"
)

var (
	second = []byte("battery staple")
	third  = []byte("a third one")
	cheap  = seal.KDF{Name: "argon2id", Time: 1, Memory: 64, Threads: 1}
)

// openAs opens a repository with a passphrase, on a machine of its own.
func openAs(t *testing.T, s blob.Store, passphrase []byte) (*Repo, error) {
	t.Helper()
	r, err := Open(ctx, s, passphrase, Options{Cache: t.TempDir()})
	if err == nil {
		r.slotKDF = cheap
		t.Cleanup(func() { r.Close() })
	}
	return r, err
}

func mustOpen(t *testing.T, s blob.Store, passphrase []byte) *Repo {
	t.Helper()
	r, err := openAs(t, s, passphrase)
	if err != nil {
		t.Fatalf("%s: %v", passphrase, err)
	}
	return r
}

// keyed makes a repository with one point and two passphrases.
func keyed(t *testing.T) (*blob.Mem, *Point, []byte) {
	t.Helper()
	store := new(blob.Mem)
	create(t, store)
	r := mustOpen(t, store, secret)
	content := image(rand.New(rand.NewPCG(5, 6)), 6*ChunkSize)
	p, err := save(r, "a", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.AddPassphrase(ctx, "the second", second); err != nil {
		t.Fatal(err)
	}
	return store, p, content
}

func slotOf(t *testing.T, r *Repo, label string) Slot {
	t.Helper()
	slots, err := r.Slots(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range slots {
		if s.Label == label && s.State == SlotCurrent {
			return s
		}
	}
	t.Fatalf("no slot %q in %+v", label, slots)
	return Slot{}
}

func TestAddAndRemove(t *testing.T) {
	store, p, content := keyed(t)
	r := mustOpen(t, store, second)
	equal(t, r, p, content)
	one, two := slotOf(t, r, ""), slotOf(t, r, "the second")
	if one.InUse || !two.InUse || one.Kind != Passphrase || two.KDF.MemoryKiB != 64 {
		t.Errorf("slots %+v, %+v", one, two)
	}
	if _, err := r.AddPassphrase(ctx, "again", secret); err == nil {
		t.Error("one passphrase in two slots")
	}
	for _, label := range []string{"a\nb", strings.Repeat("x", 101), " x", "\xff"} {
		if _, err := r.AddPassphrase(ctx, label, third); err == nil {
			t.Errorf("label %q", label)
		}
	}
	if _, err := r.AddPassphrase(ctx, "", nil); !errors.Is(err, ErrPassphrase) {
		t.Errorf("an empty passphrase: %v", err)
	}
	if err := r.RemoveSlot(ctx, "0123456789abcdef", ""); !errors.Is(err, ErrNoSlot) {
		t.Errorf("remove none: %v", err)
	}
	if err := r.RemoveSlot(ctx, two.ID, ""); !errors.Is(err, ErrSlotInUse) {
		t.Errorf("remove the one in use: %v", err)
	}
	if err := r.RemoveSlot(ctx, two.ID, two.ID); err != nil {
		t.Errorf("remove the one in use, knowing it: %v", err)
	}
	if _, err := openAs(t, store, second); !errors.Is(err, ErrPassphrase) {
		t.Errorf("a removed passphrase: %v", err)
	}
	r = mustOpen(t, store, secret)
	if err := r.RemoveSlot(ctx, one.ID, one.ID); !errors.Is(err, ErrLastSlot) {
		t.Errorf("remove the last one: %v", err)
	}
	equal(t, r, p, content)
	clean(t, r, true)
}

// Two who remove one another's key at the same time leave one.
func TestRemoveAtOnce(t *testing.T) {
	for range 20 {
		store, _, _ := keyed(t)
		a, b := mustOpen(t, store, secret), mustOpen(t, store, second)
		one, two := slotOf(t, a, ""), slotOf(t, a, "the second")
		var wg sync.WaitGroup
		var errs [2]error
		wg.Go(func() { errs[0] = a.RemoveSlot(ctx, two.ID, "") })
		wg.Go(func() { errs[1] = b.RemoveSlot(ctx, one.ID, "") })
		wg.Wait()
		_, err1 := openAs(t, store, secret)
		_, err2 := openAs(t, store, second)
		if (err1 == nil) == (err2 == nil) || (errs[0] == nil) == (errs[1] == nil) {
			t.Fatalf("opens: %v, %v; removals: %v, %v", err1, err2, errs[0], errs[1])
		}
	}
}

func TestRecoveryKey(t *testing.T) {
	store, p, content := keyed(t)
	r := mustOpen(t, store, secret)
	slot, printed, err := r.AddRecovery(ctx, "the safe")
	if err != nil || slot.Kind != Recovery || slot.Label != "the safe" {
		t.Fatalf("%+v, %v", slot, err)
	}
	typed := strings.NewReplacer("-", " ", "0", "o", "1", "l").Replace(strings.ToLower(printed))
	for _, s := range []string{printed, typed, strings.ReplaceAll(printed, "-", "")} {
		r := mustOpen(t, store, []byte(s))
		equal(t, r, p, content)
		if !slotOf(t, r, "the safe").InUse {
			t.Error("another slot is in use")
		}
	}
	wrong := []byte(printed)
	if wrong[12]++; wrong[12] == '-' || !strings.ContainsRune(recoveryAlphabet, rune(wrong[12])) {
		wrong[12] = '7'
		if printed[12] == '7' {
			wrong[12] = '8'
		}
	}
	if _, err := openAs(t, store, wrong); !errors.Is(err, ErrPassphrase) || !strings.Contains(err.Error(), "mistyped: 3") {
		t.Errorf("mistyped: %v", err)
	}
	if _, err := openAs(t, store, []byte(printed[6:])); !errors.Is(err, ErrPassphrase) || !strings.Contains(err.Error(), "60 characters") {
		t.Errorf("short: %v", err)
	}
}

// Every single mistake in a recovery key is found, and none of the ways to write
// it matters.
func TestRecoveryForm(t *testing.T) {
	rng := rng(t)
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

func TestRotate(t *testing.T) {
	store, p, content := keyed(t)
	old := mustOpen(t, store, second) // opened before, on another machine
	run, err := old.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	r := mustOpen(t, store, secret)
	k, err := r.Rotate(ctx)
	if err != nil || k != (Keyring{2, 1, 2}) || r.Keyring() != k {
		t.Fatalf("%+v, %v", k, err)
	}
	p2, err := save(r, "b", image(rand.New(rand.NewPCG(9, 9)), 5*ChunkSize), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := newestMaster(t, store); n != 2 {
		t.Errorf("new data is under master key %d", n)
	}
	// A run under way commits, whichever key it has.
	other := image(rand.New(rand.NewPCG(8, 8)), 5*ChunkSize)
	p3, err := saveIn(run, "c", other, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := run.Close(); err != nil {
		t.Fatal(err)
	}
	for _, r := range []*Repo{old, mustOpen(t, store, secret), mustOpen(t, store, second)} {
		equal(t, r, p, content)
		equal(t, r, p3, other)
		if points, err := r.Points(ctx); err != nil || len(points) != 3 || points[1].ID != p2.ID {
			t.Fatalf("%+v, %v", points, err)
		}
		clean(t, r, true)
	}
	if old.Keyring() != k {
		t.Errorf("the other process has keyring %+v", old.Keyring())
	}
}

// newestMaster is the greatest number of a master key in the packs' headers.
func newestMaster(t *testing.T, s blob.Store) (n uint32) {
	t.Helper()
	names, err := blob.Names(ctx, s, "packs/")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		p, err := s.Get(ctx, name, 0, seal.HeaderLen)
		if err != nil {
			t.Fatal(err)
		}
		h, err := seal.ParseHeader(p, seal.Pack)
		if err != nil {
			t.Fatal(err)
		}
		n = max(n, h.Key)
	}
	return n
}

// A process whose passphrase goes over to the new root key follows; one whose
// passphrase does not goes on reading, and says why it cannot do more.
func TestRotateRoot(t *testing.T) {
	store, p, content := keyed(t)
	r := mustOpen(t, store, secret)
	_, printed, err := r.AddRecovery(ctx, "paper")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.AddPassphrase(ctx, "the third", third); err != nil {
		t.Fatal(err)
	}
	follows, dropped := mustOpen(t, store, third), mustOpen(t, store, second)
	key := r.Key()
	run, err := dropped.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.RotateRoot(ctx, [][]byte{[]byte("none")}); !errors.Is(err, ErrPassphrase) {
		t.Errorf("a passphrase that is none: %v", err)
	}
	change, err := r.RotateRoot(ctx, [][]byte{third, []byte(printed)})
	if err != nil || change.Keyring != (Keyring{2, 2, 2}) || len(change.Kept) != 3 || len(change.Dropped) != 1 || change.Dropped[0].Label != "the second" {
		t.Fatalf("%+v, %v", change, err)
	}
	if !slotOf(t, r, "").InUse || slotOf(t, r, "paper").Kind != Recovery {
		t.Error("slots are not what they were")
	}
	for _, prefix := range []string{"keys/", "keyring/"} {
		names, _ := blob.Names(ctx, store, prefix)
		if want := map[string]int{"keys/": 3, "keyring/": 1}[prefix]; len(names) != want {
			t.Errorf("%v, want %d", names, want)
		}
	}
	if _, err := openAs(t, store, second); !errors.Is(err, ErrPassphrase) {
		t.Errorf("a dropped passphrase: %v", err)
	}
	if _, err := Open(ctx, store, nil, Options{Cache: t.TempDir(), Key: key}); !errors.Is(err, ErrPassphrase) {
		t.Errorf("the old root key: %v", err)
	}
	// Nothing is under the new master key yet: the run under way can commit.
	if _, err := saveIn(run, "d", content, nil, nil); err != nil {
		t.Errorf("a run under way: %v", err)
	}
	if err := run.Close(); err != nil {
		t.Error(err)
	}
	if _, err := save(r, "b", image(rand.New(rand.NewPCG(9, 9)), 5*ChunkSize), nil, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := save(follows, "c", content, nil, nil); err != nil {
		t.Error(err)
	}
	equal(t, dropped, p, content)
	if _, err := save(dropped, "d", content, nil, nil); !errors.Is(err, ErrKeys) {
		t.Errorf("a run with a passphrase that was dropped: %v", err)
	}
	for _, pass := range [][]byte{secret, third, []byte(printed)} {
		r := mustOpen(t, store, pass)
		equal(t, r, p, content)
		if points, err := r.Points(ctx); err != nil || len(points) != 4 {
			t.Errorf("%d points, %v", len(points), err)
		}
		clean(t, r, true)
	}
}

// Of two changes of keys at the same time one happens, or both one after the other.
func TestRotateAtOnce(t *testing.T) {
	for i := range 20 {
		store, p, content := keyed(t)
		a, b := mustOpen(t, store, secret), mustOpen(t, store, second)
		var wg sync.WaitGroup
		var errs [2]error
		wg.Go(func() { _, errs[0] = a.RotateRoot(ctx, [][]byte{second}) })
		wg.Go(func() {
			if i%2 == 0 {
				_, errs[1] = b.Rotate(ctx)
			} else {
				_, errs[1] = b.RotateRoot(ctx, [][]byte{secret})
			}
		})
		wg.Wait()
		done := 0
		for _, err := range errs {
			if err == nil {
				done++
			} else if !errors.Is(err, ErrKeys) {
				t.Fatal(err)
			}
		}
		for _, r := range []*Repo{mustOpen(t, store, secret), mustOpen(t, store, second)} {
			equal(t, r, p, content)
			clean(t, r, true)
			if done == 0 || r.Keyring().Masters != 1+done {
				t.Fatalf("%d changes, %+v; %v", done, r.Keyring(), errs)
			}
		}
		if _, err := save(a, "b", content, nil, nil); err != nil {
			t.Fatal(err)
		}
		if _, err := save(b, "b", content, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
}

// The power goes at every call to the store, before or after it did its work,
// in every change of keys. What is known to open the repository opens it
// afterwards, every point is whole, and the change can be made again.
func TestKeysPowerLoss(t *testing.T) {
	base, p, content := keyed(t)
	if _, err := mustOpen(t, base, secret).AddPassphrase(ctx, "the third", third); err != nil {
		t.Fatal(err)
	}
	two := slotOf(t, mustOpen(t, base, secret), "the second").ID
	for _, c := range []struct {
		what   string
		change func(*Repo) error
		opens  [][]byte // afterwards, whatever happened
		after  func(store blob.Store, done bool) error
	}{
		{"add", func(r *Repo) error { _, err := r.AddPassphrase(ctx, "new", []byte("new")); return err },
			[][]byte{secret, second, third}, func(s blob.Store, done bool) error {
				if _, err := openAs(t, s, []byte("new")); done {
					return err
				}
				return nil
			}},
		{"recovery", func(r *Repo) error { _, _, err := r.AddRecovery(ctx, "new"); return err },
			[][]byte{secret, second, third}, nil},
		{"remove", func(r *Repo) error { return r.RemoveSlot(ctx, two, "") },
			[][]byte{secret, third}, func(s blob.Store, done bool) error {
				if _, err := openAs(t, s, second); done && !errors.Is(err, ErrPassphrase) {
					return fmt.Errorf("it opens: %v", err)
				}
				return nil
			}},
		{"rotate", func(r *Repo) error { _, err := r.Rotate(ctx); return err },
			[][]byte{secret, second, third}, nil},
		{"root", func(r *Repo) error { _, err := r.RotateRoot(ctx, [][]byte{third}); return err },
			[][]byte{secret, third}, func(s blob.Store, done bool) error {
				if _, err := openAs(t, s, second); done && !errors.Is(err, ErrPassphrase) {
					return fmt.Errorf("it opens: %v", err)
				}
				return nil
			}},
	} {
		t.Run(c.what, func(t *testing.T) {
			t.Parallel()
			try := func(s blob.Store) error {
				r, err := openAs(t, s, secret)
				if err != nil {
					return err
				}
				return c.change(r)
			}
			probe := &blobtest.Faulty{Inner: base.Clone()}
			if err := try(probe); err != nil {
				t.Fatal(err)
			}
			for at := 1; at <= probe.Calls(); at++ {
				for _, fault := range []blobtest.Fault{blobtest.Before, blobtest.After} {
					for _, cut := range []bool{true, false} {
						if !cut && (testing.Short() || fault == blobtest.Before) {
							continue // a lone call that did nothing is like a cut there
						}
						store := base.Clone()
						done := try(&blobtest.Faulty{Inner: store, At: at, Fault: fault, Cut: cut}) == nil
						where := fmt.Sprintf("call %d/%d, cut %v", at, fault, cut)
						r, err := openAs(t, store, c.opens[0])
						if err != nil {
							t.Fatalf("%s: %v", where, err)
						}
						if err := differs(r, p, content); err != nil {
							t.Fatalf("%s: %v", where, err)
						}
						clean(t, r, false)
						for _, pass := range c.opens[1:] {
							if u, err := unlock(ctx, store, r.id, means{passphrase: pass}); err != nil || u.number != r.Keyring().Number {
								t.Fatalf("%s: %s: %v", where, pass, err)
							}
						}
						if c.after != nil {
							if err := c.after(store, done); err != nil {
								t.Fatalf("%s: %v", where, err)
							}
						}
						if !done && cut {
							again(t, where, store, c.change)
						}
					}
				}
			}
			t.Logf("%d calls, three ways each", probe.Calls())
		})
	}
}

// again makes a change that was cut off once more, and then backs up.
func again(t *testing.T, where string, store blob.Store, change func(*Repo) error) {
	t.Helper()
	r := mustOpen(t, store, secret)
	err := change(r)
	if err != nil && !strings.Contains(err.Error(), "already") && !errors.Is(err, ErrNoSlot) && !errors.Is(err, ErrPassphrase) {
		t.Fatalf("%s: once more: %v", where, err)
	}
	if _, err := save(r, "b", bytes.Repeat([]byte{7}, ChunkSize), nil, nil); err != nil {
		t.Fatalf("%s: a backup: %v", where, err)
	}
	r = mustOpen(t, store, secret)
	clean(t, r, false)
	slots, err := r.Slots(ctx)
	if err != nil || slices.ContainsFunc(slots, func(s Slot) bool { return s.State == SlotDamaged }) {
		t.Fatalf("%s: %+v, %v", where, slots, err)
	}
}

// A keyring that is lost is noticed, and never made up for by another one of its
// number.
func TestLostKeyring(t *testing.T) {
	store, p, content := keyed(t)
	r := mustOpen(t, store, secret)
	if _, err := r.Rotate(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := save(r, "b", image(rand.New(rand.NewPCG(9, 9)), 5*ChunkSize), nil, nil); err != nil {
		t.Fatal(err)
	}
	lost := ringName(r.id, 2)
	for what, damage := range map[string]func(*blob.Mem){
		"missing": func(s *blob.Mem) { s.Delete(ctx, lost) },
		"damaged": func(s *blob.Mem) { s.Damage(lost, func(p []byte) []byte { p[len(p)-1] ^= 1; return p }) },
	} {
		s := store.Clone()
		damage(s)
		r := mustOpen(t, s, secret)
		equal(t, r, p, content) // what was there before can be read
		if len(r.Damage()) == 0 {
			t.Errorf("%s: no damage told", what)
		}
		report, err := r.Check(ctx, CheckOptions{})
		if err != nil || len(report.Problems) == 0 {
			t.Errorf("%s: %+v, %v", what, report, err)
		}
		if _, err := r.Rotate(ctx); err == nil {
			t.Errorf("%s: another keyring takes its place", what)
		}
		if _, err := save(r, "c", content, nil, nil); err == nil {
			t.Errorf("%s: a backup goes on", what)
		}
	}
}
