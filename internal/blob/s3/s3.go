// Package s3 is a blob.Store in a bucket of S3 or of a server compatible with it.
//
// # What it needs of the server
//
// Conditional writes (If-None-Match: *), by which of several writers of one name
// exactly one wins; a server that ignores them would let one commit overwrite
// another. Create tries it, with all else that is needed; every process tries
// it once more, with one request, before its first write. A process that only
// reads writes nothing, so credentials that may only read are enough to restore.
//
// # What answers mean
//
// An object does not exist when the server says NoSuchKey, and for no other
// reason: not a 404 of a proxy, nor an answer that broke off. A listing is
// complete when each of its pages was a listing, in order, to the last. A body
// is whole when it has the length that was announced.
//
// A Put that is tried again may meet its own work: an answer can be lost on its
// way, and proxies repeat requests on their own. So each Put leaves a random
// mark with its object, and a refusal is ErrExist only if the mark there is
// another one. A request that timed out may still be carried out later, when its
// Put has returned an error; whoever got the error must look (as repo does).
//
// Objects are at most blob.MaxSize, 64 MiB, and S3 takes 5 GiB in one request:
// nothing is uploaded in parts. That keeps creation atomic, leaves no unfinished
// uploads to pay for, and a part would not be any safer to repeat.
//
// # Versions and locks
//
// In a versioned bucket Delete removes an object's versions, oldest first, so
// that space is freed and nothing older comes to light; it fails with
// blob.ErrLocked where Object Lock holds one. Store is a blob.Locker and a
// blob.Versions too.
//
// Keys of the package's own lie under the prefix, with names that no object of a
// Store has: ".tmp-probe" and ".tmp-canary-MODE".
//
// # Locks in this package
//
// None is held during a request; the probe is guarded by a channel.
package s3

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"holdfast/internal/blob"
)

// Store is a blob.Store, blob.Locker and blob.Versions. Safe in parallel.
type Store struct {
	o     Options
	core  *minio.Core
	creds *credentials.Credentials

	answered atomic.Bool // the server has answered this process at least once

	preparing chan struct{} // holds one token while nobody prepares
	prepared  atomic.Bool   // the fields below are set
	sendMD5   bool          // the bucket has Object Lock, with which S3 asks for it
}

var (
	_ blob.Locker   = (*Store)(nil)
	_ blob.Versions = (*Store)(nil)
)

// Open opens a store. It finds credentials, but asks the server for nothing yet.
func Open(ctx context.Context, o Options) (*Store, error) { return open(ctx, o, nil) }

// dialer connects to an address; nil is the usual one.
type dialer func(ctx context.Context, network, addr string) (net.Conn, error)

func open(ctx context.Context, o Options, dial dialer) (*Store, error) {
	o.Endpoint = cmp.Or(o.Endpoint, awsEndpoint)
	u, err := url.Parse(o.Endpoint)
	if err == nil {
		err = checkEndpoint(o.Endpoint)
	}
	if err != nil {
		return nil, err
	}
	transport, err := newTransport(o.CA, dial)
	if err != nil {
		return nil, err
	}
	s := &Store{o: o, creds: o.credentials(), preparing: make(chan struct{}, 1)}
	s.preparing <- struct{}{}
	if err := checkKeys(ctx, s.creds, &http.Client{Transport: transport}); err != nil {
		return nil, err
	}
	options := &minio.Options{
		Creds: s.creds, Secure: u.Scheme == "https", Transport: transport, Region: o.Region, BucketLookup: minio.BucketLookupDNS,
		MaxRetries: 1, // this package repeats what may be repeated
	}
	if o.PathStyle {
		options.BucketLookup = minio.BucketLookupPath
	}
	if !o.aws() {
		options.Region = cmp.Or(o.Region, "us-east-1")
	}
	if s.core, err = minio.NewCore(u.Host, options); err != nil {
		return nil, fmt.Errorf("open %s: %w", o, err)
	}
	return s, nil
}

// Create opens a store and proves that the server does what a repository needs.
// The bucket must exist: whether it keeps versions and locks is its owner's to
// decide when it is made.
func Create(ctx context.Context, o Options) (*Store, error) {
	s, err := Open(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := s.Probe(ctx); err != nil {
		return nil, fmt.Errorf("%s: %w", o, err)
	}
	return s, nil
}

// String is the store's URL, without credentials.
func (s *Store) String() string { return s.o.String() }

// key is an object's key in the bucket.
func (s *Store) key(name string) string {
	if s.o.Prefix == "" {
		return name
	}
	return s.o.Prefix + "/" + name
}

// name is the opposite of key; false for keys that are no object's.
func (s *Store) name(key string) (string, bool) {
	name := key
	if s.o.Prefix != "" {
		var ok bool
		if name, ok = strings.CutPrefix(key, s.o.Prefix+"/"); !ok {
			return "", false
		}
	}
	return name, blob.CheckName(name) == nil
}
