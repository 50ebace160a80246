package repo

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
)

// moody gives wrong answers to the first Gets of chosen objects.
type moody struct {
	blob.Store
	mu    sync.Mutex
	wrong map[string]int // how often; guarded by mu
	err   error          // instead of wrong bytes
}

func (m *moody) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	p, err := m.Store.Get(ctx, name, off, n)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.wrong[name] == 0 || err != nil {
		return p, err
	}
	m.wrong[name]--
	if m.err != nil {
		return nil, m.err
	}
	p[len(p)/2] ^= 1
	return p, nil
}

// What is wrong once and right when read again is told, and is no damage. What
// cannot be read twice is, while the store answers otherwise.
func TestReadTwice(t *testing.T) {
	mem := new(blob.Mem)
	content := image(rng(t), 10*ChunkSize)
	noise(rng(t), content[:ChunkSize])
	content[0] = 1
	if _, err := save(create(t, mem), "a", content, nil, nil); err != nil {
		t.Fatal(err)
	}
	names, _ := blob.Names(ctx, mem, "packs/")
	for what, c := range map[string]struct {
		times     int
		err       error
		transient int
		problem   string
	}{
		"wrong once":       {1, nil, 1, ""},
		"wrong always":     {9, nil, 0, "its bytes have changed"},
		"unreadable once":  {1, errors.New("input/output error"), 1, ""},
		"never readable":   {9, errors.New("input/output error"), 0, "input/output error"},
		"sound":            {0, nil, 0, ""},
		"gone the 2nd way": {2, blob.ErrNotExist, 0, "missing"},
	} {
		for _, keyless := range []bool{false, true} {
			store := &moody{Store: mem.Clone(), err: c.err}
			r := reopen(t, store)
			store.wrong = map[string]int{names[0]: c.times}
			report, err := r.Check(ctx, CheckOptions{ReadData: true})
			if keyless {
				store.wrong = map[string]int{names[0]: c.times}
				report, err = CheckKeyless(ctx, store, t.TempDir(), CheckOptions{ReadData: true})
			}
			if err != nil || len(report.Transient) != c.transient || (len(report.Problems) > 0) != (c.problem != "") {
				t.Errorf("%s, keyless %v: %v, %+v", what, keyless, err, report)
				continue
			}
			if c.problem != "" && !slices.ContainsFunc(report.Problems, func(p Problem) bool {
				return p.Object == names[0] && strings.Contains(p.What, c.problem)
			}) {
				t.Errorf("%s, keyless %v: %+v", what, keyless, report.Problems)
			}
		}
	}
	// A store that answers nothing says nothing about what is in it.
	faulty := &blobtest.Faulty{Inner: mem.Clone()}
	r := reopen(t, faulty)
	before, _ := blob.Names(ctx, faulty.Inner, "chain/")
	for at := 1; at < 40; at++ {
		f := &blobtest.Faulty{Inner: faulty.Inner, At: at, Cut: true}
		r.store, r.chain.Store, r.keys.Store, r.leases.Store = f, f, f, f
		if report, err := r.Check(ctx, CheckOptions{ReadData: true}); err == nil && f.Calls() >= at {
			t.Fatalf("cut at call %d: %+v", at, report)
		}
	}
	if after, _ := blob.Names(ctx, faulty.Inner, "chain/"); !slices.Equal(before, after) {
		t.Errorf("the chain went from %v to %v", before, after)
	}
}

