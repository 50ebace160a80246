//go:build linux

package main

import (
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"time"
)

// report is the results as Markdown.
func (b *bench) report() string {
	var s strings.Builder
	fmt.Fprintf(&s, "# Measured\n\nBy `make bench` on %s, in one run of %d rounds. Seconds are wall time: least / median / greatest.\n",
		time.Now().UTC().Format("2006-01-02"), b.runs)
	fmt.Fprintf(&s, "Compare only within one run, as ratios: they are of the medians.\n\n")
	fmt.Fprintf(&s, "| | |\n|---|---|\n| program | %s |\n| processor | %s, %d cores |\n| memory | %s |\n| kernel | %s |\n| filesystem of the data | %s |\n| qemu-img | %s |\n| disk | %.1f GiB, of which %.1f GiB data: a copy of this machine's /usr in ext4 |\n\n",
		fact("", b.bin, "version"), strings.TrimPrefix(fact("model name", "/proc/cpuinfo"), "model name : "), runtime.NumCPU(),
		strings.TrimPrefix(fact("MemTotal", "/proc/meminfo"), "MemTotal: "), fact("", "uname", "-sr"),
		fact("", "stat", "-f", "-c", "%T", b.data), fact("version", "qemu-img", "--version"), gib(b.size), gib(b.used))

	_, copied, _ := three(b.times["copy"])
	_, cat, _ := three(b.times["cat"])
	_, local, _ := three(b.times["local boot"])
	fmt.Fprintf(&s, "| job | seconds | ratio | aim |\n|---|---|---|---|\n")
	b.row(&s, "`qemu-img convert`, raw to raw", "copy", copied, "")
	b.row(&s, "full backup", "backup", copied, "≤ 1.4")
	b.row(&s, "full backup, `--compression small`", "backup, small", copied, "≤ 2.0")
	b.row(&s, "`borg create`, zstd level 1", "borg", copied, "")
	b.row(&s, "`restic backup`", "restic", copied, "")
	b.row(&s, "restore to a raw file", "restore", copied, "≤ 1.1")
	b.row(&s, "`cat` of the disk", "cat", cat, "")
	b.row(&s, "second backup, nothing changed, read and compared", "unchanged", cat, "≤ 3.0")
	_, nbdRaw, _ := three(b.times["random reads, qemu-nbd raw"])
	b.row(&s, fmt.Sprintf("%d random reads of 4 KiB, 16 at a time: `qemu-nbd`, raw", randomReads), "random reads, qemu-nbd raw", nbdRaw, "")
	b.row(&s, "the same: `qemu-nbd`, qcow2 (zstd)", "random reads, qemu-nbd qcow2", nbdRaw, "")
	b.row(&s, "the same: `holdfast publish`", "random reads, holdfast", nbdRaw, "≤ 1.0")
	for _, c := range conversions {
		_, theirs, _ := three(b.times["qemu-img, "+c.name])
		b.row(&s, "`qemu-img convert`, "+c.name, "qemu-img, "+c.name, theirs, "")
		b.row(&s, "`holdfast image convert`, "+c.name, "holdfast, "+c.name, theirs, "≤ 1.0")
	}
	_, near, _ := three(b.times["S3, near"])
	b.row(&s, "full backup into a local S3 server", "S3, near", near, "")
	b.row(&s, "full backup into a local S3 server, 50 ms later at every request", "S3, far", near, "≤ 1.43")
	b.row(&s, "guest's start to its login prompt, local raw disk", "local boot", local, "")
	b.row(&s, "guest's start to its login prompt, from the backup", "recovered boot", local, "≤ 1.15")
	b.row(&s, "`recover` to the login prompt", "recover to login", local, "")
	b.row(&s, "`recover` to the guest's first read, disk of 4 GiB", "first read, 4 GiB", 0, "≤ 1 s")
	b.row(&s, "`recover` to the guest's first read, and a disk of 64 TiB", "first read, 64 TiB", 0, "≤ 1 s")
	if len(b.rss) > 0 {
		fmt.Fprintf(&s, "\nPeak memory of a full backup: %d MB (aim: ≤ 256 MB).\n", slices.Max(b.rss)/1e6)
	}
	fmt.Fprintf(&s, "\nStored by a full backup:")
	for _, name := range slices.Sorted(maps.Keys(b.sizes)) {
		fmt.Fprintf(&s, " %s %.2f GiB.", name, gib(b.sizes[name]))
	}
	fmt.Fprintln(&s)
	if len(b.absent) > 0 {
		fmt.Fprintf(&s, "\nNot installed, and left out: %s.\n", strings.Join(b.absent, ", "))
	}
	return s.String()
}

// row writes one line of the table. of is what the ratio is against; 0 for
// none.
func (b *bench) row(s *strings.Builder, what, key string, of time.Duration, aim string) {
	d := b.times[key]
	if len(d) == 0 {
		return
	}
	lo, mid, hi := three(d)
	ratio := ""
	if of > 0 {
		ratio = fmt.Sprintf("%.2f", mid.Seconds()/of.Seconds())
	}
	fmt.Fprintf(s, "| %s | %.2f / %.2f / %.2f | %s | %s |\n", what, lo.Seconds(), mid.Seconds(), hi.Seconds(), ratio, aim)
}

func gib(n int64) float64 { return float64(n) / (1 << 30) }
