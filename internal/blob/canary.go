package blob

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const (
	canaryLock = time.Hour
	// What somebody may have got wrong of the time: a canary is removed, and
	// may be, that long after its lock has ended.
	canaryRest = time.Hour
)

var canaryText = []byte("Holdfast locks this file and tries to destroy it.\n")

// Canary locks a file of its own and tries in earnest, as the user that it is,
// to delete, rename, replace, cut and overwrite it. The file stays until a
// canary that comes when its lock has ended.
func (d *Dir) Canary(ctx context.Context, mode LockMode) error {
	if err := d.canary(ctx, mode); err != nil {
		return fmt.Errorf("try whether locks hold: %w", err)
	}
	return nil
}

func (d *Dir) canary(ctx context.Context, mode LockMode) error {
	if err := d.hardened(); err != nil {
		return err
	}
	d.removeCanaries()
	var id [8]byte
	rand.Read(id[:])
	until := time.Now().Add(canaryLock)
	name := fmt.Sprintf("%s/%d-%s", HardenCanaries, until.Unix(), hex.EncodeToString(id[:]))
	path := d.path(name)
	if err := d.create(path, canaryText); err != nil {
		return err
	}
	if err := d.lock(ctx, name, Lock{Until: until, Mode: mode}); err != nil {
		_ = os.Remove(path) // a file that is not locked is not left
		return err
	}
	var broke []string
	for _, a := range attacks {
		if a.try(path) == nil {
			broke = append(broke, a.name)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, canaryText) {
			return fmt.Errorf("%w: a locked file did not survive an attempt to %s it", ErrNoLock, a.name)
		}
	}
	if broke != nil {
		return fmt.Errorf("%w: attempts to %s a locked file were not refused", ErrNoLock, strings.Join(broke, ", "))
	}
	return nil
}

// attacks are what a canary must survive; each must be refused.
var attacks = []struct {
	name string
	try  func(path string) error
}{
	{"cut", func(path string) error { return os.Truncate(path, 0) }},
	{"overwrite", func(path string) error {
		_ = os.Chmod(path, 0o600) // some clients say that they have, and have not
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt([]byte("x"), 0)
		return errors.Join(err, f.Close())
	}},
	{"extend", func(path string) error {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			return err
		}
		_, err = f.Write([]byte("x"))
		return errors.Join(err, f.Close())
	}},
	{"replace", func(path string) error {
		other := path + ".other"
		if err := os.WriteFile(other, []byte("another\n"), 0o600); err != nil {
			return err
		}
		err := os.Rename(other, path)
		if err != nil {
			_ = os.Remove(other)
		}
		return err
	}},
	{"rename", func(path string) error { return os.Rename(path, path+".away") }},
	{"delete", os.Remove},
}

// removeCanaries removes those whose lock has ended. Another canary may do so
// at the same time; what cannot be removed is left to a later one.
func (d *Dir) removeCanaries() {
	entries, err := os.ReadDir(d.path(HardenCanaries))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return
	}
	for _, e := range entries {
		at, _, _ := strings.Cut(e.Name(), "-")
		until, err := strconv.ParseInt(at, 10, 64)
		if err == nil && time.Since(time.Unix(until, 0)) > canaryRest {
			_ = os.Remove(filepath.Join(d.path(HardenCanaries), e.Name()))
		}
	}
}
