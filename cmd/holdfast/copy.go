package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/internal/node"
	"holdfast/internal/replica"
	"holdfast/internal/repo"
)

func (a *app) copy() *cobra.Command {
	var q node.CopyRequest
	var readBack string
	cmd := &cobra.Command{
		Use:     "copy [VM|POINT...] --to REPOSITORY",
		GroupID: "backup",
		Short:   "Copy restore points to a second repository",
		Long: `Copy restore points to a second repository that does not have them yet, the
oldest first: all of them, those of the VMs named, or those named by id. A copy
keeps its restore point's id. Only what the other lacks is sent, sealed under
its keys. What an interrupted copy has sent is not sent again.

What the other repository keeps is its own affair: restore points that it has
forgotten are not copied again, unless they are named by id.

What is sent is read back before it counts: "all" of it, or a "sample", a
sixteenth, where the link is slow or reading costs money.

The second repository's passphrase comes from HOLDFAST_TO_PASSPHRASE, from the
file HOLDFAST_TO_PASSPHRASE_FILE, or from a prompt.

One restore point's failure does not stop the others; the exit status is then 1.`,
		Example: `  holdfast copy --to /mnt/second/holdfast
  holdfast copy web db@latest --to /mnt/second/holdfast
  holdfast copy --to /mnt/second/holdfast --dry-run`,
		Args:              args(0, -1),
		ValidArgsFunction: a.completeVMsAndPoints,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := required(cmd, "to"); err != nil {
				return err
			}
			if err := oneOf("read-back", readBack, string(repo.ReadAll), string(repo.ReadSample)); err != nil {
				return err
			}
			q.What, q.ReadBack, q.Passphrase = args, repo.ReadBack(readBack), a.passphraseOf("HOLDFAST_TO_PASSPHRASE", "Passphrase of the repository to copy to: ")
			results, err := a.open().Copy(cmd.Context(), q)
			if err != nil {
				return err
			}
			for i := range results {
				results[i].Error = oneLine(results[i].Error)
			}
			if err := a.result(list(results), func() string { return copyText(results, q) }); err != nil {
				return err
			}
			for _, r := range results {
				for _, w := range r.Warnings {
					a.note("warning: " + short(r.Point) + " of " + r.VM + ": " + oneLine(w))
				}
			}
			if interrupted(cmd.Context()) {
				return errors.Join(cmd.Context().Err(), node.CopyFailed(results))
			}
			return node.CopyFailed(results)
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.To, "to", "", "`REPOSITORY` to copy to")
	f.StringVar(&readBack, "read-back", string(repo.ReadAll), "of what is sent: `HOW` much, all or sample")
	f.BoolVar(&q.DryRun, "dry-run", false, "only list what would be copied, and the most that would be sent")
	must(cmd.RegisterFlagCompletionFunc("read-back", choices(string(repo.ReadAll), string(repo.ReadSample))))
	return cmd
}

func copyText(results []replica.Result, q node.CopyRequest) string {
	if len(results) == 0 {
		return "Nothing to copy: no restore point is missing there.\n"
	}
	if q.DryRun {
		return planText(results)
	}
	t := newTable("VM", "POINT", "OF", "STATE", ">READ", ">NEW", ">STORED", ">TIME", "READ WHOLE BECAUSE")
	var remarks strings.Builder
	for _, r := range results {
		switch r.State {
		case replica.Copied:
			t.add(r.VM, short(r.Point), clock(r.Time), string(r.State), size(r.ReadBytes), size(r.NewBytes), size(r.StoredBytes), took(seconds(r.Seconds)), oneLine(r.FullReason))
		case replica.There:
			t.add(r.VM, short(r.Point), clock(r.Time), string(r.State), "", "", "", "", "")
		default:
			of := ""
			if r.Point != "" {
				of = clock(r.Time)
			}
			t.add(r.VM, short(r.Point), of, string(r.State), "", "", "", took(seconds(r.Seconds)), "")
		}
	}
	return t.String() + reasons(results, &remarks)
}

func planText(results []replica.Result) string {
	t := newTable("VM", "POINT", "OF", "STATE", ">AT MOST", "READ WHOLE BECAUSE")
	var remarks strings.Builder
	var total int64
	n := 0
	for _, r := range results {
		of, most := "", ""
		if r.Point != "" {
			of = clock(r.Time)
		}
		if r.State == replica.Planned {
			n, total, most = n+1, total+r.ReadBytes, size(r.ReadBytes)
		}
		t.add(r.VM, short(r.Point), of, string(r.State), most, oneLine(r.FullReason))
	}
	fmt.Fprintf(&remarks, "%s would be copied: at most %s before compression, less what is there by chance.\n", count(n, "restore point"), size(total))
	return t.String() + reasons(results, &remarks)
}

// reasons adds why points failed, where the error does not say it.
func reasons(results []replica.Result, b *strings.Builder) string {
	if _, many := node.CopyFailed(results).(interface{ Unwrap() []error }); many {
		for _, r := range results {
			if r.Err != nil {
				fmt.Fprintf(b, "%s: %s\n", strings.TrimSpace(short(r.Point)+" "+r.VM), r.Error)
			}
		}
	}
	return b.String()
}
