package blob

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
)

// weakDisk is a filesystem that keeps no more than it must when the power
// goes. It records what is done to it; states then gives what may be found
// after a crash:
//   - a file's content is there when the file was synced after it was written;
//     before that it may be whole, half, empty, or zeros.
//   - a name made or removed is as it is now when its directory was synced
//     since; before that each may have happened or not, whatever came after.
//     A directory that is not there hides all below it.
type weakDisk struct {
	unnamed bool // it has nameless files

	mu    sync.Mutex
	ops   []diskOp
	names map[string]int // files by path, -1 for a directory
	files int
	fail  int // number of the operation that fails, from 1
}

type diskOp struct {
	what string // write, sync, link, remove, mkdir, syncdir
	file int
	path string
	data []byte
	put  string // of a return: the object
}

var errDisk = errors.New("the disk fails")

func newWeakDisk(unnamed bool) *weakDisk {
	return &weakDisk{unnamed: unnamed, names: map[string]int{"/": -1, "/repo": -1}}
}

// do records an operation, unless it is the one that fails.
func (w *weakDisk) do(o diskOp) error {
	w.ops = append(w.ops, o)
	if len(w.ops) == w.fail {
		w.ops[len(w.ops)-1] = diskOp{what: "failed " + o.what}
		return errDisk
	}
	return nil
}

// others lets other writers go on first.
func (w *weakDisk) others() {
	for range rand.IntN(30) {
		runtime.Gosched()
	}
}

func (w *weakDisk) returned(name string, data []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ops = append(w.ops, diskOp{what: "return", put: name, data: data})
}

func (w *weakDisk) nameless(dir string) (newFile, error) {
	if !w.unnamed {
		return nil, errNameless
	}
	return w.open(dir)
}

func (w *weakDisk) named(dir string) (newFile, error) {
	f, err := w.open(dir)
	if err != nil {
		return nil, err
	}
	f.tmp = path.Join(dir, fmt.Sprint(tmpPrefix, f.id))
	return f, f.link(f.tmp)
}

func (w *weakDisk) open(dir string) (*weakFile, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.names[dir]; !ok {
		return nil, fs.ErrNotExist
	}
	w.files++
	return &weakFile{w: w, id: w.files}, nil
}

func (w *weakDisk) mkdir(dir string) error { return w.name("mkdir", dir, -1) }

func (w *weakDisk) name(what, p string, file int) error {
	w.others()
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.names[path.Dir(p)]; !ok {
		return fs.ErrNotExist
	}
	if _, ok := w.names[p]; ok {
		return fs.ErrExist
	}
	if err := w.do(diskOp{what: what, path: p, file: file}); err != nil {
		return err
	}
	w.names[p] = file
	return nil
}

func (w *weakDisk) remove(p string) error {
	w.others()
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.names[p]; !ok {
		return fs.ErrNotExist
	}
	if err := w.do(diskOp{what: "remove", path: p}); err != nil {
		return err
	}
	delete(w.names, p)
	return nil
}

func (w *weakDisk) syncDir(dir string) error {
	w.others()
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.do(diskOp{what: "syncdir", path: dir})
}

type weakFile struct {
	w   *weakDisk
	id  int
	tmp string
}

func (f *weakFile) Write(p []byte) (int, error) {
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	if err := f.w.do(diskOp{what: "write", file: f.id, data: bytes.Clone(p)}); err != nil {
		return len(p) / 2, err
	}
	return len(p), nil
}

func (f *weakFile) Sync() error {
	f.w.others()
	f.w.mu.Lock()
	defer f.w.mu.Unlock()
	return f.w.do(diskOp{what: "sync", file: f.id})
}

func (f *weakFile) link(p string) error { return f.w.name("link", p, f.id) }

func (f *weakFile) Close() error {
	if f.tmp == "" {
		return nil
	}
	return f.w.remove(f.tmp)
}

// states yields what may be found when the power goes after n operations: all
// of it, or where that is too much, some of it at random.
func (w *weakDisk) states(rng *rand.Rand, n int, yield func(objects map[string][]byte)) (count int) {
	var names []diskOp          // in order
	loose := map[int]bool{}     // of names, by place: not synced
	content := map[int]int{}    // of files: the write
	synced := map[int]bool{}    // files
	inDir := map[string][]int{} // places of loose names by directory
	for i, o := range w.ops[:n] {
		switch o.what {
		case "write":
			content[o.file], synced[o.file] = i, false
		case "sync":
			synced[o.file] = true
		case "link", "remove", "mkdir":
			loose[len(names)] = true
			dir := path.Dir(o.path)
			inDir[dir] = append(inDir[dir], len(names))
			names = append(names, o)
		case "syncdir":
			for _, k := range inDir[o.path] {
				delete(loose, k)
			}
			inDir[o.path] = nil
		}
	}
	var wet []int // files that may be anything
	for file := range content {
		if !synced[file] {
			wet = append(wet, file)
		}
	}
	slices.Sort(wet)
	choices := slices.Sorted(maps.Keys(loose))
	total := 1 << len(choices)
	for range wet {
		total *= 4
	}
	picks := total
	if total > 512 {
		picks = 200
	}
	for pick := range picks {
		if total > picks {
			pick = rng.IntN(total)
		}
		lost := map[int]bool{}
		for b, k := range choices {
			lost[k] = pick>>b&1 == 0
		}
		pick >>= len(choices)
		shape := map[int]int{}
		for _, f := range wet {
			shape[f] = pick % 4
			pick /= 4
		}
		there := map[string]int{"/": -1, "/repo": -1}
		for k, o := range names {
			switch {
			case lost[k]:
			case o.what == "remove":
				delete(there, o.path)
			default:
				there[o.path] = o.file
			}
		}
		yield(w.look(there, content, shape))
	}
	return picks
}

