package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"strings"
	"testing"

	"holdfast/internal/disk"
	"holdfast/internal/disk/disktest"
)

func TestJoin(t *testing.T) {
	for _, c := range []struct{ from, name, want string }{
		{"web.qcow2", "base.qcow2", "base.qcow2"},
		{"db/root.qcow2", "base.qcow2", "db/base.qcow2"},
		{"db/root.qcow2", "../base.qcow2", "base.qcow2"},
		{"db/root.qcow2", "./x/../base.qcow2", "db/base.qcow2"},
		{"a", "./x:y", "x:y"},
		{"a", "file:b", "b"},
		{"a", "file:b:c", "b:c"},
		{"a", "b/c:d", "b/c:d"},
		{"a", "", ""},
		{"a", ".", ""},
		{"a", "..", ""},
		{"a", "../b", ""},
		{"db/a", "../../b", ""},
		{"db/a", "x/../../../etc/passwd", ""},
		{"a", "/etc/passwd", ""},
		{"a", "file:/etc/passwd", ""},
		{"a", "file:///etc/passwd", ""},
		{"a", "json:{}", ""},
		{"a", "nbd://localhost", ""},
		{"a", "nbd:unix:/run/s", ""},
		{"a", `C:\x.qcow2`, ""},
		{"a", `..\x.qcow2`, ""},
		{"a", "x\x00y", ""},
	} {
		got, err := Join(c.from, c.name)
		if got != c.want || (err == nil) != (c.want != "") || err != nil && !errors.Is(err, ErrOutside) {
			t.Errorf("Join(%q, %q) = %q, %v; want %q", c.from, c.name, got, err, c.want)
		}
	}
}

// toy is a format in memory: runs of random states, with a parent.
type toy struct {
	data   *disk.Mem
	states []State // per 4 KiB
	parent string  // names, divided by |
	closed *int

	id        string
	parentIDs []string
	sector    int64
}

func (l toy) Close() error                              { *l.closed++; return nil }
func (l toy) Check(context.Context, func(string)) error { return nil }

func (l toy) Info() Info {
	i := Info{Format: "toy", Size: l.data.Size(), DataID: l.id, LogicalSector: l.sector}
	if l.parent != "" {
		i.Parent = &Parent{Names: strings.Split(l.parent, "|"), Format: "toy", IDs: l.parentIDs}
	}
	return i
}

func (l toy) Runs(ctx context.Context, off, n int64) Runs {
	return func(yield func(Run, error) bool) {
		for end := off + n; off < end; {
			n := min(4096-off%4096, end-off)
			if !yield(Run{Off: off, Len: n, State: l.states[off/4096]}, ctx.Err()) {
				return
			}
			off += n
		}
	}
}

func (l toy) ReadAt(ctx context.Context, p []byte, off int64) error {
	if err := l.data.ReadAt(ctx, p, off); err != nil {
		return err
	}
	for i := range p {
		if l.states[(off+int64(i))/4096] != Data {
			p[i] = 0
		}
	}
	return nil
}

func newToy(t *testing.T, rnd *rand.Rand, size int64, parent string, closed *int) toy {
	l := toy{data: disk.NewMem(size), parent: parent, closed: closed}
	p := make([]byte, size)
	disktest.Fill(rnd, p)
	if err := l.data.WriteAt(t.Context(), p, 0); err != nil {
		t.Fatal(err)
	}
	for range (size + 4095) / 4096 {
		l.states = append(l.states, State(rnd.IntN(3)))
	}
	return l
}

// TestChain: layers of different sizes, against a model made byte by byte.
func TestChain(t *testing.T) {
	rnd := disktest.Rand(t)
	rounds := 30
	if testing.Short() {
		rounds = 5
	}
	for range rounds {
		names := []string{"a", "b", "c", "d"}[:1+rnd.IntN(4)]
		layers, closed := map[string]toy{}, 0
		for i, name := range names {
			parent := ""
			if i+1 < len(names) {
				parent = names[i+1]
			}
			layers[name] = newToy(t, rnd, 1+rnd.Int64N(600<<10), parent, &closed)
		}
		model := make([]byte, layers["a"].Info().Size)
		for off := range model {
			for _, name := range names {
				l := layers[name]
				if int64(off) >= l.data.Size() || l.states[off/4096] == Zero {
					break
				}
				if l.states[off/4096] == Data {
					p := make([]byte, 1)
					if err := l.data.ReadAt(t.Context(), p, int64(off)); err != nil {
						t.Fatal(err)
					}
					model[off] = p[0]
					break
				}
			}
		}
		formats := Formats{{Name: "toy", Open: func(_ context.Context, f File, _ Resolver) (Layer, error) { return layers[f.Name], nil }}}
		open := func(_ context.Context, _, name string) (File, error) {
			return File{Name: name, Disk: layers[name].data}, nil
		}
		c, err := formats.Open(t.Context(), File{Name: "a", Disk: layers["a"].data}, "toy", open)
		if err != nil {
			t.Fatal(err)
		}
		disktest.Reader(t, c, model)
		if err := c.Close(); err != nil || closed != len(names) {
			t.Errorf("closed %d of %d layers: %v", closed, len(names), err)
		}
	}
}

