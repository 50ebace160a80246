//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"holdfast/internal/backup"
	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/disk"
	"holdfast/internal/hypervisor"
	"holdfast/internal/mover"
	"holdfast/internal/repo"
	"holdfast/internal/state"
)

// generations is how many increments lie between the two restores from a
// spinning disk.
const generations = 30

// figure is what the process that does the changes writes, in lines of JSON.
type figure struct {
	Key   string
	Value float64
}

// changes measures increments by a change map, which no folder gives: a host of
// our own does, in a process of its own, as memory that this one once had
// would count as that of all that it starts.
func (b *bench) changes(ctx context.Context) error {
	t, err := b.point(ctx)
	if err != nil {
		return err
	}
	dir := filepath.Join(b.work, "changes")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, vm+".raw")
	if err := command(ctx, "cp", "--sparse=always", b.disk(), path); err != nil {
		return err
	}
	if err := b.calm(path, t.Repo); err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, exe, "-changes", path, "-runs", fmt.Sprint(b.runs))
	cmd.Env, cmd.Stderr = t.Env(), os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return err
	}
	for d := json.NewDecoder(bytes.NewReader(out)); d.More(); {
		var f figure
		if err := d.Decode(&f); err != nil {
			return err
		}
		b.add(f.Key, f.Value)
	}
	return nil
}

// change does the work of changes: it changes the disk in a file, and backs it
// up into HOLDFAST_REPO.
func change(ctx context.Context, path string, runs int) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	w := bufio.NewWriter(os.Stdout)
	c := &changer{f: f, out: json.NewEncoder(w), host: &tracked{path: path, size: fi.Size(), dirty: map[int64]bool{}}, store: os.Getenv("HOLDFAST_REPO"),
		layout: layout{fi.Size()}, rng: rand.New(rand.NewPCG(2, 0)), dir: filepath.Dir(path)}
	return errors.Join(c.all(ctx, runs), w.Flush())
}

type changer struct {
	f      *os.File
	out    *json.Encoder
	host   *tracked
	store  string
	dir    string // scratch
	layout layout
	logged int64 // bytes of the log that generations have written
	rng    *rand.Rand
}

