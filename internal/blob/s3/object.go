package s3

import (
	"bytes"
	"context"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/minio/minio-go/v7"

	"holdfast/internal/blob"
)

// markHeader is the metadata in which a Put knows its own object again.
const (
	markMetadata = "holdfast-put"
	markHeader   = "X-Amz-Meta-Holdfast-Put"
)

func (s *Store) Put(ctx context.Context, name string, data []byte) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := blob.CheckName(name); err != nil {
		return err
	}
	if len(data) > blob.MaxSize {
		return fmt.Errorf("put %s: %d bytes are more than an object holds", name, len(data))
	}
	if err := s.prepare(ctx); err != nil {
		return fmt.Errorf("put %s: %w", name, explain(err))
	}
	if err := s.create(ctx, s.key(name), data); err != nil {
		return fmt.Errorf("put %s: %w", name, explain(err))
	}
	return nil
}

// create makes an object under a key that nothing has.
func (s *Store) create(ctx context.Context, key string, data []byte) error {
	mark := newMark()
	return s.retry(ctx, func(ctx context.Context) error {
		err := s.putOnce(ctx, key, data, mark)
		if err == nil || !taken(err) {
			return err
		}
		mine, err := s.wrote(ctx, key, data, mark)
		if err == nil && !mine {
			return final(blob.ErrExist)
		}
		return err
	})
}

func newMark() string {
	var b [16]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// putOnce makes one request to create an object.
func (s *Store) putOnce(ctx context.Context, key string, data []byte, mark string) error {
	o := minio.PutObjectOptions{UserMetadata: map[string]string{markMetadata: mark}, DisableContentSha256: true}
	o.SetMatchETagExcept("*")
	// The sum is part of the signature: the server refuses what arrives changed.
	sum := sha256.Sum256(data)
	md := ""
	if s.sendMD5 {
		m := md5.Sum(data)
		md = base64.StdEncoding.EncodeToString(m[:])
	}
	_, err := s.core.PutObject(ctx, s.o.Bucket, key, bytes.NewReader(data), int64(len(data)), md, hex.EncodeToString(sum[:]), o)
	return err
}

// taken reports whether a conditional write was refused because of its condition.
func taken(err error) bool {
	return hasStatus(err, http.StatusPreconditionFailed) || hasCode(err, "PreconditionFailed")
}

// wrote reports whether the object there is the one that a Put of ours made.
func (s *Store) wrote(ctx context.Context, key string, data []byte, mark string) (bool, error) {
	h, err := s.headOnce(ctx, key, "")
	switch {
	case errors.Is(err, blob.ErrNotExist):
		return false, nil // it was there, and is gone again: it is not made anew
	case err != nil:
		return false, err
	case h.mark != "":
		return h.mark == mark, nil
	}
	// A server that keeps no metadata.
	there, err := s.getOnce(ctx, key, "", 0, -1)
	return err == nil && bytes.Equal(there, data), err
}

// head is what is known of an object without its content.
type head struct {
	size    int64  // bytes
	version string // "" in a bucket that keeps none
	mark    string
}

// request makes one GET request. It maps what it is told of absence.
func (s *Store) request(ctx context.Context, key string, o minio.GetObjectOptions) (io.ReadCloser, minio.ObjectInfo, http.Header, error) {
	body, info, h, err := s.core.GetObject(ctx, s.o.Bucket, key, o)
	switch {
	case err == nil && (info.ETag == "" || info.Size < 0):
		// Without a length nobody could tell that the body was cut.
		return nil, info, h, errors.Join(fmt.Errorf("%w: it has no ETag or length", errNotS3), body.Close())
	case err != nil && (hasCode(err, "NoSuchKey", "NoSuchVersion")):
		return nil, info, h, final(blob.ErrNotExist)
	}
	return body, info, h, err
}

// headOnce asks for an object by GET of one byte, since errors of HEAD have no
// text that tells an absent object from an absent bucket or a stranger's 404.
func (s *Store) headOnce(ctx context.Context, key, version string) (head, error) {
	o := minio.GetObjectOptions{VersionID: version}
	o.Set("Range", "bytes=0-0")
	body, info, h, err := s.request(ctx, key, o)
	if hasCode(err, "InvalidRange") { // an empty object
		body, info, h, err = s.request(ctx, key, minio.GetObjectOptions{VersionID: version})
	}
	if err != nil {
		return head{}, err
	}
	d := head{size: info.Size, version: info.VersionID, mark: h.Get(markHeader)}
	if _, _, total, ok := contentRange(h.Get("Content-Range")); ok {
		d.size = total
	}
	io.CopyN(io.Discard, body, 4096) // so that the connection can be used again
	return d, body.Close()
}

func (s *Store) head(ctx context.Context, key, version string) (h head, err error) {
	err = s.retry(ctx, func(ctx context.Context) (err error) {
		h, err = s.headOnce(ctx, key, version)
		return err
	})
	return h, err
}

func (s *Store) Get(ctx context.Context, name string, off, n int64) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := blob.CheckName(name); err != nil {
		return nil, err
	}
	p, err := s.get(ctx, s.key(name), "", off, n)
	switch {
	case errors.Is(err, blob.ErrNotExist):
		return nil, fmt.Errorf("get %s: %w", name, blob.ErrNotExist)
	case errors.Is(err, blob.ErrTruncated):
		return nil, fmt.Errorf("get %s [%d, +%d): %w", name, off, n, blob.ErrTruncated)
	case err != nil:
		return nil, fmt.Errorf("get %s: %w", name, explain(err))
	}
	return p, nil
}