// look gives the objects that a Dir would list.
func (w *weakDisk) look(there map[string]int, content, shape map[int]int) map[string][]byte {
	objects := map[string][]byte{}
	for p, file := range there {
		whole := file >= 0 && !strings.HasPrefix(path.Base(p), tmpPrefix)
		for dir := path.Dir(p); dir != "/"; dir = path.Dir(dir) {
			at, ok := there[dir]
			whole = whole && ok && at == -1
		}
		if !whole {
			continue
		}
		data := bytes.Clone(w.ops[content[file]].data)
		switch shape[file] {
		case 1:
			data = data[:len(data)/2]
		case 2:
			data = nil
		case 3:
			clear(data)
		}
		objects[strings.TrimPrefix(p, "/repo/")] = data
	}
	return objects
}

func object(name string) []byte { return bytes.Repeat([]byte(name), 10) }

// Several writers put and delete. Whatever of what was not synced survives a
// loss of power at any step: each object is whole or not there, each whose Put
// returned is there, and each whose Delete returned is not.
func TestDirPowerLoss(t *testing.T) {
	rng := seeded(t)
	for _, unnamed := range []bool{true, false} {
		w := newWeakDisk(unnamed)
		open := func() *Dir { return &Dir{root: "/repo", fs: w, made: map[string]bool{"/repo": true}} }
		var wg sync.WaitGroup
		for i, d := range []*Dir{open(), open(), open()} { // three processes
			wg.Go(func() {
				for n := range 4 {
					name := fmt.Sprintf("packs/%d/%d-%d", n%2, i, n)
					if err := d.Put(context.Background(), name, object(name)); err != nil {
						t.Error(err)
						return
					}
					w.returned(name, object(name))
				}
				chain := "chain/1" // all want it
				if err := d.Put(context.Background(), chain, object(chain)); err == nil {
					w.returned(chain, object(chain))
				} else if !errors.Is(err, ErrExist) {
					t.Error(err)
				}
				lease := fmt.Sprintf("leases/%d", i)
				if err := d.Put(context.Background(), lease, object(lease)); err != nil {
					t.Error(err)
				}
				w.returned(lease, object(lease))
				if err := d.Delete(context.Background(), lease); err != nil {
					t.Error(err)
				}
				w.returned(lease, nil)
			})
		}
		wg.Wait()
		tried := 0
		for n := range len(w.ops) + 1 {
			must, mustNot := map[string]bool{}, map[string]bool{}
			for _, o := range w.ops[:n] {
				if o.what == "return" {
					must[o.put], mustNot[o.put] = o.data != nil, o.data == nil
				}
			}
			tried += w.states(rng, n, func(objects map[string][]byte) {
				for name, data := range objects {
					if !bytes.Equal(data, object(name)) {
						t.Fatalf("power lost after %d operations: %s is there with %d bytes %q", n, name, len(data), data)
					}
					if mustNot[name] {
						t.Fatalf("power lost after %d operations: %s, deleted, is there again", n, name)
					}
				}
				for name, m := range must {
					// The lease's Delete may have begun.
					if m && objects[name] == nil && !strings.HasPrefix(name, "leases/") {
						t.Fatalf("power lost after %d operations: %s, stored, is gone", n, name)
					}
				}
			})
		}
		t.Logf("%d operations, %d states", len(w.ops), tried)
	}
}

// A Put that meets an error of any kind says so, never tries to sync again what
// could not be synced, and never names what is not durable.
func TestLesson14FailedSync(t *testing.T) {
	rng := seeded(t)
	for _, unnamed := range []bool{true, false} {
		for fail := 1; ; fail++ {
			w := newWeakDisk(unnamed)
			w.fail = fail
			d := &Dir{root: "/repo", fs: w, made: map[string]bool{"/repo": true}}
			err := d.Put(context.Background(), "packs/a", object("packs/a"))
			if len(w.ops) < fail {
				break
			}
			failed := w.ops[fail-1].what
			if err == nil {
				t.Errorf("%s: no error", failed)
			}
			if failed == "failed syncdir" && w.names["/repo/packs/a"] != 0 && !errors.Is(err, ErrUnsynced) {
				t.Errorf("%s: %v", failed, err)
			}
			for _, o := range w.ops[fail:] {
				if o.what == "sync" || o.what == "syncdir" || o.what == "link" {
					t.Errorf("after a %s: %s", failed, o.what)
				}
			}
			w.states(rng, len(w.ops), func(objects map[string][]byte) {
				if data, ok := objects["packs/a"]; ok && !bytes.Equal(data, object("packs/a")) {
					t.Errorf("after a %s: packs/a is there with %q", failed, data)
				}
			})
		}
	}
}

// A store that was made under several new directories is there when CreateDir
// has returned.
func TestMakeAllPowerLoss(t *testing.T) {
	w := newWeakDisk(true)
	if err := makeAll(w, "/repo/a/b/c"); err != nil {
		t.Fatal(err)
	}
	d := &Dir{root: "/repo/a/b/c", fs: w, made: map[string]bool{"/repo/a/b/c": true}}
	if err := d.Put(context.Background(), "config", object("a/b/c/config")); err != nil {
		t.Fatal(err)
	}
	w.states(seeded(t), len(w.ops), func(objects map[string][]byte) {
		if objects["a/b/c/config"] == nil {
			t.Error("the store is gone")
		}
	})
}
