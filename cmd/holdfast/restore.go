package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/node"
)

func (a *app) restore() *cobra.Command {
	var files node.FilesRequest
	var vm node.VMRequest
	cmd := &cobra.Command{
		Use:     "restore POINT (--to DIR [--disk DISK] [--format FORMAT] | --host HOST --storage DIR [--name NAME])",
		GroupID: "restore",
		Short:   "Write a restore point's disks to files, or to a host as a stopped VM",
		Long: `Restore a VM from a restore point, in one of two ways.

--to DIR writes each disk to DIR/DISK.EXT, and the VM's configuration beside
them. An image that was backed up from a directory keeps its name. Without
--format each disk is written in the format it had. Files are sparse; nothing is
ever overwritten; a file has its name once it is complete.

` + outputHelp + `

--host HOST --storage DIR makes a new VM on the host, with disks in DIR, and
leaves it stopped. To have the VM running at once use "holdfast recover".

When a restore fails, what it had made is removed.`,
		Example: `  holdfast restore web@latest --to /srv/restored
  holdfast restore 3f9c2a10 --to . --disk vda --format qcow2
  holdfast restore db@latest --to /srv/for-hyperv --format vhdx
  holdfast restore web@latest --host qemu:///system --storage /var/lib/libvirt/images --name web-restored`,
		Args:              args(1, 1),
		ValidArgsFunction: a.completePoint,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := exclusive(cmd); err != nil {
				return err
			}
			if files.Dir != "" {
				return a.restoreFiles(cmd, args[0], files)
			}
			return a.restoreVM(cmd, args[0], vm)
		},
	}
	f := cmd.Flags()
	f.StringVar(&files.Dir, "to", "", "directory `DIR` to write files to; made if it is missing")
	f.StringVar(&files.Disk, "disk", "", "only `DISK` (with --to)")
	f.StringVar(&files.Format, "format", "", "`FORMAT` to write (with --to; default: as the disk was)")
	f.StringVar(&vm.Host, "host", "", "libvirt URI of the `HOST` to make a VM on")
	f.StringVar(&vm.Storage, "storage", "", "directory `DIR` on that host for the VM's disks")
	f.StringVar(&vm.Name, "name", "", "`NAME` of the new VM (with --host; default: as it was)")
	f.BoolVar(&vm.NewIdentity, "new-identity", false, "new UUID and MAC addresses, to run beside the original (implied by --name)")
	f.BoolVar(&vm.Isolated, "isolated", false, "leave the new VM's network interfaces unconnected (with --host)")
	must(cmd.RegisterFlagCompletionFunc("format", choices(node.OutputFormats()...)))
	must(cmd.MarkFlagDirname("to"))
	must(cmd.MarkFlagDirname("storage"))
	return cmd
}

// exclusive checks which of restore's two ways was asked for.
func exclusive(cmd *cobra.Command) error {
	f := cmd.Flags()
	given := func(name string) bool { return f.Changed(name) }
	switch {
	case given("to") == given("host"):
		return usagef("restore to files with --to DIR, or to a host with --host HOST --storage DIR")
	case given("to"):
		for _, name := range []string{"storage", "name", "new-identity", "isolated"} {
			if given(name) {
				return usagef("--%s goes with --host, not with --to", name)
			}
		}
		if format := f.Lookup("format").Value.String(); given("format") {
			if err := oneOf("format", format, node.OutputFormats()...); err != nil {
				return err
			}
		}
		return required(cmd, "to")
	}
	for _, name := range []string{"disk", "format"} {
		if given(name) {
			return usagef("--%s goes with --to, not with --host", name)
		}
	}
	return required(cmd, "host", "storage")
}

func (a *app) restoreFiles(cmd *cobra.Command, point string, q node.FilesRequest) error {
	began := time.Now()
	n := a.open()
	p, err := n.Point(cmd.Context(), point)
	if err != nil {
		return err
	}
	done, err := n.RestoreFiles(cmd.Context(), p, q)
	if err != nil {
		return err
	}
	return a.result(list(done), func() string {
		return restoredText(done) + fmt.Sprintf("Restored %s of %s in %s.\n", p.VM, clock(p.Time), took(time.Since(began)))
	})
}

func restoredText(files []node.Restored) string {
	t := newTable("FILE", "DISK", "FORMAT", ">SIZE", ">WRITTEN")
	for _, f := range files {
		t.add(f.File, f.Disk, f.Format, size(f.Size), size(f.Bytes))
	}
	return t.String()
}

func (a *app) restoreVM(cmd *cobra.Command, point string, q node.VMRequest) error {
	began := time.Now()
	n := a.open()
	p, err := n.Point(cmd.Context(), point)
	if err != nil {
		return err
	}
	vm, err := n.RestoreVM(cmd.Context(), p, q)
	if err != nil {
		return err
	}
	return a.result(vm, func() string {
		var b strings.Builder
		b.WriteString(restoredText(vm.Disks))
		for _, note := range vm.Notes {
			fmt.Fprintf(&b, "%s: %s\n", vm.VM, oneLine(note))
		}
		fmt.Fprintf(&b, "VM %s is on %s, stopped; restored in %s.\n", vm.VM, vm.Host, took(time.Since(began)))
		return b.String()
	})
}