// Copies given up because they could not be read are read again when there is
// no other.
func TestGivenUpTooEarly(t *testing.T) {
	mem := new(blob.Mem)
	content := image(rng(t), 10*ChunkSize)
	content[0] = 1
	p, err := save(create(t, mem), "a", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	names, _ := blob.Names(ctx, mem, "packs/")
	store := &moody{Store: mem, err: errors.New("input/output error")}
	r := reopen(t, store)
	store.wrong = map[string]int{}
	for _, name := range names {
		store.wrong[name] = 9
	}
	if report, err := r.Check(ctx, CheckOptions{ReadData: true}); err != nil || report.Distrusted == 0 {
		t.Fatalf("%v, %+v", err, report)
	}
	r = reopen(t, mem)
	equal(t, r, p, content)
	report, err := r.Repair(ctx, RepairOptions{From: create(t, new(blob.Mem))})
	if err != nil || len(report.Left) > 0 || report.Chunks == 0 || report.Nodes == 0 {
		t.Fatalf("%v, %+v", err, report)
	}
	clean(t, reopen(t, mem), true)
}

// However the percentage and whatever comes meanwhile, each pack's turn comes.
func TestPercent(t *testing.T) {
	rng := rng(t)
	store := new(blob.Mem)
	r := create(t, store)
	add := func() {
		t.Helper()
		content := make([]byte, ChunkSize)
		fillRandom(rng, content)
		if _, err := save(r, "a", content, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	for range 10 {
		add()
	}
	packs, _ := blob.Names(ctx, store, "packs/")
	cache := t.TempDir()
	seen := map[string]bool{}
	var unread int
	for i := range 14 {
		counting := &gets{Store: store, seen: seen}
		o := CheckOptions{ReadData: true, Percent: 10}
		var report *CheckReport
		var err error
		if i%2 == 0 {
			r.store = counting
			report, err = r.Check(ctx, o)
			r.store = store
		} else {
			report, err = CheckKeyless(ctx, counting, strings.TrimSuffix(r.cache, r.ID()), o)
		}
		if err != nil || len(report.Problems) > 0 || report.ReadPacks == 0 || report.ReadPacks > report.Packs/2 {
			t.Fatalf("check %d: %v, %+v", i, err, report)
		}
		unread = report.Unread
		add()
	}
	for _, name := range packs {
		if !seen[name] {
			t.Errorf("%s was never read", name)
		}
	}
	if unread == 0 {
		t.Error("what came last cannot have been read")
	}
	// Without the memory everything is as if never read.
	if v := verifiedIn(cache); v.unread(map[[32]byte]packInfo{{1}: {}}) != 1 {
		t.Error("an empty memory remembers")
	}
}

type gets struct {
	blob.Store
	mu   sync.Mutex
	seen map[string]bool
}

func (g *gets) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	p, err := g.Store.Get(ctx, name, off, n)
	if whole, _ := g.Store.Get(ctx, name, 0, -1); err == nil && len(p) == len(whole) {
		g.mu.Lock()
		g.seen[name] = true
		g.mu.Unlock()
	}
	return p, err
}

// twins gives two repositories of one VM: two points, the first copied, the
// second's disk a little different in the other.
func twins(t *testing.T, rng *rand.Rand) (mem, other *blob.Mem, points []*Point, contents [][]byte) {
	t.Helper()
	mem, other = new(blob.Mem), new(blob.Mem)
	a, b := create(t, mem), create(t, other)
	content := make([]byte, 18<<20+300) // two levels
	copy(content, image(rng, 12*ChunkSize))
	copy(content[17<<20:], image(rng, 4*ChunkSize))
	content[0], content[len(content)-1] = 1, 2
	for i := range 2 {
		fillRandom(rng, content[i*ChunkSize:(i+1)*ChunkSize])
		p, err := save(a, "web", content, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		points, contents = append(points, p), append(contents, bytes.Clone(content))
		there := bytes.Clone(content)
		if i == 1 {
			there[11*ChunkSize] ^= 0xFF
		}
		if _, err := save(b, "web", there, nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	return mem, other, points, contents
}

// What is lost is had back from a repository of the same VM, chunks and map
// nodes; what that one has not stays lost and is told. Nothing is deleted or
// overwritten.
func TestRepair(t *testing.T) {
	long(t)
	rng := rng(t)
	mem, other, points, contents := twins(t, rng)
	packs, _ := blob.Names(ctx, mem, "packs/")
	from := reopen(t, other)
	damages := map[string]func(*blob.Mem){
		"all packs lost": func(s *blob.Mem) {
			for _, name := range packs {
				s.Delete(ctx, name)
			}
		},
		"nothing": func(*blob.Mem) {},
	}
	for _, name := range packs {
		damages["lost "+name] = func(s *blob.Mem) { s.Delete(ctx, name) }
		damages["bit of "+name] = func(s *blob.Mem) {
			s.Damage(name, func(p []byte) []byte { p[64+rng.IntN(len(p)-64)] ^= 4; return p })
		}
	}
	for what, do := range damages {
		s := mem.Clone()
		do(s)
		before := s.Clone()
		r := reopen(t, s)
		report, err := r.Repair(ctx, RepairOptions{From: from, Check: CheckOptions{ReadData: true}})
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		for i, err := range before.List(ctx, "") {
			was, _ := before.Get(ctx, i.Name, 0, -1)
			is, getErr := s.Get(ctx, i.Name, 0, -1)
			if err != nil || getErr != nil || !bytes.Equal(was, is) {
				t.Fatalf("%s: %s was changed or deleted", what, i.Name)
			}
		}
		r = reopen(t, s)
		equal(t, r, points[0], contents[0])
		err = differs(r, points[1], contents[1])
		if lacks := slices.ContainsFunc(report.Left, func(p Problem) bool { return p.Point == points[1].ID }); lacks != (err != nil) {
			t.Errorf("%s: left %+v, but %v", what, report.Left, err)
		}
		if again, err := r.Repair(ctx, RepairOptions{From: from, Check: CheckOptions{ReadData: true}}); err != nil || again.Chunks+again.Nodes > 0 ||
			len(again.Left) != len(report.Left) || len(again.Left) == 0 && len(again.Check.Problems) > 0 {
			t.Errorf("%s: repaired twice: %v, %+v, %+v", what, err, again, again.Check)
		}
		// What the other has not, the source has.
		if _, err := save(r, "web", contents[1], nil, nil); err != nil {
			t.Fatal(err)
		}
		equal(t, r, points[1], contents[1])
	}
}

// A repair that is cut off at any call leaves a repository that can be
// repaired, and loses nothing.
func TestRepairCut(t *testing.T) {
	long(t)
	mem, other, points, contents := twins(t, rng(t))
	packs, _ := blob.Names(ctx, mem, "packs/")
	mem.Delete(ctx, packs[0])
	mem.Delete(ctx, packs[2])
	from := reopen(t, other)
	step := 1
	if testing.Short() {
		step = 7
	}
	for at := 1; ; at += step {
		s := mem.Clone()
		f := &blobtest.Faulty{Inner: s, At: at, Cut: true, Fault: blobtest.Fault(at % 2)}
		r, err := Open(ctx, f, secret, Options{Cache: t.TempDir()})
		if err == nil {
			r.Repair(ctx, RepairOptions{From: from}) // fails, or does not see the cut
			r.Close()
		}
		if f.Calls() < at {
			break
		}
		if r = reopen(t, s); len(r.Damage()) > 0 {
			t.Fatalf("cut at %d: %q", at, r.Damage())
		}
		report, err := r.Repair(ctx, RepairOptions{From: from})
		if err != nil {
			t.Fatalf("cut at %d: %v", at, err)
		}
		equal(t, r, points[0], contents[0])
		if len(report.Left) == 0 {
			equal(t, r, points[1], contents[1])
		}
	}
}

// Index objects that are lost are made again from the packs alone, and say what
// the lost ones said.
func TestIndexFromPacks(t *testing.T) {
	rng := rng(t)
	store := new(blob.Mem)
	r := create(t, store)
	for range 3 {
		if _, err := save(r, "a", image(rng, 30*ChunkSize), nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	was := inventory(t, reopen(t, store))
	names, _ := blob.Names(ctx, store, "index/")
	for n := range len(names) + 1 {
		s := store.Clone()
		for i, name := range names {
			if i == n || n == len(names) {
				s.Delete(ctx, name)
			}
		}
		r := reopen(t, s)
		if report, err := r.Repair(ctx, RepairOptions{}); err != nil || len(report.Left) > 0 || len(report.Check.Problems) == 0 {
			t.Fatalf("%v, %+v", err, report)
		}
		for what, r := range map[string]*Repo{"here": r, "elsewhere": reopen(t, s)} {
			if is := inventory(t, r); !reflect.DeepEqual(is, was) {
				t.Errorf("index object %d lost, %s: the inventory differs", n, what)
			}
			for _, k := range was {
				off := uint32(64)
				for i, it := range k.Items {
					at := index.Place{Pack: k.Name, Number: uint32(i), Offset: off, Stored: it.Stored}
					off += it.Stored
					if places, err := r.index.Lookup(it.ID, nil); err != nil || !slices.Contains(places, at) {
						t.Fatalf("index object %d lost, %s: an item is not found: %v", n, what, err)
					}
				}
			}
			clean(t, r, true)
		}
	}
}

// inventory is what the live index objects say.
func inventory(t *testing.T, r *Repo) map[[32]byte]index.Pack {
	t.Helper()
	all := map[[32]byte]index.Pack{}
	for d := range r.current().Indexes {
		packs, err := r.readIndex(ctx, d)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range packs {
			if _, twice := all[k.Name]; twice {
				t.Errorf("pack %x is listed twice", k.Name)
			}
			k.Made = 0 // the packs do not know; it says only where they may lie
			all[k.Name] = k
		}
	}
	return all
}

// Without a key: nothing is asked, nothing is changed, and every damage is seen
// that a storage server can see.
func TestKeyless(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	keyless := func(s blob.Store) *CheckReport {
		t.Helper()
		report, err := CheckKeyless(ctx, s, "", CheckOptions{ReadData: true})
		if err != nil {
			t.Fatal(err)
		}
		return report
	}
	if report := keyless(store); len(report.Problems) > 0 || report.Entries != 0 {
		t.Errorf("empty: %+v", report)
	}
	for range 3 {
		if _, err := save(r, "a", image(rng(t), 5*ChunkSize), nil, nil); err != nil {
			t.Fatal(err)
		}
	}
	all, _ := blob.Names(ctx, store, "")
	if report := keyless(store); len(report.Problems) > 0 || report.Entries != 3 || report.ReadPacks != report.Packs || report.Packs == 0 {
		t.Errorf("sound: %+v", report)
	}
	for _, name := range all {
		if name == configName {
			continue
		}
		s := store.Clone()
		s.Delete(ctx, name)
		last := name == chain.Name(3) // the end cut off cannot be seen from the store alone
		if report := keyless(s); (len(report.Problems) > 0) == last {
			t.Errorf("without %s: %+v", name, report)
		}
		s = store.Clone()
		s.Damage(name, func(p []byte) []byte { return p[:len(p)-1] })
		if report := keyless(s); len(report.Problems) == 0 {
			t.Errorf("%s shortened is not noticed", name)
		}
	}
	if _, err := CheckKeyless(ctx, new(blob.Mem), "", CheckOptions{}); !errors.Is(err, ErrNotRepository) {
		t.Errorf("no repository: %v", err)
	}
	if now, _ := blob.Names(ctx, store, ""); !slices.Equal(now, all) {
		t.Errorf("from %v to %v", all, now)
	}
}
