package overlay

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

// The tests here write sectors that carry the number of the write in every
// word, so that what is found after a crash tells which write it is from. 0
// is a sector of zeros.
const sectorSize = 512

var (
	thisBoot  = boot{1}
	nextBoot  = boot{2}
	thirdBoot = boot{3}
)

const baseVersion = 1

// oneGoroutine is why tests of every step or byte are left out of short runs.
const oneGoroutine = "it goes through every step in one goroutine, where the race detector finds nothing"

// written is one write or zeroing in a history of them, by sectors.
type written struct {
	first, n    int64
	version     uint64 // 0 zeroes
	begin, done int    // steps of the directory at its start and end
}

// flushed is one flush that succeeded.
type flushed struct {
	begin, done int
}

// history of one opening of an overlay.
type history struct {
	size    int64
	writes  []written
	flushes []flushed
}

func stamp(p []byte, version uint64) []byte {
	for i := 0; i+8 <= len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], version)
	}
	return p
}

func stampedBase(t testing.TB, size int64) *disk.Mem {
	t.Helper()
	m := disk.NewMem(size)
	if err := m.WriteAt(t.Context(), stamp(make([]byte, size), baseVersion), 0); err != nil {
		t.Fatal(err)
	}
	return m
}

// write makes a random write or zeroing and records it if it succeeded.
func (h *history) write(t testing.TB, o *Overlay, d *disktest.Dir, r *rand.Rand, version uint64) error {
	sectors := h.size / sectorSize
	w := written{first: r.Int64N(sectors), version: version, begin: d.Len()}
	w.n = 1 + r.Int64N(min(sectors-w.first, []int64{2, 16, 100}[r.IntN(3)]))
	if r.IntN(2) == 0 { // blocks, as guests write
		w.first &^= 7
		w.n = min((w.n+7)&^7, sectors-w.first)
	}
	var err error
	zeroes := r.IntN(3) == 0
	if zeroes {
		w.version = 0
	}
	// Until it has returned it may be there in part, or not; so if it fails.
	w.done = 1 << 60
	h.writes = append(h.writes, w)
	at := len(h.writes) - 1 // a write in the midst of this one comes after it
	if zeroes {
		err = o.ZeroAt(t.Context(), w.first*sectorSize, w.n*sectorSize)
	} else {
		err = o.WriteAt(t.Context(), stamp(make([]byte, w.n*sectorSize), version), w.first*sectorSize)
	}
	if err == nil {
		h.writes[at].done = d.Len()
	}
	return err
}

func (h *history) flush(t testing.TB, o *Overlay, d *disktest.Dir) error {
	f := flushed{begin: d.Len()}
	err := o.Flush(t.Context())
	f.done = d.Len()
	if err == nil {
		h.flushes = append(h.flushes, f)
	}
	return err
}

// allowed lists by sector the versions that may be found after a crash at step
// k. Must-survive is what was flushed, or after a mere death of the process all
// that had returned.
func (h *history) allowed(k int, powerLost bool) [][]uint64 {
	safe := k
	if powerLost {
		safe = -1
		for _, f := range h.flushes {
			if f.done <= k {
				safe = max(safe, f.begin)
			}
		}
	}
	may := make([][]uint64, h.size/sectorSize)
	for i := range may {
		may[i] = []uint64{baseVersion}
	}
	for _, w := range h.writes {
		if w.begin > k {
			continue
		}
		for i := w.first; i < w.first+w.n; i++ {
			if w.done <= safe {
				may[i] = may[i][:0]
			}
			may[i] = append(may[i], w.version)
		}
	}
	return may
}

// check compares what a disk holds with what may be there.
func (h *history) check(t testing.TB, r disk.Reader, may [][]uint64) error {
	p := make([]byte, h.size)
	if err := r.ReadAt(t.Context(), p, 0); err != nil {
		return err
	}
	for i := range may {
		s := p[i*sectorSize:][:sectorSize]
		v := binary.LittleEndian.Uint64(s)
		if !bytes.Equal(s[8:], s[:sectorSize-8]) {
			return fmt.Errorf("sector %d is mixed", i)
		}
		if !slices.Contains(may[i], v) {
			return fmt.Errorf("sector %d has version %d, may have %v", i, v, may[i])
		}
	}
	for e, err := range r.Extents(t.Context(), 0, h.size) {
		if err != nil {
			return err
		}
		if e.Zero && !disk.IsZero(p[e.Off:e.End()]) {
			return fmt.Errorf("extent %+v is not zero", e)
		}
	}
	return nil
}

