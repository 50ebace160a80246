// Package s3test is an S3 server in memory for tests, with one bucket. It does
// what the store asks for as AWS's documentation says it (conditional writes,
// ranges, listings in pages, versions, Object Lock), and can misbehave in the
// ways in which servers and networks do, by a seed that it prints.
//
// It does not verify signatures, only which key made them.
package s3test

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// What clients use.
const (
	Bucket    = "backups"
	AccessKey = "access"
	SecretKey = "secret"
)

// Options of a Server.
type Options struct {
	Versioned bool // the bucket keeps versions
	Locking   bool // and has Object Lock

	// IgnoreConditions makes a server that does not know conditional writes.
	IgnoreConditions bool
	// IgnoreLocks makes one that accepts locks and does not keep them.
	IgnoreLocks bool
	// ForgetLocks makes one that accepts locks and does not even show them.
	ForgetLocks bool
	// Page is how many keys a listing has at most; 0 means 1000.
	Page int
	// Delay of every request.
	Delay time.Duration
	// Faults by chance; nil is a server that behaves.
	Faults *Faults
	// TLS serves https.
	TLS bool
}

// Server is a running server.
type Server struct {
	URL string // endpoint
	CA  []byte // PEM, with TLS
	o   Options

	mu       sync.Mutex
	objects  map[string][]*version // newest first; guarded by mu
	numbered int                   // versions made; guarded by mu
	counts   map[string]int        // requests by method and kind; guarded by mu
	seen     func(*http.Request)   // called for each request; guarded by mu

	faults *injector
}

// version is a version of an object, or a delete marker. Only its lock changes.
type version struct {
	id     string
	marker bool
	data   []byte
	meta   http.Header // x-amz-meta-*
	made   time.Time
	mode   string    // of the lock; "" is none
	until  time.Time // end of the lock
}

// New starts a server until the test ends.
func New(t testing.TB, o Options) *Server {
	s := &Server{o: o, objects: map[string][]*version{}, counts: map[string]int{}}
	if o.Page == 0 {
		s.o.Page = 1000
	}
	if o.Locking {
		s.o.Versioned = true
	}
	if o.Faults != nil {
		s.faults = newInjector(t, *o.Faults)
	}
	h := httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	h.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that refuse its certificate
	if o.TLS {
		h.StartTLS()
		s.CA = pemOf(h.Certificate().Raw)
	} else {
		h.Start()
	}
	t.Cleanup(h.Close)
	s.URL = h.URL
	return s
}

// Repo is the URL of a repository under a prefix.
func (s *Server) Repo(prefix string) string {
	return "s3://" + Bucket + "/" + prefix + "?endpoint=" + s.URL
}

// Dial connects to the server whatever the address, so that it can have any name.
func (s *Server) Dial(ctx context.Context, _, _ string) (net.Conn, error) {
	u, err := url.Parse(s.URL)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	return d.DialContext(ctx, "tcp", u.Host)
}

// Count is how many requests of a kind were made, such as "GET", "PUT" or "LIST".
func (s *Server) Count(kind string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counts[kind]
}

// Watch has f called with every request.
func (s *Server) Watch(f func(*http.Request)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = f
}

// Keys are those that a listing shows.
func (s *Server) Keys() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.keys(false)
}

// VersionCount is how many versions and delete markers a key has.
func (s *Server) VersionCount(key string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.objects[key])
}

// Overwrite puts an object without any condition, as a stranger would.
func (s *Server) Overwrite(key string, data []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(key, &version{data: bytes.Clone(data)})
}

// Hide deletes an object without naming a version, as a stranger would.
func (s *Server) Hide(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(key, &version{marker: true})
}

// keys in order, with all those that have versions; the caller holds mu.
func (s *Server) keys(all bool) []string {
	var keys []string
	for k, v := range s.objects {
		if len(v) > 0 && (all || !v[0].marker) {
			keys = append(keys, k)
		}
	}
	slices.Sort(keys)
	return keys
}

// add makes a version the newest; the caller holds mu.
func (s *Server) add(key string, v *version) {
	s.numbered++
	v.made = time.Now()
	if !s.o.Versioned {
		s.objects[key] = nil
	} else {
		v.id = fmt.Sprintf("v%08d", s.numbered)
	}
	s.objects[key] = append([]*version{v}, s.objects[key]...)
}

