package node

import (
	"context"
	"errors"
	"io"
	"os"

	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
	"holdfast/internal/image"
	"holdfast/internal/image/qcow2"
	"holdfast/internal/image/vhd"
	"holdfast/internal/image/vhdx"
	"holdfast/internal/image/vmdk"
	"holdfast/internal/mover"
	"holdfast/internal/repo"
)

// output is a format in which disks are written to files. Exactly one of view,
// create and stream is set; raw has none.
type output struct {
	name string // as operators write it
	ext  string
	// view is the file's bytes, computed from the disk, whose sectors have so
	// many bytes (0 for not known). It owns the disk, on an error too.
	view func(ctx context.Context, d disk.Reader, sector int64) (disk.Reader, error)
	// zeros is set for a file that takes less room when the disk knows its zeros
	// beforehand.
	zeros bool
	// create makes a file that is filled; writes must be multiples of align.
	create func(path string, size int64) (w hypervisor.WriteCloser, align int64, err error)
	// stream writes the file from its beginning to its end.
	stream func(ctx context.Context, w io.Writer, d disk.Reader, progress func(int64)) (int64, error)
	// beside is the text of the file that has the output's name, when the disk
	// itself goes into another one, called data.
	beside func(data string, size int64) (string, error)
}

// outputs are the formats that can be written.
var outputs = []output{
	{name: image.RawName, ext: ".raw"},
	{name: "qcow2", ext: ".qcow2", create: func(path string, size int64) (hypervisor.WriteCloser, int64, error) {
		w, err := qcow2.Create(path, size, qcow2.Options{})
		return w, 1, err
	}},
	{name: "qcow2-zlib", ext: ".qcow2", create: packed(qcow2.Zlib)},
	{name: "qcow2-zstd", ext: ".qcow2", create: packed(qcow2.Zstd)},
	{name: "vhd", ext: ".vhd", view: vhdView(vhd.Dynamic), zeros: true},
	{name: "vhd-fixed", ext: ".vhd", view: vhdView(vhd.Fixed)},
	{name: "vhdx", ext: ".vhdx", view: vhdxView(vhdx.Dynamic), zeros: true},
	{name: "vhdx-fixed", ext: ".vhdx", view: vhdxView(vhdx.Fixed)},
	{name: "vmdk", ext: ".vmdk", zeros: true, view: func(ctx context.Context, d disk.Reader, _ int64) (disk.Reader, error) {
		return owned(d)(vmdk.NewView(ctx, d, vmdk.ViewOptions{}))
	}},
	{name: "vmdk-flat", ext: ".vmdk", beside: func(data string, size int64) (string, error) {
		return vmdk.FlatDescriptor(vmdk.FlatOptions{Name: data, Size: size})
	}},
	{name: "vmdk-stream", ext: ".vmdk", stream: func(ctx context.Context, w io.Writer, d disk.Reader, progress func(int64)) (int64, error) {
		return vmdk.WriteStream(ctx, w, d, vmdk.StreamOptions{Progress: progress})
	}},
}

func packed(c qcow2.Compression) func(string, int64) (hypervisor.WriteCloser, int64, error) {
	return func(path string, size int64) (hypervisor.WriteCloser, int64, error) {
		w, err := qcow2.CreateCompressed(path, size, qcow2.PackOptions{Compression: c})
		if err != nil {
			return nil, 0, err
		}
		return w, w.ClusterSize(), nil
	}
}

func vhdView(k vhd.Kind) func(context.Context, disk.Reader, int64) (disk.Reader, error) {
	return func(ctx context.Context, d disk.Reader, _ int64) (disk.Reader, error) {
		return owned(d)(vhd.NewView(ctx, d, vhd.ViewOptions{Kind: k}))
	}
}

func vhdxView(v vhdx.Variant) func(context.Context, disk.Reader, int64) (disk.Reader, error) {
	return func(ctx context.Context, d disk.Reader, sector int64) (disk.Reader, error) {
		return owned(d)(vhdx.NewView(ctx, d, vhdx.ViewOptions{Variant: v, LogicalSector: sector}))
	}
}

// owned closes d when a view of it could not be made.
func owned(d disk.Reader) func(disk.Reader, error) (disk.Reader, error) {
	return func(v disk.Reader, err error) (disk.Reader, error) {
		if err != nil {
			return nil, errors.Join(err, d.Close())
		}
		return v, nil
	}
}

// OutputFormats are the names of the formats that can be written.
func OutputFormats() []string {
	names := make([]string, len(outputs))
	for i, o := range outputs {
		names[i] = o.name
	}
	return names
}

// outputOf finds a format by its name.
func outputOf(name string) (output, error) {
	for _, o := range outputs {
		if o.name == name {
			return o, nil
		}
	}
	return output{}, usage("there is no format %q to write", name)
}

// room is about how many bytes a file takes whose disk has so many bytes that
// are not zeros: tables cost some for each cluster or block.
func (o output) room(data int64) int64 { return data + data>>10 + 4<<20 }

// sectors is the length of a flat file: whole sectors, where its readers count
// in them.
func (o output) sectors(size int64) int64 {
	if o.beside == nil {
		return size
	}
	return (size + 511) &^ 511
}

// write writes disk d, which it owns, to a new file and makes it durable.
// sector is that of view. written is how many bytes that took. The file is left
// on an error, if it was made.
func (o output) write(ctx context.Context, d disk.Reader, sector int64, path string, m *mover.Meter) (written int64, err error) {
	if o.view != nil {
		if d, err = o.view(ctx, d, sector); err != nil {
			return 0, err
		}
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	total, err := disk.DataBytes(d.Extents(ctx, 0, d.Size()))
	if err != nil {
		return 0, err
	}
	m.AddTotal(total)
	if o.stream != nil {
		return o.pour(ctx, d, path, m)
	}
	var w hypervisor.WriteCloser
	align := int64(1)
	if o.create != nil {
		w, align, err = o.create(path, d.Size())
	} else {
		w, err = disk.CreateFile(path, o.sectors(d.Size()))
	}
	if err != nil {
		return 0, err
	}
	// The repository's chunks are read whole.
	move := mover.Options{Align: max(align, repo.ChunkSize), Meter: m}
	if move.Align == repo.ChunkSize {
		move.Window = repo.ReadWindow
	}
	c, err := mover.Copy(ctx, w, d, d.Extents(ctx, 0, d.Size()), move)
	if err == nil {
		err = w.Flush(ctx)
	}
	return c.Written, errors.Join(err, w.Close())
}

// pour is write for a stream.
func (o output) pour(ctx context.Context, d disk.Reader, path string, m *mover.Meter) (int64, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, err
	}
	n, err := o.stream(ctx, f, d, m.Add)
	if err == nil {
		err = f.Sync()
	}
	return n, errors.Join(err, f.Close())
}
