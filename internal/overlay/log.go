package overlay

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"
)

// Everything here follows docs/overlay-format.md.

const (
	version     = 1
	headerLen   = 4096
	maxIdentity = 1024
	recordLen   = 32       // of a record's header
	maxRecord   = 64 << 10 // of a whole record
	commitLen   = recordLen + 8
	entryLen    = 12
	noSlot      = 0xffffffff

	logMagic  = "HFOVLOG\n"
	dataMagic = "HFOVDATA"

	dataName   = "data"
	logName    = "log"
	newLogName = "log.new"
)

const (
	kindMap    = 1
	kindZero   = 2
	kindCommit = 3
	kindLost   = 4
)

// rewriteSlack is by how many bytes a log may exceed twice the map before it is
// written anew. A variable for tests.
var rewriteSlack int64 = 4 << 20

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	le         = binary.LittleEndian
)

// boot identifies a run of the machine; zeros when that is not known.
type boot [16]byte

// header of a log.
type header struct {
	id       [16]byte
	size     int64
	synced   int64 // length of what was synced before the file got its name
	opening  uint32
	salt     uint32
	boot     boot
	identity Identity
}

func (h *header) encode() []byte {
	b := make([]byte, headerLen)
	copy(b, logMagic)
	le.PutUint32(b[8:], version)
	le.PutUint32(b[12:], headerLen)
	copy(b[16:], h.id[:])
	le.PutUint64(b[32:], uint64(h.size))
	le.PutUint32(b[40:], blockSize)
	le.PutUint32(b[44:], clusterSize)
	le.PutUint64(b[48:], uint64(h.synced))
	le.PutUint32(b[56:], h.opening)
	le.PutUint32(b[60:], h.salt)
	copy(b[64:], h.boot[:])
	le.PutUint32(b[80:], uint32(len(h.identity)))
	copy(b[84:], h.identity)
	return seal(b)
}

func decodeHeader(b []byte) (h header, err error) {
	if err := checkHeader(b, logMagic); err != nil {
		return h, fmt.Errorf("log: %w", err)
	}
	h = header{
		id: [16]byte(b[16:]), size: int64(le.Uint64(b[32:])), synced: int64(le.Uint64(b[48:])),
		opening: le.Uint32(b[56:]), salt: le.Uint32(b[60:]), boot: boot(b[64:]),
	}
	n := le.Uint32(b[80:])
	if h.size < 0 || h.size > maxSize || h.synced < headerLen+commitLen || n > maxIdentity ||
		le.Uint32(b[40:]) != blockSize || le.Uint32(b[44:]) != clusterSize {
		return h, fmt.Errorf("%w: log header with impossible values", ErrDamaged)
	}
	h.identity = Identity(b[84 : 84+n])
	return h, nil
}

func encodeDataHeader(id [16]byte) []byte {
	b := make([]byte, headerLen)
	copy(b, dataMagic)
	le.PutUint32(b[8:], version)
	le.PutUint32(b[12:], headerLen)
	copy(b[16:], id[:])
	le.PutUint32(b[32:], clusterSize)
	return seal(b)
}

func checkDataHeader(f io.ReaderAt, id [16]byte) error {
	b := make([]byte, headerLen)
	if err := readHeader(f, b); err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	if err := checkHeader(b, dataMagic); err != nil {
		return fmt.Errorf("data file: %w", err)
	}
	if !bytes.Equal(b[16:32], id[:]) || le.Uint32(b[32:]) != clusterSize {
		return fmt.Errorf("%w: data file is another overlay's", ErrDamaged)
	}
	return nil
}

func seal(b []byte) []byte {
	le.PutUint32(b[headerLen-4:], crc32.Checksum(b[:headerLen-4], castagnoli))
	return b
}

func readHeader(f io.ReaderAt, b []byte) error {
	_, err := f.ReadAt(b, 0)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: shorter than its header", ErrDamaged)
	}
	return err
}

