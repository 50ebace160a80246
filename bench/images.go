//go:build linux

package main

import (
	"context"
	"os"
	"path/filepath"
	"time"
)

// conversions are done by qemu-img and by Holdfast, with the same source.
var conversions = []struct{ name, from, to string }{
	{"raw to vhdx", "raw", "vhdx"},
	{"vhdx to raw", "vhdx", "raw"},
	{"qcow2 (zstd) to raw", "qcow2", "raw"},
}

// image is the disk in a format, as qemu-img has written it once.
func (b *bench) image(ctx context.Context, format string) (string, error) {
	if format == "raw" {
		return b.disk(), nil
	}
	path := b.source() + "." + format
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	b.say("writing the disk as %s, once", format)
	args := []string{"convert", "-f", "raw", "-O", format}
	if format == "qcow2" {
		args = append(args, "-c", "-o", "compression_type=zstd")
	}
	tmp := path + ".new"
	if err := command(ctx, "qemu-img", append(args, b.disk(), tmp)...); err != nil {
		return "", err
	}
	return path, os.Rename(tmp, path)
}

// images measures conversions once.
func (b *bench) images(ctx context.Context) error {
	for _, c := range conversions {
		from, err := b.image(ctx, c.from)
		if err != nil {
			return err
		}
		to := filepath.Join(b.work, "converted."+c.to)
		for _, who := range []string{"qemu-img", "holdfast"} {
			if err := b.calm(from); err != nil {
				return err
			}
			began := time.Now()
			if who == "qemu-img" {
				err = command(ctx, "qemu-img", "convert", "-f", c.from, "-O", c.to, from, to)
			} else {
				err = command(ctx, b.bin, "image", "convert", "-q", "--source-format", c.from, "--format", c.to, from, to)
			}
			if err == nil {
				err = syncAll(b.work)
			}
			if err != nil {
				return err
			}
			b.took(who+", "+c.name, began)
			if err := os.Remove(to); err != nil {
				return err
			}
		}
	}
	return nil
}
