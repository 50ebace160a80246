package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/internal/repo"
)

// mechanic is the command "repo", with what a mechanic needs.
func (a *app) mechanic() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "repo",
		GroupID: "care",
		Short:   "Look into the repository, and make it immutable",
		Long: `Look into the repository: numbers, packs, and any stored object taken apart. The
names are those of docs/format.md. Nothing but "immutable" changes anything.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.repoStats(), a.repoPacks(), a.repoCat(), a.repoIndex(), a.repoImmutable())
	for _, c := range cmd.Commands() {
		c.DisableFlagsInUseLine = true
	}
	return cmd
}

func (a *app) repoStats() *cobra.Command {
	return &cobra.Command{
		Use:   "stats",
		Short: "Count what the repository holds",
		Long: `Count what the repository holds: restore points, chunks before and after
compression, packs. All index objects and all disk maps are read for it.

Deduplication is what the disks of all restore points hold without zeros, by what
is stored of it before compression. Data that no restore point needs any more
counts as stored.`,
		Example: `  holdfast repo stats
  holdfast repo stats --json`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := a.open().Stats(cmd.Context())
			if err != nil {
				return err
			}
			return a.result(s, func() string { return statsText(s) })
		},
	}
}

func statsText(s *repo.Stats) string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-16s%s\n", name, fmt.Sprintf(format, args...))
	}
	line("repository", "%s", s.Repository)
	line("chain", "%s", plural(s.Entries, "entry", "entries"))
	line("restore points", "%d of %s", s.Points, plural(s.Histories, "history", "histories"))
	line("their disks", "%s, %s without zeros", size(s.DiskBytes), size(s.UsedBytes))
	line("stored", "%s, %s before compression", count(s.Chunks, "chunk"), size(s.PlainBytes))
	line("deduplication", "%.2f", s.Dedupe)
	line("compression", "%.2f", s.Compress)
	for _, k := range s.Kinds {
		line("packs of "+k.Kind, "%d with %d items, %s", k.Packs, k.Items, size(k.Bytes))
	}
	line("index objects", "%d", s.Indexes)
	line("quarantined", "%s", count(s.Quarantine, "pack"))
	line("distrusted", "%s", count(s.Distrusted, "item"))
	line("keys", "keyring %d, generation %d, %s", s.Keyring.Number, s.Keyring.Generation, count(s.Keyring.Masters, "master key"))
	return b.String()
}

func plural[N int | uint64](n N, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprint(n, " ", many)
}

func (a *app) repoPacks() *cobra.Command {
	return &cobra.Command{
		Use:   "packs",
		Short: "List the packs",
		Long: `List the packs that the live index objects list, by kind and name. "check" says
which of them are missing.`,
		Example: `  holdfast repo packs
  holdfast repo packs --json | jq '[.[] | select(.size < 1048576)] | length'`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			packs, err := a.open().Packs(cmd.Context())
			if err != nil {
				return err
			}
			return a.result(packs, func() string {
				t := newTable("PACK", "KIND", ">ITEMS", ">SIZE", "INDEX", "")
				for _, p := range packs {
					note := ""
					if p.Quarantined {
						note = "quarantined"
					}
					t.add(p.Pack, p.Kind, strconv.Itoa(p.Items), size(p.Size), short(p.Index), note)
				}
				return t.String()
			})
		},
	}
}

func (a *app) repoCat() *cobra.Command {
	var secrets bool
	cmd := &cobra.Command{
		Use:   "cat OBJECT [--secrets]",
		Short: "Take a stored object apart",
		Long: `Take a stored object apart and show it as JSON: its header, its clear part, and
what the keys open of it; of packs and index objects what they list. OBJECT is its
name in the store; chain/12 is entry 12. Keys are masked unless --secrets says
otherwise. What is wrong with an object is told in "problem" and "signature".`,
		Example: `  holdfast repo cat config
  holdfast repo cat chain/12
  holdfast repo cat index/$(holdfast repo index --json | jq -r '.[0].index')`,
		Args:              args(1, 1),
		ValidArgsFunction: choices("config", "chain/", "index/", "keys/", "keyring/", "packs/", "leases/", "pins/"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o, err := a.open().Object(cmd.Context(), args[0], secrets)
			if err != nil {
				return err
			}
			a.json = true
			return a.result(o, nil)
		},
	}
	cmd.Flags().BoolVar(&secrets, "secrets", false, "show the keys in a keyring: whoever sees them can read all that is stored")
	return cmd
}

func (a *app) repoIndex() *cobra.Command {
	return &cobra.Command{
		Use:   "index [ID]",
		Short: "List index objects, what one lists, or where a chunk lies",
		Long: `Without ID list the live index objects. With the ID of one, its packs and their
items; with that of a chunk or map node, all places where it is stored. An ID has
64 digits.`,
		Example: `  holdfast repo index
  holdfast repo index 1b4e28ba2fa1… --json`,
		Args: args(0, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return a.indexes(cmd)
			}
			packs, places, err := a.open().Index(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if packs != nil {
				return a.result(packs, func() string { return packItemsText(packs) })
			}
			return a.result(places, func() string {
				t := newTable("PACK", ">ITEM", ">OFFSET", ">STORED")
				for _, p := range places {
					t.add(p.Pack, number(p.Number), number(p.Offset), number(p.Stored))
				}
				return t.String()
			})
		},
	}
}

func (a *app) indexes(cmd *cobra.Command) error {
	list, err := a.open().Indexes(cmd.Context())
	if err != nil {
		return err
	}
	return a.result(list, func() string {
		t := newTable("INDEX", ">PACKS", ">ITEMS")
		for _, i := range list {
			t.add(i.Index, strconv.Itoa(i.Packs), strconv.FormatInt(i.Items, 10))
		}
		return t.String()
	})
}

func packItemsText(packs []repo.PackItems) string {
	t := newTable("PACK", "KIND", ">ITEM", "ID", ">OFFSET", ">STORED")
	for _, p := range packs {
		for _, i := range p.Items {
			t.add(short(p.Pack), p.Kind, number(i.Number), i.ID, number(i.Offset), number(i.Stored))
		}
	}
	return t.String()
}

func number(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
