package node

import (
	"fmt"
	"testing"

	"holdfast/internal/blob"
	"holdfast/internal/blob/s3"
	"holdfast/internal/blob/s3/s3test"
	"holdfast/internal/repo"
	"holdfast/internal/repo/repotest"
)

// On a real server with Object Lock: somebody with a writer's credentials
// deletes, overwrites and destroys what he can after every commit; all of it
// comes back.
func TestImmutableOnS3(t *testing.T) {
	endpoint := s3test.Versitygw(t)
	for _, mode := range []string{"governance", "compliance"} {
		t.Run(mode, func(t *testing.T) {
			ctx := t.Context()
			stranger := s3test.NewStranger(t, endpoint, mode)
			open := func() blob.Store {
				o := s3.Options{Bucket: mode, Prefix: "repo", Endpoint: endpoint, PathStyle: true, Keys: &s3.Keys{Access: s3test.AccessKey, Secret: s3test.SecretKey}}
				s, err := s3.Open(ctx, o)
				if err != nil {
					t.Fatal(err)
				}
				return s
			}
			seedStore(t, open())
			r := repotest.Open(t, open())
			if err := r.SetImmutable(ctx, repo.Immutability{Days: 1, Mode: mode}, nil); err != nil {
				t.Fatal(err)
			}
			content := []byte(fmt.Sprintf("%*s", 3*repo.ChunkSize, "x"))
			for round := range 3 {
				content[round] = 'y'
				if err := saveOn(ctx, r, fmt.Sprint("vm", round), content); err != nil {
					t.Fatal(err)
				}
				keys := stranger.Keys()
				for i, key := range keys {
					if (i+round)%2 == 0 {
						stranger.Overwrite(key, []byte("garbage"))
					}
					stranger.Hide(key)
				}
				gone, kept := stranger.Destroy()
				for _, key := range keys {
					stranger.Hide(key)
				}
				store := open()
				back, err := repo.Undelete(ctx, store)
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("%d objects; %d versions and markers destroyed, %d not; %d objects brought back", len(keys), gone, kept, len(back))
				r = repotest.Open(t, store)
				report, err := r.Check(ctx, repo.CheckOptions{ReadData: true, Undeleted: back})
				if err != nil || len(report.Problems) > 0 || report.Points != round+1 {
					t.Fatalf("check: %+v, %v", report, err)
				}
			}
			points, err := r.Points(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for i, p := range points {
				want := []byte(fmt.Sprintf("%*s", 3*repo.ChunkSize, "x"))
				for k := range i + 1 {
					want[k] = 'y'
				}
				d, err := r.OpenDisk(ctx, p.Disks[0])
				if err != nil {
					t.Fatal(err)
				}
				got := make([]byte, len(want))
				if err := d.ReadAt(ctx, got, 0); err != nil || string(got) != string(want) {
					t.Errorf("%s: other bytes; %v", p.VM, err)
				}
			}
			if err := r.Forget(ctx, []repo.PointID{points[0].ID}, points[0].Time); err != nil {
				t.Fatal(err)
			}
			pruned, err := r.Prune(ctx, repo.PruneOptions{Watch: -1})
			if err != nil || pruned.Removed != 0 || pruned.Locked == 0 {
				t.Errorf("prune: %+v, %v", pruned, err)
			}
		})
	}
}
