package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"holdfast/internal/blob"
	"holdfast/internal/blob/s3"
	"holdfast/internal/repo"
)

// Location is where the repository is, complete: a directory's absolute path, or
// an S3 store's URL with what the environment adds to it. Another process in
// another environment finds the same place by it. It holds no credentials.
func (n *Node) Location() (string, error) {
	if n.o.Repo == "" {
		return "", usage("no repository: name its directory or s3:// URL with --repo or HOLDFAST_REPO")
	}
	return locate(n.o.Repo)
}

// locate completes what somebody has typed for a repository.
func locate(s string) (string, error) {
	scheme, _, ok := strings.Cut(s, "://")
	if !ok {
		return filepath.Abs(s)
	}
	switch scheme {
	case s3.Scheme:
		o, err := s3.Parse(s, os.Getenv)
		if err != nil {
			return "", usage("repository: %w", err)
		}
		return o.String(), nil
	case "file":
		u, err := url.Parse(s)
		if err != nil || u.Host != "" && u.Host != "localhost" || u.Path == "" {
			return "", usage("repository %q: a file URL has three slashes: file:///path", s)
		}
		return filepath.Abs(u.Path)
	}
	return "", usage("repository %q: give a directory's path, file:///path, or s3://BUCKET/PREFIX", scheme+"://…")
}

func onS3(location string) bool { return strings.HasPrefix(location, s3.Scheme+"://") }

// store opens the store of the repository at a location, which must hold one.
func (n *Node) store(ctx context.Context, location string) (s blob.Store, err error) {
	s, err = n.openStore(ctx, location)
	if errors.Is(err, fs.ErrNotExist) && !onS3(location) {
		return nil, fmt.Errorf("%s: %w", location, repo.ErrNotRepository)
	} else if err != nil {
		return nil, fmt.Errorf("open the repository: %w", err)
	}
	// Before anybody is asked for a passphrase.
	_, err = s.Get(ctx, "config", 0, 1)
	switch {
	case errors.Is(err, blob.ErrNotExist):
		return nil, fmt.Errorf("%s: %w", location, repo.WhyClosed(ctx, s, repo.ErrNotRepository))
	case err != nil && onS3(location) && !errors.Is(err, blob.ErrTruncated):
		return nil, fmt.Errorf("open the repository %s: %w", location, err)
	}
	return s, nil
}

// openStore opens the store at a location, whatever is in it, once: a server is
// asked once what it can, and the rates hold for all that goes there.
func (n *Node) openStore(ctx context.Context, location string) (s blob.Store, err error) {
	n.opening.Lock()
	s = n.stores[location]
	n.opening.Unlock()
	if s != nil {
		return s, nil
	}
	if onS3(location) {
		s, err = n.openS3(ctx, location)
	} else {
		s, err = blob.OpenDir(location)
	}
	if err != nil {
		return nil, err
	}
	s = blob.Limit(s, n.o.Rates)
	n.opening.Lock()
	defer n.opening.Unlock()
	if n.stores == nil {
		n.stores = map[string]blob.Store{}
	}
	n.stores[location] = s
	return s, nil
}

// vacancy sees that nothing is at a location but what an Init that died has
// left. create makes the store there.
func (n *Node) vacancy(ctx context.Context, location string) (create func(context.Context) (blob.Store, error), err error) {
	if !onS3(location) {
		return func(ctx context.Context) (blob.Store, error) {
			s, err := blob.CreateDir(location)
			if err != nil {
				return nil, err
			}
			return blob.Limit(s, n.o.Rates), s.Probe(ctx)
		}, vacant(location)
	}
	s, err := n.openS3(ctx, location)
	if err != nil {
		return nil, fmt.Errorf("make the repository: %w", err)
	}
	for i, err := range s.List(ctx, "") {
		if err != nil {
			return nil, fmt.Errorf("make the repository %s: %w", location, err)
		}
		switch dir, _, _ := strings.Cut(i.Name, "/"); dir {
		case "keys", "keyring":
		case "config", "packs", "index", "chain", "leases", "pins":
			return nil, fmt.Errorf("%s: %w", location, repo.ErrExist)
		default:
			return nil, fmt.Errorf("%s is not empty (it holds %s): a repository needs a prefix of its own", location, i.Name)
		}
	}
	return func(ctx context.Context) (blob.Store, error) {
		return blob.Limit(s, n.o.Rates), s.Probe(ctx)
	}, nil
}

func (n *Node) openS3(ctx context.Context, location string) (*s3.Store, error) {
	// A location says all itself: the environment was asked when it was made.
	o, err := s3.Parse(location, func(string) string { return "" })
	if err != nil {
		return nil, err
	}
	o.Keys = n.keys
	return s3.Open(ctx, o)
}
