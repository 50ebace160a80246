package harden

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"holdfast/internal/blob"
)

// ReadStatus looks at a hardened directory, at every locked object and every
// file. It may run beside a Keeper; what that does meanwhile may show or not.
func ReadStatus(ctx context.Context, dir string) (s Status, err error) {
	if os.Geteuid() != 0 {
		return s, fmt.Errorf("%w: run it as root", ErrNotRoot)
	}
	if dir, err = real(dir); err != nil {
		return s, err
	}
	if s, err = readStatus(ctx, dir); err != nil {
		return s, fmt.Errorf("%s: %w", dir, err)
	}
	return s, nil
}

func readStatus(ctx context.Context, dir string) (s Status, err error) {
	if s.Mark, err = readMark(dir); err != nil {
		return s, err
	}
	own := func(name string) string { return filepath.Join(dir, blob.HardenDir, name) }
	c, err := readClock(own(clockName))
	if err != nil {
		return s, err
	}
	s.Seen = time.Unix(0, c.Wall)
	i, err := now()
	if err != nil {
		return s, err
	}
	at := c.tick(i)
	s.Behind = c.behind()
	j, _, err := readJournal(own(journalName))
	if err != nil {
		return s, err
	}
	s.Damaged = j.damaged
	r, err := openRoot(dir)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	if err := s.locks(ctx, r, j, at); err != nil {
		return s, err
	}
	err = s.strays(ctx, r, j)
	for _, names := range [][]string{s.Due, s.Missing, s.Bare, s.Stray} {
		slices.Sort(names)
	}
	return s, err
}

// locks looks at the objects that the journal names.
func (s *Status) locks(ctx context.Context, r *root, j *journal, at time.Time) error {
	for name, until := range j.until {
		if err := ctx.Err(); err != nil {
			return err
		}
		if until < at.Unix() {
			s.Due = append(s.Due, name)
			continue
		}
		s.Locks++
		end := time.Unix(until, 0)
		if s.Earliest.IsZero() || end.Before(s.Earliest) {
			s.Earliest = end
		}
		if end.After(s.Latest) {
			s.Latest = end
		}
		if _, open := j.open[name]; open {
			continue // being locked now
		}
		f, err := r.open(name, unix.O_RDONLY)
		if errors.Is(err, fs.ErrNotExist) {
			s.Missing = append(s.Missing, name)
			continue
		} else if err != nil {
			return err
		}
		set, err := isImmutable(f)
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if !set {
			s.Bare = append(s.Bare, name)
		}
	}
	return nil
}

// strays looks for the attribute on files that the journal does not name.
func (s *Status) strays(ctx context.Context, r *root, j *journal) error {
	return filepath.WalkDir(r.path, func(p string, e fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || !e.Type().IsRegular() {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // gone meanwhile
			}
			return err
		}
		name, err := filepath.Rel(r.path, p)
		if err != nil || j.until[name] != 0 {
			return err
		}
		f, err := r.open(name, unix.O_RDONLY)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) {
			return nil
		} else if err != nil {
			return err
		}
		set, err := isImmutable(f)
		if err == nil && set {
			s.Stray = append(s.Stray, name)
		}
		return errors.Join(err, f.Close())
	})
}
