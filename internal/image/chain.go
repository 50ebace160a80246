package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"holdfast/internal/disk"
)

// maxDepth bounds a chain. Each layer costs an open file and some caches.
const maxDepth = 256

// Chain is an image with all its parents: a disk.Reader. All methods but
// Close may run in parallel.
type Chain struct {
	links []link // the image first, then its parent, ...
}

type link struct {
	layer Layer
	info  Info
	name  string // of the file
}

// Open opens an image and, through resolve, all its parents. The format is
// that of the image itself; a parent's is what its child says of it. The Chain
// owns the file's Disk, and on an error it has been closed.
func (formats Formats) Open(ctx context.Context, f File, format string, resolve Resolver) (*Chain, error) {
	l, err := formats.OpenLayer(ctx, f, format, resolve)
	if err != nil {
		return nil, errors.Join(err, f.Disk.Close())
	}
	c := &Chain{links: []link{{l, l.Info(), f.Name}}}
	for last := c.links[0]; last.info.Parent != nil; last = c.links[len(c.links)-1] {
		next, err := formats.openParent(ctx, c, last, resolve)
		if err != nil {
			return nil, errors.Join(err, c.Close())
		}
		c.links = append(c.links, next)
	}
	return c, nil
}

// openParent opens the parent of the chain's last image. Of the names that
// the image gives the first one counts whose file is the parent that it means.
func (formats Formats) openParent(ctx context.Context, c *Chain, child link, resolve Resolver) (link, error) {
	if len(c.links) == maxDepth {
		return link{}, fmt.Errorf("%w: %s has more than %d parents", ErrFormat, c.links[0].name, maxDepth-1)
	}
	var errs []error
	for _, name := range child.info.Parent.Names {
		f, err := resolve(ctx, child.name, name)
		if err == nil && child.info.Parent.IDs == nil {
			err = InPlace(child.name, name, f)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		next, err := formats.tryParent(ctx, c, child, f, resolve)
		if err == nil {
			return next, nil
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		errs = append(errs, fmt.Errorf("%w: it does not name it", ErrParent))
	}
	return link{}, fmt.Errorf("open the parent of %s: %w", child.name, telling(errs))
}

// telling picks the error to show of those that an image's names led to: a
// file that was there but is not the right one tells more than one that was
// not.
func telling(errs []error) error {
	for _, err := range errs {
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, ErrOutside) {
			return err
		}
	}
	return errs[0]
}

// tryParent opens f as the parent of child. It owns f's Disk; on an error it
// has been closed.
func (formats Formats) tryParent(ctx context.Context, c *Chain, child link, f File, resolve Resolver) (link, error) {
	for _, l := range c.links {
		if l.name == f.Name {
			return link{}, errors.Join(fmt.Errorf("%w: the parents of %s lead back to %s", ErrFormat, c.links[0].name, f.Name), f.Disk.Close())
		}
	}
	format, err := formats.parentFormat(ctx, child, f)
	var l Layer
	if err == nil {
		l, err = formats.OpenLayer(ctx, f, format, resolve)
	}
	if err != nil {
		return link{}, errors.Join(err, f.Disk.Close())
	}
	next := link{l, l.Info(), f.Name}
	if err := suits(child, next); err != nil {
		return link{}, errors.Join(err, l.Close())
	}
	return next, nil
}

// suits makes sure that parent is what child was made above.
func suits(child, parent link) error {
	ids := child.info.Parent.IDs
	if ids != nil && !slices.ContainsFunc(ids, func(id string) bool { return strings.EqualFold(id, parent.info.DataID) }) {
		return fmt.Errorf("%w: %s was made above a file with the id %s, but %s has the id %s: it was changed since, or is another disk",
			ErrParent, child.name, strings.Join(ids, " or "), parent.name, parent.info.DataID)
	}
	if a, b := child.info.LogicalSector, parent.info.LogicalSector; a != 0 && b != 0 && a != b {
		return fmt.Errorf("%w: %s has sectors of %d bytes, its parent %s of %d", ErrFormat, child.name, a, parent.name, b)
	}
	return nil
}

// parentFormat is the format that the child says, or else one that cannot be
// mistaken: raw when the content bears no mark, or the format that both the
// content and the file's name tell. Content alone is not believed: a guest may
// have written it when the parent was a raw disk of its own.
func (formats Formats) parentFormat(ctx context.Context, child link, f File) (string, error) {
	if p := child.info.Parent; p.Format != "" {
		return p.Format, nil
	}
	marks, err := formats.Probe(ctx, f.Disk)
	if err != nil {
		return "", fmt.Errorf("probe %s: %w", f.Name, err)
	}
	if len(marks) == 0 {
		return RawName, nil
	}
	if ext := strings.ToLower(strings.TrimPrefix(path.Ext(f.Name), ".")); slices.Contains(marks, ext) {
		return ext, nil
	}
	return "", fmt.Errorf("%w: %s does not say the format of its parent %s, which may be %s or raw (qemu-img rebase -u -b NAME -F FORMAT says it)",
		ErrFormat, child.name, f.Name, strings.Join(marks, ", "))
}

// Files lists the names of the chain's files from the image itself to its
// last parent, without the further files that a layer has.
func (c *Chain) Files() []string {
	list := make([]string, len(c.links))
	for i, l := range c.links {
		list[i] = l.name
	}
	return list
}

// Layers are the image itself, its parent, ... They stay the Chain's.
func (c *Chain) Layers() []Layer {
	list := make([]Layer, len(c.links))
	for i, l := range c.links {
		list[i] = l.layer
	}
	return list
}

// Size is that of the image itself. A shorter parent reads as zeros beyond its
// end; what a longer one has more does not exist.
func (c *Chain) Size() int64 { return c.links[0].info.Size }

// Close closes all files.
func (c *Chain) Close() error {
	var errs []error
	for _, l := range c.links {
		errs = append(errs, l.layer.Close())
	}
	return errors.Join(errs...)
}

func (c *Chain) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := disk.CheckRange(c.Size(), off, int64(len(p))); err != nil {
		return err
	}
	return c.read(ctx, 0, p, off)
}

