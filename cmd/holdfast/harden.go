package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/node"
	"holdfast/internal/retention"
)

// errLocksBroken is the result of a status that found locks not in force.
var errLocksBroken = errors.New("locked objects are not protected any more")

func (a *app) harden() *cobra.Command {
	var q node.HardenRequest
	var longest string
	cmd := &cobra.Command{
		Use:     "harden DIR [--user USER] [--once | --release | --status]",
		GroupID: "backup",
		Short:   "Keep a repository's directory so that backups cannot be deleted",
		Long: `Run as root, on the Linux machine that has the filesystem, beside a repository
that an unprivileged user writes: here, or through a mount over NFS or SMB. What
that user asks to be locked gets the immutable attribute until its time has
passed. Until then neither that user, nor whoever has taken over the account,
can delete or change it; root of this machine can.

With --user the directory is prepared first: its directories become root's, its
objects that user's. It stays until it is stopped; a service of its own is the
place for it. With --once it answers what is asked now, ends what is over, and
returns. --release only ends the locks that are over. --status looks at every
object.

When the clock jumps ahead, locks end only after that time was lived through.
Nothing is ever deleted.`,
		Example: `  holdfast harden /srv/holdfast --user backup --dry-run
  holdfast harden /srv/holdfast --user backup --once
  holdfast harden /srv/holdfast
  holdfast harden /srv/holdfast --status`,
		Args: args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			q.Dir = args[0]
			if err := hardenUsage(q); err != nil {
				return err
			}
			if longest != "" {
				p, err := retention.ParsePeriod(longest)
				if err != nil {
					return usagef("--longest: %w", err)
				}
				if q.User == "" {
					return usagef("--longest goes with --user")
				}
				now := time.Now()
				q.Longest = now.Sub(p.Before(now))
			}
			if q.Status {
				return a.hardenStatus(cmd, q.Dir)
			}
			return a.hardenKeep(cmd, q)
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.User, "user", "", "prepare the directory for this `USER`, who writes the repository: a name, or UID:GID")
	f.StringVar(&longest, "longest", "", "with --user: the longest `PERIOD` that a lock may be asked for ahead, as 1y (default 1100d)")
	f.BoolVar(&q.Once, "once", false, "do what is to be done now, and return")
	f.BoolVar(&q.Release, "release", false, "only end the locks that are over")
	f.BoolVar(&q.Status, "status", false, "look at every object and tell how the locks stand")
	f.BoolVar(&q.DryRun, "dry-run", false, "with --user or --release: tell what would be done")
	return cmd
}

func hardenUsage(q node.HardenRequest) error {
	modes := 0
	for _, m := range []bool{q.Once, q.Release, q.Status} {
		if m {
			modes++
		}
	}
	switch {
	case modes > 1:
		return usagef("say one of --once, --release and --status")
	case q.User != "" && (q.Release || q.Status):
		return usagef("--user does not go with --release and --status")
	case q.DryRun && q.User == "" && !q.Release:
		return usagef("--dry-run goes with --user or --release")
	}
	return nil
}

func (a *app) hardenKeep(cmd *cobra.Command, q node.HardenRequest) error {
	stays := !q.Once && !q.Release && !q.DryRun
	var writeErr error
	report := func(h node.Hardened) {
		h.Prepared, h.Names = list(h.Prepared), list(h.Names)
		if a.json {
			writeErr = errors.Join(writeErr, a.jsonLine(h))
		} else if h.Locked+h.Refused+h.Released == 0 {
			a.note(h.Directory + " is kept.")
		} else {
			a.note(strings.TrimSuffix(hardenText(h), "\n"))
		}
	}
	h, err := a.open().Harden(cmd.Context(), q, report)
	if err = errors.Join(err, writeErr); err != nil || stays {
		return err
	}
	h.Prepared = list(h.Prepared)
	return a.result(h, func() string { return hardenText(h) })
}

func hardenText(h node.Hardened) string {
	var b strings.Builder
	const most = 12
	for i, p := range h.Prepared {
		if i == most {
			fmt.Fprintf(&b, "… and %d more\n", len(h.Prepared)-most)
			break
		}
		b.WriteString(p + "\n")
	}
	for _, name := range h.Names {
		b.WriteString(name + "\n")
	}
	did := []string{}
	for _, c := range []struct {
		n    int
		what string
	}{{h.Locked, "locked"}, {h.Refused, "refused"}, {h.Released, "whose lock is over"}} {
		if c.n > 0 {
			did = append(did, count(c.n, "object")+" "+c.what)
		}
	}
	if len(did) == 0 {
		did = []string{"nothing to lock or to end"}
	}
	if h.DryRun {
		did = append(did, "nothing was changed")
	}
	fmt.Fprintf(&b, "%s: %s.\n", h.Directory, strings.Join(did, ", "))
	return b.String()
}

func (a *app) hardenStatus(cmd *cobra.Command, dir string) error {
	s, err := a.open().HardenStatus(cmd.Context(), dir)
	if err != nil {
		return err
	}
	s.Missing, s.Bare, s.Stray = list(s.Missing), list(s.Bare), list(s.Stray)
	if err := a.result(s, func() string { return hardenStatusText(s) }); err != nil {
		return err
	}
	switch {
	case s.Damaged:
		return fmt.Errorf("%w: the record of locks is damaged; see \"A hardened directory\" in the documentation", errLocksBroken)
	case len(s.Missing)+len(s.Bare) > 0:
		return fmt.Errorf("%w: %d are gone, %d have lost the attribute; somebody with root's rights, or the disk, has done that", errLocksBroken, len(s.Missing), len(s.Bare))
	}
	return nil
}

func hardenStatusText(s node.HardenStatus) string {
	t := newTable("OBJECT", "WHAT")
	for _, l := range []struct {
		names []string
		what  string
	}{{s.Missing, "locked, and gone"}, {s.Bare, "locked, and has lost the immutable attribute"}, {s.Stray, "has the attribute, and no lock is known: it stays until root removes it (chattr -i)"}} {
		for _, name := range l.names {
			t.add(name, l.what)
		}
	}
	var b strings.Builder
	if len(s.Missing)+len(s.Bare)+len(s.Stray) > 0 {
		b.WriteString(t.String())
	}
	fmt.Fprintf(&b, "%s is hardened for %s, who may lock for up to %d days: %s", s.Directory, s.User, s.Longest/(24*60*60), count(s.Locks, "lock"))
	if s.Earliest != nil {
		fmt.Fprintf(&b, ", the first ends %s, the last %s", clock(*s.Earliest), clock(*s.Latest))
	}
	if s.Due > 0 {
		fmt.Fprintf(&b, ", %d to be ended", s.Due)
	}
	fmt.Fprintf(&b, ". Last kept %s.\n", clock(s.Seen))
	if s.BehindSeconds > 60 {
		fmt.Fprintf(&b, "The clock has gone ahead: locks end %s later, until that was lived through.\n", took(seconds(float64(s.BehindSeconds))))
	}
	return b.String()
}
