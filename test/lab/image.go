package lab

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// The image is what these files make of Debian's packages; their digest names
// it.
//
//go:embed image.go image.sh guestwriter/main.go
var recipe embed.FS

// Cache is the directory that keeps images between runs and checkouts:
// $HOLDFAST_LAB_CACHE, by default /var/cache/holdfast-lab.
func Cache() string {
	if dir := os.Getenv("HOLDFAST_LAB_CACHE"); dir != "" {
		return dir
	}
	return "/var/cache/holdfast-lab"
}

// imageDir is where the image of this recipe is or will be.
func imageDir() (string, error) {
	h := sha256.New()
	for _, name := range []string{"image.go", "image.sh", "guestwriter/main.go"} {
		b, err := recipe.ReadFile(name)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%s %d\n%s", name, len(b), b)
	}
	return filepath.Join(Cache(), hex.EncodeToString(h.Sum(nil))[:16]), nil
}

// Image returns the path of the guest's disk, "raw" or "qcow2". Guests run on
// copies of it.
func Image(format string) (string, error) {
	dir, err := imageDir()
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "guest."+format)
	if _, err := os.Stat(path); err != nil {
		return "", fmt.Errorf("no guest image (make one with \"go run ./test/lab/labctl setup\"): %w", err)
	}
	return path, nil
}

// Sizes and places in the disk, in sectors of 512 bytes.
const (
	diskSectors = 4 << 30 / 512
	coreSector  = 2048 // GRUB's core image, in the BIOS boot partition
	rootSector  = 4096 // the root filesystem
)

var guestPackages = []string{
	"linux-image-cloud-amd64", "systemd-sysv", "qemu-guest-agent", "udev", "dbus", "iproute2", "e2fsprogs", "lz4",
}

// Build makes the guest image unless it is there. writer is the path of a
// static build of guestwriter; "" builds one. It needs root and Debian's
// mirror, which it takes from apt's own configuration.
//
// No loop device is needed: mke2fs fills the filesystem from a directory and
// GRUB is put in its place by hand.
func Build(ctx context.Context, writer string, logf func(string, ...any)) error {
	dir, err := imageDir()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(Cache(), 0o755); err != nil {
		return err
	}
	unlock, err := lock(filepath.Join(Cache(), "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		logf("guest image: %s", dir)
		return nil
	}
	logf("guest image: making it, once, in %s", dir)
	tmp := dir + ".new"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if writer == "" {
		writer = filepath.Join(tmp, "guestwriter")
		c := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s", "-o", writer, "holdfast/test/lab/guestwriter")
		c.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			return fmt.Errorf("build guestwriter: %w\n%s", err, out)
		}
	}
	root := filepath.Join(tmp, "root")
	if err := bootstrap(ctx, tmp, root, writer); err != nil {
		return err
	}
	if err := assemble(ctx, root, filepath.Join(tmp, "guest.raw")); err != nil {
		return err
	}
	if err := run(ctx, "qemu-img", "convert", "-O", "qcow2", filepath.Join(tmp, "guest.raw"), filepath.Join(tmp, "guest.qcow2")); err != nil {
		return err
	}
	for _, name := range []string{root, filepath.Join(tmp, "sources.list"), filepath.Join(tmp, "image.sh"), filepath.Join(tmp, "guestwriter")} {
		if err := os.RemoveAll(name); err != nil {
			return err
		}
	}
	if err := dropOld(); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}

// dropOld removes images of older recipes, but for the newest of them, which
// another checkout may be using.
func dropOld() error {
	old, err := filepath.Glob(filepath.Join(Cache(), strings.Repeat("[0-9a-f]", 16)))
	if err != nil {
		return err
	}
	slices.SortFunc(old, func(a, b string) int { return modified(b).Compare(modified(a)) })
	for _, name := range old[min(1, len(old)):] {
		if err := os.RemoveAll(name); err != nil {
			return err
		}
	}
	return nil
}

// modified is the zero time for what is not there.
func modified(path string) time.Time {
	fi, err := os.Stat(path)
	if err != nil {
		return time.Time{}
	}
	return fi.ModTime()
}

// bootstrap unpacks Debian into root.
func bootstrap(ctx context.Context, tmp, root, writer string) error {
	sources, release, err := mirror(ctx)
	if err != nil {
		return err
	}
	list, hook := filepath.Join(tmp, "sources.list"), filepath.Join(tmp, "image.sh")
	if err := os.WriteFile(list, []byte(sources), 0o644); err != nil {
		return err
	}
	script, err := recipe.ReadFile("image.sh")
	if err != nil {
		return err
	}
	if err := os.WriteFile(hook, script, 0o755); err != nil {
		return err
	}
	args := []string{
		"--quiet", "--mode=root", "--variant=minbase",
		"--include=" + strings.Join(guestPackages, ","),
		// Only the drivers of the lab's machine: a small initrd is a quick one.
		`--essential-hook=mkdir -p "$1/etc/initramfs-tools/conf.d"`,
		`--essential-hook=printf 'MODULES=list\nCOMPRESS=lz4\n' >"$1/etc/initramfs-tools/conf.d/lab"`,
		`--essential-hook=printf 'virtio_blk\nvirtio_pci\next4\n' >"$1/etc/initramfs-tools/modules"`,
		`--customize-hook=` + hook + ` "$1"`,
		"--customize-hook=copy-in " + writer + " /usr/local/bin",
		`--customize-hook=chmod 755 "$1/usr/local/bin/guestwriter"`,
	}
	// Proxies, and mirrors that are snapshots, are configured in apt.
	out, err := exec.CommandContext(ctx, "apt-config", "dump").Output()
	if err != nil {
		return fmt.Errorf("apt-config dump: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		for _, key := range []string{"Acquire::http", "Acquire::https", "Acquire::Check-", "Acquire::Retries"} {
			if strings.HasPrefix(line, key) && !strings.HasSuffix(strings.TrimSpace(line), ` "";`) {
				args = append(args, "--aptopt="+strings.TrimSpace(line))
			}
		}
	}
	return run(ctx, "mmdebstrap", append(args, release, root, list)...)
}

