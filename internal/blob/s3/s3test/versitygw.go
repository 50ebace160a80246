package s3test

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"holdfast/test/lab"
)

// Versitygw starts a real S3 server, not written here, until the test ends, with
// these plain buckets; AccessKey and SecretKey open it. HOLDFAST_VERSITYGW names
// its program, which "make test" builds.
func Versitygw(t testing.TB, buckets ...string) (endpoint string) {
	t.Helper()
	program := os.Getenv("HOLDFAST_VERSITYGW")
	if program == "" {
		t.Skip("SKIPPED: needs an S3 server, which HOLDFAST_VERSITYGW names; \"make test\" builds it and sets it")
	}
	dir := t.TempDir()
	s := &lab.S3{Program: program, Root: filepath.Join(dir, "root"), Versions: filepath.Join(dir, "versions"), Access: AccessKey, Secret: SecretKey}
	dirs := []string{s.Root, s.Versions}
	for _, name := range buckets {
		dirs = append(dirs, filepath.Join(s.Root, name))
	}
	for _, dir := range dirs {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Stop()
		if t.Failed() {
			t.Logf("versitygw said: %s", s.Said())
		}
	})
	return "http://" + s.Addr
}

// Stranger is somebody with a writer's credentials, who does what the server
// lets him do.
type Stranger struct {
	t      testing.TB
	c      *minio.Client
	bucket string
}

// NewStranger makes a bucket with Object Lock, and somebody who may write there.
func NewStranger(t testing.TB, endpoint, bucket string) *Stranger {
	t.Helper()
	c, err := minio.New(strings.TrimPrefix(endpoint, "http://"), &minio.Options{Creds: credentials.NewStaticV4(AccessKey, SecretKey, "")})
	if err == nil {
		err = c.MakeBucket(context.Background(), bucket, minio.MakeBucketOptions{ObjectLocking: true})
	}
	if err != nil {
		t.Fatal(err)
	}
	return &Stranger{t, c, bucket}
}

// Keys lists all objects that are shown.
func (s *Stranger) Keys() (keys []string) {
	for o := range s.c.ListObjectsIter(context.Background(), s.bucket, minio.ListObjectsOptions{Recursive: true}) {
		if o.Err != nil {
			s.t.Fatal(o.Err)
		}
		keys = append(keys, o.Key)
	}
	return keys
}

// Hide deletes an object without naming a version.
func (s *Stranger) Hide(key string) {
	if err := s.c.RemoveObject(context.Background(), s.bucket, key, minio.RemoveObjectOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// Overwrite puts an object without a condition.
func (s *Stranger) Overwrite(key string, data []byte) {
	_, err := s.c.PutObject(context.Background(), s.bucket, key, bytes.NewReader(data), int64(len(data)), minio.PutObjectOptions{SendContentMd5: true})
	if err != nil {
		s.t.Fatal(err)
	}
}

// Destroy tries to delete every version of every object, and tells how many
// the server let go and how many not.
func (s *Stranger) Destroy() (gone, kept int) {
	var all []minio.ObjectInfo
	for o := range s.c.ListObjectsIter(context.Background(), s.bucket, minio.ListObjectsOptions{Recursive: true, WithVersions: true}) {
		if o.Err != nil {
			s.t.Fatal(o.Err)
		}
		all = append(all, o)
	}
	for _, o := range all {
		if s.c.RemoveObject(context.Background(), s.bucket, o.Key, minio.RemoveObjectOptions{VersionID: o.VersionID}) == nil {
			gone++
		} else {
			kept++
		}
	}
	return gone, kept
}
