//go:build !linux

package harden

import (
	"context"
	"fmt"
	"runtime"
)

// Keeper keeps a hardened directory, on Linux.
type Keeper struct{}

// Options of Open.
type Options struct {
	Never []string
	Note  func(line string)
}

var errOther = fmt.Errorf("%w: on %s there is no immutable attribute; a hardened directory needs Linux", ErrFilesystem, runtime.GOOS)

// Prepare is for Linux.
func Prepare(Setup, bool) ([]string, error) { return nil, errOther }

// Open is for Linux.
func Open(string, Options) (*Keeper, error) { return nil, errOther }

// ReadStatus is for Linux.
func ReadStatus(context.Context, string) (Status, error) { return Status{}, errOther }

// Close is for Linux.
func (*Keeper) Close() error { return nil }

// Once is for Linux.
func (*Keeper) Once(context.Context) (Done, error) { return Done{}, errOther }

// Run is for Linux.
func (*Keeper) Run(context.Context, func(Done)) error { return errOther }

// Release is for Linux.
func (*Keeper) Release(bool) ([]string, error) { return nil, errOther }
