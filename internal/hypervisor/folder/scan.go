package folder

import (
	"cmp"
	"context"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
	"holdfast/internal/image"
	"holdfast/internal/image/formats"
	"holdfast/internal/image/qcow2"
	"holdfast/internal/image/vhd"
	"holdfast/internal/image/vhdx"
	"holdfast/internal/image/vmdk"
)

const (
	maxConfig      = 1 << 20 // bytes of one configuration file
	maxConfigFiles = 100
	maxDepth       = 3 // directories below a VM's own
)

// vm is one VM as the folder's names tell it.
type vm struct {
	rel    string // the image or the subdirectory, slash-separated, in the folder
	name   string
	isDir  bool
	images []img
	config []string // files in or below the subdirectory, by their place in the folder
	left   []string // likewise those that are neither, being too large
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
	id       hypervisor.DiskID
	format   string
	size     int64 // of the virtual disk; 0 if err
	sector   int64 // of the disk, bytes; 0 when the format does not say
	note     string
	excluded string   // why it is not backed up
	err      error    // why it cannot be
	refused  bool     // its format is not certain
	needs    []string // extents and data files
	dataID   string   // as in image.Info
	parents  []string // files that may be the parent, the best first
	ids      []string // of the parent's dataID; nil for none
}

// kind is what a file's name says that it is: the name of a format, or one of
// these.
type kind string

const (
	asUnknown kind = ""
	asImg     kind = "an image"
	asOther   kind = "not read here" // an image
	asPiece   kind = "a piece"       // of an image: the file of an extent
	asSide    kind = "beside"        // no image and no configuration
)

// certain reports whether the name leaves no doubt.
func (k kind) certain() bool {
	switch k {
	case asUnknown, asImg, asOther, asPiece, asSide:
		return false
	}
	return true
}

// known tells what the extension of a name says.
var known = map[string]kind{
	".raw": image.RawName, ".dd": image.RawName, ".img": asImg, ".qcow2": qcow2.Name,
	".vhdx": vhdx.Name, ".avhdx": vhdx.Name, ".vhd": vhd.Name, ".avhd": vhd.Name, ".vmdk": vmdk.Name,
	".vdi": asOther, ".qcow": asOther, ".qed": asOther, ".vhds": asOther,
	".tmp": asSide, ".part": asSide, ".lock": asSide, ".swp": asSide, ".rct": asSide, ".mrt": asSide, ".vswp": asSide,
}

var (
	// pieces are the names of the files that VMware's descriptors name.
	pieces = regexp.MustCompile(`(?i)-(flat|delta|sesparse|[fs]\d{3})\.vmdk$`)
	// tracking is VMware's changed block tracking.
	tracking = regexp.MustCompile(`(?i)-ctk\.vmdk$`)
	// checkpoints end in what Hyper-V and VMware add to a disk's name for each
	// of its checkpoints.
	checkpoints = regexp.MustCompile(`(?i)^(.+)(_[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\.a(vhdx?)|-\d{6}\.(vmdk))$`)
)

func kindOf(name string) kind {
	switch {
	case tracking.MatchString(name):
		return asSide
	case pieces.MatchString(name):
		return asPiece
	}
	return known[strings.ToLower(path.Ext(name))]
}

// lasting is the name of the disk of which an image is the newest checkpoint:
// it stays while checkpoints come and go.
func lasting(name string) string {
	if m := checkpoints.FindStringSubmatch(name); m != nil {
		return m[1] + "." + strings.ToLower(m[3]+m[4])
	}
	return name
}

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
				name := lasting(e.Name())
				v := vm{rel: name, images: []img{m}}
				if kindOf(name) != asUnknown {
					name = strings.TrimSuffix(name, path.Ext(name))
				}
				v.name = name
				found = append(found, v)
			}
		}
	}
	found = withoutParents(found)
	for _, v := range found {
		nameDisks(v)
	}
	slices.SortStableFunc(found, func(a, b vm) int { return cmp.Compare(a.name, b.name) })
	return found, nil
}

// scanDir sorts the files in and below a subdirectory. Without an image it is
// no VM.
func (s *Source) scanDir(ctx context.Context, dir string) (vm, error) {
	v := vm{rel: dir, name: dir, isDir: true}
	err := s.walk(dir, func(rel string, e fs.DirEntry) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		if m, ok := s.classify(ctx, rel, e.Type()); ok {
			v.images = append(v.images, m)
			return nil
		}
		info, err := e.Info()
		switch {
		case err != nil || !info.Mode().IsRegular() || kindOf(e.Name()) == asSide:
		case info.Size() <= maxConfig && len(v.config) < maxConfigFiles:
			v.config = append(v.config, rel)
		default:
			v.left = append(v.left, rel)
		}
		return nil
	})
	return v, err
}

