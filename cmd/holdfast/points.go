package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/node"
	"holdfast/internal/repo"
)

// pointView is a restore point in the output of points and show.
type pointView struct {
	ID            string     `json:"id"`
	VM            string     `json:"vm"`
	Time          time.Time  `json:"time"`
	Host          string     `json:"host"`
	Kind          string     `json:"kind"`
	VMID          string     `json:"vm_id"`
	History       string     `json:"history"`
	Consistency   string     `json:"consistency"`
	Notes         []string   `json:"notes"`
	Size          int64      `json:"size"` // of all disks
	ReadBytes     int64      `json:"read_bytes"`
	NewBytes      int64      `json:"new_bytes"`
	StoredBytes   int64      `json:"stored_bytes"`
	Reference     string     `json:"reference,omitempty"`
	ReferenceNote string     `json:"reference_note,omitempty"`
	CopiedFrom    string     `json:"copied_from,omitempty"` // a repository's id
	Disks         []diskView `json:"disks"`
	Files         []fileView `json:"files"`
	Keep          string     `json:"keep,omitempty"`     // marked to stay until
	Sessions      []string   `json:"sessions,omitempty"` // that run from it
}

type diskView struct {
	ID         string `json:"id"`
	Size       int64  `json:"size"`
	Format     string `json:"format"`
	Path       string `json:"path"`
	FullReason string `json:"full_reason,omitempty"`
}

type fileView struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
}

func viewPoint(p repo.Point) pointView {
	v := pointView{
		ID: string(p.ID), VM: p.VM, Time: p.Time, Host: p.Host, Kind: p.Kind, VMID: p.VMID, History: string(p.History),
		Consistency: p.Consistency, Notes: list(p.Notes), ReadBytes: p.ReadBytes, NewBytes: p.NewBytes, StoredBytes: p.StoredBytes,
		Reference: p.Reference, ReferenceNote: p.ReferenceNote, CopiedFrom: p.CopiedFrom, Keep: string(p.Keep), Disks: []diskView{}, Files: []fileView{},
	}
	for _, d := range p.Disks {
		v.Size += d.Size
		v.Disks = append(v.Disks, diskView{ID: d.ID, Size: d.Size, Format: d.Format, Path: d.Path, FullReason: d.FullReason})
	}
	for _, f := range p.Files {
		v.Files = append(v.Files, fileView{Name: f.Name, Size: f.Size})
	}
	return v
}

func (a *app) points() *cobra.Command {
	return &cobra.Command{
		Use:     "points [VM]",
		GroupID: "restore",
		Short:   "List restore points",
		Long: `List the restore points of all VMs, or of one: its name, or HOST/VM where
several hosts have a VM of that name. The oldest comes first.`,
		Example: `  holdfast points
  holdfast points web
  holdfast points qemu:///system/web --json`,
		Args:              args(0, 1),
		ValidArgsFunction: a.completeHistory,
		RunE: func(cmd *cobra.Command, args []string) error {
			vm := ""
			if len(args) > 0 {
				vm = args[0]
			}
			points, err := a.open().Points(cmd.Context(), vm)
			if err != nil {
				return err
			}
			views := []pointView{}
			for _, p := range points {
				views = append(views, viewPoint(p))
			}
			return a.result(views, func() string { return pointsText(views) })
		},
	}
}

func pointsText(points []pointView) string {
	if len(points) == 0 {
		return "No restore points yet: \"holdfast backup HOST\" makes some.\n"
	}
	t := newTable("POINT", "VM", "TIME", "CONSISTENCY", ">SIZE", ">NEW", ">STORED", "HOST")
	for _, p := range points {
		t.add(short(p.ID), p.VM, clock(p.Time), p.Consistency, size(p.Size), size(p.NewBytes), size(p.StoredBytes), p.Host)
	}
	return t.String()
}

func (a *app) show() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:     "show POINT",
		GroupID: "restore",
		Short:   "Show what is in a restore point",
		Long: `Show a restore point: whose it is, its disks with their sizes, the pieces of the
VM's configuration, and the sessions that run from it. --file writes a piece of
configuration to stdout as it is.`,
		Example: `  holdfast show web@latest
  holdfast show 3f9c2a10 --file domain.xml`,
		Args:              args(1, 1),
		ValidArgsFunction: a.completePoint,
		RunE: func(cmd *cobra.Command, args []string) error {
			n := a.open()
			p, err := n.Point(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if file != "" {
				data, err := n.ReadFile(cmd.Context(), p, file)
				if err != nil {
					return err
				}
				a.settle()
				_, err = a.stdout.Write(data)
				return err
			}
			v, err := a.shown(cmd.Context(), n, p)
			if err != nil {
				return err
			}
			return a.result(v, func() string { return showText(v) })
		},
	}
	cmd.Flags().StringVar(&file, "file", "", "write the piece of configuration `NAME` to stdout")
	return cmd
}

// shown is a point with the sessions that run from it.
func (a *app) shown(ctx context.Context, n *node.Node, p repo.Point) (pointView, error) {
	v := viewPoint(p)
	var err error
	v.Sessions, err = n.Pinned(ctx, p.ID)
	return v, err
}

func showText(p pointView) string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s %s\n", name, fmt.Sprintf(format, args...))
	}
	line("point", "%s", p.ID)
	line("vm", "%s (%s)", p.VM, p.VMID)
	line("host", "%s", p.Host)
	line("time", "%s", clock(p.Time))
	line("consistency", "%s", p.Consistency)
	line("history", "%s", p.History)
	line("size", "%s on %s; read %s, new %s, stored %s", size(p.Size), count(len(p.Disks), "disk"), size(p.ReadBytes), size(p.NewBytes), size(p.StoredBytes))
	if p.CopiedFrom != "" {
		line("copied from", "repository %s", p.CopiedFrom)
	}
	if p.ReferenceNote != "" {
		line("next backup", "reads all and compares: %s", oneLine(p.ReferenceNote))
	}
	for _, n := range p.Notes {
		line("note", "%s", oneLine(n))
	}
	if p.Keep != "" {
		line("stays", "%s", keepText(p.Keep))
	}
	for _, s := range p.Sessions {
		line("in use by", "session %s", s)
	}
	b.WriteString("\n")
	t := newTable("DISK", ">SIZE", "FORMAT", "WAS AT", "READ WHOLE BECAUSE")
	for _, d := range p.Disks {
		t.add(d.ID, size(d.Size), d.Format, d.Path, oneLine(d.FullReason))
	}
	b.WriteString(t.String())
	if len(p.Files) > 0 {
		b.WriteString("\n")
		t := newTable("CONFIGURATION", ">SIZE")
		for _, f := range p.Files {
			t.add(f.Name, size(f.Size))
		}
		b.WriteString(t.String())
	}
	return b.String()
}
