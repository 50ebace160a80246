package repo

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/tree"
)

// The synthetic repository: VMs with restore points, of disks of 32 GiB. Each
// point but the first has 1 % of its disk changed, in 50 places. Of 10 VMs with
// 100 points each there are 10.4 million chunks in 20,000 packs, and 80,000 map
// nodes.
const (
	synthSize   = 32 << 30
	synthLeaves = synthSize / ChunkSize / tree.Fanout
	synthPlaces = 50
	synthChunks = 105 // changed at each place
)

// TestSynthesize makes a repository for "make bench" in the directory
// HOLDFAST_SYNTH, of HOLDFAST_SYNTH_VMS with HOLDFAST_SYNTH_POINTS each. Index
// objects, maps and chain are as runs would write them. Packs of chunks have
// their names and lengths, and nothing in them. Of VMs with one point the maps
// name the first 256 chunks only, again and again.
func TestSynthesize(t *testing.T) {
	dir := os.Getenv("HOLDFAST_SYNTH")
	if dir == "" {
		t.Skip("it makes a repository of millions of chunks for \"make bench\", in HOLDFAST_SYNTH")
	}
	vms, points := number(t, "HOLDFAST_SYNTH_VMS"), number(t, "HOLDFAST_SYNTH_POINTS")
	store, err := blob.CreateDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Init(ctx, store, []byte("bench"), Options{Cache: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	s := synth{r: r, dir: dir, lean: points == 1, rng: rand.NewChaCha8([32]byte{1})}
	all := make([]*synthVM, vms)
	for n := range points {
		for i := range all {
			if n == 0 {
				all[i] = new(synthVM)
			}
			if err := s.point(i, all[i]); err != nil {
				t.Fatal(err)
			}
			if n == points-1 {
				all[i] = nil
			}
		}
	}
	t.Logf("%d chunks, %d entries", s.chunks, r.current().Head)
}

// number is that of an environment variable.
func number(t *testing.T, name string) int {
	n, err := strconv.Atoi(os.Getenv(name))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

type synth struct {
	r      *Repo
	lean   bool // all leaves of a disk are its first
	dir    string
	rng    *rand.ChaCha8
	chunks int
	points int
}

// synthVM is a VM's disk: its leaves, and their ids.
type synthVM struct {
	leaves [synthLeaves]*tree.Node
	ids    [synthLeaves]tree.ID
}

func (s *synth) point(number int, vm *synthVM) error {
	run, err := s.r.Begin(ctx, RandomID())
	if err != nil {
		return err
	}
	var fresh []index.Item
	id := func() (id pack.ID) {
		s.rng.Read(id[:])
		fresh = append(fresh, index.Item{ID: id, Stored: 20000 + uint32(s.rng.Uint64()%25000)})
		return id
	}
	change := func(leaf, from, n int) error {
		l := vm.leaves[leaf]
		for i := from; i < from+n; i++ {
			l.Children[i] = id()
		}
		var err error
		vm.ids[leaf], err = run.storeNode(ctx, l)
		return err
	}
	if vm.leaves[0] == nil {
		for i := range vm.leaves {
			if s.lean && i > 0 {
				for range tree.Fanout {
					id()
				}
				vm.ids[i] = vm.ids[0]
				continue
			}
			vm.leaves[i] = new(tree.Node)
			if err := change(i, 0, tree.Fanout); err != nil {
				return err
			}
		}
	} else {
		for range synthPlaces {
			at := s.rng.Uint64()
			if err := change(int(at%synthLeaves), int(at>>32%(tree.Fanout-synthChunks)), synthChunks); err != nil {
				return err
			}
		}
	}
	root, err := s.root(run, vm)
	if err != nil {
		return err
	}
	if err := s.packs(run, fresh); err != nil {
		return err
	}
	s.chunks += len(fresh)
	s.points++
	p := &Point{VM: fmt.Sprintf("vm%02d", number), History: HistoryID(fmt.Sprintf("%032x", number)), Kind: "folder", Host: "/synthetic",
		VMID: fmt.Sprint(number), Time: time.Unix(1.7e9, 0).Add(time.Duration(s.points) * time.Hour).UTC(), Consistency: "crash", Session: run.lease,
		Disks: []Disk{{ID: "vda", Size: synthSize, Format: "raw", Sector: 512, Path: "/synthetic/disk.raw", Root: root}}}
	if err := run.Commit(ctx, p); err != nil {
		return err
	}
	return run.Close()
}

// root stores the nodes above the leaves.
func (s *synth) root(run *Run, vm *synthVM) (Root, error) {
	top := &tree.Node{Level: 2}
	for i := range synthLeaves / tree.Fanout {
		n := &tree.Node{Level: 1}
		copy(n.Children[:], vm.ids[i*tree.Fanout:])
		id, err := run.storeNode(ctx, n)
		if err != nil {
			return "", err
		}
		top.Children[i] = id
	}
	id, err := run.storeNode(ctx, top)
	return Root(tree.Root{Levels: 3, ID: id}.String()), err
}

// packs puts the items into packs of the run, which are holes.
func (s *synth) packs(run *Run, items []index.Item) error {
	for len(items) > 0 {
		n := min(len(items), 512)
		k := index.Pack{Kind: pack.Chunks, Size: 64 + 16 + 40*int64(n) + 16, Items: items[:n]}
		for _, it := range k.Items {
			k.Size += int64(it.Stored)
		}
		s.rng.Read(k.Name[:])
		path := filepath.Join(s.dir, filepath.FromSlash(packName(k.Name)))
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if err == nil {
			err = os.WriteFile(path, nil, 0o644)
		}
		if err == nil {
			err = os.Truncate(path, k.Size)
		}
		if err != nil {
			return err
		}
		run.mu.Lock()
		run.packs = append(run.packs, k)
		run.mu.Unlock()
		items = items[n:]
	}
	return nil
}

// TestFind opens the repository in HOLDFAST_FIND, with the cache in
// HOLDFAST_FIND_CACHE, and prints for "make bench" how many microseconds it takes
// to find a chunk that is there, and one that is not.
func TestFind(t *testing.T) {
	dir := os.Getenv("HOLDFAST_FIND")
	if dir == "" {
		t.Skip("it measures a repository for \"make bench\", in HOLDFAST_FIND")
	}
	store, err := blob.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	r, err := Open(ctx, store, []byte("bench"), Options{Cache: os.Getenv("HOLDFAST_FIND_CACHE")})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	points, err := r.Points(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var there []pack.ID
	for _, p := range points {
		root, err := tree.ParseRoot(string(p.Disks[0].Root), p.Disks[0].Size)
		if err != nil {
			t.Fatal(err)
		}
		ids := make([]pack.ID, min(tree.Fanout, 20000/len(points)))
		if err := tree.Lookup(ctx, r.node, root, 0, ids); err != nil {
			t.Fatal(err)
		}
		there = append(there, ids...)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	rng.Shuffle(len(there), func(i, j int) { there[i], there[j] = there[j], there[i] })
	find := func(ids []pack.ID, want bool) float64 {
		from := time.Now()
		for _, id := range ids {
			if ok, err := r.present(id); err != nil || ok != want {
				t.Fatalf("chunk %x: %v, %v", id[:8], ok, err)
			}
		}
		return time.Since(from).Seconds() * 1e6 / float64(len(ids))
	}
	absent := make([]pack.ID, len(there))
	random := rand.NewChaCha8([32]byte{2})
	for i := range absent {
		random.Read(absent[i][:])
	}
	fmt.Printf("found %f absent %f\n", find(there, true), find(absent, false))
}
