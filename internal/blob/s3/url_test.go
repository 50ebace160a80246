package s3

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	env := map[string]string{"AWS_REGION": "eu-central-1"}
	abs, err := filepath.Abs("ca.pem")
	if err != nil {
		t.Fatal(err)
	}
	for raw, want := range map[string]Options{
		"s3://bucket": {Bucket: "bucket", Endpoint: awsEndpoint, Region: "eu-central-1"},
		"s3://bucket/a/B?region=us-west-2&path-style=1":                     {Bucket: "bucket", Prefix: "a/B", Endpoint: awsEndpoint, Region: "us-west-2", PathStyle: true},
		"s3://bucket/a/?endpoint=https://s3.lan:9000/":                      {Bucket: "bucket", Prefix: "a", Endpoint: "https://s3.lan:9000", PathStyle: true},
		"s3://bucket?endpoint=http%3A%2F%2F10.0.0.1&path-style=0&ca=ca.pem": {Bucket: "bucket", Endpoint: "http://10.0.0.1", CA: abs},
	} {
		o, err := Parse(raw, func(k string) string { return env[k] })
		if err != nil || o != want {
			t.Errorf("%s: %+v, %v", raw, o, err)
			continue
		}
		// Its text means the same to a process in another environment.
		again, err := Parse(o.String(), func(string) string { return "http://other" })
		if err != nil || again != o || again.String() != o.String() {
			t.Errorf("%s: read again: %+v, %v", o, again, err)
		}
	}
	o, err := Parse("s3://bucket", func(k string) string {
		return map[string]string{"AWS_ENDPOINT_URL": "https://a", "AWS_ENDPOINT_URL_S3": "https://b"}[k]
	})
	if err != nil || o.Endpoint != "https://b" || !o.PathStyle {
		t.Errorf("endpoint of the environment: %+v, %v", o, err)
	}
	for _, raw := range []string{
		"", "s3://", "s3:///a", "http://bucket", "s3://key:hush@bucket", "s3://Bucket_", "s3://bucket/a//b", "s3://bucket/../b", "s3://bucket/a%20b",
		"s3://bucket?endpoint=host:9000", "s3://bucket?endpoint=https://u:hush@host", "s3://bucket?endpoint=https://host/path", "s3://bucket?bogus=1",
		"s3://bucket?path-style=maybe", "s3://bucket?region=", "s3://bucket?region=a&region=b", "s3://bucket#x", "s3://key:hush@bu cket",
	} {
		o, err := Parse(raw, func(string) string { return "" })
		if err == nil || strings.Contains(err.Error(), "hush") || !strings.Contains(err.Error(), "s3://BUCKET/PREFIX") {
			t.Errorf("%q: %+v, %v", raw, o, err)
		}
	}
}
