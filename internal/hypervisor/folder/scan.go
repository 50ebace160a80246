package folder

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
	"holdfast/internal/image"
	"holdfast/internal/image/qcow2"
)

const (
	maxConfig      = 1 << 20 // bytes of one configuration file
	maxConfigFiles = 100
)

// vm is one VM as the folder's names tell it.
type vm struct {
	rel    string // the image or the subdirectory, slash-separated, in the folder
	name   string
	isDir  bool
	images []img
	config []string // names of files in the subdirectory
	left   []string // names of files that are neither, being too large
}

// dir is the directory of the VM's images.
func (v vm) dir() string {
	if v.isDir {
		return v.rel
	}
	return "."
}

// img is one image.
type img struct {
	rel      string
	format   string
	size     int64 // of the virtual disk; 0 if err
	note     string
	excluded string   // why it is not backed up
	err      error    // why it cannot be
	needs    []string // backing and data files
}

// known tells what the extension of a name says.
var known = map[string]kind{
	".raw": asRaw, ".dd": asRaw, ".img": asImg, ".qcow2": asQcow2,
	".vhdx": asOther, ".avhdx": asOther, ".vhd": asOther, ".avhd": asOther, ".vmdk": asOther, ".vdi": asOther, ".qcow": asOther, ".qed": asOther,
	".tmp": asSide, ".part": asSide, ".lock": asSide, ".swp": asSide, ".rct": asSide, ".mrt": asSide,
}

type kind int

const (
	asUnknown kind = iota
	asRaw
	asImg
	asQcow2
	asOther // an image in a format that is not read here
	asSide  // no image and no configuration
)

func extension(name string) string { return strings.ToLower(path.Ext(name)) }

// find scans for one VM.
func (s *Source) find(ctx context.Context, id hypervisor.VMID) (vm, error) {
	found, err := s.scan(ctx)
	if err != nil {
		return vm{}, err
	}
	for _, v := range found {
		if s.id(v) == id {
			return v, nil
		}
	}
	return vm{}, fmt.Errorf("%w: %s", hypervisor.ErrNotExist, id)
}

// scan lists the folder's VMs by name.
func (s *Source) scan(ctx context.Context) ([]vm, error) {
	list, err := fs.ReadDir(s.root.FS(), ".")
	if err != nil {
		return nil, fmt.Errorf("list folder %s: %w", s.path, err)
	}
	var found []vm
	for _, e := range list {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		switch {
		case hidden(e.Name()):
		case e.IsDir():
			v, err := s.scanDir(ctx, e.Name())
			if err != nil {
				return nil, err
			}
			found = append(found, v)
		default:
			if m, ok := s.classify(ctx, e.Name(), e.Type()); ok {
				name := e.Name()
				if known[extension(name)] != asUnknown {
					name = strings.TrimSuffix(name, path.Ext(name))
				}
				found = append(found, vm{rel: e.Name(), name: name, images: []img{m}})
			}
		}
	}
	found = withoutParents(found)
	slices.SortStableFunc(found, func(a, b vm) int { return cmp.Compare(a.name, b.name) })
	return found, nil
}

// scanDir sorts a subdirectory's files. Without an image it is no VM.
func (s *Source) scanDir(ctx context.Context, dir string) (vm, error) {
	v := vm{rel: dir, name: dir, isDir: true}
	list, err := fs.ReadDir(s.root.FS(), dir)
	if err != nil {
		return v, fmt.Errorf("list folder %s: %w", s.at(dir), err)
	}
	for _, e := range list {
		name := e.Name()
		if hidden(name) || e.IsDir() {
			continue
		}
		if m, ok := s.classify(ctx, path.Join(dir, name), e.Type()); ok {
			v.images = append(v.images, m)
			continue
		}
		info, err := e.Info()
		switch {
		case err != nil || !info.Mode().IsRegular() || known[extension(name)] == asSide:
		case info.Size() <= maxConfig && len(v.config) < maxConfigFiles:
			v.config = append(v.config, name)
		default:
			v.left = append(v.left, name)
		}
	}
	return v, nil
}

func hidden(name string) bool {
	return strings.HasPrefix(name, ".") || strings.HasSuffix(name, "~")
}

