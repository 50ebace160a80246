// Package blob is the seam below the repository: a store of immutable objects
// with names. Dir keeps them as files, Mem in memory. Limit bounds a store's
// traffic, Tiers makes one store of several.
//
// Names are relative slash-separated paths of [a-z0-9._-], at most 200 bytes,
// no empty, "." or ".." element, none starting with ".tmp-", and ".harden" not
// the first one. An object is at most MaxSize long.
package blob

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"
)

// MaxSize bounds one object, in bytes.
const MaxSize = 64 << 20

var (
	// ErrExist is returned by Put when the name is taken.
	ErrExist = errors.New("object exists")
	// ErrNotExist is returned by Get and Delete when there is no such object.
	ErrNotExist = errors.New("no such object")
	// ErrName is returned for a name that no store takes.
	ErrName = errors.New("bad object name")
	// ErrTruncated is returned by Get when the object ends before the range.
	ErrTruncated = errors.New("object is shorter than asked for")
	// ErrUnsynced is returned by Put when the object is there, but may be lost
	// with the power: the medium failed to make its name durable. That is not
	// tried again, since a second try that succeeds proves nothing.
	ErrUnsynced = errors.New("object is not durable")
)

// Info is what a listing tells of an object.
type Info struct {
	Name string
	Size int64 // bytes
}

// Store holds immutable objects. All methods may run in parallel, also from
// several processes and machines.
type Store interface {
	// Put creates the object whole or not at all, and has made it durable when
	// it returns nil. If the name is taken it changes nothing and returns
	// ErrExist. data stays the caller's.
	Put(ctx context.Context, name string, data []byte) error
	// Get reads n bytes at off; n < 0 means up to the end. It returns exactly
	// n bytes or ErrTruncated. The slice is the caller's.
	Get(ctx context.Context, name string, off, n int64) ([]byte, error)
	// List yields every object whose name starts with prefix, in no promised
	// order. A failed or partial listing ends with an error; a listing
	// without an error is complete. An object being created meanwhile may or
	// may not be listed.
	List(ctx context.Context, prefix string) iter.Seq2[Info, error]
	Delete(ctx context.Context, name string) error
}

// CheckName returns ErrName unless every store takes the name.
func CheckName(name string) error {
	if name == "" || len(name) > 200 || name == HardenDir || strings.HasPrefix(name, HardenDir+"/") {
		return fmt.Errorf("%w: %q", ErrName, name)
	}
	for el := range strings.SplitSeq(name, "/") {
		if el == "" || el == "." || el == ".." || strings.HasPrefix(el, tmpPrefix) || strings.Trim(el, "abcdefghijklmnopqrstuvwxyz0123456789._-") != "" {
			return fmt.Errorf("%w: %q", ErrName, name)
		}
	}
	return nil
}

// Names lists the names that start with prefix, sorted.
func Names(ctx context.Context, s Store, prefix string) ([]string, error) {
	var names []string
	for i, err := range s.List(ctx, prefix) {
		if err != nil {
			return nil, err
		}
		names = append(names, i.Name)
	}
	slices.Sort(names)
	return names, nil
}

// Claim creates an object for whose name others compete, and says whether it is
// there as ours. A Put that failed may have done its work all the same, so the
// store is asked what is there, within a minute even when ctx has ended.
func Claim(ctx context.Context, s Store, name string, data []byte) (ours bool, err error) {
	putErr := s.Put(ctx, name, data)
	if putErr == nil {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	there, err := s.Get(ctx, name, 0, -1)
	switch {
	case err == nil && bytes.Equal(there, data) && !errors.Is(putErr, ErrUnsynced):
		return true, nil
	case err == nil && errors.Is(putErr, ErrExist):
		return false, nil
	}
	return false, putErr
}
