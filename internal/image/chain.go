package image

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

	"holdfast/internal/disk"
)

// maxDepth bounds a chain. Each layer costs an open file and some caches.
const maxDepth = 256

// Chain is an image with all its parents: a disk.Reader. All methods but
// Close may run in parallel.
type Chain struct {
	layers []Layer  // the image first, then its parent, ...
	names  []string // of their files
}

// Open opens an image and, through resolve, all its parents. The format is
// that of the image itself; a parent's is what its child says of it. The Chain
// owns the file's Disk, and on an error it has been closed.
func (fs Formats) Open(ctx context.Context, f File, format string, resolve Resolver) (*Chain, error) {
	c := &Chain{}
	fail := func(err error) (*Chain, error) { return nil, errors.Join(err, c.Close()) }
	for {
		for _, name := range c.names {
			if name == f.Name {
				return fail(errors.Join(fmt.Errorf("%w: the parents of %s lead back to %s", ErrFormat, c.names[0], name), f.Disk.Close()))
			}
		}
		if len(c.layers) == maxDepth {
			return fail(errors.Join(fmt.Errorf("%w: %s has more than %d parents", ErrFormat, c.names[0], maxDepth-1), f.Disk.Close()))
		}
		l, err := fs.OpenLayer(ctx, f, format, resolve)
		if err != nil {
			return fail(errors.Join(err, f.Disk.Close()))
		}
		c.layers, c.names = append(c.layers, l), append(c.names, f.Name)
		p, ok := l.Parent()
		if !ok {
			return c, nil
		}
		child := f.Name
		if f, err = resolve(ctx, child, p.Name); err != nil {
			return fail(fmt.Errorf("open the parent of %s: %w", child, err))
		}
		if format, err = fs.parentFormat(ctx, child, p, f); err != nil {
			return fail(errors.Join(err, f.Disk.Close()))
		}
	}
}

// parentFormat is the format that the child says, or else one that cannot be
// mistaken: raw when the content bears no mark, or the format that both the
// content and the file's name tell. Content alone is not believed: a guest may
// have written it when the parent was a raw disk of its own.
func (fs Formats) parentFormat(ctx context.Context, child string, p Parent, f File) (string, error) {
	if p.Format != "" {
		return p.Format, nil
	}
	format, err := fs.Probe(ctx, f.Disk)
	if err != nil {
		return "", fmt.Errorf("probe %s: %w", f.Name, err)
	}
	if format == RawName || strings.EqualFold(path.Ext(f.Name), "."+format) {
		return format, nil
	}
	return "", fmt.Errorf("%w: %s does not say the format of its parent %s, which may be %s or raw (qemu-img rebase -u -b NAME -F FORMAT says it)",
		ErrFormat, child, f.Name, format)
}

// Files lists the names of the chain's files from the image itself to its
// last parent, external data files not included.
func (c *Chain) Files() []string { return c.names }

// Size is that of the image itself. A shorter parent reads as zeros beyond its
// end; what a longer one has more does not exist.
func (c *Chain) Size() int64 { return c.layers[0].Size() }

// Close closes all files.
func (c *Chain) Close() error {
	var errs []error
	for _, l := range c.layers {
		errs = append(errs, l.Close())
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
	if depth == len(c.layers) {
		clear(p)
		return nil
	}
	l := c.layers[depth]
	if n := max(0, min(int64(len(p)), l.Size()-off)); n < int64(len(p)) {
		clear(p[n:])
		p = p[:n]
	}
	if len(p) == 0 {
		return nil
	}
	if depth == len(c.layers)-1 { // nobody to ask: no need to know the runs
		if err := l.ReadAt(ctx, p, off); err != nil {
			return fmt.Errorf("%s: %w", c.names[depth], err)
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
			if err = l.ReadAt(ctx, q, r.Off); err != nil {
				err = fmt.Errorf("%s: %w", c.names[depth], err)
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
		for r, err := range c.layers[depth].Runs(ctx, off, n) {
			if err != nil {
				yield(Run{}, fmt.Errorf("%s: %w", c.names[depth], err))
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
	if depth < len(c.layers) {
		inside = max(0, min(n, c.layers[depth].Size()-off))
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

func (r raw) Size() int64            { return r.file.Disk.Size() }
func (r raw) Parent() (Parent, bool) { return Parent{}, false }
func (r raw) Close() error           { return r.file.Disk.Close() }

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
