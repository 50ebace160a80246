package chain

import (
	"context"
	"crypto/ed25519"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"
	"unsafe"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/seal"
)

// placed are the fields of a state that come from where it stands in the
// chain, not from what entries say: a checkpoint does not carry them.
var placed = []string{"Head", "Digest", "header", "Time", "Checkpoint", "Older", "gaps", "healed", "unknown", "proving"}

// eachField gives the fields that a checkpoint must carry.
func eachField(s *State, f func(name string, v reflect.Value)) {
	v := reflect.ValueOf(s).Elem()
	for i := range v.NumField() {
		if name := v.Type().Field(i).Name; !slices.Contains(placed, name) {
			f(name, reflect.NewAt(v.Field(i).Type(), unsafe.Pointer(v.Field(i).UnsafeAddr())).Elem())
		}
	}
}

// Every field of the state, whatever is in it, is in a checkpoint. Who adds a
// field to the state and not to State.parts is told here.
func TestCheckpointCarriesAll(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		fmt.Sscan(v, &seed)
	}
	t.Logf("HOLDFAST_SEED=%d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for range 20 {
		s := newState([32]byte{})
		eachField(s, func(_ string, v reflect.Value) { fill(rng, v, 0) })
		// What belongs together:
		points := s.Points
		s.Points, s.Order = map[PointID]Point{}, nil
		for id, p := range points {
			p.ID, p.Keep = id, ""
			s.Points[id], s.Order = p, append(s.Order, id)
		}
		for id, p := range s.Forgotten {
			if p.ID, p.Keep = id, ""; rng.IntN(2) == 0 {
				p = nil
			}
			s.Forgotten[id] = p
		}
		clear(s.Added)
		for d := range s.Indexes {
			s.Added[d] = Adding{rng.Uint64N(1 << 40), fmt.Sprint(rng.IntN(2))}
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
				t.Errorf("State.%s is not carried by a checkpoint: add it to State.parts and docs/format.md §6.4\n%v\n%v", name, want[name], v.Interface())
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

// What a newer program has put into a checkpoint is not passed over.
func TestCheckpointUnknown(t *testing.T) {
	s := newState([32]byte{})
	content, err := s.content()
	if err != nil {
		t.Fatal(err)
	}
	content = append(content[:len(content)-1], `,"tides":{"high":3}}`...)
	if err := newState([32]byte{}).read(nil, content); !errors.Is(err, seal.ErrVersion) {
		t.Errorf("an unknown member: %v", err)
	}
}

// Who knows the entries before a checkpoint takes it with what may be left out
// left out, and with nothing else.
func TestAgrees(t *testing.T) {
	s := newState([32]byte{})
	s.Over = map[string]Kind{"aa": Commit, "dd": Revoke}
	s.Quarantine[[32]byte{1}] = 10
	s.Bad[Copy{Pack: [32]byte{1}}] = true
	s.Forgotten["free"] = &Point{ID: "free"}
	a := s.Abridged(Needless{Horizon: 10, Lease: func(string) bool { return true },
		Pack: func([32]byte) bool { return true }, Point: func(PointID) bool { return true }})
	if len(a.Over) != 1 || len(a.Quarantine)+len(a.Bad) != 0 || a.Forgotten["free"] != nil {
		t.Errorf("%+v", a)
	}
	a.Checkpoint, a.Older = 101, s.Checkpoint
	if err := s.agrees(a); err != nil {
		t.Error(err)
	}
	delete(a.Over, "dd")
	if err := s.agrees(a); !errors.Is(err, seal.ErrDamaged) {
		t.Errorf("a revoked lease left out: %v", err)
	}
}

// Whatever is in a checkpoint, reading it gives an error or a state that can
// be written again.
func FuzzCheckpoint(f *testing.F) {
	content, err := newState([32]byte{}).content()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(content)
	f.Add([]byte(`{"points":[{"id":"aa"}],"added":[{"entry":3,"lease":"x"}],"quarantine":{"00":1},"distrust":[{"pack":"","id":""}],"over":{"a":2},"locks":{"days":-1}}`))
	f.Fuzz(func(t *testing.T, content []byte) {
		s := newState([32]byte{})
		if s.read(nil, content) != nil {
			return
		}
		if _, _, err := s.Encode(); err != nil {
			t.Error(err)
		}
	})
}

// machine is a chain as one of several machines sees it.
func machine(t *testing.T, store blob.Store) *Chain {
	master := &seal.Key{1}
	sign := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	return &Chain{Store: store, Verify: sign.Public().(ed25519.PublicKey), Sign: sign,
		Master: func(context.Context, uint32) (*seal.Key, error) { return master, nil },
		Newest: func() (uint32, *seal.Key) { return 1, master },
		Memory: filepath.Join(t.TempDir(), "head")}
}

// Of two that create the same entry one wins, and both come to the same state.
// Who has seen an entry misses it.
func TestChain(t *testing.T) {
	ctx, store := t.Context(), new(blob.Mem)
	a, b := machine(t, store), machine(t, store)
	sa, sb := a.Genesis(), b.Genesis()
	for i := range 5 {
		content := fmt.Appendf(nil, `{"point":{"id":"p%d"}}`, i)
		if _, _, ours, err := a.Put(ctx, sa, Commit, Clear{Lease: "a"}, content); err != nil || !ours {
			t.Fatal(ours, err)
		}
		if _, _, ours, err := b.Put(ctx, sb, Commit, Clear{Lease: "b"}, content); err != nil || ours {
			t.Fatal(ours, err)
		}
		var err, errB error
		sa, _, err = a.Next(ctx, sa)
		sb, _, errB = b.Next(ctx, sb)
		if err != nil || errB != nil || sa.Head != uint64(i+1) || sa.Digest != sb.Digest || len(sb.Points) != i+1 {
			t.Fatal(sa.Head, sb.Head, err, errB)
		}
		a, b, sa, sb = b, a, sb, sa
	}
	s, err := a.Read(ctx)
	if err != nil || s.Digest != sa.Digest {
		t.Fatal(err)
	}
	if what, err := s.differs(sa); what != "" || err != nil {
		t.Errorf("read again: %s, %v", what, err)
	}
	if o, err := b.Outline(ctx); err != nil || o.Head != 5 || len(o.Problems) > 0 {
		t.Errorf("%+v, %v", o, err)
	}
	store.Delete(ctx, Name(5))
	if s, err := a.Read(ctx); !errors.Is(err, ErrRolledBack) || s.Head != 4 {
		t.Errorf("entry 5 is gone: %v", err)
	}
	if s, err := machine(t, store).Read(ctx); err != nil || s.Head != 4 || s.Damage() != nil {
		t.Errorf("a machine that has not seen it: %v", err)
	}
	store.Delete(ctx, Name(2))
	if s, err := machine(t, store).Read(ctx); err != nil || len(s.Damage()) != 1 || len(s.Points) != 3 {
		t.Errorf("entry 2 is gone: %v, %q", err, s.Damage())
	}
}