// read fills p from the layer at depth and those beneath it.
func (c *Chain) read(ctx context.Context, depth int, p []byte, off int64) error {
	if depth == len(c.links) {
		clear(p)
		return nil
	}
	l := c.links[depth]
	if n := max(0, min(int64(len(p)), l.info.Size-off)); n < int64(len(p)) {
		clear(p[n:])
		p = p[:n]
	}
	if len(p) == 0 {
		return nil
	}
	if depth == len(c.links)-1 { // nobody to ask: no need to know the runs
		if err := l.layer.ReadAt(ctx, p, off); err != nil {
			return fmt.Errorf("%s: %w", c.links[depth].name, err)
		}
		return nil
	}
	for r, err := range c.runs(ctx, depth, off, int64(len(p))) {
		if err != nil {
			return err
		}
		q := p[r.Off-off : r.End()-off]
		switch r.State {
		case Data:
			if err = l.layer.ReadAt(ctx, q, r.Off); err != nil {
				err = fmt.Errorf("%s: %w", c.links[depth].name, err)
			}
		case Zero:
			clear(q)
		case Absent:
			err = c.read(ctx, depth+1, q, r.Off)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// runs is a layer's Runs with neighbours of one state joined, so that one
// request goes down for them.
func (c *Chain) runs(ctx context.Context, depth int, off, n int64) Runs {
	return func(yield func(Run, error) bool) {
		var cur Run
		for r, err := range c.links[depth].layer.Runs(ctx, off, n) {
			if err != nil {
				yield(Run{}, fmt.Errorf("%s: %w", c.links[depth].name, err))
				return
			}
			if cur.Len > 0 && cur.State == r.State {
				cur.Len += r.Len
				continue
			}
			if cur.Len > 0 && !yield(cur, nil) {
				return
			}
			cur = r
		}
		if cur.Len > 0 {
			yield(cur, nil)
		}
	}
}

// Extents knows all zeros that the chain's formats tell.
func (c *Chain) Extents(ctx context.Context, off, n int64) disk.Extents {
	if err := disk.CheckRange(c.Size(), off, n); err != nil {
		return disk.Fail(err)
	}
	return disk.Merge(func(yield func(disk.Extent, error) bool) {
		c.extents(ctx, 0, off, n, yield)
	})
}

// extents reports whether to go on.
func (c *Chain) extents(ctx context.Context, depth int, off, n int64, yield func(disk.Extent, error) bool) bool {
	if n == 0 {
		return true
	}
	inside := int64(0)
	if depth < len(c.links) {
		inside = max(0, min(n, c.links[depth].info.Size-off))
	}
	if inside > 0 {
		for r, err := range c.runs(ctx, depth, off, inside) {
			if err == nil {
				err = ctx.Err()
			}
			ok := false
			switch {
			case err != nil:
				yield(disk.Extent{}, err)
			case r.State == Absent:
				ok = c.extents(ctx, depth+1, r.Off, r.Len, yield)
			default:
				ok = yield(disk.Extent{Off: r.Off, Len: r.Len, Zero: r.State == Zero}, nil)
			}
			if !ok {
				return false
			}
		}
	}
	return inside == n || yield(disk.Extent{Off: off + inside, Len: n - inside, Zero: true}, nil)
}

// raw is a file whose bytes are the disk's. Its holes are zeros.
type raw struct{ file File }

func (r raw) Info() Info   { return Info{Format: RawName, Variant: "flat", Size: r.file.Disk.Size()} }
func (r raw) Close() error { return r.file.Disk.Close() }

// Check has no structure to look at.
func (r raw) Check(ctx context.Context, _ func(string)) error { return ctx.Err() }

func (r raw) ReadAt(ctx context.Context, p []byte, off int64) error {
	return r.file.Disk.ReadAt(ctx, p, off)
}

func (r raw) Runs(ctx context.Context, off, n int64) Runs {
	return func(yield func(Run, error) bool) {
		for e, err := range r.file.Disk.Extents(ctx, off, n) {
			run := Run{Off: e.Off, Len: e.Len, State: Data}
			if e.Zero {
				run.State = Zero
			}
			if !yield(run, err) {
				return
			}
		}
	}
}
