package main

import (
	"log/slog"
	"os"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"

	"holdfast/internal/node"
)

// servingMemory is the limit of a process that serves: most of it is the cache
// of chunks, which is never garbage, and it shall stay below 256 MB with the
// program itself and the index that is mapped.
const servingMemory = 200 << 20

// serve is the detached process that serves a session.
func (a *app) serve() *cobra.Command {
	return &cobra.Command{
		Use:    "serve SESSION",
		Short:  "Serve a session (started by recover, publish and resume)",
		Hidden: true,
		Args:   args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			a.quiet = true
			debug.SetMemoryLimit(servingMemory)
			log := slog.New(slog.NewTextHandler(os.Stderr, nil))
			return a.open().Serve(cmd.Context(), args[0], os.Stdin, os.Stdout, log)
		},
	}
}

// thaw is the detached process that guards a frozen guest.
func (a *app) thaw() *cobra.Command {
	return &cobra.Command{
		Use:    "thaw URI UUID LIMIT",
		Short:  "Watch over a frozen guest (started by backup)",
		Hidden: true,
		Args:   args(3, 3),
		RunE: func(cmd *cobra.Command, args []string) error {
			limit, err := time.ParseDuration(args[2])
			if err != nil {
				return usagef("%w", err)
			}
			return node.Thaw(cmd.Context(), os.Stdin, os.Stdout, args[0], args[1], limit)
		},
	}
}
