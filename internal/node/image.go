package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor/folder"
	"holdfast/internal/image"
	"holdfast/internal/image/formats"
	"holdfast/internal/image/qcow2"
	"holdfast/internal/image/vhdx"
	"holdfast/internal/mover"
	"holdfast/internal/osfile"
)

// ImageRequest names an image file.
type ImageRequest struct {
	Path   string
	Format string // "": told from the content
	// Folder is the directory in which the image's parents, and whatever other
	// files it names, may be; "" is the image's own.
	Folder string
	// Snapshot is the name or id of an internal snapshot of a qcow2 image, which
	// is read in the image's stead; "" for the image as it is.
	Snapshot string
}

// opened is an image file in its folder.
type opened struct {
	s       *folder.Source
	rel     string
	format  string
	note    string
	known   image.Formats
	further map[string][]string    // what each file led to
	before  map[string]os.FileInfo // of each file, before it was opened
}

// openFolder finds out what an image is.
func openFolder(ctx context.Context, q ImageRequest) (_ *opened, err error) {
	path, err := filepath.Abs(q.Path)
	if err != nil {
		return nil, err
	}
	dir := ""
	if q.Folder != "" {
		if dir, err = filepath.Abs(q.Folder); err != nil {
			return nil, err
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if q.Folder == "" {
		// The caller's own link may lead anywhere; what the image names is
		// looked for where the image is.
		if path, err = filepath.EvalSymlinks(path); err != nil {
			return nil, err
		}
		dir = filepath.Dir(path)
	}
	rel, err := filepath.Rel(dir, path)
	if err != nil || !filepath.IsLocal(rel) {
		return nil, usage("%s is not in the folder %s", q.Path, q.Folder)
	}
	o := &opened{rel: filepath.ToSlash(rel), format: q.Format, known: formats.All(), further: map[string][]string{}}
	o.before = map[string]os.FileInfo{o.rel: info}
	for i, f := range o.known {
		if f.Name == qcow2.Name {
			f = qcow2.Damaged() // what is left of an image is better than nothing
			f.Open = o.snapshot(f.Open, q.Snapshot)
			o.known[i] = f
		}
	}
	if o.s, err = folder.Open(dir); err != nil {
		return nil, err
	}
	if q.Snapshot != "" && o.format == "" {
		o.format = qcow2.Name
	}
	if o.format == "" {
		if o.format, o.note, err = o.s.Recognise(ctx, o.rel); err != nil {
			if errors.Is(err, image.ErrFormat) {
				err = fmt.Errorf("%w; or say --source-format", err)
			}
			return nil, errors.Join(err, o.s.Close())
		}
	}
	return o, nil
}

// openImage opens an image with its parents.
func openImage(ctx context.Context, q ImageRequest, report Report) (*inFolder, error) {
	o, err := openFolder(ctx, q)
	if err != nil {
		return nil, err
	}
	if o.note != "" {
		report.note("note: %s", o.note)
	}
	c, err := o.chain(ctx)
	if err != nil {
		return nil, errors.Join(err, o.s.Close())
	}
	return &inFolder{c, o}, nil
}

// snapshot opens, of the image itself, one of its snapshots.
func (o *opened) snapshot(open func(context.Context, image.File, image.Resolver) (image.Layer, error), name string) func(context.Context, image.File, image.Resolver) (image.Layer, error) {
	return func(ctx context.Context, f image.File, r image.Resolver) (image.Layer, error) {
		l, err := open(ctx, f, r)
		im, ok := l.(*qcow2.Image)
		if err != nil || name == "" || f.Name != o.rel || !ok {
			return l, err
		}
		s, err := im.OpenSnapshot(ctx, name)
		if err != nil {
			return nil, err
		}
		return s, im.Close() // s keeps the file open
	}
}

func (o *opened) chain(ctx context.Context) (*image.Chain, error) {
	return o.s.OpenImage(ctx, o.known, o.rel, o.format, o.led)
}

func (o *opened) led(from, rel string) {
	o.further[from] = append(o.further[from], rel)
	if info, err := os.Stat(o.s.Path(rel)); err == nil && o.before[rel] == nil {
		o.before[rel] = info
	}
}

// inFolder is a chain that closes its folder.
type inFolder struct {
	c *image.Chain
	o *opened
}

// sector is that of the disk in bytes, 0 when the image does not say.
func (d *inFolder) sector() int64 { return d.c.Layers()[0].Info().LogicalSector }

// unchanged makes sure that nobody wrote to a file while it was read: what was
// read then need not have been the disk at any time.
func (d *inFolder) unchanged() error {
	for rel, before := range d.o.before {
		path := d.o.s.Path(rel)
		now, err := os.Stat(path)
		if err == nil && os.SameFile(now, before) && (now.Size() != before.Size() || !now.ModTime().Equal(before.ModTime())) {
			return fmt.Errorf("%s was changed while it was read: stop what writes to it, and try again", path)
		}
	}
	return nil
}

func (d *inFolder) Size() int64  { return d.c.Size() }
func (d *inFolder) Close() error { return errors.Join(d.c.Close(), d.o.s.Close()) }
func (d *inFolder) ReadAt(ctx context.Context, p []byte, off int64) error {
	return d.c.ReadAt(ctx, p, off)
}
func (d *inFolder) Extents(ctx context.Context, off, n int64) disk.Extents {
	return d.c.Extents(ctx, off, n)
}

// ImageFormats are the names of the formats that can be read.
func ImageFormats() []string {
	names := []string{image.RawName}
	for _, f := range formats.All() {
		names = append(names, f.Name)
	}
	return names
}

// ImageInfo describes an image file.
type ImageInfo struct {
	File           string   `json:"file"`
	Format         string   `json:"format"`
	Variant        string   `json:"variant"`
	VirtualSize    int64    `json:"virtual_size"` // bytes, as all that follow
	StoredSize     int64    `json:"stored_size"`  // of the file and its extents
	BlockSize      int64    `json:"block_size,omitempty"`
	LogicalSector  int64    `json:"logical_sector,omitempty"`
	PhysicalSector int64    `json:"physical_sector,omitempty"`
	DiskID         string   `json:"disk_id,omitempty"`
	DataID         string   `json:"data_id,omitempty"`
	Parent         string   `json:"parent,omitempty"` // as the file names it
	ParentIDs      []string `json:"parent_ids,omitempty"`
	DirtyLog       bool     `json:"dirty_log"`
	Warnings       []string `json:"warnings"`
	// Chain are the parents, the nearest first.
	Chain []ImageInfo `json:"chain,omitempty"`
}

// ImageInfo describes an image and its parents. That the parents cannot be
// opened is a warning.
func (n *Node) ImageInfo(ctx context.Context, q ImageRequest) (_ ImageInfo, err error) {
	o, err := openFolder(ctx, q)
	if err != nil {
		return ImageInfo{}, err
	}
	defer func() { err = errors.Join(err, o.s.Close()) }()
	c, chainErr := o.chain(ctx)
	if chainErr == nil {
		defer c.Close() // only read
		var chain []ImageInfo
		for i, l := range c.Layers() {
			chain = append(chain, o.info(c.Files()[i], l.Info(), c.Files()))
		}
		chain[0].Chain = chain[1:]
		return chain[0], nil
	}
	clear(o.further) // of the parents that were tried
	l, err := o.s.OpenAlone(ctx, o.known, o.rel, o.format, o.led)
	if err != nil {
		return ImageInfo{}, err
	}
	defer l.Close() // only read
	info := o.info(o.rel, l.Info(), nil)
	info.Warnings = append(info.Warnings, chainErr.Error())
	return info, nil
}

// info describes a file of a chain. What else the file led to are its extents.
func (o *opened) info(rel string, i image.Info, chain []string) ImageInfo {
	r := ImageInfo{
		File: o.s.Path(rel), Format: i.Format, Variant: i.Variant, VirtualSize: i.Size, BlockSize: i.Block,
		LogicalSector: i.LogicalSector, PhysicalSector: i.PhysicalSector, DiskID: i.DiskID, DataID: i.DataID,
		DirtyLog: i.DirtyLog, Warnings: append([]string{}, i.Warnings...),
	}
	if rel == o.rel && o.note != "" {
		r.Warnings = append(r.Warnings, o.note)
	}
	if i.Parent != nil {
		r.ParentIDs = i.Parent.IDs
		if len(i.Parent.Names) > 0 {
			r.Parent = i.Parent.Names[0]
		}
	}
	seen := map[string]bool{}
	for _, name := range append([]string{rel}, o.further[rel]...) {
		if seen[name] || name != rel && slices.Contains(chain, name) {
			continue
		}
		seen[name] = true
		if fi, err := os.Stat(o.s.Path(name)); err == nil {
			r.StoredSize += fi.Size()
		}
	}
	return r
}

// ImageMap yields the extents of an image, parents included. The caller goes
// through them before it calls close.
func (n *Node) ImageMap(ctx context.Context, q ImageRequest) (_ disk.Extents, close func() error, err error) {
	d, err := openImage(ctx, q, n.o.Report)
	if err != nil {
		return nil, nil, err
	}
	return d.Extents(ctx, 0, d.Size()), d.Close, nil
}

// ImageProblem is something that ImageCheck has found.
type ImageProblem struct {
	File    string `json:"file"`
	Problem string `json:"problem"`
}

// ImageCheck looks at the structure of an image and its parents.
func (n *Node) ImageCheck(ctx context.Context, q ImageRequest) (found []ImageProblem, err error) {
	o, err := openFolder(ctx, q)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, o.s.Close()) }()
	c, chainErr := o.chain(ctx)
	if chainErr == nil {
		defer c.Close() // only read
		for i, l := range c.Layers() {
			name := o.s.Path(c.Files()[i])
			err = l.Check(ctx, func(problem string) { found = append(found, ImageProblem{name, problem}) })
			if err != nil {
				return found, fmt.Errorf("check %s: %w", name, err)
			}
		}
		return found, nil
	}
	for _, known := range []error{image.ErrFormat, image.ErrParent, image.ErrOutside, fs.ErrNotExist} {
		if errors.Is(chainErr, known) {
			return []ImageProblem{{o.s.Path(o.rel), chainErr.Error()}}, nil
		}
	}
	return nil, chainErr
}

