package repo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"holdfast/internal/repo/internal/chain"
	"holdfast/internal/repo/internal/index"
	"holdfast/internal/repo/internal/pack"
	"holdfast/internal/repo/internal/tree"
)

const (
	beatEvery = time.Minute
	// storingPacks is how many packs are sealed and stored at once. As many more
	// are while one takes less than quickPack, so that a store that answers each
	// request 50 ms late hardly slows a run; over a slow link they would share the
	// line, and all be lost with a run that dies.
	storingPacks = 2
	quickPack    = 2 * time.Second
	// announceItems is how many items a run stores before it shares them with
	// others and its own next try: 16 GiB of disk. It also bounds the run's memory.
	announceItems = 1 << 18
	// announceEvery is how long a run stores, with a chunk at least to show for
	// it, before it shares that. It bounds what a death costs over a slow link;
	// entries are for ever, so it is not shorter.
	announceEvery = 10 * time.Minute
	// indexItems bounds one index object (docs/format.md §5), and indexPacks its
	// clear part, which takes some 100 bytes for each: a reader takes 32 MiB.
	indexItems = 1 << 19
	indexPacks = 1 << 17
	// maxFile bounds a piece of configuration, bytes.
	maxFile = 64 << 20
)

// Run writes one or more disks and commits one restore point. Its methods may
// run in parallel, but for Commit and Close.
type Run struct {
	r     *Repo
	lease string
	ctx   context.Context // of the background work; cancelled with the cause of a failure
	fail  context.CancelCauseFunc
	beats sync.WaitGroup

	slots, moreSlots chan struct{}
	quick            atomic.Bool // the last pack was stored in less than quickPack
	readBack         ReadBack
	proving          chan struct{} // places for packs being read back
	storing          sync.WaitGroup
	nodes            *packer
	files            *packer

	announcing sync.Mutex // held while index objects are made; before mu

	mu          sync.Mutex             // guards all below
	fresh       map[pack.ID]bool       // claimed by this run, not yet in the index
	freshNodes  map[pack.ID]*tree.Node // nodes among them
	packs       []index.Pack           // stored, in no index object yet
	packedItems int                    // items in packs
	stored      int64                  // bytes in packs stored so far
	newPlain    int64                  // plain bytes of new chunks
	shelf       []shelved              // index objects that no entry has added yet
	announced   time.Time              // when the run last shared what it stored, or began
	uses        map[[32]byte]bool      // packs on which the point will rest
	disks       []*packer              // of disks, finished or not
	bases       []Root                 // maps that disks began as copies of
	verified    uint64                 // up to that entry all was found present
	began       uint64                 // the newest entry when the run began
	basis       map[Root]tree.Root     // finished maps, and those that they began as copies of

	locked lockedAt // guarded by announcing

	committed bool
}

// shelved is an index object that waits for a chain entry.
type shelved struct {
	digest [32]byte
	packs  []index.Pack
}

// Begin opens a run: it creates a lease under the session's id, which must be
// 16 to 64 lower-case hex digits and new, and only then reads what is present
// (docs/format.md §6.1).
func (r *Repo) Begin(ctx context.Context, session string) (*Run, error) {
	return r.begin(ctx, session, "")
}

// begin is Begin; tier is the one whose packs will be moved, or "".
func (r *Repo) begin(ctx context.Context, session, tier string) (*Run, error) {
	host, _ := os.Hostname()
	err := r.leases.Begin(ctx, Lease{Session: session, Host: host, PID: os.Getpid(), Chain: r.current().Head, Tier: tier})
	if err != nil {
		return nil, fmt.Errorf("open a lease: %w", err)
	}
	run := &Run{r: r, lease: session, slots: make(chan struct{}, storingPacks), moreSlots: make(chan struct{}, storingPacks),
		fresh: map[pack.ID]bool{}, freshNodes: map[pack.ID]*tree.Node{}, announced: time.Now(), uses: map[[32]byte]bool{}, basis: map[Root]tree.Root{}}
	run.ctx, run.fail = context.WithCancelCause(context.WithoutCancel(ctx))
	run.nodes = &packer{run: run, kind: pack.Nodes, target: nodePackBytes}
	run.files = &packer{run: run, kind: pack.Chunks, target: chunkPackBytes}
	err = r.refresh(ctx)
	if err == nil {
		err = r.canLock()
	}
	if err == nil {
		err = r.mend(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, run.Close())
	}
	run.began = r.current().Head
	run.beats.Go(run.beat)
	return run, nil
}

