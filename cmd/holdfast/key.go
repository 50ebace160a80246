package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"holdfast/internal/node"
	"holdfast/internal/repo"
)

func (a *app) key() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "key",
		GroupID: "care",
		Short:   "Passphrases and recovery keys, and changing the keys behind them",
		Long: `A repository is opened by any of its keys: passphrases, and recovery keys made
for paper. Each has an id and may have a label, which the store can read.

Without a key nobody can restore anything: print a recovery key and keep it away
from the repository and from this machine.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.keyList(), a.keyAdd(), a.keyRecovery(), a.keyRemove(), a.keyRotate(), a.keyExport(), a.keyImport())
	for _, c := range cmd.Commands() {
		c.DisableFlagsInUseLine = true
	}
	return cmd
}

func (a *app) keyList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List what opens the repository",
		Long: `List what opens the repository. "*" marks the key that opened it now.

A key is current; or old: replaced or removed, the next change of keys deletes
it; or unfinished: made by a change that was cut off or is under way; or damaged.`,
		Example: `  holdfast key list
  holdfast key list --json`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			keys, err := a.open().Keys(cmd.Context())
			if err != nil {
				return err
			}
			keys.Slots = list(keys.Slots)
			return a.result(keys, func() string {
				return keyTable(keys.Slots) + fmt.Sprintf("Keyring %d, generation %d, %s.\n", keys.Number, keys.Generation, count(keys.Masters, "master key"))
			})
		},
	}
}

func keyTable(slots []repo.Slot) string {
	t := newTable("KEY", "", "LABEL", "KIND", "MADE", "STATE")
	for _, s := range slots {
		mark, made := "", ""
		if s.InUse {
			mark = "*"
		}
		if !s.Created.IsZero() {
			made = clock(s.Created)
		}
		state := string(s.State)
		if s.Problem != "" {
			state = oneLine(s.Problem)
		}
		t.add(short(s.ID), mark, s.Label, string(s.Kind), made, state)
	}
	return t.String()
}

func (a *app) keyAdd() *cobra.Command {
	var label string
	cmd := &cobra.Command{
		Use:   "add [--label LABEL]",
		Short: "Add a passphrase",
		Long: `Add a passphrase that opens the repository beside those that do. It is asked for
twice, or comes from HOLDFAST_NEW_PASSPHRASE, or from the file
HOLDFAST_NEW_PASSPHRASE_FILE.`,
		Example: `  holdfast key add --label "second site"
  HOLDFAST_NEW_PASSPHRASE_FILE=/root/second holdfast key add --label "second site"`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			slot, err := a.open().AddKey(cmd.Context(), label, a.newPassphrase)
			if err != nil {
				return err
			}
			return a.result(slot, func() string { return fmt.Sprintf("Passphrase added: key %s.\n", short(slot.ID)) })
		},
	}
	cmd.Flags().StringVar(&label, "label", "", "`LABEL` to tell it by; stored in clear")
	return cmd
}

func (a *app) keyRecovery() *cobra.Command {
	var label, out string
	cmd := &cobra.Command{
		Use:   "recovery [--label LABEL] [--out FILE]",
		Short: "Make a recovery key and print it",
		Long: `Make a recovery key: 256 random bits as 13 groups of letters and digits, to be
printed. It opens the repository wherever a passphrase is asked for; typed with
any spaces, dashes and line ends, in either case. A mistyped group is named.

It is shown this once and stored nowhere. The print-out also says which
repository it belongs to, where that was, and how far its chain of commits had
come. Several may be made; "key remove" removes one.`,
		Example: `  holdfast key recovery --label "safe, 2nd floor" | lp
  holdfast key recovery --out /media/stick/holdfast-recovery.txt`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				sheet, err := a.open().AddRecovery(cmd.Context(), label)
				if err != nil {
					return err
				}
				return a.result(sheet, func() string { return sheetText(sheet) })
			}
			// The file first: else there would be a key that nobody has seen.
			f, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				return err
			}
			sheet, err := a.open().AddRecovery(cmd.Context(), label)
			if err != nil {
				return closeNew(f, err)
			}
			_, err = f.WriteString(sheetText(sheet))
			if err = closeNew(f, err); err != nil {
				return fmt.Errorf("write the recovery key: %w; remove it with \"holdfast key remove %s\" and make another one", err, short(sheet.ID))
			}
			return a.result(sheet.Slot, func() string {
				return fmt.Sprintf("Recovery key %s is in %s. Print it and delete the file.\n", short(sheet.ID), out)
			})
		},
	}
	cmd.Flags().StringVar(&label, "label", "", "`LABEL` to tell it by; stored in clear")
	cmd.Flags().StringVar(&out, "out", "", "write it to a new `FILE` that only its owner can read")
	return cmd
}

// closeNew closes a new file, which goes when it is not whole.
func closeNew(f *os.File, err error) error {
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		err = errors.Join(err, os.Remove(f.Name()))
	}
	return err
}

// sheetText is the print-out of a recovery key.
func sheetText(s node.RecoverySheet) string {
	groups := strings.Split(s.Key, "-")
	var b strings.Builder
	b.WriteString("HOLDFAST RECOVERY KEY\n\n")
	for _, line := range [][]string{groups[:5], groups[5:9], groups[9:]} {
		fmt.Fprintf(&b, "    %s\n", strings.Join(line, "-"))
	}
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s%s\n", name, strings.TrimSpace(fmt.Sprintf(format, args...)))
	}
	b.WriteString("\n")
	line("repository", "%s", s.Repository)
	line("location", "%s", s.Location)
	line("key", "%s %s", s.ID, s.Label)
	line("made", "%s", clock(s.Created))
	line("chain", "entry %d, %s; an older one there is an older copy of the repository", s.Entry, clock(s.EntryTime))
	b.WriteString(`
