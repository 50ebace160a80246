package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/node"
	"holdfast/internal/repo"
)

// errVandal is the result of a check that has undone something.
var errVandal = errors.New("somebody had deleted or overwritten what the repository needs, and it is back")

// errDamage is the result of a check that found some.
var errDamage = errors.New("the repository is damaged")

// percent is the flag --read-data[=PERCENT].
type percent float64

func (p *percent) Type() string { return "PERCENT" }

func (p *percent) String() string { return strconv.FormatFloat(float64(*p), 'g', -1, 64) }

func (p *percent) Set(s string) error {
	f, err := strconv.ParseFloat(strings.TrimSuffix(s, "%"), 64)
	if err != nil || !(f > 0 && f <= 100) {
		return errors.New("a percentage is more than 0 and at most 100")
	}
	*p = percent(f)
	return nil
}

func readDataFlag(cmd *cobra.Command, p *percent) {
	cmd.Flags().Var(p, "read-data", "read and authenticate every stored byte, or `PERCENT` of them, those read the longest ago first")
	cmd.Flags().Lookup("read-data").NoOptDefVal = "100"
	cmd.Flags().Lookup("read-data").DefValue = "0"
}

func (a *app) check() *cobra.Command {
	var readData percent
	var keyless bool
	cmd := &cobra.Command{
		Use:     "check",
		GroupID: "care",
		Short:   "Prove that all restore points are whole",
		Long: `Prove that the repository holds all that its restore points need: the chain of
commits, every index and every pack in its length, and for every disk of every
restore point its map and the place of each chunk. With --read-data every stored
byte is read and authenticated too; with --read-data=10 a tenth of them, those
that this machine has read the longest ago, so that ten checks read everything.

Damage is listed and remembered: the next backups store again what they meet of
it, and "holdfast repair --from" does so from another repository. What was wrong
once and right when it was read again is told, and is no damage.

With --keyless no passphrase is asked for: whoever keeps the store proves that
all that should be there is there, unchanged, and sees nothing of what it is.

Where the store keeps versions, what somebody has deleted or overwritten there is
found, and brought back, also when the repository does not even open. With a rule
on immutability the store is tried for its locks, those of all that restore points
need are read, and what is not locked long enough is locked.

The exit status is 1 when something is damaged, or was brought back.`,
		Example: `  holdfast check
  holdfast check --read-data=5 --quiet
  holdfast check --keyless --read-data --json --repo /srv/their-repository`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			began := time.Now()
			report, err := a.open().Check(cmd.Context(), node.CheckRequest{ReadData: float64(readData), Keyless: keyless})
			if err != nil {
				return err
			}
			listProblems(report)
			if err := a.result(report, func() string { return checkText(report, readData > 0, keyless, time.Since(began)) }); err != nil {
				return err
			}
			return damage(report, keyless)
		},
	}
	readDataFlag(cmd, &readData)
	cmd.Flags().BoolVar(&keyless, "keyless", false, "ask for no passphrase; prove what can be proved without it")
	return cmd
}

func listProblems(r *repo.CheckReport) {
	r.Problems, r.Transient, r.Undeleted = list(r.Problems), list(r.Transient), list(r.Undeleted)
}

func problemTable(problems []repo.Problem) string {
	if len(problems) == 0 {
		return ""
	}
	t := newTable("OBJECT", "POINT", "WHAT")
	for _, p := range problems {
		t.add(p.Object, short(p.Point), oneLine(p.What))
	}
	return t.String()
}

func checkText(r *repo.CheckReport, readData, keyless bool, d time.Duration) string {
	var b strings.Builder
	b.WriteString(problemTable(r.Problems))
	for _, p := range r.Transient {
		fmt.Fprintf(&b, "%s: %s when it was read first, and was right the second time: look at the memory, cables and disks on the way to it\n", p.Object, oneLine(p.What))
	}
	if r.Elsewhere > 0 {
		fmt.Fprintf(&b, "%s of these %s not in this store: what lies in another one is proved there\n", count(r.Elsewhere, "pack"), is(r.Elsewhere))
	}
	if n := len(r.Undeleted); n > 0 {
		fmt.Fprintf(&b, "%s back that somebody had deleted or overwritten\n", count(n, "object"))
	}
	if r.Locks != nil {
		fmt.Fprintf(&b, "immutable for %s (%s): %s", count(r.Locks.Days, "day"), r.Locks.Mode, locksText(r.Locks, keyless))
	}
	read := "their data was not read (--read-data)"
	if readData {
		read = size(r.ReadBytes) + " read and authenticated"
		if r.Unread > 0 {
			read += fmt.Sprintf(", %s never read by this machine", count(r.Unread, "pack"))
		}
	}
	points := count(r.Points, "restore point") + ", "
	if keyless {
		points = ""
	}
	fmt.Fprintf(&b, "%s%s of %s, %s: %s; %s, %s\n",
		points, count(r.Packs, "pack"), size(r.PackBytes), count(r.Entries, "commit"), count(len(r.Problems), "problem"), read, took(d))
	return b.String()
}

