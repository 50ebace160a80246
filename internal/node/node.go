// Package node is a running Holdfast: the only place that sees hypervisors,
// protocols and the core together, and wires them. The command line calls its
// verbs; each of them opens what it needs, does one thing, and closes it.
//
//	cmd ──▶ Node ──▶ repo       the repository, opened once and when first needed
//	          │  ──▶ host       libvirt by its URI, or a folder by its path
//	          │  ──▶ state      sessions and journal of this machine
//	          ├────▶ backup     source → repository
//	          ├────▶ mover      repository → files, or a stopped VM's disks
//	          └────▶ recovery   repository → published disks → running guest
//
// Work that outlives a command is done by detached processes, which are this
// program again with a hidden verb: "serve" keeps a publication up, "thaw"
// watches over a frozen guest. They get secrets through a pipe, never through
// their arguments.
//
// A Node's methods may not run in parallel, but for what their comments say.
package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"holdfast/internal/blob"
	"holdfast/internal/blob/s3"
	"holdfast/internal/mover"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

// Options of New.
type Options struct {
	// Repo is where the repository is: a directory, its file:// URL, or an s3://
	// URL as package s3 has it.
	Repo string
	// Rates bound the traffic with the repository.
	Rates blob.Rates
	// State is the state directory; "" means state.DefaultPath.
	State string
	// Passphrase gives the repository's passphrase; with create a new one is
	// being chosen. It is called at most once.
	Passphrase func(ctx context.Context, create bool) ([]byte, error)
	// Report is told how work goes.
	Report Report
	// Compression of what a backup stores.
	Compression repo.Compression
}

// Report is told how work goes while it goes. Its functions may be called in
// parallel; those that are nil are not called.
type Report struct {
	// Task is told of work that moves bytes. end is called when it is over.
	Task func(name string, m *mover.Meter) (end func())
	// Note is a line for the operator.
	Note func(line string)
}

func (r Report) task(name string, m *mover.Meter) (end func()) {
	if r.Task == nil {
		return func() {}
	}
	return r.Task(name, m)
}

func (r Report) note(format string, args ...any) {
	if r.Note != nil {
		r.Note(fmt.Sprintf(format, args...))
	}
}

// Node is a running Holdfast.
type Node struct {
	o          Options
	passphrase []byte
	key        []byte   // of the repository, from the process that started this one
	keys       *s3.Keys // of its store, likewise; nil looks for them
	repo       *repo.Repo
	state      *state.Dir
	cache      string // "" is that of the state directory

	opening sync.Mutex            // guards stores: tiers are opened from anywhere
	stores  map[string]blob.Store // opened, by location
}

// New makes a Node. Nothing is opened yet.
func New(o Options) *Node { return &Node{o: o} }

// Close closes what was opened.
func (n *Node) Close() error {
	if n.repo == nil {
		return nil
	}
	err := n.repo.Close()
	n.repo = nil
	return err
}

// UsageError is an error in how a command was called.
type UsageError struct{ Err error }

func (e *UsageError) Error() string { return e.Err.Error() }
func (e *UsageError) Unwrap() error { return e.Err }

func usage(format string, args ...any) error { return &UsageError{fmt.Errorf(format, args...)} }

// State is the state directory, opened when first needed.
func (n *Node) State() (*state.Dir, error) {
	if n.state != nil {
		return n.state, nil
	}
	d, err := state.Open(n.o.State)
	if err != nil {
		return nil, err
	}
	n.state = d
	return d, nil
}

// options of the repository on this machine.
func (n *Node) options() (repo.Options, error) {
	d, err := n.State()
	if err != nil {
		return repo.Options{}, err
	}
	return repo.Options{Cache: cmp.Or(n.cache, filepath.Join(d.Path(), "cache")), Compression: n.o.Compression, Key: n.key, OpenTier: n.openStore}, nil
}

// Repo is the repository, opened when first needed.
func (n *Node) Repo(ctx context.Context) (*repo.Repo, error) {
	if n.repo != nil {
		return n.repo, nil
	}
	path, err := n.Location()
	if err != nil {
		return nil, err
	}
	store, err := n.store(ctx, path)
	if err != nil {
		return nil, err
	}
	o, err := n.options()
	if err != nil {
		return nil, err
	}
	if err := n.ask(ctx, false); err != nil {
		return nil, err
	}
	r, err := repo.Open(ctx, store, n.passphrase, o)
	if err != nil {
		err = repo.WhyClosed(ctx, store, err)
	}
	if errors.Is(err, repo.ErrHidden) {
		return nil, fmt.Errorf("open the repository %s: %w", path, err)
	} else if errors.Is(err, repo.ErrDamaged) {
		return nil, fmt.Errorf("open the repository %s: %w; put that object back from a copy of the repository", path, err)
	} else if err != nil {
		return nil, fmt.Errorf("open the repository %s: %w", path, err)
	}
	n.repo = r
	for _, what := range r.Damage() {
		n.o.Report.note("warning: the repository is damaged: %s; what can be read is read; \"holdfast check\" lists the damage", what)
	}
	return r, nil
}

// ask gets the passphrase.
func (n *Node) ask(ctx context.Context, create bool) (err error) {
	if n.passphrase == nil {
		n.passphrase, err = n.o.Passphrase(ctx, create)
	}
	return err
}

// Made is what Init made.
type Made struct {
	Repository string `json:"repository"` // id
	Path       string `json:"path"`
}

// Init makes a repository in a directory that is missing or empty, or under an
// empty prefix of a bucket.
// With a rule on immutability the store must prove first that it keeps it.
func (n *Node) Init(ctx context.Context, rule repo.Immutability) (Made, error) {
	path, err := n.Location()
	if err != nil {
		return Made{}, err
	}
	create, err := n.vacancy(ctx, path)
	if err != nil {
		return Made{}, err
	}
	o, err := n.options()
	if err != nil {
		return Made{}, err
	}
	if err := n.ask(ctx, true); err != nil {
		return Made{}, err
	}
	store, err := create(ctx)
	if err != nil {
		return Made{}, fmt.Errorf("make the repository: %w", err)
	}
	if rule.Days > 0 {
		if err := repo.TryLocks(ctx, store, rule.Mode); err != nil {
			return Made{}, fmt.Errorf("nothing was made: %w", err)
		}
	}
	if n.repo, err = repo.Init(ctx, store, n.passphrase, o); err != nil {
		return Made{}, fmt.Errorf("make the repository %s: %w", path, err)
	}
	if rule.Days > 0 {
		if err := n.repo.SetImmutable(ctx, rule, nil); err != nil {
			return Made{}, fmt.Errorf("the repository is made, but without immutability: %w", err)
		}
	}
	return Made{n.repo.ID(), path}, nil
}

// vacant refuses a directory with anything in it but what an Init that died
// has left.
func vacant(path string) error {
	entries, err := os.ReadDir(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("make the repository: %w", err)
	}
	if slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == "config" }) {
		return fmt.Errorf("%s: %w", path, repo.ErrExist)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".tmp-") {
			continue
		}
		switch e.Name() {
		case "keys", "keyring", "lost+found":
		default:
			return fmt.Errorf("%s is not empty (it holds %s): a repository needs a directory of its own", path, e.Name())
		}
	}
	return nil
}
