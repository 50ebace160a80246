package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/term"
)

// maxPassphrase bounds what is read of a passphrase file, in bytes.
const maxPassphrase = 4096

// passphrase is that of the repository.
func (a *app) passphrase(ctx context.Context, create bool) ([]byte, error) {
	return a.passphraseOf("HOLDFAST_PASSPHRASE", "Passphrase of the repository: ")(ctx, create)
}

// passphraseOf gives a passphrase that comes from an environment variable, from
// the file that the one with _FILE names, or from the terminal, where a new one
// is asked for twice.
func (a *app) passphraseOf(env, prompt string) func(ctx context.Context, create bool) ([]byte, error) {
	return func(ctx context.Context, create bool) ([]byte, error) {
		if p := os.Getenv(env); p != "" {
			return []byte(p), nil
		}
		if path := os.Getenv(env + "_FILE"); path != "" {
			return a.passphraseFile(env+"_FILE", path)
		}
		return a.askPassphrase(ctx, create, env, prompt)
	}
}

// newPassphrase is one to be added.
func (a *app) newPassphrase(ctx context.Context) ([]byte, error) {
	return a.passphraseOf("HOLDFAST_NEW_PASSPHRASE", "New passphrase: ")(ctx, true)
}

func (a *app) askPassphrase(ctx context.Context, create bool, env, prompt string) ([]byte, error) {
	fd := int(os.Stdin.Fd())
	if !term.IsTerminal(fd) {
		return nil, fmt.Errorf("no passphrase: set %s_FILE or %s, or run this on a terminal", env, env)
	}
	p, err := a.prompt(ctx, fd, prompt)
	if err != nil || !create {
		return p, err
	}
	if len(p) == 0 {
		return nil, errors.New("the passphrase is empty")
	}
	again, err := a.prompt(ctx, fd, "Once more: ")
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(p, again) {
		return nil, errors.New("the two passphrases differ; nothing was done")
	}
	return p, nil
}

func (a *app) passphraseFile(env, path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", env, err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Mode().IsRegular() && readableByAll(fi) {
		a.note(fmt.Sprintf("warning: everybody on this machine can read the passphrase in %s (chmod 600 it)", path))
	}
	p, err := io.ReadAll(io.LimitReader(f, maxPassphrase+1))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", env, err)
	}
	// The line's end is not part of it.
	p = bytes.TrimSuffix(bytes.TrimSuffix(p, []byte("\n")), []byte("\r"))
	if len(p) == 0 || len(p) > maxPassphrase {
		return nil, fmt.Errorf("%s: %s holds no passphrase of 1 to %d bytes", env, path, maxPassphrase)
	}
	return p, nil
}

// prompt reads a line without showing it. When ctx ends first, the terminal is
// as before; the read itself ends with the process.
func (a *app) prompt(ctx context.Context, fd int, text string) ([]byte, error) {
	a.settle()
	before, err := term.GetState(fd)
	if err != nil {
		return nil, fmt.Errorf("read the passphrase: %w", err)
	}
	fmt.Fprint(a.stderr, text)
	type line struct {
		p   []byte
		err error
	}
	read := make(chan line, 1)
	go func() {
		p, err := term.ReadPassword(fd)
		read <- line{p, err}
	}()
	select {
	case l := <-read:
		fmt.Fprintln(a.stderr)
		if l.err != nil {
			return nil, fmt.Errorf("read the passphrase: %w", l.err)
		}
		return l.p, nil
	case <-ctx.Done():
		fmt.Fprintln(a.stderr)
		return nil, errors.Join(ctx.Err(), term.Restore(fd, before))
	}
}
