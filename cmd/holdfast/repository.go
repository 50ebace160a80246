package main

import (
	"fmt"
	"runtime"
	"strconv"

	"github.com/spf13/cobra"

	"holdfast/internal/hypervisor"
)

func (a *app) initCommand() *cobra.Command {
	var immutable, mode string
	cmd := &cobra.Command{
		Use:     "init",
		GroupID: "backup",
		Short:   "Make a repository",
		Long: `Make a repository in a directory that is missing or empty, or in a bucket of S3
or of a compatible server:

  s3://BUCKET/PREFIX?endpoint=https://HOST:PORT&region=NAME&path-style=1&ca=FILE

Without an endpoint it is AWS. Credentials come from AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, a profile, or a role. The bucket must exist; the server is
tried for what a repository needs.

Everything in it is sealed with the passphrase. Nobody can restore anything
without it: keep it in a second place, away from this machine.

With --immutable the store keeps what a restore point needs from being deleted
for so long: see "holdfast help repo immutable".`,
		Example: `  holdfast init --repo /backup/holdfast
  HOLDFAST_PASSPHRASE_FILE=/root/passphrase holdfast init --repo /backup/holdfast
  holdfast init --repo s3://backups/holdfast?region=eu-central-1
  holdfast init --repo s3://locked/holdfast --immutable 30d`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			rule, err := parseRule(immutable, mode)
			if err != nil {
				return err
			}
			a.warnCompliance(rule)
			made, err := a.open().Init(cmd.Context(), rule)
			if err != nil {
				return err
			}
			return a.result(made, func() string {
				return fmt.Sprintf("Repository %s is made in %s.\nKeep its passphrase in a second place: without it nothing can be restored.\n", short(made.Repository), made.Path)
			})
		},
	}
	cmd.Flags().StringVar(&immutable, "immutable", "", "for what `PERIOD` restore points cannot be deleted, as 30d")
	cmd.Flags().StringVar(&mode, "immutable-mode", "governance", "who may end that, `MODE` governance (a special right on the store) or compliance (nobody)")
	return cmd
}

// vmView is a VM in the output of vms.
type vmView struct {
	VM    string       `json:"vm"`
	ID    string       `json:"id"`
	Kind  string       `json:"kind"`
	Host  string       `json:"host"`
	State string       `json:"state"`
	Disks []vmDiskView `json:"disks"`
}

type vmDiskView struct {
	ID       string `json:"id"`
	Size     int64  `json:"size"`
	Format   string `json:"format"`
	Path     string `json:"path"`
	Excluded string `json:"excluded,omitempty"`
}

func (a *app) vms() *cobra.Command {
	return &cobra.Command{
		Use:     "vms HOST",
		GroupID: "backup",
		Short:   "List the VMs of a host",
		Long: `List the VMs of a host: of libvirt by its URI, or of a directory in which each
disk image, and each subdirectory with disk images, is a VM.`,
		Example: `  holdfast vms qemu:///system
  holdfast vms /srv/images`,
		Args:              args(1, 1),
		ValidArgsFunction: a.completeHost,
		RunE: func(cmd *cobra.Command, args []string) error {
			vms, err := a.open().VMs(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			views := []vmView{}
			for _, vm := range vms {
				views = append(views, viewVM(vm))
			}
			return a.result(views, func() string {
				t := newTable("VM", "STATE", ">DISKS", ">SIZE", "ID")
				for _, vm := range vms {
					var n int
					var sum int64
					for _, d := range vm.Disks {
						if d.Excluded == "" {
							n++
							sum += d.Size
						}
					}
					t.add(vm.Name, string(vm.State), strconv.Itoa(n), size(sum), string(vm.ID))
				}
				return t.String()
			})
		},
	}
}

func viewVM(vm hypervisor.VM) vmView {
	v := vmView{VM: vm.Name, ID: string(vm.ID), Kind: vm.Kind, Host: vm.Host, State: string(vm.State), Disks: []vmDiskView{}}
	for _, d := range vm.Disks {
		v.Disks = append(v.Disks, vmDiskView{ID: string(d.ID), Size: d.Size, Format: d.Format, Path: d.Path, Excluded: d.Excluded})
	}
	return v
}

func (a *app) version() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Tell the program's version",
		Args:  args(0, 0),
		RunE: func(*cobra.Command, []string) error {
			v := struct {
				Version string `json:"version"`
				Go      string `json:"go"`
				System  string `json:"system"`
			}{version, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}
			return a.result(v, func() string { return fmt.Sprintf("holdfast %s (%s, %s)\n", v.Version, v.Go, v.System) })
		},
	}
}
