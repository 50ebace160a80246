package replica

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/repo"
	"holdfast/internal/repo/repotest"
)

// archive is a store that remembers all that was ever put there, and what
// leases there were when a pack was deleted.
type archive struct {
	*blob.Mem

	mu      sync.Mutex // guards all below, and is held while the store changes
	ever    map[string][]byte
	at      map[string]int    // by name: when it was put
	by      map[string]string // by name: who put it
	events  int
	deleted []deletion
}

// deletion is of a pack.
type deletion struct {
	pack   string
	by     string
	head   uint64   // of the chain at that moment
	leases []string // that were there
}

func newArchive(t testing.TB, m *blob.Mem) *archive {
	a := &archive{Mem: m, ever: map[string][]byte{}, at: map[string]int{}, by: map[string]string{}}
	for i, err := range m.List(ctx, "") {
		if err == nil {
			a.ever[i.Name], err = m.Get(ctx, i.Name, 0, -1)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// view is an archive as one process sees it.
type view struct {
	*archive
	who string
}

func (v view) Put(ctx context.Context, name string, p []byte) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := v.Mem.Put(ctx, name, p); err != nil {
		return err
	}
	v.events++
	v.ever[name], v.at[name], v.by[name] = slices.Clone(p), v.events, v.who
	return nil
}

func (v view) Delete(ctx context.Context, name string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	d := deletion{pack: name, by: v.who}
	if strings.HasPrefix(name, "packs/") {
		for i := range v.Mem.List(ctx, "") {
			if strings.HasPrefix(i.Name, "leases/") && !strings.Contains(i.Name, ".") {
				d.leases = append(d.leases, i.Name)
			}
			var n uint64
			if fmt.Sscanf(i.Name, "chain/%d", &n); n > d.head {
				d.head = n
			}
		}
	}
	err := v.Mem.Delete(ctx, name)
	if err == nil && d.head > 0 {
		v.deleted = append(v.deleted, d)
	}
	return err
}

// entry is what the oracle wants to know of one.
type entry struct {
	kind  uint16
	Lease string   `json:"lease"`
	Adds  []string `json:"adds"`
	Drops []string `json:"drops"`
	packs []string
}

// proves goes through all that happened to a store, and wants at every moment:
//   - every item of every point that was not forgotten in a pack that is in the
//     inventory and not in quarantine,
//   - no commit and nothing announced in the name of a lease that was revoked,
//   - no pack deleted that was not in quarantine before and out of the
//     inventory, or while a lease was open that began before it was.
func (a *archive) proves(t testing.TB) {
	t.Helper()
	s := new(blob.Mem)
	chain := map[string][]byte{}
	for name, p := range a.ever {
		if strings.HasPrefix(name, "chain/") {
			chain[name] = p
		} else if err := s.Put(ctx, name, p); err != nil {
			t.Fatal(err)
		}
	}
	r := repotest.Open(t, s)
	over := map[string]int{}       // leases, by the entry that ended them
	quarantine := map[string]int{} // packs
	indexes := map[string]bool{}
	inventory := []map[string]bool{{}} // packs, by entry
	contents := map[string][]string{}
	for n := 1; n <= len(chain); n++ {
		name := fmt.Sprintf("chain/%012d", n)
		if err := s.Put(ctx, name, chain[name]); err != nil {
			t.Fatal(err)
		}
		e := a.read(t, r, name)
		const add, commit, revoke, quarantined = 1, 2, 5, 6
		if was := over[e.Lease]; was > 0 && e.Lease != "" && e.kind != revoke {
			t.Errorf("entry %d is of lease %s, which was over with entry %d", n, e.Lease, was)
		}
		if e.kind == commit || e.kind == revoke {
			if over[e.Lease] == 0 {
				over[e.Lease] = n
			}
		}
		for _, k := range e.packs {
			if quarantine[k] == 0 {
				quarantine[k] = n
			}
		}
		for _, d := range e.Adds {
			indexes[d] = true
			if contents[d] == nil {
				contents[d] = a.packs(t, r, d)
			}
		}
		for _, d := range e.Drops {
			delete(indexes, d)
		}
		live := map[string]bool{}
		for d := range indexes {
			for _, k := range contents[d] {
				live[k] = true
			}
		}
		inventory = append(inventory, live)
		if e.kind == commit || e.kind == quarantined || len(e.Drops) > 0 {
			c, err := r.Check(ctx, repo.CheckOptions{})
			if err != nil || len(c.Problems) > 0 {
				t.Fatalf("with entry %d, of kind %d: %+v, %v", n, e.kind, c, err)
			}
		}
	}
	for _, d := range a.deleted {
		k := d.pack[strings.LastIndex(d.pack, "/")+1:]
		q := quarantine[k]
		if q == 0 || uint64(q) > d.head {
			t.Errorf("%s was deleted at entry %d, and put in quarantine by entry %d", d.pack, d.head, q)
			continue
		}
		if inventory[d.head][k] {
			t.Errorf("%s was deleted at entry %d, while it was in the inventory", d.pack, d.head)
		}
		for _, lease := range d.leases {
			id := strings.TrimPrefix(lease, "leases/")
			ended := over[id] > 0 && uint64(over[id]) <= d.head
			if !ended && a.by[lease] != d.by && a.at[lease] < a.at[fmt.Sprintf("chain/%012d", q)] {
				t.Errorf("%s, in quarantine since entry %d, was deleted by %s at entry %d, while %s of %s was open, which began before",
					d.pack, q, d.by, d.head, lease, a.by[lease])
			}
		}
	}
	ever := 0
	for name := range a.ever {
		if strings.HasPrefix(name, "packs/") {
			ever++
		}
	}
	t.Logf("%d entries, %d packs ever, %d deleted", len(chain), ever, len(a.deleted))
}

func (a *archive) read(t testing.TB, r *repo.Repo, name string) (e entry) {
	t.Helper()
	o, err := r.Object(ctx, name, false)
	if err != nil || o.Problem != "" {
		t.Fatal(name, o, err)
	}
	if err := json.Unmarshal(o.Clear, &e); err != nil {
		t.Fatal(err)
	}
	sealed, err := json.Marshal(o.Sealed)
	var s struct{ Packs []string }
	if err == nil {
		err = json.Unmarshal(sealed, &s)
	}
	if err != nil {
		t.Fatal(name, err)
	}
	e.kind, e.packs = o.Kind, s.Packs
	return e
}

// packs lists the packs of an index object.
func (a *archive) packs(t testing.TB, r *repo.Repo, d string) (packs []string) {
	t.Helper()
	o, err := r.Object(ctx, "index/"+d, false)
	if err != nil || o.Problem != "" {
		t.Fatal(d, o, err)
	}
	var c struct{ Packs [][]any }
	if err := json.Unmarshal(o.Clear, &c); err != nil {
		t.Fatal(err)
	}
	for _, row := range c.Packs {
		packs = append(packs, row[0].(string))
	}
	return packs
}