func (s *Store) get(ctx context.Context, key, version string, off, n int64) (p []byte, err error) {
	if off < 0 || n > blob.MaxSize {
		return nil, blob.ErrTruncated
	}
	if n != 0 {
		err = s.retry(ctx, func(ctx context.Context) (err error) {
			p, err = s.getOnce(ctx, key, version, off, n)
			return err
		})
		if !hasCode(err, "InvalidRange") {
			return p, err
		}
	}
	// An empty range, which HTTP cannot ask for, or one that begins at the end or
	// after it.
	h, err := s.head(ctx, key, version)
	if err != nil {
		return nil, err
	}
	if off > h.size || n > 0 {
		return nil, blob.ErrTruncated
	}
	return []byte{}, nil
}

// getOnce makes one request for n bytes at off, n ≠ 0; n < 0 means up to the end.
func (s *Store) getOnce(ctx context.Context, key, version string, off, n int64) ([]byte, error) {
	o := minio.GetObjectOptions{VersionID: version}
	ranged := off > 0 || n > 0
	switch {
	case n > 0:
		o.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	case ranged:
		o.Set("Range", fmt.Sprintf("bytes=%d-", off))
	}
	body, info, h, err := s.request(ctx, key, o)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	size := info.Size // of the body
	if ranged {
		first, last, total, ok := contentRange(h.Get("Content-Range"))
		switch {
		case !ok || first != off || last-first+1 != size:
			return nil, final(unsupported("range requests", fmt.Sprintf("asked for %q, it answered with %q and %d bytes", o.Header().Get("Range"), h.Get("Content-Range"), size)))
		case n > 0 && size < n && last+1 == total:
			return nil, final(blob.ErrTruncated)
		case n > 0 && size != n, n < 0 && last+1 != total:
			return nil, final(unsupported("range requests", fmt.Sprintf("asked for %q, it answered with %q", o.Header().Get("Range"), h.Get("Content-Range"))))
		}
	}
	if size > blob.MaxSize {
		return nil, final(fmt.Errorf("it has %d bytes, more than an object of a repository", size))
	}
	p := make([]byte, size)
	if k, err := io.ReadFull(body, p); err != nil {
		return nil, fmt.Errorf("the answer broke off after %d of %d bytes: %w", k, size, err)
	}
	return p, nil
}

// contentRange reads "bytes FIRST-LAST/TOTAL" (RFC 9110 §14.4).
func contentRange(s string) (first, last, total int64, ok bool) {
	k, err := fmt.Sscanf(s, "bytes %d-%d/%d", &first, &last, &total)
	return first, last, total, err == nil && k == 3 && first >= 0 && first <= last && last < total
}

func (s *Store) Delete(ctx context.Context, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := blob.CheckName(name); err != nil {
		return err
	}
	if err := s.remove(ctx, s.key(name)); err != nil {
		return fmt.Errorf("delete %s: %w", name, explain(err))
	}
	return nil
}

// remove deletes an object with all its versions. S3 itself calls the deletion
// of what is not there a success.
func (s *Store) remove(ctx context.Context, key string) error {
	h, err := s.head(ctx, key, "")
	if err != nil {
		return err
	}
	if h.version == "" {
		return s.removeVersion(ctx, key, "")
	}
	versions, err := s.versionsOf(ctx, key)
	if err != nil {
		return err
	}
	// The newest last: until then the object is there as it was.
	for i := len(versions) - 1; i >= 0; i-- {
		if err := s.removeVersion(ctx, key, versions[i].VersionID); err != nil {
			return err
		}
	}
	return nil
}

// removeVersion deletes one version for good; "" is the object of a bucket
// without versions.
func (s *Store) removeVersion(ctx context.Context, key, version string) error {
	err := s.retry(ctx, func(ctx context.Context) error {
		return s.core.RemoveObject(ctx, s.o.Bucket, key, minio.RemoveObjectOptions{VersionID: version})
	})
	if hasCode(err, "NoSuchKey", "NoSuchVersion") {
		return nil // an earlier try had done it, or somebody else
	}
	if version == "" || !refused(err) {
		return err
	}
	if l, lockErr := s.lockOf(ctx, key, version); lockErr == nil && l.Mode != 0 {
		return fmt.Errorf("%w until %s UTC", blob.ErrLocked, l.Until.UTC().Format(time.DateTime))
	}
	return err
}

// refused reports whether the server did not want to do it.
func refused(err error) bool {
	return hasStatus(err, http.StatusForbidden) || hasStatus(err, http.StatusBadRequest) || hasStatus(err, http.StatusMethodNotAllowed) || hasStatus(err, http.StatusConflict)
}
