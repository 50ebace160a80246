package main

import (
	"context"
	"os"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/node"
	"holdfast/internal/recovery"
)

// Completion never asks for a passphrase and never takes long: what it cannot
// find out at once it does not offer.
const completionLimit = 2 * time.Second

type completer = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective)

// choices offers a flag's values.
func choices(values ...string) completer {
	return func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return values, cobra.ShellCompDirectiveNoFileComp
	}
}

// quick runs f with a Node, for as long as a completion may take.
func (a *app) quick(f func(context.Context, *node.Node) []string) []string {
	ctx, cancel := context.WithTimeout(context.Background(), completionLimit)
	defer cancel()
	a.quiet = true
	return f(ctx, a.open())
}

// unlockable reports whether a passphrase is to be had without asking.
func unlockable() bool {
	return os.Getenv("HOLDFAST_PASSPHRASE") != "" || os.Getenv("HOLDFAST_PASSPHRASE_FILE") != ""
}

// completeHost offers directories and the usual URI.
func (a *app) completeHost(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return []string{"qemu:///system"}, cobra.ShellCompDirectiveDefault
}

// completeHostVMs offers a host, then its VMs.
func (a *app) completeHostVMs(cmd *cobra.Command, args []string, part string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 {
		return a.completeHost(cmd, args, part)
	}
	return a.quick(func(ctx context.Context, n *node.Node) (names []string) {
		vms, err := n.VMs(ctx, args[0])
		if err != nil {
			return nil
		}
		for _, vm := range vms {
			names = append(names, vm.Name)
		}
		return names
	}), cobra.ShellCompDirectiveNoFileComp
}

// completeHistory offers the names of VMs that have restore points.
func (a *app) completeHistory(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.completePoints(args, func(p pointView) []string { return []string{p.VM} })
}

// completeVMOrPoint offers names of VMs with restore points, and points.
func (a *app) completeVMOrPoint(_ *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.completePoints(nil, func(p pointView) []string {
		return []string{p.VM, p.VM + "@latest", short(p.ID) + "\t" + p.VM + ", " + clock(p.Time)}
	})
}

// completePoint offers VM@latest and ids.
func (a *app) completePoint(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.completePoints(args, func(p pointView) []string {
		return []string{p.VM + "@latest", short(p.ID) + "\t" + p.VM + ", " + clock(p.Time)}
	})
}

func (a *app) completePoints(args []string, offer func(pointView) []string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 || !unlockable() {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.quick(func(ctx context.Context, n *node.Node) (names []string) {
		points, err := n.Points(ctx, "")
		if err != nil {
			return nil
		}
		seen := map[string]bool{}
		for _, p := range points {
			for _, name := range offer(viewPoint(p)) {
				if !seen[name] {
					seen[name] = true
					names = append(names, name)
				}
			}
		}
		return names
	}), cobra.ShellCompDirectiveNoFileComp
}

// completeVMsAndPoints offers both, any number of times.
func (a *app) completeVMsAndPoints(_ *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.completePoints(nil, func(p pointView) []string {
		return []string{p.VM, p.VM + "@latest", short(p.ID) + "\t" + p.VM + ", " + clock(p.Time)}
	})
}

// completeSession offers the ids of sessions.
func (a *app) completeSession(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.quick(func(_ context.Context, n *node.Node) (ids []string) {
		infos, err := n.Sessions()
		if err != nil {
			return nil
		}
		for _, i := range infos {
			if i.State != recovery.Done {
				ids = append(ids, i.ID+"\t"+sessionVM(i.Record)+", "+string(i.State))
			}
		}
		return ids
	}), cobra.ShellCompDirectiveNoFileComp
}