// classify tells whether a file is an image, and which.
func (s *Source) classify(ctx context.Context, rel string, mode fs.FileMode) (img, bool) {
	m := img{rel: rel}
	as := known[extension(rel)]
	refuse := func(format string, args ...any) (img, bool) {
		m.err = fmt.Errorf(format, args...)
		return m, as != asUnknown
	}
	if as == asSide {
		return m, false
	}
	if mode&fs.ModeSymlink != 0 {
		if _, err := s.root.Stat(filepath.FromSlash(rel)); err == nil {
			return m, false // what it leads to is listed itself
		}
		return refuse("%s is a symbolic link out of the folder, or to nothing: use the directory that it leads to as the host", s.at(rel))
	}
	if !mode.IsRegular() {
		return refuse("%s is not a regular file", s.at(rel))
	}
	if as == asOther {
		return refuse("%w: the format %s is not readable here (qemu-img convert makes a qcow2 of it)", image.ErrUnsupported, strings.TrimPrefix(extension(rel), "."))
	}
	f, err := s.open(rel)
	if err != nil {
		return refuse("%w", err)
	}
	d, err := disk.NewFile(f, disk.FileOptions{ReadOnly: true})
	if err != nil {
		return refuse("%w", errors.Join(err, f.Close()))
	}
	ok := s.inspect(ctx, &m, as, d)
	if err := d.Close(); err != nil && m.err == nil {
		m.err = err
	}
	return m, ok
}

// inspect decides the format, by the rule of the package comment, and reads
// what the image needs. It reports whether the file is an image.
func (s *Source) inspect(ctx context.Context, m *img, as kind, d disk.Reader) bool {
	m.size = d.Size()
	mark, err := formats().Probe(ctx, d)
	if err != nil {
		m.err = err
		return as != asUnknown
	}
	switch {
	case mark == image.RawName && as == asUnknown:
		return false
	case as == asRaw, as == asImg && mark == image.RawName:
		m.format = image.RawName
		if mark != image.RawName {
			m.note = fmt.Sprintf("%s was read as raw, as its name says, though it begins like a %s image: rename it if it is one", s.at(m.rel), mark)
		}
		if m.size == 0 {
			m.excluded = "the file is empty"
		}
		return true
	}
	m.format = qcow2.Name
	l, err := formats().OpenLayer(ctx, image.File{Name: m.rel, Disk: keep{d}}, m.format, func(_ context.Context, from, name string) (image.File, error) {
		rel, err := s.locate(from, name)
		if err != nil {
			return image.File{}, err
		}
		m.needs = append(m.needs, rel)
		return image.File{Name: rel, Disk: disk.NewMem(0)}, nil // only the names matter here
	})
	if err != nil {
		m.err, m.size = err, 0
		return true
	}
	info := l.Info()
	m.size = info.Size
	if info.Parent != nil {
		for _, name := range info.Parent.Names {
			if rel, err := s.locate(m.rel, name); err == nil { // else opening says why not
				m.needs = append(m.needs, rel)
			}
		}
	}
	if as != asQcow2 && (info.Parent != nil || len(m.needs) > 0) {
		m.err = fmt.Errorf("%w: %s begins like a %s image that needs another file, but its guest may have written that: rename it to end in .%s if it is one, else in .raw",
			image.ErrFormat, s.at(m.rel), mark, mark)
		m.needs = nil
	}
	return true
}

// withoutParents removes images that others need, and VMs left without any.
// Images that need one another in a circle stay: somebody has to hear of it.
func withoutParents(found []vm) []vm {
	needs, needed := map[string][]string{}, map[string]bool{}
	for _, v := range found {
		for _, m := range v.images {
			needs[m.rel] = m.needs
			for _, rel := range m.needs {
				needed[rel] = true
			}
		}
	}
	below := map[string]bool{} // what is needed by an image that nobody needs
	var mark func(rel string)
	mark = func(rel string) {
		for _, n := range needs[rel] {
			if !below[n] {
				below[n] = true
				mark(n)
			}
		}
	}
	for rel := range needs {
		if !needed[rel] {
			mark(rel)
		}
	}
	var rest []vm
	for _, v := range found {
		v.images = slices.DeleteFunc(v.images, func(m img) bool { return below[m.rel] })
		if len(v.images) > 0 {
			rest = append(rest, v)
		}
	}
	return rest
}
