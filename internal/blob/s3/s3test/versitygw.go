package s3test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"
)

// Versitygw starts a real S3 server, not written here, until the test ends, with
// these plain buckets; AccessKey and SecretKey open it. HOLDFAST_VERSITYGW names
// its program, which "make test" builds.
func Versitygw(t testing.TB, buckets ...string) (endpoint string) {
	t.Helper()
	exe := os.Getenv("HOLDFAST_VERSITYGW")
	if exe == "" {
		t.Skip("SKIPPED: needs an S3 server, which HOLDFAST_VERSITYGW names; \"make test\" builds it and sets it")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	root, versions := filepath.Join(dir, "root"), filepath.Join(dir, "versions")
	if err := errors.Join(os.Mkdir(root, 0o700), os.Mkdir(versions, 0o700)); err != nil {
		t.Fatal(err)
	}
	for _, name := range buckets {
		if err := os.Mkdir(filepath.Join(root, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	var said bytes.Buffer
	// Without --keep-alive, with which it takes the rest of a body that it has
	// refused for the next request.
	cmd := exec.Command(exe, "--port", addr, "--quiet", "posix", "--versioning-dir", versions, root)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID="+AccessKey, "ROOT_SECRET_ACCESS_KEY="+SecretKey)
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait() // it was killed
		if t.Failed() {
			t.Logf("versitygw said: %s", said.Bytes()[max(0, said.Len()-4000):])
		}
	})
	for range 200 {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
			return "http://" + addr
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("versitygw does not listen; it said: %s", said.Bytes())
	return ""
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
