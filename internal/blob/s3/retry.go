package s3

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"time"

	"github.com/minio/minio-go/v7"
)

// Retry says how often a request is tried, and how long it waits in between.
type Retry struct {
	// Tries of one request, the first included. 0 means 10: with the default
	// Wait about half a minute, in which a server restarts.
	Tries int
	// Wait before the second try, doubled for each further one up to 150 times
	// that; of each wait up to a half is left off by chance, so that many
	// clients do not come back at once. 0 means 100 ms.
	Wait time.Duration
}

const (
	defaultTries = 10
	defaultWait  = 100 * time.Millisecond
	mostWait     = 150 // times Wait
	// fewTries are for what is hardly ever cured by waiting.
	fewTries = 3
	// firstTries are for a server that has never answered this process: likely
	// its address is wrong.
	firstTries = 5
)

// wait before try n+1, for n ≥ 1.
func (r Retry) wait(n int) time.Duration {
	base := r.Wait
	if base <= 0 {
		base = defaultWait
	}
	d := base * mostWait
	if n < 16 {
		d = min(d, base<<(n-1))
	}
	return d - rand.N(d/2+1)
}

func (r Retry) tries() int {
	if r.Tries > 0 {
		return r.Tries
	}
	return defaultTries
}

// cure says whether waiting helps against an error.
type cure int

const (
	never  cure = iota
	hardly      // worth fewTries
	likely
)

// retry calls f until it succeeds, fails for good, or was tried often enough.
func (s *Store) retry(ctx context.Context, f func(ctx context.Context) error) error {
	few := 0
	for n := 1; ; n++ {
		err := f(ctx)
		if ctx.Err() != nil && err != nil {
			return ctx.Err() // whatever it was that came of it
		}
		_, answered := errors.AsType[minio.ErrorResponse](err)
		if err == nil || answered {
			s.answered.Store(true)
		}
		if err == nil {
			return nil
		}
		most := s.o.Retry.tries()
		if !s.answered.Load() {
			most = min(most, firstTries)
		}
		c := s.cure(err)
		if c == hardly {
			few++
		}
		if c == never || few >= fewTries || n >= most {
			if n > 1 {
				return fmt.Errorf("%w (tried %d times)", err, n)
			}
			return err
		}
		t := time.NewTimer(s.o.Retry.wait(n))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		}
	}
}

// cure sorts the errors of requests.
func (s *Store) cure(err error) cure {
	if _, ok := errors.AsType[*finalError](err); ok {
		return never
	}
	if r, ok := errors.AsType[minio.ErrorResponse](err); ok {
		switch r.Code {
		case "InternalError", "SlowDown", "SlowDownRead", "SlowDownWrite", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded",
			"RequestThrottled", "ConditionalRequestConflict", "OperationAborted", "TemporaryRedirect", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch":
			return likely
		case "RequestTimeTooSkewed", "RequestExpired":
			return hardly // one machine behind the server's address may have a wrong clock; ours stays wrong
		case "ExpiredToken", "ExpiredTokenException":
			s.creds.Expire() // those from a role or file are fetched anew
			return hardly
		}
		switch {
		case r.StatusCode == http.StatusNotImplemented:
			return never
		case r.StatusCode >= 500, r.StatusCode == http.StatusRequestTimeout, r.StatusCode == http.StatusTooManyRequests, r.StatusCode == 499:
			return likely
		}
		return never
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return never
	}
	if e, ok := errors.AsType[*net.DNSError](err); ok && e.IsNotFound {
		return hardly
	}
	return likely // of the network, or of something in between
}

// finalError is an error that no further try can cure.
type finalError struct{ err error }

func (e *finalError) Error() string { return e.err.Error() }
func (e *finalError) Unwrap() error { return e.err }

func final(err error) error { return &finalError{err} }

// hints say what to do about an S3 error, by its code.
var hints = map[string]string{
	"NoSuchBucket":                 "make the bucket, or correct its name or the endpoint",
	"AccessDenied":                 "the credentials may not do this; they need s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject (docs/admin.md)",
	"InvalidAccessKeyId":           "check AWS_ACCESS_KEY_ID and AWS_PROFILE",
	"SignatureDoesNotMatch":        "check AWS_SECRET_ACCESS_KEY, and region in the repository's URL",
	"AuthorizationHeaderMalformed": "name the right region in the repository's URL",
	"PermanentRedirect":            "name the bucket's region and endpoint in the repository's URL",
	"ExpiredToken":                 "the temporary credentials have ended: get new ones",
	"RequestTimeTooSkewed":         "set the clock of this machine: it differs too much from the server's",
	"RequestExpired":               "set the clock of this machine: it differs too much from the server's",
}

// explain adds an S3 error's code and what to do about it, which its own text
// lacks.
func explain(err error) error {
	r, ok := errors.AsType[minio.ErrorResponse](err)
	switch {
	case !ok:
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
			return fmt.Errorf("%w; for a certificate authority of your own add ca=FILE to the repository's URL", err)
		}
		return err
	case hints[r.Code] != "":
		return fmt.Errorf("%w [%s]: %s", err, r.Code, hints[r.Code])
	case r.Code != "":
		return fmt.Errorf("%w [%s, status %d]", err, r.Code, r.StatusCode)
	}
	return err
}

func hasCode(err error, codes ...string) bool {
	r, ok := errors.AsType[minio.ErrorResponse](err)
	for _, c := range codes {
		if ok && r.Code == c {
			return true
		}
	}
	return false
}

func hasStatus(err error, status int) bool {
	r, ok := errors.AsType[minio.ErrorResponse](err)
	return ok && r.StatusCode == status
}
