package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/internal/blob"
	"holdfast/internal/node"
	"holdfast/internal/repo"
)

// app is one run of the program.
type app struct {
	stdout, stderr io.Writer

	// Flags of all commands.
	repo   string
	json   bool
	quiet  bool
	limits struct{ up, down string } // as typed
	rates  blob.Rates

	compression repo.Compression // of the command backup

	progress *progress
	node     *node.Node
}

func newApp(stdout, stderr io.Writer) *app { return &app{stdout: stdout, stderr: stderr} }

// open makes the Node, once the flags are known.
func (a *app) open() *node.Node {
	if a.node != nil {
		return a.node
	}
	a.progress = newProgress(a.stderr, a.quiet)
	if a.repo == "" {
		a.repo = os.Getenv("HOLDFAST_REPO")
	}
	a.node = node.New(node.Options{
		Repo:        a.repo,
		Passphrase:  a.passphrase,
		Report:      node.Report{Task: a.progress.task, Note: a.note},
		Compression: a.compression,
		Rates:       a.rates,
	})
	return a.node
}

// note writes a line for the operator.
func (a *app) note(line string) {
	if a.progress != nil {
		a.progress.note(line)
	}
}

// settle ends the progress display: what follows is the result.
func (a *app) settle() {
	if a.progress != nil {
		a.progress.close()
	}
}

func (a *app) close() error {
	a.settle()
	if a.node == nil {
		return nil
	}
	return a.node.Close()
}

const longHelp = `Holdfast backs up whole virtual machines while they run, keeps every restore
point complete, and brings a lost machine back in seconds by running it straight
from its backup, then moves it to production storage while it runs.

The repository is a directory, or s3://BUCKET/PREFIX, named by --repo or
HOLDFAST_REPO. Its passphrase comes from HOLDFAST_PASSPHRASE, from the file
HOLDFAST_PASSPHRASE_FILE, or from a prompt. What this machine must remember lies
in HOLDFAST_STATE.

HOST is a libvirt URI (qemu:///system, qemu+ssh://root@kvm1/system) or a
directory of disk images. POINT is a restore point's id, a prefix of one of at
least four digits, or VM@latest.`

const rootExample = `  export HOLDFAST_REPO=/backup/holdfast HOLDFAST_PASSPHRASE_FILE=/root/passphrase
  holdfast init
  holdfast backup qemu:///system
  holdfast points
  holdfast recover web@latest --host qemu:///system --storage /var/lib/libvirt/images
  holdfast migrate $(holdfast sessions --json | jq -r '.[0].session')`

// root is the command with all its verbs.
func (a *app) root() *cobra.Command {
	cobra.EnableCommandSorting = false // they are listed in the order of their use
	root := &cobra.Command{
		Use:           "holdfast",
		Short:         "Back up virtual machines, and run a lost one from its backup",
		Long:          longHelp,
		Example:       rootExample,
		Args:          cobra.ArbitraryArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(*cobra.Command, []string) (err error) {
			a.rates, err = a.limited()
			return err
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			return unknownCommand(cmd, args[0])
		},
	}
	root.SetOut(a.stdout)
	root.SetErr(a.stderr)
	root.SuggestionsMinimumDistance = 2
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%w; see \"%s --help\"", err, cmd.CommandPath())
	})
	flags := root.PersistentFlags()
	flags.StringVarP(&a.repo, "repo", "r", "", "`DIRECTORY` of the repository, or s3:// URL (default $HOLDFAST_REPO)")
	flags.StringVar(&a.limits.up, "limit-up", "", "most `BYTES` per second to the repository, as 20MiB (default $HOLDFAST_LIMIT_UP)")
	flags.StringVar(&a.limits.down, "limit-down", "", "most `BYTES` per second from the repository (default $HOLDFAST_LIMIT_DOWN)")
	flags.BoolVar(&a.json, "json", false, "write results to stdout as JSON")
	flags.BoolVarP(&a.quiet, "quiet", "q", false, "no progress and no remarks on stderr, errors only")
	root.AddGroup(
		&cobra.Group{ID: "backup", Title: "Back up:"},
		&cobra.Group{ID: "restore", Title: "Restore points and what is in them:"},
		&cobra.Group{ID: "recover", Title: "Run from the backup:"},
		&cobra.Group{ID: "care", Title: "Look after the repository:"},
	)
	root.AddCommand(
		a.initCommand(), a.vms(), a.backup(), a.copy(),
		a.points(), a.show(), a.restore(), a.image(), a.publish(),
		a.recover(), a.migrate(), a.undo(), a.sessions(), a.resume(), a.unpin(),
		a.check(), a.repair(), a.forget(), a.keep(), a.prune(), a.tier(), a.key(), a.harden(), a.mechanic(),
		a.version(), a.serve(), a.thaw(),
	)
	for _, cmd := range root.Commands() {
		cmd.DisableFlagsInUseLine = true
	}
	root.SetHelpCommand(&cobra.Command{Use: "help [COMMAND]", Short: "Help about a command", Args: cobra.ArbitraryArgs, RunE: help})
	return root
}

// help is "holdfast help COMMAND".
func help(cmd *cobra.Command, args []string) error {
	about, rest, err := cmd.Root().Find(args)
	if err != nil || len(rest) > 0 {
		return unknownCommand(cmd.Root(), args[0])
	}
	about.InitDefaultHelpFlag()
	return about.Help()
}

func unknownCommand(root *cobra.Command, name string) error {
	if s := root.SuggestionsFor(name); len(s) > 0 {
		return usagef("unknown command %q; did you mean %q?", name, strings.Join(s, "\" or \""))
	}
	return usagef("unknown command %q; \"holdfast help\" lists them", name)
}

func usagef(format string, args ...any) error {
	return &node.UsageError{Err: fmt.Errorf(format, args...)}
}

// args checks the number of a command's arguments; most < 0 means any number.
func args(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		what := ""
		switch {
		case len(args) < least:
			what = "too few arguments"
		case most >= 0 && len(args) > most:
			what = fmt.Sprintf("unexpected argument %q", args[most])
		default:
			return nil
		}
		return usagef("%s; usage: %s", what, cmd.UseLine())
	}
}

// required refuses flags that were not given.
func required(cmd *cobra.Command, names ...string) error {
	for _, name := range names {
		if f := cmd.Flags().Lookup(name); f.Value.String() == "" {
			return usagef("--%s is missing; usage: %s", name, cmd.UseLine())
		}
	}
	return nil
}

// oneOf refuses a flag's value that is none of those.
func oneOf(flag, value string, values ...string) error {
	for _, v := range values {
		if value == v {
			return nil
		}
	}
	return usagef("--%s %q is none of %s", flag, value, strings.Join(values, ", "))
}

// interrupted reports whether a signal ended the context.
func interrupted(ctx context.Context) bool { return errors.Is(context.Cause(ctx), errInterrupted) }