// answer is what a request is answered with.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func fail(status int, code, message string) answer {
	b, _ := xml.Marshal(struct {
		XMLName       xml.Name `xml:"Error"`
		Code, Message string
	}{Code: code, Message: message})
	return answer{status, http.Header{"Content-Type": {"application/xml"}}, b}
}

func noSuchKey() answer { return fail(404, "NoSuchKey", "The specified key does not exist.") }

// serve answers a request, in the way of the faults.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the client has gone
	}
	time.Sleep(s.o.Delay)
	kind := kindOf(r)
	s.mu.Lock()
	s.counts[kind]++
	if s.seen != nil {
		s.seen(r)
	}
	s.mu.Unlock()
	do := func() answer { return s.do(r, body) }
	if s.faults != nil {
		s.faults.serve(w, r, kind, do)
		return
	}
	write(w, r, do())
}

func write(w http.ResponseWriter, r *http.Request, a answer) {
	for k, v := range a.header {
		w.Header()[k] = v
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(a.body)))
	w.WriteHeader(a.status)
	if r.Method != http.MethodHead {
		w.Write(a.body) // the client may have gone
	}
}

func kindOf(r *http.Request) string {
	q := r.URL.Query()
	switch {
	case q.Has("list-type"), q.Has("versions"):
		return "LIST"
	case q.Has("retention"):
		return r.Method + " retention"
	case q.Has("object-lock"), q.Has("location"), q.Has("versioning"):
		return "GET config"
	}
	return r.Method
}

// do carries a request out.
func (s *Server) do(r *http.Request, body []byte) answer {
	if a, ok := authorize(r, body); !ok {
		return a
	}
	bucket, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	if host, _, ok := strings.Cut(r.Host, "."); ok && host == Bucket {
		bucket, key = host, strings.TrimPrefix(r.URL.Path, "/")
	}
	if bucket != Bucket {
		return fail(404, "NoSuchBucket", "The specified bucket does not exist")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	q := r.URL.Query()
	switch {
	case key == "" && r.Method == http.MethodGet && q.Has("object-lock"):
		if !s.o.Locking {
			return fail(404, "ObjectLockConfigurationNotFoundError", "Object Lock configuration does not exist for this bucket")
		}
		return ok(`<ObjectLockConfiguration><ObjectLockEnabled>Enabled</ObjectLockEnabled></ObjectLockConfiguration>`)
	case key == "" && r.Method == http.MethodGet && q.Has("list-type"):
		return s.list(q)
	case key == "" && r.Method == http.MethodGet && q.Has("versions"):
		return s.listVersions(q)
	case key == "":
		return fail(501, "NotImplemented", "not in this server")
	case r.Method == http.MethodPut && q.Has("retention"):
		return s.putRetention(r, key, body)
	case r.Method == http.MethodPut && r.Header.Get("X-Amz-Copy-Source") != "":
		return s.copy(r, key)
	case r.Method == http.MethodPut:
		return s.put(r, key, body)
	case r.Method == http.MethodGet || r.Method == http.MethodHead:
		return s.get(r, key)
	case r.Method == http.MethodDelete:
		return s.delete(r, key)
	}
	return fail(501, "NotImplemented", "not in this server")
}

func ok(body string) answer { return answer{200, http.Header{}, []byte(xml.Header + body)} }

// authorize checks the key and the sums that a request announces.
func authorize(r *http.Request, body []byte) (answer, bool) {
	auth := r.Header.Get("Authorization")
	if !strings.HasPrefix(auth, "AWS4-HMAC-SHA256 Credential="+AccessKey+"/") {
		return fail(403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."), false
	}
	sum := sha256.Sum256(body)
	if want := r.Header.Get("X-Amz-Content-Sha256"); want != "UNSIGNED-PAYLOAD" && want != hex.EncodeToString(sum[:]) {
		return fail(400, "XAmzContentSHA256Mismatch", "The provided 'x-amz-content-sha256' header does not match what was computed."), false
	}
	if want := r.Header.Get("Content-Md5"); want != "" {
		if m := md5.Sum(body); want != base64.StdEncoding.EncodeToString(m[:]) {
			return fail(400, "BadDigest", "The Content-MD5 you specified did not match what we received."), false
		}
	}
	return answer{}, true
}

// current is the version that is shown, nil if there is none; the caller holds mu.
func (s *Server) current(key string) *version {
	if v := s.objects[key]; len(v) > 0 && !v[0].marker {
		return v[0]
	}
	return nil
}

func (s *Server) find(key, id string) *version {
	for _, v := range s.objects[key] {
		if v.id == id {
			return v
		}
	}
	return nil
}

func (s *Server) put(r *http.Request, key string, body []byte) answer {
	if r.Header.Get("If-None-Match") == "*" && !s.o.IgnoreConditions && s.current(key) != nil {
		return fail(412, "PreconditionFailed", "At least one of the pre-conditions you specified did not hold")
	}
	if s.o.Locking && r.Header.Get("Content-Md5") == "" {
		return fail(400, "InvalidRequest", "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object Lock parameters")
	}
	v := &version{data: body, meta: http.Header{}}
	for k, val := range r.Header {
		if strings.HasPrefix(k, "X-Amz-Meta-") {
			v.meta[k] = val
		}
	}
	s.add(key, v)
	return answer{200, v.header(), nil}
}

func (v *version) etag() string {
	sum := md5.Sum(v.data)
	return `"` + hex.EncodeToString(sum[:]) + `"`
}

func (v *version) header() http.Header {
	h := http.Header{"Etag": {v.etag()}, "Last-Modified": {v.made.UTC().Format(http.TimeFormat)}}
	if v.id != "" {
		h.Set("X-Amz-Version-Id", v.id)
	}
	for k, val := range v.meta {
		h[k] = val
	}
	return h
}

func (s *Server) get(r *http.Request, key string) answer {
	v := s.current(key)
	if id := r.URL.Query().Get("versionId"); id != "" {
		if v = s.find(key, id); v == nil {
			return fail(404, "NoSuchVersion", "The specified version does not exist.")
		}
		if v.marker {
			return fail(405, "MethodNotAllowed", "The specified method is not allowed against this resource.")
		}
	}
	if v == nil {
		return noSuchKey()
	}
	a := answer{200, v.header(), v.data}
	if v.mode != "" && r.Method == http.MethodHead { // AWS tells it for GET too, others do not
		a.header.Set("X-Amz-Object-Lock-Mode", v.mode)
		a.header.Set("X-Amz-Object-Lock-Retain-Until-Date", v.until.UTC().Format(time.RFC3339))
	}
	rng, ranged := strings.CutPrefix(r.Header.Get("Range"), "bytes=")
	if !ranged {
		return a
	}
	from, to, _ := strings.Cut(rng, "-")
	first, err := strconv.Atoi(from)
	last := len(v.data) - 1
	if to != "" {
		n, lastErr := strconv.Atoi(to)
		if lastErr != nil {
			err = lastErr
		}
		last = min(last, n)
	}
	if err != nil || first >= len(v.data) {
		return fail(416, "InvalidRange", "The requested range is not satisfiable")
	}
	a.status, a.body = 206, v.data[first:last+1]
	a.header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, last, len(v.data)))
	return a
}

