package repo

import (
	"encoding/binary"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/seal"
)

// Cases in which others lost data, and why that cannot happen here. The table
// of all is docs/adr/0012-lessons-of-others.md.

// Lesson 5: a listing failed, or lacked something, and what it did not name was
// taken for gone. Here an object that a listing leaves out without a word, be it
// a pack, an index object or a lease, makes prune refuse or changes nothing.
func TestLesson05SilentlyPartialListing(t *testing.T) {
	w := newCrashWorld(t)
	r := reopen(t, w.store)
	run, err := r.Begin(ctx, RandomID()) // announces what it has, and goes on
	if err != nil {
		t.Fatal(err)
	}
	running := random(9, 4)
	d, err := run.Disk(ctx, nil, int64(len(running)))
	if err != nil || d.WriteAt(ctx, running, 0) != nil || run.Flush(ctx) != nil || run.announce(ctx) != nil {
		t.Fatal(err)
	}
	forget(t, r, w.dead...)
	names, _ := blob.Names(ctx, w.store, "")
	refused := 0
	for _, hidden := range names {
		if strings.HasPrefix(hidden, "pins/") {
			continue // see docs/adr/0012
		}
		s := w.store.Clone()
		pruner, err := Open(ctx, partial{s, func(name string) bool { return name == hidden }}, secret, Options{Cache: cacheDir(t)})
		if err != nil {
			continue // keys
		}
		if _, err := pruner.Prune(ctx, unwatched); errors.Is(err, ErrRefused) {
			refused++
		}
		pruner.Close()
		r := reopen(t, s)
		for _, p := range points(t, r) {
			equal(t, r, &p, w.contents[p.ID])
		}
		pinned := r.current().Forgotten[w.pinned]
		equal(t, r, pinned, w.contents[w.pinned])
		clean(t, r, true)
	}
	if err := run.Close(); err != nil {
		t.Fatal(err)
	}
	if refused == 0 {
		t.Error("nothing was refused")
	}
}

// Lesson 7: several programs judge by the clock what may be deleted, and a clock
// that jumps deletes backups. Here no wall clock decides anything: each place of
// this package that asks for the time is known, with what for.
func TestLesson07NoClockDecides(t *testing.T) {
	known := map[string]string{
		"Repo.watch":       "the pruner's own watching, monotonic",
		"Repo.begin":       "when to announce again, monotonic",
		"Repo.putPack":     "how old a pack is, by which it goes to a tier: where it lies, not whether",
		"Run.storePack":    "how many packs are stored at once, monotonic",
		"Run.announceSome": "when to announce again, monotonic",
		"Run.settle":       "when to announce again, monotonic",
		"Chain.Put":        "a label of the entry, for people",
		"PutSlot":          "a label of the key slot, for people",
		"initialize":       "a label of the repository, for people",
		"Open":             "until when a lock is asked for: the store alone decides when it has ended",
		"Repo.ExportKeys":  "a label of the file, for people",
	}
	uses(t, known, func(pkg, name string) bool {
		return pkg == "time" && (name == "Now" || name == "Since" || name == "Until")
	})
}

// Lesson 6: who owned the maintenance was told by its host's name, which two
// hosts shared. Here a host's name is written for people, and read by nobody.
func TestLesson06NoHostNameDecides(t *testing.T) {
	known := map[string]string{"Repo.begin": "in the lease, for people", "Repo.Pin": "in the pin, for people"}
	uses(t, known, func(pkg, name string) bool { return pkg == "os" && name == "Hostname" })
}

// Lesson 16: what was in use was told by access times, which some mounts do not
// keep. Here times of files are not even asked for.
func TestLesson16NoFileTimes(t *testing.T) {
	uses(t, nil, func(_, name string) bool { return name == "ModTime" || name == "Atim" || name == "Chtimes" })
}

// uses wants each use of something, in this package, those below it and
// internal/blob, to be in a function that is known.
func uses(t *testing.T, known map[string]string, wanted func(pkg, name string) bool) {
	t.Helper()
	var files []string
	for pattern, least := range map[string]int{"*.go": 20, "internal/*/*.go": 10, "../blob/dir*.go": 1} {
		more, err := filepath.Glob(pattern)
		if err != nil || len(more) < least {
			t.Fatal(pattern, more, err)
		}
		files = append(files, more...)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range f.Decls {
			ast.Inspect(decl, func(n ast.Node) bool {
				s, ok := n.(*ast.SelectorExpr)
				if !ok {
					return true
				}
				pkg, _ := s.X.(*ast.Ident)
				if pkg == nil {
					pkg = ast.NewIdent("")
				}
				if wanted(pkg.Name, s.Sel.Name) && known[funcName(decl)] == "" {
					t.Errorf("%s: %s uses %s.%s: what for?", file, funcName(decl), pkg.Name, s.Sel.Name)
				}
				return true
			})
		}
	}
}

