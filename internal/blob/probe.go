package blob

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"holdfast/internal/osfile"
)

// ErrUnfit is the proof that a store does not keep what a Store promises. The
// error says what it was caught at, and what to do.
var ErrUnfit = errors.New("the store cannot be used for a repository")

// Prober is a Store that can be tried for what a Store promises; a second
// ability, found by As.
type Prober interface {
	// Probe tries it with objects of its own that no listing shows, and leaves
	// none behind. ErrUnfit is the proof that it is not honest; other errors
	// prove nothing. It may run beside everything else.
	Probe(ctx context.Context) error
}

const (
	probePrefix = tmpPrefix + "probe-"
	// What a process that died has left is removed by the first probe after
	// this time, measured by the filesystem's own clock.
	probeRest = 24 * time.Hour
)

// Probe tries the directory's filesystem: files and directories are synced, of
// writers that race for a name one wins, what was written is read and listed at
// once through another descriptor, no listing forgets anything, and what is
// deleted is gone. Mount options with which a sync is pretended are refused.
//
// Whether a server or a disk that says "synced" has done so cannot be seen from
// here; nor can names that differ in case only be mixed up, as there are none.
func (d *Dir) Probe(ctx context.Context) (err error) {
	if err := pretending(d.root); err != nil {
		return err
	}
	var id [8]byte
	rand.Read(id[:])
	dir := filepath.Join(d.root, probePrefix+hex.EncodeToString(id[:]))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("try the store: %w", err)
	}
	defer func() {
		if rmErr := os.RemoveAll(dir); rmErr != nil {
			err = errors.Join(err, fmt.Errorf("%w: what was written to try it cannot be removed: %w", ErrUnfit, rmErr))
		}
	}()
	if err := d.removeProbes(dir); err != nil {
		return fmt.Errorf("try the store: %w", err)
	}
	if err := osfile.SyncDir(d.root); err != nil {
		return unsynced(err)
	}
	var stores [2]*Dir
	for i := range stores {
		if stores[i], err = OpenDir(dir); err != nil {
			return fmt.Errorf("try the store: %w", err)
		}
	}
	p := prober{a: stores[0], b: stores[1], cold: func(name string) { dropCache(stores[1].path(name)) }}
	if err := p.run(ctx); err != nil {
		return err
	}
	if err := crowd(ctx, stores[1]); err != nil {
		return err
	}
	return emptied(dir)
}

// removeProbes removes what probes that died have left, of which none is as
// young as this one.
func (d *Dir) removeProbes(mine string) error {
	fi, err := os.Stat(mine)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(d.root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), probePrefix) {
			continue
		}
		// Another probe may end meanwhile, and somebody else's cannot be removed.
		if old, err := e.Info(); err == nil && fi.ModTime().Sub(old.ModTime()) > probeRest {
			_ = os.RemoveAll(filepath.Join(d.root, e.Name()))
		}
	}
	return nil
}

