package repo

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/codec"
)

const pythonReader = "../../test/reader/holdfast_reader.py"

// python runs the reader that was written from docs/format.md alone.
func python(t *testing.T, dir string, args ...string) ([]byte, error) {
	t.Helper()
	return pythonWith(t, string(secret), dir, args...)
}

func pythonWith(t *testing.T, passphrase, dir string, args ...string) ([]byte, error) {
	t.Helper()
	c := exec.Command("/usr/bin/python3", append([]string{pythonReader, dir}, args...)...)
	c.Env = append(os.Environ(), "HOLDFAST_PASSPHRASE="+passphrase, "HOLDFAST_PASSPHRASE_FILE=", "PYTHONDONTWRITEBYTECODE=1")
	out, err := c.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		t.Logf("%s: %s", strings.Join(args, " "), exit.Stderr)
	}
	return out, err
}

func needPython(t *testing.T) {
	t.Helper()
	if err := exec.Command("/usr/bin/python3", "-c", "import argon2, cryptography, zstandard").Run(); err != nil {
		t.Skip("SKIPPED: the independent reader of the format was not run; apt install python3-cryptography python3-argon2 python3-zstandard")
	}
}

// saveDisks commits a point of several disks, each whole or, with a base, the
// chunks in changed.
func saveDisks(r *Repo, vm string, disks map[string][]byte, base *Point, changed map[string][]int) (*Point, error) {
	run, err := r.Begin(ctx, RandomID())
	if err != nil {
		return nil, err
	}
	p := &Point{VM: vm, History: "aa", Kind: "folder", Host: "/srv", Time: time.Now().UTC(), Consistency: "crash"}
	for name, content := range disks {
		var reader *DiskReader
		if base != nil {
			for _, d := range base.Disks {
				if d.ID == name {
					if reader, err = r.OpenDisk(ctx, d); err != nil {
						return nil, errors.Join(err, run.Close())
					}
				}
			}
		}
		size := int64(len(content))
		w, err := run.Disk(ctx, reader, size)
		if err == nil && reader == nil {
			err = w.WriteAt(ctx, content, 0)
		}
		for _, c := range changed[name] {
			off := c * ChunkSize
			err = errors.Join(err, w.WriteAt(ctx, content[off:min(len(content), off+ChunkSize)], int64(off)))
		}
		var root Root
		if err == nil {
			root, err = w.Finish(ctx)
		}
		if err != nil {
			return nil, errors.Join(err, run.Close())
		}
		p.Disks = append(p.Disks, Disk{ID: name, Size: size, Format: "raw", Root: root})
	}
	for name, text := range map[string]string{"domain.xml": "<domain>" + vm + "</domain>", "empty": "", "nvram": strings.Repeat("nvram ", 30000)} {
		f, err := run.PutFile(ctx, name, []byte(text))
		if err != nil {
			return nil, errors.Join(err, run.Close())
		}
		p.Files = append(p.Files, f)
	}
	return p, errors.Join(run.Commit(ctx, p), run.Close())
}

