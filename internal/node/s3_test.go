package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/s3"
	"holdfast/internal/blob/s3/s3test"
	"holdfast/internal/repo"
	"holdfast/internal/repo/repotest"
)

// Writers on several machines share a repository in a bucket of a server that
// misbehaves: each restore point that was committed is there, whole, once.
func TestRepositoryOnS3(t *testing.T) {
	srv := s3test.New(t, s3test.Options{Versioned: true, Page: 3, Faults: &s3test.Faults{Chance: 0.08, Delay: time.Millisecond, Skew: 0.02}})
	ctx := t.Context()
	open := func() blob.Store {
		o, err := s3.Parse(srv.Repo("repo"), func(string) string { return "" })
		if err != nil {
			t.Fatal(err)
		}
		o.Keys = &s3.Keys{Access: s3test.AccessKey, Secret: s3test.SecretKey}
		o.Retry = s3.Retry{Tries: 20, Wait: time.Millisecond}
		s, err := s3.Open(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	seedStore(t, open())

	const writers, rounds = 3, 2
	var wg sync.WaitGroup
	contents := make([][][]byte, writers)
	for w := range writers {
		r := repotest.Open(t, open())
		for i := range rounds {
			content := make([]byte, 3*repo.ChunkSize)
			rng := rand.NewChaCha8([32]byte{byte(w), byte(i)})
			rng.Read(content)
			contents[w] = append(contents[w], content)
		}
		wg.Go(func() {
			for i, content := range contents[w] {
				if err := saveOn(ctx, r, fmt.Sprintf("vm%d.%d", w, i), content); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()

	r := repotest.Open(t, open())
	points, err := r.Points(ctx)
	if err != nil || len(points) != writers*rounds {
		t.Fatalf("%d points, %v", len(points), err)
	}
	for _, p := range points {
		var w, i int
		if _, err := fmt.Sscanf(p.VM, "vm%d.%d", &w, &i); err != nil {
			t.Fatal(err)
		}
		d, err := r.OpenDisk(ctx, p.Disks[0])
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, p.Disks[0].Size)
		if err := errors.Join(d.ReadAt(ctx, got, 0), d.Close()); err != nil || !bytes.Equal(got, contents[w][i]) {
			t.Errorf("%s: other bytes; %v", p.VM, err)
		}
	}
	report, err := r.Check(ctx, repo.CheckOptions{ReadData: true})
	if err != nil || len(report.Problems) > 0 {
		t.Errorf("check: %+v, %v", report, err)
	}
	for i, err := range open().List(ctx, "leases/") {
		t.Errorf("a lease is left: %v, %v", i, err)
	}
}

// seedStore copies the empty repository of repotest.
func seedStore(t *testing.T, to blob.Store) {
	t.Helper()
	from := repotest.Store(t)
	for i, err := range from.List(t.Context(), "") {
		if err != nil {
			t.Fatal(err)
		}
		p, err := from.Get(t.Context(), i.Name, 0, -1)
		if err == nil {
			err = to.Put(t.Context(), i.Name, p)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// saveOn commits a restore point of one disk.
func saveOn(ctx context.Context, r *repo.Repo, vm string, content []byte) (err error) {
	run, err := r.Begin(ctx, repo.RandomID())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, run.Close()) }()
	w, err := run.Disk(ctx, nil, int64(len(content)))
	if err != nil {
		return err
	}
	if err := w.WriteAt(ctx, content, 0); err != nil {
		return err
	}
	root, err := w.Finish(ctx)
	if err != nil {
		return err
	}
	return run.Commit(ctx, &repo.Point{VM: vm, Disks: []repo.Disk{{ID: "vda", Size: int64(len(content)), Root: root}}})
}
