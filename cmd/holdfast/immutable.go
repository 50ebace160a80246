package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/repo"
	"holdfast/internal/retention"
)

// parseRule reads a rule on immutability; "" and "off" are none.
func parseRule(period, mode string) (repo.Immutability, error) {
	if mode != "" && mode != "governance" && mode != "compliance" {
		return repo.Immutability{}, usagef("mode %q is neither governance nor compliance", mode)
	}
	if period == "" || period == "off" {
		return repo.Immutability{}, nil
	}
	p, err := retention.ParsePeriod(period)
	if err != nil {
		return repo.Immutability{}, usagef("%w, or off", err)
	}
	days := p.Days + (p.Hours+23)/24 + 31*p.Months + 366*p.Years
	if days > repo.MaxImmutableDays {
		return repo.Immutability{}, usagef("%s is longer than a hundred years", period)
	}
	return repo.Immutability{Days: days, Mode: mode}, nil
}

func (a *app) warnCompliance(rule repo.Immutability) {
	if rule.Days > 0 && rule.Mode == "compliance" && !a.quiet {
		fmt.Fprintf(a.stderr, "warning: in compliance mode nobody can undo this, not the owner of the store either: what is backed up cannot be deleted, and has to be paid for, for %d to %d days\n", rule.Days, rule.Days+8)
	}
}

func (a *app) repoImmutable() *cobra.Command {
	var mode string
	cmd := &cobra.Command{
		Use:   "immutable [PERIOD|off] [--mode governance|compliance]",
		Short: "Show or set for how long restore points cannot be deleted",
		Long: `Show for how long restore points cannot be deleted from the store, or set it. The
store must be able to lock objects (a bucket with Object Lock); that it keeps its
locks is tried before anything is set. Every machine that backs up here follows.

From then on, before a restore point exists, all that it needs is locked for that
long and a week at most, and read back. What restore points need that are there
already is locked now. Who has stolen what a backup needs to write can delete or
overwrite nothing of it for good; "holdfast check" finds and undoes what he did.

In governance mode who has a special right on the store can end a lock early, in
compliance mode nobody can: not you either. "off" ends the rule for new restore
points; what is locked stays locked until its time.`,
		Example: `  holdfast repo immutable
  holdfast repo immutable 30d
  holdfast repo immutable 90d --mode compliance
  holdfast repo immutable off`,
		Args:              args(0, 1),
		ValidArgsFunction: choices("14d", "30d", "90d", "off"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				if mode != "" {
					return usagef("--mode needs a PERIOD; usage: %s", cmd.UseLine())
				}
				rule, err := a.open().Immutable(cmd.Context())
				if err != nil {
					return err
				}
				return a.result(rule, func() string { return ruleText(rule) })
			}
			rule, err := parseRule(args[0], mode)
			if err != nil {
				return err
			}
			a.warnCompliance(rule)
			if rule, err = a.open().SetImmutable(cmd.Context(), rule); err != nil {
				return err
			}
			return a.result(rule, func() string { return ruleText(rule) })
		},
	}
	cmd.Flags().StringVar(&mode, "mode", "", "who may end a lock, `MODE` governance (a special right on the store, the default) or compliance (nobody)")
	return cmd
}

func ruleText(r repo.Immutability) string {
	switch {
	case r.Days > 0:
		return fmt.Sprintf("Restore points cannot be deleted for %s (%s).\n", count(r.Days, "day"), r.Mode)
	case r.Mode != "":
		return "Nothing is locked any more. What is locked stays locked until its time.\n"
	}
	return "Nothing is locked.\n"
}

// lockedText says what prune has left alone.
func lockedText(r *repo.PruneReport) string {
	until := ""
	if r.LockedUntil != nil {
		until = ", the last of them until " + r.LockedUntil.Local().Format(time.DateOnly)
	}
	return fmt.Sprintf("%s (%s) would go or be rewritten, and are locked%s: a prune after that frees them.", count(r.Locked, "pack"), size(r.LockedBytes), until)
}

// locksText says what check found of locks.
func locksText(l *repo.LockReport, keyless bool) string {
	if keyless {
		return "a deletion was tried\n"
	}
	text := fmt.Sprintf("a deletion was tried, the locks of %s read", count(l.Objects, "object"))
	if l.Locked > 0 {
		text += fmt.Sprintf(", %d locked now", l.Locked)
	}
	return text + "\n"
}