// ImageConvert writes an image, parents included, to a new file in a format of
// OutputFormats. The file has its name when it is complete and durable; on an
// error nothing is left.
func (n *Node) ImageConvert(ctx context.Context, q ImageRequest, to, format string) (_ Restored, err error) {
	o, err := outputOf(format)
	if err != nil {
		return Restored{}, err
	}
	x := &restore{n: n, dir: filepath.Dir(to)}
	w := work{out: &o, name: filepath.Base(to)}
	if to == "" || os.IsPathSeparator(to[len(to)-1]) || w.name == "." || w.name == ".." {
		return Restored{}, usage("%q is a directory: name the file to write", to)
	}
	if _, err := os.Stat(x.dir); err != nil {
		return Restored{}, err
	}
	if err := x.vacant(w); err != nil {
		return Restored{}, err
	}
	src, err := openImage(ctx, q, n.o.Report)
	if err != nil {
		return Restored{}, err
	}
	r := Restored{File: to, Format: o.name, Size: src.Size()}
	w.sector = src.sector()
	n.noteSectors(filepath.Base(q.Path), w.sector, o)
	d, err := n.fits(ctx, x, o, src, filepath.Base(q.Path))
	if err != nil {
		return Restored{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, x.undo())
		}
	}()
	if r.Bytes, err = x.writeDisk(ctx, w, d, filepath.Base(q.Path)); err != nil {
		return Restored{}, err
	}
	if err := src.unchanged(); err != nil {
		return Restored{}, err
	}
	return r, osfile.SyncDir(x.dir)
}

