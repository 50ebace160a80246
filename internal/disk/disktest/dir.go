package disktest

import (
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
)

// Dir is a directory of files in memory that can lose power. It records every
// change and every sync; Crashes then rebuilds the states in which a real disk
// could be found after a crash at any step, and Killed the state after the
// death of the process alone.
//
// The model is the weakest that filesystems in use give:
//   - what a file's Sync covered is there. Of its later changes any part may be
//     there, in any combination, in sectors of 512 bytes, whatever their order;
//     its length may be any it had since.
//   - names created, renamed and removed before the directory's Sync are there.
//     Of later ones any number may be there, in order (a journal). A rename is
//     never half done. Syncing a file does not make its name durable.
//
// All methods may run in parallel.
type Dir struct {
	mu    sync.Mutex // guards all below, and the files
	first tree       // the state at birth
	ops   []op       // since then
	names map[string]*node
	nodes int // ids given so far
	limit int64
	fails map[int]error // by number of the operation
}

// tree is a state of the medium.
type tree struct {
	names map[string]int // to node ids
	files map[int][]byte // contents by node id
}

type node struct {
	id    int
	data  []byte
	pages map[int64]bool // 4 KiB pages that hold storage
}

type opKind int

const (
	opWrite opKind = iota
	opPunch
	opTruncate
	opSync
	opCreate // dir operations from here on
	opRename
	opRemove
	opSyncDir
)

type op struct {
	kind     opKind
	node     int
	off, n   int64 // truncate: n is the length
	data     []byte
	name, to string
}

const (
	sector = 512
	page   = 4096
)

// NewDir returns an empty directory.
func NewDir() *Dir { return newDir(tree{}) }

func newDir(first tree) *Dir {
	d := &Dir{first: first, names: map[string]*node{}, fails: map[int]error{}}
	byID := map[int]*node{}
	for id, data := range first.files {
		n := &node{id: id, data: slices.Clone(data), pages: map[int64]bool{}}
		for i := range (int64(len(data)) + page - 1) / page {
			n.pages[i] = true
		}
		byID[id] = n
		d.nodes = max(d.nodes, id+1)
	}
	for name, id := range first.names {
		d.names[name] = byID[id]
	}
	return d
}

// Len is how many changes and syncs there have been: the steps at which a
// crash can come.
func (d *Dir) Len() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.ops)
}

// Fail makes the n-th change or sync from now fail with err, n from 1. A
// failing write has written its first half, in sectors if it was in sectors;
// anything else has done nothing.
func (d *Dir) Fail(n int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fails[len(d.ops)+n-1] = err
}

// half of a write's length; of whole sectors it takes whole sectors.
func half(off int64, n int) int {
	if off%sector == 0 && n%sector == 0 {
		return n / 2 / sector * sector
	}
	return n / 2
}

// Limit sets how many bytes may be allocated, in pages of 4 KiB; 0 no limit.
// A write that does not fit writes what does and fails with ENOSPC.
func (d *Dir) Limit(bytes int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.limit = bytes
}

// Used is how many bytes are allocated.
func (d *Dir) Used() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.used()
}

func (d *Dir) used() int64 {
	var sum int64
	for _, n := range d.names {
		sum += int64(len(n.pages)) * page
	}
	return sum
}

// record notes an operation, or returns the error set for it; then it has
// recorded a sync of nothing so that the numbers go on. The caller holds mu.
func (d *Dir) record(o op) error {
	if err := d.fails[len(d.ops)]; err != nil {
		d.ops = append(d.ops, op{kind: opSync, node: -1})
		return err
	}
	d.ops = append(d.ops, o)
	return nil
}

// Create makes an empty file, in the place of one of that name if there is
// one.
func (d *Dir) Create(name string) (*DirFile, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := &node{id: d.nodes, pages: map[int64]bool{}}
	if err := d.record(op{kind: opCreate, node: n.id, name: name}); err != nil {
		return nil, err
	}
	d.nodes++
	d.names[name] = n
	return &DirFile{d, n}, nil
}

// Open opens a file for reading and writing.
func (d *Dir) Open(name string) (*DirFile, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.names[name]
	if n == nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return &DirFile{d, n}, nil
}

// Rename gives a file another name, replacing what had it.
func (d *Dir) Rename(from, to string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.names[from]
	if n == nil {
		return &fs.PathError{Op: "rename", Path: from, Err: fs.ErrNotExist}
	}
	if err := d.record(op{kind: opRename, name: from, to: to}); err != nil {
		return err
	}
	delete(d.names, from)
	d.names[to] = n
	return nil
}

