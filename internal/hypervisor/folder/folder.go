// Package folder is the host that needs no hypervisor: a directory of disk
// images, perhaps as a hypervisor has exported them. Each image in it is a VM of
// the file's name without its extension; each subdirectory with images, in it
// or up to three directories further down, is a VM of the directory's name,
// all its images one set. Other files of up to 1 MiB there are the VM's
// configuration.
//
//	vms/web.raw                    VM web, disk web.raw
//	vms/db/{root.qcow2,data.raw}   VM db, disks root.qcow2 and data.raw
//	vms/db/db.xml                  configuration of VM db
//	vms/app/app.vmx                configuration of VM app
//	vms/app/app{,-flat,-000001,-000001-delta}.vmdk
//	                               disk app.vmdk, as its newest snapshot has it
//	vms/mail/Virtual Hard Disks/mail{,_GUID.a}vhdx
//	                               VM mail, disk mail.vhdx, as its checkpoint has it
//
// An image that is the parent, the data file or an extent of another image in
// the folder is no disk of its own. A disk is named by its file, without what
// Hyper-V and VMware add for a checkpoint: it is the same disk when checkpoints
// come and go. Hidden files are ignored, and what is known to be a
// side file. A symbolic link within the folder adds nothing; one that leads
// out of it, if it bears an image's name, is listed and refused, like an image
// in a format that is not read here, so that nothing is left out silently.
// Links to directories are not followed. VMs of one name have
// different ids, which are paths.
//
// # Formats
//
// Images are found by name or content, and a guest writes the content of raw
// ones. So it cannot decide alone what its disk is:
//
//	.qcow2 .vhdx .avhdx .vhd .avhd .vmdk
//	            what the content says, as long as it is one of these formats,
//	            and the one of the name if it names another file
//	.raw .dd    raw, whatever the content; a note if it looks like another format
//	.img        raw; or what the content says, if that names no other file
//	others      what the content says, if that names no other file, else no image
//
// An image's parents and extents are opened only inside the folder, by relative
// names or absolute ones that lead into it; when a parent with an id is not where
// the image says, by its name among the VM's files. All files are opened through
// an os.Root.
//
// # Images in use
//
// Where the filesystem has reflinks (XFS, Btrfs), a snapshot is a clone of
// each image: a file without a name beside the images, gone with the process
// that made it. A clone is of one instant by itself; several are if not more
// than one of the files was written between the first and the last.
//
// Elsewhere the images themselves are read. They must not be written
// meanwhile: nobody may have them open for writing when reading begins (as far
// as this process may see: QEMU's locks, open files of all processes, loop
// devices), and size and times must not have changed when it ends, which
// Commit checks (hypervisor.ErrChanged). A guest may start meanwhile: we hold
// no lock against production.
//
// A guest cannot be quiesced from here. So an image in use gives
// crash consistency and is refused where more is asked for; an image that
// nobody writes satisfies every level. With Live an image in use is read even
// without a clone, and the point says that it is not of one instant: it may
// hold of each cluster an older or a newer state, and is a last resort.
//
// There is no change tracking: the caller reads and compares.
package folder

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
	"holdfast/internal/image"
)

// Kind is the adapter's name in hypervisor.VM.
const Kind = "folder"

// Source is a directory of images. Its methods may run in parallel.
type Source struct {
	name string // as the operator gave it
	abs  string // the same, absolute
	path string // without symbolic links
	root *os.Root
}

var _ hypervisor.Source = (*Source)(nil)

// Open opens a directory as a host.
func Open(dir string) (*Source, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open folder %s: %w", dir, err)
	}
	real, err := filepath.EvalSymlinks(abs)
	if err != nil {
		return nil, fmt.Errorf("open folder: %w", err)
	}
	root, err := os.OpenRoot(real)
	if err != nil {
		return nil, fmt.Errorf("open folder: %w", err)
	}
	return &Source{name: dir, abs: abs, path: real, root: root}, nil
}

// Close closes the directory. Snapshots must be closed before.
func (s *Source) Close() error { return s.root.Close() }

// VMs lists the folder's VMs by name. One that cannot be read is listed; its
// Snapshot says why. A VM is Running when somebody has an image of it open
// for writing.
func (s *Source) VMs(ctx context.Context) ([]hypervisor.VM, error) {
	found, err := s.scan(ctx)
	if err != nil {
		return nil, err
	}
	var open []*os.File
	defer func() {
		for _, f := range open {
			_ = f.Close() // only looked at
		}
	}()
	owner := map[int]int{} // index in open: index in found
	for i, v := range found {
		for _, m := range v.images {
			if f, err := s.open(m.rel); err == nil {
				owner[len(open)] = i
				open = append(open, f)
			}
		}
	}
	who, err := writers(ctx, open)
	if err != nil {
		return nil, fmt.Errorf("look for writers: %w", err)
	}
	list := make([]hypervisor.VM, len(found))
	for i, v := range found {
		list[i] = s.vm(v)
	}
	for i := range who {
		list[owner[i]].State = hypervisor.Running
	}
	return list, nil
}