// What the program writes, docs/format.md describes: a reader that knows
// nothing else gives back each disk and file byte for byte.
func TestIndependentReader(t *testing.T) {
	long(t)
	needPython(t)
	rng := rng(t)
	dir := filepath.Join(t.TempDir(), "repo")
	store, err := blob.CreateDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	r := create(t, store)
	disks := map[string][]byte{
		"zeros": make([]byte, 3*ChunkSize+512),
		"noise": make([]byte, 9*ChunkSize+17),
		"text":  []byte(strings.Repeat("all work and no play ", 20000)),
		"wide":  make([]byte, 20<<20+4096), // two levels
		"none":  {},
	}
	fillRandom(rng, disks["noise"])
	copy(disks["wide"][18<<20-100:], disks["text"])
	first := clone(disks)
	points := map[PointID]map[string][]byte{}
	commit := func(vm string, base *Point, changed map[string][]int) *Point {
		t.Helper()
		p, err := saveDisks(r, vm, disks, base, changed)
		if err != nil {
			t.Fatal(err)
		}
		points[p.ID] = clone(disks)
		return p
	}
	a := commit("web", nil, nil)
	r.compressor = codec.Small
	fillRandom(rng, disks["noise"][2*ChunkSize:3*ChunkSize])
	copy(disks["text"][ChunkSize:], strings.Repeat("makes Jack a dull boy ", 3000))
	clear(disks["wide"][18<<20-ChunkSize : 18<<20])
	commit("web", a, map[string][]int{"noise": {2}, "text": {1, 2}, "wide": {18<<4 - 1}})
	gone := commit("old", nil, nil)
	forget := entrySealed{Points: []PointID{gone.ID}}
	if err := r.append(ctx, kindForget, entryClear{}, forget, func(*state) error { return nil }); err != nil {
		t.Fatal(err)
	}
	delete(points, gone.ID)

	all := func(what string, code error) {
		t.Helper()
		if _, err := python(t, dir, "verify", "--keyless"); (err == nil) != (code == nil) {
			t.Errorf("%s: verify --keyless: %v", what, err)
		}
		if _, err := python(t, dir, "verify"); (err == nil) != (code == nil) {
			t.Errorf("%s: verify: %v", what, err)
		}
		readsAlike(t, dir, points)
	}
	for i := range 3 { // small ones, to be merged
		fillRandom(rng, disks["noise"][i*ChunkSize:(i+1)*ChunkSize])
		commit("web", nil, nil)
	}
	all("sound", nil)
	if report := prune(t, r, unwatched); report.Merged == 0 {
		t.Errorf("nothing was merged: %+v", report)
	}
	all("merged", nil)

	// A damaged copy, known to the chain and stored anew, is read around; so
	// are lost index objects.
	disks = first
	damageFile(t, largestFile(t, filepath.Join(dir, "packs")), 200)
	if report, err := r.Check(ctx, CheckOptions{ReadData: true}); err != nil || report.Distrusted == 0 {
		t.Fatalf("check: %v, %+v", err, report)
	}
	commit("web", nil, nil)
	if err := os.RemoveAll(filepath.Join(dir, "index")); err != nil {
		t.Fatal(err)
	}
	all("damaged", errDamaged)
}

var errDamaged = errors.New("it is damaged")

// readsAlike compares what Python restores.
func readsAlike(t *testing.T, dir string, points map[PointID]map[string][]byte) {
	t.Helper()
	out, err := python(t, dir, "points")
	if err != nil {
		t.Fatal(err)
	}
	var listed []Point
	if err := json.Unmarshal(out, &listed); err != nil || len(listed) != len(points) {
		t.Fatalf("%d points listed, want %d; %v", len(listed), len(points), err)
	}
	for _, p := range listed {
		to := t.TempDir()
		if _, err := python(t, dir, "restore", string(p.ID), to); err != nil {
			t.Fatal(err)
		}
		for _, d := range p.Disks {
			got, err := os.ReadFile(filepath.Join(to, d.ID+".raw"))
			if err != nil || !bytes.Equal(got, points[p.ID][d.ID]) {
				t.Errorf("%s %s: %d bytes that differ from what was backed up, %v", p.VM, d.ID, len(got), err)
			}
		}
		got, err := os.ReadFile(filepath.Join(to, "domain.xml"))
		if want := "<domain>" + p.VM + "</domain>"; err != nil || string(got) != want {
			t.Errorf("domain.xml: %q, %v", got, err)
		}
	}
}

func clone(m map[string][]byte) map[string][]byte {
	c := map[string][]byte{}
	for k, v := range m {
		c[k] = bytes.Clone(v)
	}
	return c
}

func fillRandom(rng *rand.Rand, p []byte) {
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
}

func largestFile(t *testing.T, dir string) (path string) {
	t.Helper()
	var size int64
	err := filepath.Walk(dir, func(name string, fi os.FileInfo, err error) error {
		if err == nil && fi.Mode().IsRegular() && fi.Size() > size {
			path, size = name, fi.Size()
		}
		return err
	})
	if err != nil || path == "" {
		t.Fatal("no file", err)
	}
	return path
}

func damageFile(t *testing.T, path string, at int) {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	p[at] ^= 0x40
	if err := errors.Join(os.Chmod(path, 0o600), os.WriteFile(path, p, 0o600)); err != nil {
		t.Fatal(err)
	}
}