// beat shows every minute that the run is alive. A beat that fails is tried
// again a minute later: whether the lease still holds is decided by the chain.
func (run *Run) beat() {
	t := time.NewTicker(beatEvery)
	defer t.Stop()
	for n := 1; ; n++ {
		select {
		case <-run.ctx.Done():
			return
		case <-t.C:
		}
		_ = run.r.leases.Beat(run.ctx, run.lease, n)
	}
}

// failed is why the run can go on no more.
func (run *Run) failed() error {
	if run.ctx.Err() != nil {
		return context.Cause(run.ctx)
	}
	return nil
}

// claim reports whether an item must be stored by the caller: it is neither in
// the repository nor claimed before in this run.
func (run *Run) claim(id pack.ID, n *tree.Node) (bool, error) {
	run.mu.Lock()
	known := run.fresh[id]
	run.mu.Unlock()
	if known {
		return false, nil
	}
	in, there, err := run.r.presentIn(id)
	if err != nil {
		return false, err
	}
	run.mu.Lock()
	defer run.mu.Unlock()
	if there {
		run.uses[in] = true
		return false, nil
	}
	if run.fresh[id] {
		return false, nil
	}
	run.fresh[id] = true
	if n != nil {
		run.freshNodes[id] = n
	}
	return true, nil
}

// fetchNode finds nodes of this run as well as the repository's.
func (run *Run) fetchNode(ctx context.Context, id tree.ID, level int) (*tree.Node, error) {
	run.mu.Lock()
	n := run.freshNodes[id]
	run.mu.Unlock()
	if n != nil {
		return n, nil
	}
	return run.r.node(ctx, id, level)
}

// storeNode names and, if it is new, packs a node.
func (run *Run) storeNode(ctx context.Context, n *tree.Node) (tree.ID, error) {
	p := n.Marshal()
	id := run.r.nodeID(p)
	kept := *n // the writer goes on with n
	mine, err := run.claim(id, &kept)
	if err != nil || !mine {
		return id, err
	}
	// Ids do not shrink, so nodes are not compressed.
	return id, run.nodes.add(ctx, id, 0, len(p), append([]byte{0}, p...))
}

// announceSome shares what is stored when it has become much, or old.
func (run *Run) announceSome(ctx context.Context) error {
	run.mu.Lock()
	much := run.packedItems >= announceItems || run.packedItems > 0 && time.Since(run.announced) >= announceEvery
	run.mu.Unlock()
	if !much || !run.announcing.TryLock() {
		return nil
	}
	defer run.announcing.Unlock()
	if err := run.shelve(ctx); err != nil {
		return err
	}
	return run.announce(ctx)
}

// shelve writes index objects for the packs stored so far.
// The caller holds announcing.
func (run *Run) shelve(ctx context.Context) error {
	run.mu.Lock()
	packs := run.packs
	run.packs, run.packedItems = nil, 0
	run.mu.Unlock()
	for len(packs) > 0 {
		n := indexful(packs)
		d, err := run.r.putIndex(ctx, packs[:n])
		if err != nil {
			run.mu.Lock()
			run.packs = append(packs, run.packs...)
			run.mu.Unlock()
			return fmt.Errorf("write an index object: %w", err)
		}
		run.shelf = append(run.shelf, shelved{d, packs[:n]})
		packs = packs[n:]
	}
	return nil
}

// indexful is how many of the packs one index object takes.
func indexful(packs []index.Pack) int {
	n, items := 0, 0
	for n < min(len(packs), indexPacks) && (n == 0 || items+len(packs[n].Items) <= indexItems) {
		items += len(packs[n].Items)
		n++
	}
	return n
}

// announce adds the shelved index objects by an entry of their own.
func (run *Run) announce(ctx context.Context) error {
	if len(run.shelf) == 0 {
		return nil
	}
	if err := run.r.append(ctx, chain.Add, run.entry(), chain.Sealed{}, run.mayAnnounce); err != nil {
		return err
	}
	run.settle()
	return nil
}

