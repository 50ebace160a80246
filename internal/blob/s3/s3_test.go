package s3

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"

	"holdfast/internal/blob"
	"holdfast/internal/blob/blobtest"
	"holdfast/internal/blob/s3/s3test"
)

func TestMain(m *testing.M) {
	minio.DefaultRetryUnit = time.Millisecond // the library's own wait after a request that failed
	os.Exit(m.Run())
}

// at is a store on a test server.
func at(t *testing.T, srv *s3test.Server, prefix string) *Store {
	t.Helper()
	o, err := Parse(srv.Repo(prefix), func(string) string { return "" })
	if err != nil {
		t.Fatal(err)
	}
	return with(t, o)
}

// with opens a store that waits as little between its tries as a test can bear.
func with(t *testing.T, o Options) *Store {
	t.Helper()
	if o.Keys == nil {
		o.Keys = &Keys{Access: s3test.AccessKey, Secret: s3test.SecretKey}
	}
	o.Retry = Retry{Tries: 20, Wait: 100 * time.Microsecond}
	s, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// conformance runs the suite on prefixes of one bucket.
func conformance(t *testing.T, srv *s3test.Server) {
	n := 0
	blobtest.Store(t, func(t *testing.T) blob.Store {
		n++
		return at(t, srv, fmt.Sprintf("store-%d", n))
	})
}

func TestConformance(t *testing.T) {
	t.Run("plain", func(t *testing.T) { conformance(t, s3test.New(t, s3test.Options{})) })
	t.Run("small pages", func(t *testing.T) { conformance(t, s3test.New(t, s3test.Options{Page: 1})) })
	t.Run("versions", func(t *testing.T) { conformance(t, s3test.New(t, s3test.Options{Versioned: true, Page: 2})) })
	t.Run("locks", func(t *testing.T) { conformance(t, s3test.New(t, s3test.Options{Locking: true})) })
	t.Run("whole bucket", func(t *testing.T) {
		blobtest.Store(t, func(t *testing.T) blob.Store { return at(t, s3test.New(t, s3test.Options{}), "") })
	})
}

// A server that misbehaves in every fourth request is as good as any other.
func TestMisbehaving(t *testing.T) {
	f := &s3test.Faults{Chance: 0.25, Delay: time.Millisecond, Skew: 0.02}
	t.Run("plain", func(t *testing.T) { conformance(t, s3test.New(t, s3test.Options{Faults: f, Page: 2})) })
	t.Run("versions", func(t *testing.T) {
		conformance(t, s3test.New(t, s3test.Options{Faults: f, Page: 2, Versioned: true}))
	})
}

// Random calls on a server that misbehaves do what they do in memory.
func TestMisbehavingHistory(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	for _, versioned := range []bool{false, true} {
		srv := s3test.New(t, s3test.Options{Faults: &s3test.Faults{Chance: 0.2, Seed: seed}, Page: 3, Versioned: versioned})
		s, model := at(t, srv, "p"), new(blob.Mem)
		ctx := t.Context()
		for range 150 {
			name := fmt.Sprintf("d%d/%d", r.IntN(2), r.IntN(8))
			var got, want error
			switch r.IntN(6) {
			case 0, 1, 2:
				data := bytes.Repeat([]byte{byte(r.IntN(256))}, r.IntN(3)*r.IntN(5000))
				got, want = s.Put(ctx, name, data), model.Put(ctx, name, data)
			case 3:
				got, want = s.Delete(ctx, name), model.Delete(ctx, name)
			default:
				off, n := r.Int64N(6000), r.Int64N(6000)-1
				var p, q []byte
				p, got = s.Get(ctx, name, off, n)
				q, want = model.Get(ctx, name, off, n)
				if !bytes.Equal(p, q) {
					t.Fatalf("seed %d: get %s [%d, +%d): other bytes", seed, name, off, n)
				}
			}
			for _, e := range []error{blob.ErrExist, blob.ErrNotExist, blob.ErrTruncated, nil} {
				if errors.Is(want, e) != errors.Is(got, e) {
					t.Fatalf("seed %d: %s: %v, want %v", seed, name, got, want)
				}
			}
			if a, b := names(t, s, "d1/"), names(t, model, "d1/"); !slices.Equal(a, b) {
				t.Fatalf("seed %d: listed %v, want %v", seed, a, b)
			}
		}
	}
}

func names(t *testing.T, s blob.Store, prefix string) []string {
	t.Helper()
	var list []string
	for i, err := range s.List(context.Background(), prefix) {
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprint(i.Name, " ", i.Size))
	}
	slices.Sort(list)
	return list
}