// walk calls do for the files in a directory of the folder, and in those below
// it: a host's export has its disks in one of their own.
func (s *Source) walk(dir string, do func(rel string, e fs.DirEntry) error) error {
	list, err := fs.ReadDir(s.root.FS(), dir)
	if err != nil {
		return fmt.Errorf("list folder %s: %w", s.at(dir), err)
	}
	for _, e := range list {
		rel := path.Join(dir, e.Name())
		switch {
		case hidden(e.Name()):
		case !e.IsDir():
			err = do(rel, e)
		case strings.Count(rel, "/") <= maxDepth:
			err = s.walk(rel, do)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// nameDisks gives each image the shortest name that no other has.
func nameDisks(v vm) {
	names := []func(rel string) string{
		func(rel string) string { return lasting(path.Base(rel)) },
		path.Base,
		func(rel string) string { return strings.ReplaceAll(strings.TrimPrefix(rel, v.rel+"/"), "/", "_") },
	}
	for _, name := range names {
		taken := map[string]int{}
		for i := range v.images {
			taken[name(v.images[i].rel)]++
		}
		for i := range v.images {
			if n := name(v.images[i].rel); v.images[i].id == "" && taken[n] == 1 {
				v.images[i].id = hypervisor.DiskID(n)
			}
		}
	}
}

func hidden(name string) bool {
	return strings.HasPrefix(name, ".") || strings.HasSuffix(name, "~")
}

// classify tells whether a file is an image, and which.
func (s *Source) classify(ctx context.Context, rel string, mode fs.FileMode) (img, bool) {
	m := img{rel: rel}
	as := kindOf(path.Base(rel))
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
	switch as {
	case asOther:
		return refuse("%w: the format %s is not readable here (qemu-img convert makes a qcow2 of it)", image.ErrUnsupported, strings.TrimPrefix(strings.ToLower(path.Ext(rel)), "."))
	case asPiece:
		return refuse("%w: %s is a piece of a VMDK whose descriptor is not there: put it back, or name the piece .raw if it is a whole disk", image.ErrFormat, s.at(rel))
	}
	f, err := s.file(rel)
	if err != nil {
		return refuse("%w", err)
	}
	ok := s.inspect(ctx, &m, as, f.Disk)
	if err := f.Disk.Close(); err != nil && m.err == nil {
		m.err = err
	}
	return m, ok
}

// inspect decides the format, by the rule of the package comment, and reads
// what the image needs. It reports whether the file is an image.
func (s *Source) inspect(ctx context.Context, m *img, as kind, d disk.Reader) bool {
	m.size = d.Size()
	marks, err := formats.All().Probe(ctx, d)
	if err != nil {
		m.err = err
		return as != asUnknown
	}
	mark := strings.Join(marks, " and a ")
	switch {
	case as == image.RawName || as.certain() && (len(marks) == 0 || slices.Contains(marks, string(as))):
		m.format = string(as) // which refuses what has no mark of it
	case len(marks) == 0 && as == asUnknown:
		return false
	case len(marks) == 0:
		m.format = image.RawName
	case len(marks) == 1:
		m.format = mark
	default:
		m.err, m.refused = fmt.Errorf("%w: %s looks like a %s image: name it .EXT for the one that it is, .raw if none", image.ErrFormat, s.at(m.rel), mark), true
		return true
	}
	if m.format == image.RawName {
		if mark != "" {
			m.note = fmt.Sprintf("%s was read as raw, as its name says, though it looks like a %s image: rename it if it is one", s.at(m.rel), mark)
		}
		if m.size == 0 {
			m.excluded = "the file is empty"
		}
		return true
	}
	l, err := formats.All().OpenLayer(ctx, image.File{Name: m.rel, Disk: keep{d}}, m.format, s.resolver(func(_, rel string) {
		m.needs = append(m.needs, rel)
	}))
	if err != nil {
		m.err, m.size = err, 0
		return true
	}
	defer l.Close() // only read
	info := l.Info()
	m.size, m.sector, m.dataID = info.Size, info.LogicalSector, info.DataID
	if info.Parent != nil {
		m.ids = info.Parent.IDs
		for _, name := range info.Parent.Names {
			// Else opening says why not.
			if rel, moved, err := s.locate(m.rel, name); err == nil && !(moved && m.ids == nil) {
				m.parents = append(m.parents, rel)
			}
		}
	}
	if string(as) != m.format && (info.Parent != nil || len(m.needs) > 0) {
		m.err = fmt.Errorf("%w: %s looks like a %s image that needs another file, but its guest may have written that: rename it to end in .%s if it is one, else in .raw",
			image.ErrFormat, s.at(m.rel), mark, mark)
		m.needs, m.parents, m.refused = nil, nil, true
	}
	return true
}

// needed are the files that an image needs: of those that may be its parent,
// the one that is. When none is, opening says so, whichever it was to be.
func (m img) needed(dataID map[string]string) []string {
	for _, rel := range m.parents {
		id, there := dataID[rel]
		if there && (m.ids == nil || slices.ContainsFunc(m.ids, func(want string) bool { return strings.EqualFold(want, id) })) {
			return append(m.needs, rel)
		}
	}
	return append(m.needs, m.parents...)
}

// withoutParents removes images that others need, and VMs left without any.
// Images that need one another in a circle stay: somebody has to hear of it.
func withoutParents(found []vm) []vm {
	dataID := map[string]string{}
	for _, v := range found {
		for _, m := range v.images {
			dataID[m.rel] = m.dataID
		}
	}
	needs, needed := map[string][]string{}, map[string]bool{}
	for _, v := range found {
		for _, m := range v.images {
			needs[m.rel] = m.needed(dataID)
			for _, rel := range needs[m.rel] {
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
