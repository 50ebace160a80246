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
	"holdfast/internal/mover"
	"holdfast/internal/osfile"
	"holdfast/internal/repo"
)

// Restored is a file that a restore made.
type Restored struct {
	Disk   string `json:"disk,omitempty"` // "" for a piece of configuration
	File   string `json:"file"`           // its path
	Format string `json:"format,omitempty"`
	Size   int64  `json:"size"`  // of the disk, or of the file, bytes
	Bytes  int64  `json:"bytes"` // written
}

// FilesRequest asks for a restore to files.
type FilesRequest struct {
	Dir    string
	Disk   string // "": all disks and the configuration
	Format string // of OutputFormats; "": each disk's own on its host
}

// RestoreFiles writes a restore point's disks, sparse, and its configuration
// into a directory, which is made if it is missing. It never overwrites. A
// file has its name when it is complete and durable; on an error nothing of
// this restore is left.
func (n *Node) RestoreFiles(ctx context.Context, p repo.Point, q FilesRequest) (_ []Restored, err error) {
	r, err := n.Repo(ctx)
	if err != nil {
		return nil, err
	}
	disks, err := chooseDisks(p, q.Disk)
	if err != nil {
		return nil, err
	}
	x := &restore{n: n, r: r, dir: q.Dir}
	for _, d := range disks {
		o, err := outputOf(fileFormat(d, q.Format))
		if err != nil {
			return nil, err
		}
		x.work = append(x.work, work{disk: d, out: &o, sector: d.Sector, name: fileName(p, d, o)})
		n.noteSectors(d.ID, d.Sector, o)
	}
	if q.Disk == "" {
		for _, f := range p.Files {
			x.work = append(x.work, work{file: f, name: f.Name})
		}
	}
	if err := x.check(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, x.undo())
		}
	}()
	if err := x.makeDir(); err != nil {
		return nil, err
	}
	for _, w := range x.work {
		if err := x.do(ctx, w); err != nil {
			return nil, err
		}
	}
	return x.done, osfile.SyncDir(x.dir)
}

// chooseDisks picks one disk of a point, or all of them.
func chooseDisks(p repo.Point, name string) ([]repo.Disk, error) {
	if name == "" {
		return p.Disks, nil
	}
	names := make([]string, len(p.Disks))
	for i, d := range p.Disks {
		if d.ID == name {
			return []repo.Disk{d}, nil
		}
		names[i] = d.ID
	}
	return nil, fmt.Errorf("restore point %s has no disk %q; it has %s", p.ID, name, strings.Join(names, ", "))
}

// fileFormat is the format that a disk is written in.
func fileFormat(d repo.Disk, asked string) string {
	if asked != "" {
		return asked
	}
	if _, err := outputOf(d.Format); err != nil {
		return image.RawName
	}
	return d.Format
}

// fileName is the file that a disk is written to. A disk that was an image in
// a folder keeps its name, but for the extension when the format differs;
// others are named by the format.
func fileName(p repo.Point, d repo.Disk, o output) string {
	ext := filepath.Ext(d.ID)
	switch {
	case p.Kind != folder.Kind || ext == "":
		return d.ID + o.ext
	case d.Format == o.name:
		return d.ID
	}
	return strings.TrimSuffix(d.ID, ext) + o.ext
}

// restore is one RestoreFiles.
type restore struct {
	n       *Node
	r       *repo.Repo
	dir     string
	work    []work
	made    []string // paths to remove when it fails
	newDirs []string // directories likewise, the outermost first
	done    []Restored
}

// work is what one file takes: a disk or, if out is nil, a piece of
// configuration.
type work struct {
	name   string
	out    *output
	sector int64 // of the disk, bytes; 0 when it is not known
	disk   repo.Disk
	file   repo.File
}

// data is the name of the file that the disk's content goes into.
func (w work) data() string {
	if w.out == nil || w.out.beside == nil {
		return w.name
	}
	return strings.TrimSuffix(w.name, w.out.ext) + "-flat" + w.out.ext
}

const partial = ".partial"

// check refuses, before anything is made, what could not end well.
func (x *restore) check(ctx context.Context) error {
	var need int64
	seen := map[string]bool{}
	for _, w := range x.work {
		if w.name == "" || filepath.Base(w.name) != w.name || !filepath.IsLocal(w.name) || seen[w.name] || seen[w.data()] {
			return fmt.Errorf("the restore point's %q cannot be the name of a file here", w.name)
		}
		seen[w.name], seen[w.data()] = true, true
		if err := x.vacant(w); err != nil {
			return err
		}
		size := w.file.Size
		if w.out != nil {
			data, err := x.n.dataBytes(ctx, w.disk)
			if err != nil {
				return err
			}
			size = w.out.room(data)
		}
		need += size
	}
	return x.room(need, "choose another place, or one disk with --disk")
}

// vacant makes sure that nothing has the names that will be made.
func (x *restore) vacant(w work) error {
	for _, name := range []string{w.name, w.data(), w.name + partial, w.data() + partial} {
		path := filepath.Join(x.dir, name)
		switch _, err := os.Lstat(path); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return err
		case name == w.name, name == w.data():
			return fmt.Errorf("%s exists already: nothing is ever overwritten; choose another place", path)
		default:
			return fmt.Errorf("%s exists: another command is writing it, or one that died has left it; if so, remove it", path)
		}
	}
	return nil
}

