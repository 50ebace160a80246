package harden

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"holdfast/internal/osfile"
)

const (
	journalHeader = "holdfast locks 1\n"
	journalName   = "journal"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// journal is root's record of the locks: lines that are added to a file, and
// the map that they make.
//
//   - UNIXTIME NAME CRC    locked until then, or to be
//   - 0 NAME CRC           not locked any more, or never was
//     = 0 . CRC              all of the above is in force
//
// CRC is CRC-32C of the line before it, 8 hex digits.
type journal struct {
	path    string
	f       *os.File
	until   map[string]int64
	open    map[string]bool // named after the last "=", and whether for the first time
	lines   int
	size    int64 // of the file
	damaged bool
}

func journalLine(op byte, until int64, name string) string {
	s := fmt.Sprintf("%c %d %s ", op, until, name)
	return fmt.Sprintf("%s%08x\n", s, crc32.Checksum([]byte(s), castagnoli))
}

// readJournal reads what is there. whole is the length up to the last good line.
func readJournal(path string) (j *journal, whole int64, err error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, 0, err
	}
	j = &journal{path: path, until: map[string]int64{}, open: map[string]bool{}}
	rest, ok := bytes.CutPrefix(text, []byte(journalHeader))
	if !ok {
		return nil, 0, fmt.Errorf("%w: %s is not of this version", ErrDamaged, path)
	}
	at := int64(len(journalHeader))
	whole = at
	bad := false
	for line := range strings.Lines(string(rest)) {
		at += int64(len(line))
		if !j.take(line) {
			bad = true
			continue
		}
		j.damaged = j.damaged || bad // a good line behind a bad one: no torn end
		whole = at
	}
	return j, whole, nil
}

// take takes a line in, if it is good.
func (j *journal) take(line string) bool {
	w := strings.Split(line, " ")
	if len(w) != 4 || len(w[0]) != 1 {
		return false
	}
	until, err := strconv.ParseInt(w[1], 10, 64)
	if err != nil || journalLine(w[0][0], until, w[2]) != line {
		return false
	}
	j.lines++
	switch w[0] {
	case "+":
		has, had := j.until[w[2]]
		j.until[w[2]] = max(until, has)
		if _, is := j.open[w[2]]; !is {
			j.open[w[2]] = !had
		}
	case "-":
		delete(j.until, w[2])
		delete(j.open, w[2])
	case "=":
		clear(j.open)
	default:
		return false
	}
	return true
}

// openJournal opens it for writing; a torn end is cut off.
func openJournal(path string) (*journal, error) {
	j, whole, err := readJournal(path)
	if err != nil {
		return nil, err
	}
	if j.f, err = os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0); err != nil {
		return nil, err
	}
	if !j.damaged {
		err = errors.Join(j.f.Truncate(whole), j.f.Sync())
	}
	if fi, statErr := j.f.Stat(); statErr == nil {
		j.size = fi.Size()
	} else {
		err = errors.Join(err, statErr)
	}
	if err != nil {
		return nil, errors.Join(err, j.f.Close())
	}
	return j, nil
}

// createJournal makes an empty one, if there is none.
func createJournal(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return writeNew(path, []byte(journalHeader), 0o600)
}

// add writes lines, durable only after a sync.
func (j *journal) add(lines ...string) error {
	n, err := j.f.WriteString(strings.Join(lines, ""))
	if err != nil { // the disk is full: what was written of it must not stand in the middle
		return errors.Join(err, j.f.Truncate(j.size))
	}
	j.size += int64(n)
	for _, l := range lines {
		if !j.take(l) {
			panic("harden: wrote a bad line: " + l)
		}
	}
	return nil
}

// sync makes all lines durable. An error of fsync is final for a file, so after
// one they go into a new file.
func (j *journal) sync() error {
	err := j.f.Sync()
	if err != nil && !j.damaged {
		err = j.rewrite()
	}
	return err
}

// compact writes the journal anew, when most of it is history. A damaged one
// stays as it is.
func (j *journal) compact() error {
	if j.damaged || j.lines < 2*len(j.until)+1000 {
		return nil
	}
	return j.rewrite()
}

func (j *journal) rewrite() error {
	var b bytes.Buffer
	b.WriteString(journalHeader)
	for name, until := range j.until {
		if first := j.open[name]; !first {
			b.WriteString(journalLine('+', until, name))
		}
	}
	b.WriteString(journalLine('=', 0, "."))
	for name := range j.open {
		b.WriteString(journalLine('+', j.until[name], name))
	}
	if err := writeNew(j.path, b.Bytes(), 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(j.path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	err = j.f.Close()
	j.f, j.lines, j.size = f, len(j.until)+1, int64(b.Len())
	return err
}

// writeNew puts a file in the place of path: whole, durable, and of that mode.
func writeNew(path string, data []byte, mode fs.FileMode) error {
	tmp := path + ".new"
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return osfile.SyncDir(filepath.Dir(path))
}
