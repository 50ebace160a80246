package s3

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"
)

const (
	// stall ends a connection on which nothing has moved for so long. It is no
	// bound on how long a slow one may take.
	stall = time.Minute
	// idleConns are kept open between requests: more than run at once.
	idleConns = 64
)

// errNotS3 is an answer that no S3 server gives: of a proxy or a login page in
// between, or of something else at that address.
var errNotS3 = errors.New("the answer is not an S3 server's")

// newTransport connects to the server.
func newTransport(ca string, dial func(context.Context, string, string) (net.Conn, error)) (http.RoundTripper, error) {
	if dial == nil {
		dial = (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second}).DialContext
	}
	t := &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := dial(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			return &stallConn{Conn: c}, nil
		},
		MaxIdleConnsPerHost:   idleConns,
		IdleConnTimeout:       stall / 2,
		TLSHandshakeTimeout:   stall,
		ResponseHeaderTimeout: stall,
		DisableCompression:    true, // what is stored is what is wanted
		WriteBufferSize:       64 << 10,
		ReadBufferSize:        64 << 10,
		TLSClientConfig:       &tls.Config{MinVersion: tls.VersionTLS12},
	}
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("certificates for S3: %w", err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("certificates for S3: %s holds none in PEM form", ca)
		}
		t.TLSClientConfig.RootCAs = pool
	}
	return guard{t}, nil
}

// stallConn fails when nothing moves for a while, in either direction.
type stallConn struct {
	net.Conn
}

func (c *stallConn) Read(p []byte) (int, error) {
	if err := c.SetDeadline(time.Now().Add(stall)); err != nil {
		return 0, err
	}
	return c.Conn.Read(p)
}

func (c *stallConn) Write(p []byte) (int, error) {
	// Both deadlines: while a large object goes up nothing comes down.
	if err := c.SetDeadline(time.Now().Add(stall)); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// guard refuses answers that would be misunderstood. The library takes any
// "404 Not Found" for the absence of the object, and any XML or XHTML document
// for a listing, an empty one.
type guard struct{ next http.RoundTripper }

func (g guard) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := g.next.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	q := req.URL.Query()
	switch {
	case resp.StatusCode == http.StatusNotFound && req.Method != http.MethodHead:
		return checked(resp, mostError, func(p []byte) bool {
			var e struct {
				XMLName xml.Name `xml:"Error"`
				Code    string
			}
			return xml.Unmarshal(p, &e) == nil && e.Code != ""
		})
	case resp.StatusCode == http.StatusOK && q.Has("list-type"):
		return checked(resp, mostListing, func(p []byte) bool { return rootElement(p) == "ListBucketResult" })
	case resp.StatusCode == http.StatusOK && q.Has("versions"):
		return checked(resp, mostListing, func(p []byte) bool { return rootElement(p) == "ListVersionsResult" })
	}
	return resp, nil
}

// Bounds of answers that are read whole, in bytes: an error, and a listing of
// 1,000 names of 1 KiB with all that is told of each.
const (
	mostError   = 64 << 10
	mostListing = 8 << 20
)

// checked gives the answer if its body is good.
func checked(resp *http.Response, most int64, good func([]byte) bool) (*http.Response, error) {
	p, err := io.ReadAll(io.LimitReader(resp.Body, most+1))
	if err = errors.Join(err, resp.Body.Close()); err != nil {
		return nil, err
	}
	if int64(len(p)) > most || !good(p) {
		return nil, fmt.Errorf("%w: status %d with %q; is there a proxy in between?", errNotS3, resp.StatusCode, p[:min(len(p), 60)])
	}
	resp.Body = io.NopCloser(bytes.NewReader(p))
	return resp, nil
}

// rootElement is the name of the element that an XML document begins with.
func rootElement(head []byte) string {
	d := xml.NewDecoder(bytes.NewReader(head))
	for {
		t, err := d.Token()
		if err != nil {
			return ""
		}
		if e, ok := t.(xml.StartElement); ok {
			return e.Name.Local
		}
	}
}
