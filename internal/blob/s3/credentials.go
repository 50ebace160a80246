package s3

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/minio/minio-go/v7/pkg/credentials"
)

// Keys are fixed credentials.
type Keys struct {
	Access  string `json:"access"`
	Secret  string `json:"secret"`
	Session string `json:"session,omitempty"` // token of temporary credentials; they end with it
}

// Secrets are the environment variables of KeysFrom that a process must not
// show to others.
var Secrets = []string{"AWS_SECRET_ACCESS_KEY", "AWS_SECRET_KEY", "AWS_SESSION_TOKEN"}

// KeysFrom reads credentials from environment variables; nil when there are
// none, so that files and roles count.
func KeysFrom(getenv func(string) string) *Keys {
	k := Keys{
		Access:  cmp.Or(getenv("AWS_ACCESS_KEY_ID"), getenv("AWS_ACCESS_KEY")),
		Secret:  cmp.Or(getenv("AWS_SECRET_ACCESS_KEY"), getenv("AWS_SECRET_KEY")),
		Session: getenv("AWS_SESSION_TOKEN"),
	}
	if k.Access == "" || k.Secret == "" {
		return nil
	}
	return &k
}

// roleWait bounds the search for a role, where mostly nobody answers.
const roleWait = 3 * time.Second

func (o Options) credentials() *credentials.Credentials {
	k := cmp.Or(o.Keys, KeysFrom(os.Getenv))
	if k != nil {
		return credentials.NewStaticV4(k.Access, k.Secret, k.Session)
	}
	providers := []credentials.Provider{&credentials.FileAWSCredentials{}}
	if o.hasRole(os.Getenv) {
		client := &http.Client{Timeout: 2 * roleWait, Transport: &http.Transport{
			Proxy:       http.ProxyFromEnvironment,
			DialContext: (&net.Dialer{Timeout: roleWait}).DialContext,
		}}
		providers = append(providers, &credentials.IAM{Client: client})
	}
	return credentials.NewChainCredentials(providers)
}

// hasRole reports whether a role is worth looking for: one that the environment
// names, or for AWS that of the machine.
func (o Options) hasRole(getenv func(string) string) bool {
	for _, k := range []string{"AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"} {
		if getenv(k) != "" {
			return true
		}
	}
	return o.aws() && getenv("AWS_EC2_METADATA_DISABLED") != "true"
}

// checkKeys refuses to go on without credentials: the library would ask as
// anonymous, and the answer would mislead.
func checkKeys(ctx context.Context, c *credentials.Credentials, client *http.Client) error {
	v, err := c.GetWithContext(&credentials.CredContext{Client: client, Context: ctx})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err == nil && (v.AccessKeyID == "" || v.SignerType.IsAnonymous()) {
		err = fmt.Errorf("there are none")
	}
	if err != nil {
		return fmt.Errorf("credentials for S3: %w: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE for a profile in ~/.aws/credentials", err)
	}
	return nil
}
