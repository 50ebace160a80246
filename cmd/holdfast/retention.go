package main

import (
	"cmp"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/node"
	"holdfast/internal/repo"
	"holdfast/internal/retention"
)

// forgetView is what forget writes.
type forgetView struct {
	DryRun bool            `json:"dry_run"`
	Points []forgottenView `json:"points"`
}

type forgottenView struct {
	ID      string    `json:"id"`
	VM      string    `json:"vm"`
	Host    string    `json:"host"`
	Time    time.Time `json:"time"`
	Keep    bool      `json:"keep"`
	Reasons []string  `json:"reasons"`
}

func (a *app) forget() *cobra.Command {
	var o node.ForgetOptions
	var within string
	cmd := &cobra.Command{
		Use:     "forget [VM] [--keep-... N] | POINT...",
		GroupID: "care",
		Short:   "Drop restore points, by rules or by name",
		Long: `Drop the restore points of a VM, or of all VMs, that no rule keeps, or the ones
that are named. Each VM is looked at alone. A rule such as --keep-daily 7 keeps the
newest restore point of each of the last 7 days that have one, days as they are
counted here. A restore point stays when any rule keeps it, when it is marked
("holdfast keep"), or, without --allow-last, when it is its VM's last.

What is dropped is gone from "points" at once; "holdfast prune" frees its space.
The data of a restore point from which a session runs stays until that ends.
--dry-run says what would stay and why, and changes nothing.`,
		Example: `  holdfast forget --keep-daily 7 --keep-weekly 4 --keep-monthly 12 --dry-run
  holdfast forget web --keep-last 3 --keep-within 30d
  holdfast forget 3f9c2a10 web@latest`,
		Args:              args(0, -1),
		ValidArgsFunction: a.completeVMOrPoint,
		RunE: func(cmd *cobra.Command, args []string) error {
			if within != "" {
				p, err := retention.ParsePeriod(within)
				if err != nil {
					return usagef("--keep-within: %w", err)
				}
				o.Rules.Within = p
			}
			for _, n := range []int{o.Rules.Last, o.Rules.Hourly, o.Rules.Daily, o.Rules.Weekly, o.Rules.Monthly, o.Rules.Yearly} {
				if n < 0 {
					return usagef("a number of restore points to keep is not negative")
				}
			}
			if len(args) == 0 && o.Rules.Empty() {
				return usagef("say what stays, as in --keep-daily 7 --keep-weekly 4, or name restore points")
			}
			o.Now = time.Now()
			list, err := a.open().ForgetPoints(cmd.Context(), args, o)
			if err != nil {
				return err
			}
			v := forgetView{DryRun: o.DryRun, Points: []forgottenView{}}
			for _, f := range list {
				p := f.Point
				v.Points = append(v.Points, forgottenView{string(p.ID), p.VM, p.Host, p.Time, f.Keep, f.Reasons})
			}
			return a.result(v, func() string { return forgetText(v) })
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.Rules.Last, "keep-last", 0, "keep the newest `N`")
	f.IntVar(&o.Rules.Hourly, "keep-hourly", 0, "keep the newest of each of the last `N` hours")
	f.IntVar(&o.Rules.Daily, "keep-daily", 0, "keep the newest of each of the last `N` days")
	f.IntVar(&o.Rules.Weekly, "keep-weekly", 0, "keep the newest of each of the last `N` weeks, which begin on Monday")
	f.IntVar(&o.Rules.Monthly, "keep-monthly", 0, "keep the newest of each of the last `N` months")
	f.IntVar(&o.Rules.Yearly, "keep-yearly", 0, "keep the newest of each of the last `N` years")
	f.StringVar(&within, "keep-within", "", "keep all of the last `PERIOD`: 12h, 30d, 8w, 6m (months), 1y")
	f.BoolVar(&o.Rules.AllowLast, "allow-last", false, "let a VM's last restore point go too")
	f.BoolVar(&o.DryRun, "dry-run", false, "say what would stay and why, change nothing")
	return cmd
}

func forgetText(v forgetView) string {
	t := newTable("POINT", "VM", "TIME", "", "BECAUSE")
	gone := 0
	for _, p := range v.Points {
		what := "stays"
		if !p.Keep {
			what = "goes"
			gone++
		}
		t.add(short(p.ID), p.VM, clock(p.Time), what, oneLine(strings.Join(p.Reasons, ", ")))
	}
	text := ""
	if len(v.Points) > 0 {
		text = t.String()
	}
	switch {
	case v.DryRun:
		return text + fmt.Sprintf("%s would be forgotten, %d would stay. Nothing was changed.\n", count(gone, "restore point"), len(v.Points)-gone)
	case gone == 0:
		return text + "Nothing to forget.\n"
	}
	return text + fmt.Sprintf("%s forgotten. \"holdfast prune\" frees the space.\n", count(gone, "restore point"))
}

func (a *app) keep() *cobra.Command {
	var until string
	var forever, clear bool
	cmd := &cobra.Command{
		Use:     "keep POINT [--until DATE|--forever|--clear]",
		GroupID: "care",
		Short:   "Mark a restore point to stay",
		Long: `Mark a restore point to stay, whatever the rules of "forget" say: for ever, or
until the end of a day, or until a time. --clear takes the mark off.`,
		Example: `  holdfast keep web@latest
  holdfast keep 3f9c2a10 --until 2027-12-31
  holdfast keep 3f9c2a10 --clear`,
		Args:              args(1, 1),
		ValidArgsFunction: a.completePoint,
		RunE: func(cmd *cobra.Command, args []string) error {
			mark, err := parseUntil(until, forever, clear, time.Now())
			if err != nil {
				return err
			}
			p, err := a.open().Keep(cmd.Context(), args[0], mark)
			if err != nil {
				return err
			}
			v := viewPoint(p)
			return a.result(v, func() string {
				return fmt.Sprintf("Restore point %s of %s, %s: stays %s.\n", short(p.ID), p.VM, clock(p.Time), keepText(v.Keep))
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&until, "until", "", "until the end of `DATE` (2027-12-31), or a time (2027-12-31T18:00:00Z)")
	f.BoolVar(&forever, "forever", false, "until the mark is taken off (the default)")
	f.BoolVar(&clear, "clear", false, "take the mark off")
	return cmd
}

// parseUntil reads the flags of keep.
func parseUntil(until string, forever, clear bool, now time.Time) (repo.Until, error) {
	n := 0
	for _, given := range []bool{until != "", forever, clear} {
		if given {
			n++
		}
	}
	switch {
	case n > 1:
		return "", usagef("give one of --until, --forever and --clear")
	case clear:
		return "", nil
	case until == "":
		return repo.Forever, nil
	}
	t, err := time.Parse(time.RFC3339, until)
	if err != nil {
		if t, err = time.ParseInLocation("2006-01-02", until, now.Location()); err != nil {
			return "", usagef("--until %q is neither a date (2027-12-31) nor a time (2027-12-31T18:00:00Z)", until)
		}
		t = t.AddDate(0, 0, 1) // to the end of that day
	}
	if !t.After(now) {
		return "", usagef("--until %s is over; --clear takes a mark off", until)
	}
	return repo.UntilTime(t), nil
}

// keepText says until when a point stays.
func keepText(until string) string {
	return cmp.Or(repo.Until(until).In(time.Local), "as long as the rules say")
}

// pruneWait is how long prune --wait watches a run: fifteen of the beats that
// every run gives each minute.
const pruneWait = 15 * time.Minute

func (a *app) prune() *cobra.Command {
	var o node.PruneOptions
	var wait bool
	cmd := &cobra.Command{
		Use:     "prune",
		GroupID: "care",
		Short:   "Free the space of what no restore point needs",
		Long: `Free what no restore point needs any more, in two steps: what is not needed is put
into quarantine, where no backup counts on it; and it is removed when no backup is
left that began before. When no backup is under way, both happen at once; else the
rest is removed by the next prune, and what waits for which run is said. Packs of
which little is needed are rewritten. Prune may be interrupted at any time, and may
run beside everything.

--wait watches runs that something waits for, for 15 minutes at most. A run gives a
sign of life every minute; one that gives none has died, and is ended.
--dry-run says what would be freed, and changes nothing.`,
		Example: `  holdfast prune --dry-run
  holdfast prune
  holdfast prune --wait`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if wait {
				o.Wait = pruneWait
			}
			report, err := a.open().Prune(cmd.Context(), o)
			if report == nil {
				return err
			}
			report.WaitsFor, report.Revoked = list(report.WaitsFor), list(report.Revoked)
			if werr := a.result(report, func() string { return pruneText(report) }); err == nil {
				err = werr
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "say what would be freed, change nothing")
	cmd.Flags().BoolVar(&wait, "wait", false, "wait for runs under way to end or to show a sign of life, and end dead ones")
	return cmd
}

func pruneText(r *repo.PruneReport) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	would := func(was, would string) string {
		if r.DryRun {
			return would
		}
		return was
	}
	if r.Quarantined > 0 {
		line("%s (%s) %s.", count(r.Quarantined, "pack"), size(r.QuarantinedBytes), would("put into quarantine", "would be put into quarantine"))
	}
	if r.Rewritten > 0 {
		line("%s of them %s: %s copied to new packs.", count(r.Rewritten, "pack"), would("rewritten", "would be rewritten"), size(r.CopiedBytes))
	}
	if r.Removed > 0 {
		line("%s (%s) %s.", count(r.Removed, "pack"), size(r.RemovedBytes), would("removed", "would be removed"))
	}
	if r.Locked > 0 {
		line("%s", lockedText(r))
	}
	if r.Quarantined+r.Removed+r.Waiting+r.Locked == 0 {
		line("Nothing to free.")
	}
	if r.Waiting > 0 {
		line("%s (%s) %s for these runs to end, and for another prune after that:", count(r.Waiting, "pack"), size(r.WaitingBytes), would("wait", "would wait"))
		t := newTable("RUN", "HOST", ">PID")
		for _, l := range r.WaitsFor {
			t.add(l.Session, l.Host, fmt.Sprint(l.PID))
		}
		b.WriteString(t.String())
		line("If one of them has died, \"holdfast prune --wait\" finds out and ends it.")
	}
	for _, s := range r.Revoked {
		line("Run %s showed no sign of life and was ended.", s)
	}
	if r.Merged > 0 {
		line("%s %s into few large ones.", count(r.Merged, "small index object"), would("merged", "would be merged"))
	}
	if r.Checkpoint > 0 {
		line("The whole state %s entry %d of the chain, so that opening the repository stays quick.", would("is now in", "would be in"), r.Checkpoint)
	}
	if r.RemovedEntries > 0 {
		line("%d entries of the chain that need not be read any more removed.", r.RemovedEntries)
	}
	for _, n := range r.Notes {
		line("Note: %s.", oneLine(n))
	}
	for id, n := range r.Lost {
		line("Restore point %s lacks %s: \"holdfast check\" says more.", short(id), count(n, "chunk"))
	}
	net := r.RemovedBytes - r.CopiedBytes
	line("%s needed by %s%s; %s.", size(r.LiveBytes), count(r.Points, "restore point"), pinnedText(r.Pinned), freedText(net, r.DryRun))
	return b.String()
}

func pinnedText(n int) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf(" and %d forgotten but in use", n)
}

func freedText(net int64, dry bool) string {
	what := size(max(net, 0))
	if net < 0 {
		what = "nothing yet, " + size(-net) + " more in use"
	}
	if dry {
		return what + " would be freed"
	}
	return what + " freed"
}

func (a *app) unpin() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:     "unpin SESSION --force",
		GroupID: "recover",
		Short:   "Let go of the restore points of a session that is gone",
		Long: `Remove the pins of a session from the repository. A session holds its restore
point until "undo" or the end of "migrate"; this is for one whose machine is gone
for good. If it runs after all, it loses its data at the next prune after its
restore point is forgotten.`,
		Example: `  holdfast show web@latest
  holdfast unpin 5f0a6c1d9b2e4f38 --force`,
		Args:              args(1, 1),
		ValidArgsFunction: a.completeSession,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !force {
				return usagef("if session %s still runs, it may lose its data: \"holdfast undo %s\" ends it where it runs; when it is gone for certain, add --force", args[0], args[0])
			}
			session, points, err := a.open().Unpin(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			v := struct {
				Session string         `json:"session"`
				Points  []repo.PointID `json:"points"`
			}{session, points}
			return a.result(v, func() string {
				return fmt.Sprintf("Session %s holds %s no more.\n", session, count(len(points), "restore point"))
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "the session is gone for certain")
	return cmd
}
