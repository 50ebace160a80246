package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/internal/node"
	"holdfast/internal/repo"
)

func (a *app) tier() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "tier",
		GroupID: "care",
		Short:   "Keep old data in a further store",
		Long: `A tier is a further store of the repository, a directory or s3:// URL. Backups go
to the repository's own store; "tier move" brings what is old to the tier. All is
read wherever it lies. A tier also holds a copy of keys, index and restore points:
if the own store is lost, --repo with the tier's location restores all that was
brought there.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.tierAdd(), a.tierList(), a.tierMove(), a.tierRemove())
	for _, c := range cmd.Commands() {
		c.DisableFlagsInUseLine = true
	}
	return cmd
}

// tierView is a tier in what the commands write.
type tierView struct {
	Tier       string `json:"tier"`
	Location   string `json:"location"`
	OlderThan  string `json:"older_than"`
	Copy       bool   `json:"copy"`
	Emptying   bool   `json:"emptying"`
	Reachable  bool   `json:"reachable"`
	Problem    string `json:"problem,omitempty"`
	Packs      int    `json:"packs"`
	Bytes      int64  `json:"bytes"`
	OnlyPacks  int    `json:"only_packs"`
	OnlyBytes  int64  `json:"only_bytes"`
	Points     int    `json:"points"`
	ChainEntry uint64 `json:"chain_entry"`
}

func viewTier(t repo.Tier) tierView {
	return tierView{Tier: t.Name, Location: t.Location, OlderThan: t.OlderThan, Copy: t.Copy, Emptying: t.Back, Reachable: true}
}

func (v tierView) policy() string {
	what := "moved"
	if v.Copy {
		what = "copied"
	}
	if v.OlderThan == "0" {
		return what + " at once"
	}
	return what + " after " + v.OlderThan
}

func (a *app) tierAdd() *cobra.Command {
	var q node.TierRequest
	cmd := &cobra.Command{
		Use:   "add NAME LOCATION [--older-than 14d] [--copy]",
		Short: "Add a tier, or change its location or policy",
		Long: `Add a store: a directory or s3:// URL with nothing in it, or with what this tier
has left there before. Nothing is moved yet. With the NAME of a tier that there is,
its location and policy are changed.`,
		Example: `  holdfast tier add s3 s3://archive/holdfast?region=eu-central-1 --older-than 14d
  holdfast tier add nas /mnt/nas/holdfast --copy --older-than 0`,
		Args: args(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			q.Name, q.Location = args[0], args[1]
			t, err := a.open().AddTier(cmd.Context(), q)
			if err != nil {
				return err
			}
			v := viewTier(t)
			return a.result(v, func() string {
				return fmt.Sprintf("Tier %s is %s; data is %s. \"holdfast tier move\" does it.\n", v.Tier, v.Location, v.policy())
			})
		},
	}
	cmd.Flags().StringVar(&q.OlderThan, "older-than", "14d", "bring what is older than `PERIOD` there: 12h, 14d, 8w, 6m (months), or 0 for everything")
	cmd.Flags().BoolVar(&q.Copy, "copy", false, "leave it in the repository's own store as well")
	return cmd
}

func (a *app) tierList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the tiers and what is in them",
		Long: `List the tiers: how much lies there, how much of it nowhere else, and how many
restore points the tier alone would give back.`,
		Example: `  holdfast tier list
  holdfast tier list --json`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			infos, mirror, err := a.open().Tiers(cmd.Context())
			if err != nil {
				return err
			}
			views := []tierView{}
			for _, i := range infos {
				v := viewTier(i.Tier)
				v.Problem = oneLine(i.Problem)
				v.Reachable = v.Problem == ""
				v.Packs, v.Bytes, v.OnlyPacks, v.OnlyBytes, v.Points, v.ChainEntry = i.Packs, i.Bytes, i.Only, i.OnlyBytes, i.Points, i.Entry
				views = append(views, v)
			}
			if err := a.result(views, func() string { return tiersText(views) }); err != nil {
				return err
			}
			if mirror != "" {
				a.note("This is tier " + mirror + " of the repository: it can be restored from, and not written to.")
			}
			return nil
		},
	}
}

func tiersText(views []tierView) string {
	if len(views) == 0 {
		return "No tiers: all lies in the repository's own store.\n"
	}
	t := newTable("TIER", "LOCATION", "DATA IS", ">PACKS", ">SIZE", ">ONLY THERE", ">POINTS", "STATE")
	for _, v := range views {
		if !v.Reachable {
			t.add(v.Tier, v.Location, v.policy(), "?", "?", "?", "?", v.Problem)
			continue
		}
		state := "in use"
		if v.Emptying {
			state = "being emptied"
		}
		t.add(v.Tier, v.Location, v.policy(), fmt.Sprint(v.Packs), size(v.Bytes), size(v.OnlyBytes), fmt.Sprint(v.Points), state)
	}
	return t.String()
}

func (a *app) tierMove() *cobra.Command {
	var q node.MoveRequest
	var readBack string
	var wait bool
	cmd := &cobra.Command{
		Use:   "move [NAME] [--older-than PERIOD] [--copy] [--back]",
		Short: "Bring old data to the tiers, or back",
		Long: `Bring data to the tier NAME, or to all tiers, as their policies say. Only what has
been read back there is deleted in the repository's own store; what is locked there
stays until its lock is over. Maps of disks are copied at once and stay, too.
It may be interrupted at any time, is called again, and may run beside everything.