func TestRaw(t *testing.T) {
	m := disk.NewMem(1 << 20)
	model := make([]byte, m.Size())
	disktest.Fill(disktest.Rand(t), model[100<<10:500<<10])
	if err := m.WriteAt(t.Context(), model[100<<10:500<<10], 100<<10); err != nil {
		t.Fatal(err)
	}
	c, err := Formats{}.Open(t.Context(), File{Name: "x", Disk: m}, RawName, nil)
	if err != nil {
		t.Fatal(err)
	}
	disktest.Reader(t, c, model)
	if n, err := disk.DataBytes(c.Extents(t.Context(), 0, c.Size())); err != nil || n > 512<<10 {
		t.Errorf("%d bytes of data, %v: holes are not zeros", n, err)
	}
}

func TestProbe(t *testing.T) {
	formats := Formats{{Name: "toy", Match: func(ctx context.Context, f disk.Reader) (bool, error) {
		p := make([]byte, min(3, f.Size()))
		err := f.ReadAt(ctx, p, 0)
		return string(p) == "toy", err
	}}}
	for content, want := range map[string]string{"": "", "to": "", "toys": "toy", "raw": ""} {
		m := disk.NewMem(int64(len(content)))
		if err := m.WriteAt(t.Context(), []byte(content), 0); err != nil {
			t.Fatal(err)
		}
		if got, err := formats.Probe(t.Context(), m); strings.Join(got, " ") != want || err != nil {
			t.Errorf("%q is %s, %v", content, got, err)
		}
	}
	bad := disktest.NewFaulty(disk.NewMem(100), 1)
	if _, err := formats.Probe(t.Context(), bad); err == nil {
		t.Error("an unreadable file has a format")
	}
}

// TestOpenClosesOnError: whatever fails, no file stays open.
func TestOpenClosesOnError(t *testing.T) {
	closed, opened := 0, 0
	file := func(name string) File { opened++; return File{Name: name, Disk: &counted{disk.NewMem(4096), &closed}} }
	rnd := disktest.Rand(t)
	formats := Formats{{Name: "toy",
		Match: func(context.Context, disk.Reader) (bool, error) { return true, nil },
		Open: func(_ context.Context, f File, _ Resolver) (Layer, error) {
			if f.Name == "broken" {
				return nil, ErrFormat
			}
			l := newToy(t, rnd, 4096, f.Name+"x", new(int))
			if strings.HasPrefix(f.Name, "to broken") {
				l.parent = "broken"
			}
			return owner{l, f.Disk}, nil
		}}}
	for name, want := range map[string]error{"broken": ErrFormat, "to broken": ErrFormat, "endless": ErrFormat, "n": errors.ErrUnsupported} {
		closed, opened = 0, 0
		_, err := formats.Open(t.Context(), file(name), "toy", func(_ context.Context, from, name string) (File, error) {
			if from == "nxxx" {
				return File{}, errors.ErrUnsupported
			}
			return file(name), nil
		})
		if !errors.Is(err, want) || opened != closed {
			t.Errorf("%s: %v; opened %d, closed %d", name, err, opened, closed)
		}
	}
}

