package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/internal/backup"
	"holdfast/internal/hypervisor"
	"holdfast/internal/node"
	"holdfast/internal/repo"
)

func (a *app) backup() *cobra.Command {
	var q node.BackupRequest
	var consistency, compression string
	cmd := &cobra.Command{
		Use:     "backup HOST [VM...]",
		GroupID: "backup",
		Short:   "Make one restore point of each VM",
		Long: `Make one restore point of each VM named, or of all VMs of the host. Every
restore point is complete; after the first, only what changed is read.

--consistency says what a running guest takes part in: "crash" nothing, as after
a loss of power; "filesystem" its agent freezes all filesystems for a moment;
"application" its applications take part too (VSS on Windows, a freeze hook on
Linux). What cannot be reached is an error, never less than was asked for.

--compression says what new data costs: "fast" the least time, "small" about a
fifth less space for three times the processor's work, also when it is read
back. What is stored already stays as it is; one repository may hold both.

One VM's failure does not stop the others; the exit status is then 1.`,
		Example: `  holdfast backup qemu:///system
  holdfast backup qemu:///system web db --consistency application
  holdfast backup /srv/images
  holdfast backup qemu:///system web-new --history web`,
		Args:              args(1, -1),
		ValidArgsFunction: a.completeHostVMs,
		RunE: func(cmd *cobra.Command, args []string) error {
			q.Host, q.VMs, q.Consistency = args[0], args[1:], hypervisor.Consistency(consistency)
			if err := oneOf("consistency", consistency, "crash", "filesystem", "application"); err != nil {
				return err
			}
			if err := oneOf("compression", compression, "fast", "small"); err != nil {
				return err
			}
			a.compression = repo.Compression(compression)
			if q.History != "" && len(q.VMs) != 1 {
				return usagef("--history continues the history of one VM: name the VM to back up")
			}
			if q.FreezeLimit < 0 {
				return usagef("--freeze-limit must be more than 0")
			}
			results, err := a.open().Backup(cmd.Context(), q)
			if err != nil {
				return err
			}
			for i := range results {
				results[i].Error = oneLine(results[i].Error)
			}
			if err := a.result(list(results), func() string { return backupText(results) }); err != nil {
				return err
			}
			for _, r := range results {
				for _, w := range r.Warnings {
					a.note("warning: " + r.VM + ": " + oneLine(w))
				}
			}
			if interrupted(cmd.Context()) {
				return errors.Join(cmd.Context().Err(), node.Failed(results))
			}
			return node.Failed(results)
		},
	}
	f := cmd.Flags()
	f.StringVar(&consistency, "consistency", "filesystem", "`LEVEL` crash, filesystem or application")
	f.StringVar(&compression, "compression", "fast", "of new data: `HOW` fast or small")
	f.DurationVar(&q.FreezeLimit, "freeze-limit", 0, "`TIME` that a guest may stay frozen, whatever happens (default 10s)")
	f.BoolVar(&q.Live, "live", false, "copy images of a directory even while they are written; the point is then not of one instant")
	f.StringVar(&q.History, "history", "", "continue the history of `VM`, under the backed-up VM's new identity")
	must(cmd.RegisterFlagCompletionFunc("consistency", choices("crash", "filesystem", "application")))
	must(cmd.RegisterFlagCompletionFunc("compression", choices("fast", "small")))
	must(cmd.RegisterFlagCompletionFunc("history", a.completeHistory))
	return cmd
}

func backupText(results []backup.Result) string {
	t := newTable("VM", "POINT", "CONSISTENCY", ">READ", ">NEW", ">STORED", ">TIME", "READ WHOLE BECAUSE")
	var remarks strings.Builder
	_, many := node.Failed(results).(interface{ Unwrap() []error })
	for _, r := range results {
		if r.Point == "" {
			t.add(r.VM, "failed", "", "", "", "", took(seconds(r.Seconds)), "")
			if many { // the reason of one alone is the error
				fmt.Fprintf(&remarks, "%s: %s\n", r.VM, oneLine(r.Error))
			}
		} else {
			t.add(r.VM, short(r.Point), r.Consistency, size(r.ReadBytes), size(r.NewBytes), size(r.StoredBytes), took(seconds(r.Seconds)), oneLine(r.FullReason))
		}
		for _, n := range r.Notes {
			fmt.Fprintf(&remarks, "%s: %s\n", r.VM, oneLine(n))
		}
	}
	return t.String() + remarks.String()
}

// must is for what can only fail by a mistake in this program.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