Whoever has this and the repository can read all backups. Type it where Holdfast
asks for the passphrase. Keep it away from the repository and its machines.
`)
	return b.String()
}

func (a *app) keyRemove() *cobra.Command {
	var q node.RemoveKeyRequest
	cmd := &cobra.Command{
		Use:   "remove KEY [--own] [--dry-run]",
		Short: "Remove a passphrase or recovery key",
		Long: `Remove a passphrase or recovery key: it opens the repository no more. KEY is its
id, the beginning of it (four digits or more), or its label.

The last key is never removed; the one that opened the repository now only with
--own. Whoever knew it may have kept what it opened: when it fell into wrong
hands, "key rotate --root" protects what is stored from then on.`,
		Example: `  holdfast key remove "second site" --dry-run
  holdfast key remove 1b4e28ba`,
		Args:              args(1, 1),
		ValidArgsFunction: a.completeKey,
		RunE: func(cmd *cobra.Command, args []string) error {
			q.Key = args[0]
			slot, err := a.open().RemoveKey(cmd.Context(), q)
			if err != nil {
				return err
			}
			v := struct {
				repo.Slot
				DryRun bool `json:"dry_run"`
			}{slot, q.DryRun}
			return a.result(v, func() string {
				if q.DryRun {
					return "Would be removed:\n" + keyTable([]repo.Slot{slot})
				}
				return fmt.Sprintf("Key %s is removed.\n", strings.TrimSpace(short(slot.ID)+" "+slot.Label))
			})
		},
	}
	cmd.Flags().BoolVar(&q.Own, "own", false, "even if it is the key that opened the repository now")
	cmd.Flags().BoolVarP(&q.DryRun, "dry-run", "n", false, "only say which one it would be")
	return cmd
}

func (a *app) keyRotate() *cobra.Command {
	var root bool
	var q node.RotateRootRequest
	cmd := &cobra.Command{
		Use:   "rotate [--root [--drop-others] [--dry-run]]",
		Short: "Change the keys for what is stored from now on",
		Long: `Make a new master key, with which all is sealed that is stored from now on. All
passphrases and recovery keys go on to work, and so do commands under way.

With --root the key behind the passphrases is changed too. A passphrase or
recovery key goes over to the new one only if it is typed: the one that opens the
repository now does by itself, for the others the terminal is asked; those left
empty open the repository no more. --drop-others asks nobody and drops them all.

