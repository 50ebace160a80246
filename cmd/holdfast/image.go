package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/node"
)

// outputHelp lists the formats that can be written.
const outputHelp = `Formats: raw; qcow2, qcow2-zstd and qcow2-zlib (compressed) for KVM; vhdx,
vhdx-fixed, vhd and vhd-fixed for Hyper-V; vmdk, vmdk-flat (a descriptor and the
disk beside it) and vmdk-stream (compressed, as in an OVA) for VMware.`

func (a *app) image() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "image",
		GroupID: "restore",
		Short:   "Look at disk images, convert and compare them",
		Long: `Look at disk images as hypervisors leave them behind: VHDX, AVHDX, VHD, VMDK,
qcow2 and raw, with their parents. No command changes an image, and none needs a
repository.

What an image is, its content says, at its beginning and its end; only a raw
disk, whose guest may write there what it likes, goes by its name (.raw, .dd, or
--source-format). Parents and other files that an image names are looked for in
its own directory; --folder names a larger one, and nothing outside is opened.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.imageInfo(), a.imageConvert(), a.imageMap(), a.imageCompare(), a.imageCheck())
	return cmd
}

// imageFlags are the flags of all commands that read an image.
func imageFlags(cmd *cobra.Command, q *node.ImageRequest) {
	f := cmd.Flags()
	f.StringVar(&q.Format, "source-format", "", "`FORMAT` of the image: raw, qcow2, vhd, vhdx or vmdk (default: told from its content)")
	f.StringVar(&q.Folder, "folder", "", "directory `DIR` in which the files that the image names may be (default: the image's own)")
	f.StringVar(&q.Snapshot, "snapshot", "", "read the internal snapshot `NAME` of a qcow2 image")
	must(cmd.RegisterFlagCompletionFunc("source-format", choices(node.ImageFormats()...)))
	must(cmd.MarkFlagDirname("folder"))
}

func checkImageFlags(q node.ImageRequest) error {
	switch {
	case q.Snapshot != "" && q.Format != "" && q.Format != "qcow2":
		return usagef("--snapshot is for qcow2 images")
	case q.Format == "":
		return nil
	}
	return oneOf("source-format", q.Format, node.ImageFormats()...)
}

func (a *app) imageInfo() *cobra.Command {
	var q node.ImageRequest
	cmd := &cobra.Command{
		Use:   "info FILE",
		Short: "Describe an image and its parents",
		Long: `Describe an image and its parents: format, sizes, identities, what is odd. A
dirty log is what a host leaves behind that died with the disk in use: all other
commands read the disk with it.`,
		Example: `  holdfast image info web.vhdx
  holdfast image info web_0F5C1C0E-7C8E-4B8C-9F1E-0D5E3B3C9A11.avhdx --json`,
		Args: args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkImageFlags(q); err != nil {
				return err
			}
			q.Path = args[0]
			i, err := a.open().ImageInfo(cmd.Context(), q)
			if err != nil {
				return err
			}
			return a.result(i, func() string { return infoText(i) })
		},
	}
	imageFlags(cmd, &q)
	return cmd
}

// infoText is a paragraph for each file of a chain.
func infoText(i node.ImageInfo) string {
	var b strings.Builder
	for n, f := range append([]node.ImageInfo{i}, i.Chain...) {
		if n > 0 {
			b.WriteString("\n")
		}
		line := func(what, value string) {
			if value != "" {
				fmt.Fprintf(&b, "%-12s%s\n", what, value)
			}
		}
		bytes := func(n int64) string {
			if n == 0 {
				return ""
			}
			return fmt.Sprintf("%s (%d bytes)", size(n), n)
		}
		line("file", f.File)
		line("format", strings.TrimSpace(f.Format+" "+f.Variant))
		line("disk", bytes(f.VirtualSize))
		line("stored", bytes(f.StoredSize))
		if f.BlockSize > 0 {
			line("blocks", size(f.BlockSize))
		}
		if f.PhysicalSector > 0 {
			line("sectors", fmt.Sprintf("%d bytes, %d physical", f.LogicalSector, f.PhysicalSector))
		} else if f.LogicalSector > 0 {
			line("sectors", fmt.Sprintf("%d bytes", f.LogicalSector))
		}
		line("disk id", f.DiskID)
		line("data id", f.DataID)
		line("parent", f.Parent)
		line("parent id", strings.Join(f.ParentIDs, " or "))
		if f.DirtyLog {
			line("log", "dirty: it holds changes that are nowhere else; they are read")
		}
		for _, w := range f.Warnings {
			line("warning", oneLine(w))
		}
	}
	return b.String()
}

func (a *app) imageConvert() *cobra.Command {
	var q node.ImageRequest
	var format string
	cmd := &cobra.Command{
		Use:   "convert SOURCE TARGET --format FORMAT",
		Short: "Write an image in another format",
		Long: `Write an image, with all that its parents hold, to a new file. The file is
sparse; it has its name once it is complete; nothing is ever overwritten.

