// Package image reads disk images: files that hold a virtual disk in a format
// of their own, perhaps only the part of it that differs from a parent.
//
// Each format is a package below (qcow2, ...) and gives a Layer: what one file
// has to say of each range: data, zeros, or nothing, which means "ask the
// parent". A Chain puts layers on top of one another and is a disk.Reader. The
// bytes of an image file are themselves a disk.Reader, so an image may lie in
// a file, in memory or in a restore point. Raw images need no package: a raw
// Layer is its file.
//
//	Formats.Open ─▶ Layer (qcow2) ─Parent─▶ Resolver ─▶ Layer (qcow2) ─Parent─▶ … ─▶ Layer (raw)
//	                  └─ data file ───────▶ Resolver
//
// Images are hostile. A guest writes the bytes of a raw image, and may write
// there the header of another format that names any file of the host as its
// parent. So:
//
//   - A format is what the caller says, never guessed where it is known. A
//     parent's format is what its child says.
//   - A name found in an image is only handed to the Resolver, which belongs to
//     whoever opens the chain and decides what may be opened. No format
//     package opens a path. Join is the rule for names within one folder.
//   - Chains are bounded in depth and may not meet a file twice.
//   - Every reference is checked against the file's length, and every length
//     against a limit before it allocates.
//
// Readers are safe in parallel. Memory is bounded for each file, whatever its
// size. The package writes nothing.
package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"path"
	"strings"

	"holdfast/internal/disk"
)

var (
	// ErrFormat is wrapped when a file is not of the format that it is said to
	// have, or is damaged.
	ErrFormat = errors.New("bad image")
	// ErrUnsupported is wrapped when an image uses a feature that is not
	// readable here.
	ErrUnsupported = errors.New("image is not supported")
	// ErrParent is wrapped when the file that an image names as its parent is
	// missing, or is not the one above which the image was made.
	ErrParent = errors.New("the image's parent is not there")
	// ErrOutside is wrapped when an image names a file that it may not reach.
	ErrOutside = errors.New("image names a file outside its folder")
)

// RawName is the name of the format that every set of Formats has: the file's
// bytes are the disk's bytes.
const RawName = "raw"

// State is what a layer has for a range.
type State uint8

const (
	Absent State = iota // nothing: the parent's bytes, zeros where it ends or there is none
	Zero                // reads as zeros, whatever the parent has
	Data                // bytes in this layer
)

// Run is a range of one state.
type Run struct {
	Off, Len int64 // bytes; Len > 0
	State    State
}

// End is the first byte after the run.
func (r Run) End() int64 { return r.Off + r.Len }

// Runs yields runs in ascending order. An error is the last thing yielded.
type Runs = iter.Seq2[Run, error]

// Parent is what an image says of the one beneath it.
type Parent struct {
	// Names under which to look for it, the best first, as found in the file:
	// not to be trusted. Names of other systems have been made relative paths
	// with slashes.
	Names []string
	// Format is "" when the file does not say.
	Format string
	// IDs are those that the parent's Info.DataID may have; nil when the format
	// knows none. A parent with another one was changed, or is another file:
	// reading through it would give wrong data.
	IDs []string
}

// Info describes one image file.
type Info struct {
	Format  string // as in Format.Name
	Variant string // in the format's own words: "dynamic", "differencing", "monolithicSparse"
	Size    int64  // of the virtual disk, bytes
	Block   int64  // the unit in which the file allocates, bytes; 0 for none
	// LogicalSector and PhysicalSector are the disk's, in bytes; 0 when the
	// format does not say.
	LogicalSector, PhysicalSector int64
	DiskID                        string   // what the guest sees, the same along a chain; "" for none
	DataID                        string   // changes with the content: children name it; "" for none
	Parent                        *Parent  // nil when the file stands alone
	DirtyLog                      bool     // the file holds changes that only its log tells; they are read
	Warnings                      []string // what is odd and was put up with, a line each
}

