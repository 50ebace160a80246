// Guestwriter runs inside a lab guest. It writes checksummed records that can
// be verified to the last acknowledged one, after whatever happened to the
// guest's disks.
//
//	guestwriter write DIR...             writes until it is killed
//	guestwriter verify [-acked N] [-cached] DIR... checks what is there; one line of JSON
//
// # What is written
//
// Records are numbered from 1. Record n is 4096 bytes, made of n alone, and
// goes to slot slotOf(n) of DIR/slots: every slot is written once in each pass
// of Slots records, in a scattered order, so each pass rewrites what the one
// before wrote. Batch records are written to every DIR in turn, each followed
// by an fsync, and then the last number is acknowledged: it is stored in
// /run/guestwriter/acked, which is memory and dies with the guest. Whoever
// reads that file from outside knows that everything up to that number has
// been flushed to every DIR.
//
// Each batch also appends an entry to a journal, DIR/journal.N, which is
// replaced by a new file now and then, so that directories and the allocation
// of the filesystem change too.
//
// # What is verified
//
// Let last be the highest intact record that is found in a DIR. Its batch may
// have been in flight; all batches before it were flushed, so every record of
// them that no later one has overwritten must be there, and so must everything
// up to -acked. Slots that the batch in flight was writing may hold anything.
// With several DIRs on several disks, all must have been stopped at one
// instant: a DIR is never ahead of the one named before it, nor behind by more
// than one batch.
//
// The writer continues from the batch in flight, so it can be started again
// after a recovery.
package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"time"
)

const (
	recordSize   = 4096 // bytes
	slots        = 4096 // records in DIR/slots: 16 MiB
	batch        = 16   // records per acknowledgement
	stride       = 1627 // odd, so that it walks every slot
	entrySize    = 16   // bytes of a journal entry
	journalLen   = 1024 // entries in one journal file
	journalFiles = 3    // kept
	ackedPath    = "/run/guestwriter/acked"
)

var table = crc32.MakeTable(crc32.Castagnoli)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "guestwriter:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 0 {
		return errors.New("say write or verify")
	}
	flags := flag.NewFlagSet("guestwriter", flag.ContinueOnError)
	acked := flags.Uint64("acked", 0, "everything up to this record must be there")
	cached := flags.Bool("cached", false, "believe what the kernel has in memory")
	pause := flags.Duration("pause", 0, "time to rest after each batch")
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	if flags.NArg() == 0 {
		return errors.New("name a directory")
	}
	switch args[0] {
	case "write":
		return write(flags.Args(), *pause)
	case "verify":
		return verify(flags.Args(), *acked, *cached)
	}
	return fmt.Errorf("unknown verb %q", args[0])
}

// slotOf is where record n goes. Within a pass it meets every slot once; each
// pass begins elsewhere.
func slotOf(n uint64) int64 {
	pass, i := (n-1)/slots, (n-1)%slots
	return int64((i*stride + pass*409) % slots)
}

// record fills p with record n: number, slot, half of a page that does not
// compress and half that does, and a checksum of all before it.
func record(p []byte, n uint64) {
	copy(p, "guestrec")
	binary.LittleEndian.PutUint64(p[8:], n)
	binary.LittleEndian.PutUint64(p[16:], uint64(slotOf(n)))
	x := n*0x9e3779b97f4a7c15 + 1
	for i := 24; i < recordSize-8; i += 8 {
		if i < recordSize/2 { // xorshift64
			x ^= x << 13
			x ^= x >> 7
			x ^= x << 17
		}
		binary.LittleEndian.PutUint64(p[i:], x)
	}
	binary.LittleEndian.PutUint64(p[recordSize-8:], uint64(crc32.Checksum(p[:recordSize-8], table)))
}

// number returns which record p is, and whether it is that record intact.
func number(p []byte) (uint64, bool) {
	n := binary.LittleEndian.Uint64(p[8:])
	if n == 0 || !bytes.HasPrefix(p, []byte("guestrec")) {
		return n, false
	}
	want := make([]byte, recordSize)
	record(want, n)
	return n, bytes.Equal(p, want)
}

// place is one DIR being written.
type place struct {
	dir     string
	slots   *os.File
	journal *os.File
	index   uint64 // of journal
}

func write(dirs []string, pause time.Duration) error {
	last := uint64(0)
	var places []*place
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		st, err := read(dir)
		if err != nil {
			return err
		}
		last = max(last, st.last)
		f, err := os.OpenFile(filepath.Join(dir, "slots"), os.O_RDWR|os.O_CREATE, 0o644)
		if err != nil {
			return err
		}
		places = append(places, &place{dir: dir, slots: f})
	}
	if err := os.MkdirAll(filepath.Dir(ackedPath), 0o755); err != nil {
		return err
	}
	ack, err := os.OpenFile(ackedPath, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	// The first record of the batch that was in flight: records are made of
	// their number alone, so writing one again does no harm.
	next := last/batch*batch + 1
	if last%batch == 0 && last > 0 {
		next = last - batch + 1
	}
	p := make([]byte, recordSize)
	for ; ; next += batch {
		end := next + batch - 1
		for _, pl := range places {
			for n := next; n <= end; n++ {
				record(p, n)
				if _, err := pl.slots.WriteAt(p, slotOf(n)*recordSize); err != nil {
					return err
				}
			}
			if err := pl.note(end); err != nil {
				return err
			}
			if err := pl.slots.Sync(); err != nil {
				return err
			}
		}
		if _, err := ack.WriteAt(fmt.Appendf(nil, "%020d\n", end), 0); err != nil {
			return err
		}
		if pause > 0 {
			time.Sleep(pause)
		}
	}
}