// runHistory runs a random history on a new overlay in a crash directory, and
// tells from which step on the overlay exists. Some writes come in the midst of
// a flush, right after one of its syncs. Now and then the process dies and the
// next one goes on.
func runHistory(t *testing.T, r *rand.Rand, base disk.Reader, writes int) (*history, *disktest.Dir, int) {
	t.Helper()
	d := disktest.NewDir()
	if err := create(crashDir{d: d}, thisBoot, testID, base.Size()); err != nil {
		t.Fatal(err)
	}
	exists := d.Len()
	h := &history{size: base.Size()}
	var o *Overlay
	version := uint64(baseVersion)
	write := func() {
		version++
		if err := h.write(t, o, d, r, version); err != nil {
			t.Fatal(err)
		}
	}
	start := func() {
		var err error
		o, err = open(crashDir{d: d, synced: func() {
			// Not while the log is written anew: a write would wait for that.
			if o != nil && r.IntN(3) == 0 && o.appending.TryLock() {
				o.appending.Unlock()
				write()
			}
		}}, thisBoot, testID, keep(base))
		if err != nil {
			t.Fatal(err)
		}
	}
	start()
	for range writes {
		write()
		for n := 2; n > 0 && r.IntN(5-n) == 0; n-- { // often twice
			if err := h.flush(t, o, d); err != nil {
				t.Fatal(err)
			}
		}
		if r.IntN(20) == 0 {
			o = nil
			start()
		}
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	return h, d, exists
}

// keep makes a base that many overlays can close.
func keep(r disk.Reader) disk.Reader { return disk.ReadOnly(r) }

func smallLog(t *testing.T) {
	old := rewriteSlack
	rewriteSlack = 1500
	t.Cleanup(func() { rewriteSlack = old })
}

// TestPowerLoss loses the power at every step of a history, in many ways, and
// again while opening after that.
func TestPowerLoss(t *testing.T) {
	smallLog(t)
	r := disktest.Rand(t)
	if testing.Short() {
		t.Skip(oneGoroutine)
	}
	base := stampedBase(t, 200<<10+3*sectorSize)
	h, d, exists := runHistory(t, r, base, 40)
	states := 0
	for k := range d.Len() + 1 {
		may := h.allowed(k, true)
		for name, c := range d.Crashes(k, r, 4) {
			states++
			o, err := open(crashDir{d: c}, nextBoot, testID, keep(base))
			if k < exists && errors.Is(err, fs.ErrNotExist) {
				// Never made: then it can be made.
				if err := create(crashDir{d: c}, nextBoot, testID, base.Size()); err != nil {
					t.Fatalf("create after a crash at step %d, %s: %v", k, name, err)
				}
				continue
			}
			if err == nil {
				err = h.check(t, o, may)
			}
			if err == nil && r.IntN(300) == 0 {
				err = again(t, r, h, c, may, base)
			}
			if err != nil {
				t.Fatalf("power lost at step %d of %d, %s: %v", k, d.Len(), name, err)
			}
		}
	}
	t.Logf("%d steps, %d states", d.Len(), states)
}

// again loses the power while an overlay is being opened after a crash, at
// each step, and uses what is found then.
func again(t *testing.T, r *rand.Rand, h *history, c *disktest.Dir, may [][]uint64, base disk.Reader) error {
	for j := range c.Len() + 1 {
		for name, c2 := range c.Crashes(j, r, 2) {
			o, err := open(crashDir{d: c2}, thirdBoot, testID, keep(base))
			if err == nil {
				err = h.check(t, o, may)
			}
			if err != nil {
				return fmt.Errorf("then again at step %d, %s: %w", j, name, err)
			}
			want := disktest.History(t, o, r, 10)
			if err := errors.Join(o.Flush(t.Context()), o.Close()); err != nil {
				return err
			}
			// Once flushed, nothing but that is found.
			for name, c3 := range c2.Crashes(c2.Len(), r, 1) {
				o, err := open(crashDir{d: c3}, boot{4}, testID, keep(base))
				if err != nil {
					return fmt.Errorf("and again, %s: %w", name, err)
				}
				if !bytes.Equal(contentOf(t, o), want) {
					return fmt.Errorf("and again, %s: a flushed write is lost", name)
				}
			}
		}
	}
	return nil
}

// TestWriteDuringFlush has a write come right after the sync of the data, or of
// the log, and the power fail after that flush and after the next one.
func TestWriteDuringFlush(t *testing.T) {
	ctx := t.Context()
	r := disktest.Rand(t)
	base := stampedBase(t, 1<<20)
	for _, slack := range []int64{-4072, 1 << 20} { // the first flush rewrites the log; none does
		for after := range 2 {
			d := disktest.NewDir()
			if err := create(crashDir{d: d}, thisBoot, testID, base.Size()); err != nil {
				t.Fatal(err)
			}
			old := rewriteSlack
			rewriteSlack = slack
			var o *Overlay
			syncs := 0
			o, err := open(crashDir{d: d, synced: func() {
				if o == nil {
					return
				}
				if syncs == after {
					if err := o.WriteAt(ctx, stamp(make([]byte, 4096), 8), 512<<10); err != nil {
						t.Error(err)
					}
				}
				syncs++
			}}, thisBoot, testID, keep(base))
			rewriteSlack = old
			if err != nil {
				t.Fatal(err)
			}
			want := stamp(make([]byte, 1<<20), baseVersion)
			stamp(want[:4096], 7)
			if err := errors.Join(o.WriteAt(ctx, want[:4096], 0), o.Flush(ctx)); err != nil {
				t.Fatal(err)
			}
			crash := func(late ...uint64) {
				t.Helper()
				for name, c := range d.Crashes(d.Len(), r, 20) {
					o, err := open(crashDir{d: c}, nextBoot, testID, keep(base))
					if err != nil {
						t.Errorf("write after sync %d, slack %d, %s: %v", after, slack, name, err)
						continue
					}
					got := contentOf(t, o)
					v := binary.LittleEndian.Uint64(got[512<<10:])
					copy(got[512<<10:], want[512<<10:][:4096])
					if !bytes.Equal(got, want) || !slices.Contains(late, v) {
						t.Errorf("write after sync %d, slack %d, %s: version %d, may be %v", after, slack, name, v, late)
					}
				}
			}
			crash(baseVersion, 8)
			if err := o.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			crash(8)
		}
	}
}

// TestDeath ends the process at every step: all that was answered is there,
// flushed or not.
func TestDeath(t *testing.T) {
	if testing.Short() {
		t.Skip(oneGoroutine)
	}
	smallLog(t)
	r := disktest.Rand(t)
	base := stampedBase(t, 200<<10+3*sectorSize)
	h, d, exists := runHistory(t, r, base, 100)
	for k := exists; k <= d.Len(); k++ {
		for _, torn := range []bool{false, true} {
			c := d.Killed(k, torn)
			o, err := open(crashDir{d: c}, thisBoot, testID, keep(base))
			if err == nil {
				err = h.check(t, o, h.allowed(k, false))
			}
			if err != nil {
				t.Fatalf("died at step %d of %d, torn %v: %v", k, d.Len(), torn, err)
			}
		}
	}
}

// TestErrors fails every single operation on files in turn: what was
// acknowledged is there after reopening, by the same boot and after a loss of
// power.
func TestErrors(t *testing.T) {
	if testing.Short() {
		t.Skip(oneGoroutine)
	}
	smallLog(t)
	seed := disktest.Seed(t)
	base := stampedBase(t, 200<<10)
	for n := 1; ; n++ {
		r := rand.New(rand.NewPCG(seed, 0)) // the same history each time
		d := disktest.NewDir()
		if err := create(crashDir{d: d}, thisBoot, testID, base.Size()); err != nil {
			t.Fatal(err)
		}
		o, err := open(crashDir{d: d}, thisBoot, testID, keep(base))
		if err != nil {
			t.Fatal(err)
		}
		h := &history{size: base.Size()}
		start := d.Len()
		d.Fail(n, disktest.ErrInjected)
		failed := 0
		for i := range 60 {
			err := h.write(t, o, d, r, uint64(i)+2)
			if err == nil && i%5 == 0 {
				err = h.flush(t, o, d)
			}
			if err == nil && o.failed == nil {
				continue
			}
			failed++
			if err != nil && !errors.Is(err, disktest.ErrInjected) && !errors.Is(err, ErrFailed) {
				t.Fatalf("operation %d: %v", n, err)
			}
		}
		if err := h.check(t, o, h.allowed(d.Len(), true)); err != nil && o.failed == nil {
			t.Fatalf("operation %d failed, still open: %v", n, err)
		}
		steps := d.Len() - start
		for name, c := range d.Crashes(d.Len(), r, 5) {
			for _, now := range []boot{thisBoot, nextBoot} {
				if now == thisBoot && name != "all" {
					continue // the page cache was there
				}
				o2, err := open(crashDir{d: c}, now, testID, keep(base))
				if err == nil {
					err = h.check(t, o2, h.allowed(d.Len(), true))
				}
				if err != nil {
					t.Fatalf("operation %d failed, reopened, %s: %v", n, name, err)
				}
				break
			}
		}
		if n > steps {
			if failed > 0 {
				t.Errorf("%d operations failed without cause", failed)
			}
			t.Logf("%d operations", n)
			return
		}
	}
}

// TestLostSync has the kernel drop what it could not write: data that a failed
// sync was for is gone, though the machine has not been restarted.
func TestLostSync(t *testing.T) {
	ctx := t.Context()
	base := stampedBase(t, 200<<10)
	for _, when := range []int{1, 3} { // the sync of the data; of the log
		d := disktest.NewDir()
		if err := create(crashDir{d: d}, thisBoot, testID, base.Size()); err != nil {
			t.Fatal(err)
		}
		o, err := open(crashDir{d: d}, thisBoot, testID, keep(base))
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(o.WriteAt(ctx, stamp(make([]byte, 4096), 7), 0), o.Flush(ctx),
			o.WriteAt(ctx, stamp(make([]byte, 4096), 8), 64<<10)); err != nil {
			t.Fatal(err)
		}
		d.Fail(when, syscall.EIO)
		if err := o.Flush(ctx); !errors.Is(err, syscall.EIO) {
			t.Fatalf("flush: %v", err)
		}
		for what, err := range map[string]error{
			"flush": o.Flush(ctx), "write": o.WriteAt(ctx, []byte{1}, 0), "zero": o.ZeroAt(ctx, 0, 1),
		} {
			if !errors.Is(err, ErrFailed) {
				t.Errorf("%s after a failed sync: %v", what, err)
			}
		}
		if err := o.Close(); err != nil {
			t.Error(err)
		}
		// The dropped data reads as it was on disk: as a hole.
		f, err := d.Open(dataName)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(make([]byte, 4096), 2*clusterSize); err != nil {
			t.Fatal(err)
		}
		o, err = open(crashDir{d: d}, thisBoot, testID, keep(base))
		if err != nil {
			t.Fatal(err)
		}
		want := stamp(make([]byte, 200<<10), baseVersion)
		stamp(want[:4096], 7)
		disktest.Reader(t, o, want)
	}
}

// TestHalfAppended has a full disk take the first of two records that belong
// together. What it says has not happened.
func TestHalfAppended(t *testing.T) {
	ctx := t.Context()
	base := stampedBase(t, 16<<20)
	d := disktest.NewDir()
	if err := create(crashDir{d: d}, thisBoot, testID, base.Size()); err != nil {
		t.Fatal(err)
	}
	o := mustOpen(t, d, base)
	// One record of 44 bytes each, until the next one still fits the page and
	// the one after it (of 40) does not.
	for n := int64(0); ; n++ {
		if err := o.WriteAt(ctx, stamp(make([]byte, 4096), 7), n*4096); err != nil {
			t.Fatal(err)
		}
		if left := 4096 - o.log.tail%4096; left >= 44 && left < 84 {
			break
		}
	}
	d.Limit(d.Used())
	if err := o.ZeroAt(ctx, 4096, 15*4096+64<<10); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("zero on a full disk: %v", err)
	}
	if err := o.WriteAt(ctx, stamp(make([]byte, 4096), 8), 4096); err != nil { // in place
		t.Fatal(err)
	}
	next := mustOpen(t, d.Killed(d.Len(), false), base)
	got, want := make([]byte, 4096), stamp(make([]byte, 4096), 8)
	if err := next.ReadAt(ctx, got, 4096); err != nil || !bytes.Equal(got, want) {
		t.Errorf("an answered write is lost: version %d, %v", got[0], err)
	}
}