// mirror returns sources in apt's one-line form for the Debian release that
// apt is configured for on this machine, and the release's name.
func mirror(ctx context.Context) (sources, release string, err error) {
	query := func() (string, error) {
		out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT) $(CODENAME)",
			"Created-By: Packages", "Origin: Debian", "Component: main").Output()
		return string(out), err
	}
	out, err := query()
	if err == nil && strings.TrimSpace(out) == "" {
		if err := run(ctx, "apt-get", "-qq", "update"); err != nil {
			return "", "", err
		}
		out, err = query()
	}
	if err != nil {
		return "", "", fmt.Errorf("apt-get indextargets: %w", err)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		if len(f) != 4 || seen[line] {
			continue
		}
		seen[line] = true
		sources += fmt.Sprintf("deb %s %s %s\n", f[0], f[1], f[2])
		if !strings.Contains(f[3], "-") {
			release = f[3]
		}
	}
	if release == "" {
		return "", "", errors.New("apt has no Debian release configured: add one to /etc/apt/sources.list")
	}
	return sources, release, nil
}

// assemble makes the bootable raw disk at path from the tree in root.
func assemble(ctx context.Context, root, path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(diskSectors * 512); err != nil {
		return err
	}
	end := diskSectors - 34 - 1 // the backup table takes the last 33 sectors
	end = (end+1)/2048*2048 - 1
	if err := run(ctx, "sgdisk", "--clear", "--set-alignment=1",
		fmt.Sprintf("--new=1:%d:%d", coreSector, rootSector-1), "--typecode=1:ef02",
		fmt.Sprintf("--new=2:%d:%d", rootSector, end), "--typecode=2:8300", path); err != nil {
		return err
	}
	// What GRUB 2.06 cannot read is off.
	if err := run(ctx, "mke2fs", "-q", "-t", "ext4", "-F", "-L", "labroot", "-d", root, "-b", "4096",
		"-O", "^metadata_csum_seed", "-E", fmt.Sprintf("offset=%d,lazy_itable_init=0,lazy_journal_init=0,nodiscard", rootSector*512),
		path, fmt.Sprintf("%dk", (end+1-rootSector)/2)); err != nil {
		return err
	}
	if err := installGrub(ctx, f, filepath.Dir(path)); err != nil {
		return err
	}
	return f.Sync()
}

// installGrub writes GRUB for a PC BIOS: boot.img into the first sector, where
// bytes 0x5c to 0x63 name the sector to load next, and the core image into the
// BIOS boot partition. The core image's own first sector loads the rest of it,
// by a list of 12-byte entries (first sector 8, sectors 2, segment 2; little
// endian) that grows down from its end. (GRUB 2.06, include/grub/i386/pc/boot.h
// and include/grub/offsets.h.)
func installGrub(ctx context.Context, f *os.File, tmp string) error {
	core := filepath.Join(tmp, "core.img")
	if err := run(ctx, "grub-mkimage", "-O", "i386-pc", "-p", "(hd0,gpt2)/boot/grub", "-o", core,
		"biosdisk", "part_gpt", "ext2", "normal", "linux", "serial", "terminal", "search", "search_label", "echo", "boot"); err != nil {
		return err
	}
	defer os.Remove(core)
	b, err := os.ReadFile(core)
	if err != nil {
		return err
	}
	sectors := (len(b) + 511) / 512
	if sectors > rootSector-coreSector {
		return fmt.Errorf("GRUB's core image needs %d sectors, its partition has %d", sectors, rootSector-coreSector)
	}
	binary.LittleEndian.PutUint64(b[512-12:], coreSector+1)
	binary.LittleEndian.PutUint16(b[512-4:], uint16(sectors-1))
	binary.LittleEndian.PutUint16(b[512-2:], 0x820)
	if _, err := f.WriteAt(b, coreSector*512); err != nil {
		return err
	}
	boot, err := os.ReadFile("/usr/lib/grub/i386-pc/boot.img")
	if err != nil {
		return err
	}
	if len(boot) != 512 {
		return fmt.Errorf("boot.img is %d bytes, not a sector", len(boot))
	}
	binary.LittleEndian.PutUint64(boot[0x5c:], coreSector)
	// The partition table's part of the sector stays.
	_, err = f.WriteAt(boot[:440], 0)
	return err
}
