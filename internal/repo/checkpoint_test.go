package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"holdfast/internal/blob"
)

// often prunes with a checkpoint after every few entries.
func often(every uint64) PruneOptions {
	return PruneOptions{Watch: -1, checkpointEvery: every, mergeLeast: 2 + int(every%4)}
}

// placed are the fields of a state that come from where it stands in the
// chain, not from what entries say: a checkpoint does not carry them.
var placed = []string{"head", "digest", "header", "time", "checkpoint", "older", "gaps", "healed", "unknown", "proving"}

// eachField gives the fields that a checkpoint must carry.
func eachField(s *state, f func(name string, v reflect.Value)) {
	v := reflect.ValueOf(s).Elem()
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; !slices.Contains(placed, name) {
			f(name, reflect.NewAt(v.Field(i).Type(), unsafe.Pointer(v.Field(i).UnsafeAddr())).Elem())
		}
	}
}

// Every field of the state, whatever is in it, is in a checkpoint. Who adds a
// field to the state and not to state.parts is told here.
func TestCheckpointCarriesAll(t *testing.T) {
	rng := rng(t)
	for range 20 {
		s := newState([32]byte{})
		eachField(s, func(_ string, v reflect.Value) { fill(rng, v, 0) })
		// What belongs together:
		points := s.points
		s.points, s.order = map[PointID]Point{}, nil
		for id, p := range points {
			p.ID, p.Keep = id, ""
			s.points[id], s.order = p, append(s.order, id)
		}
		for id, p := range s.forgotten {
			if p.ID, p.Keep = id, ""; rng.IntN(2) == 0 {
				p = nil
			}
			s.forgotten[id] = p
		}
		clear(s.added)
		for d := range s.indexes {
			s.added[d] = adding{rng.Uint64N(1 << 40), fmt.Sprint(rng.IntN(2))}
		}
		content, err := s.content()
		if err != nil {
			t.Fatal(err)
		}
		back := newState([32]byte{})
		if err := back.read(s.adds(), content); err != nil {
			t.Fatal(err)
		}
		want := map[string]any{}
		eachField(s, func(name string, v reflect.Value) { want[name] = v.Interface() })
		eachField(back, func(name string, v reflect.Value) {
			if !reflect.DeepEqual(v.Interface(), want[name]) {
				t.Errorf("state.%s is not carried by a checkpoint: add it to state.parts and docs/format.md §6.4\n%v\n%v", name, want[name], v.Interface())
			}
		})
		if t.Failed() {
			return
		}
	}
}

// fill puts something into a value of any type.
func fill(rng *rand.Rand, v reflect.Value, depth int) {
	if v.Type() == reflect.TypeFor[time.Time]() {
		v.Set(reflect.ValueOf(time.Unix(rng.Int64N(1<<33), 0).UTC()))
		return
	}
	switch v.Kind() {
	case reflect.Bool:
		v.SetBool(true) // sets are maps of true
	case reflect.String:
		v.SetString(fmt.Sprintf("%032x", rng.Uint64()))
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		v.SetInt(1 + rng.Int64N(100))
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(1 + rng.Uint64N(100))
	case reflect.Array:
		for i := range v.Len() {
			fill(rng, v.Index(i), depth+1)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1+rng.IntN(3), 3))
		for i := range v.Len() {
			fill(rng, v.Index(i), depth+1)
		}
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		for range 1 + rng.IntN(4) {
			key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
			fill(rng, key, depth+1)
			fill(rng, value, depth+1)
			v.SetMapIndex(key, value)
		}
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(rng, v.Elem(), depth+1)
	case reflect.Struct:
		for i := range v.NumField() {
			f := v.Field(i)
			fill(rng, reflect.NewAt(f.Type(), unsafe.Pointer(f.UnsafeAddr())).Elem(), depth+1)
		}
	default:
		panic("fill does not know " + v.Type().String())
	}
}

// alike fails unless two states are the same in everything.
func alike(t *testing.T, what string, a, b *state) {
	t.Helper()
	if a.head != b.head || a.digest != b.digest || a.checkpoint != b.checkpoint || a.older != b.older {
		t.Fatalf("%s: entry %d (%d, %d) and %d (%d, %d)", what, a.head, a.checkpoint, a.older, b.head, b.checkpoint, b.older)
	}
	fields := map[string]any{}
	eachField(a, func(name string, v reflect.Value) { fields[name] = v.Interface() })
	eachField(b, func(name string, v reflect.Value) {
		if !reflect.DeepEqual(v.Interface(), fields[name]) {
			t.Fatalf("%s: %s: %v and %v", what, name, fields[name], v.Interface())
		}
	})
}

