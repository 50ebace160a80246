package publish

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

const size = 256 << 10

var (
	errAway    = errors.New("repository is away")
	errDamaged = errors.New("damaged")
)

// flaky is a disk of a repository that can be away.
type flaky struct {
	disk.Reader
	fail  func() error
	calls atomic.Int64
}

func (f *flaky) ReadAt(ctx context.Context, p []byte, off int64) error {
	f.calls.Add(1)
	if err := f.fail(); err != nil {
		return err
	}
	return f.Reader.ReadAt(ctx, p, off)
}

// Extents fails in the middle.
func (f *flaky) Extents(ctx context.Context, off, n int64) disk.Extents {
	return func(yield func(disk.Extent, error) bool) {
		for n > 0 {
			l := min(n, 4096)
			if !yield(disk.Extent{Off: off, Len: l}, nil) {
				return
			}
			off, n = off+l, n-l
			if err := f.fail(); err != nil {
				yield(disk.Extent{}, err)
				return
			}
		}
	}
}

func filled(t *testing.T, seed uint64) (*disk.Mem, []byte) {
	t.Helper()
	want := make([]byte, size)
	disktest.Fill(rand.New(rand.NewPCG(seed, 0)), want)
	m := disk.NewMem(size)
	if err := m.WriteAt(t.Context(), want, 0); err != nil {
		t.Fatal(err)
	}
	return m, want
}

// A read waits for a repository that is away, and gets its data when it is
// back.
func TestPatient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, want := filled(t, 1)
		back := time.Now().Add(3 * time.Minute)
		f := &flaky{Reader: m, fail: func() error {
			if time.Now().Before(back) {
				return errAway
			}
			return nil
		}}
		var mu sync.Mutex
		var told []error
		p := &patient{inner: f, limit: Patience, report: func(err error) { mu.Lock(); told = append(told, err); mu.Unlock() },
			permanent: func(err error) bool { return errors.Is(err, errDamaged) }}
		var wg sync.WaitGroup
		for range 5 {
			wg.Go(func() {
				b := make([]byte, 5000)
				if err := p.ReadAt(t.Context(), b, 777); err != nil || !bytes.Equal(b, want[777:5777]) {
					t.Errorf("read: %v", err)
				}
			})
		}
		wg.Wait()
		if now := time.Now(); now.Before(back) || now.Sub(back) > lastPause {
			t.Errorf("came back %s after the repository", now.Sub(back))
		}
		if n := f.calls.Load(); n > 5*60 {
			t.Errorf("%d attempts in three minutes", n)
		}
		if len(told) != 2 || !errors.Is(told[0], errAway) {
			t.Errorf("told %v", told)
		}
	})
}

func TestPatientEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := filled(t, 2)
		failure := errAway
		f := &flaky{Reader: m, fail: func() error { return failure }}
		p := &patient{inner: f, limit: Patience, permanent: func(err error) bool { return errors.Is(err, errDamaged) }}
		b := make([]byte, 512)

		begun := time.Now()
		if err := p.ReadAt(t.Context(), b, 0); !errors.Is(err, errAway) {
			t.Errorf("away for ever: %v", err)
		}
		if d := time.Since(begun); d < Patience || d > Patience+lastPause {
			t.Errorf("gave up after %s", d)
		}

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		begun = time.Now()
		if err := p.ReadAt(ctx, b, 0); !errors.Is(err, context.DeadlineExceeded) || time.Since(begun) != time.Second {
			t.Errorf("cancelled: %v after %s", err, time.Since(begun))
		}

		failure = errDamaged
		begun = time.Now()
		if err := p.ReadAt(t.Context(), b, 0); !errors.Is(err, errDamaged) || time.Since(begun) != 0 {
			t.Errorf("damaged: %v after %s", err, time.Since(begun))
		}
		failure = nil
		if err := p.ReadAt(t.Context(), b, size); !errors.Is(err, disk.ErrRange) || time.Since(begun) != 0 {
			t.Errorf("out of range: %v after %s", err, time.Since(begun))
		}
	})
}

// Extents are whole and in order whatever fails in between.
func TestPatientExtents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := filled(t, 3)
		n := 0
		f := &flaky{Reader: m, fail: func() error {
			if n++; n%3 == 0 {
				return errAway
			}
			return nil
		}}
		p := &patient{inner: f, limit: Patience}
		got, err := disk.Collect(p.Extents(t.Context(), 4096, 40*4096))
		if err != nil || len(got) != 40 {
			t.Fatalf("%v, %v", got, err)
		}
		for i, e := range got {
			if e.Off != int64(i+1)*4096 || e.Len != 4096 {
				t.Errorf("extent %d is %v", i, e)
			}
		}
		// A reader that has had enough is not asked again.
		for range p.Extents(t.Context(), 0, size) {
			break
		}
	})
}

