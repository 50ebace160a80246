package s3

import (
	"cmp"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/minio/minio-go/v7/pkg/s3utils"
)

// Scheme begins a store's URL.
const Scheme = "s3"

const awsEndpoint = "https://s3.amazonaws.com"

// Options say where a store is and how it is reached. Parse makes them from a
// URL; all but the last group is in it, so that a URL written down today means
// the same place tomorrow and to another process.
type Options struct {
	Bucket string
	Prefix string // of all names in the bucket, without "/" at its ends; "" for the whole bucket
	// Endpoint is the server: http or https, a host, perhaps a port. "" is AWS.
	Endpoint string
	Region   string // "" asks AWS where the bucket is; others are taken to be in us-east-1
	// PathStyle puts the bucket into the path of requests, not before the
	// endpoint's host.
	PathStyle bool
	CA        string // file of certificates, PEM, that are trusted besides the system's

	// Keys are the credentials. Nil looks for them as other programs for S3 do:
	// AWS_ACCESS_KEY_ID and its kin, the files of the AWS command line with
	// AWS_PROFILE, a web identity, the role of the container or machine.
	Keys  *Keys
	Retry Retry
}

// Parse reads a store's URL:
//
//	s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME&path-style=0|1&ca=FILE]
//
// Without an endpoint it is that of AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, else
// AWS, with the region of AWS_REGION or AWS_DEFAULT_REGION, as getenv reads them;
// a URL that has one says all itself, as those of String do. path-style is 1 but
// for AWS. Credentials never stand in a URL: it is recorded and shown.
func Parse(raw string, getenv func(string) string) (Options, error) {
	bad := func(format string, args ...any) (Options, error) {
		// url.Parse's own errors quote the URL, which may hold a secret.
		return Options{}, fmt.Errorf("store URL: %s; its form is s3://BUCKET/PREFIX?endpoint=https://HOST:PORT&region=NAME&path-style=1&ca=FILE", fmt.Sprintf(format, args...))
	}
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != Scheme {
		return bad("it cannot be read")
	}
	if u.User != nil {
		return bad("credentials do not belong in it: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
	}
	o := Options{Bucket: u.Host, Prefix: strings.Trim(u.Path, "/")}
	if err := s3utils.CheckValidBucketNameStrict(o.Bucket); err != nil {
		return bad("bucket %q: %v", o.Bucket, err)
	}
	if err := checkPrefix(o.Prefix); err != nil {
		return bad("%v", err)
	}
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil || u.Fragment != "" {
		return bad("what follows the \"?\" cannot be read")
	}
	for k, v := range q {
		switch k {
		case "endpoint", "region", "path-style", "ca":
			if len(v) == 1 && v[0] != "" {
				continue
			}
			return bad("%s needs one value", k)
		}
		return bad("%s is unknown", k)
	}
	o.Endpoint, o.Region = q.Get("endpoint"), q.Get("region")
	if o.Endpoint == "" {
		o.Endpoint = cmp.Or(getenv("AWS_ENDPOINT_URL_S3"), getenv("AWS_ENDPOINT_URL"), awsEndpoint)
		o.Region = cmp.Or(o.Region, getenv("AWS_REGION"), getenv("AWS_DEFAULT_REGION"))
	}
	o.Endpoint = strings.TrimSuffix(o.Endpoint, "/")
	if err := checkEndpoint(o.Endpoint); err != nil {
		return bad("%v", err)
	}
	o.PathStyle = !o.aws()
	if s := q.Get("path-style"); s != "" {
		if o.PathStyle, err = strconv.ParseBool(s); err != nil {
			return bad("path-style is 0 or 1")
		}
	}
	if ca := q.Get("ca"); ca != "" {
		if o.CA, err = filepath.Abs(ca); err != nil {
			return bad("ca: %v", err)
		}
	}
	return o, nil
}

func (o Options) aws() bool {
	u, err := url.Parse(o.Endpoint)
	return err == nil && (o.Endpoint == "" || s3utils.IsAmazonEndpoint(*u))
}

func checkPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	if len(prefix) > 500 {
		return fmt.Errorf("the prefix is too long")
	}
	for el := range strings.SplitSeq(prefix, "/") {
		if el == "" || el == "." || el == ".." || strings.Trim(el, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") != "" {
			return fmt.Errorf("prefix %q: its parts consist of letters, digits, \".\", \"_\" and \"-\"", prefix)
		}
	}
	return nil
}

func checkEndpoint(endpoint string) error {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Path != "" || u.RawQuery != "" || u.User != nil {
		return fmt.Errorf("endpoint: it is https://HOST:PORT, or http://")
	}
	return nil
}

// String is the store's URL, the same for the same store, without credentials.
func (o Options) String() string {
	var q []string
	add := func(k, v string) {
		q = append(q, k+"="+strings.NewReplacer("%3A", ":", "%2F", "/").Replace(url.QueryEscape(v)))
	}
	add("endpoint", cmp.Or(o.Endpoint, awsEndpoint))
	if o.Region != "" {
		add("region", o.Region)
	}
	if o.PathStyle == o.aws() {
		add("path-style", map[bool]string{true: "1", false: "0"}[o.PathStyle])
	}
	if o.CA != "" {
		add("ca", o.CA)
	}
	s := Scheme + "://" + o.Bucket
	if o.Prefix != "" {
		s += "/" + o.Prefix
	}
	if len(q) > 0 {
		s += "?" + strings.Join(q, "&")
	}
	return s
}