func (run *Run) entry() chain.Clear {
	c := chain.Clear{Lease: run.lease}
	for _, s := range run.shelf {
		c.Adds = append(c.Adds, s.digest[:])
	}
	return c
}

// mayAnnounce refuses once the lease is over.
func (run *Run) mayAnnounce(s *chain.State) error {
	if s.Over[run.lease] == chain.Revoke {
		return ErrRevoked
	}
	return nil
}

// settle forgets what the index has now.
func (run *Run) settle() {
	run.mu.Lock()
	defer run.mu.Unlock()
	for _, s := range run.shelf {
		for _, k := range s.packs {
			for _, it := range k.Items {
				delete(run.fresh, it.ID)
				delete(run.freshNodes, it.ID)
			}
		}
	}
	run.shelf = nil
	run.announced = time.Now()
}

// PutFile stores a piece of configuration, at most 64 MiB.
func (run *Run) PutFile(ctx context.Context, name string, data []byte) (File, error) {
	if len(data) > maxFile {
		return File{}, fmt.Errorf("%s: %d bytes are too many for a configuration file", name, len(data))
	}
	w, err := run.disk(ctx, nil, int64(len(data)), run.files)
	if err != nil {
		return File{}, err
	}
	if err := w.WriteAt(ctx, data, 0); err != nil {
		return File{}, err
	}
	root, err := w.w.Finish(ctx)
	return File{Name: name, Size: int64(len(data)), Root: Root(root.String())}, err
}

// Flush makes durable all that was written and finished: after it only the
// commit itself is left to do.
func (run *Run) Flush(ctx context.Context) error {
	// A disk that was given up holds chunks that others of this run rely on.
	run.mu.Lock()
	disks := slices.Clone(run.disks)
	run.mu.Unlock()
	for _, k := range append(disks, run.files, run.nodes) {
		if err := k.flush(ctx); err != nil {
			return err
		}
	}
	run.storing.Wait()
	if err := run.failed(); err != nil {
		return err
	}
	run.announcing.Lock()
	defer run.announcing.Unlock()
	return run.shelve(ctx)
}

// Commit makes the point visible, with all disks that were finished. It sets
// the point's ID, NewBytes and StoredBytes. When it fails with anything but
// ErrRevoked or blob.ErrUnsynced, the store was asked and the point does not
// exist.
func (run *Run) Commit(ctx context.Context, p *Point) error {
	p.ID = PointID(RandomID())
	return run.commit(ctx, p, run.mayCommit)
}

func (run *Run) commit(ctx context.Context, p *Point, allowed func(*chain.State) error) error {
	if err := run.Flush(ctx); err != nil {
		return err
	}
	run.announcing.Lock()
	defer run.announcing.Unlock()
	run.mu.Lock()
	p.NewBytes, p.StoredBytes = run.newPlain, run.stored
	run.mu.Unlock()
	if err := run.lock(ctx, p, nil); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	if err := run.appendPoint(ctx, p, allowed); err != nil {
		return fmt.Errorf("commit: %w", err)
	}
	run.settle()
	run.committed = true
	run.settleLocks()
	return nil
}

// Close ends the run and its lease. Without a Commit, what was stored is
// announced, so that the next run can reuse it.
func (run *Run) Close() error {
	alive := run.failed() == nil
	if !alive || run.committed {
		run.fail(errClosed)
	}
	run.storing.Wait()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(run.ctx), time.Minute)
	defer cancel()
	var err error
	if !run.committed {
		run.announcing.Lock()
		if err = run.shelve(ctx); err == nil {
			err = run.announce(ctx)
		}
		run.announcing.Unlock()
	}
	run.fail(errClosed)
	run.beats.Wait()
	return errors.Join(err, run.endLease(ctx), run.locked.warning)
}

var errClosed = errors.New("the run is closed")

// endLease deletes the lease and its beats.
func (run *Run) endLease(ctx context.Context) error { return run.r.EndLease(ctx, run.lease) }

// LeaseOpen reports whether a session's run is under way, or died without
// ending its lease, on this machine or another.
func (r *Repo) LeaseOpen(ctx context.Context, session string) (bool, error) {
	return r.leases.Exists(ctx, session)
}

// EndLease deletes the lease of a session whose process is known to be dead.
// One already gone is no error.
func (r *Repo) EndLease(ctx context.Context, session string) error {
	return r.leases.End(ctx, session)
}
