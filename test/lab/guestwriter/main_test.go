package main

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// put writes records [from, to] and their journal entries as the writer does.
func put(t *testing.T, dir string, from, to uint64) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "slots"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	pl := &place{dir: dir, slots: f}
	p := make([]byte, recordSize)
	for n := from; n <= to; n++ {
		record(p, n)
		if _, err := f.WriteAt(p, slotOf(n)*recordSize); err != nil {
			t.Fatal(err)
		}
		if n%batch == 0 {
			if err := pl.note(n); err != nil {
				t.Fatal(err)
			}
		}
	}
	if pl.journal != nil {
		pl.journal.Close()
	}
}

func problems(t *testing.T, dir string, acked uint64) []string {
	t.Helper()
	st, err := read(dir)
	if err != nil {
		t.Fatal(err)
	}
	return st.check(acked)
}

func TestEveryPassMeetsEverySlot(t *testing.T) {
	for pass := range uint64(3) {
		seen := map[int64]bool{}
		for i := range uint64(slots) {
			seen[slotOf(pass*slots+i+1)] = true
		}
		if len(seen) != slots {
			t.Fatalf("pass %d meets %d of %d slots", pass, len(seen), slots)
		}
	}
}

// TestVerify writes histories of many lengths and damages each: whatever was
// acknowledged and then lost, torn or put back must be found.
func TestVerify(t *testing.T) {
	for _, last := range []uint64{16, 160, slots, slots + 32, 2*slots + 1600} {
		dir := t.TempDir()
		put(t, dir, 1, last)
		if bad := problems(t, dir, last); bad != nil {
			t.Fatalf("up to %d: %v", last, bad[0])
		}
		if bad := problems(t, dir, last+batch); bad == nil {
			t.Fatalf("up to %d: a lost batch was not found", last)
		}
		f, err := os.OpenFile(filepath.Join(dir, "slots"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		for range 20 {
			lo := max(last, slots) - slots
			n := lo + 1 + rand.Uint64N(last-lo)
			if inFlight(n, last) {
				continue
			}
			p, old := make([]byte, recordSize), make([]byte, recordSize)
			off := slotOf(n) * recordSize
			if _, err := f.ReadAt(old, off); err != nil {
				t.Fatal(err)
			}
			copy(p, old)
			kind := rand.IntN(3)
			switch kind {
			case 0: // lost
				clear(p)
			case 1: // damaged
				p[rand.IntN(recordSize)] ^= 1 << rand.IntN(8)
			case 2: // what the slot held before
				clear(p)
				for m := n - 1; m > 0; m-- {
					if slotOf(m) == slotOf(n) {
						record(p, m)
						break
					}
				}
			}
			f.WriteAt(p, off)
			if bad := problems(t, dir, last); bad == nil {
				t.Fatalf("up to %d: damage %d to record %d was not found", last, kind, n)
			}
			f.WriteAt(old, off)
		}
		f.Close()
	}
}

// inFlight reports whether the slot of record n may hold anything, being next
// to be written after last.
func inFlight(n, last uint64) bool {
	for m := last + 1; m <= last+2*batch; m++ {
		if slotOf(m) == slotOf(n) {
			return true
		}
	}
	return false
}

// TestBatchInFlight: a batch that was not acknowledged may be there in part.
func TestBatchInFlight(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, 1, slots+320)
	put(t, dir, slots+325, slots+327) // of the next batch, out of order
	if bad := problems(t, dir, slots+320); bad != nil {
		t.Fatal(bad[0])
	}
	put(t, dir, slots+400, slots+400) // far ahead: batches between are missing
	if bad := problems(t, dir, slots+320); bad == nil || !strings.Contains(strings.Join(bad, "\n"), "should hold") {
		t.Fatalf("missing batches were not found: %d other things were", len(bad))
	}
}