// Remove removes a name.
func (d *Dir) Remove(name string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.names[name] == nil {
		return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrNotExist}
	}
	if err := d.record(op{kind: opRemove, name: name}); err != nil {
		return err
	}
	delete(d.names, name)
	return nil
}

// Sync makes the names durable.
func (d *Dir) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.record(op{kind: opSyncDir})
}

// DirFile is an open file of a Dir.
type DirFile struct {
	d *Dir
	n *node
}

// Close does nothing; it does not sync.
func (f *DirFile) Close() error { return nil }

// Size is the file's length.
func (f *DirFile) Size() (int64, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return int64(len(f.n.data)), nil
}

// ReadAt is that of io.ReaderAt.
func (f *DirFile) ReadAt(p []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if off >= int64(len(f.n.data)) {
		return 0, io.EOF
	}
	n := copy(p, f.n.data[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt is that of io.WriterAt.
func (f *DirFile) WriteAt(p []byte, off int64) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	fit := f.allocate(p, off)
	var err error
	if fit < len(p) {
		err = &fs.PathError{Op: "write", Err: syscall.ENOSPC}
	} else if err = f.d.fails[len(f.d.ops)]; err != nil {
		fit = half(off, fit)
		delete(f.d.fails, len(f.d.ops))
	}
	o := op{kind: opWrite, node: f.n.id, off: off, n: int64(fit), data: slices.Clone(p[:fit])}
	f.d.ops = append(f.d.ops, o)
	f.n.data = o.apply(f.n.data)
	return fit, err
}

// allocate takes pages for a write and returns how many of its bytes fit.
func (f *DirFile) allocate(p []byte, off int64) int {
	free := int64(1) << 62
	if f.d.limit > 0 {
		free = f.d.limit - f.d.used()
	}
	for at := off; at < off+int64(len(p)); at = at - at%page + page {
		if f.n.pages[at/page] {
			continue
		}
		if free < page {
			return int(at - off)
		}
		free -= page
		f.n.pages[at/page] = true
	}
	return len(p)
}

// Punch makes a range read as zeros and gives its whole pages back.
func (f *DirFile) Punch(off, n int64) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	o := op{kind: opPunch, node: f.n.id, off: off, n: n}
	if err := f.d.record(o); err != nil {
		return err
	}
	f.n.data = o.apply(f.n.data)
	for i := (off + page - 1) / page; (i+1)*page <= off+n; i++ {
		delete(f.n.pages, i)
	}
	return nil
}

// Truncate sets the file's length.
func (f *DirFile) Truncate(size int64) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	o := op{kind: opTruncate, node: f.n.id, n: size}
	if err := f.d.record(o); err != nil {
		return err
	}
	f.n.data = o.apply(f.n.data)
	for i := range f.n.pages {
		if i*page >= size {
			delete(f.n.pages, i)
		}
	}
	return nil
}

// Sync makes the file's content and length durable, not its name.
func (f *DirFile) Sync() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.d.record(op{kind: opSync, node: f.n.id})
}

// apply does a file operation to a content.
func (o op) apply(b []byte) []byte {
	switch o.kind {
	case opWrite:
		if need := o.off + o.n; need > int64(len(b)) && o.n > 0 {
			b = append(b, make([]byte, need-int64(len(b)))...)
		}
		copy(b[min(o.off, int64(len(b))):], o.data)
	case opPunch:
		lo, hi := min(o.off, int64(len(b))), min(o.off+o.n, int64(len(b)))
		clear(b[lo:hi])
	case opTruncate:
		if o.n <= int64(len(b)) {
			b = b[:o.n]
		} else {
			b = append(b, make([]byte, o.n-int64(len(b)))...)
		}
	}
	return b
}

// Killed returns the directory as the next process finds it when this one died
// at step k: all that was done before is there. With torn, the write that
// would have been step k is there in half.
func (d *Dir) Killed(k int, torn bool) *Dir {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.rebuild(k, func(int) choice { return choice{all: true} }, func(n int) int { return n })
	if torn && k < len(d.ops) && d.ops[k].kind == opWrite {
		o := d.ops[k]
		o.data = o.data[:half(o.off, len(o.data))]
		o.n = int64(len(o.data))
		t.files[o.node] = o.apply(t.files[o.node])
	}
	return newDir(t)
}