// TestDiskFull fills the disk, checks that what was flushed is there, makes
// room and goes on.
func TestDiskFull(t *testing.T) {
	if testing.Short() {
		t.Skip(oneGoroutine)
	}
	smallLog(t)
	r := disktest.Rand(t)
	base := stampedBase(t, 400<<10)
	full := 0
	for limit := int64(5 * 4096); limit < 420<<10; limit += 11 << 10 {
		d := disktest.NewDir()
		if err := create(crashDir{d: d}, thisBoot, testID, base.Size()); err != nil {
			t.Fatal(err)
		}
		o, err := open(crashDir{d: d}, thisBoot, testID, keep(base))
		if err != nil {
			t.Fatal(err)
		}
		h := &history{size: base.Size()}
		d.Limit(limit)
		version := uint64(2)
		try := func(must bool) {
			err := h.write(t, o, d, r, version)
			if err == nil && version%4 == 0 {
				err = h.flush(t, o, d)
			}
			version++
			if err != nil && (must || !errors.Is(err, syscall.ENOSPC)) {
				t.Fatalf("limit %d: %v", limit, err)
			}
			if err != nil {
				full++
			}
			if err := h.check(t, o, h.allowed(d.Len(), false)); err != nil {
				t.Fatalf("limit %d: %v", limit, err)
			}
		}
		for range 60 {
			try(false)
		}
		if err := h.check(t, mustOpen(t, d.Killed(d.Len(), false), base), h.allowed(d.Len(), false)); err != nil {
			t.Fatalf("limit %d, process died: %v", limit, err)
		}
		for name, c := range d.Crashes(d.Len(), r, 3) {
			c.Limit(0)
			o, err := open(crashDir{d: c}, nextBoot, testID, keep(base))
			if err == nil {
				err = h.check(t, o, h.allowed(d.Len(), true))
			}
			if err != nil {
				t.Fatalf("limit %d, power lost, %s: %v", limit, name, err)
			}
		}
		d.Limit(0)
		for range 10 {
			try(true)
		}
	}
	if full < 100 {
		t.Errorf("the disk was full only %d times", full)
	}
}

