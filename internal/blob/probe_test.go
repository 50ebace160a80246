package blob

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// liar passes calls to a store, and what a test sets in its place.
type liar struct {
	Store
	put func(ctx context.Context, name string, data []byte) error
	get func(ctx context.Context, name string, off, n int64) ([]byte, error)
	lie func(Info) (Info, bool) // of a listing
	del func(ctx context.Context, name string) error
}

func (l *liar) Put(ctx context.Context, name string, data []byte) error {
	if l.put != nil {
		return l.put(ctx, name, data)
	}
	return l.Store.Put(ctx, name, data)
}

func (l *liar) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	if l.get != nil {
		return l.get(ctx, name, off, n)
	}
	return l.Store.Get(ctx, name, off, n)
}

func (l *liar) Delete(ctx context.Context, name string) error {
	if l.del != nil {
		return l.del(ctx, name)
	}
	return l.Store.Delete(ctx, name)
}

func (l *liar) List(ctx context.Context, prefix string) iter.Seq2[Info, error] {
	return func(yield func(Info, error) bool) {
		for i, err := range l.Store.List(ctx, prefix) {
			show := true
			if l.lie != nil && err == nil {
				i, show = l.lie(i)
			}
			if show && !yield(i, err) {
				return
			}
		}
	}
}

// Each of these stores lies in one way, and is caught.
func TestProbeLiars(t *testing.T) {
	ctx := context.Background()
	over := func(s Store) func(context.Context, string, []byte) error {
		return func(ctx context.Context, name string, data []byte) error {
			if err := s.Put(ctx, name, data); !errors.Is(err, ErrExist) {
				return err
			}
			return errors.Join(s.Delete(ctx, name), s.Put(ctx, name, data))
		}
	}
	liars := map[string]struct {
		a, b func(s Store) *liar
		says string
	}{
		"writes over": {func(s Store) *liar { return &liar{put: over(s)} }, func(s Store) *liar { return &liar{put: over(s)} }, "both won"},
		"writes over, when it does not race": {nil, func(s Store) *liar {
			return &liar{put: func(ctx context.Context, name string, data []byte) error {
				if strings.HasPrefix(name, "race/") {
					return s.Put(ctx, name, data)
				}
				return over(s)(ctx, name, data)
			}}
		}, "writes over"},
		"nobody wins": {func(s Store) *liar {
			return &liar{put: func(context.Context, string, []byte) error { return ErrExist }}
		}, func(s Store) *liar {
			return &liar{put: func(context.Context, string, []byte) error { return ErrExist }}
		}, "none won"},
		"loses what was written": {func(s Store) *liar {
			return &liar{put: func(ctx context.Context, name string, data []byte) error {
				if name == "name/big" {
					return nil
				}
				return s.Put(ctx, name, data)
			}}
		}, func(s Store) *liar {
			return &liar{put: func(ctx context.Context, name string, data []byte) error {
				if name == "name/big" {
					return ErrExist
				}
				return s.Put(ctx, name, data)
			}}
		}, "cannot be found"},
		"loses a page": {func(s Store) *liar {
			return &liar{put: func(ctx context.Context, name string, data []byte) error {
				if len(data) > 8192 {
					data = append(data[:4096:4096], append(make([]byte, 4096), data[8192:]...)...)
				}
				return s.Put(ctx, name, data)
			}}
		}, nil, "is not what was written"},
		"is short": {nil, func(s Store) *liar {
			return &liar{get: func(ctx context.Context, name string, off, n int64) ([]byte, error) {
				p, err := s.Get(ctx, name, off, n)
				return p[:len(p)/2], err
			}}
		}, "is not what was written"},
		"shows a stale length": {nil, func(s Store) *liar {
			return &liar{lie: func(i Info) (Info, bool) { return Info{i.Name, 0}, true }}
		}, "names and lengths"},
		"cuts long names": {nil, func(s Store) *liar {
			return &liar{lie: func(i Info) (Info, bool) { return Info{i.Name[:min(len(i.Name), 100)], i.Size}, true }}
		}, "names and lengths"},
		"shows names in upper case": {nil, func(s Store) *liar {
			return &liar{lie: func(i Info) (Info, bool) { return Info{strings.ToUpper(i.Name), i.Size}, true }}
		}, "names and lengths"},
		"forgets in its listing": {nil, func(s Store) *liar {
			return &liar{lie: func(i Info) (Info, bool) { return i, i.Name != "name/empty" }}
		}, "names and lengths"},
		"does not delete": {func(s Store) *liar {
			return &liar{del: func(context.Context, string) error { return nil }}
		}, nil, "still there"},
		"cannot sync a directory": {func(s Store) *liar {
			return &liar{put: func(context.Context, string, []byte) error {
				return &os.PathError{Op: "sync", Path: "d", Err: syscall.EINVAL}
			}}
		}, nil, "durable"},
	}
	for name, l := range liars {
		t.Run(name, func(t *testing.T) {
			m := new(Mem)
			p := prober{a: m, b: m, cold: func(string) {}}
			if l.a != nil {
				a := l.a(m)
				a.Store, p.a = m, a
			}
			if l.b != nil {
				b := l.b(m)
				b.Store, p.b = m, b
			}
			if err := p.run(ctx); !errors.Is(err, ErrUnfit) || !strings.Contains(err.Error(), l.says) {
				t.Errorf("it passes with %v, want %q", err, l.says)
			}
		})
	}
	t.Run("forgets one of many", func(t *testing.T) {
		m := new(Mem)
		for i := range 600 {
			if err := m.Put(ctx, fmt.Sprintf("crowd/%064x", i), nil); err != nil {
				t.Fatal(err)
			}
		}
		n := 0
		s := &liar{Store: m, lie: func(i Info) (Info, bool) { n++; return i, n != 500 }}
		if err := counted(ctx, s, 600); !errors.Is(err, ErrUnfit) {
			t.Errorf("it passes with %v", err)
		}
	})
	t.Run("is honest", func(t *testing.T) {
		m := new(Mem)
		if err := (prober{a: m, b: m, cold: func(string) {}}).run(ctx); err != nil {
			t.Error(err)
		}
	})
}

