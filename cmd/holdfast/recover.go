package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/node"
	"holdfast/internal/recovery"
)

func (a *app) recover() *cobra.Command {
	var q node.RecoverRequest
	var writes string
	cmd := &cobra.Command{
		Use:     "recover POINT --host HOST --storage DIR [--name NAME] [--writes WHERE] [--isolated] [--wait]",
		GroupID: "recover",
		Short:   "Run a lost VM straight from its restore point",
		Long: `Make the VM of a restore point on a host and start it, without copying its disks
first: they are read from the repository as the guest needs them. Returns when
the guest is started, with --wait when its agent answers. A process of its own
goes on serving the disks.

What the guest writes goes to an overlay in DIR on the host (--writes host), or
to one in this machine's state directory (--writes server). The restore point
never changes.

While the VM runs from its restore point, look whether it is the right one and
works, and no more: no updates, no upgrades, no drivers, until "holdfast migrate"
has made its disks local. "holdfast undo" removes everything again.

With another --name the VM gets a new identity, and can run beside the original.`,
		Example: `  holdfast recover web@latest --host qemu:///system --storage /var/lib/libvirt/images --wait
  holdfast recover web@latest --host qemu:///system --storage /srv/vm --name web-test --isolated`,
		Args:              args(1, 1),
		ValidArgsFunction: a.completePoint,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := required(cmd, "host", "storage"); err != nil {
				return err
			}
			if err := oneOf("writes", writes, "host", "server"); err != nil {
				return err
			}
			q.Writes = recovery.Writes(writes)
			return a.recovered(cmd, args[0], q)
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.Host, "host", "", "libvirt URI of the `HOST` to run it on")
	f.StringVar(&q.Storage, "storage", "", "directory `DIR` on that host for what the guest writes, and for its disks in the end")
	f.StringVar(&q.Name, "name", "", "`NAME` of the VM (default: as it was)")
	f.StringVar(&writes, "writes", "host", "`WHERE` the guest's writes go: host or server")
	f.BoolVar(&q.NewIdentity, "new-identity", false, "new UUID and MAC addresses (implied by another --name)")
	f.BoolVar(&q.Isolated, "isolated", false, "leave the VM's network interfaces unconnected")
	f.BoolVar(&q.Wait, "wait", false, "wait until the guest's agent answers")
	must(cmd.RegisterFlagCompletionFunc("writes", choices("host", "server")))
	must(cmd.MarkFlagDirname("storage"))
	return cmd
}

func (a *app) recovered(cmd *cobra.Command, point string, q node.RecoverRequest) error {
	began := time.Now()
	n := a.open()
	p, err := n.Point(cmd.Context(), point)
	if err != nil {
		return err
	}
	r, err := n.Recover(cmd.Context(), p, q)
	if err != nil {
		return err
	}
	v := viewSession(recovery.Info{Record: r})
	v.Seconds = time.Since(began).Seconds()
	return a.result(v, func() string {
		text := fmt.Sprintf("VM %s runs on %s from restore point %s, after %s.\n", v.VM, v.Host, short(v.Point), took(time.Since(began)))
		if r.Times.Answering != nil {
			text = fmt.Sprintf("VM %s runs on %s from restore point %s and answers, after %s.\n", v.VM, v.Host, short(v.Point), took(time.Since(began)))
		}
		return text + fmt.Sprintf("Session %s: \"holdfast migrate %s\" makes its disks local, \"holdfast undo %s\" removes it.\n", r.ID, r.ID, r.ID)
	})
}

func (a *app) migrate() *cobra.Command {
	var storage string
	cmd := &cobra.Command{
		Use:     "migrate SESSION [--storage DIR]",
		GroupID: "recover",
		Short:   "Make the disks of a recovered VM local while it runs",
		Long: `Copy what is not local yet of a recovered VM's disks to the host's storage while
the guest works. In the end the VM has no link to the repository left; its
network is probed through the guest agent, and its link is bounced if it is gone.

Ctrl-C stops the copying; the guest goes on as before, and "holdfast migrate"
continues where it was.`,
		Example: `  holdfast sessions
  holdfast migrate 5b0c
  holdfast migrate 5b0c --storage /srv/fast`,
		Args:              args(1, 1),
		ValidArgsFunction: a.completeSession,
		RunE: func(cmd *cobra.Command, args []string) error {
			began := time.Now()
			r, err := a.open().Migrate(cmd.Context(), args[0], storage)
			if err != nil {
				return err
			}
			v := viewSession(recovery.Info{Record: r})
			v.Seconds = time.Since(began).Seconds()
			return a.result(v, func() string {
				return fmt.Sprintf("VM %s is local: its disks lie in %s, nothing links it to the repository. Took %s.\n", v.VM, v.Storage, took(time.Since(began)))
			})
		},
	}
	cmd.Flags().StringVar(&storage, "storage", "", "directory `DIR` on the host for the disks (default: that of recover)")
	must(cmd.MarkFlagDirname("storage"))
	return cmd
}

func (a *app) undo() *cobra.Command {
	var dryRun, discard bool
	cmd := &cobra.Command{
		Use:     "undo SESSION",
		GroupID: "recover",
		Short:   "Remove a recovered VM or a publication, with all that was made for it",
		Long: `Stop and remove a recovered VM with its overlay, or end a publication. The host
is left as it was before; what the guest has written since is lost. The restore
point stays.

A VM whose disks are local already is not touched. --dry-run only lists what
would be removed. --discard removes a session whose record is damaged: what it
made on a host must then be removed by hand.`,
		Example: `  holdfast undo 5b0c --dry-run
  holdfast undo 5b0c`,
		Args:              args(1, 1),
		ValidArgsFunction: a.completeSession,
		RunE: func(cmd *cobra.Command, args []string) error {
			n := a.open()
			if discard {
				return n.Discard(args[0])
			}
			i, err := n.Session(args[0])
			if err != nil {
				return err
			}
			if dryRun {
				plan := node.UndoPlan(i)
				return a.result(undone{i.ID, sessionVM(i.Record), plan, true}, func() string {
					return "Would be removed:\n  " + strings.Join(plan, "\n  ") + "\n"
				})
			}
			if _, err := n.Undo(cmd.Context(), i.ID); err != nil {
				return err
			}
			return a.result(undone{i.ID, sessionVM(i.Record), node.UndoPlan(i), false}, func() string {
				return fmt.Sprintf("Session %s of %s is removed, with all that was made for it.\n", i.ID, sessionVM(i.Record))
			})
		},
	}
	f := cmd.Flags()
	f.BoolVar(&dryRun, "dry-run", false, "list what would be removed, and remove nothing")
	f.BoolVar(&discard, "discard", false, "remove a session whose record is damaged")
	cmd.MarkFlagsMutuallyExclusive("dry-run", "discard")
	return cmd
}

// undone is the result of undo.
type undone struct {
	Session string   `json:"session"`
	VM      string   `json:"vm"`
	Removed []string `json:"removed"`
	DryRun  bool     `json:"dry_run"`
}