// world is what a publication is served in.
type world struct {
	*testing.T
	spec    Spec
	disks   map[string]disk.Reader
	pinned  atomic.Int64
	first   atomic.Int64
	once    *sync.Once
	serving chan struct{} // closed when exports is set
	exports disk.Exports
	cancel  context.CancelFunc
	done    chan error
	ready   Ready
}

func newWorld(t *testing.T, overlay bool) (*world, []byte, []byte) {
	a, wantA := filled(t, 10)
	b, wantB := filled(t, 11)
	w := &world{T: t, disks: map[string]disk.Reader{"vda": a, "vdb": b}}
	w.spec = Spec{
		Disks:  []Disk{{Name: "vda", Size: size, Identity: "point/vda"}, {Name: "vdb", Size: size, Identity: "point/vdb"}},
		Listen: []string{"unix:" + filepath.Join(t.TempDir(), "run", "s"), "tcp:127.0.0.1:0"},
	}
	if overlay {
		w.spec.Overlay = filepath.Join(t.TempDir(), "overlays")
	}
	return w, wantA, wantB
}

func (w *world) deps(ready chan struct{}) Deps {
	return Deps{
		Pin: func(context.Context) error { w.pinned.Add(1); return nil },
		Open: func(_ context.Context, d Disk) (disk.Reader, error) {
			if w.pinned.Load() == 0 {
				w.Error("opened before it was pinned")
			}
			r, ok := w.disks[d.Name]
			if !ok {
				return nil, os.ErrNotExist
			}
			return readOnlyView{r}, nil
		},
		Listen: func(ctx context.Context, addr string) (net.Listener, error) {
			network, a, _ := strings.Cut(addr, ":")
			var lc net.ListenConfig
			return lc.Listen(ctx, network, a)
		},
		Serve: func(ctx context.Context, e disk.Exports, l net.Listener) error {
			w.once.Do(func() { w.exports = e; close(w.serving) })
			<-ctx.Done()
			return l.Close()
		},
		Ready:     func(r Ready) error { w.ready = r; close(ready); return nil },
		FirstRead: func(time.Time) { w.first.Add(1) },
	}
}

// readOnlyView keeps the memory disk when its reader is closed.
type readOnlyView struct{ r disk.Reader }

func (v readOnlyView) Size() int64 { return v.r.Size() }
func (v readOnlyView) ReadAt(ctx context.Context, p []byte, off int64) error {
	return v.r.ReadAt(ctx, p, off)
}
func (v readOnlyView) Extents(ctx context.Context, off, n int64) disk.Extents {
	return v.r.Extents(ctx, off, n)
}
func (v readOnlyView) Close() error { return nil }

func (w *world) start() {
	w.Helper()
	ctx, cancel := context.WithCancel(w.Context())
	w.cancel, w.done = cancel, make(chan error, 1)
	w.once, w.serving = new(sync.Once), make(chan struct{})
	ready := make(chan struct{})
	d := w.deps(ready)
	go func() { w.done <- Serve(ctx, w.spec, d) }()
	select {
	case <-ready:
		<-w.serving
	case err := <-w.done:
		w.Fatal(err)
	}
}

func (w *world) stop() {
	w.Helper()
	w.cancel()
	if err := <-w.done; err != nil {
		w.Error(err)
	}
}

func (w *world) open(name string) disk.Device {
	w.Helper()
	d, err := w.exports.Open(w.Context(), name)
	if err != nil {
		w.Fatal(err)
	}
	return d
}