// crowd sees that a listing of a large directory is complete. The files are as
// good for that unsynced.
func crowd(ctx context.Context, s *Dir) error {
	const files, hands = 300, 8 // more than any client asks for at once
	dir := s.path("crowd")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return fmt.Errorf("try the store: %w", err)
	}
	errs := make([]error, hands)
	var wg sync.WaitGroup
	for h := range hands {
		wg.Go(func() {
			for i := h; i < files && errs[h] == nil && ctx.Err() == nil; i += hands {
				errs[h] = os.WriteFile(filepath.Join(dir, fmt.Sprintf("%064x", i)), nil, 0o600)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(append(errs, ctx.Err())...); err != nil {
		return fmt.Errorf("try the store: %w", err)
	}
	return counted(ctx, s, files)
}

// counted sees that the listing of crowd/ has so many names, each once.
func counted(ctx context.Context, s Store, files int) error {
	seen := map[string]bool{}
	for i, err := range s.List(ctx, "crowd/") {
		switch {
		case err != nil:
			return fmt.Errorf("try the store: %w", err)
		case seen[i.Name]:
			return unfit("its listing names a file twice")
		}
		seen[i.Name] = true
	}
	if len(seen) != files {
		return unfit(fmt.Sprintf("of %d files in a directory it lists %d", files, len(seen)))
	}
	return nil
}

// emptied sees that nothing is left in the probe's own directories but crowd's
// files.
func emptied(dir string) error {
	for _, sub := range []string{"race", "name"} {
		entries, err := os.ReadDir(filepath.Join(dir, sub))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("try the store: %w", err)
		}
		if len(entries) > 0 {
			return unfit(fmt.Sprintf("after all was deleted, %s is left", entries[0].Name()))
		}
	}
	return nil
}

func unfit(saw string) error {
	return fmt.Errorf("%w: %s; mount it in another way, or use another filesystem or server", ErrUnfit, saw)
}

func unsynced(err error) error {
	return fmt.Errorf("%w: it cannot make a new file and its name durable: %w; use another filesystem, or another way to mount it", ErrUnfit, err)
}

// prober tries a store through two handles.
type prober struct {
	a, b Store
	cold func(name string) // what this machine remembers of the object is dropped
}

// longest is as long as names in a repository are at most (a pin's), and more.
var longest = "name/" + strings.Repeat("0123456789abcdef", 6) + ".beef"

func (p prober) run(ctx context.Context) error {
	for round := range 6 {
		if err := p.race(ctx, fmt.Sprintf("race/%d", round)); err != nil {
			return err
		}
	}
	big := make([]byte, 1<<20+1)
	rand.Read(big)
	for name, data := range map[string][]byte{"name/empty": nil, "name/big": big, longest: []byte("long")} {
		if err := p.keep(ctx, name, data); err != nil {
			return err
		}
	}
	want := []Info{{"name/empty", 0}, {"name/big", int64(len(big))}, {longest, 4}}
	if err := p.listed(ctx, want...); err != nil {
		return err
	}
	for _, i := range want {
		if err := p.remove(ctx, i.Name); err != nil {
			return err
		}
	}
	return p.listed(ctx)
}

// race has writers compete for a name through both handles.
func (p prober) race(ctx context.Context, name string) error {
	const racers = 6
	errs := make([]error, racers)
	content := func(i int) []byte { return bytes.Repeat([]byte{byte('a' + i)}, 1000+i) }
	var wg sync.WaitGroup
	for i := range racers {
		wg.Go(func() { errs[i] = []Store{p.a, p.b}[i%2].Put(ctx, name, content(i)) })
	}
	wg.Wait()
	winner := -1
	for i, err := range errs {
		switch {
		case errors.Is(err, ErrExist):
		case err != nil:
			return p.failed(err)
		case winner >= 0:
			return unfit("two writers of one name both won")
		default:
			winner = i
		}
	}
	if winner < 0 {
		return unfit("of several writers of a new name none won")
	}
	if err := p.reads(ctx, name, content(winner)); err != nil {
		return err
	}
	return p.remove(ctx, name)
}

// keep writes an object, tries to write over it, and reads it through the other
// handle.
func (p prober) keep(ctx context.Context, name string, data []byte) error {
	if err := p.a.Put(ctx, name, data); errors.Is(err, ErrExist) {
		return unfit("a name that nobody has used is taken")
	} else if err != nil {
		return p.failed(err)
	}
	switch err := p.b.Put(ctx, name, []byte("another")); {
	case err == nil:
		return unfit("it writes over a file that is there")
	case !errors.Is(err, ErrExist):
		return p.failed(err)
	}
	p.cold(name)
	return p.reads(ctx, name, data)
}

func (p prober) reads(ctx context.Context, name string, want []byte) error {
	for _, s := range []Store{p.b, p.a} {
		got, err := s.Get(ctx, name, 0, -1)
		switch {
		case errors.Is(err, ErrNotExist):
			return unfit("what was written cannot be found by another process")
		case err != nil && !errors.Is(err, ErrTruncated):
			return fmt.Errorf("try the store: %w", err)
		case !bytes.Equal(got, want):
			return unfit("what is read is not what was written")
		}
	}
	return nil
}

// listed sees that the names are listed, and no other.
func (p prober) listed(ctx context.Context, want ...Info) error {
	var got []Info
	for i, err := range p.b.List(ctx, "name/") {
		if err != nil {
			return fmt.Errorf("try the store: %w", err)
		}
		got = append(got, i)
	}
	byName := func(a, b Info) int { return strings.Compare(a.Name, b.Name) }
	slices.SortFunc(want, byName)
	slices.SortFunc(got, byName)
	if !slices.Equal(got, want) {
		return unfit("its listing is not of what was just written and deleted, in its names and lengths")
	}
	return nil
}

func (p prober) remove(ctx context.Context, name string) error {
	if err := p.a.Delete(ctx, name); errors.Is(err, ErrNotExist) {
		return unfit("what was written is gone")
	} else if err != nil {
		return fmt.Errorf("try the store: %w", err)
	}
	if _, err := p.b.Get(ctx, name, 0, -1); err == nil {
		return unfit("what was deleted is still there")
	} else if !errors.Is(err, ErrNotExist) {
		return fmt.Errorf("try the store: %w", err)
	}
	return nil
}

// failed tells what a filesystem cannot do from what went wrong.
func (p prober) failed(err error) error {
	if errors.Is(err, errors.ErrUnsupported) || invalid(err) {
		return unsynced(err)
	}
	return fmt.Errorf("try the store: %w", err)
}