--back empties a tier: all of it is brought to the repository's own store, and
nothing more goes there until it is moved to by its name.
--wait ends runs that move data the other way and have died.`,
		Example: `  holdfast tier move
  holdfast tier move s3 --older-than 30d --dry-run
  holdfast tier move s3 --back`,
		Args:              args(0, 1),
		ValidArgsFunction: a.completeTier,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := oneOf("read-back", readBack, string(repo.ReadAll), string(repo.ReadSample)); err != nil {
				return err
			}
			q.ReadBack = repo.ReadBack(readBack)
			if len(args) > 0 {
				q.Tier = args[0]
			}
			if wait {
				q.Wait = pruneWait
			}
			reports, err := a.open().Move(cmd.Context(), q)
			if err != nil && len(reports) == 0 {
				return err
			}
			if werr := a.result(list(reports), func() string { return movesText(reports) }); err == nil {
				err = werr
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.OlderThan, "older-than", "", "what is older than `PERIOD`, in place of the tier's policy")
	f.BoolVar(&q.Copy, "copy", false, "leave it in the repository's own store as well")
	f.BoolVar(&q.Back, "back", false, "bring all of it back and empty the tier")
	f.BoolVar(&q.DryRun, "dry-run", false, "say what would be moved, change nothing")
	f.BoolVar(&wait, "wait", false, "wait for runs that move data the other way to end or to show a sign of life, and end dead ones")
	f.StringVar(&readBack, "read-back", string(repo.ReadAll), "of what is brought: `HOW` much, all or sample")
	must(cmd.RegisterFlagCompletionFunc("read-back", choices(string(repo.ReadAll), string(repo.ReadSample))))
	return cmd
}

func movesText(reports []*repo.MoveReport) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	if len(reports) == 0 {
		line("No tier to move to.")
	}
	for _, r := range reports {
		verb, to, from := "", "there", "here"
		if r.DryRun {
			verb = "would be "
		}
		if r.Back {
			to, from = "here", "there"
		}
		line("Tier %s: %s (%s) %scopied %s, %s (%s) %sdeleted %s.", r.Tier,
			count(r.Copied, "pack"), size(r.CopiedBytes), verb, to, count(r.Freed, "pack"), size(r.FreedBytes), verb, from)
		if r.Locked > 0 {
			line("%s locked and stay until their locks are over.", count(r.Locked, "pack"))
		}
		if r.Garbage > 0 {
			line("%s there that nothing needs: for \"holdfast prune\".", count(r.Garbage, "pack"))
		}
		for _, s := range r.Revoked {
			line("Run %s showed no sign of life and was ended.", s)
		}
		for _, n := range r.Notes {
			line("Note: %s.", oneLine(n))
		}
	}
	return b.String()
}

func (a *app) tierRemove() *cobra.Command {
	var q node.RemoveTierRequest
	var wait bool
	cmd := &cobra.Command{
		Use:   "remove NAME",
		Short: "Take a tier out of the repository",
		Long: `Take a tier out of the repository. What lies there is not touched; it may be
deleted afterwards. It is refused while something is only there: empty the tier
first, with "tier move NAME --back".

--force gives up what is only there, when the tier is lost; "check" then says what
restore points lack, and the next backups store it anew.
--take-over is for when the repository's own store is lost, and --repo names the
tier: that becomes the repository's own store and can be written to. What had not
been brought there is lost. Of several tiers it is the one that knows most. If the old store turns up again, do not use it.`,
		Example: `  holdfast tier move s3 --back && holdfast tier remove s3
  holdfast tier remove s3 --take-over --repo s3://archive/holdfast?region=eu-central-1`,
		Args:              args(1, 1),
		ValidArgsFunction: a.completeTier,
		RunE: func(cmd *cobra.Command, args []string) error {
			q.Name = args[0]
			if wait {
				q.Wait = pruneWait
			}
			removal, err := a.open().RemoveTier(cmd.Context(), q)
			if err != nil {
				return err
			}
			return a.result(removal, func() string { return removalText(removal, q) })
		},
	}
	f := cmd.Flags()
	f.BoolVar(&q.Force, "force", false, "though data is only there: it is lost then")
	f.BoolVar(&q.TakeOver, "take-over", false, "the repository's own store is lost, and --repo names the tier: go on there")
	f.BoolVar(&q.DryRun, "dry-run", false, "only see whether it can be removed")
	f.BoolVar(&wait, "wait", false, "wait for runs that move data there to end or to show a sign of life, and end dead ones")
	return cmd
}

func removalText(r *repo.TierRemoval, q node.RemoveTierRequest) string {
	switch {
	case q.DryRun:
		return fmt.Sprintf("Tier %s would be removed. Nothing was changed.\n", r.Tier)
	case q.TakeOver:
		return fmt.Sprintf("%s is the repository's own store now. \"holdfast check\" says what it lacks; back up the VMs.\n", r.Location)
	}
	text := fmt.Sprintf("Tier %s is removed. What is left in %s may be deleted.\n", r.Tier, r.Location)
	if r.Only > 0 {
		text += fmt.Sprintf("%s (%s) were only there: \"holdfast check\" says what is lost.\n", count(r.Only, "pack"), size(r.Bytes))
	}
	return text
}

// completeTier offers the names of tiers.
func (a *app) completeTier(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 || !unlockable() {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.quick(func(ctx context.Context, n *node.Node) []string {
		names, err := n.TierNames(ctx)
		if err != nil {
			return nil
		}
		return names
	}), cobra.ShellCompDirectiveNoFileComp
}