// noteSectors says when a format loses what the guest has to know of its disk.
func (n *Node) noteSectors(name string, sector int64, o output) {
	if sector > 512 && !strings.HasPrefix(o.name, vhdx.Name) {
		n.o.Report.note("note: %s has sectors of %d bytes, which the format %s cannot say: a guest finds nothing on it unless its VM gives it a disk of such sectors", name, sector, o.name)
	}
}

// maxScan bounds the disk whose zeros are looked for, in bytes, and so the
// memory that it takes, to 128 MiB. It is the largest that any format has.
const maxScan = 64 << 40

// fits makes sure that there is room for disk d in a format, and finds its
// zeros where it knows of none and that helps. It owns d, and on an error has
// closed it.
func (n *Node) fits(ctx context.Context, x *restore, o output, d disk.Reader, name string) (disk.Reader, error) {
	const advice = "choose another place"
	data, err := disk.DataBytes(d.Extents(ctx, 0, d.Size()))
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	err = x.room(o.room(data), advice)
	if (err != nil || o.zeros) && data == d.Size() && data <= maxScan {
		if d, err = n.scan(ctx, d, name); err != nil {
			return nil, err
		}
		if data, err = disk.DataBytes(d.Extents(ctx, 0, d.Size())); err == nil {
			err = x.room(o.room(data), advice)
		}
	}
	if err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// scan finds a disk's zeros.
func (n *Node) scan(ctx context.Context, d disk.Reader, name string) (disk.Reader, error) {
	m := &mover.Meter{}
	m.AddTotal(d.Size())
	end := n.o.Report.task("find the zeros of "+name, m)
	defer end()
	return mover.Scan(ctx, d, m)
}

// ImageCompare compares two images, parents included. differ is the offset of
// the first byte in which they differ, -1 for none; one may be longer than the
// other if there are only zeros.
func (n *Node) ImageCompare(ctx context.Context, a, b ImageRequest) (differ int64, err error) {
	x, err := openImage(ctx, a, n.o.Report)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, x.Close()) }()
	y, err := openImage(ctx, b, n.o.Report)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, y.Close()) }()
	m := &mover.Meter{}
	end := n.o.Report.task(strings.Join([]string{filepath.Base(a.Path), filepath.Base(b.Path)}, " and "), m)
	defer end()
	if differ, err = mover.Compare(ctx, x, y, m); err != nil {
		return 0, err
	}
	return differ, errors.Join(x.unchanged(), y.unchanged())
}
