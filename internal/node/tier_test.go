package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"holdfast/internal/blob"
	"holdfast/internal/blob/s3"
	"holdfast/internal/blob/s3/s3test"
	"holdfast/internal/repo"
	"holdfast/internal/repo/repotest"
)

// tieredRepo opens the empty repository of repotest, with its tiers on S3.
func tieredRepo(t *testing.T, own blob.Store, keys *s3.Keys) *repo.Repo {
	t.Helper()
	r, err := repo.Open(t.Context(), own, []byte(repotest.Passphrase), repo.Options{Cache: t.TempDir(), OpenTier: func(ctx context.Context, location string) (blob.Store, error) {
		return onServer(ctx, location, keys)
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

func onServer(ctx context.Context, location string, keys *s3.Keys) (*s3.Store, error) {
	o, err := s3.Parse(location, func(string) string { return "" })
	if err != nil {
		return nil, err
	}
	o.Keys, o.Retry = keys, s3.Retry{Tries: 20, Wait: time.Millisecond}
	return s3.Open(ctx, o)
}

// everything is for Repo.Move: whatever its age.
var everything = repo.MoveOptions{Before: time.Now().AddDate(1, 0, 0), Watch: -1}

// A tier on a server that misbehaves, and on one that was not written here.
func TestTierOnS3(t *testing.T) {
	t.Run("misbehaving", func(t *testing.T) {
		srv := s3test.New(t, s3test.Options{Versioned: true, Page: 3, Faults: &s3test.Faults{Chance: 0.08, Delay: time.Millisecond, Skew: 0.02}})
		testTierOnS3(t, srv.Repo("tier"), &s3.Keys{Access: s3test.AccessKey, Secret: s3test.SecretKey})
	})
	t.Run("versitygw", func(t *testing.T) {
		endpoint := s3test.Versitygw(t, "archive")
		testTierOnS3(t, "s3://archive/tier?path-style=1&endpoint="+endpoint, &s3.Keys{Access: s3test.AccessKey, Secret: s3test.SecretKey})
	})
}

func testTierOnS3(t *testing.T, location string, keys *s3.Keys) {
	ctx := t.Context()
	own := repotest.Store(t)
	r := tieredRepo(t, own, keys)
	contents := map[string][]byte{}
	add := func(r *repo.Repo, vm string) {
		content := make([]byte, 3*repo.ChunkSize)
		rng := rand.NewChaCha8([32]byte{byte(len(contents))})
		rng.Read(content)
		contents[vm] = content
		if err := saveOn(ctx, r, vm, content); err != nil {
			t.Fatal(err)
		}
	}
	equal := func(r *repo.Repo, want int) {
		t.Helper()
		points, err := r.Points(ctx)
		if err != nil || len(points) != want {
			t.Fatalf("%d points, %v", len(points), err)
		}
		for _, p := range points {
			d, err := r.OpenDisk(ctx, p.Disks[0])
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, p.Disks[0].Size)
			if err := errors.Join(d.ReadAt(ctx, got, 0), d.Close()); err != nil || !bytes.Equal(got, contents[p.VM]) {
				t.Errorf("%s: other bytes; %v", p.VM, err)
			}
		}
		report, err := r.Check(ctx, repo.CheckOptions{ReadData: true})
		if err != nil || len(report.Problems) > 0 {
			t.Errorf("check: %+v, %v", report, err)
		}
	}
	for i := range 3 {
		add(r, fmt.Sprint("vm", i))
	}
	far, err := onServer(ctx, location, keys)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.AddTier(ctx, repo.Tier{Name: "far", Location: location}, far); err != nil {
		t.Fatal(err)
	}
	report, err := r.Move(ctx, "far", everything)
	if err != nil || report.Freed != 3 || len(report.Notes) > 0 {
		t.Fatalf("%+v, %v", report, err)
	}
	equal(tieredRepo(t, own, keys), 3)
	points, err := r.Points(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Forget(ctx, []repo.PointID{points[0].ID}, time.Now()); err != nil {
		t.Fatal(err)
	}
	if pruned, err := r.Prune(ctx, repo.PruneOptions{Watch: -1}); err != nil || pruned.Removed != 2 {
		t.Errorf("%+v, %v", pruned, err)
	}
	equal(r, 2)

	// The own store is lost.
	alone := tieredRepo(t, far, keys)
	equal(alone, 2)
	if err := alone.TakeOver(ctx, false); err != nil {
		t.Fatal(err)
	}
	add(alone, "new")
	equal(alone, 3)
	if _, err := r.Move(ctx, "far", everything); err == nil {
		t.Error("the old store goes on")
	}
}

// A pack that is locked in the own store stays there, and is locked in the tier.
func TestTierOfLocked(t *testing.T) {
	ctx := t.Context()
	keys := &s3.Keys{Access: s3test.AccessKey, Secret: s3test.SecretKey}
	srv := s3test.New(t, s3test.Options{Locking: true})
	own, err := onServer(ctx, srv.Repo("own"), keys)
	if err != nil {
		t.Fatal(err)
	}
	far, err := onServer(ctx, srv.Repo("far"), keys)
	if err != nil {
		t.Fatal(err)
	}
	seedStore(t, own)
	r := tieredRepo(t, own, keys)
	for i := range 2 {
		if err := saveOn(ctx, r, fmt.Sprint(i), bytes.Repeat([]byte{byte(i + 1)}, repo.ChunkSize)); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.AddTier(ctx, repo.Tier{Name: "far", Location: srv.Repo("far")}, far); err != nil {
		t.Fatal(err)
	}
	lock := blob.Lock{Until: time.Now().Add(time.Hour), Mode: blob.Governance}
	var locked string
	err = r.Packs(ctx, func(p repo.PackInfo) error {
		if p.Kind == "chunks" && locked == "" {
			locked = "packs/" + p.Pack[:2] + "/" + p.Pack
			return own.Lock(ctx, locked, lock)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	report, err := r.Move(ctx, "far", everything)
	if err != nil || report.Locked != 1 || report.Freed != 1 {
		t.Fatalf("%+v, %v", report, err)
	}
	if l, err := far.Locked(ctx, locked); err != nil || !l.Holds(lock) {
		t.Errorf("the tier's copy is locked %v, %v", l, err)
	}
	if l, ok := blob.As[blob.Locker](own); !ok || l.Lock(ctx, locked, lock) != nil {
		t.Error("it cannot be locked any more")
	}
}
