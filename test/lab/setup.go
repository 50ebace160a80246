package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// hostPackages is what the lab and the tests use on the machine.
var hostPackages = []string{
	"qemu-system-x86", "qemu-utils", "qemu-block-extra", "libvirt-daemon-system", "libvirt-clients", "libvirt-daemon-driver-qemu",
	"gcc", "libc6-dev", // for the race detector
	"nbdkit", "libnbd-bin", "fio", "mmdebstrap", "grub-pc-bin", "grub-common", "gdisk", "e2fsprogs", "util-linux",
	"xfsprogs", "btrfs-progs", // for images on filesystems with reflinks
	"ovmf",
	"p7zip-full", "libvhdi-utils", "libvmdk-utils", // other readers of disk images
	"python3-cryptography", "python3-argon2", "python3-zstandard", // for another reader of the repository
}

// Setup makes the machine ready for lab guests: Debian packages, libvirt
// running, the image built. Each step is a quick look when its work is done
// already. It needs root.
func Setup(ctx context.Context, writer string, logf func(string, ...any)) error {
	if os.Getuid() != 0 {
		return errors.New("the lab needs root: guests run under qemu:///system")
	}
	if err := Packages(ctx, hostPackages, logf); err != nil {
		return err
	}
	if err := libvirt(ctx, logf); err != nil {
		return err
	}
	return Build(ctx, writer, logf)
}

// Packages installs those Debian packages that are missing.
func Packages(ctx context.Context, names []string, logf func(string, ...any)) error {
	var missing []string
	for _, name := range names {
		out, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${db:Status-Status}", name).Output()
		if err != nil || string(out) != "installed" {
			missing = append(missing, name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	if _, err := exec.LookPath("apt-get"); err != nil {
		return fmt.Errorf("this needs a Debian with %s", strings.Join(missing, ", "))
	}
	logf("installing %s", strings.Join(missing, " "))
	if err := run(ctx, "apt-get", "-qq", "update"); err != nil {
		return err
	}
	return run(ctx, "apt-get", append([]string{"-qq", "-y", "-o", "DPkg::Lock::Timeout=300", "--no-install-recommends", "install"}, missing...)...)
}

// libvirt starts the libvirt daemon unless qemu:///system answers.
func libvirt(ctx context.Context, logf func(string, ...any)) error {
	if _, err := Virsh(ctx, "version"); err == nil {
		return nil
	}
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		logf("starting libvirt by systemd")
		if err := run(ctx, "systemctl", "start", "libvirtd"); err != nil {
			return err
		}
	} else {
		if err := kvm(ctx); err != nil {
			return err
		}
		logf("starting libvirt: virtlogd -d, libvirtd -d")
		for _, name := range []string{"virtlogd", "libvirtd"} {
			// A pid file without its process is left by a machine that went down.
			if err := run(ctx, name, "-d"); err != nil && !running(name) {
				return err
			}
		}
	}
	return Poll(ctx, 30*time.Second, "libvirt answers", func() (bool, error) {
		_, err := Virsh(ctx, "version")
		return err == nil, nil
	})
}

// kvm gives /dev/kvm the group and mode that udev would, where none runs.
// libvirt asks QEMU for its capabilities anew at every step as long as its user
// cannot open the device: seconds each time, though no guest here uses it.
func kvm(ctx context.Context) error {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return nil
	}
	if err := run(ctx, "chgrp", "kvm", "/dev/kvm"); err != nil {
		return err
	}
	return os.Chmod("/dev/kvm", 0o660)
}

// running reports whether a process of that name exists.
func running(name string) bool {
	stats, _ := filepath.Glob("/proc/[0-9]*/comm")
	return slices.ContainsFunc(stats, func(p string) bool {
		b, err := os.ReadFile(p)
		return err == nil && strings.TrimSpace(string(b)) == name
	})
}

// run runs a command that says nothing when all is well; what it said is part
// of the error.
func run(ctx context.Context, name string, args ...string) error {
	_, err := output(ctx, name, args...)
	return err
}

// output returns a command's standard output.
func output(ctx context.Context, name string, args ...string) (string, error) {
	c := exec.CommandContext(ctx, name, args...)
	c.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive")
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	if err := c.Run(); err != nil {
		said := strings.TrimSpace(errs.String() + out.String())
		if len(said) > 4000 {
			said = said[len(said)-4000:]
		}
		return out.String(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, said)
	}
	return out.String(), nil
}

// Poll calls f until it reports true, at most for limit. f's error ends it. It
// looks ten times a second, and after five seconds twice: most looks start a
// process, which takes from the guests.
func Poll(ctx context.Context, limit time.Duration, what string, f func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	began, wait := time.Now(), 100*time.Millisecond
	for {
		ok, err := f()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %v until %s: %w", limit, what, ctx.Err())
		case <-time.After(wait):
		}
		if time.Since(began) > 5*time.Second {
			wait = 500 * time.Millisecond
		}
	}
}