// archive keeps the chain entries that are deleted.
type archive struct {
	*blob.Mem
	mu   sync.Mutex
	gone map[string][]byte
}

func (a *archive) Delete(ctx context.Context, name string) error {
	if strings.HasPrefix(name, "chain/") {
		p, err := a.Mem.Get(ctx, name, 0, -1)
		if err != nil {
			return err
		}
		a.mu.Lock()
		a.gone[name] = p
		a.mu.Unlock()
	}
	return a.Mem.Delete(ctx, name)
}

// whole is the store as it would be had nobody deleted entries.
func (a *archive) whole(t *testing.T) *blob.Mem {
	s := a.Mem.Clone()
	for name, p := range a.gone {
		if err := s.Put(ctx, name, p); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// Over random histories, who begins to read at a checkpoint has the state of
// who has read every entry there ever was, and of who was there all the time.
func TestCheckpointHistory(t *testing.T) {
	rng := rng(t)
	rounds := 150
	if testing.Short() {
		rounds = 60
	}
	store := &archive{Mem: new(blob.Mem), gone: map[string][]byte{}}
	r, away := create(t, store), reopen(t, store)
	model := map[PointID][]byte{}
	var ids, all []PointID
	pool := random(1, 30)
	written := 0
	for range rounds {
		switch k := rng.IntN(20); {
		case k < 7:
			from, n := rng.IntN(20), 1+rng.IntN(9)
			content := pool[from*ChunkSize : (from+n)*ChunkSize]
			p := mustSave(t, r, "vm", content)
			model[p.ID], ids, all = content, append(ids, p.ID), append(all, p.ID)
		case k < 10 && len(ids) > 0:
			i := rng.IntN(len(ids))
			if rng.IntN(2) == 0 {
				if err := r.Pin(ctx, strings.Repeat(fmt.Sprint(rng.IntN(3)), 16), ids[i]); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.Forget(ctx, ids[i:i+1], time.Now()); errors.Is(err, ErrKept) {
				continue
			}
			ids = slices.Delete(ids, i, i+1)
		case k < 11:
			if err := r.Unpin(ctx, strings.Repeat(fmt.Sprint(rng.IntN(3)), 16)); err != nil {
				t.Fatal(err)
			}
		case k < 12 && len(ids) > 0:
			if err := r.Keep(ctx, ids[rng.IntN(len(ids)):][:1], []Until{Forever, "", "2031-01-01T00:00:00Z"}[rng.IntN(3)]); err != nil {
				t.Fatal(err)
			}
		case k < 13: // a run that is revoked, one that leaves its lease behind
			for range 2 {
				run, err := r.Begin(ctx, RandomID())
				if err != nil {
					t.Fatal(err)
				}
				if rng.IntN(2) == 0 {
					if _, err := saveIn(run, "dead", pool[:ChunkSize], nil, nil); err != nil {
						t.Fatal(err)
					}
					p := points(t, r)
					id := p[len(p)-1].ID
					model[id], ids, all = pool[:ChunkSize], append(ids, id), append(all, id)
					run.fail(errClosed)
					continue
				}
				run.fail(errClosed)
				if err := r.revoke(ctx, run.lease); err != nil {
					t.Fatal(err)
				}
			}
		case k < 14:
			for name := range packNames(r) {
				if err := r.distrust(ctx, []badItem{{name[:], bytes.Repeat([]byte{byte(rng.Uint32())}, 32)}}); err != nil {
					t.Fatal(err)
				}
				break
			}
		case k < 15 && len(all) > 0: // a forgotten point comes back by a copy
			id := all[rng.IntN(len(all))]
			if p, ok := r.current().forgotten[id]; ok && p != nil {
				e := entrySealed{Point: p}
				if err := r.append(ctx, kindCommit, entryClear{Lease: RandomID()}, e, func(*state) error { return nil }); err != nil {
					t.Fatal(err)
				}
				ids = append(ids, id)
				if differs(reopen(t, store), p, model[id]) != nil {
					forget(t, r, id) // its data was pruned before
					ids = ids[:len(ids)-1]
				}
			}
		case k < 16:
			e := entrySealed{Removed: []string{fmt.Sprintf("%016x", rng.Uint64())}}
			if err := r.append(ctx, kindKeys, entryClear{}, e, func(*state) error { return nil }); err != nil {
				t.Fatal(err)
			}
		default:
			if report := prune(t, r, often(2+rng.Uint64N(9))); report.Checkpoint > 0 {
				written++
				compareReaders(t, store, r)
			}
		}
		if rng.IntN(15) == 0 {
			for _, p := range points(t, away) {
				equal(t, away, &p, model[p.ID])
			}
			points(t, r)
			alike(t, "away for a while", r.current(), away.current())
		}
	}
	prune(t, r, often(1))
	compareReaders(t, store, r)
	if n := len(points(t, reopen(t, store))); n != len(ids) {
		t.Errorf("%d points, %d in the model", n, len(ids))
	}
	clean(t, reopen(t, store), true)
	t.Logf("%d checkpoints, %d entries, %d deleted", written, r.current().head, len(store.gone))
}

func compareReaders(t *testing.T, store *archive, r *Repo) {
	t.Helper()
	fresh := reopen(t, store)
	alike(t, "opened now", r.current(), fresh.current())
	full := reopen(t, store.whole(t))
	numbers, err := entryNumbers(ctx, full.store)
	if err != nil {
		t.Fatal(err)
	}
	for from, what := range map[uint64]string{1: "from the first entry", r.current().checkpoint: "from the newest checkpoint"} {
		i, _ := slices.BinarySearch(numbers, from)
		s := full.genesis()
		if s.proving = from == 1; !s.proving {
			s.miss(from - 1)
		}
		if _, err := full.follow(ctx, s, numbers[i:], nil); err != nil || len(s.gaps) > 0 || from == 1 && len(s.healed) > 0 {
			t.Fatalf("%s: %v, %v %v", what, err, s.gaps, s.healed)
		}
		alike(t, what, r.current(), s)
	}
}

// checkpointed is a repository with two checkpoints and entries deleted.
func checkpointed(t *testing.T) (*blob.Mem, *Repo, map[PointID][]byte) {
	store := new(blob.Mem)
	r := create(t, store)
	contents := map[PointID][]byte{}
	for i := range 9 {
		content := random(uint64(i), 2)
		contents[mustSave(t, r, "a", content).ID] = content
		if i == 3 || i == 6 {
			if report := prune(t, r, often(3)); report.Checkpoint == 0 {
				t.Fatalf("no checkpoint: %+v", report)
			}
		}
	}
	if s := r.current(); s.older == 0 || s.checkpoint == 0 {
		t.Fatalf("checkpoints %d, %d", s.older, s.checkpoint)
	}
	if _, err := store.Get(ctx, entryName(1), 0, -1); !errors.Is(err, blob.ErrNotExist) {
		t.Fatalf("entry 1: %v", err)
	}
	return store, r, contents
}

// Two checkpoints remain, so that no damaged entry costs a point: not the
// first one, nor the one before the newest, nor what is between them.
func TestCheckpointDamage(t *testing.T) {
	long(t)
	store, r, contents := checkpointed(t)
	s := r.current()
	for n := s.older; n <= s.checkpoint; n++ {
		for _, missing := range []bool{false, true} {
			what := fmt.Sprintf("entry %d of %d, %d, %d, missing %v", n, s.older, s.checkpoint, s.head, missing)
			store := store.Clone()
			if missing {
				store.Delete(ctx, entryName(n))
			} else {
				store.Damage(entryName(n), func(p []byte) []byte { p[len(p)-70] ^= 1; return p })
			}
			r := reopen(t, store)
			have := points(t, r)
			if len(have) != len(contents) && n > s.older && n < s.checkpoint {
				t.Fatalf("%s: %d points", what, len(have))
			}
			for _, p := range have {
				equal(t, r, &p, contents[p.ID])
			}
			if len(have) != len(contents) {
				t.Fatalf("%s: %d points, want %d", what, len(have), len(contents))
			}
			report, err := r.Check(ctx, CheckOptions{})
			if err != nil || len(report.Problems) == 0 {
				t.Fatalf("%s: check: %v, %+v", what, err, report)
			}
			keyless, err := CheckKeyless(ctx, store, "", CheckOptions{})
			if err != nil || len(keyless.Problems) == 0 {
				t.Fatalf("%s: keyless: %v, %+v", what, err, keyless)
			}
			_, err = save(r, "b", random(77, 1), nil, nil)
			if (err == nil) != (n < s.checkpoint) {
				t.Fatalf("%s: save: %v", what, err)
			}
			if err != nil {
				continue
			}
			// Two more checkpoints, and the damage is history.
			for i := range 3 {
				p := mustSave(t, r, "c", random(uint64(100+i), 1))
				if _, err := r.Prune(ctx, often(2)); err != nil && i > 0 {
					t.Fatalf("%s: prune: %v", what, err)
				}
				equal(t, r, p, random(uint64(100+i), 1))
			}
			r = reopen(t, store)
			clean(t, r, true)
			if keyless, err := CheckKeyless(ctx, store, "", CheckOptions{}); err != nil || len(keyless.Problems) > 0 {
				t.Fatalf("%s: keyless: %v, %+v", what, err, keyless)
			}
		}
	}
}

// No entry is deleted when the chain, as it is in the store, would not give the
// state without it, though the process knows better.
func TestCheckpointProved(t *testing.T) {
	store, r, _ := checkpointed(t)
	n := r.current().checkpoint
	store.Damage(entryName(n), func(p []byte) []byte { p[len(p)-70] ^= 1; return p })
	mustSave(t, r, "a", random(1, 1))
	before, _ := entryNumbers(ctx, store)
	if _, err := r.Prune(ctx, often(2)); err == nil {
		t.Error("prune said nothing")
	}
	after, _ := entryNumbers(ctx, store)
	if len(after) <= len(before) || after[0] != before[0] {
		t.Errorf("entries from %d to %d, were from %d to %d", after[0], after[len(after)-1], before[0], before[len(before)-1])
	}
}

// A checkpoint that does not tell what the entries before it tell is damage to
// whoever has read those, and no entry is deleted for it.
func TestCheckpointWrong(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	p := mustSave(t, r, "a", random(1, 2))
	mustSave(t, r, "b", random(2, 2))
	other := reopen(t, store)
	s := r.current().clone()
	delete(s.points, p.ID)
	content, err := s.content()
	if err != nil {
		t.Fatal(err)
	}
	err = r.appendContent(ctx, kindCheckpoint, entryClear{Adds: s.adds()}, content, nil, func(*state) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []*Repo{r, other} {
		if n := len(points(t, r)); n != 2 || len(r.Damage()) != 1 || !strings.Contains(r.Damage()[0], "points") {
			t.Errorf("%d points, damage %q", n, r.Damage())
		}
	}
	if report, err := reopen(t, store).Check(ctx, CheckOptions{}); err != nil || len(report.Problems) == 0 {
		t.Errorf("check: %v, %+v", err, report)
	}
	s = r.current()
	numbers, _ := entryNumbers(ctx, store)
	if err := r.proveChain(ctx, s, numbers); err == nil {
		t.Error("it was proved")
	}
	// What a newer program has put in is not passed over.
	content = append(content[:len(content)-1], `,"tides":{"high":3}}`...)
	if err := newState([32]byte{}).read(s.adds(), content); !errors.Is(err, ErrVersion) {
		t.Errorf("an unknown member: %v", err)
	}
}

// Who was away while entries were deleted finds the chain again, and does not
// call it damage. A writer that stood still between looking and writing does
// not believe that its entry counts.
func TestLeftBehind(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	empty := reopen(t, store)
	first := mustSave(t, r, "a", random(1, 2))
	dead := mustSave(t, r, "a", random(2, 2))
	away := reopen(t, store)
	slow := &stalled{Mem: store}
	writer := reopen(t, slow)
	goOn := func() {
		for i := range 3 {
			forget(t, r, mustSave(t, r, "b", random(uint64(10+i), 1)).ID)
			prune(t, r, often(3))
		}
	}
	slow.before = goOn
	forget(t, r, dead.ID)
	if _, err := save(writer, "late", random(3, 1), nil, nil); !errors.Is(err, ErrLeftBehind) {
		t.Errorf("late: %v", err)
	}
	if slow.before != nil {
		t.Fatal("it did not stall")
	}
	if _, err := store.Get(ctx, slow.name, 0, -1); !errors.Is(err, blob.ErrNotExist) {
		t.Errorf("%s, which is void: %v", slow.name, err)
	}
	// Another such writer died before it could take its entry away.
	if err := store.Put(ctx, entryName(away.current().head), bytes.Repeat([]byte("x"), 300)); err != nil {
		t.Fatal(err)
	}
	for what, r := range map[string]*Repo{"away": away, "empty": empty, "writer": writer} {
		have := points(t, r)
		if len(have) != 1 || have[0].ID != first.ID {
			t.Fatalf("%s: %d points", what, len(have))
		}
		equal(t, r, first, random(1, 2))
		if len(r.Damage()) > 0 {
			t.Errorf("%s: damage %q", what, r.Damage())
		}
		clean(t, r, true)
	}
	if _, err := save(writer, "now", random(4, 1), nil, nil); err != nil {
		t.Errorf("afterwards: %v", err)
	}
	// It stands still behind its entry, which is in the chain: the point is there.
	slow.after = goOn
	p, err := save(writer, "in time", random(5, 1), nil, nil)
	if err != nil {
		t.Fatalf("in time: %v", err)
	}
	equal(t, reopen(t, store), p, random(5, 1))
	clean(t, reopen(t, store), true)
}

// stalled stands still at the first commit.
type stalled struct {
	*blob.Mem
	before, after func()
	name          string
}

func (s *stalled) Put(ctx context.Context, name string, p []byte) error {
	if !strings.HasPrefix(name, "chain/") {
		return s.Mem.Put(ctx, name, p)
	}
	if f := s.before; f != nil {
		s.before, s.name = nil, name
		f()
	}
	err := s.Mem.Put(ctx, name, p)
	if f := s.after; f != nil {
		s.after = nil
		f()
	}
	return err
}

// A machine that remembers an entry which is gone goes on when a checkpoint
// follows it; one that has seen more than there is does not.
func TestCheckpointRollback(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	mustSave(t, r, "a", random(1, 1))
	mustSave(t, r, "a", random(2, 1))
	cache, forked := t.TempDir(), &archive{Mem: store.Clone(), gone: map[string][]byte{}}
	remember := func(s blob.Store) error {
		r, err := Open(ctx, s, secret, Options{Cache: cache})
		if err == nil {
			err = r.Close()
		}
		return err
	}
	mustSave(t, r, "a", random(3, 1)) // entry 3, which the machine sees
	if err := remember(store); err != nil {
		t.Fatal(err)
	}
	goOn := func(s blob.Store) {
		r := reopen(t, s)
		for i := range 3 {
			mustSave(t, r, "b", random(uint64(10+i), 1))
			mustSave(t, r, "b", random(uint64(20+i), 1))
			prune(t, r, often(2))
		}
	}
	goOn(store)
	goOn(forked) // another entry 3
	if err := forked.Put(ctx, entryName(3), forked.gone[entryName(3)]); err != nil {
		t.Fatal(err)
	}
	if err := remember(forked); !errors.Is(err, ErrRolledBack) {
		t.Errorf("another entry 3: %v", err)
	}
	if err := remember(store); err != nil {
		t.Errorf("behind a checkpoint: %v", err)
	}
	newest := reopen(t, store).current().head
	store.Delete(ctx, entryName(newest))
	if err := remember(store); !errors.Is(err, ErrRolledBack) {
		t.Errorf("the newest entry is gone: %v", err)
	}
}

// lockedChain refuses to delete some entries.
type lockedChain struct {
	*blob.Mem
	from string
}

func (s lockedChain) Delete(ctx context.Context, name string) error {
	if strings.HasPrefix(name, "chain/") && name >= s.from {
		return fmt.Errorf("delete %s: %w", name, blob.ErrLocked)
	}
	return s.Mem.Delete(ctx, name)
}

// Entries that are locked stay, and are no trouble to anybody.
func TestCheckpointLocked(t *testing.T) {
	store := new(blob.Mem)
	locked := lockedChain{store, entryName(4)}
	r := create(t, locked)
	for i := range 4 {
		mustSave(t, r, "a", random(uint64(i), 1))
		mustSave(t, r, "a", random(uint64(i), 1))
		prune(t, r, often(2))
	}
	if numbers, _ := entryNumbers(ctx, store); numbers[0] != 4 {
		t.Errorf("entries from %d on are there", numbers[0])
	}
	alike(t, "opened now", r.current(), reopen(t, store).current())
	clean(t, reopen(t, store), true)
	if report, err := CheckKeyless(ctx, store, "", CheckOptions{}); err != nil || len(report.Problems) > 0 {
		t.Errorf("keyless: %v, %+v", err, report)
	}
	if report := prune(t, reopen(t, store), unwatched); report.RemovedEntries == 0 {
		t.Errorf("unlocked: %+v", report)
	}
	if numbers, _ := entryNumbers(ctx, store); numbers[0] != r.current().older {
		t.Errorf("entries from %d on are there", numbers[0])
	}
}

// A state that no document takes is no reason to fail, nor to delete.
func TestCheckpointTooLarge(t *testing.T) {
	if testing.Short() {
		t.Skip("100 MB of points")
	}
	store := new(blob.Mem)
	r := create(t, store)
	note := make([]byte, 22<<20)
	for i := range 3 {
		fillRandom(rand.New(rand.NewPCG(1, uint64(i))), note)
		for j, b := range note {
			note[j] = " !#$%'()*+,-./0123456789:;=?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]^_`abcd"[b&63]
		}
		e := entrySealed{Point: &Point{ID: PointID(RandomID()), Notes: []string{string(note)}}}
		if err := r.append(ctx, kindCommit, entryClear{Lease: RandomID()}, e, func(*state) error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
	report := prune(t, r, often(2))
	if report.Checkpoint != 0 || report.RemovedEntries != 0 || len(report.Notes) != 1 {
		t.Errorf("%+v", report)
	}
}

// The power goes at any call while a checkpoint is written and entries are
// deleted, and when that is done for the second time.
func TestCheckpointPowerLoss(t *testing.T) {
	long(t)
	w := newCrashWorld(t)
	for _, every := range []uint64{1 << 20, 3} {
		if every == 3 { // two checkpoints are there already
			r := reopen(t, w.store)
			for range 2 {
				w.dead = append(w.dead, mustSave(t, r, "x", random(6, 1)).ID)
				w.contents[w.dead[len(w.dead)-1]] = random(6, 1)
				mustSave(t, r, "y", random(5, 2))
				prune(t, r, often(2))
			}
			for _, p := range points(t, r) {
				if w.contents[p.ID] == nil {
					w.contents[p.ID] = random(5, 2)
				}
			}
		}
		everyCall(t, w, func(s blob.Store) map[PointID][]byte {
			if r := open(t, s); r != nil && r.Forget(ctx, w.dead, time.Now()) == nil {
				r.Prune(ctx, often(min(every, 4)))
			}
			return nil
		}, w.stays)
	}
}

// Prunes with checkpoints beside each other and beside writers and readers.
func TestCheckpointParallel(t *testing.T) {
	store := &archive{Mem: new(blob.Mem), gone: map[string][]byte{}}
	create(t, store)
	var mu sync.Mutex
	model := map[PointID][]byte{}
	var wg sync.WaitGroup
	for i := range 3 {
		r := reopen(t, store)
		wg.Go(func() {
			for n := range 12 {
				content := random(uint64(100*i+n%5), 1+n%4)
				run, err := r.Begin(ctx, RandomID())
				if err != nil {
					t.Error(err)
					return
				}
				p, err := saveIn(run, "vm", content, nil, nil)
				err = errors.Join(err, run.Close())
				if errors.Is(err, ErrPruned) || errors.Is(err, ErrLeftBehind) {
					continue
				} else if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				model[p.ID] = content
				mu.Unlock()
			}
		})
	}
	for range 2 {
		r := reopen(t, store)
		wg.Go(func() {
			for range 15 {
				if _, err := r.Prune(ctx, often(4)); err != nil && !errors.Is(err, ErrLeftBehind) {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for range 15 {
			r, err := Open(ctx, store, secret, Options{Cache: cacheDir(t)})
			if err != nil {
				t.Error(err)
				return
			}
			if len(r.Damage()) > 0 {
				t.Errorf("damage: %q", r.Damage())
			}
			r.Close()
		}
	})
	wg.Wait()
	r := reopen(t, store)
	have := points(t, r)
	n := 0
	for _, p := range have {
		if want := model[p.ID]; want != nil {
			n++
			equal(t, r, &p, want)
		}
	}
	if n != len(model) {
		t.Errorf("%d of %d points are there", n, len(model))
	}
	clean(t, r, true)
	prune(t, r, often(1))
	compareReaders(t, store, r)
	t.Logf("%d points, %d entries, %d deleted", len(have), r.current().head, len(store.gone))
}

// The other reader reads a chain that starts at a checkpoint, whether all
// entries before it are deleted or only some, and is not misled by damage
// that a checkpoint has made good.
func TestCheckpointIndependentReader(t *testing.T) {
	long(t)
	needPython(t)
	dir := filepath.Join(t.TempDir(), "repo")
	store, err := blob.CreateDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	r := create(t, store)
	points := map[PointID]map[string][]byte{}
	var kept []byte
	for i := range 4 {
		disks := map[string][]byte{"vda": random(uint64(i), 3)}
		for range 2 {
			p, err := saveDisks(r, "web", disks, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			points[p.ID] = disks
			if i == 1 {
				forget(t, r, p.ID)
				delete(points, p.ID)
			}
		}
		if kept == nil {
			kept, err = store.Get(ctx, entryName(2), 0, -1)
			if err != nil {
				t.Fatal(err)
			}
		}
		prune(t, r, often(2))
	}
	verify := func(what string, sound bool) {
		t.Helper()
		for _, args := range [][]string{{"verify"}, {"verify", "--keyless"}} {
			if _, err := python(t, dir, args...); (err == nil) != sound {
				t.Errorf("%s: %v: %v", what, args, err)
			}
		}
		readsAlike(t, dir, points)
	}
	verify("entries deleted", true)
	if err := store.Put(ctx, entryName(2), kept); err != nil {
		t.Fatal(err)
	}
	verify("not all deleted", true)
	damageFile(t, filepath.Join(dir, entryName(r.current().older)), 100)
	verify("the first checkpoint damaged", false)
}

// A checkpoint leaves out what matters to nobody any more, and nothing else.
func TestCheckpointAbridged(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	must := func(name string) {
		if err := store.Put(ctx, name, nil); err != nil {
			t.Fatal(err)
		}
	}
	must("leases/aa")
	must("leases/bb.000000000001")
	s := newState([32]byte{})
	s.head = 100
	s.over = map[string]kind{"aa": kindCommit, "bb": kindCommit, "cc": kindCommit, "dd": kindRevoke}
	inStore, inIndex, gone, waited := [32]byte{1}, [32]byte{2}, [32]byte{3}, [32]byte{4}
	s.quarantine = map[[32]byte]uint64{inStore: 10, inIndex: 10, gone: 10, waited: 60}
	for name := range s.quarantine {
		s.bad[badKey{pack: name}] = true
	}
	s.forgotten = map[PointID]*Point{"pinned": {ID: "pinned"}, "free": {ID: "free"}}
	p := &pruner{r: r, m: &marker{r: r, state: s, pins: map[PointID]string{"pinned": "s"},
		there: map[[32]byte]int64{inStore: 1}, packs: map[[32]byte]*packMark{inIndex: {}},
		after: map[string]Lease{"ee": {Chain: 50}, "ff": {Chain: 70}}}}
	a, err := p.abridged(ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"over":       map[string]kind{"aa": kindCommit, "bb": kindCommit, "dd": kindRevoke},
		"quarantine": map[[32]byte]uint64{inStore: 10, inIndex: 10, waited: 60},
		"bad":        map[badKey]bool{{pack: inStore}: true, {pack: inIndex}: true},
		"forgotten":  map[PointID]*Point{"pinned": {ID: "pinned"}, "free": nil},
	}
	eachField(a, func(name string, v reflect.Value) {
		if want[name] != nil && !reflect.DeepEqual(v.Interface(), want[name]) {
			t.Errorf("%s: %v, want %v", name, v.Interface(), want[name])
		}
	})
	a.checkpoint, a.older = 101, s.checkpoint
	if err := s.agrees(a); err != nil {
		t.Error(err)
	}
	delete(a.over, "dd")
	if err := s.agrees(a); !errors.Is(err, ErrDamaged) {
		t.Errorf("a revoked lease left out: %v", err)
	}
}
