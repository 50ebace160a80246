package repo

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/keyring"
)

// A single damaged byte in any object is found by check --read-data, or the
// repository does not open and says what is damaged; every point whose data is
// not hit restores; and after the next backup, and a repair where check asks
// for it, all is well. What the next backup cannot mend is told as well: an entry
// of the chain, and the three small objects that open the repository, must be
// put back from a copy.
//
// HOLDFAST_SOAK=1 takes every byte.
func TestBitRot(t *testing.T) {
	long(t)
	rng := rng(t)
	w := newRotten(t, rng)
	tried := 0
	for _, name := range w.names {
		p, err := w.store.Get(ctx, name, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		step := 300
		if testing.Short() {
			step = len(p)/3 + 1
		}
		if os.Getenv("HOLDFAST_SOAK") != "" {
			step = 1
		}
		for at := rng.IntN(step); at < len(p); at += step {
			s := w.store.Clone()
			s.Damage(name, func(p []byte) []byte { p[at] ^= byte(1 + rng.IntN(255)); return p })
			tried++
			w.look(t, s, name, fmt.Sprintf("byte %d", at), p)
			if t.Failed() {
				return
			}
		}
	}
	t.Logf("%d bytes of %d objects", tried, len(w.names))
}

// Objects that are cut, longer, empty, gone, or another one than their name says,
// are found and dealt with as those in which a byte has changed.
func TestObjectRot(t *testing.T) {
	long(t)
	rng := rng(t)
	w := newRotten(t, rng)
	tried := 0
	for i, name := range w.names {
		p, err := w.store.Get(ctx, name, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		other, err := w.store.Get(ctx, w.names[(i+1)%len(w.names)], 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		ways := map[string]func([]byte) []byte{
			"empty":          func([]byte) []byte { return nil },
			"a header alone": func(p []byte) []byte { return p[:64] },
			"cut":            func(p []byte) []byte { return p[:64+rng.IntN(len(p)-64)] },
			"a byte short":   func(p []byte) []byte { return p[:len(p)-1] },
			"a byte long":    func(p []byte) []byte { return append(p, 0) },
			"twice":          func(p []byte) []byte { return append(p, p...) },
			"zeros":          func(p []byte) []byte { return make([]byte, len(p)) },
			"another object": func([]byte) []byte { return other },
			"gone":           nil,
		}
		for what, change := range ways {
			if testing.Short() && rng.IntN(4) > 0 {
				continue
			}
			if what == "another object" && name == w.oldRing {
				continue // the newer keyring in its place serves as well
			}
			s := w.store.Clone()
			if change != nil {
				s.Damage(name, change)
			} else if strings.HasPrefix(name, "pins/") || strings.HasPrefix(name, "leases/") || name == w.slot || name == w.oldRing {
				continue // that is how they end
			} else if name == chain.Name(w.head) {
				continue // a store that was rolled back: who has seen the entry knows (TestChain)
			} else if err := s.Delete(ctx, name); err != nil {
				t.Fatal(err)
			}
			tried++
			w.look(t, s, name, what, p)
			if t.Failed() {
				return
			}
		}
	}
	t.Logf("%d changes of %d objects", tried, len(w.names))
}

// rotten is a repository with every kind of object.
type rotten struct {
	store    *blob.Mem
	names    []string
	points   []*Point
	contents [][]byte
	slot     string // a second one
	oldRing  string // the first keyring
	head     uint64
}

func newRotten(t *testing.T, rng *rand.Rand) *rotten {
	t.Helper()
	w := &rotten{store: new(blob.Mem)}
	r := create(t, w.store)
	r.slotKDF = cheap
	slot, err := r.AddPassphrase(ctx, "second", second)
	if err != nil {
		t.Fatal(err)
	}
	w.slot, w.oldRing = keyring.SlotName(slot.ID), keyring.Name(r.id, 1)
	content := bytes.Repeat([]byte("a disk of some text "), 4*ChunkSize/20)
	fillRandom(rng, content[ChunkSize:ChunkSize+300])
	for i := range 2 {
		content[3*ChunkSize] = byte('a' + i)
		p, err := save(r, "web", content, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		w.points, w.contents = append(w.points, p), append(w.contents, bytes.Clone(content))
		if i == 0 {
			if _, err := r.Rotate(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	w.head = r.current().Head
	if err := r.Pin(ctx, "ab", w.points[0].ID); err != nil {
		t.Fatal(err)
	}
	run, err := r.Begin(ctx, RandomID()) // and dies
	if err != nil {
		t.Fatal(err)
	}
	run.fail(errClosed)
	if err := r.leases.Beat(ctx, run.lease, 1); err != nil {
		t.Fatal(err)
	}
	if w.names, err = blob.Names(ctx, w.store, ""); err != nil || len(w.names) < 14 {
		t.Fatalf("%v, %v", w.names, err)
	}
	return w
}

// look wants what happened to an object to be found, and dealt with.
func (w *rotten) look(t *testing.T, s *blob.Mem, name, what string, was []byte) {
	t.Helper()
	rot := &bitRot{t, s, name, what, w.points, w.contents}
	switch {
	case name == w.slot, name == w.oldRing, strings.HasPrefix(name, "leases/"), strings.HasPrefix(name, "pins/"):
		rot.small()
	case name == configName, strings.HasPrefix(name, "keys/"), strings.HasPrefix(name, "keyring/"):
		rot.locked(was)
	case strings.HasPrefix(name, "chain/"):
		rot.chain(was)
	default:
		rot.data()
	}
}

type bitRot struct {
	t        *testing.T
	s        *blob.Mem
	name     string
	what     string
	points   []*Point
	contents [][]byte
}

// small: it is told, and hurts no point; not even a prune beside it does.
func (b *bitRot) small() {
	b.t.Helper()
	r := b.open()
	defer r.Close()
	report := b.check(r)
	if len(report.Problems) != 1 || report.Problems[0].Object != b.name || report.Problems[0].Point != "" {
		b.t.Errorf("%s, %s: %+v", b.name, b.what, report.Problems)
	}
	if _, err := r.Prune(ctx, unwatched); err != nil && !errors.Is(err, ErrRefused) {
		b.t.Errorf("%s, %s: prune: %v", b.name, b.what, err)
	}
	b.whole(r, &CheckReport{})
}

// open opens the repository as this machine does, with an empty cache.
func (b *bitRot) open() *Repo {
	b.t.Helper()
	r, err := Open(ctx, b.s, secret, Options{Cache: cacheDir(b.t)})
	if err != nil {
		b.t.Fatalf("%s, %s: %v", b.name, b.what, err)
	}
	return r
}

func (b *bitRot) check(r *Repo) *CheckReport {
	b.t.Helper()
	report, err := r.Check(ctx, CheckOptions{ReadData: true})
	if err != nil {
		b.t.Fatalf("%s, %s: check: %v", b.name, b.what, err)
	}
	return report
}

// whole restores the points that the report does not name, and those that it
// names are not returned as something else.
func (b *bitRot) whole(r *Repo, report *CheckReport) {
	b.t.Helper()
	hit := map[PointID]bool{}
	for _, p := range report.Problems {
		hit[p.Point] = true
	}
	there, err := r.Points(ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	for _, p := range there {
		for i, want := range b.points {
			if want.ID != p.ID {
				continue
			}
			if err := differs(r, &p, b.contents[i]); err != nil && !(hit[p.ID] && errors.Is(err, ErrDamaged)) {
				b.t.Errorf("%s, %s: point %d: %v", b.name, b.what, i, err)
			}
		}
	}
}

// locked: the repository opens, or says why not.
func (b *bitRot) locked(was []byte) {
	b.t.Helper()
	r, err := Open(ctx, b.s, secret, Options{Cache: cacheDir(b.t)})
	if err == nil {
		report := b.check(r)
		if len(report.Problems) == 0 {
			b.t.Errorf("%s, %s: nobody notices", b.name, b.what)
		}
		b.whole(r, report) // what was sealed before that keyring was made
		r.Close()
	} else if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrPassphrase) && !errors.Is(err, ErrNotRepository) && !errors.Is(err, ErrVersion) {
		b.t.Errorf("%s, %s: %v", b.name, b.what, err)
	}
	b.putBack(was)
}

// putBack restores the object as an operator does from a copy.
func (b *bitRot) putBack(was []byte) {
	b.t.Helper()
	b.s.Damage(b.name, func([]byte) []byte { return was })
	r := b.open()
	defer r.Close()
	clean(b.t, r, true)
	b.whole(r, b.check(r))
}

// chain: the other points restore, and nothing is added on unsure ground.
func (b *bitRot) chain(was []byte) {
	b.t.Helper()
	r := b.open()
	defer r.Close()
	report := b.check(r)
	there, err := r.Points(ctx)
	want := len(b.points) - 1
	if b.name == chain.Name(2) {
		want++ // it tells of keys
	}
	if err != nil || len(report.Problems) == 0 || len(there) != want {
		b.t.Errorf("%s, %s: %d points, %+v, %v", b.name, b.what, len(there), report, err)
	}
	b.whole(r, report)
	if keyless, err := CheckKeyless(ctx, b.s, "", CheckOptions{ReadData: true}); err != nil || len(keyless.Problems) == 0 {
		b.t.Errorf("%s, %s: without a key: %+v, %v", b.name, b.what, keyless, err)
	}
	if _, err := save(r, "web", b.contents[1], nil, nil); err == nil {
		b.t.Errorf("%s, %s: a point was added to a chain with a gap", b.name, b.what)
	}
	b.putBack(was)
}

// data: a pack or an index object.
func (b *bitRot) data() {
	b.t.Helper()
	if keyless, err := CheckKeyless(ctx, b.s, "", CheckOptions{ReadData: true}); err != nil || len(keyless.Problems) == 0 {
		b.t.Errorf("%s, %s: without a key: %+v, %v", b.name, b.what, keyless, err)
	}
	r := b.open()
	defer r.Close()
	b.whole(r, &CheckReport{Problems: []Problem{{Point: b.points[0].ID}, {Point: b.points[1].ID}}})
	report := b.check(r)
	if len(report.Problems) == 0 {
		b.t.Errorf("%s, %s: check finds nothing", b.name, b.what)
	}
	b.whole(r, report)
	// Each point's data is met again when its content is backed up again.
	for i := range b.contents {
		if _, err := save(r, "web", b.contents[i], nil, nil); err != nil {
			b.t.Errorf("%s, %s: next backup: %v", b.name, b.what, err)
			return
		}
	}
	if after := lostPoints(b.check(r)); len(after) > 0 {
		b.t.Errorf("%s, %s: after the next backups: %+v", b.name, b.what, after)
	}
	if _, err := r.Repair(ctx, RepairOptions{Check: CheckOptions{ReadData: true}}); err != nil {
		b.t.Errorf("%s, %s: repair: %v", b.name, b.what, err)
	}
	again := b.open()
	defer again.Close()
	clean(b.t, again, true)
	b.whole(again, &CheckReport{})
}