// vm describes a VM as far as the scan knows it.
func (s *Source) vm(v vm) hypervisor.VM {
	r := hypervisor.VM{ID: s.id(v), Name: v.name, Kind: Kind, Host: s.name, State: hypervisor.Stopped}
	for _, m := range v.images {
		r.Disks = append(r.Disks, hypervisor.Disk{
			ID: m.id, Size: m.size, Format: m.format, Sector: m.sector,
			Path: s.at(m.rel), Excluded: m.excluded,
		})
	}
	return r
}

func (s *Source) id(v vm) hypervisor.VMID { return hypervisor.VMID(s.at(v.rel)) }

// Path is the path of a file of the folder.
func (s *Source) Path(rel string) string { return s.at(rel) }

// at is the path of a file of the folder.
func (s *Source) at(rel string) string { return filepath.Join(s.path, filepath.FromSlash(rel)) }

// open opens a file of the folder for reading. It must be a regular one.
func (s *Source) open(rel string) (*os.File, error) {
	f, err := s.root.OpenFile(filepath.FromSlash(rel), os.O_RDONLY|noWait, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", s.at(rel))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// file opens a file of the folder as a disk.
func (s *Source) file(rel string) (image.File, error) {
	f, err := s.open(rel)
	if err != nil {
		return image.File{}, err
	}
	d, err := disk.NewFile(f, disk.FileOptions{ReadOnly: true})
	if err != nil {
		return image.File{}, errors.Join(err, f.Close())
	}
	return image.File{Name: rel, Disk: d}, nil
}

// locate is where a file is that the image called from names. When it is not
// where the image says, the one file of its name counts that its VM has: an
// export puts checkpoints and disks into other directories than they were in,
// which is moved, and Windows does not mind upper and lower case.
func (s *Source) locate(from, name string) (at string, moved bool, err error) {
	rel, err := s.place(from, name)
	if err != nil {
		return "", false, err
	}
	if _, err := s.root.Lstat(filepath.FromSlash(rel)); err == nil {
		return rel, false, nil
	}
	var found []string
	look := func(at string, e fs.DirEntry) error {
		if strings.EqualFold(e.Name(), path.Base(rel)) && at != from {
			found = append(found, at)
		}
		return nil
	}
	if dir, _, ok := strings.Cut(from, "/"); ok {
		err = s.walk(dir, look)
	} else {
		var list []fs.DirEntry
		list, err = fs.ReadDir(s.root.FS(), ".")
		for _, e := range list {
			if !e.IsDir() {
				err = errors.Join(err, look(e.Name(), e))
			}
		}
	}
	if err == nil && len(found) == 1 {
		return found[0], path.Dir(found[0]) != path.Dir(rel), nil
	}
	return rel, false, err
}

// place is where an image says that a file is.
func (s *Source) place(from, name string) (string, error) {
	if filepath.IsAbs(name) {
		for _, dir := range []string{s.path, s.abs} {
			rel, err := filepath.Rel(dir, filepath.Clean(name))
			if err == nil && filepath.IsLocal(rel) {
				return filepath.ToSlash(rel), nil
			}
		}
		return "", fmt.Errorf("%w: %s names %.200q: use a directory that holds both as the host", image.ErrOutside, from, name)
	}
	return image.Join(from, name)
}

// Plan gives each VM by itself.
func (s *Source) Plan(_ context.Context, ids []hypervisor.VMID) ([][]hypervisor.VMID, error) {
	groups := make([][]hypervisor.VMID, len(ids))
	for i, id := range ids {
		groups[i] = []hypervisor.VMID{id}
	}
	return groups, nil
}

// Forget has nothing to do: there are no reference points.
func (s *Source) Forget(context.Context, hypervisor.VMID, hypervisor.ReferencePoint) error {
	return nil
}

// Clean removes the names of clones. They have one only for the moment in
// which they are made.
func (s *Source) Clean(ctx context.Context, id hypervisor.VMID, repository string, dead func(session string) bool, _ []hypervisor.ReferencePoint) ([]string, error) {
	v, err := s.find(ctx, id)
	if err != nil {
		return nil, err
	}
	list, err := fs.ReadDir(s.root.FS(), v.dir())
	if err != nil {
		return nil, fmt.Errorf("clean %s: %w", v.name, err)
	}
	var removed []string
	for _, e := range list {
		session, ok := tempSession(e.Name(), repository)
		if !ok || !e.Type().IsRegular() || !dead(session) {
			continue
		}
		rel := path.Join(v.dir(), e.Name())
		if err := s.root.Remove(filepath.FromSlash(rel)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return removed, fmt.Errorf("clean %s: %w", v.name, err)
		}
		removed = append(removed, "clone "+s.at(rel))
	}
	return removed, nil
}

// tempName is the name of a clone while it has one.
func tempName(owner hypervisor.Owner, n uint64) string {
	return fmt.Sprintf(".%s-%x.tmp", owner.Owned(), n)
}

// tempSession reports whether a name is a tempName of the repository, and the
// session's id.
func tempSession(name, repository string) (string, bool) {
	p := strings.Split(name, "-")
	if len(p) != 5 || p[0] != ".holdfast" || p[1] != fmt.Sprintf("%.8s", repository) || !strings.HasSuffix(p[4], ".tmp") {
		return "", false
	}
	return p[3], true
}