// An error that proves nothing is not called proof.
func TestProbeFails(t *testing.T) {
	broken := errors.New("the cable is out")
	m := new(Mem)
	s := &liar{Store: m, get: func(context.Context, string, int64, int64) ([]byte, error) { return nil, broken }}
	if err := (prober{a: m, b: s, cold: func(string) {}}).run(context.Background()); !errors.Is(err, broken) || errors.Is(err, ErrUnfit) {
		t.Errorf("it says %v", err)
	}
}

// A directory passes, beside other probes, and nothing is left but what is not
// the probe's; what a dead one left goes after a day.
func TestProbeDir(t *testing.T) {
	ctx := context.Background()
	root := t.TempDir()
	d, err := OpenDir(root)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Put(ctx, "config", []byte("x")); err != nil {
		t.Fatal(err)
	}
	young, old := filepath.Join(root, probePrefix+"young"), filepath.Join(root, probePrefix+"old")
	for _, dir := range []string{young, old} {
		if err := os.MkdirAll(filepath.Join(dir, "packs"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(young, "packs", "a"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(old, time.Time{}, time.Now().Add(-25*time.Hour)); err != nil {
		t.Fatal(err)
	}
	prober, ok := As[Prober](Limit(d, Rates{Up: 1 << 40}))
	if !ok {
		t.Fatal("a directory is no Prober")
	}
	errs := make(chan error)
	for range 3 {
		go func() { errs <- prober.Probe(ctx) }()
	}
	for range 3 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	var names []string
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != probePrefix+"young config" {
		t.Errorf("left: %s", got)
	}
	for i, err := range d.List(ctx, "") {
		if err != nil || i.Name != "config" {
			t.Errorf("listed %v, %v", i, err)
		}
	}
}

// A directory below that vanishes during a listing is not an end of it.
func TestDirVanishes(t *testing.T) {
	ctx := context.Background()
	root := t.TempDir()
	d, err := OpenDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a/1", "b/1", "c/1"} {
		if err := d.Put(ctx, name, nil); err != nil {
			t.Fatal(err)
		}
	}
	var last error
	for _, err := range d.List(ctx, "") {
		if last = err; err == nil {
			if err := os.RemoveAll(filepath.Join(root, "b")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if last == nil {
		t.Error("a partial listing ended without an error")
	}
}
