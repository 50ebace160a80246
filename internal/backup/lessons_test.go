package backup

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/repo/repotest"
)

// Cases in which others lost data; the table of all is
// docs/adr/0012-lessons-of-others.md.

// noEntries is a store that takes everything but entries of the chain.
type noEntries struct {
	blob.Store
	on atomic.Bool
}

func (s *noEntries) Put(ctx context.Context, name string, p []byte) error {
	if s.on.Load() && strings.HasPrefix(name, "chain/") {
		return blobtest.ErrInjected
	}
	return s.Store.Put(ctx, name, p)
}

// Lesson 1: after a run that failed the next one asked for the changes since the
// failed run's snapshot; what had changed before was in no backup, and success
// was reported. Here the reference moves in the entry that makes the point and
// nowhere else: the run after one that failed at the last moment asks since the
// point that is there.
func TestLesson01FailedRunIsNoBase(t *testing.T) {
	w := newWorld(t)
	first := w.backup()
	s := &noEntries{Store: w.store}
	w.r = repotest.Open(t, s)
	s.on.Store(true)
	w.scribble("vda", 3, 2) // in no point but through the next run
	if r := Run(ctx, w.job())[0]; r.Err == nil || r.Point != "" {
		t.Fatalf("%+v", r)
	}
	if w.lastPoint() != first.Point {
		t.Fatal("a point is there")
	}
	s.on.Store(false)
	w.scribble("vda", 20, 1)
	second := w.backup() // compares with the guest's disks
	if second.FullReason != "" {
		t.Errorf("full reason %q", second.FullReason)
	}
	w.tidy(second.Point)
}