func TestDepthIsBounded(t *testing.T) {
	rnd, closed := disktest.Rand(t), 0
	for depth, want := range map[int]error{maxDepth: nil, maxDepth + 1: ErrFormat} {
		formats := Formats{{Name: "toy", Open: func(_ context.Context, f File, _ Resolver) (Layer, error) {
			parent := f.Name + "x"
			if len(parent) > depth {
				parent = ""
			}
			return newToy(t, rnd, 4096, parent, &closed), nil
		}}}
		open := func(_ context.Context, _, name string) (File, error) {
			return File{Name: name, Disk: disk.NewMem(4096)}, nil
		}
		c, err := formats.Open(t.Context(), File{Name: "x", Disk: disk.NewMem(4096)}, "toy", open)
		if !errors.Is(err, want) {
			t.Errorf("%d layers: %v", depth, err)
		}
		if err == nil {
			if err := c.ReadAt(t.Context(), make([]byte, 4096), 0); err != nil || len(c.Files()) != depth || c.Close() != nil {
				t.Errorf("%d layers: %v", depth, err)
			}
		}
	}
	if closed != 2*maxDepth {
		t.Errorf("closed %d layers", closed)
	}
}

// TestParents: which of the files that an image names is its parent.
func TestParents(t *testing.T) {
	rnd := disktest.Rand(t)
	closed, opened := 0, 0
	for _, c := range []struct {
		why    string
		names  string
		ids    []string
		sector int64
		files  string // chain that comes of it; "" for err
		err    error
		said   string
	}{
		{"no id known", "p1", nil, 0, "child p1", nil, ""},
		{"the right id", "p1", []string{"ID1"}, 0, "child p1", nil, ""},
		{"either id", "p2", []string{"id1", "id2"}, 0, "child p2", nil, ""},
		{"a wrong one first", "p1|p2", []string{"id2"}, 0, "child p2", nil, ""},
		{"a missing one first", "gone|p2", []string{"id2"}, 0, "child p2", nil, ""},
		{"the wrong one only", "p1", []string{"id2"}, 0, "", ErrParent, "child was made above a file with the id id2, but p1 has the id id1"},
		{"wrong and missing", "gone|p1", []string{"id2"}, 0, "", ErrParent, "p1 has the id id1"},
		{"missing", "gone", []string{"id2"}, 0, "", fs.ErrNotExist, "gone"},
		{"nameless", "", []string{"id2"}, 0, "", ErrParent, "does not name it"},
		{"other sectors", "p1", nil, 512, "", ErrFormat, "sectors of 512 bytes"},
	} {
		closed, opened = 0, 0
		formats := Formats{{Name: "toy", Open: func(_ context.Context, f File, _ Resolver) (Layer, error) {
			l := newToy(t, rnd, 8192, "", new(int))
			switch f.Name {
			case "child":
				l.parent, l.parentIDs, l.sector = c.names, c.ids, c.sector
				if c.names == "" {
					return nameless{owner{l, f.Disk}}, nil
				}
			default:
				l.id, l.sector = "id"+f.Name[1:], 4096
			}
			return owner{l, f.Disk}, nil
		}}}
		file := func(name string) File { opened++; return File{Name: name, Disk: &counted{disk.NewMem(8192), &closed}} }
		chain, err := formats.Open(t.Context(), file("child"), "toy", func(_ context.Context, _, name string) (File, error) {
			if name == "gone" {
				return File{}, fmt.Errorf("%s: %w", name, fs.ErrNotExist)
			}
			return file(name), nil
		})
		files := ""
		if err == nil {
			files = strings.Join(chain.Files(), " ")
			err = chain.Close()
		}
		if files != c.files || !errors.Is(err, c.err) || err != nil && !strings.Contains(err.Error(), c.said) || opened != closed {
			t.Errorf("%s: %q, %v; opened %d, closed %d", c.why, files, err, opened, closed)
		}
	}
}

// nameless has a parent that it does not name.
type nameless struct{ owner }

func (nameless) Info() Info { return Info{Format: "toy", Size: 8192, Parent: &Parent{}} }

type counted struct {
	*disk.Mem
	n *int
}

func (c *counted) Close() error { *c.n++; return nil }

type owner struct {
	toy
	d disk.Reader
}

func (o owner) Close() error { return o.d.Close() }

func TestReadsNeverLeaveTheDisk(t *testing.T) {
	closed := 0
	rnd := disktest.Rand(t)
	l := newToy(t, rnd, 10000, "", &closed)
	c := &Chain{links: []link{{l, l.Info(), "x"}}}
	p := bytes.Repeat([]byte{1}, 10)
	if err := c.ReadAt(t.Context(), p, 9995); !errors.Is(err, disk.ErrRange) {
		t.Errorf("read across the end: %v", err)
	}
}