// locked reports whether the lock of a version holds against a request.
func (s *Server) locked(v *version, r *http.Request) bool {
	bypass := v.mode == "GOVERNANCE" && r.Header.Get("X-Amz-Bypass-Governance-Retention") == "true"
	return !s.o.IgnoreLocks && v.mode != "" && time.Now().Before(v.until) && !bypass
}

func (s *Server) delete(r *http.Request, key string) answer {
	done := answer{204, http.Header{}, nil}
	id := r.URL.Query().Get("versionId")
	switch {
	case id == "" && s.o.Versioned:
		s.add(key, &version{marker: true})
		done.header.Set("X-Amz-Delete-Marker", "true")
	case id == "":
		delete(s.objects, key)
	default:
		if v := s.find(key, id); v != nil && s.locked(v, r) {
			return fail(403, "AccessDenied", "Access Denied because object protected by object lock.")
		}
		s.objects[key] = slices.DeleteFunc(s.objects[key], func(v *version) bool { return v.id == id })
	}
	return done
}

func (s *Server) copy(r *http.Request, key string) answer {
	source, err := url.Parse(r.Header.Get("X-Amz-Copy-Source"))
	if err != nil {
		return fail(400, "InvalidArgument", "copy source")
	}
	from := strings.TrimPrefix(strings.TrimPrefix(source.Path, "/"), Bucket+"/")
	v := s.find(from, source.Query().Get("versionId"))
	if v == nil || v.marker {
		return fail(404, "NoSuchVersion", "The specified version does not exist.")
	}
	c := &version{data: v.data, meta: v.meta}
	s.add(key, c)
	return ok("<CopyObjectResult><ETag>" + c.etag() + "</ETag><LastModified>" + c.made.UTC().Format(time.RFC3339) + "</LastModified></CopyObjectResult>")
}

