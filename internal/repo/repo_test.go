package repo

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/disk"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/seal"
)

var ctx = context.Background()

var secret = []byte("correct horse")

func create(t *testing.T, s blob.Store) *Repo {
	t.Helper()
	cheap := seal.KDF{Name: "argon2id", Time: 1, Memory: 64, Threads: 1, Root: 1}
	r, err := initialize(ctx, s, secret, Options{Cache: t.TempDir()}, cheap)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func reopen(t *testing.T, s blob.Store) *Repo {
	t.Helper()
	r, err := Open(ctx, s, secret, Options{Cache: cacheDir(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// cacheDir is a directory in memory where that is to be had: many tests open a
// repository hundreds of times, and each cache is synced.
func cacheDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "holdfast-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// image makes content with zeros, repetitions and noise.
func image(rng *rand.Rand, size int) []byte {
	p := make([]byte, size)
	for off := 0; off < size; off += ChunkSize {
		c := p[off:min(size, off+ChunkSize)]
		switch rng.IntN(4) {
		case 0:
		case 1:
			copy(c, bytes.Repeat([]byte(fmt.Sprintf("text %d ", rng.IntN(5))), len(c)/7+1))
		default:
			noise(rng, c)
		}
	}
	return p
}

func noise(rng *rand.Rand, p []byte) {
	n := rng.IntN(len(p) + 1)
	for i := range p[:n] {
		p[i] = byte(rng.Uint32())
	}
}

// save commits a point of one disk. With base only changed chunks are written.
func save(r *Repo, vm string, content []byte, base *Point, changed []int) (*Point, error) {
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		return nil, err
	}
	p, err := saveIn(run, vm, content, base, changed)
	return p, errors.Join(err, run.Close())
}

func saveIn(run *Run, vm string, content []byte, base *Point, changed []int) (*Point, error) {
	var reader *DiskReader
	var err error
	if base != nil {
		if reader, err = run.r.OpenDisk(ctx, base.Disks[0]); err != nil {
			return nil, err
		}
	}
	size := int64(len(content))
	w, err := run.Disk(ctx, reader, size)
	if err != nil {
		return nil, err
	}
	if base == nil {
		err = w.WriteAt(ctx, content, 0)
	} else {
		for _, c := range changed {
			off := c * ChunkSize
			err = errors.Join(err, w.WriteAt(ctx, content[off:min(len(content), off+ChunkSize)], int64(off)))
		}
	}
	if err != nil {
		return nil, err
	}
	root, err := w.Finish(ctx)
	if err != nil {
		return nil, err
	}
	f, err := run.PutFile(ctx, "domain.xml", []byte("<domain>"+vm+"</domain>"))
	if err != nil {
		return nil, err
	}
	p := &Point{VM: vm, History: "aa", Time: time.Now().UTC(), Disks: []Disk{{ID: "vda", Size: size, Root: root}}, Files: []File{f}}
	if err := run.Commit(ctx, p); err != nil {
		return nil, err
	}
	return p, nil
}

// equal fails unless the point reads as content, in reads of several sizes,
// and its extents tell the truth.
func equal(t *testing.T, r *Repo, p *Point, content []byte) {
	t.Helper()
	if err := differs(r, p, content); err != nil {
		t.Fatal(err)
	}
}

func differs(r *Repo, p *Point, content []byte) error {
	d, err := r.OpenDisk(ctx, p.Disks[0])
	if err != nil {
		return err
	}
	defer d.Close()
	got := make([]byte, len(content))
	for i := range got {
		got[i] = 0xEE
	}
	if err := d.ReadAt(ctx, got, 0); err != nil {
		return err
	}
	if i := firstDifference(got, content); i >= 0 {
		return fmt.Errorf("%s: byte %d (chunk %d) differs", p.ID, i, i/ChunkSize)
	}
	rng := rand.New(rand.NewPCG(7, uint64(len(content))))
	for range 20 {
		off := rng.IntN(len(content))
		n := 1 + rng.IntN(min(len(content)-off, 3*ChunkSize))
		if err := d.ReadAt(ctx, got[:n], int64(off)); err != nil {
			return err
		}
		if !bytes.Equal(got[:n], content[off:off+n]) {
			return fmt.Errorf("%s: read [%d, +%d) differs", p.ID, off, n)
		}
		n = min(n, ChunkSize)
		clear(got[:n])
		if !d.ReadCached(got[:n], int64(off)) || !bytes.Equal(got[:n], content[off:off+n]) {
			return fmt.Errorf("%s: cached read [%d, +%d) differs", p.ID, off, n)
		}
	}
	at := int64(0)
	for e, err := range d.Extents(ctx, 0, d.Size()) {
		if err != nil {
			return err
		}
		if e.Off != at || e.Len <= 0 {
			return fmt.Errorf("extent %+v after %d", e, at)
		}
		at = e.End()
		if e.Zero && !disk.IsZero(content[e.Off:e.End()]) {
			return fmt.Errorf("extent %+v is not zero", e)
		}
	}
	if at != d.Size() {
		return fmt.Errorf("extents end at %d of %d", at, d.Size())
	}
	fed := disk.NewMem(d.Size())
	window := int64(1+rng.IntN(8)) * ChunkSize
	if err := d.Feed(ctx, d.Extents(ctx, 0, d.Size()), window, 3, fed.WriteAt); err != nil {
		return err
	}
	if err := fed.ReadAt(ctx, got, 0); err != nil {
		return err
	}
	if i := firstDifference(got, content); i >= 0 {
		return fmt.Errorf("%s: fed, byte %d (chunk %d) differs", p.ID, i, i/ChunkSize)
	}
	xml, err := r.ReadFile(ctx, p.Files[0])
	if err != nil || string(xml) != "<domain>"+p.VM+"</domain>" {
		return fmt.Errorf("file: %q, %w", xml, err)
	}
	return nil
}

func firstDifference(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

func rng(t *testing.T) *rand.Rand {
	s := uint64(time.Now().UnixNano())
	if v := os.Getenv("HOLDFAST_SEED"); v != "" {
		fmt.Sscan(v, &s)
	}
	t.Logf("HOLDFAST_SEED=%d", s)
	return rand.New(rand.NewPCG(s, 1))
}

func clean(t *testing.T, r *Repo, readData bool) {
	t.Helper()
	report, err := r.Check(ctx, CheckOptions{ReadData: readData})
	if err != nil || len(report.Problems) > 0 {
		t.Fatalf("check: %v, %+v", err, report)
	}
}

func TestHistory(t *testing.T) {
	rng := rng(t)
	store, err := blob.CreateDir(filepath.Join(t.TempDir(), "repo"))
	if err != nil {
		t.Fatal(err)
	}
	r := create(t, store)
	type saved struct {
		p       *Point
		content []byte
	}
	var all []saved
	last := map[string]saved{}
	for i := range 25 {
		vm := fmt.Sprint("vm", rng.IntN(3))
		old, ok := last[vm]
		var s saved
		if !ok || rng.IntN(5) == 0 {
			s.content = image(rng, 1+rng.IntN(60*ChunkSize))
			s.p, err = save(r, vm, s.content, nil, nil)
		} else {
			s.content = slices.Clone(old.content)
			var changed []int
			for range rng.IntN(8) {
				c := rng.IntN((len(s.content) + ChunkSize - 1) / ChunkSize)
				piece := s.content[c*ChunkSize : min(len(s.content), (c+1)*ChunkSize)]
				clear(piece)
				if rng.IntN(3) > 0 {
					noise(rng, piece)
				}
				changed = append(changed, c)
			}
			s.p, err = save(r, vm, s.content, old.p, changed)
		}
		if err != nil {
			t.Fatal(err)
		}
		last[vm], all = s, append(all, s)
		if i%8 == 7 {
			r = reopen(t, store)
		}
	}
	r = reopen(t, store)
	points, err := r.Points(ctx)
	if err != nil || len(points) != len(all) {
		t.Fatalf("%d points, want %d; %v", len(points), len(all), err)
	}
	for i, s := range all {
		if points[i].ID != s.p.ID {
			t.Fatalf("point %d is %s, want %s", i, points[i].ID, s.p.ID)
		}
		equal(t, r, &points[i], s.content)
	}
	clean(t, r, true)
	names, _ := blob.Names(ctx, store, "leases/")
	if len(names) > 0 {
		t.Errorf("left behind: %v", names)
	}
}

// What is there already is not stored again: within a disk, across VMs,
// across runs and machines.
func TestDedupe(t *testing.T) {
	rng := rng(t)
	store := new(blob.Mem)
	r := create(t, store)
	content := make([]byte, 40*ChunkSize)
	for i := range content {
		content[i] = byte(rng.Uint32())
	}
	copy(content[20*ChunkSize:], content[:20*ChunkSize])
	p, err := save(r, "a", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	xml := int64(ChunkSize)
	if p.NewBytes != 20*ChunkSize+xml {
		t.Errorf("new %d", p.NewBytes)
	}
	p, err = save(reopen(t, store), "b", content, nil, nil)
	if err != nil || p.NewBytes != xml || p.StoredBytes > 4096 {
		t.Errorf("second VM: new %d, stored %d, %v", p.NewBytes, p.StoredBytes, err)
	}
}

func TestResize(t *testing.T) {
	rng := rng(t)
	r := create(t, new(blob.Mem))
	content := image(rng, 10*ChunkSize+100)
	for i := range content {
		content[i] |= 1
	}
	base, err := save(r, "a", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{300*ChunkSize + 5, 5*ChunkSize + 77, 3 * ChunkSize, 3} {
		resized := make([]byte, size)
		copy(resized, content)
		p, err := save(r, "a", resized, base, nil)
		if err != nil {
			t.Fatal(err)
		}
		equal(t, r, p, resized)
		// Grown again, what was cut off must not come back.
		grown := make([]byte, 11*ChunkSize)
		copy(grown, resized)
		if len(resized) < len(grown) {
			if p, err = save(r, "a", grown, p, nil); err != nil {
				t.Fatal(err)
			}
			equal(t, r, p, grown)
		}
	}
}

func TestMatches(t *testing.T) {
	rng := rng(t)
	r := create(t, new(blob.Mem))
	content := image(rng, 10*ChunkSize+100)
	p, err := save(r, "a", content, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	d, err := r.OpenDisk(ctx, p.Disks[0])
	if err != nil {
		t.Fatal(err)
	}
	for off := 0; off < len(content); off += ChunkSize {
		c := slices.Clone(content[off:min(len(content), off+ChunkSize)])
		if ok, err := d.Matches(ctx, c, int64(off)); !ok || err != nil {
			t.Fatalf("chunk at %d: %v, %v", off, ok, err)
		}
		c[rng.IntN(len(c))] ^= 1
		if ok, err := d.Matches(ctx, c, int64(off)); ok || err != nil {
			t.Fatalf("changed chunk at %d: %v, %v", off, ok, err)
		}
	}
}

// Many writers at once, on one Repo and on two, all commit.
func TestWriters(t *testing.T) {
	store := new(blob.Mem)
	repos := []*Repo{create(t, store), reopen(t, store)}
	var wg sync.WaitGroup
	var mu sync.Mutex
	contents := map[PointID][]byte{}
	for i := range 8 {
		wg.Go(func() {
			content := image(rand.New(rand.NewPCG(uint64(i/2), 1)), 30*ChunkSize)
			p, err := save(repos[i%2], fmt.Sprint("vm", i), content, nil, nil)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			contents[p.ID] = content
		})
	}
	wg.Wait()
	r := reopen(t, store)
	points, err := r.Points(ctx)
	if err != nil || len(points) != 8 {
		t.Fatalf("%d points, %v", len(points), err)
	}
	for _, p := range points {
		equal(t, r, &p, contents[p.ID])
	}
	clean(t, r, true)
}

// The power goes at every call to the store in turn, before or after the call
// did its work. Every committed point must be whole afterwards, and the next
// run must work.
func TestPowerLoss(t *testing.T) {
	long(t)
	rng := rand.New(rand.NewPCG(3, 4))
	first, second := image(rng, 12*ChunkSize), image(rng, 12*ChunkSize)
	copy(second, first[:5*ChunkSize])
	base := new(blob.Mem)
	create(t, base)
	p1, err := save(reopen(t, base), "a", first, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	scenario := func(s blob.Store) (committed map[PointID][]byte) {
		committed = map[PointID][]byte{p1.ID: first}
		r, err := Open(ctx, s, secret, Options{Cache: t.TempDir()})
		if err != nil {
			return committed
		}
		defer r.Close()
		run, err := r.Begin(ctx, RandomID())
		if err != nil {
			return committed
		}
		defer run.Close()
		if p, err := saveIn(run, "b", second, nil, nil); err == nil {
			committed[p.ID] = second
		}
		return committed
	}
	probe := &blobtest.Faulty{Inner: base.Clone()}
	if len(scenario(probe)) != 2 {
		t.Fatal("the scenario fails without a fault")
	}
	for at := 1; at <= probe.Calls(); at++ {
		for _, fault := range []blobtest.Fault{blobtest.Before, blobtest.After} {
			store := base.Clone()
			committed := scenario(&blobtest.Faulty{Inner: store, At: at, Fault: fault, Cut: true})
			r := reopen(t, store)
			points, err := r.Points(ctx)
			if err != nil || len(points) < len(committed) {
				t.Fatalf("cut at call %d/%d: %d points, %d were committed; %v", at, fault, len(points), len(committed), err)
			}
			for _, p := range points {
				want := second
				if p.ID == p1.ID {
					want = first
				}
				if err := differs(r, &p, want); err != nil {
					t.Fatalf("cut at call %d/%d: %v", at, fault, err)
				}
			}
			p, err := save(r, "c", second, nil, nil)
			if err != nil {
				t.Fatalf("cut at call %d/%d: next run: %v", at, fault, err)
			}
			equal(t, r, p, second)
			clean(t, r, true)
		}
	}
	t.Logf("%d calls, two ways each", probe.Calls())
}

// A store that fails one call and works again gives an error or a point, never
// a wrong one.
func TestOneFault(t *testing.T) {
	content := image(rand.New(rand.NewPCG(3, 4)), 12*ChunkSize)
	base := new(blob.Mem)
	create(t, base)
	for at := 1; ; at++ {
		for _, fault := range []blobtest.Fault{blobtest.Before, blobtest.After} {
			store := &blobtest.Faulty{Inner: base.Clone(), At: at, Fault: fault}
			r, err := Open(ctx, store, secret, Options{Cache: t.TempDir()})
			if err != nil {
				continue
			}
			run, err := r.Begin(ctx, RandomID())
			if err == nil {
				var p *Point
				if p, err = saveIn(run, "a", content, nil, nil); err == nil {
					equal(t, reopen(t, store.Inner), p, content)
				}
				run.Close()
			}
			clean(t, reopen(t, store.Inner), true)
			r.Close()
			if store.Calls() < at {
				return
			}
		}
	}
}

func TestOpenErrors(t *testing.T) {
	long(t)
	store := new(blob.Mem)
	r, err := Init(ctx, store, secret, Options{Cache: t.TempDir()}) // with the real derivation once
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := save(r, "a", image(rng(t), 3*ChunkSize), nil, nil); err != nil {
		t.Fatal(err)
	}
	open := func(s blob.Store, pass string) error {
		r, err := Open(ctx, s, []byte(pass), Options{Cache: t.TempDir()})
		if err == nil {
			r.Close()
		}
		return err
	}
	change := func(prefix string, f func([]byte) []byte) *blob.Mem {
		c := store.Clone()
		names, _ := blob.Names(ctx, c, prefix)
		c.Damage(names[0], f)
		return c
	}
	without := func(prefix string) *blob.Mem {
		c := store.Clone()
		names, _ := blob.Names(ctx, c, prefix)
		c.Delete(ctx, names[0])
		return c
	}
	newer := func(p []byte) []byte {
		// A newer program writes a right checksum too.
		h := slices.Clone(p)
		h[4] = 2
		clear(h[12:16])
		binary.LittleEndian.PutUint32(h[12:], seal.Checksum(h[:64]))
		return h
	}
	for _, c := range []struct {
		what  string
		store blob.Store
		pass  string
		want  error
	}{
		{"right", store, string(secret), nil},
		{"wrong passphrase", store, "correct donkey", ErrPassphrase},
		{"empty store", new(blob.Mem), string(secret), ErrNotRepository},
		{"something else", change("config", func([]byte) []byte { return []byte("[core]") }), string(secret), ErrNotRepository},
		{"newer config", change("config", newer), string(secret), ErrVersion},
		{"newer entry", change("chain/", newer), string(secret), ErrVersion},
		{"no keys", without("keys/"), string(secret), ErrDamaged},
		{"no keyring", without("keyring/"), string(secret), ErrDamaged},
	} {
		if err := open(c.store, c.pass); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.what, err, c.want)
		}
	}
	if _, err := Init(ctx, store, secret, Options{Cache: t.TempDir()}); !errors.Is(err, ErrExist) {
		t.Errorf("second init: %v", err)
	}
	for _, prefix := range []string{"config", "keyring/"} {
		for bit := range 40 {
			c := change(prefix, func(p []byte) []byte { p[bit*(len(p)-1)/39] ^= 0x10; return p })
			if err := open(c, string(secret)); err == nil {
				t.Errorf("%s: damage at %d/39 opens", prefix, bit)
			}
		}
	}
}

// A revoked lease cannot commit, and commits nothing.
func TestRevoked(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	other := reopen(t, store)
	if err := other.append(ctx, chain.Revoke, chain.Clear{Lease: run.lease}, chain.Sealed{}, func(*chain.State) error { return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := saveIn(run, "a", image(rng(t), 3*ChunkSize), nil, nil); !errors.Is(err, ErrRevoked) {
		t.Fatalf("commit after revocation: %v", err)
	}
	run.Close()
	if points, _ := reopen(t, store).Points(ctx); len(points) > 0 {
		t.Fatal("the point is there")
	}
}

func TestPin(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	p, err := save(r, "a", image(rng(t), ChunkSize), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	session := RandomID()
	for range 2 {
		if err := r.Pin(ctx, session, p.ID); err != nil {
			t.Fatal(err)
		}
	}
	if pins, err := r.Pins(ctx); err != nil || !slices.Equal(pins[p.ID], []string{session}) {
		t.Fatalf("pins %v, %v", pins, err)
	}
	if err := r.Pin(ctx, session, PointID(RandomID())); !errors.Is(err, ErrNotExist) {
		t.Fatalf("pin of nothing: %v", err)
	}
	for range 2 {
		if err := r.Unpin(ctx, session); err != nil {
			t.Fatal(err)
		}
	}
	if pins, _ := r.Pins(ctx); len(pins) > 0 {
		t.Fatalf("pins %v", pins)
	}
}

// An unfinished run's work serves the next one.
func TestUnfinished(t *testing.T) {
	content := image(rng(t), 20*ChunkSize)
	store := new(blob.Mem)
	r := create(t, store)
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		t.Fatal(err)
	}
	w, _ := run.Disk(ctx, nil, int64(len(content)))
	if err := w.WriteAt(ctx, content, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(ctx); err != nil {
		t.Fatal(err)
	}
	if err := run.Close(); err != nil {
		t.Fatal(err)
	}
	p, err := save(reopen(t, store), "a", content, nil, nil)
	if err != nil || p.NewBytes != ChunkSize { // the XML
		t.Fatalf("new %d, %v", p.NewBytes, err)
	}
}

// No name and no content shows in what is stored.
func TestNothingInClear(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "repo")
	store, err := blob.CreateDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	content := bytes.Repeat([]byte("very secret payroll "), 20000)
	if _, err := save(create(t, store), "payroll-server", content, nil, nil); err != nil {
		t.Fatal(err)
	}
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		p, err := os.ReadFile(path)
		if strings.Contains(string(p), "payroll") {
			t.Errorf("%s holds it in clear", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