func mustOpen(t *testing.T, d *disktest.Dir, base disk.Reader) *Overlay {
	t.Helper()
	o, err := open(crashDir{d: d}, thisBoot, testID, keep(base))
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// TestKill9 kills a real process that writes, and reads what it said it wrote.
// The child is this test too.
func TestKill9(t *testing.T) {
	const size = 64 << 20
	dir := os.Getenv("HOLDFAST_TEST_OVERLAY_CHILD")
	if dir != "" {
		kill9Child(t, dir, size)
		return
	}
	if bootID() == (boot{}) {
		t.Skip("this system tells no boot id: what was not flushed may be lost with the process")
	}
	dir = t.TempDir()
	if err := Create(dir, testID, size); err != nil {
		t.Fatal(err)
	}
	want := map[int64]uint64{} // by block: the last version said to be written
	for round := range 3 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKill9$", "-test.v")
		cmd.Env = append(os.Environ(), "HOLDFAST_TEST_OVERLAY_CHILD="+dir, "HOLDFAST_TEST_ROUND="+strconv.Itoa(round))
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		last := [2]uint64{}
		for n, lines := 0, bufio.NewScanner(out); lines.Scan(); {
			f := strings.Fields(lines.Text())
			if len(f) != 3 || f[0] != "wrote" {
				continue
			}
			block, _ := strconv.ParseInt(f[1], 10, 64)
			version, _ := strconv.ParseUint(f[2], 10, 64)
			want[block] = version
			last = [2]uint64{uint64(block), version}
			if n++; n == 2000 {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait() // killed
		if last[1] < 2000 {
			t.Fatalf("the child ended early, after %v", last)
		}
		o, err := Open(dir, testID, disk.NewMem(size))
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 4096)
		for block, version := range want {
			if err := o.ReadAt(t.Context(), p, block*4096); err != nil {
				t.Fatal(err)
			}
			// One write may have happened without being told.
			if got := binary.LittleEndian.Uint64(p); got != version && got != last[1]+1 {
				t.Fatalf("round %d: block %d has version %d, want %d", round, block, got, version)
			}
			if got := binary.LittleEndian.Uint64(p); !bytes.Equal(p, stamp(make([]byte, 4096), got)) && got != last[1]+1 {
				t.Fatalf("round %d: block %d is mixed", round, block)
			}
			want[block] = binary.LittleEndian.Uint64(p)
		}
		if err := o.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func kill9Child(t *testing.T, dir string, size int64) {
	o, err := Open(dir, testID, disk.NewMem(size))
	if err != nil {
		t.Fatal(err)
	}
	round, _ := strconv.ParseUint(os.Getenv("HOLDFAST_TEST_ROUND"), 10, 64)
	r := rand.New(rand.NewPCG(round, 1))
	for version := round*1_000_000 + 1; ; version++ {
		block := r.Int64N(size / 4096 / 16)
		if err := o.WriteAt(t.Context(), stamp(make([]byte, 4096), version), block*4096); err != nil {
			t.Fatal(err)
		}
		if version%500 == 0 {
			if err := o.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := io.WriteString(os.Stdout, fmt.Sprintf("wrote %d %d\n", block, version)); err != nil {
			return // the parent is gone
		}
	}
}
