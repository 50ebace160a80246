package main

import (
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"holdfast/internal/node"
	"holdfast/internal/recovery"
)

// sessionView is a session in the output of sessions, recover and migrate.
type sessionView struct {
	Session    string         `json:"session"`
	Kind       string         `json:"kind"`
	VM         string         `json:"vm"`
	State      string         `json:"state"`
	Serving    bool           `json:"serving"`
	Changing   string         `json:"changing,omitempty"`
	Safe       string         `json:"safe,omitempty"`
	Point      string         `json:"point"`
	Repository string         `json:"repository"`
	Host       string         `json:"host,omitempty"`
	Storage    string         `json:"storage,omitempty"`
	Writes     string         `json:"writes,omitempty"`
	URIs       []string       `json:"uris"`
	Times      recovery.Times `json:"times"`
	Notes      []string       `json:"notes,omitempty"`
	Seconds    float64        `json:"seconds,omitempty"` // the command took
	Error      string         `json:"error,omitempty"`
}

// sessionVM is the name of a session's VM.
func sessionVM(r recovery.Record) string {
	if r.Name != "" {
		return r.Name
	}
	return r.VM
}

func viewSession(i recovery.Info) sessionView {
	v := sessionView{
		Session: i.ID, Kind: string(i.Kind), VM: sessionVM(i.Record), State: string(i.State), Serving: i.Serving,
		Changing: i.Changing, Safe: i.Safe, Point: string(i.Point), Repository: i.Location, Host: i.Host,
		Storage: i.Storage, Writes: string(i.Writes), URIs: []string{}, Times: i.Times, Notes: i.Notes,
	}
	if i.State != recovery.Done && i.State != recovery.Local && len(i.Publication.Listen) > 0 {
		for _, d := range i.Publication.Disks {
			v.URIs = append(v.URIs, i.Publication.URI(i.Publication.Listen[0], d.Name))
		}
	}
	if i.Kind != recovery.Recovery {
		v.Safe = "" // it is said of guests
	}
	if i.Err != nil {
		v.State, v.Error = "unreadable", oneLine(i.Err.Error())
	}
	return v
}

func (a *app) sessions() *cobra.Command {
	var all, clear bool
	cmd := &cobra.Command{
		Use:     "sessions",
		GroupID: "recover",
		Short:   "List what runs or is served from restore points",
		Long: `List the sessions of this machine: recovered VMs and publications. A session
that nobody serves ("dead") is brought back by "holdfast resume".

--all lists those too whose VM is local by now; --clear removes their records.`,
		Example: `  holdfast sessions
  holdfast sessions --json`,
		Args: args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			n := a.open()
			infos, err := n.Sessions()
			if err != nil {
				return err
			}
			if clear {
				return a.clearSessions(n, infos)
			}
			if !all {
				infos = slices.DeleteFunc(infos, func(i recovery.Info) bool { return i.State == recovery.Done })
			}
			views := []sessionView{}
			for _, i := range infos {
				views = append(views, viewSession(i))
			}
			slices.SortStableFunc(views, func(a, b sessionView) int { return a.Times.Created.Compare(b.Times.Created) })
			return a.result(views, func() string { return sessionsText(views) })
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "list those too that are done")
	cmd.Flags().BoolVar(&clear, "clear", false, "remove the records of those that are done")
	cmd.MarkFlagsMutuallyExclusive("all", "clear")
	return cmd
}

// clearSessions removes the records of sessions that are done.
func (a *app) clearSessions(n *node.Node, infos []recovery.Info) error {
	cleared := []string{}
	for _, i := range infos {
		if i.State == recovery.Done {
			if err := n.Forget(i.ID); err != nil {
				return err
			}
			cleared = append(cleared, i.ID)
		}
	}
	return a.result(cleared, func() string { return fmt.Sprintf("Removed the records of %s.\n", count(len(cleared), "session")) })
}

func sessionsText(sessions []sessionView) string {
	if len(sessions) == 0 {
		return "No sessions: nothing runs or is served from a restore point.\n"
	}
	t := newTable("SESSION", "VM", "STATE", "SERVED", "SINCE", "POINT", "WHERE")
	var remarks strings.Builder
	for _, s := range sessions {
		served, where := "dead", s.Host
		if s.Serving {
			served = "yes"
		} else if s.State == string(recovery.Local) || s.State == string(recovery.Done) || s.State == string(recovery.Undone) {
			served = "no"
		}
		if where == "" {
			where = strings.Join(s.URIs, " ")
		}
		if s.Changing != "" {
			served += ", " + s.Changing
		}
		if s.Error != "" {
			t.add(s.Session, "", s.State, "", "", "", "")
			fmt.Fprintf(&remarks, "%s: %s\n", s.Session, s.Error)
			continue
		}
		t.add(s.Session, s.VM, s.State, served, clock(s.Times.Created), short(s.Point), where)
		if s.Safe != "" {
			fmt.Fprintf(&remarks, "%s may be used for: %s\n", s.VM, s.Safe)
		}
	}
	return t.String() + remarks.String()
}