func is(n int) string {
	if n == 1 {
		return "is"
	}
	return "are"
}

// damage is the error of a report with problems.
func damage(r *repo.CheckReport, keyless bool) error {
	if n := len(r.Undeleted); len(r.Problems) == 0 && n > 0 {
		return fmt.Errorf("%w: %s; nothing is lost, but find out who, and change the store's credentials", errVandal, count(n, "object"))
	}
	if len(r.Problems) == 0 {
		return nil
	}
	points := pointsOf(r.Problems)
	advice := "no restore point has lost anything: \"holdfast repair\" stores anew what is left of what is damaged"
	switch {
	case keyless:
		advice = "whoever has the passphrase learns from \"holdfast check\" what that means for restore points"
	case points > 0:
		advice = count(points, "restore point") + " lost data: back up the VMs again, the next runs store anew what they meet of it"
	}
	return fmt.Errorf("%w: %s; %s", errDamage, count(len(r.Problems), "problem"), advice)
}

func pointsOf(problems []repo.Problem) int {
	points := map[repo.PointID]bool{}
	for _, p := range problems {
		if p.Point != "" {
			points[p.Point] = true
		}
	}
	return len(points)
}

func (a *app) repair() *cobra.Command {
	var q node.RepairRequest
	var readData percent
	cmd := &cobra.Command{
		Use:     "repair [--from REPOSITORY]",
		GroupID: "care",
		Short:   "Store lost data anew, from another repository",
		Long: `Check the repository, rebuild index objects that are lost, mark damaged data as
lost, and store it anew from another repository with the same VMs: what lies at
the same place of the same disk, in a copy of the restore point or in another
one of the same VM, is taken when it is exactly what is lost.

Nothing is overwritten and nothing deleted; it may be interrupted and called
again. Without --from the next backups store anew what they meet.

The other repository's passphrase comes from HOLDFAST_FROM_PASSPHRASE, from the
file HOLDFAST_FROM_PASSPHRASE_FILE, or from a prompt.

The exit status is 1 when restore points still lack something.`,
		Example: `  holdfast repair --from /mnt/second/holdfast --read-data`,
		Args:    args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			q.Passphrase = a.passphraseOf("HOLDFAST_FROM_PASSPHRASE", "Passphrase of the repository to repair from: ")
			q.Check.ReadData = float64(readData)
			began := time.Now()
			report, err := a.open().Repair(cmd.Context(), q)
			if err != nil {
				return err
			}
			listProblems(report.Check)
			report.Left = list(report.Left)
			if err := a.result(report, func() string { return repairText(report, q, time.Since(began)) }); err != nil {
				return err
			}
			if n := pointsOf(report.Left); n > 0 {
				return fmt.Errorf("%w: %s without all data; back up the VMs again, or repair from another copy", errDamage, count(n, "restore point"))
			}
			return nil
		},
	}
	readDataFlag(cmd, &readData)
	cmd.Flags().StringVar(&q.From, "from", "", "`REPOSITORY` that has the same VMs")
	return cmd
}

func repairText(r *repo.RepairReport, q node.RepairRequest, d time.Duration) string {
	var b strings.Builder
	b.WriteString(problemTable(r.Check.Problems))
	if len(r.Check.Problems) > 0 && len(r.Left) > 0 && q.From != "" {
		b.WriteString("Left:\n" + problemTable(r.Left))
	}
	fmt.Fprintf(&b, "%s; %s and %s stored anew, %s; restore points that still lack data: %d; %s\n", count(len(r.Check.Problems), "problem"),
		count(r.Chunks, "chunk"), count(r.Nodes, "map node"), size(r.Bytes), pointsOf(r.Left), took(d))
	return b.String()
}
