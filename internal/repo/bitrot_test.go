package repo

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"holdfast/internal/blob"
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
	rng := rng(t)
	store := new(blob.Mem)
	r := create(t, store)
	content := bytes.Repeat([]byte("a disk of some text "), 4*ChunkSize/20)
	fillRandom(rng, content[ChunkSize:ChunkSize+300])
	var points []*Point
	var contents [][]byte
	for i := range 2 {
		content[3*ChunkSize] = byte('a' + i)
		p, err := save(r, "web", content, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		points, contents = append(points, p), append(contents, bytes.Clone(content))
	}
	names, err := listNames(ctx, store, "")
	if err != nil || len(names) < 10 {
		t.Fatalf("%v, %v", names, err)
	}
	tried := 0
	for _, name := range names {
		p, err := store.Get(ctx, name, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		step := 160
		if testing.Short() {
			step = len(p)/3 + 1
		}
		if os.Getenv("HOLDFAST_SOAK") != "" {
			step = 1
		}
		for at := rng.IntN(step); at < len(p); at += step {
			s := store.Clone()
			s.Damage(name, func(p []byte) []byte { p[at] ^= byte(1 + rng.IntN(255)); return p })
			tried++
			rot := &bitRot{t, s, name, at, points, contents}
			switch {
			case name == configName, strings.HasPrefix(name, "keys/"), strings.HasPrefix(name, "keyring/"):
				rot.locked(p)
			case strings.HasPrefix(name, "chain/"):
				rot.chain(p)
			default:
				rot.data(rng)
			}
			if t.Failed() {
				return
			}
		}
	}
	t.Logf("%d bytes of %d objects", tried, len(names))
}

type bitRot struct {
	t        *testing.T
	s        *blob.Mem
	name     string
	at       int
	points   []*Point
	contents [][]byte
}

// open opens the repository as this machine does, with an empty cache.
func (b *bitRot) open() *Repo {
	b.t.Helper()
	r, err := Open(ctx, b.s, secret, Options{Cache: b.t.TempDir()})
	if err != nil {
		b.t.Fatalf("%s, byte %d: %v", b.name, b.at, err)
	}
	return r
}

func (b *bitRot) check(r *Repo) *CheckReport {
	b.t.Helper()
	report, err := r.Check(ctx, CheckOptions{ReadData: true})
	if err != nil {
		b.t.Fatalf("%s, byte %d: check: %v", b.name, b.at, err)
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
				b.t.Errorf("%s, byte %d: point %d: %v", b.name, b.at, i, err)
			}
		}
	}
}

// locked: the repository opens, or says why not.
func (b *bitRot) locked(was []byte) {
	b.t.Helper()
	r, err := Open(ctx, b.s, secret, Options{Cache: b.t.TempDir()})
	if err == nil {
		r.Close()
		b.t.Errorf("%s, byte %d: nobody notices", b.name, b.at)
	} else if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrPassphrase) && !errors.Is(err, ErrNotRepository) && !errors.Is(err, ErrVersion) {
		b.t.Errorf("%s, byte %d: %v", b.name, b.at, err)
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
	if err != nil || len(report.Problems) == 0 || len(there) != len(b.points)-1 {
		b.t.Errorf("%s, byte %d: %d points, %+v, %v", b.name, b.at, len(there), report, err)
	}
	b.whole(r, report)
	if keyless, err := CheckKeyless(ctx, b.s, "", CheckOptions{ReadData: true}); err != nil || len(keyless.Problems) == 0 {
		b.t.Errorf("%s, byte %d: without a key: %+v, %v", b.name, b.at, keyless, err)
	}
	if _, err := save(r, "web", b.contents[1], nil, nil); err == nil {
		b.t.Errorf("%s, byte %d: a point was added to a chain with a gap", b.name, b.at)
	}
	b.putBack(was)
}

// data: a pack or an index object.
func (b *bitRot) data(rng *rand.Rand) {
	b.t.Helper()
	if keyless, err := CheckKeyless(ctx, b.s, "", CheckOptions{ReadData: true}); err != nil || len(keyless.Problems) == 0 {
		b.t.Errorf("%s, byte %d: without a key: %+v, %v", b.name, b.at, keyless, err)
	}
	r := b.open()
	defer r.Close()
	b.whole(r, &CheckReport{Problems: []Problem{{Point: b.points[0].ID}, {Point: b.points[1].ID}}})
	report := b.check(r)
	if len(report.Problems) == 0 {
		b.t.Errorf("%s, byte %d: check finds nothing", b.name, b.at)
	}
	b.whole(r, report)
	// Each point's data is met again when its content is backed up again.
	for i := range b.contents {
		if _, err := save(r, "web", b.contents[i], nil, nil); err != nil {
			b.t.Errorf("%s, byte %d: next backup: %v", b.name, b.at, err)
			return
		}
	}
	if after := lostPoints(b.check(r)); len(after) > 0 {
		b.t.Errorf("%s, byte %d: after the next backups: %+v", b.name, b.at, after)
	}
	if _, err := r.Repair(ctx, RepairOptions{Check: CheckOptions{ReadData: true}}); err != nil {
		b.t.Errorf("%s, byte %d: repair: %v", b.name, b.at, err)
	}
	again := b.open()
	defer again.Close()
	clean(b.t, again, true)
	b.whole(again, &CheckReport{})
}