// resumedView is what resume did for one session.
type resumedView struct {
	Session string `json:"session"`
	VM      string `json:"vm"`
	State   string `json:"state"`
	Did     string `json:"did"`
	Error   string `json:"error,omitempty"`
}

func (a *app) resume() *cobra.Command {
	return &cobra.Command{
		Use:     "resume",
		GroupID: "recover",
		Short:   "Serve all sessions again whose process has died",
		Long: `Bring every session back whose serving process has died, after a crash or a
restart of this machine, and let guests go on that were paused for it. Nothing
that a guest was told is written is lost. Calling it again does no harm; run it
when the machine starts.`,
		Example: `  holdfast resume`,
		Args:    args(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			resumed, err := a.open().Resume(cmd.Context())
			if err != nil {
				return err
			}
			views := []resumedView{}
			var errs []error
			for _, r := range resumed {
				if r.State == recovery.Done && r.Err == nil {
					continue
				}
				v := resumedView{Session: r.Session, VM: r.VM, State: string(r.State), Did: r.Did}
				if r.Err != nil {
					v.Error = oneLine(r.Err.Error())
					errs = append(errs, fmt.Errorf("session %s: %w", r.Session, r.Err))
				}
				views = append(views, v)
			}
			if err := a.result(views, func() string { return resumedText(views) }); err != nil {
				return err
			}
			return errors.Join(errs...)
		},
	}
}

func resumedText(views []resumedView) string {
	if len(views) == 0 {
		return "No sessions to resume.\n"
	}
	t := newTable("SESSION", "VM", "STATE", "DONE")
	for _, v := range views {
		did := v.Did
		switch {
		case v.Error != "":
			did = "failed: " + v.Error
		case did == "":
			did = "nothing to do"
		}
		t.add(v.Session, v.VM, v.State, did)
	}
	return t.String()
}

func (a *app) publish() *cobra.Command {
	var q node.PublishRequest
	var detach bool
	cmd := &cobra.Command{
		Use:     "publish POINT --nbd (unix:PATH | ADDRESS) [--disk DISK] [--overlay DIR] [--tls-cert FILE --tls-key FILE] [--detach]",
		GroupID: "restore",
		Short:   "Serve a restore point's disks over NBD",
		Long: `Serve the disks of a restore point over the NBD protocol, for qemu-img, qemu-nbd,
nbd-client or libnbd, until Ctrl-C; with --detach in the background until
"holdfast undo". Each disk is an export of its name.

The disks are read-only, or with --overlay writable: what is written goes to that
directory, never to the restore point.

Whoever can connect can read. A Unix socket is open to its owner only; an address
other than 127.0.0.1 is open to the network, and encrypted only with --tls-cert
and --tls-key, which admit nobody without TLS.`,
		Example: `  holdfast publish web@latest --nbd unix:/run/web.sock
  holdfast publish 3f9c2a10 --disk vda --nbd 127.0.0.1:10809 --overlay /srv/overlay --detach
  qemu-img map nbd+unix:///vda?socket=/run/web.sock`,
		Args:              args(1, 1),
		ValidArgsFunction: a.completePoint,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := required(cmd, "nbd"); err != nil {
				return err
			}
			if (q.TLSCert == "") != (q.TLSKey == "") {
				return usagef("--tls-cert and --tls-key go together")
			}
			n := a.open()
			p, err := n.Point(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if detach {
				session, uris, err := n.PublishDetached(cmd.Context(), p, q)
				if err != nil {
					return err
				}
				return a.ready(session, uris, fmt.Sprintf("\"holdfast undo %s\" ends it", session))
			}
			debug.SetMemoryLimit(servingMemory)
			err = n.Publish(cmd.Context(), p, q, func(session string, uris []string) error { return a.ready(session, uris, "Ctrl-C ends it") })
			if err == nil && !interrupted(cmd.Context()) {
				err = errors.New("the server ended by itself")
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.Listen, "nbd", "", "`WHERE` to listen: unix:PATH, HOST:PORT, HOST or :PORT (10809 by default)")
	f.StringVar(&q.Disk, "disk", "", "only `DISK`")
	f.StringVar(&q.Overlay, "overlay", "", "make the disks writable: directory `DIR` for what is written")
	f.StringVar(&q.TLSCert, "tls-cert", "", "certificate `FILE` (PEM): clients must use TLS")
	f.StringVar(&q.TLSKey, "tls-key", "", "key `FILE` of the certificate (PEM)")
	f.BoolVar(&detach, "detach", false, "return when the disks are served, and go on in the background")
	must(cmd.MarkFlagDirname("overlay"))
	return cmd
}

// ready writes publish's one line.
func (a *app) ready(session string, uris []string, end string) error {
	v := struct {
		Session string   `json:"session"`
		URIs    []string `json:"uris"`
	}{session, list(uris)}
	if a.json {
		return a.jsonLine(v)
	}
	return a.result(v, func() string {
		return fmt.Sprintf("Serving %s (session %s; %s).\n", strings.Join(uris, " "), session, end)
	})
}