func checkHeader(b []byte, magic string) error {
	switch {
	case string(b[:8]) != magic:
		return fmt.Errorf("%w: not a file of an overlay", ErrDamaged)
	case le.Uint32(b[8:]) > version:
		return fmt.Errorf("%w: version %d", ErrVersion, le.Uint32(b[8:]))
	case le.Uint32(b[headerLen-4:]) != crc32.Checksum(b[:headerLen-4], castagnoli):
		return fmt.Errorf("%w: header's checksum", ErrDamaged)
	case le.Uint32(b[8:]) != version || le.Uint32(b[12:]) != headerLen:
		return fmt.Errorf("%w: header's version or length", ErrDamaged)
	}
	return nil
}

// record is one of the log, as content to be written or as read.
type record struct {
	kind    byte
	content []byte
	number  uint64
	durable int64
}

// mapEntry is one entry of a map record.
type mapEntry struct {
	cluster, slot uint32
	data, zero    uint16
}

// encodeMap makes map records, as many as it takes.
func encodeMap(list []mapEntry) []record {
	const most = (maxRecord - recordLen) / entryLen
	var recs []record
	for len(list) > 0 {
		n := min(len(list), most)
		b := make([]byte, 0, n*entryLen)
		for _, e := range list[:n] {
			b = le.AppendUint32(b, e.cluster)
			b = le.AppendUint32(b, e.slot)
			b = le.AppendUint16(b, e.data)
			b = le.AppendUint16(b, e.zero)
		}
		recs = append(recs, record{kind: kindMap, content: b})
		list = list[n:]
	}
	return recs
}

func encodeZero(first, n int64) record {
	b := le.AppendUint32(nil, uint32(first))
	return record{kind: kindZero, content: le.AppendUint32(b, uint32(n))}
}

func encodeCommit(upto int64) record {
	return record{kind: kindCommit, content: le.AppendUint64(nil, uint64(upto))}
}

// appendTo encodes the record.
func (r record) appendTo(b []byte, salt uint32) []byte {
	at := len(b)
	b = append(b, make([]byte, recordLen)...)
	b = append(b, r.content...)
	p := b[at:]
	le.PutUint32(p[4:], uint32(len(p)))
	le.PutUint64(p[8:], r.number)
	le.PutUint64(p[16:], uint64(r.durable))
	p[24] = r.kind
	le.PutUint32(p[28:], salt)
	le.PutUint32(p, crc32.Checksum(p[4:], castagnoli))
	return b
}

// parseLen tells the length of the record whose header is p, if it may be one
// of a log with this salt.
func parseLen(p []byte, salt uint32) (int, bool) {
	n := le.Uint32(p[4:])
	return int(n), n >= recordLen && n <= maxRecord && n%4 == 0 && le.Uint32(p[28:]) == salt
}

// parse decodes the record that fills p, if it is valid. The content is part
// of p.
func parse(p []byte) (record, bool) {
	r := record{kind: p[24], content: p[recordLen:], number: le.Uint64(p[8:]), durable: int64(le.Uint64(p[16:]))}
	return r, le.Uint32(p) == crc32.Checksum(p[4:], castagnoli)
}

// scan reads records from the header's end on and calls f with each and the
// offset of its end. It returns the offset of the first that is not valid, and
// the number of the last that is.
func scan(file io.ReaderAt, size int64, salt uint32, f func(r record, end int64) error) (end int64, last uint64, err error) {
	end = headerLen
	in := bufio.NewReaderSize(io.NewSectionReader(file, end, max(size-end, 0)), maxRecord)
	for {
		p, err := in.Peek(recordLen)
		if err == nil {
			n, ok := parseLen(p, salt)
			if !ok {
				return end, last, nil
			}
			p, err = in.Peek(n)
		}
		if errors.Is(err, io.EOF) {
			return end, last, nil
		}
		if err != nil {
			return end, last, fmt.Errorf("read log at %d: %w", end, err)
		}
		r, ok := parse(p)
		if !ok || r.number != last+1 {
			return end, last, nil
		}
		last, end = r.number, end+int64(len(p))
		if err := f(r, end); err != nil {
			return end, last, fmt.Errorf("log record that ends at %d: %w", end, err)
		}
		_, _ = in.Discard(len(p)) // was peeked
	}
}