// Crashes yields states in which the directory may be found after the power
// was lost at step k, 0 ≤ k ≤ Len: all of the unsynced there, nothing of it,
// each single file's there and the others' not, and n drawn at random. The
// string names the state.
func (d *Dir) Crashes(k int, r *rand.Rand, n int) iter.Seq2[string, *Dir] {
	d.mu.Lock()
	defer d.mu.Unlock()
	all, none := choice{all: true}, choice{}
	type state struct {
		name string
		t    tree
	}
	states := []state{
		{"all", d.rebuild(k, func(int) choice { return all }, func(n int) int { return n })},
		{"none", d.rebuild(k, func(int) choice { return none }, func(int) int { return 0 })},
	}
	for id := range d.nodes {
		only := func(i int) choice { return choice{all: i == id} }
		states = append(states, state{fmt.Sprintf("file %d only", id), d.rebuild(k, only, func(n int) int { return n })})
	}
	for i := range n {
		some := func(int) choice {
			return choice{all: r.IntN(4) == 0, rand: r, odds: []int{0, 1, 5, 9}[r.IntN(4)], whole: r.IntN(2) == 0}
		}
		states = append(states, state{fmt.Sprintf("random %d", i), d.rebuild(k, some, func(n int) int { return r.IntN(n + 1) })})
	}
	return func(yield func(string, *Dir) bool) {
		for _, s := range states {
			if !yield(s.name, newDir(s.t)) {
				return
			}
		}
	}
}

// choice says what of a file's unsynced changes is there.
type choice struct {
	all   bool
	rand  *rand.Rand // nil: nothing
	odds  int        // of 10, that an operation, or a sector of it, is there
	whole bool       // decide by operation, not by sector
}

func (c choice) take() bool { return c.all || c.rand != nil && c.rand.IntN(10) < c.odds }

// rebuild makes the state at step k. names is asked how many of the unsynced
// operations on names are there. The caller holds mu.
func (d *Dir) rebuild(k int, pick func(node int) choice, names func(n int) int) tree {
	synced := map[int]int{} // by node: the steps up to its last sync
	dirSynced := 0
	for i, o := range d.ops[:k] {
		switch o.kind {
		case opSync:
			synced[o.node] = i + 1
		case opSyncDir:
			dirSynced = i + 1
		}
	}
	t := tree{names: maps.Clone(d.first.names), files: map[int][]byte{}}
	if t.names == nil {
		t.names = map[string]int{}
	}
	for id, data := range d.first.files {
		t.files[id] = slices.Clone(data)
	}
	pending := map[int][]op{}
	var later []op
	for i, o := range d.ops[:k] {
		switch {
		case o.kind >= opCreate && i < dirSynced:
			t.rename(o)
		case o.kind >= opCreate:
			later = append(later, o)
		case i < synced[o.node]:
			t.files[o.node] = o.apply(t.files[o.node])
		default:
			pending[o.node] = append(pending[o.node], o)
		}
	}
	for _, o := range later[:names(len(later))] {
		t.rename(o)
	}
	for _, id := range slices.Sorted(maps.Keys(pending)) {
		t.files[id] = survive(t.files[id], pending[id], pick(id))
	}
	for _, id := range t.names { // a file whose content was never synced
		if t.files[id] == nil {
			t.files[id] = []byte{}
		}
	}
	return t
}

func (t tree) rename(o op) {
	switch o.kind {
	case opCreate:
		t.names[o.name] = o.node
	case opRename:
		t.names[o.to] = t.names[o.name]
		delete(t.names, o.name)
	case opRemove:
		delete(t.names, o.name)
	}
}

// survive applies what the choice takes of a file's unsynced operations, and
// then sets one of the lengths that the file had meanwhile.
func survive(b []byte, ops []op, c choice) []byte {
	size := int64(len(b)) // as all operations would have it
	sizes := []int64{size}
	for _, o := range ops {
		switch o.kind {
		case opTruncate:
			size = o.n
			if c.take() {
				b = o.apply(b)
			}
		case opWrite, opPunch:
			if o.kind == opWrite && o.n > 0 {
				size = max(size, o.off+o.n)
			}
			if c.whole || c.all {
				if c.take() {
					b = o.apply(b)
				}
				break
			}
			for at := o.off; at < o.off+o.n; {
				end := min(at-at%sector+sector, o.off+o.n)
				if c.take() {
					part := op{kind: o.kind, off: at, n: end - at}
					if o.kind == opWrite {
						part.data = o.data[at-o.off : end-o.off]
					}
					b = part.apply(b)
				}
				at = end
			}
		}
		sizes = append(sizes, size)
	}
	switch {
	case c.all:
	case c.rand == nil:
		size = sizes[0]
	default:
		size = sizes[c.rand.IntN(len(sizes))]
	}
	return op{kind: opTruncate, n: size}.apply(b)
}
