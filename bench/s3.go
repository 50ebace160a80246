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
	"path/filepath"
	"time"

	"holdfast/test/cli"
	"holdfast/test/lab"
)

// far is what is added to every request of the far server.
const far = 50 * time.Millisecond

// s3 measures a full backup into an S3 server on this machine (versitygw), and
// into the same server behind a proxy that holds every request back.
func (b *bench) s3(ctx context.Context) (err error) {
	dir := filepath.Join(b.work, "s3")
	server := &lab.S3{Program: "bin/lab/versitygw", Root: filepath.Join(dir, "root"), Access: "bench", Secret: "benchbench"}
	if _, err := os.Stat(server.Program); err != nil {
		b.leave("versitygw")
		return nil
	}
	if err := os.MkdirAll(filepath.Join(server.Root, "bench"), 0o755); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for k, v := range map[string]string{"AWS_ACCESS_KEY_ID": server.Access, "AWS_SECRET_ACCESS_KEY": server.Secret} {
		if err := os.Setenv(k, v); err != nil {
			return err
		}
	}
	if err := server.Start(ctx); err != nil {
		return err
	}
	defer server.Stop()
	proxy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	pass := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: server.Addr})
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
			at, name = server.Addr, "S3, near"
		}
		tool := &cli.Tool{Bin: b.bin, Passphrase: passphrase, State: filepath.Join(dir, "state", fmt.Sprint(i)),
			Repo: fmt.Sprintf("s3://bench/%d?endpoint=http://%s&path-style=true", i, at)}
		b.tools = append(b.tools, tool)
		if err := tool.Run(ctx, "init").Err(); err != nil {
			return err
		}
		if err := b.measure([]kind{{name, b.disk(), func() error { return b.job(ctx, tool, name, "backup", b.source()) }, nil}}); err != nil {
			return err
		}
		if err := os.RemoveAll(filepath.Join(server.Root, "bench", fmt.Sprint(i))); err != nil {
			return err
		}
	}
	return nil
}