func TestReadOnly(t *testing.T) {
	w, wantA, _ := newWorld(t, false)
	w.start()
	defer w.stop()
	names, err := w.exports.Names(t.Context())
	if err != nil || !reflect.DeepEqual(names, []string{"vda", "vdb"}) {
		t.Errorf("%v, %v", names, err)
	}
	d := w.open("vda")
	if w.first.Load() != 0 {
		t.Error("read before it was read")
	}
	b := make([]byte, size)
	for range 3 {
		if err := d.ReadAt(t.Context(), b, 0); err != nil || !bytes.Equal(b, wantA) {
			t.Errorf("read: %v", err)
		}
	}
	if w.first.Load() != 1 {
		t.Errorf("%d first reads", w.first.Load())
	}
	if err := d.WriteAt(t.Context(), b[:512], 0); !errors.Is(err, disk.ErrReadOnly) {
		t.Errorf("write: %v", err)
	}
	if err := d.ZeroAt(t.Context(), 0, 512); !errors.Is(err, disk.ErrReadOnly) {
		t.Errorf("zero: %v", err)
	}
	d.Close()
	if err := w.open("vda").ReadAt(t.Context(), b, 0); err != nil {
		t.Errorf("read after another client's close: %v", err)
	}
	if _, err := w.exports.Open(t.Context(), "vdz"); err == nil {
		t.Error("opened an unknown export")
	}
	tcp := w.ready.Listen[1]
	if strings.HasSuffix(tcp, ":0") || !strings.HasPrefix(tcp, "tcp:127.0.0.1:") {
		t.Errorf("listens on %s", tcp)
	}
	if u := w.ready.URIs["vdb"]; !strings.HasPrefix(u, "nbd+unix:///vdb?socket=/") {
		t.Errorf("URI %s", u)
	}
	c, err := net.Dial("tcp", strings.TrimPrefix(tcp, "tcp:"))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// What was flushed is there for the next process, and the restore point is as
// it was.
func TestOverlaysAcrossProcesses(t *testing.T) {
	w, wantA, wantB := newWorld(t, true)
	mark := bytes.Repeat([]byte("holdfast"), 1000)
	for i := range 3 {
		w.start()
		d := w.open("vda")
		copy(wantA[i*70000:], mark)
		if err := d.WriteAt(t.Context(), mark, int64(i)*70000); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, size)
		if err := w.open("vda").ReadAt(t.Context(), b, 0); err != nil || !bytes.Equal(b, wantA) {
			t.Errorf("vda, process %d: %v", i, err)
		}
		if err := w.open("vdb").ReadAt(t.Context(), b, 0); err != nil || !bytes.Equal(b, wantB) {
			t.Errorf("vdb, process %d: %v", i, err)
		}
		w.stop()
	}
	fresh, pristine := filled(t, 10)
	_ = fresh
	b := make([]byte, size)
	if err := w.disks["vda"].ReadAt(t.Context(), b, 0); err != nil || !bytes.Equal(b, pristine) {
		t.Error("the restore point was changed")
	}
	if w.pinned.Load() != 3 {
		t.Errorf("pinned %d times", w.pinned.Load())
	}
}

// An overlay is not opened over another point's disk.
func TestOverlayOfAnotherPoint(t *testing.T) {
	w, _, _ := newWorld(t, true)
	w.start()
	w.stop()
	w.spec.Disks[0].Identity = "other/vda"
	if err := Serve(t.Context(), w.spec, w.deps(make(chan struct{}))); err == nil {
		t.Error("served an overlay over another disk")
	}
}

func TestRefuses(t *testing.T) {
	boom := errors.New("boom")
	for name, change := range map[string]func(*Spec, *Deps){
		"no disks":      func(s *Spec, _ *Deps) { s.Disks = nil },
		"no address":    func(s *Spec, _ *Deps) { s.Listen = nil },
		"pin":           func(_ *Spec, d *Deps) { d.Pin = func(context.Context) error { return boom } },
		"second listen": func(s *Spec, _ *Deps) { s.Listen[1] = "tcp:256.0.0.1:1" },
		"unknown disk":  func(s *Spec, _ *Deps) { s.Disks[1].Name = "vdz" },
		"same name":     func(s *Spec, _ *Deps) { s.Disks[1].Name = "vda" },
		"ready":         func(_ *Spec, d *Deps) { d.Ready = func(Ready) error { return boom } },
		"server ends": func(_ *Spec, d *Deps) {
			d.Serve = func(context.Context, disk.Exports, net.Listener) error { return nil }
		},
		"server fails": func(_ *Spec, d *Deps) {
			d.Serve = func(context.Context, disk.Exports, net.Listener) error { return boom }
		},
	} {
		t.Run(name, func(t *testing.T) {
			w, _, _ := newWorld(t, false)
			w.once, w.serving = new(sync.Once), make(chan struct{})
			d := w.deps(make(chan struct{}))
			change(&w.spec, &d)
			if err := Serve(t.Context(), w.spec, d); err == nil {
				t.Error("served")
			}
			// Everything is free again.
			w2, _, _ := newWorld(t, false)
			w2.start()
			w2.stop()
		})
	}
}

func TestURI(t *testing.T) {
	for addr, want := range map[string]string{
		"unix:/run/holdfast/ab/nbd": "nbd+unix:///vda%201?socket=/run/holdfast/ab/nbd",
		"unix:/a b&c":               "nbd+unix:///vda%201?socket=/a%20b%26c",
		"tcp:10.0.0.1:10809":        "nbd://10.0.0.1:10809/vda%201",
		"tcp:[fe80::1]:99":          "nbd://[fe80::1]:99/vda%201",
		"tcp::99":                   "nbd://localhost:99/vda%201",
		"tcp:0.0.0.0:99":            "nbd://localhost:99/vda%201",
	} {
		if got := URI(addr, "vda 1"); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
}

// A disk through all layers behaves as a disk.
func TestConformance(t *testing.T) {
	disktest.Device(t, func(t *testing.T) disk.Device {
		p := &publication{disks: map[string]disk.Device{}}
		dev, err := openOverlay(filepath.Join(t.TempDir(), "o"), "id", &patient{inner: disktest.HalfCached(disk.NewMem(size)), limit: Patience})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { dev.Close() })
		p.disks["vda"] = dev
		h, err := p.Open(t.Context(), "vda")
		if err != nil {
			t.Fatal(err)
		}
		return h
	})
}