func (c *changer) all(ctx context.Context, runs int) error {
	_, err := c.backup(ctx) // of what is there already
	if err != nil {
		return err
	}
	if err := c.spin(ctx, "spinning, first"); err != nil {
		return err
	}
	for range generations {
		if err := c.generation(); err != nil {
			return err
		}
		if err := c.increment(ctx, "generation"); err != nil {
			return err
		}
	}
	if err := c.spin(ctx, "spinning, last"); err != nil {
		return err
	}
	for range runs {
		for _, k := range []struct {
			name   string
			places int64
		}{{"scattered 0.25 %", c.host.size / 4096 / 400}, {"scattered 1 %", c.host.size / 4096 / 100}} {
			if err := c.scatter(k.places); err != nil {
				return err
			}
			if err := c.increment(ctx, k.name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *changer) add(key string, v float64) error { return c.out.Encode(figure{key, v}) }

// generation changes one in sixty of the database's pages, nine of ten of these
// in its first tenth, and goes on with the log.
func (c *changer) generation() error {
	l := c.layout
	for range l.pages() / 60 {
		n := l.pages()
		if c.rng.IntN(10) > 0 {
			n /= 10
		}
		i := c.rng.Int64N(n)
		if err := c.write(page(c.rng, i), l.system()+i*pageSize); err != nil {
			return err
		}
	}
	n := l.logLength() / generations
	off := l.log() + l.logLength() + c.logged
	c.logged += n
	c.host.changed(off, n)
	return writeLog(c.f, c.rng, off, n)
}

// scatter copies blocks of 4 KiB of the database and the log to random places.
func (c *changer) scatter(places int64) error {
	p := make([]byte, 4096)
	for range places {
		from := c.layout.system() + c.rng.Int64N((c.layout.size-c.layout.system())/4096-1)*4096
		if _, err := c.f.ReadAt(p, from); err != nil {
			return err
		}
		c.rng.Uint64() // no two chunks become the same
		copy(p, fmt.Sprint(c.rng.Uint64()))
		if err := c.write(p, c.rng.Int64N(c.host.size/4096)*4096); err != nil {
			return err
		}
	}
	return nil
}

func (c *changer) write(p []byte, off int64) error {
	c.host.changed(off, int64(len(p)))
	_, err := c.f.WriteAt(p, off)
	return err
}

// increment measures a backup of what has changed.
func (c *changer) increment(ctx context.Context, name string) error {
	if err := syncAll(c.dir); err != nil {
		return err
	}
	chunks := float64(len(c.host.dirty))
	from := time.Now()
	r, err := c.backup(ctx)
	if err == nil {
		err = syncAll(c.dir)
	}
	took := time.Since(from).Seconds()
	if err == nil && r.FullReason != "" {
		err = fmt.Errorf("the increment read all: %s", r.FullReason)
	}
	return errors.Join(err, c.add(name, took), c.add(name+", chunks", chunks), c.add(name+", each", took/chunks*1000),
		c.add(name+", stored", float64(r.StoredBytes)/chunks/(1<<10)))
}

func (c *changer) backup(ctx context.Context) (res backup.Result, err error) {
	store, err := blob.OpenDir(c.store)
	if err != nil {
		return res, err
	}
	r, err := repo.Open(ctx, store, []byte(passphrase), repo.Options{Cache: filepath.Join(c.dir, "cache")})
	if err != nil {
		return res, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	s, err := state.Open(filepath.Join(c.dir, "state"))
	if err != nil {
		return res, err
	}
	vms, err := c.host.VMs(ctx)
	if err != nil {
		return res, err
	}
	res = backup.Run(ctx, backup.Job{Repo: r, Source: c.host, State: s, Host: "bench", VMs: vms})[0]
	return res, res.Err
}

// spin restores the newest point from a spinning disk, and notes at which part
// of the disk's sequential rate its chunks came. They are taken to be as many
// bytes as the first point stored.
func (c *changer) spin(ctx context.Context, name string) (err error) {
	dir, err := blob.OpenDir(c.store)
	if err != nil {
		return err
	}
	slow := &blobtest.Spinning{Inner: dir}
	r, err := repo.Open(ctx, slow, []byte(passphrase), repo.Options{Cache: filepath.Join(c.dir, "cache")})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	points, err := r.Points(ctx)
	if err != nil {
		return err
	}
	src, err := r.OpenDisk(ctx, points[len(points)-1].Disks[0])
	if err != nil {
		return err
	}
	slow.Spent() // for opening
	path := filepath.Join(c.dir, "restored.raw")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	defer os.Remove(path)
	if err := os.Truncate(path, src.Size()); err != nil {
		return err
	}
	out, err := disk.OpenFile(path, disk.FileOptions{})
	if err != nil {
		return err
	}
	_, err = mover.Copy(ctx, out, src, src.Extents(ctx, 0, src.Size()), mover.Options{Align: repo.ChunkSize, Window: repo.ReadWindow})
	if err = errors.Join(err, out.Close(), src.Close()); err != nil {
		return err
	}
	spent := slow.Spent()
	return errors.Join(
		c.add(name, 100*slow.Sequential(points[0].StoredBytes).Seconds()/spent.Time.Seconds()),
		c.add(name+", seeks", float64(spent.Seeks)),
		c.add(name+", passed", float64(spent.Bytes)/float64(points[0].StoredBytes)*100))
}

// tracked is a host with one VM, whose disk is a file, and which knows what was
// changed since its newest snapshot. It is no host for anything else.
type tracked struct {
	path  string
	size  int64
	dirty map[int64]bool // chunks
	taken int            // snapshots
}

// changed notes that a range was written.
func (t *tracked) changed(off, n int64) {
	for i := off / repo.ChunkSize; i*repo.ChunkSize < off+n; i++ {
		t.dirty[i] = true
	}
}

func (t *tracked) vm() hypervisor.VM {
	return hypervisor.VM{ID: "tracked", Name: "tracked", Kind: "bench", Host: "bench", State: hypervisor.Running,
		Disks: []hypervisor.Disk{{ID: "vda", Size: t.size, Format: "raw", Sector: 512, Path: t.path}}}
}

func (t *tracked) VMs(context.Context) ([]hypervisor.VM, error) { return []hypervisor.VM{t.vm()}, nil }

func (t *tracked) Plan(_ context.Context, ids []hypervisor.VMID) ([][]hypervisor.VMID, error) {
	return [][]hypervisor.VMID{ids}, nil
}

func (t *tracked) Snapshot(_ context.Context, reqs []hypervisor.Request, _ hypervisor.SnapshotOptions) []hypervisor.Outcome {
	t.taken++
	s := &snapshot{host: t, number: t.taken, since: reqs[0].Since}
	for _, i := range slices.Sorted(maps.Keys(t.dirty)) {
		s.extents = append(s.extents, disk.Extent{Off: i * repo.ChunkSize, Len: min(repo.ChunkSize, t.size-i*repo.ChunkSize)})
	}
	return []hypervisor.Outcome{{Snapshot: s}}
}

func (t *tracked) Forget(context.Context, hypervisor.VMID, hypervisor.ReferencePoint) error {
	return nil
}

func (t *tracked) Clean(context.Context, hypervisor.VMID, string, func(string) bool, []hypervisor.ReferencePoint) ([]string, error) {
	return nil, nil
}

func (t *tracked) Close() error { return nil }

// snapshot is the file as it is: nobody writes it meanwhile.
type snapshot struct {
	host    *tracked
	number  int
	since   hypervisor.ReferencePoint
	extents []disk.Extent
}

func (s *snapshot) VM() hypervisor.VM                   { return s.host.vm() }
func (s *snapshot) Consistency() hypervisor.Consistency { return hypervisor.Crash }
func (s *snapshot) Notes() []string                     { return nil }

func (s *snapshot) Open(context.Context, hypervisor.DiskID) (disk.Reader, error) {
	return disk.OpenFile(s.host.path, disk.FileOptions{ReadOnly: true})
}

func (s *snapshot) Changed(context.Context, hypervisor.DiskID) disk.Extents {
	if s.since == "" {
		return disk.Fail(hypervisor.ErrNoReference)
	}
	return disk.Merge(disk.List(s.extents...))
}

func (s *snapshot) Commit(context.Context) (hypervisor.ReferencePoint, error) {
	s.host.dirty = map[int64]bool{}
	return hypervisor.ReferencePoint(fmt.Sprint("snapshot ", s.number)), nil
}

func (s *snapshot) Close() error { return nil }
