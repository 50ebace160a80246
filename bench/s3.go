//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"holdfast/test/cli"
)

// far is what is added to every request of the far server.
const far = 50 * time.Millisecond

// s3 measures a full backup into an S3 server on this machine (versitygw), and
// into the same server behind a proxy that holds every request back.
func (b *bench) s3(ctx context.Context) (err error) {
	exe, err := filepath.Abs("bin/lab/versitygw")
	if err != nil {
		return err
	}
	if _, err := os.Stat(exe); err != nil {
		b.say("no S3 server to measure with: %v", err)
		return nil
	}
	dir := filepath.Join(b.work, "s3")
	root := filepath.Join(dir, "root")
	if err := os.MkdirAll(filepath.Join(root, "bench"), 0o755); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	server, stop, err := startS3(ctx, exe, root)
	if err != nil {
		return err
	}
	defer stop()
	proxy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	pass := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: server})
	slow := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(far)
		pass.ServeHTTP(w, r)
	})}
	go slow.Serve(proxy)
	defer slow.Close()

	near := false
	for i := range 2 * b.runs {
		near = !near
		at, name := proxy.Addr().String(), "S3, far"
		if near {
			at, name = server, "S3, near"
		}
		tool := &cli.Tool{Bin: b.bin, Passphrase: "bench", State: filepath.Join(dir, "state", fmt.Sprint(i)),
			Repo: fmt.Sprintf("s3://bench/%d?endpoint=http://%s&path-style=true", i, at)}
		b.tools = append(b.tools, tool)
		if err := errors.Join(tool.Run(ctx, "init").Err(), level(filepath.Join(b.work, "fill")), warm(b.disk()), syncAll(b.work)); err != nil {
			return err
		}
		from := time.Now()
		r := tool.Run(ctx, "backup", b.source())
		if err := errors.Join(r.Err(), syncAll(b.work)); err != nil {
			return err
		}
		took := time.Since(from)
		b.times[name], b.rss = append(b.times[name], took), append(b.rss, r.MaxRSS)
		b.say("backup, %s: %.1f s", name, took.Seconds())
		if err := os.RemoveAll(filepath.Join(root, "bench", fmt.Sprint(i))); err != nil {
			return err
		}
	}
	return nil
}

// startS3 starts the server, and tells tools of this process its keys. Buckets
// are the directories in root.
func startS3(ctx context.Context, exe, root string) (addr string, stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	addr = l.Addr().String()
	if err := l.Close(); err != nil {
		return "", nil, err
	}
	cmd := exec.CommandContext(ctx, exe, "--port", addr, "--quiet", "posix", root)
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY_ID=bench", "ROOT_SECRET_ACCESS_KEY=benchbench")
	if err := cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait() // it was killed
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	for k, v := range map[string]string{"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "benchbench"} {
		if err := os.Setenv(k, v); err != nil {
			return "", nil, err
		}
	}
	for range 100 {
		var c net.Conn
		if c, err = net.Dial("tcp", addr); err == nil {
			return addr, stop, c.Close()
		}
		time.Sleep(50 * time.Millisecond)
	}
	return addr, stop, fmt.Errorf("the S3 server does not listen: %w", err)
}