` + outputHelp,
		Example: `  holdfast image convert web.vhdx web.qcow2 --format qcow2
  holdfast image convert "Virtual Hard Disks/db_1B2C....avhdx" db.raw --format raw`,
		Args: args(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := required(cmd, "format"); err != nil {
				return err
			}
			if err := errors.Join(checkImageFlags(q), oneOf("format", format, node.OutputFormats()...)); err != nil {
				return err
			}
			q.Path = args[0]
			began := time.Now()
			r, err := a.open().ImageConvert(cmd.Context(), q, args[1], format)
			if err != nil {
				return err
			}
			return a.result(r, func() string {
				return fmt.Sprintf("%s: %s disk as %s, %s written in %s.\n", r.File, size(r.Size), r.Format, size(r.Bytes), took(time.Since(began)))
			})
		},
	}
	imageFlags(cmd, &q)
	cmd.Flags().StringVar(&format, "format", "", "`FORMAT` to write")
	must(cmd.RegisterFlagCompletionFunc("format", choices(node.OutputFormats()...)))
	return cmd
}

// maxExtents bounds a map, which is held in memory: an image of a few MiB may
// describe a disk of any size.
const maxExtents = 4 << 20

// extent is a line of image map.
type extent struct {
	Start  int64 `json:"start"`
	Length int64 `json:"length"`
	Zero   bool  `json:"zero"`
}

func (a *app) imageMap() *cobra.Command {
	var q node.ImageRequest
	cmd := &cobra.Command{
		Use:     "map FILE",
		Short:   "List which ranges of the disk hold data",
		Long:    `List the ranges of an image's disk, parents included: data, or known to be zeros.`,
		Example: `  holdfast image map web.vhdx --json`,
		Args:    args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if err := checkImageFlags(q); err != nil {
				return err
			}
			q.Path = args[0]
			extents, end, err := a.open().ImageMap(cmd.Context(), q)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, end()) }()
			var all []extent
			for e, err := range extents {
				if err != nil {
					return err
				}
				if len(all) == maxExtents {
					return fmt.Errorf("the disk has more than %d extents: a map of it helps nobody", maxExtents)
				}
				all = append(all, extent{e.Off, e.Len, e.Zero})
			}
			return a.result(list(all), func() string {
				t := newTable(">START", ">LENGTH", "CONTENT")
				for _, e := range all {
					content := "data"
					if e.Zero {
						content = "zeros"
					}
					t.add(fmt.Sprint(e.Start), fmt.Sprint(e.Length), content)
				}
				return t.String()
			})
		},
	}
	imageFlags(cmd, &q)
	return cmd
}

// errDiffer ends a comparison that has found a difference, which is a result.
var errDiffer = errors.New("the disks differ")

func (a *app) imageCompare() *cobra.Command {
	var q node.ImageRequest
	var second string
	cmd := &cobra.Command{
		Use:   "compare FILE FILE",
		Short: "Compare the disks of two images",
		Long: `Compare what the disks of two images hold, whatever their formats, parents
included. Where one is longer than the other it must be zeros. The exit status
is 0 when they are equal, and 1 when not, with the first difference printed.`,
		Example: `  holdfast image compare web.vhdx web.qcow2`,
		Args:    args(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			x, y := q, q
			x.Path, y.Path, y.Format, y.Snapshot = args[0], args[1], second, ""
			if err := errors.Join(checkImageFlags(x), checkImageFlags(y)); err != nil {
				return err
			}
			off, err := a.open().ImageCompare(cmd.Context(), x, y)
			if err != nil {
				return err
			}
			type result struct {
				Equal bool   `json:"equal"`
				First *int64 `json:"first_difference,omitempty"` // offset in bytes
			}
			if off < 0 {
				return a.result(result{Equal: true}, func() string { return "The disks are equal.\n" })
			}
			err = a.result(result{First: &off}, func() string { return fmt.Sprintf("The disks differ, first at byte %d.\n", off) })
			return errors.Join(err, errDiffer)
		},
	}
	imageFlags(cmd, &q)
	cmd.Flags().StringVar(&second, "second-format", "", "`FORMAT` of the second image, like --source-format of the first")
	must(cmd.RegisterFlagCompletionFunc("second-format", choices(node.ImageFormats()...)))
	return cmd
}

func (a *app) imageCheck() *cobra.Command {
	var q node.ImageRequest
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "Check the structure of an image and its parents",
		Long: `Check the structure of an image and its parents: tables, places, overlaps, log,
that each parent is the right one. The disk's content has no checksums in any of
the formats. Nothing is written. The exit status is 1 when something is wrong.`,
		Example: `  holdfast image check web.vhdx`,
		Args:    args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkImageFlags(q); err != nil {
				return err
			}
			q.Path = args[0]
			found, err := a.open().ImageCheck(cmd.Context(), q)
			if err != nil && len(found) == 0 {
				return err
			}
			resultErr := a.result(list(found), func() string {
				if len(found) == 0 {
					return "No problems were found.\n"
				}
				var b strings.Builder
				for _, p := range found {
					fmt.Fprintf(&b, "%s: %s\n", p.File, oneLine(p.Problem))
				}
				return b.String()
			})
			if len(found) > 0 {
				err = errors.Join(err, errors.New(count(len(found), "problem")+" found"))
			}
			return errors.Join(resultErr, err)
		},
	}
	imageFlags(cmd, &q)
	return cmd
}
