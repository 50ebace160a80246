package main

import (
	"errors"
	"fmt"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/hypervisor"
	"holdfast/internal/repo"
)

func (a *app) initCommand() *cobra.Command {
	return &cobra.Command{
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
without it: keep it in a second place, away from this machine.`,
		Example: `  holdfast init --repo /backup/holdfast
  HOLDFAST_PASSPHRASE_FILE=/root/passphrase holdfast init --repo /backup/holdfast
  holdfast init --repo s3://backups/holdfast?region=eu-central-1`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			made, err := a.open().Init(cmd.Context())
			if err != nil {
				return err
			}
			return a.result(made, func() string {
				return fmt.Sprintf("Repository %s is made in %s.\nKeep its passphrase in a second place: without it nothing can be restored.\n", short(made.Repository), made.Path)
			})
		},
	}
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

// errDamage is the result of a check that found some.
var errDamage = errors.New("the repository is damaged")

func (a *app) check() *cobra.Command {
	var readData bool
	cmd := &cobra.Command{
		Use:     "check",
		GroupID: "backup",
		Short:   "Prove that all restore points are whole",
		Long: `Prove that the repository holds all that its restore points need: the chain of
commits, every index and every pack in its length, and for every disk of every
restore point its map and the place of each chunk. With --read-data every stored
byte is read and authenticated too.

Damage is listed and remembered: the next backups store again what they meet of
it. The exit status is 1 when something is damaged.`,
		Example: `  holdfast check
  holdfast check --read-data --json`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			began := time.Now()
			report, err := a.open().Check(cmd.Context(), readData)
			if err != nil {
				return err
			}
			report.Problems = list(report.Problems)
			if err := a.result(report, func() string { return checkText(report, readData, time.Since(began)) }); err != nil {
				return err
			}
			return damage(report)
		},
	}
	cmd.Flags().BoolVar(&readData, "read-data", false, "read and authenticate every stored byte")
	return cmd
}

func checkText(r *repo.CheckReport, readData bool, d time.Duration) string {
	var b strings.Builder
	if len(r.Problems) > 0 {
		t := newTable("OBJECT", "POINT", "WHAT")
		for _, p := range r.Problems {
			t.add(p.Object, short(p.Point), oneLine(p.What))
		}
		b.WriteString(t.String())
	}
	read := "their data was not read (--read-data)"
	if readData {
		read = size(r.ReadBytes) + " read and authenticated"
	}
	fmt.Fprintf(&b, "%s, %s of %s, %s: %s; %s, %s\n",
		count(r.Points, "restore point"), count(r.Packs, "pack"), size(r.PackBytes), count(r.Entries, "commit"), count(len(r.Problems), "problem"), read, took(d))
	return b.String()
}

// damage is the error of a report with problems.
func damage(r *repo.CheckReport) error {
	if len(r.Problems) == 0 {
		return nil
	}
	points := map[repo.PointID]bool{}
	for _, p := range r.Problems {
		if p.Point != "" {
			points[p.Point] = true
		}
	}
	advice := "no restore point has lost anything"
	if len(points) > 0 {
		advice = count(len(points), "restore point") + " lost data: back up the VMs again, the next runs store anew what they meet of it"
	}
	return fmt.Errorf("%w: %s; %s", errDamage, count(len(r.Problems), "problem"), advice)
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