// One of many writers wins each name, whatever happens to their requests.
func TestMisbehavingRace(t *testing.T) {
	srv := s3test.New(t, s3test.Options{Faults: &s3test.Faults{Chance: 0.3}})
	for round := range 10 {
		name := fmt.Sprintf("chain/%d", round)
		won := make(chan bool)
		for range 6 {
			s := at(t, srv, "p") // a process of its own
			go func() {
				// The same bytes, so that nothing but the mark tells whose they are.
				err := s.Put(context.Background(), name, []byte("entry"))
				if err != nil && !errors.Is(err, blob.ErrExist) {
					t.Error(err)
				}
				won <- err == nil
			}()
		}
		n := 0
		for range 6 {
			if <-won {
				n++
			}
		}
		if n != 1 {
			t.Fatalf("%s: %d writers won", name, n)
		}
	}
}

func TestCreate(t *testing.T) {
	create := func(o s3test.Options) error {
		srv := s3test.New(t, o)
		opts, err := Parse(srv.Repo("p"), func(string) string { return "" })
		if err != nil {
			t.Fatal(err)
		}
		opts.Keys = &Keys{Access: s3test.AccessKey, Secret: s3test.SecretKey}
		_, err = Create(t.Context(), opts)
		if err == nil && !slices.Equal(srv.Keys(), []string{"p/.tmp-probe"}) {
			t.Errorf("it has left %q", srv.Keys())
		}
		return err
	}
	for _, o := range []s3test.Options{{}, {Versioned: true}, {Locking: true}} {
		if err := create(o); err != nil {
			t.Errorf("%+v: %v", o, err)
		}
	}
	err := create(s3test.Options{IgnoreConditions: true})
	if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "If-None-Match") {
		t.Errorf("a server without conditional writes: %v", err)
	}
}

// A process that only reads writes nothing; one that writes asks first, once.
func TestProbeOnce(t *testing.T) {
	srv := s3test.New(t, s3test.Options{})
	ctx := t.Context()
	if err := at(t, srv, "p").Put(ctx, "a", nil); err != nil {
		t.Fatal(err)
	}
	puts := srv.Count("PUT")
	s := at(t, srv, "p")
	if _, err := s.Get(ctx, "a", 0, -1); err != nil || srv.Count("PUT") != puts {
		t.Errorf("reading wrote: %v", err)
	}
	for i := range 3 {
		if err := s.Put(ctx, fmt.Sprint(i), nil); err != nil {
			t.Fatal(err)
		}
	}
	if got := srv.Count("PUT") - puts; got != 4 {
		t.Errorf("%d requests for three objects and a probe", got)
	}
	bad := s3test.New(t, s3test.Options{IgnoreConditions: true})
	if err := at(t, bad, "p").Put(ctx, "a", nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("put on a server without conditional writes: %v", err)
	}
	if slices.Contains(bad.Keys(), "p/a") {
		t.Error("it wrote there all the same")
	}
}

// An answer that is not the server's is never the absence of an object, nor an
// empty list.
func TestStrangers(t *testing.T) {
	ctx := t.Context()
	for _, page := range []string{"<html><body/></html>", "", "<Error></Error>", "<Error><Code>NoSu"} {
		srv := s3test.New(t, s3test.Options{})
		s := at(t, srv, "p")
		s.o.Retry.Tries = 2
		for _, status := range []int{200, 404, 502} {
			s.core = stranger(t, s, status, page)
			if _, err := s.Get(ctx, "a", 0, -1); err == nil || errors.Is(err, blob.ErrNotExist) || errors.Is(err, blob.ErrTruncated) {
				t.Errorf("status %d %q: get: %v", status, page, err)
			}
			if err := s.Delete(ctx, "a"); err == nil || errors.Is(err, blob.ErrNotExist) {
				t.Errorf("status %d %q: delete: %v", status, page, err)
			}
			if err := listed(s); err == nil {
				t.Errorf("status %d %q: listed without an error", status, page)
			}
			for _, err := range s.Hidden(ctx, "") {
				if err != nil {
					status = 0
				}
			}
			if status != 0 {
				t.Errorf("%q: hidden versions listed without an error", page)
			}
		}
	}
}

func listed(s blob.Store) (err error) {
	for _, err = range s.List(context.Background(), "") {
	}
	return err
}

