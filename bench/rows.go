//go:build linux

package main

import "fmt"

// sections are all tables. Aims hold for the usual run, on two cores.
var sections = []section{
	{"Backup", "Of the two ways in which a full backup stores, one should meet both of its aims: less time, or less space.", []row{
		{what: "`cat` of the disk", key: "cat", of: "cat"},
		{what: "`qemu-img convert`, raw to raw", key: "copy", of: "copy"},
		{what: "full backup, against the copy", key: "backup", of: "copy", most: 1.4},
		{what: "its repository, against borg's", key: "backup, stored", unit: "GiB", of: "borg, stored", most: 1.3},
		{what: "full backup, `--compression small`, against the copy", key: "small", of: "copy", most: 2.0},
		{what: "its repository, against borg's", key: "small, stored", unit: "GiB", of: "borg, stored", most: 1.05},
		{what: "`borg create --compression zstd,1`, against the copy", key: "borg", of: "copy"},
		{what: "its repository", key: "borg, stored", unit: "GiB"},
		{what: "`restic backup`, against the copy", key: "restic", of: "copy"},
		{what: "its repository", key: "restic, stored", unit: "GiB"},
		{what: "second backup, nothing changed, read and compared, against `cat`", key: "unchanged", of: "cat", most: 3.0},
		{what: "zeros: `qemu-img convert`, raw to raw", key: "copy, zeros", of: "copy, zeros"},
		{what: "zeros: full backup", key: "backup, zeros", of: "copy, zeros"},
		{what: "random bytes: `qemu-img convert`, raw to raw", key: "copy, random", of: "copy, random"},
		{what: "random bytes: full backup", key: "backup, random", of: "copy, random"},
		{what: "full backup into a local S3 server", key: "S3, near", of: "S3, near"},
		{what: "full backup into a local S3 server, 50 ms later at every request", key: "S3, far", of: "S3, near", most: 1.43},
	}},
	{"Increments by a change map", fmt.Sprintf("Times include opening the repository. Scattered changes are of 4 KiB at random places of the whole disk; "+
		"chunks are of 64 KiB. A generation changes pages of %d KiB of the databases, most of them in a tenth of them, and goes on with the log.", pageSize>>10), []row{
		{what: "0.25 % of the disk scattered", key: "scattered 0.25 %", of: ""},
		{what: "1 % of the disk scattered", key: "scattered 1 %", most: 1.5},
		{what: "time for 1,000 changed chunks, 0.25 %", key: "scattered 0.25 %, each", unit: "s", of: "scattered 0.25 %, each"},
		{what: "time for 1,000 changed chunks, 1 %", key: "scattered 1 %, each", of: "scattered 0.25 %, each", most: 1.1},
		{what: "stored for a changed chunk, 0.25 %", key: "scattered 0.25 %, stored", unit: "KiB", of: "scattered 0.25 %, stored"},
		{what: "stored for a changed chunk, 1 %", key: "scattered 1 %, stored", unit: "KiB", of: "scattered 0.25 %, stored", most: 1.1},
		{what: "a generation", key: "generation"},
		{what: "changed chunks in a generation", key: "generation, chunks", unit: "chunks"},
		{what: "stored for a changed chunk, generation", key: "generation, stored", unit: "KiB"},
	}},
	{"Restore and check", "The spinning disk takes 10 ms for each seek and passes 150 MB/s: its rate is that of the point's stored bytes in the time so added up, as a part of 150 MB/s.", []row{
		{what: "restore to a raw file, against the copy", key: "restore", of: "copy", most: 1.1},
		{what: "`check --read-data`, against the restore", key: "check", of: "restore", most: 0.7},
		{what: "restore from a spinning disk, of its sequential rate, first point", key: "spinning, first", unit: "%", least: 80},
		{what: "its seeks", key: "spinning, first, seeks", unit: "seeks"},
		{what: "restore from a spinning disk, after the generations", key: "spinning, last", unit: "%", least: 50},
		{what: "its seeks", key: "spinning, last, seeks", unit: "seeks"},
		{what: "bytes that passed under the head, of those stored", key: "spinning, last, passed", unit: "%"},
	}},
	{"Reading from a backup", fmt.Sprintf("Over one NBD connection: %d random reads of 4 KiB, %d at a time, of data in the server's caches (warm: %d MiB of the disk, read before) or not "+
		"(cold: the whole disk; the server's files are in the page cache); %d GiB in turn, in pieces of %d KiB, %d at a time. Ratios are of rates.",
		randomReads, depth, workingSet>>20, streamed>>30, streamSize>>10, streams), []row{
		{what: "warm: `qemu-nbd`, raw", key: "warm, raw", of: "warm, raw", rate: true},
		{what: "warm: `holdfast publish`", key: "warm, holdfast", of: "warm, raw", rate: true, least: 1.0},
		{what: "warm: `qemu-nbd`, qcow2 with zstd", key: "warm, qcow2", of: "warm, raw", rate: true},
		{what: "cold: `qemu-nbd`, qcow2 with zstd", key: "cold, qcow2", of: "cold, qcow2", rate: true},
		{what: "cold: `holdfast publish`", key: "cold, holdfast", of: "cold, qcow2", rate: true, least: 2.0},
		{what: "cold: `qemu-nbd`, raw", key: "cold, raw", of: "cold, qcow2", rate: true},
		{what: "in turn: `qemu-nbd`, qcow2 with zstd", key: "stream, qcow2", of: "stream, qcow2", rate: true},
		{what: "in turn: `holdfast publish`", key: "stream, holdfast", of: "stream, qcow2", rate: true, least: 1.0},
		{what: "in turn: `qemu-nbd`, raw", key: "stream, raw", of: "stream, qcow2", rate: true},
	}},
	{"Recovery", "", []row{
		{what: "`recover` to the guest's first read, disk of 4 GiB", key: "first read, 4 GiB", most: 0.5},
		{what: "`recover` to the guest's first read, and a disk of 64 TiB", key: "first read, 64 TiB", most: 0.5},
		{what: "guest's start to its login prompt, local raw disk", key: "local boot", of: "local boot"},
		{what: "guest's start to its login prompt, from the backup", key: "recovered boot", of: "local boot", most: 1.15},
		{what: "`recover` to the login prompt", key: "recover to login", of: "local boot"},
	}},
	{"Memory", "Peak of the process; mapped files count as far as they were touched.", []row{
		{what: "full backup", key: "backup, memory", unit: "MB", most: 256},
		{what: "full backup, `--compression small`", key: "small, memory", unit: "MB", most: 256},
		{what: "full backup into S3", key: "S3, near, memory", unit: "MB", most: 256},
		{what: "restore", key: "restore, memory", unit: "MB", most: 256},
		{what: "`check --read-data`", key: "check, memory", unit: "MB", most: 256},
		{what: "`publish`, after all reads", key: "holdfast, memory", unit: "MB", most: 256},
	}},
	{"Growth", "Ratios are against a tenth of the chunks. An opening for the first time is one without a cache on the machine. Finding is of chunks that are there and of as many that are not, at random, in a process that has opened the repository.", append(growing(),
		row{what: "10 million chunks, 1,000 restore points: opening for the first time", key: "first opening", most: 3},
		row{what: "10 million chunks, 1,000 restore points: memory of the first opening", key: "first opening, memory", unit: "MB", most: 200},
		row{what: "10 million chunks, 1,000 restore points: opening", key: "opening", most: 1},
		row{what: "10 million chunks, 1,000 restore points: memory of opening", key: "opening, memory", unit: "MB", most: 200},
		row{what: "10 million chunks, 1,000 restore points: `prune` with nothing to do", key: "prune", most: 10},
		row{what: "10 million chunks, 1,000 restore points: memory of that prune", key: "prune, memory", unit: "MB", most: 300},
	)},
	{"Images", "", converted()},
}

func converted() (rows []row) {
	for _, c := range conversions {
		rows = append(rows,
			row{what: "`qemu-img convert`, " + c.name, key: "qemu-img, " + c.name, of: "qemu-img, " + c.name},
			row{what: "`holdfast image convert`, " + c.name, key: "holdfast, " + c.name, of: "qemu-img, " + c.name, most: 1.0})
	}
	return rows
}
