package repo

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/codec"
	"holdfast/internal/repo/internal/seal"
)

// v1 is a repository that format version 1's first program has written
// (testdata/README.md). It is never made anew: it must stay readable.
const v1 = "testdata/v1"

// v1Disks are the SHA-256 of its points' disks, by the points' order.
var v1Disks = []map[string]string{
	{"vda": "1cb474d5f20cb090bd118b4210b70a58121e00c8e16eea9079664404fc2cb5d0", "vdb": "fa43239bcee7b97ca62f007cc68487560a39e19f74f3dde7486db3f98df8e471"},
	{"vda": "78e4c2f08502705280d3506c6464bcc5933824ed2c4d12e350268cd2b1e88312", "vdb": "fa43239bcee7b97ca62f007cc68487560a39e19f74f3dde7486db3f98df8e471"},
}

// makeV1 made it.
func makeV1(t *testing.T) {
	store, err := blob.CreateDir(v1)
	if err != nil {
		t.Fatal(err)
	}
	cheap := seal.KDF{Name: "argon2id", Time: 2, Memory: 1 << 10, Threads: 2, Root: 1, Label: "first"}
	r, err := initialize(ctx, store, []byte("a small repository of version 1"), Options{Cache: t.TempDir()}, cheap)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	rng := rand.New(rand.NewPCG(2026, 1))
	disks := map[string][]byte{
		"vda": make([]byte, 17<<20+512), // a map of two levels
		"vdb": make([]byte, 2*ChunkSize),
	}
	text := strings.Repeat("What is stored once is stored well enough to be found again. ", 2000)
	copy(disks["vda"], text)
	fillRandom(rng, disks["vda"][4*ChunkSize:4*ChunkSize+9000])
	copy(disks["vda"][17<<20:], text)
	a, err := saveDisks(r, "web", disks, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.compressor = codec.Small
	copy(disks["vda"][5*ChunkSize:], strings.ToUpper(text[:ChunkSize]))
	fillRandom(rng, disks["vda"][4*ChunkSize:4*ChunkSize+9000])
	if _, err := saveDisks(r, "web", disks, a, map[string][]int{"vda": {4, 5}}); err != nil {
		t.Fatal(err)
	}
	gone, err := saveDisks(r, "gone", map[string][]byte{"vda": []byte("forgotten")}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	forget := chain.Sealed{Points: []PointID{gone.ID}}
	if err := r.append(ctx, chain.Forget, chain.Clear{}, forget, func(*chain.State) error { return nil }); err != nil {
		t.Fatal(err)
	}
}

// copyV1 gives it on a store of its own.
func copyV1(t *testing.T) (*blob.Mem, string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "v1")
	if err := os.CopyFS(dir, os.DirFS(v1)); err != nil {
		t.Fatal(err)
	}
	from, err := blob.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	s := new(blob.Mem)
	for i, err := range from.List(ctx, "") {
		if err != nil {
			t.Fatal(err)
		}
		p, err := from.Get(ctx, i.Name, 0, -1)
		if err := errors.Join(err, s.Put(ctx, i.Name, p)); err != nil {
			t.Fatal(err)
		}
	}
	return s, dir
}

func TestVersion1(t *testing.T) {
	if _, err := os.Stat(v1); *update && os.IsNotExist(err) {
		makeV1(t)
	}
	store, dir := copyV1(t)
	pass := []byte("a small repository of version 1")
	r, err := Open(ctx, store, pass, Options{Cache: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	clean(t, r, true)
	points, err := r.Points(ctx)
	if err != nil || len(points) != len(v1Disks) {
		t.Fatalf("%d points, %v", len(points), err)
	}
	for i, p := range points {
		for _, d := range p.Disks {
			reader, err := r.OpenDisk(ctx, d)
			if err != nil {
				t.Fatal(err)
			}
			content := make([]byte, d.Size)
			if err := reader.ReadAt(ctx, content, 0); err != nil {
				t.Fatal(err)
			}
			if got := digest(content); got != v1Disks[i][d.ID] {
				t.Errorf("point %d, %s: %s, want %s", i, d.ID, got, v1Disks[i][d.ID])
			}
		}
		if xml, err := r.ReadFile(ctx, p.Files[0]); err != nil || len(p.Files) != 3 {
			t.Errorf("point %d: %q, %v", i, xml, err)
		}
	}
	// What this version writes beside it can be read too.
	if _, err := save(r, "web", []byte(strings.Repeat("more", 100)), nil, nil); err != nil {
		t.Fatal(err)
	}
	clean(t, r, true)

	needPython(t)
	to := t.TempDir()
	if _, err := pythonWith(t, string(pass), dir, "restore", string(points[1].ID), to); err != nil {
		t.Fatal(err)
	}
	for name, want := range v1Disks[1] {
		p, err := os.ReadFile(filepath.Join(to, name+".raw"))
		if got := digest(p); err != nil || got != want {
			t.Errorf("%s restored by the other reader: %s, %v, want %s", name, got, err, want)
		}
	}
}

func digest(p []byte) string {
	sum := sha256.Sum256(p)
	return hex.EncodeToString(sum[:])
}