// room makes sure that so many bytes fit; advice is what to do otherwise.
func (x *restore) room(need int64, advice string) error {
	free, err := freeBytes(existing(x.dir))
	if err != nil {
		return fmt.Errorf("look for space in %s: %w", x.dir, err)
	}
	if free >= 0 && free < need {
		return fmt.Errorf("%s has %d MiB free, %d MiB are needed: %s", x.dir, free>>20, need>>20+1, advice)
	}
	return nil
}

// dataBytes is how much of a disk is not zeros.
func (n *Node) dataBytes(ctx context.Context, d repo.Disk) (int64, error) {
	src, err := n.repo.OpenDisk(ctx, d)
	if err != nil {
		return 0, err
	}
	data, err := disk.DataBytes(src.Extents(ctx, 0, src.Size()))
	return data, errors.Join(err, src.Close())
}

// existing is the nearest directory above path that exists.
func existing(path string) string {
	for {
		if _, err := os.Stat(path); err == nil {
			return path
		}
		parent := filepath.Dir(path)
		if parent == path {
			return path
		}
		path = parent
	}
}

func (x *restore) makeDir() error {
	abs, err := filepath.Abs(x.dir)
	if err != nil {
		return err
	}
	for dir, there := abs, existing(abs); dir != there; dir = filepath.Dir(dir) {
		x.newDirs = append(x.newDirs, dir)
	}
	slices.Reverse(x.newDirs)
	if err := os.MkdirAll(abs, 0o755); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	for _, dir := range x.newDirs {
		if err := osfile.SyncDir(filepath.Dir(dir)); err != nil {
			return err
		}
	}
	return nil
}

// undo removes what was made.
func (x *restore) undo() error {
	var errs []error
	for _, path := range x.made {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	for _, dir := range slices.Backward(x.newDirs) {
		// One that is not empty holds something that is not ours.
		_ = os.Remove(dir)
	}
	return errors.Join(errs...)
}

func (x *restore) do(ctx context.Context, w work) error {
	r := Restored{File: filepath.Join(x.dir, w.name), Size: w.file.Size, Bytes: w.file.Size}
	var err error
	if w.out == nil {
		err = x.make(w.name, func(path string) error { return x.file(ctx, path, w.file) })
	} else {
		r.Disk, r.Format, r.Size = w.disk.ID, w.out.name, w.disk.Size
		var src disk.Reader
		if src, err = x.r.OpenDisk(ctx, w.disk); err == nil {
			r.Bytes, err = x.writeDisk(ctx, w, src, w.disk.ID)
		}
	}
	if err != nil {
		return fmt.Errorf("restore %s: %w", w.name, err)
	}
	x.done = append(x.done, r)
	return nil
}

// writeDisk writes a disk, which it owns, to its file or files.
func (x *restore) writeDisk(ctx context.Context, w work, d disk.Reader, task string) (written int64, err error) {
	var text string
	if w.out.beside != nil { // refused before the disk is written
		if text, err = w.out.beside(w.data(), d.Size()); err != nil {
			return 0, errors.Join(err, d.Close())
		}
	}
	m := &mover.Meter{}
	end := x.n.o.Report.task(task, m)
	defer end()
	err = x.make(w.data(), func(path string) (err error) {
		written, err = w.out.write(ctx, d, w.sector, path, m)
		return err
	})
	if err != nil || w.out.beside == nil {
		return written, err
	}
	return written, x.make(w.name, func(path string) error { return writeFile(path, []byte(text)) })
}

// make makes a file, which has its name once it is complete.
func (x *restore) make(name string, write func(path string) error) error {
	path := filepath.Join(x.dir, name)
	tmp := path + partial
	err := write(tmp)
	if !errors.Is(err, fs.ErrExist) { // else it is another restore's
		x.made = append(x.made, tmp)
	}
	if err != nil {
		return err
	}
	if err := rename(tmp, path); err != nil {
		return err
	}
	x.made = append(x.made, path)
	return nil
}

func (x *restore) file(ctx context.Context, path string, f repo.File) error {
	data, err := x.r.ReadFile(ctx, f)
	if err != nil {
		return err
	}
	return writeFile(path, data)
}

// writeFile writes a new file and makes its content durable.
func writeFile(path string, data []byte) error {
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = out.Write(data)
	if err == nil {
		err = out.Sync()
	}
	return errors.Join(err, out.Close())
}

// fill copies a restore point's disk to a new one, which reads as zeros, and
// flushes it.
func (n *Node) fill(ctx context.Context, out disk.Writer, d repo.Disk, name string) (written int64, err error) {
	src, err := n.repo.OpenDisk(ctx, d)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	extents := func() disk.Extents { return src.Extents(ctx, 0, src.Size()) }
	total, err := disk.DataBytes(extents())
	if err != nil {
		return 0, err
	}
	m := &mover.Meter{}
	m.AddTotal(total)
	end := n.o.Report.task(name, m)
	defer end()
	c, err := mover.Copy(ctx, out, src, extents(), mover.Options{Align: repo.ChunkSize, Window: repo.ReadWindow, Meter: m})
	if err != nil {
		return c.Written, err
	}
	return c.Written, out.Flush(ctx)
}