// Layer is one image file. All methods but Close may run in parallel.
type Layer interface {
	// Info does no I/O; its slices are not to be changed.
	Info() Info
	// Runs covers [off, off+n) without gaps. Neighbours may be of one state.
	Runs(ctx context.Context, off, n int64) Runs
	// ReadAt fills p from this layer alone. What is Absent reads as zeros.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// Check reads all of the file's structure, not its content, and calls
	// report with each thing that is wrong: a line with structure and offset.
	// What Open refuses is not among it. Check fails when it could not look.
	Check(ctx context.Context, report func(problem string)) error
	// Close also closes the file or files that the layer was given.
	Close() error
}

// File is an open file of an image.
type File struct {
	// Name says which file it is, in the Resolver's terms: two Files with one
	// Name are one file. It appears in errors.
	Name string
	Disk disk.Reader // its bytes
	// Moved is set by a Resolver that has found the file by its name alone, not
	// where the image says that it is. It counts only where an id tells that it
	// is the file that was meant.
	Moved bool
}

// InPlace refuses a file that was found elsewhere than the image called from
// says, with its name: for files that no id tells from another of that name.
// On an error f's Disk has been closed.
func InPlace(from, name string, f File) error {
	if !f.Moved {
		return nil
	}
	return errors.Join(fmt.Errorf("%w: %s names %.200q, which is not there; %s has that name, but nothing tells that it is the same: put it where it was",
		fs.ErrNotExist, from, name, f.Name), f.Disk.Close())
}

// Resolver opens the file that the image called from names as name. It alone
// decides what may be opened. The caller closes the result's Disk.
type Resolver func(ctx context.Context, from, name string) (File, error)

// Format is a way to read images.
type Format struct {
	Name string // "qcow2"
	// Match reports whether the content bears the format's mark. The rest of
	// the file may still be bad.
	Match func(ctx context.Context, f disk.Reader) (bool, error)
	// Open reads an image. The Layer owns f's Disk; on an error the caller
	// still does.
	Open func(ctx context.Context, f File, resolve Resolver) (Layer, error)
}

// Formats are what a caller can read, besides raw.
type Formats []Format

// Probe names the formats whose marks the content bears. That a file bears a
// mark does not mean that its owner meant it to (see the package comment): one
// that bears two, at its beginning and its end, has got one from a guest.
func (formats Formats) Probe(ctx context.Context, f disk.Reader) (marks []string, err error) {
	for _, x := range formats {
		ok, err := x.Match(ctx, f)
		if err != nil {
			return nil, fmt.Errorf("probe for %s: %w", x.Name, err)
		}
		if ok {
			marks = append(marks, x.Name)
		}
	}
	return marks, nil
}

// OpenLayer opens one file, without its parents, in a format that the caller
// knows. On an error f stays open.
func (formats Formats) OpenLayer(ctx context.Context, f File, format string, resolve Resolver) (Layer, error) {
	if format == RawName {
		return raw{f}, nil
	}
	for _, x := range formats {
		if x.Name == format {
			l, err := x.Open(ctx, f, resolve)
			if err != nil {
				return nil, fmt.Errorf("open %s image %s: %w", format, f.Name, err)
			}
			return l, nil
		}
	}
	return nil, fmt.Errorf("open image %s: %w: format %q is not readable here", f.Name, ErrUnsupported, format)
}

// Join is the rule for names within one folder: the slash-separated path,
// relative to the folder, of what an image calls name. from is the image's own
// path relative to the folder. It refuses, with ErrOutside, absolute paths,
// anything that is not a plain path (a URL, "json:...", a Windows drive), and
// a way out of the folder.
func Join(from, name string) (string, error) {
	refuse := func(why string) (string, error) {
		return "", fmt.Errorf("%w: %s names %.200q, %s", ErrOutside, from, name, why)
	}
	name, relative := strings.CutPrefix(name, "file:")
	switch {
	case name == "":
		return refuse("which is nothing")
	case strings.HasPrefix(name, "/"):
		return refuse("an absolute path; only files in the folder are read (qemu-img rebase -u gives it a relative name)")
	case strings.ContainsAny(name, "\\\x00"):
		return refuse("which is not a path of this system")
	case !relative && strings.Contains(strings.SplitN(name, "/", 2)[0], ":"):
		return refuse("which is not a plain file")
	}
	p := path.Join(path.Dir(from), name)
	if p == "." || p == ".." || strings.HasPrefix(p, "../") {
		return refuse("which lies outside the folder")
	}
	return p, nil
}
