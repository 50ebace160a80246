package repo

import (
	"encoding/json"
	"math/rand/v2"
	"strings"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/pack"
)

// Every object can be taken apart, and no key shows unless asked for.
func TestObject(t *testing.T) {
	store, p, _ := keyed(t)
	r := mustOpen(t, store, secret)
	if _, err := r.Rotate(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.Pin(ctx, "0123456789abcdef", p.ID); err != nil {
		t.Fatal(err)
	}
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	defer run.Close()
	names, _ := blob.Names(ctx, store, "")
	for _, name := range names {
		for _, secrets := range []bool{false, true} {
			o, err := r.Object(ctx, name, secrets)
			if err != nil || o.Problem != "" || o.Repository != r.ID() || o.Signature != "" && o.Signature != "good" {
				t.Fatalf("%s: %+v, %v", name, o, err)
			}
			b, err := json.Marshal(o)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range r.keys.Now().ring.Masters {
				key, _ := json.Marshal(m.Key)
				shows := strings.Contains(string(b), strings.Trim(string(key), `"`))
				newest := name == ringName(r.id, 2)
				if shows && !secrets || newest && secrets && !shows {
					t.Errorf("%s, secrets %v: master key %d shows: %v", name, secrets, m.Number, shows)
				}
			}
		}
	}
	s := store.Clone()
	for _, name := range names {
		for _, at := range []float64{0, 0.3, 0.7, 1} {
			s.Damage(name, func(p []byte) []byte { p[int(at*float64(len(p)-1))] ^= 4; return p })
			damaged := &Repo{store: s, id: r.id, pub: r.pub, state: r.current(), keys: r.keys}
			o, err := damaged.Object(ctx, name, false)
			slot := strings.HasPrefix(name, "keys/") // opens with its passphrase only
			if err != nil || o.Problem == "" && o.Signature != "" && o.Signature == "good" || o.Problem == "" && o.Signature == "" && !slot {
				t.Errorf("%s, damaged at %g: %+v, %v", name, at, o, err)
			}
			s.Damage(name, func(p []byte) []byte { p[int(at*float64(len(p)-1))] ^= 4; return p })
		}
	}
}

func TestStats(t *testing.T) {
	store, p, content := keyed(t)
	r := mustOpen(t, store, secret)
	used := int64(ChunkSize) // the configuration
	for off := 0; off < len(content); off += ChunkSize {
		if r.contentID(content[off:off+ChunkSize]) != (pack.ID{}) {
			used += ChunkSize
		}
	}
	if _, err := save(r, "b", content, nil, nil); err != nil {
		t.Fatal(err)
	}
	st, err := r.Stats(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if st.Points != 2 || st.Histories != 1 || st.UsedBytes != 2*used || st.DiskBytes != 2*(int64(len(content))+p.Files[0].Size) || st.Chunks*ChunkSize != st.PlainBytes || st.Dedupe <= 1 || st.Compress <= 0 {
		t.Errorf("%+v, want %d used", st, 2*used)
	}
	packs, items := 0, int64(0)
	if err := r.Packs(ctx, func(p PackInfo) error { packs++; items += int64(p.Items); return nil }); err != nil {
		t.Fatal(err)
	}
	if packs != st.Kinds[0].Packs+st.Kinds[1].Packs || items != st.Kinds[0].Items+st.Kinds[1].Items {
		t.Errorf("%d packs of %d items; %+v", packs, items, st.Kinds)
	}
	indexes, err := r.Indexes(ctx)
	if err != nil || len(indexes) != st.Indexes {
		t.Fatalf("%+v, %v", indexes, err)
	}
	for _, i := range indexes {
		listed, _, err := r.Index(ctx, i.Index)
		if err != nil || len(listed) != i.Packs {
			t.Fatalf("%+v, %v", listed, err)
		}
		for _, k := range listed {
			it := k.Items[rand.IntN(len(k.Items))]
			_, places, err := r.Index(ctx, it.ID)
			if err != nil || len(places) == 0 || places[0].Pack == k.Pack && places[0].Offset != it.Offset {
				t.Fatalf("%+v: %+v, %v", it, places, err)
			}
		}
	}
}