func (s *Server) putRetention(r *http.Request, key string, body []byte) answer {
	var want struct {
		Mode            string
		RetainUntilDate time.Time
	}
	switch {
	case !s.o.Locking:
		return fail(400, "InvalidRequest", "Bucket is missing Object Lock Configuration")
	case r.Header.Get("Content-Md5") == "":
		return fail(400, "InvalidRequest", "Missing required header for this request: Content-MD5")
	case xml.Unmarshal(body, &want) != nil || want.Mode != "GOVERNANCE" && want.Mode != "COMPLIANCE":
		return fail(400, "MalformedXML", "The XML you provided was not well-formed")
	case want.RetainUntilDate.Before(time.Now()):
		return fail(400, "InvalidArgument", "The retain until date must be in the future!")
	}
	v := s.find(key, r.URL.Query().Get("versionId"))
	switch {
	case v == nil:
		return fail(404, "NoSuchVersion", "The specified version does not exist.")
	case s.locked(v, r) && (want.RetainUntilDate.Before(v.until) || want.Mode != v.mode):
		return fail(403, "AccessDenied", "Access Denied because object protected by object lock.")
	}
	if !s.o.ForgetLocks {
		v.mode, v.until = want.Mode, want.RetainUntilDate
	}
	return answer{200, http.Header{}, nil}
}

// content is an object in a listing.
type content struct {
	Key          string
	VersionID    string `xml:"VersionId,omitempty"`
	IsLatest     *bool  `xml:",omitempty"`
	LastModified string
	ETag         string `xml:",omitempty"`
	Size         int
}

func (s *Server) list(q url.Values) answer {
	var res struct {
		XMLName               xml.Name `xml:"http://s3.amazonaws.com/doc/2006-03-01/ ListBucketResult"`
		Name, Prefix          string
		KeyCount              int
		IsTruncated           bool
		NextContinuationToken string `xml:",omitempty"`
		Contents              []content
	}
	res.Name, res.Prefix = Bucket, q.Get("prefix")
	after := q.Get("start-after")
	if t := q.Get("continuation-token"); t != "" {
		after = strings.TrimPrefix(t, "after:")
	}
	for _, k := range s.keys(false) {
		if !strings.HasPrefix(k, res.Prefix) || k <= after {
			continue
		}
		if len(res.Contents) == s.o.Page {
			res.IsTruncated, res.NextContinuationToken = true, "after:"+res.Contents[s.o.Page-1].Key
			break
		}
		v := s.current(k)
		res.Contents = append(res.Contents, content{Key: k, LastModified: v.made.UTC().Format(time.RFC3339), ETag: v.etag(), Size: len(v.data)})
	}
	res.KeyCount = len(res.Contents)
	b, _ := xml.Marshal(res)
	return ok(string(b))
}

func (s *Server) listVersions(q url.Values) answer {
	var b strings.Builder
	n, next, nextID := 0, "", ""
	truncated := false
	past := q.Get("version-id-marker") == ""
	element := func(name string, c content) {
		p, _ := xml.Marshal(c)
		b.WriteString(strings.NewReplacer("<content>", "<"+name+">", "</content>", "</"+name+">").Replace(string(p)))
	}
	for _, k := range s.keys(true) {
		marker := q.Get("key-marker")
		if !strings.HasPrefix(k, q.Get("prefix")) || k < marker || k == marker && past {
			continue
		}
		for i, v := range s.objects[k] {
			if k == marker && !past {
				past = v.id == q.Get("version-id-marker")
				continue
			}
			if n == s.o.Page {
				truncated = true
				break
			}
			n, next, nextID = n+1, k, v.id
			latest := i == 0
			c := content{Key: k, VersionID: v.id, IsLatest: &latest, LastModified: v.made.UTC().Format(time.RFC3339), Size: len(v.data)}
			if v.marker {
				element("DeleteMarker", c)
			} else {
				c.ETag = v.etag()
				element("Version", c)
			}
		}
		past = true
	}
	tail := ""
	if truncated {
		tail = "<NextKeyMarker>" + next + "</NextKeyMarker><NextVersionIdMarker>" + nextID + "</NextVersionIdMarker>"
	}
	return ok(fmt.Sprintf(`<ListVersionsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>%s</Name><IsTruncated>%v</IsTruncated>%s%s</ListVersionsResult>`, Bucket, truncated, tail, b.String()))
}