func funcName(d ast.Decl) string {
	f, ok := d.(*ast.FuncDecl)
	if !ok {
		return ""
	}
	if f.Recv == nil {
		return f.Name.Name
	}
	recv := f.Recv.List[0].Type
	if star, ok := recv.(*ast.StarExpr); ok {
		recv = star.X
	}
	return fmt.Sprintf("%s.%s", recv, f.Name.Name)
}

// Lesson 13: an attacker who could write to the store put an archive, or the
// list of all archives, in the place of the real one, and it was believed. Here
// whoever has no key cannot make an entry, exchange the key by which entries are
// proved, bring an old entry again, or roll the store back unseen.
func TestLesson13Forged(t *testing.T) {
	store, foreign := new(blob.Mem), new(blob.Mem)
	r, attacker := create(t, store), create(t, foreign)
	p := mustSave(t, r, "a", random(1, 3))
	before := store.Clone()
	mustSave(t, r, "a", random(2, 3))
	mustSave(t, attacker, "a", random(3, 3))
	for range r.current().Head - attacker.current().Head + 1 { // so that it has an entry of the number that comes next
		mustSave(t, attacker, "a", random(3, 3))
	}
	next := chain.Name(r.current().Head + 1)
	get := func(s *blob.Mem, name string) []byte {
		b, err := s.Get(ctx, name, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	// as makes the header say that the object is this repository's.
	as := func(b []byte) []byte {
		b = slices.Clone(b)
		copy(b[16:32], r.id[:])
		clear(b[12:16])
		binary.LittleEndian.PutUint32(b[12:], seal.Checksum(b[:64]))
		return b
	}
	for what, forged := range map[string][]byte{
		"another repository's entry":               get(foreign, next),
		"another repository's entry as one's own":  as(get(foreign, next)),
		"an old entry once more":                   get(store, chain.Name(1)),
		"an entry with one bit of its point other": flipped(get(store, chain.Name(r.current().Head))),
	} {
		s := store.Clone()
		if err := s.Put(ctx, next, forged); err != nil {
			t.Fatal(err)
		}
		there := points(t, reopen(t, s))
		if len(there) != 2 || there[0].ID != p.ID {
			t.Errorf("%s: %d points", what, len(there))
		}
		if len(reopen(t, s).Damage()) == 0 {
			t.Errorf("%s: nobody notices", what)
		}
	}
	s := store.Clone()
	s.Damage(configName, func([]byte) []byte { return as(get(foreign, configName)) })
	if _, err := Open(ctx, s, secret, Options{Cache: t.TempDir()}); !errors.Is(err, ErrDamaged) {
		t.Errorf("with another key to prove by: %v", err)
	}
	cache := t.TempDir()
	if r, err := Open(ctx, store, secret, Options{Cache: cache}); err != nil {
		t.Fatal(err)
	} else {
		r.Close()
	}
	if _, err := Open(ctx, before, secret, Options{Cache: cache}); !errors.Is(err, ErrRolledBack) {
		t.Errorf("rolled back: %v", err)
	}
}

func flipped(b []byte) []byte {
	b = slices.Clone(b)
	b[len(b)-80] ^= 1
	return b
}

// Lesson 22: with chains of increments one broken or removed increment took all
// later points with it. Here any point may go: each of ten increments remains
// whole when all others were forgotten and pruned.
func TestLesson22NoChains(t *testing.T) {
	store := new(blob.Mem)
	r := create(t, store)
	content := random(1, 24)
	var made []*Point
	var contents [][]byte
	for i := range 10 {
		var base *Point
		changed := []int{(i * 3) % 24, (i*5 + 1) % 24}
		if i > 0 {
			base = made[i-1]
			for _, c := range changed {
				copy(content[c*ChunkSize:], random(uint64(100*i+c), 1))
			}
		}
		p, err := save(r, "a", content, base, changed)
		if err != nil {
			t.Fatal(err)
		}
		made, contents = append(made, p), append(contents, slices.Clone(content))
	}
	for keep := range made {
		s := store.Clone()
		r := reopen(t, s)
		for i, p := range made {
			if i != keep {
				forget(t, r, p.ID)
			}
		}
		if report := prune(t, r, unwatched); report.Removed == 0 {
			t.Errorf("%+v", report)
		}
		r = reopen(t, s)
		equal(t, r, made[keep], contents[keep])
		clean(t, r, true)
	}
}
