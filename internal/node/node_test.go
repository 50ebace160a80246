package node

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestLocation(t *testing.T) {
	abs, err := filepath.Abs("dir")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("AWS_REGION", "")
	t.Setenv("AWS_DEFAULT_REGION", "eu-west-1")
	t.Setenv("AWS_ENDPOINT_URL_S3", "")
	t.Setenv("AWS_ENDPOINT_URL", "")
	for repo, want := range map[string]string{
		"s3://bucket/a/?path-style=0": "s3://bucket/a?endpoint=https://s3.amazonaws.com&region=eu-west-1", "s3://key:secret@bucket": "", "gs://bucket": "",
		"/a/b": "/a/b", "dir": abs, "file:///a/b": "/a/b", "file://localhost/a": "/a",
		"": "", "file://host/a": "", "s3://": "", "file://": "",
	} {
		got, err := New(Options{Repo: repo}).Location()
		if _, usage := errors.AsType[*UsageError](err); got != want || usage != (want == "") {
			t.Errorf("%q: %q, %v, want %q", repo, got, err, want)
		}
	}
}

func TestHosts(t *testing.T) {
	for host, want := range map[string]string{
		"qemu:///system": "libvirt", "qemu+ssh://root@kvm/system": "libvirt", "/images": "folder", "images": "folder",
		"esx://host": "", "http://x": "",
	} {
		virt, err := isLibvirt(host)
		if (err != nil) != (want == "") || virt != (want == "libvirt") {
			t.Errorf("%q: %v, %v", host, virt, err)
		}
	}
	for host, want := range map[string]string{
		"qemu:///system": "", "qemu+unix:///system?socket=/x": "", "qemu+ssh://root@kvm:22/system": "kvm", "qemu+tls://[::1]/system": "::1",
	} {
		if got, err := remoteOf(host); got != want || err != nil {
			t.Errorf("%q: %q, %v", host, got, err)
		}
	}
}

func TestListenAddress(t *testing.T) {
	dir := t.TempDir()
	for in, want := range map[string]string{
		"unix:" + dir + "/s": "unix:" + dir + "/s", ":10809": "tcp::10809", "host": "tcp:host", "tcp:host:1": "tcp:host:1",
		"": "", "unix:": "", "tcp:": "", "unix:" + dir + "/missing/s": "",
	} {
		got, err := listenAddress(in)
		if got != want || (err != nil) != (want == "") {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}

func TestRename(t *testing.T) {
	for name, rename := range map[string]func(from, to string) error{"system": rename, "links": renameLinked} {
		dir := t.TempDir()
		from, to := filepath.Join(dir, "from"), filepath.Join(dir, "to")
		write := func(path, text string) {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		write(from, "new")
		write(to, "old")
		if err := rename(from, to); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s: over another file: %v", name, err)
		}
		if b, err := os.ReadFile(to); string(b) != "old" {
			t.Errorf("%s: overwritten: %q, %v", name, b, err)
		}
		if err := errors.Join(os.Remove(to), rename(from, to)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if b, err := os.ReadFile(to); string(b) != "new" {
			t.Errorf("%s: %q, %v", name, b, err)
		}
		if _, err := os.Lstat(from); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the old name is left: %v", name, err)
		}
	}
}

func TestWithoutSecrets(t *testing.T) {
	got := withoutSecrets([]string{"A=1", "HOLDFAST_PASSPHRASE=x", "HOLDFAST_PASSPHRASE_FILE=y", "HOLDFAST_NEW_PASSPHRASE=w", "HOLDFAST_REPO=z",
		"AWS_SECRET_ACCESS_KEY=s", "AWS_SESSION_TOKEN=t", "AWS_ACCESS_KEY_ID=i", "AWS_PROFILE=p"})
	if want := []string{"A=1", "HOLDFAST_REPO=z", "AWS_ACCESS_KEY_ID=i", "AWS_PROFILE=p"}; !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

// nowhere is a libvirt that does not answer.
const nowhere = "qemu+unix:///system?socket=/nonexistent/libvirt-sock"

// The guard says that it watches, and goes away when it is released: before the
// limit, or after it while it still tries.
func TestThawReleased(t *testing.T) {
	for _, limit := range []time.Duration{time.Hour, time.Millisecond} {
		in, release := io.Pipe()
		out := &bytes.Buffer{}
		done := make(chan error, 1)
		go func() { done <- Thaw(t.Context(), in, out, nowhere, "00000000-0000-0000-0000-000000000000", limit) }()
		if limit < time.Second {
			select {
			case err := <-done:
				t.Fatalf("it gave up: %v", err)
			case <-time.After(50 * time.Millisecond): // longer than the limit
			}
		}
		if _, err := io.WriteString(release, guardReleased); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-done:
			if err != nil || out.String() != guardReady {
				t.Errorf("limit %s: %v, said %q", limit, err, out)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("limit %s: it does not end", limit)
		}
	}
}

func TestAdvice(t *testing.T) {
	for _, a := range advice {
		if got := Advice(errors.Join(errors.New("first"), a.err)); got == "" || strings.ContainsAny(got, "\n") {
			t.Errorf("%v: %q", a.err, got)
		}
	}
	if got := Advice(errors.New("other")); got != "" {
		t.Errorf("%q", got)
	}
}