What was stored before keeps its keys, so whoever has seen those can read that
still, if he reaches the store. The keys that name chunks and sign commits never
change: when they fell into the hands of somebody who can write to the store, copy
the restore points to a new repository.`,
		Example: `  holdfast key rotate
  holdfast key rotate --root --dry-run
  holdfast key rotate --root`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !root {
				if q.DropOthers || q.DryRun {
					return usagef("--drop-others and --dry-run go with --root")
				}
				ring, err := a.open().RotateKeys(cmd.Context())
				if err != nil {
					return err
				}
				return a.result(ring, func() string {
					return fmt.Sprintf("New data is sealed with master key %d.\n", ring.Masters)
				})
			}
			if term.IsTerminal(int(os.Stdin.Fd())) {
				q.Ask = a.oldPassphrase
			}
			change, err := a.open().RotateRoot(cmd.Context(), q)
			if err != nil {
				return err
			}
			change.Kept, change.Dropped = list(change.Kept), list(change.Dropped)
			v := struct {
				repo.RootChange
				DryRun bool `json:"dry_run"`
			}{change, q.DryRun}
			return a.result(v, func() string { return rotateText(change, q.DryRun) })
		},
	}
	cmd.Flags().BoolVar(&root, "root", false, "change the key behind the passphrases too")
	cmd.Flags().BoolVar(&q.DropOthers, "drop-others", false, "keep only the passphrase that opens the repository now")
	cmd.Flags().BoolVarP(&q.DryRun, "dry-run", "n", false, "only list what goes over by itself, and what would have to be typed")
	return cmd
}

// oldPassphrase asks for what opens another slot.
func (a *app) oldPassphrase(ctx context.Context, s repo.Slot) ([]byte, error) {
	what := "Passphrase"
	if s.Kind == repo.Recovery {
		what = "Recovery key"
	}
	name := strings.TrimSpace(short(s.ID) + " " + s.Label)
	return a.prompt(ctx, int(os.Stdin.Fd()), fmt.Sprintf("%s of key %s (empty: it will open the repository no more): ", what, name))
}

func rotateText(c repo.RootChange, dryRun bool) string {
	var b strings.Builder
	if dryRun {
		b.WriteString("Goes over to a new root key by itself:\n" + keyTable(c.Kept))
		if len(c.Dropped) > 0 {
			b.WriteString("Must be typed, or opens the repository no more:\n" + keyTable(c.Dropped))
		}
		return b.String()
	}
	fmt.Fprintf(&b, "Keyring %d, generation %d: new data is sealed with master key %d.\nThese open the repository:\n", c.Number, c.Generation, c.Masters)
	b.WriteString(keyTable(c.Kept))
	if len(c.Dropped) > 0 {
		b.WriteString("These do no more:\n" + keyTable(c.Dropped))
	}
	return b.String()
}

func (a *app) keyExport() *cobra.Command {
	return &cobra.Command{
		Use:   "export FILE",
		Short: "Write a file from which lost keys can be put back",
		Long: `Write all that opens the repository to a new file: its configuration, its key
slots and its keyrings, sealed as they are. Without these few kilobytes a
repository of any size is lost; with the file "key import" puts them back.

The file opens nothing without a passphrase or recovery key. It does not follow
later changes: export again after each.`,
		Example: `  holdfast key export /media/stick/holdfast-keys.json`,
		Args:    args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			content, err := a.open().ExportKeys(cmd.Context())
			if err != nil {
				return err
			}
			f, err := os.OpenFile(args[0], os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				return err
			}
			_, err = f.Write(content)
			if err := closeNew(f, err); err != nil {
				return err
			}
			v := struct {
				File  string `json:"file"`
				Bytes int    `json:"bytes"`
			}{args[0], len(content)}
			return a.result(v, func() string { return fmt.Sprintf("The keys are in %s, sealed.\n", args[0]) })
		},
	}
}

func (a *app) keyImport() *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "import FILE [--dry-run]",
		Short: "Put lost keys back from a file",
		Long: `Put back what a file of "key export" has and the repository lacks. Nothing that is
there is changed; what is damaged there is listed: move it away and import again.

Then the repository is opened, to see that it does. Passphrases that were removed
after the export come back only when no other key is left.`,
		Example: `  holdfast key import /media/stick/holdfast-keys.json --dry-run
  holdfast key import /media/stick/holdfast-keys.json`,
		Args: args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			done, err := a.open().ImportKeys(cmd.Context(), args[0], dryRun)
			if err != nil {
				return err
			}
			done.Put, done.There, done.Differs, done.Old = list(done.Put), list(done.There), list(done.Differs), list(done.Old)
			v := struct {
				repo.KeyImport
				DryRun bool `json:"dry_run"`
			}{done, dryRun}
			return a.result(v, func() string { return importText(done, dryRun) })
		},
	}
	cmd.Flags().BoolVarP(&dryRun, "dry-run", "n", false, "only list what is missing")
	return cmd
}

func importText(k repo.KeyImport, dryRun bool) string {
	var b strings.Builder
	put := "put back"
	if dryRun {
		put = "would be put back"
	}
	for _, l := range []struct {
		what  string
		names []string
	}{{put, k.Put}, {"there, but not what the file has; never touched", k.Differs}, {"of keys that were replaced since; left out", k.Old}} {
		for _, name := range l.names {
			fmt.Fprintf(&b, "%s: %s\n", name, l.what)
		}
	}
	fmt.Fprintf(&b, "%s of %s: %d missing, %d there.\n", "Keys of repository "+short(k.Repository), clock(k.Made), len(k.Put), len(k.There))
	return b.String()
}

// completeKey offers the ids of keys.
func (a *app) completeKey(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 || !unlockable() {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.quick(func(ctx context.Context, n *node.Node) (ids []string) {
		keys, err := n.Keys(ctx)
		if err != nil {
			return nil
		}
		for _, s := range keys.Slots {
			ids = append(ids, short(s.ID)+"\t"+strings.TrimSpace(s.Label+" "+string(s.Kind)))
		}
		return ids
	}), cobra.ShellCompDirectiveNoFileComp
}