// load reads the log: its header, which accept may refuse, and the map that is
// to be believed.
func load(d dir, now boot, accept func(header) error) (header, *blockMap, error) {
	f, err := d.open(logName)
	if err != nil {
		return header{}, nil, err
	}
	h, m, err := loadFile(f, now, accept)
	return h, m, errors.Join(err, f.Close())
}

func loadFile(f file, now boot, accept func(header) error) (h header, m *blockMap, err error) {
	b := make([]byte, headerLen)
	if err = readHeader(f, b); err != nil {
		return h, nil, fmt.Errorf("log: %w", err)
	}
	if h, err = decodeHeader(b); err != nil {
		return h, nil, err
	}
	if err = accept(h); err != nil {
		return h, nil, err
	}
	size, err := f.Size()
	if err != nil {
		return h, nil, err
	}
	var upto int64
	lost := false
	end, last, err := scan(f, size, h.salt, func(r record, end int64) error {
		switch r.kind {
		case kindCommit:
			if len(r.content) != 8 || le.Uint64(r.content) > uint64(end) || int64(le.Uint64(r.content)) < upto {
				return fmt.Errorf("%w: bad commit", ErrDamaged)
			}
			upto = int64(le.Uint64(r.content))
		case kindLost:
			lost = true
		}
		return nil
	})
	if err != nil {
		return h, nil, err
	}
	kept := now == h.boot && now != (boot{}) && !lost
	if err = checkTail(f, size, end, last, h, kept); err != nil {
		return h, nil, err
	}
	if kept {
		upto = end
	}
	m = newBlockMap(h.size)
	_, _, err = scan(f, size, h.salt, func(r record, end int64) error {
		if end > upto {
			return nil
		}
		return m.apply(r)
	})
	return h, m, err
}

// checkTail tells a torn end from damage. Valid records end at end. When the
// page cache was kept nothing valid may follow.
func checkTail(f io.ReaderAt, size, end int64, last uint64, h header, kept bool) error {
	if end < h.synced {
		return fmt.Errorf("%w: log record at %d", ErrDamaged, end)
	}
	rest := bufio.NewReaderSize(io.NewSectionReader(f, end, size-end), maxRecord)
	for at := end; ; at += 4 {
		p, err := rest.Peek(recordLen)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log at %d: %w", at, err)
		}
		if n, ok := parseLen(p, h.salt); ok {
			if p, err = rest.Peek(n); err == nil {
				if r, ok := parse(p); ok && r.number > last && (kept || r.durable > end) {
					return fmt.Errorf("%w: log record at %d", ErrDamaged, end)
				}
			}
		}
		_, _ = rest.Discard(4) // was peeked
	}
}

// apply does to the map what a record says, bounds checked.
func (m *blockMap) apply(r record) error {
	n := m.clusters()
	switch r.kind {
	case kindMap:
		if len(r.content)%entryLen != 0 {
			return fmt.Errorf("%w: length of a map record", ErrDamaged)
		}
		for p := r.content; len(p) > 0; p = p[entryLen:] {
			x := mapEntry{le.Uint32(p), le.Uint32(p[4:]), le.Uint16(p[8:]), le.Uint16(p[10:])}
			if int64(x.cluster) >= n || x.data&x.zero != 0 || x.data != 0 && x.slot == noSlot {
				return fmt.Errorf("%w: bad entry for cluster %d", ErrDamaged, x.cluster)
			}
			if e := m.get(int64(x.cluster)); e.slot != 0 && x.slot != noSlot && e.slot != x.slot+1 {
				return fmt.Errorf("%w: cluster %d in two slots", ErrDamaged, x.cluster)
			}
			m.set(x, 0)
		}
	case kindZero:
		if len(r.content) != 8 {
			return fmt.Errorf("%w: length of a zero record", ErrDamaged)
		}
		first, count := int64(le.Uint32(r.content)), int64(le.Uint32(r.content[4:]))
		if first > n || count > n-first {
			return fmt.Errorf("%w: bad range of zero clusters", ErrDamaged)
		}
		m.setZero(first, count, 0)
	case kindCommit, kindLost:
	default:
		return fmt.Errorf("%w: record of kind %d", ErrVersion, r.kind)
	}
	return nil
}

