//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"holdfast/test/cli"
	"holdfast/test/lab"
)

const host = "qemu:///system"

// huge is the size of the disk that must not make a recovery slower.
const huge = 64 << 40

// guests measures first read and boot. The points come from stopped guests: the
// same disks for both sides.
func (b *bench) guests(ctx context.Context) error {
	if _, err := lab.Sweep(ctx); err != nil {
		return err
	}
	var err error
	if b.store, err = lab.NewStorage(); err != nil {
		return err
	}
	tool, err := b.tool(ctx, b.store)
	if err != nil {
		return err
	}
	small, err := b.guest(ctx, lab.Options{Format: "raw"})
	if err != nil {
		return err
	}
	big, err := b.guest(ctx, lab.Options{Format: "raw", Disks: []lab.Disk{{Size: huge}}})
	if err != nil {
		return err
	}
	for _, g := range []*lab.Guest{small, big} {
		b.say("backing up guest %s", g.Name)
		if err := tool.Run(ctx, "backup", host, g.Name).Err(); err != nil {
			return err
		}
	}
	for i := range b.runs {
		b.say("run %d of %d: guests", i+1, b.runs)
		if err := b.local(ctx, small); err != nil {
			return err
		}
		for _, g := range []*lab.Guest{small, big} {
			if err := b.recover(ctx, tool, g, g == big); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) guest(ctx context.Context, o lab.Options) (*lab.Guest, error) {
	g, err := lab.New(ctx, o)
	if err == nil {
		b.keep = append(b.keep, g)
	}
	return g, err
}

// local boots the guest from its own raw disk, which is as fresh as what the
// backup holds.
func (b *bench) local(ctx context.Context, g *lab.Guest) error {
	image, err := lab.Image("raw")
	if err != nil {
		return err
	}
	if err := command(ctx, "cp", "--sparse=always", image, g.Disks[0]); err != nil {
		return err
	}
	from := time.Now()
	if _, err := lab.Virsh(ctx, "start", g.Name); err != nil {
		return err
	}
	if err := login(ctx, g.Name); err != nil {
		return err
	}
	b.took("local boot", from)
	return g.PowerOff(ctx)
}

// recover boots a guest from its backup.
func (b *bench) recover(ctx context.Context, tool *cli.Tool, g *lab.Guest, big bool) error {
	name := g.Name + "-recovered"
	from := time.Now()
	p, err := tool.Start("recover", g.Name+"@latest", "--host", host, "--storage", b.store, "--name", name)
	if err != nil {
		return err
	}
	var began time.Time
	read, err := firstRead(ctx, name, p.Done(), &began)
	r := p.Wait()
	if err := errors.Join(err, r.Err()); err != nil {
		return err
	}
	if big {
		b.add("first read, 64 TiB", read.Sub(from).Seconds())
	} else {
		b.add("first read, 4 GiB", read.Sub(from).Seconds())
		if err := login(ctx, name); err != nil {
			return err
		}
		b.took("recovered boot", began)
		b.took("recover to login", from)
	}
	s, err := tool.Find(ctx, name)
	if err != nil {
		return err
	}
	return tool.Run(ctx, "undo", s.Session).Err()
}

// firstRead returns when QEMU was first seen to have read for the guest. began
// is set to when the guest was first seen running.
func firstRead(ctx context.Context, name string, done <-chan struct{}, began *time.Time) (time.Time, error) {
	var at time.Time
	err := lab.Poll(ctx, 2*time.Minute, name+" has read", func() (bool, error) {
		for range 10 { // closer together than Poll calls
			out, err := lab.Virsh(ctx, "domblkstat", name, "vda")
			if err != nil {
				continue // not yet defined, or not yet started
			}
			at = time.Now()
			if began.IsZero() {
				*began = at
			}
			for line := range strings.Lines(out) {
				f := strings.Fields(line)
				if len(f) == 3 && f[1] == "rd_req" {
					if n, err := strconv.Atoi(f[2]); err == nil && n > 0 {
						return true, nil
					}
				}
			}
		}
		select {
		case <-done:
			if began.IsZero() {
				return false, fmt.Errorf("recover ended and guest %s does not run", name)
			}
		default:
		}
		return false, nil
	})
	return at, err
}

// login returns when the guest's console shows its login prompt.
func login(ctx context.Context, name string) error {
	tty, err := lab.Virsh(ctx, "ttyconsole", name)
	if err != nil {
		return err
	}
	f, err := os.Open(filepath.Clean(strings.TrimSpace(tty)))
	if err != nil {
		return err
	}
	defer f.Close()
	found := make(chan error, 1)
	go func() {
		var seen []byte
		p := make([]byte, 4096)
		for !bytes.Contains(seen, []byte("login:")) {
			n, err := f.Read(p)
			if err != nil {
				found <- fmt.Errorf("console of %s: %w", name, err)
				return
			}
			seen = append(seen, p[:n]...)
		}
		found <- nil
	}()
	select {
	case err := <-found:
		return err
	case <-time.After(3 * time.Minute):
		err = fmt.Errorf("guest %s shows no login prompt", name)
	case <-ctx.Done():
		err = ctx.Err()
	}
	return err
}
