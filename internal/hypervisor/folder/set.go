package folder

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
	"holdfast/internal/image"
)

// set is all files that a snapshot reads, opened once.
type set struct {
	src     *Source
	files   map[string]*file // by their place in the folder
	noClone error            // why there are no clones
}

// file is one of them.
type file struct {
	rel   string
	f     *os.File
	stamp stamp       // before anything of it was read or cloned
	d     disk.Reader // f, as a disk; it owns f
	clone disk.Reader // nil for none
}

// stamp is what shows that a file was written. A stamp of a file opened anew
// is right on a network filesystem too: opening fetches what the server has.
type stamp struct {
	size    int64
	written time.Time // the content
	changed time.Time // anything, by the system's clock; zero if not known
	id      [2]uint64 // of the file itself, if known
}

// open opens a file of the folder, or gives the one that is open.
func (t *set) open(rel string) (image.File, error) {
	x := t.files[rel]
	if x == nil {
		f, err := t.src.open(rel)
		if err != nil {
			return image.File{}, err
		}
		st, err := stampOf(f)
		if err != nil {
			return image.File{}, errors.Join(err, f.Close())
		}
		d, err := disk.NewFile(f, disk.FileOptions{ReadOnly: true})
		if err != nil {
			return image.File{}, errors.Join(err, f.Close())
		}
		x = &file{rel: rel, f: f, stamp: st, d: d}
		t.files[rel] = x
	}
	if x.clone != nil {
		return image.File{Name: rel, Disk: keep{x.clone}}, nil
	}
	return image.File{Name: rel, Disk: keep{x.d}}, nil
}

// growing is the file of a qcow2 image that is read while it is written: new
// clusters come behind its end of before.
type growing struct {
	d disk.Reader // as it was when it was opened
	f *os.File
}

func (g growing) Close() error { return nil }

func (g growing) Size() int64 {
	info, err := g.f.Stat()
	if err != nil {
		return g.d.Size()
	}
	return max(info.Size(), g.d.Size())
}

func (g growing) ReadAt(ctx context.Context, p []byte, off int64) error {
	if disk.CheckRange(g.d.Size(), off, int64(len(p))) == nil {
		return g.d.ReadAt(ctx, p, off)
	}
	if err := errors.Join(ctx.Err(), disk.CheckRange(g.Size(), off, int64(len(p)))); err != nil {
		return err
	}
	if _, err := g.f.ReadAt(p, off); err != nil {
		return fmt.Errorf("read %s at %d: %w", g.f.Name(), off, err)
	}
	return nil
}

// Extents knows only data: nobody asks for those of a qcow2 image's file.
func (g growing) Extents(_ context.Context, off, n int64) disk.Extents {
	if err := disk.CheckRange(g.Size(), off, n); err != nil {
		return disk.Fail(err)
	}
	if n == 0 {
		return disk.List()
	}
	return disk.List(disk.Extent{Off: off, Len: n})
}

// resolve is the image.Resolver: files in the folder, and nothing else.
func (t *set) resolve(_ context.Context, from, name string) (image.File, error) {
	rel, moved, err := t.src.locate(from, name)
	if err != nil {
		return image.File{}, err
	}
	if t.files[rel] == nil && t.cloned() {
		return image.File{}, fmt.Errorf("%s names %s since just now", from, rel)
	}
	f, err := t.open(rel)
	f.Moved = moved
	return f, err
}

func (t *set) cloned() bool {
	for _, x := range t.files {
		return x.clone != nil
	}
	return false
}

// clone clones all files, in the directory dir of the folder, as close
// together as it can, or none.
func (t *set) clone(ctx context.Context, dir string, owner hypervisor.Owner) bool {
	for _, x := range t.files {
		st, err := stampOf(x.f)
		if err != nil {
			t.noClone = err
			return false
		}
		x.stamp = st
	}
	clones := map[*file]disk.Reader{}
	for _, x := range t.files {
		c, err := t.cloneFile(ctx, x, dir, owner)
		if err != nil {
			t.noClone = err
			for _, c := range clones {
				_ = c.Close() // never written through
			}
			return false
		}
		clones[x] = c
	}
	for x, c := range clones {
		x.clone = c
	}
	return true
}

func (t *set) cloneFile(ctx context.Context, x *file, dir string, owner hypervisor.Owner) (disk.Reader, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	f, err := reflink(t.src.root, dir, tempName(owner, rand.Uint64()), x.f)
	if err != nil {
		return nil, err
	}
	d, err := disk.NewFile(f, disk.FileOptions{ReadOnly: true})
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return d, nil
}

// unstable lists the files that were written since their stamps, or may have
// been without a trace.
func (t *set) unstable(now time.Time) []string {
	var list []string
	for _, x := range t.files {
		age := now.Sub(x.stamp.changed).Abs()
		if x.unchanged(t.src) != nil || age < tick {
			list = append(list, x.rel)
		}
	}
	slices.Sort(list)
	return list
}

// unchanged makes sure that the file was not written since its stamp, nor
// replaced.
func (x *file) unchanged(s *Source) error {
	f, err := s.open(x.rel)
	if err != nil {
		return err
	}
	st, err := stampOf(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if st != x.stamp {
		return fmt.Errorf("%s was changed", s.at(x.rel))
	}
	return nil
}

// users tells, by file, who has it open for writing.
func (t *set) users(ctx context.Context) (map[string]string, error) {
	var rels []string
	var open []*os.File
	for rel, x := range t.files {
		rels, open = append(rels, rel), append(open, x.f)
	}
	who, err := writers(ctx, open)
	if err != nil {
		return nil, fmt.Errorf("look for writers: %w", err)
	}
	users := map[string]string{}
	for i, w := range who {
		users[rels[i]] = fmt.Sprintf("%s (%s)", rels[i], w)
	}
	return users, nil
}

// Close closes all files; clones have no name and are gone.
func (t *set) Close() error {
	var errs []error
	for _, x := range t.files {
		errs = append(errs, x.d.Close())
		if x.clone != nil {
			errs = append(errs, x.clone.Close())
		}
	}
	t.files = nil
	return errors.Join(errs...)
}