// note appends the batch's last number to the journal and flushes it.
func (p *place) note(n uint64) error {
	if i := n / batch / journalLen; p.journal == nil || i != p.index {
		if p.journal != nil {
			if err := p.journal.Close(); err != nil {
				return err
			}
		}
		f, err := os.OpenFile(filepath.Join(p.dir, fmt.Sprintf("journal.%012d", i)), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
		if err != nil {
			return err
		}
		p.journal, p.index = f, i
		names, err := filepath.Glob(filepath.Join(p.dir, "journal.*"))
		if err != nil {
			return err
		}
		sort.Strings(names)
		for _, name := range names[:max(0, len(names)-journalFiles)] {
			if err := os.Remove(name); err != nil {
				return err
			}
		}
	}
	e := make([]byte, entrySize)
	binary.LittleEndian.PutUint64(e, n)
	binary.LittleEndian.PutUint64(e[8:], uint64(crc32.Checksum(e[:8], table)))
	if _, err := p.journal.Write(e); err != nil {
		return err
	}
	return p.journal.Sync()
}

// state is what was found in a DIR.
type state struct {
	slots   []byte
	found   []uint64 // by slot; 0: empty
	intact  []bool   // by slot; an empty one is intact
	last    uint64   // highest intact record
	journal uint64   // highest intact journal entry
}

func read(dir string) (*state, error) {
	st := &state{found: make([]uint64, slots), intact: make([]bool, slots)}
	b, err := os.ReadFile(filepath.Join(dir, "slots"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if len(b) > slots*recordSize {
		return nil, fmt.Errorf("%s/slots is %d bytes long, more than ever written", dir, len(b))
	}
	st.slots = append(b, make([]byte, slots*recordSize-len(b))...)
	zero := make([]byte, recordSize)
	for i := range st.found {
		p := st.slots[i*recordSize:][:recordSize]
		if bytes.Equal(p, zero) {
			st.intact[i] = true
			continue
		}
		n, ok := number(p)
		ok = ok && slotOf(n) == int64(i)
		st.found[i], st.intact[i] = n, ok
		if ok {
			st.last = max(st.last, n)
		}
	}
	names, err := filepath.Glob(filepath.Join(dir, "journal.*"))
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		for ; len(b) >= entrySize; b = b[entrySize:] {
			n := binary.LittleEndian.Uint64(b)
			if binary.LittleEndian.Uint64(b[8:]) == uint64(crc32.Checksum(b[:8], table)) {
				st.journal = max(st.journal, n)
			}
		}
	}
	return st, nil
}

// check says what is wrong in st when everything up to acked was flushed.
func (st *state) check(acked uint64) []string {
	var bad []string
	if st.last < acked {
		bad = append(bad, fmt.Sprintf("record %d was acknowledged, the highest found is %d", acked, st.last))
	}
	if st.journal < acked {
		bad = append(bad, fmt.Sprintf("batch %d was acknowledged, the highest in the journal is %d", acked, st.journal))
	}
	// All batches before that of the last record were flushed.
	floor := acked
	if st.last > 0 {
		floor = max(floor, (st.last-1)/batch*batch)
	}
	if st.journal > floor+2*batch {
		bad = append(bad, fmt.Sprintf("the journal has batch %d, records end at %d", st.journal, st.last))
	}
	flight := map[int64]bool{}
	for n := floor + 1; n <= floor+2*batch; n++ {
		flight[slotOf(n)] = true
	}
	// Each pass begins elsewhere, so a slot's last record may be almost two
	// passes old.
	want := make([]uint64, slots)
	for n := max(floor, 2*slots) - 2*slots + 1; n <= floor; n++ {
		want[slotOf(n)] = n
	}
	for i := range want {
		switch {
		case flight[int64(i)]:
		case !st.intact[i]:
			bad = append(bad, fmt.Sprintf("slot %d is damaged; it should hold record %d", i, want[i]))
		case st.found[i] != want[i]:
			bad = append(bad, fmt.Sprintf("slot %d holds record %d; it should hold %d", i, st.found[i], want[i]))
		}
	}
	return bad
}

func verify(dirs []string, acked uint64, cached bool) error {
	// Read from the disk, not from memory. Only root may; others read what the
	// kernel has.
	if !cached {
		_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("3\n"), 0)
	}
	var bad []string
	last := make([]uint64, len(dirs))
	for i, dir := range dirs {
		st, err := read(dir)
		if err != nil {
			return err
		}
		for _, s := range st.check(acked) {
			bad = append(bad, dir+": "+s)
		}
		last[i] = st.last
		if i > 0 && (last[i] > last[i-1] || last[i]+batch < last[i-1]) {
			bad = append(bad, fmt.Sprintf("%s ends at record %d and %s at %d: not of one instant", dirs[i-1], last[i-1], dir, last[i]))
		}
	}
	if len(bad) > 0 {
		for _, s := range bad[:min(len(bad), 20)] {
			fmt.Println(s)
		}
		return fmt.Errorf("%d things are wrong", len(bad))
	}
	return json.NewEncoder(os.Stdout).Encode(map[string]any{"acked": acked, "last": last, "ok": true})
}