// log is the open log. Its owner gives turns.
type log struct {
	f         file
	h         header
	tail      int64  // where the next record goes
	number    uint64 // of the last record
	committed int64  // the tail as of the last commit; more records mean more to commit
	durable   int64  // the end of the last synced commit
	durableNo uint64 // the number of that commit
	rewriteAt int64  // the length beyond which to write it anew
}

// append writes records, all of them or, on an error, none.
func (l *log) append(recs ...record) error {
	var b []byte
	number := l.number
	for _, r := range recs {
		number++
		r.number, r.durable = number, l.durable
		b = r.appendTo(b, l.h.salt)
	}
	if _, err := l.f.WriteAt(b, l.tail); err != nil {
		err = fmt.Errorf("append to log: %w", err)
		// Some of the records may be there. They must not be found: what they
		// say has not happened.
		if terr := l.f.Truncate(l.tail); terr != nil {
			err = fmt.Errorf("%w: %w; %w", ErrFailed, err, terr)
		}
		return err
	}
	l.tail += int64(len(b))
	l.number = number
	return nil
}

// lose ends the log with a record that takes the trust from all that was not
// synced. It goes where a record may be already, so that a full disk takes it.
func (l *log) lose() error {
	l.tail, l.number = l.durable, l.durableNo
	if err := l.append(record{kind: kindLost}); err != nil {
		return err
	}
	return l.f.Truncate(l.tail)
}

// writeLog writes log.new with the map, synced. It sets the header's salt and
// length. mu is held while the map is read, not while it is written.
// It returns the number of the last record.
func writeLog(d dir, h *header, m *blockMap, mu sync.Locker) (last uint64, err error) {
	f, err := d.create(newLogName)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(err, d.remove(newLogName))
		}
	}()
	var salt [4]byte
	_, _ = rand.Read(salt[:]) // never fails
	h.salt = le.Uint32(salt[:])
	w := &log{f: f, h: *h, tail: headerLen}
	for i := 0; i < len(m.leaves); {
		var recs []record
		mu.Lock()
		recs, i = m.encode(i)
		mu.Unlock()
		if err := w.append(recs...); err != nil {
			return 0, err
		}
	}
	if err := w.append(encodeCommit(w.tail)); err != nil {
		return 0, err
	}
	h.synced = w.tail
	if _, err := f.WriteAt(h.encode(), 0); err != nil {
		return 0, err
	}
	return w.number, f.Sync()
}

// encode makes records of leaves from i on and tells where it stopped: it goes
// on through any number of leaves without entries, and one with.
func (m *blockMap) encode(i int) (recs []record, next int) {
	for i < len(m.leaves) {
		l := m.leaves[i]
		first := i
		for i < len(m.leaves) && m.leaves[i].entries == nil && m.leaves[i].zero == l.zero {
			i++
		}
		if first == i {
			return append(recs, encodeMap(l.list(int64(i)*leafLen))...), i + 1
		}
		if l.zero {
			from, to := int64(first)*leafLen, min(int64(i)*leafLen, m.clusters())
			recs = append(recs, encodeZero(from, to-from))
		}
	}
	return recs, i
}

// list gives the entries that say anything; first is the leaf's first cluster.
func (l leaf) list(first int64) []mapEntry {
	var list []mapEntry
	for i, e := range l.entries {
		x := mapEntry{cluster: uint32(first) + uint32(i), slot: noSlot, data: e.data, zero: e.zero}
		if e.data != 0 {
			x.slot = e.slot - 1
		}
		if e.data|e.zero != 0 {
			list = append(list, x)
		}
	}
	return list
}

// installLog gives log.new its name, durably.
func installLog(d dir) error {
	if err := d.rename(newLogName, logName); err != nil {
		return err
	}
	return d.sync()
}

// continueLog opens the log that writeLog made and installLog named.
func continueLog(d dir, h header, last uint64) (*log, error) {
	f, err := d.open(logName)
	if err != nil {
		return nil, err
	}
	return &log{
		f: f, h: h, tail: h.synced, number: last, committed: h.synced, durable: h.synced, durableNo: last,
		rewriteAt: 2*h.synced + rewriteSlack,
	}, nil
}