// stranger is a client whose every request is answered so.
func stranger(t *testing.T, s *Store, status int, page string) *minio.Core {
	t.Helper()
	c, err := minio.NewCore("127.0.0.1:1", &minio.Options{Creds: s.creds, Region: "us-east-1", MaxRetries: 1, BucketLookup: minio.BucketLookupPath,
		Transport: guard{roundTrip(func(r *http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: status, Header: http.Header{"Content-Length": {fmt.Sprint(len(page))}, "Last-Modified": {time.Now().UTC().Format(http.TimeFormat)}},
				Body: readCloser{strings.NewReader(page)}, Request: r, ContentLength: int64(len(page))}, nil
		})}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

type readCloser struct{ *strings.Reader }

func (readCloser) Close() error { return nil }

// A listing that is cancelled half-way is an error.
func TestListCancelled(t *testing.T) {
	srv := s3test.New(t, s3test.Options{Page: 2})
	s := at(t, srv, "p")
	for i := range 6 {
		if err := s.Put(t.Context(), fmt.Sprint(i), nil); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	n := 0
	var last error
	for _, err := range s.List(ctx, "") {
		if n++; n == 2 {
			cancel()
		}
		last = err
	}
	if !errors.Is(last, context.Canceled) {
		t.Errorf("after %d objects: %v", n, last)
	}
}

func TestErrors(t *testing.T) {
	srv := s3test.New(t, s3test.Options{})
	for name, c := range map[string]struct {
		change func(*Options)
		say    string
	}{
		"bucket":   {func(o *Options) { o.Bucket = "other" }, "make the bucket"},
		"key":      {func(o *Options) { o.Keys = &Keys{Access: "x", Secret: "y"} }, "AWS_ACCESS_KEY_ID"},
		"endpoint": {func(o *Options) { o.Endpoint = "http://127.0.0.1:1" }, "tried 2 times"},
	} {
		o := at(t, srv, "p").o
		c.change(&o)
		s := with(t, o)
		s.o.Retry.Tries = 2
		_, err := s.Get(t.Context(), "config", 0, -1)
		if err == nil || errors.Is(err, blob.ErrNotExist) || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s: get: %v", name, err)
		}
		if err := s.Put(t.Context(), "a", nil); err == nil || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s: put: %v", name, err)
		}
	}
}

func TestVirtualHost(t *testing.T) {
	srv := s3test.New(t, s3test.Options{})
	hosts := make(chan string, 10)
	srv.Watch(func(r *http.Request) { hosts <- r.Host + r.URL.Path })
	o := Options{Bucket: s3test.Bucket, Prefix: "p", Endpoint: "http://s3.example.net:9000", Keys: &Keys{Access: s3test.AccessKey, Secret: s3test.SecretKey}}
	for style, want := range map[bool]string{false: s3test.Bucket + ".s3.example.net:9000/p/a", true: "s3.example.net:9000/" + s3test.Bucket + "/p/a"} {
		o.PathStyle = style
		s, err := open(t.Context(), o, srv.Dial)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(t.Context(), "a", 0, -1); !errors.Is(err, blob.ErrNotExist) {
			t.Errorf("path style %v: %v", style, err)
		}
		if got := <-hosts; got != want {
			t.Errorf("path style %v: asked %s, want %s", style, got, want)
		}
	}
}

func TestCA(t *testing.T) {
	srv := s3test.New(t, s3test.Options{TLS: true})
	o := at(t, srv, "p").o
	if _, err := with(t, o).Get(t.Context(), "a", 0, -1); err == nil || errors.Is(err, blob.ErrNotExist) || !strings.Contains(err.Error(), "ca=FILE") {
		t.Errorf("with a certificate that nobody knows: %v", err)
	}
	o.CA = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(o.CA, srv.CA, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := with(t, o).Put(t.Context(), "a", []byte("x")); err != nil {
		t.Errorf("with its certificate: %v", err)
	}
}

func TestCredentials(t *testing.T) {
	dir := t.TempDir()
	for _, k := range append(slices.Clone(Secrets), "AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY", "AWS_PROFILE", "AWS_CONFIG_FILE",
		"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI") {
		t.Setenv(k, "")
	}
	file := filepath.Join(dir, "credentials")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", file)
	srv := s3test.New(t, s3test.Options{})
	o := Options{Bucket: s3test.Bucket, Endpoint: srv.URL, PathStyle: true}
	try := func() error {
		s, err := Open(t.Context(), o)
		if err == nil {
			err = s.Put(t.Context(), "a"+newMark(), nil)
		}
		return err
	}
	if err := try(); err == nil || !strings.Contains(err.Error(), "set AWS_ACCESS_KEY_ID") {
		t.Errorf("without credentials: %v", err)
	}
	text := "[default]\naws_access_key_id=no\naws_secret_access_key=no\n[backup]\naws_access_key_id=access\naws_secret_access_key=secret\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_PROFILE", "backup")
	if err := try(); err != nil {
		t.Errorf("from a profile: %v", err)
	}
	t.Setenv("AWS_PROFILE", "")
	t.Setenv("AWS_ACCESS_KEY_ID", s3test.AccessKey)
	t.Setenv("AWS_SECRET_ACCESS_KEY", s3test.SecretKey)
	if err := try(); err != nil {
		t.Errorf("from the environment: %v", err)
	}
	t.Setenv("AWS_ACCESS_KEY_ID", "wrong")
	o.Keys = &Keys{Access: s3test.AccessKey, Secret: s3test.SecretKey}
	if err := try(); err != nil {
		t.Errorf("given: %v", err)
	}
}

func TestWait(t *testing.T) {
	r := Retry{Wait: time.Second}
	for n, most := range map[int]time.Duration{1: time.Second, 2: 2 * time.Second, 4: 8 * time.Second, 9: 150 * time.Second, 100: 150 * time.Second} {
		for range 100 {
			if d := r.wait(n); d > most || d < most/2-1 {
				t.Errorf("before try %d: %s", n+1, d)
			}
		}
	}
}
